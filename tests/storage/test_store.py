import json
import signal
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import open_root
from storage.errors import UsageError
from storage.store import Store, _version_rows, column_name
from storage.tables import SCHEMA_VERSION, TABLES

START = datetime(2026, 1, 1, tzinfo=UTC)


def metric(step: int, value: float | None, *, at: int = 0, **more: Any) -> dict[str, Any]:
    base = {"analyzer": "loss", "metric": "loss", "protocol": "p1", "tokens": step * 100, "key": "k"}
    return base | {"step": step, "value": value, "recorded_at": START + timedelta(seconds=at)} | more


def put(store: Store, *rows: dict[str, Any], run: str = "seed0", name: str = "a") -> None:
    store.write("metrics", rows, series="tiny", run=run, name=name)


def values(store: Store, **options: Any) -> dict[int, Any]:
    return {row["step"]: row["value"] for row in store.table("metrics", **options).to_pylist()}


# --- writing ---


KILLED = """
import os, signal, sys
import storage.store as store

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class Torn:
    def __init__(self, path, mode):
        self.stream = open(path, mode)
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass
    def write(self, data):
        self.stream.write(data[: len(data) // 2])
        self.stream.flush()
        die()

if sys.argv[2] == "in the middle of the file":
    store.open = Torn
else:
    store.os.replace = die
rows = [{"step": 1, "metric": "loss", "value": 1.0}]
store.Store(sys.argv[1]).write("metrics", rows, series="tiny", run="seed0", name="a")
"""


