"""Pools of activations on disk: the same rows of several checkpoints of a run, as float16, read in batches.

A pool is a folder ``ROOT/pools/KEY`` (docs/harvest.md): ``pool.json`` says what it is, ``rows.npy`` which
token each row is, and every snapshot has a folder with shards and, written last, ``snapshot.json``. A folder
without it is not read. :mod:`storage.pool_writer` writes them.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Float32, Float64, Int32, Int64
from pydantic import BaseModel, ConfigDict, ValidationError

from storage.errors import DamagedCheckpointError, UsageError
from storage.keys import digest
from storage.pool_order import shuffled
from storage.store import Store

POOL_SCHEMA = 1
SHARD_ROWS = 1 << 19
"""Rows of a shard; few files, because every one that is mapped into memory stays open."""
BUFFER_BYTES = 1 << 29
"""Bytes that are read, shuffled and handed out together; two such buffers are in memory."""
_READERS = 4

POOL_FILE, ROWS_FILE, SEQUENCES_FILE, SNAPSHOT_FILE = (
    "pool.json",
    "rows.npy",
    "sequences.npy",
    "snapshot.json",
)


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolInfo(_Stored):
    """What a pool is: of which run, and by which protocol its rows were chosen and computed."""

    series: str
    run: str
    protocol: dict[str, Any]
    rows: int

    @property
    def key(self) -> str:
        """Its folder's name: digest of series, run and protocol."""
        return digest([self.series, self.run, self.protocol])


class Snapshot(_Stored):
    """One checkpoint's part of a pool.

    Attributes:
        name: its folder: revision and the digest of the weights.
        count: rows.
        mean_norm: mean Euclidean norm of the stored (float16) rows, before scaling.
        rounding: root of the share of the sum of squares that rounding to float16 changed.
        tokens_sha256: digest of ``rows.npy``.
    """

    name: str
    revision: str
    step: int
    stage: int | None
    tokens: int | None
    weights_sha256: str
    site: str
    layer: int | None
    tokens_sha256: str
    count: int
    width: int
    mean_norm: float
    rounding: float
    dtype: str = "float16"
    pool_schema: int = POOL_SCHEMA
    recorded_at: datetime

    @property
    def scale(self) -> float:
        """``sqrt(width) / mean_norm``: brings the mean norm to ``sqrt(width)``."""
        return math.sqrt(self.width) / self.mean_norm


def pools_folder(root: str) -> Path:
    """``ROOT/pools``.

    Raises:
        UsageError: ROOT is no folder of this machine.
    """
    store = Store(root)
    if not store.is_local:
        raise UsageError(f"a pool is mapped into memory and needs a local disk; ROOT is {root!r}")
    return Path(store.path) / "pools"


def snapshot_name(revision: str, weights_sha256: str) -> str:
    """Name of a snapshot's folder."""
    return f"{revision}-{weights_sha256[:16]}"


def has_snapshot(root: str, key: str, name: str) -> bool:
    """Whether a pool holds that snapshot, complete."""
    return (pools_folder(root) / key / name / SNAPSHOT_FILE).is_file()


def list_pools(root: str, series: str | None = None, run: str | None = None) -> list[PoolInfo]:
    """The pools of a root, of a series, or of a run of it, in order of name."""
    found = [_read(PoolInfo, path) for path in sorted(pools_folder(root).glob(f"*/{POOL_FILE}"))]
    return [info for info in found if series in (None, info.series) and run in (None, info.run)]


def held_bytes(root: str, series: str) -> int:
    """Bytes of all complete snapshots in the pools of a series."""
    folders = [pools_folder(root) / info.key for info in list_pools(root, series)]
    return sum(path.stat().st_size for folder in folders for path in folder.glob("[!.]*/*.npy"))


def _read(model: type[Any], path: Path) -> Any:
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DamagedCheckpointError(
            f"{str(path)!r} is not of pool schema {POOL_SCHEMA}: {error.errors()[0]['msg']}"
        ) from None


@dataclass(frozen=True)
class PoolBatch:
    """A batch of a pool: number of the batch, counted over all epochs; numbers of its rows; the values.

    ``values`` are as stored, snapshots side by side, not scaled.
    """

    number: int
    rows: Int64[np.ndarray, "batch"]
    values: Float16[np.ndarray, "batch inputs"]


