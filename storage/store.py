"""The store: immutable Parquet files under ROOT/tables/NAME/SERIES/RUN/, written atomically.

A file is named after what it holds (a result key, a fit, an invocation), so writing it twice is harmless and
its presence says that the result is complete. ROOT is a folder or any fsspec URL.
"""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from storage.errors import UsageError
from storage.keys import check_name
from storage.secrets import LOGIN, redacted
from storage.tables import SCHEMA_VERSION, TABLES, TableSpec

DEFAULT_ROOT = "ontogeny-data"


def now() -> datetime:
    """The present moment in UTC."""
    return datetime.now(UTC)


def _version_rows(table: pa.Table, spec: TableSpec) -> pa.Table:
    """Keep the newest rows only, as ``spec`` defines newest."""
    if "recorded_at" in table.column_names:
        table = table.sort_by("recorded_at")
    if spec.newest_of is not None:
        latest = _last_alike(table, spec.newest_within)
        value = _codes(table[spec.newest_of])
        table = table.filter(pa.array(value == value[latest]))
    if spec.newest_by:
        latest = _last_alike(table, spec.newest_by)
        table = table.filter(pa.array(latest == np.arange(len(table))))
    return table


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers that are equal exactly where values are; null equals null."""
    encoded = pc.dictionary_encode(column, null_encoding="encode").combine_chunks()
    return np.asarray(encoded.indices, dtype=np.int64)


def _last_alike(table: pa.Table, columns: Sequence[str]) -> np.ndarray:
    """For each row the number of the last row that agrees with it on ``columns``."""
    alike = np.zeros(len(table), dtype=np.int64)
    for name in columns:
        codes = _codes(table[name])
        # Renumbered at every column, so that the product stays far below 2**63.
        alike = np.unique(alike * (codes.max(initial=0) + 1) + codes, return_inverse=True)[1]
    last = np.zeros(len(table), dtype=np.int64)
    last[alike] = np.arange(len(table))  # of several rows with one number the last one stays
    return last[alike]


@dataclass(frozen=True)
class TableView:
    """Rows of one table, ready for a notebook."""

    spec: TableSpec
    arrow: pa.Table

    def __len__(self) -> int:
        return len(self.arrow)

    def to_arrow(self) -> pa.Table:
        """The rows as a pyarrow table."""
        return self.arrow

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a pandas data frame."""
        frame: pd.DataFrame = self.arrow.to_pandas()
        return frame

    def to_pylist(self) -> list[dict[str, Any]]:
        """The rows as dictionaries."""
        rows: list[dict[str, Any]] = self.arrow.to_pylist()
        return rows

    def wide(self, metrics: Sequence[str] | None = None) -> pd.DataFrame:
        """Metrics as columns: one row per (series, run, step, tokens), one column per metric and place.

        A column is named ``metric``, ``metric[site]``, ``metric[site.layer]`` or
        ``metric[site.layer.head]``. Absent values are NaN.

        Raises:
            UsageError: the table is not ``metrics``, or a metric named is not in it.
        """
        if self.spec.name != "metrics":
            raise UsageError(f"wide() is for the table 'metrics', not {self.spec.name!r}")
        table = self.arrow
        if metrics is not None:
            known = set(pc.unique(table["metric"]).to_pylist())
            for name in metrics:
                if name not in known:
                    raise UsageError(f"metric {name!r} is not in the store; it holds {sorted(known)}")
            table = table.filter(pc.is_in(table["metric"], pa.array(list(metrics))))
        rows = table.select(["series", "run", "step", "tokens", "metric", "site", "layer", "head", "value"])
        frame: pd.DataFrame = rows.to_pandas()
        places = zip(*(rows[c].to_pylist() for c in ("metric", "site", "layer", "head")), strict=True)
        frame["column"] = [column_name(*place) for place in places]
        clash = frame[frame.duplicated(["series", "run", "step", "column"])]
        if len(clash):
            raise UsageError(
                f"{clash.iloc[0]['column']!r} has several values at step {clash.iloc[0]['step']}: "
                "choose one protocol before wide()"
            )
        index = ["series", "run", "step"]
        pivoted = frame.pivot(index=index, columns="column", values="value")
        # Tokens are no part of the index: they may be null, or known for some analyzers' rows only.
        pivoted.insert(0, "tokens", frame.groupby(index)["tokens"].max())
        return pivoted.reset_index()


def column_name(metric: str, site: str | None, layer: int | None, head: int | None) -> str:
    """Name of a metric at a place: ``rankme_cov[resid_post.3]``."""
    place = ".".join(str(part) for part in (site, layer, head) if part is not None)
    return f"{metric}[{place}]" if place else metric


def _without_login(root: str) -> str:
    """``root`` if it holds no login: logs and artifacts name the paths of tables.

    Raises:
        UsageError: it does.
    """
    if LOGIN.search(root):
        raise UsageError(
            f"the root {root!r} holds a login: give user and password by the environment, or by the settings "
            "of the object store's client"
        )
    return root