@pytest.mark.parametrize("moment", ["in the middle of the file", "before the name is given"])
def test_kill_in_a_write_leaves_nothing_visible(tmp_path: Path, moment: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    store = open_root(tmp_path)
    folder = tmp_path / "tables" / "metrics" / "tiny" / "seed0"
    assert [path.name.startswith(".a.parquet.") for path in folder.iterdir()] == [True]
    assert store.files("metrics") == []
    assert store.names("metrics", "tiny") == set()
    assert len(store.table("metrics")) == 0

    put(store, metric(1, 2.0))
    assert values(store) == {1: 2.0}
    assert pd.read_parquet(folder)["value"].tolist() == [2.0]
    assert pl.read_parquet(folder / "*.parquet")["value"].to_list() == [2.0]
    assert pq.read_table(folder)["value"].to_pylist() == [2.0]
    assert duckdb.sql(f"select value from '{folder}/*.parquet'").fetchall() == [(2.0,)]


def test_writing_twice_under_one_name_leaves_one_result(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    put(store, metric(1, 1.0))
    put(store, metric(1, 5.0))
    assert values(store, history=True) == {1: 5.0}
    assert [Path(path).name for path in store.files("metrics")] == ["a.parquet"]


def test_an_empty_result_is_complete(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    put(store, name="empty")
    assert store.names("metrics", "tiny", "seed0") == {"empty"}
    assert len(store.table("metrics")) == 0
    assert store.table("metrics").wide().empty
    put(store, metric(1, 1.0), name="full")
    assert values(store) == {1: 1.0}


def test_common_columns_are_filled_in(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    before = datetime.now(UTC)
    store.write("metrics", [{"step": 1}], series="tiny", run="seed0", name="a")
    (row,) = store.table("metrics").to_pylist()
    assert (row["series"], row["run"], row["value"]) == ("tiny", "seed0", None)
    assert before <= row["recorded_at"] <= datetime.now(UTC)


def test_an_unknown_column_is_refused(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    with pytest.raises(ValueError, match=r"table 'metrics' has no column \['valeu'\]"):
        put(store, {"step": 1, "valeu": 1.0})
    assert store.files("metrics") == []


def test_an_unknown_table_is_a_usage_error(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    with pytest.raises(UsageError, match="there is no table 'metric'; tables are checkpoints, findings,"):
        store.table("metric")
    with pytest.raises(UsageError, match="there is no table 'metric'"):
        store.write("metric", [], series="tiny", name="a")


@pytest.mark.parametrize("bad", ["..", "a/b", "../../x", "", ".hidden"])
@pytest.mark.parametrize("place", ["series", "run", "name"])
def test_names_that_leave_their_folder_are_refused(tmp_path: Path, bad: str, place: str) -> None:
    names = {"series": "tiny", "run": "seed0", "name": "a"} | {place: bad}
    with pytest.raises(UsageError, match="is not usable"):
        open_root(tmp_path / "root").write("metrics", [], **names)
    assert list(tmp_path.iterdir()) == []


def test_text_appears_at_once_and_replaces(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    store.write_text("reports/tiny.html", "old")
    assert Path(store.write_text("reports/tiny.html", "new é")).read_text("utf-8") == "new é"
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["tiny.html"]


def test_root_may_be_any_fsspec_url() -> None:
    root = f"memory://{uuid.uuid4().hex}"
    put(open_root(root), metric(1, 1.0))
    put(open_root(root), metric(2, 2.0), run="seed1")
    store = open_root(root)
    assert values(store) == {1: 1.0, 2: 2.0}
    assert values(store, series="tiny", run="seed1") == {2: 2.0}
    assert store.series() == ["tiny"]
    assert open_root(f"memory://{uuid.uuid4().hex}").series() == []


def test_a_root_that_nobody_can_open_is_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"'nowhere://x' cannot be opened"):
        open_root("nowhere://x")


def test_series_are_those_with_a_table(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    assert store.series() == []
    put(store, metric(1, 1.0))
    store.write("provenance", [], series="other", name="a")
    assert store.series() == ["other", "tiny"]


# --- which rows a reader sees ---


def test_newest_rows_by_default_every_version_on_demand(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    put(store, metric(1, 1.0, at=2), metric(2, 2.0, at=2), name="later")
    put(store, metric(1, -1.0, at=1), name="sooner")
    assert values(store) == {1: 1.0, 2: 2.0}
    versions = store.table("metrics", history=True).to_pylist()
    assert sorted(row["value"] for row in versions) == [-1.0, 1.0, 2.0]


def test_a_trajectory_never_mixes_two_protocols(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    put(store, *(metric(step, 1.0, at=1) for step in (1, 2, 3)), name="old")
    put(store, metric(2, 9.0, at=2, protocol="p2"), name="new")
    put(store, metric(1, 4.0, at=1, analyzer="weights", metric="l2"), name="another-analyzer")
    put(store, metric(1, 7.0, at=1), run="seed1")
    rows = store.table("metrics").to_pylist()
    seen = sorted((row["run"], row["analyzer"], row["step"], row["value"]) for row in rows)
    assert seen == [("seed0", "loss", 2, 9.0), ("seed0", "weights", 1, 4.0), ("seed1", "loss", 1, 7.0)]


def test_places_with_and_without_layer_are_different_rows(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    put(store, metric(1, 1.0), metric(1, 2.0, site="resid_post"), metric(1, 3.0, site="resid_post", layer=0))
    assert len(store.table("metrics")) == 3


def test_only_the_newest_fit_is_shown_and_all_rows_of_it(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    for model, at, k in (("m1", 1, 2), ("m2", 2, 2), ("m2", 2, 3)):
        row = {"model": model, "k": k, "recorded_at": START + timedelta(seconds=at)}
        store.write("state_models", [row], series="tiny", name=f"{model}-{k}")
    rows = store.table("state_models").to_pylist()
    assert sorted((row["model"], row["k"]) for row in rows) == [("m2", 2), ("m2", 3)]
    assert len(store.table("state_models", history=True)) == 3


def test_every_failure_counts(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    for name in ("a", "b"):
        store.write("failures", [{"step": 1, "error": "x"}], series="tiny", run="seed0", name=name)
    assert len(store.table("failures")) == 2


def _newest_by_hand(rows: list[dict[str, Any]]) -> list[int]:
    """Numbers of the rows that the rules of TableSpec leave over, from the rules' own words."""
    spec = TABLES["metrics"]
    ordered = sorted(rows, key=lambda row: row["recorded_at"])
    latest: dict[tuple[Any, ...], Any] = {}
    for row in ordered:
        latest[tuple(row[c] for c in spec.newest_within)] = row["protocol"]
    kept: dict[tuple[Any, ...], int] = {}
    for row in ordered:
        if latest[tuple(row[c] for c in spec.newest_within)] == row["protocol"]:
            kept[tuple(row[c] for c in spec.newest_by)] = row["n"]
    return sorted(kept.values())


row_choices = st.fixed_dictionaries(
    {
        "run": st.sampled_from(["seed0", "seed1"]),
        "step": st.integers(0, 2),
        "analyzer": st.sampled_from(["loss", "weights"]),
        "metric": st.sampled_from(["a", "b"]),
        "site": st.sampled_from([None, "x"]),
        "layer": st.sampled_from([None, 0, 1]),
        "protocol": st.sampled_from(["p1", "p2"]),
    }
)


@given(st.lists(row_choices, max_size=25), st.randoms(use_true_random=False))
def test_newest_rows_agree_with_the_rules_applied_by_hand(rows: list[dict[str, Any]], random: Any) -> None:
    times = random.sample(range(100), len(rows))
    full = [
        row | {"series": "tiny", "head": None, "n": n, "recorded_at": START + timedelta(seconds=at)}
        for n, (row, at) in enumerate(zip(rows, times, strict=True))
    ]
    table = pa.Table.from_pylist(full, schema=TABLES["metrics"].schema)
    assert sorted(_version_rows(table, TABLES["metrics"])["n"].to_pylist()) == _newest_by_hand(full)


# --- wide ---


def test_wide_has_one_column_per_metric_and_place(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    put(
        store,
        metric(1, 1.0),
        metric(1, 2.0, metric="rankme", site="resid_post", layer=3),
        metric(1, 3.0, metric="entropy", site="attn", layer=0, head=7),
        metric(2, 4.0),
    )
    frame = store.table("metrics").wide()
    assert list(frame.columns) == [
        "series",
        "run",
        "step",
        "tokens",
        "entropy[attn.0.7]",
        "loss",
        "rankme[resid_post.3]",
    ]
    assert frame["tokens"].tolist() == [100, 200]
    assert frame["loss"].tolist() == [1.0, 4.0]
    assert frame["rankme[resid_post.3]"][0] == 2.0
    assert np.isnan(frame["rankme[resid_post.3]"][1])
    assert frame["step"].dtype == frame["tokens"].dtype == np.int64


def test_wide_takes_the_metrics_named(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    put(store, metric(1, 1.0), metric(1, 2.0, metric="l2"), metric(2, None, metric="l2"))
    frame = store.table("metrics").wide(metrics=["l2"])
    assert list(frame.columns) == ["series", "run", "step", "tokens", "l2"]
    assert np.isnan(frame["l2"][1])
    with pytest.raises(UsageError, match=r"metric 'l3' is not in the store; it holds \['l2', 'loss'\]"):
        store.table("metrics").wide(metrics=["l3"])


def test_wide_keeps_rows_whose_tokens_are_unknown(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    put(store, metric(1, 1.0, tokens=None), metric(2, 2.0, tokens=None))
    put(store, metric(1, 3.0), metric(2, 4.0), run="seed1")
    frame = store.table("metrics").wide()
    assert frame["loss"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert frame["tokens"].isna().tolist() == [True, True, False, False]
    all_unknown = store.table("metrics", run="seed0", series="tiny").wide()
    assert all_unknown["loss"].tolist() == [1.0, 2.0]
    assert all_unknown["tokens"].isna().all()


def test_wide_has_one_row_per_step_where_only_some_rows_know_their_tokens(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    put(store, metric(1, 1.0, tokens=None), metric(1, 2.0, analyzer="weights", metric="l2"))
    frame = store.table("metrics").wide()
    assert frame[["step", "tokens", "l2", "loss"]].to_numpy().tolist() == [[1, 100, 2.0, 1.0]]


def test_wide_refuses_two_values_in_one_place(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    put(store, metric(1, 1.0, at=1), metric(1, 2.0, at=2, protocol="p2"))
    assert store.table("metrics").wide()["loss"].tolist() == [2.0]
    with pytest.raises(UsageError, match="'loss' has several values at step 1: choose one protocol"):
        store.table("metrics", history=True).wide()


def test_wide_is_for_metrics_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"wide\(\) is for the table 'metrics', not 'spectra'"):
        open_root(tmp_path).table("spectra").wide()


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (("loss", None, None, None), "loss"),
        (("l2", "attention.query", None, None), "l2[attention.query]"),
        (("rankme", "resid_post", 0, None), "rankme[resid_post.0]"),
        (("entropy", "attn", 2, 0), "entropy[attn.2.0]"),
    ],
)
def test_column_names(place: tuple[Any, ...], name: str) -> None:
    assert column_name(*place) == name


# --- other readers ---


def _example(kind: pa.DataType) -> Any:
    if pa.types.is_map(kind):
        return [(_example(kind.key_type), _example(kind.item_type))]
    if pa.types.is_list(kind):
        return [_example(kind.value_type)] * 2
    if pa.types.is_struct(kind):
        return {field.name: _example(field.type) for field in kind}
    if pa.types.is_string(kind):
        return "text"
    if pa.types.is_boolean(kind):
        return True
    if pa.types.is_timestamp(kind):
        return START
    return 2.5 if pa.types.is_floating(kind) else 7


def _plain_maps(row: dict[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """Maps as dictionaries, whatever a reader makes of them: pairs, or objects of key and value."""
    maps = {field.name for field in schema if pa.types.is_map(field.type)}

    def plain(pairs: Any) -> dict[str, Any]:
        pairs = pairs.items() if isinstance(pairs, dict) else pairs
        return dict((pair["key"], pair["value"]) if isinstance(pair, dict) else pair for pair in pairs)

    return {name: plain(value) if name in maps else value for name, value in row.items()}


@pytest.mark.parametrize("table", TABLES)
def test_plain_readers_agree_on_every_table(tmp_path: Path, table: str) -> None:
    schema = TABLES[table].schema
    full = {field.name: _example(field.type) for field in schema}
    absent = {"series": "tiny"}
    store = open_root(tmp_path)
    store.write(table, [full, absent], series="tiny", run="seed0", name="a", metadata={"key": "k"})
    (file,) = store.files(table)

    arrow = pq.read_table(file)
    assert arrow.schema.names == schema.names
    assert arrow.schema.types == schema.types
    about = json.loads(arrow.schema.metadata[b"ontogeny"])
    assert about == {"schema_version": SCHEMA_VERSION, "table": table, "key": "k"}
    expected = arrow.to_pylist()[0]
    assert expected == full

    expected = _plain_maps(expected, schema)
    assert _plain_maps(pl.read_parquet(file).to_dicts()[0], schema) == expected
    connection = duckdb.connect()
    connection.execute("set timezone = 'UTC'")
    cursor = connection.execute(f"select * from '{file}'")
    names = [column[0] for column in cursor.description or ()]
    found = _plain_maps(dict(zip(names, cursor.fetchall()[0], strict=True)), schema)
    assert {k: v for k, v in found.items() if not isinstance(v, datetime)} == {
        k: v for k, v in expected.items() if not isinstance(v, datetime)
    }
    frame = pd.read_parquet(file)
    assert list(frame.columns) == schema.names
    assert len(frame) == 2
    for name in ("series", "run"):
        assert frame[name][0] == expected[name]


def test_readers_take_a_whole_table_at_once(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    put(store, metric(1, 1.0), name="a")
    put(store, metric(2, 2.0, tokens=None), name="b", run="seed1")
    folder = tmp_path / "tables" / "metrics"
    pattern = f"{folder}/**/*.parquet"
    assert duckdb.sql(f"select sum(value) from '{pattern}'").fetchall() == [(3.0,)]
    assert pl.read_parquet(pattern)["value"].sum() == 3.0
    assert pd.read_parquet(folder)["value"].sum() == 3.0
    assert sorted(pq.read_table(folder)["run"].to_pylist()) == ["seed0", "seed1"]


def test_a_column_added_later_reads_as_null_in_older_files(tmp_path: Path) -> None:
    store = open_root(tmp_path)
    put(store, metric(1, 1.0))
    (file,) = store.files("metrics")
    older = pq.read_table(file).drop_columns(["note"])
    pq.write_table(older, file)
    assert store.table("metrics").to_pylist()[0]["note"] is None


def test_store_keeps_its_path_when_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_root("data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    put(store, metric(1, 1.0))
    assert (tmp_path / "data" / "tables" / "metrics" / "tiny" / "seed0" / "a.parquet").is_file()