class Pool:
    """A pool, mapped into memory: never read whole.

    Attributes:
        info: what it is.
        snapshots: its snapshots in order of stage and step.
        tokens: (sequence, position, token id) of every row; -1, -1, id where rows are vocabulary items.
        sequences: token ids of the probe the rows come from; None where rows are vocabulary items.
    """

    def __init__(self, folder: Path, info: PoolInfo, snapshots: Sequence[Snapshot]) -> None:
        self.info, self.snapshots = info, tuple(snapshots)
        self.tokens: Int32[np.ndarray, "rows 3"] = np.load(folder / ROWS_FILE, mmap_mode="r")
        text = folder / SEQUENCES_FILE
        self.sequences: Int32[np.ndarray, "sequences length"] | None = (
            np.load(text, mmap_mode="r") if text.is_file() else None
        )
        self._shards = [_shards(folder / snapshot.name, snapshot) for snapshot in self.snapshots]

    @classmethod
    def open(cls, root: str, key: str, steps: Collection[int] | None = None) -> "Pool":
        """Open ``ROOT/pools/KEY``, with all its snapshots or those of ``steps``.

        Where a step was harvested with several weights, the snapshot recorded last counts.

        Raises:
            UsageError: there is no such pool, it has no snapshot, or it lacks one of ``steps``.
            DamagedCheckpointError: files do not fit together; the sentence names one.
        """
        folder = pools_folder(root) / key
        if not (folder / POOL_FILE).is_file():
            raise UsageError(f"there is no pool {key!r} under {root!r}; measure with --harvest fills one")
        info = _read(PoolInfo, folder / POOL_FILE)
        found = [_read(Snapshot, path) for path in folder.glob(f"[!.]*/{SNAPSHOT_FILE}")]
        newest = {(s.stage or 0, s.step): s for s in sorted(found, key=lambda s: s.recorded_at)}
        chosen = [s for (_, step), s in sorted(newest.items()) if steps is None or step in steps]
        absent = sorted(set(steps or ()) - {s.step for s in chosen})
        if absent or not chosen:
            what = f"no snapshot of step {absent[0]}" if absent else "no snapshot"
            raise UsageError(f"pool {key!r} has {what}; measure with --harvest fills it")
        for s in chosen:
            if (s.count, s.width, s.tokens_sha256) != (info.rows, chosen[0].width, chosen[0].tokens_sha256):
                raise DamagedCheckpointError(
                    f"pool {key!r}: snapshot {s.name!r} has {s.count} rows of width {s.width}, not those of "
                    f"{chosen[0].name!r}"
                )
        return cls(folder, info, chosen)

    @property
    def rows(self) -> int:
        """Rows of each snapshot."""
        return self.info.rows

    @property
    def width(self) -> int:
        """Channels of one snapshot."""
        return self.snapshots[0].width

    @property
    def scales(self) -> Float64[np.ndarray, "snapshots"]:
        """Factor of each snapshot that brings its mean norm to ``sqrt(width)``."""
        return np.array([snapshot.scale for snapshot in self.snapshots])

    def scaled(self, values: Float16[np.ndarray, "batch inputs"]) -> Float32[np.ndarray, "batch inputs"]:
        """Stored values, each snapshot times its scale."""
        result = values.astype(np.float32)
        result *= np.repeat(self.scales, self.width).astype(np.float32)
        return result

    def read(self, rows: Int64[np.ndarray, "batch"]) -> Float32[np.ndarray, "batch inputs"]:
        """Scaled values of any rows, in the order asked for; for a few rows, not for training."""
        rows = np.asarray(rows, dtype=np.int64)
        result = np.empty((len(rows), len(self.snapshots) * self.width), np.float16)
        for s, shards in enumerate(self._shards):
            columns = slice(s * self.width, (s + 1) * self.width)
            for number, shard in enumerate(shards):
                here = rows // SHARD_ROWS == number
                result[here, columns] = shard[rows[here] - number * SHARD_ROWS]
        return self.scaled(result)

    def batches(
        self, size: int, seed: int, epochs: int, start: int = 0
    ) -> Iterator[Float32[np.ndarray, "batch inputs"]]:
        """Scaled batches, snapshots side by side; see :meth:`stored` for their order and their rows."""
        for batch in self.stored(size, seed, epochs, start):
            yield self.scaled(batch.values)

    def batches_per_epoch(self, size: int) -> int:
        """Whole batches of an epoch; the rows that are left over differ from epoch to epoch."""
        return self.rows // size

    def stored(self, size: int, seed: int, epochs: int, start: int = 0) -> Iterator[PoolBatch]:
        """Batches as stored, in an order that depends on ``size``, ``seed``, rows and width alone.

        Blocks of neighbouring rows are drawn at random into a buffer, read while the one before is handed
        out, and its rows are shuffled (:func:`storage.pool_order.shuffled`). ``start`` is the number of the
        first batch: those before it are not read, and those after it are the same as without it.

        Raises:
            UsageError: the pool has fewer rows than a batch.
        """
        per_epoch = self.batches_per_epoch(size)
        if per_epoch == 0:
            raise UsageError(f"a batch of {size} rows is larger than the pool, which has {self.rows}")
        buffer = max(size, BUFFER_BYTES // (2 * len(self.snapshots) * self.width))
        for epoch in range(start // per_epoch, epochs):
            number = max(start, epoch * per_epoch)
            skip = (number - epoch * per_epoch) * size
            groups = (
                group[max(0, skip - first) :]
                for first, group in shuffled(self.rows, buffer, seed, epoch)
                if first + len(group) > skip
            )
            for rows, values in _regrouped(self._ahead(groups), size):
                yield PoolBatch(number, rows, values)
                number += 1

    def _ahead(self, groups: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row numbers and values of every group, the next one read while this one is used."""
        with ThreadPoolExecutor(_READERS, "pool") as readers:

            def begun(group: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Future[None]]]:
                order = np.argsort(group)
                values = np.empty((len(group), len(self.snapshots) * self.width), np.float16)
                each = range(len(self.snapshots))
                return group, values, [readers.submit(self._load, s, group, order, values) for s in each]

            coming = [begun(group) for group in islice(groups, 1)]
            while coming:
                group, values, parts = coming.pop()
                for part in parts:
                    part.result()
                coming += [begun(following) for following in islice(groups, 1)]
                yield group, values

    def _load(self, snapshot: int, group: np.ndarray, order: np.ndarray, values: np.ndarray) -> None:
        """Fill a snapshot's columns of a group: read run by run of neighbours, each put where it belongs."""
        rows = group[order]
        cuts = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] % SHARD_ROWS == 0)) + 1
        columns = slice(snapshot * self.width, (snapshot + 1) * self.width)
        for a, b in pairwise([0, *cuts.tolist(), len(rows)]):
            shard, inside = divmod(int(rows[a]), SHARD_ROWS)
            values[order[a:b], columns] = self._shards[snapshot][shard][inside : inside + b - a]