class Store:
    """All tables under one root."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = _without_login(str(root))
        try:
            self.fs, self.path = fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:  # no package for it is installed, or nobody knows it
            raise UsageError(f"root {self.root!r} cannot be opened: {error}") from None
        if self.is_local and Path(self.path).is_file():
            raise UsageError(f"root {self.root!r} is a file: give a folder, which need not exist yet")

    @property
    def is_local(self) -> bool:
        """Whether the root is a folder of this machine."""
        return "file" in _protocols(self.fs)

    @property
    def is_s3(self) -> bool:
        """Whether the root is a bucket, or a folder in one, of an S3-compatible store."""
        return "s3" in _protocols(self.fs)

    def _folder(self, table: str, series: str | None = None, run: str | None = None) -> str:
        parts = [self.path, "tables", _spec(table).name]
        for kind, name in (("series", series), ("run", run)):
            if name is not None:
                parts.append(check_name(kind, name))
        return str(PurePosixPath(*parts))

    def write(
        self,
        table: str,
        rows: Sequence[Mapping[str, Any]],
        *,
        series: str,
        run: str | None = None,
        name: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """Write ``rows`` as one file called ``name``; all of it appears at once, or nothing.

        Columns ``series``, ``run`` and ``recorded_at`` are filled in where a row lacks them. No rows make a
        file without rows: a result that is complete and empty. Secrets in texts are written as ``***``.

        Raises:
            ValueError: a row has a column that the table lacks.
        """
        spec = _spec(table)
        stamp = now()
        defaults = {"series": series, "run": run, "recorded_at": stamp}
        known = set(spec.schema.names)
        filled = []
        for row in rows:
            if unknown := set(row) - known:
                raise ValueError(f"table {table!r} has no column {sorted(unknown)}")
            filled.append({**{k: v for k, v in defaults.items() if k in known}, **redacted(row)})
        about = {"schema_version": SCHEMA_VERSION, "table": table, **(metadata or {})}
        schema = spec.schema.with_metadata({"ontogeny": json.dumps(about, sort_keys=True, default=str)})
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(filled, schema=schema), sink, compression="zstd")
        path = f"{self._folder(table, series, run)}/{check_name('file', name)}.parquet"
        self._put(path, sink.getvalue().to_pybytes())
        return path

    def renew(self, table: str, series: str, run: str | None, name: str) -> None:
        """Write a file again with the present time as ``recorded_at``: its rows become the newest."""
        path = f"{self._folder(table, series, run)}/{check_name('file', name)}.parquet"
        with self.fs.open(path, "rb") as stream:
            rows = pq.ParquetFile(stream).read()
        column = rows.schema.get_field_index("recorded_at")
        stamp = pa.array([now()] * len(rows), rows.schema.field(column).type)
        sink = pa.BufferOutputStream()
        pq.write_table(rows.set_column(column, rows.schema.field(column), stamp), sink, compression="zstd")
        self._put(path, sink.getvalue().to_pybytes())

    def _put(self, path: str, data: bytes) -> None:
        if not self.is_local:
            self.fs.pipe_file(path, data)  # one PUT: object stores show all of it or nothing
            return
        target = PurePosixPath(path)
        self.fs.makedirs(str(target.parent), exist_ok=True)
        # Dot-prefixed: every reader passes over it if a kill leaves it behind.
        temporary = str(target.parent / f".{target.name}.{uuid.uuid4().hex}")
        with open(temporary, "wb") as stream:  # noqa: PTH123
            stream.write(data)
        os.replace(temporary, path)  # noqa: PTH105

    def write_text(self, relative: str, text: str) -> str:
        """Write a text file (a report) under the root, all of it at once; return its path."""
        return self.write_bytes(relative, text.encode())

    def write_bytes(self, relative: str, raw: bytes) -> str:
        """Write a file (a picture) under the root, all of it at once; return its path."""
        path = f"{self.path}/{relative}"
        self._put(path, raw)
        return path

    def files(self, table: str, series: str | None = None, run: str | None = None) -> list[str]:
        """Paths of the files of a table, in order of name."""
        folder = self._folder(table, series, run)
        self.fs.invalidate_cache()
        if not self.fs.exists(folder):
            return []
        found = [p for p in self.fs.find(folder) if p.endswith(".parquet")]
        return sorted(p for p in found if not PurePosixPath(p).name.startswith("."))

    def names(self, table: str, series: str, run: str | None = None) -> set[str]:
        """Names (without suffix) of the files of a table: the results that are complete."""
        return {PurePosixPath(path).stem for path in self.files(table, series, run)}

    def table(
        self, name: str, series: str | None = None, run: str | None = None, *, history: bool = False
    ) -> TableView:
        """Open a table. Newest rows by default; ``history=True`` gives every version of every row.

        Raises:
            UsageError: there is no such table.
        """
        spec = _spec(name)
        files = self.files(name, series, run)
        if not files:
            return TableView(spec, spec.schema.empty_table())
        data = ds.dataset(files, schema=spec.schema, format="parquet", filesystem=self.fs).to_table()
        data = data.replace_schema_metadata(None)
        return TableView(spec, data if history else _version_rows(data, spec))

    def series(self) -> list[str]:
        """Names of the series that have a table of any kind."""
        base = str(PurePosixPath(self.path, "tables"))
        self.fs.invalidate_cache()
        if not self.fs.exists(base):
            return []
        folders = [p for table in self.fs.ls(base, detail=False) for p in self.fs.ls(table, detail=False)]
        return sorted({PurePosixPath(p).name for p in folders} - {""})


def _spec(table: str) -> TableSpec:
    if table not in TABLES:
        raise UsageError(f"there is no table {table!r}; tables are {', '.join(TABLES)}")
    return TABLES[table]


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def open_root(root: str | os.PathLike[str] = DEFAULT_ROOT) -> Store:
    """Open the store at a folder or fsspec URL: ``open_root(ROOT).table("metrics").to_pandas()``."""
    return Store(root)