def _regrouped(
    parts: Iterator[tuple[np.ndarray, np.ndarray]], size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of any length as batches of ``size``; what is left at the end is dropped."""
    left: tuple[np.ndarray, np.ndarray] | None = None
    for rows, values in parts:
        at = 0
        if left is not None:
            at = size - len(left[0])
            if at > len(rows):
                left = np.concatenate([left[0], rows]), np.concatenate([left[1], values])
                continue
            yield np.concatenate([left[0], rows[:at]]), np.concatenate([left[1], values[:at]])
        while at + size <= len(rows):
            yield rows[at : at + size], values[at : at + size]
            at += size
        left = (rows[at:].copy(), values[at:].copy()) if at < len(rows) else None


def shard_counts(rows: int) -> list[int]:
    """Rows of each shard."""
    return [min(SHARD_ROWS, rows - first) for first in range(0, rows, SHARD_ROWS)]


def shard_path(folder: Path, number: int) -> Path:
    """File of a shard."""
    return folder / f"shard-{number:04d}.npy"


def _shards(folder: Path, snapshot: Snapshot) -> list[np.ndarray]:
    shards = []
    for number, count in enumerate(shard_counts(snapshot.count)):
        path = shard_path(folder, number)
        try:
            shard = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DamagedCheckpointError(f"{str(path)!r} cannot be read: {error}") from None
        if shard.shape != (count, snapshot.width) or shard.dtype != np.float16:
            raise DamagedCheckpointError(
                f"{str(path)!r} holds {shard.dtype} {shard.shape}, not float16 {(count, snapshot.width)}"
            )
        shards.append(shard)
    return shards
