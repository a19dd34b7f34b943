"""A root on an S3-compatible store: workers on it, its tables, and what must not be in them."""

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pandas as pd
import pytest
from flow_support import TINY, Cli, measured_rows, wait_for
from pandas.testing import assert_frame_equal
from s3_support import SECRET, Bucket

from storage import open_root

STEPS = ("--steps", "0,1,2,4", "--analyzer", "spectra", "--analyzer", "similarity", "--analyzer", "weights")
ROWS = ("metrics", "spectra")


@pytest.fixture(scope="module")
def local(tiny_series: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("local")
    done = cli("measure", f"dir:{tiny_series}", "--root", str(root), *STEPS, *TINY)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def shared(
    tiny_series: Path,
    bucket: Bucket,
    environment: dict[str, str],
    cli: Cli,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, str]:
    """Root that two processes measured at the same time, this and another, and all that they printed."""
    root = f"{bucket.url}/shared"
    folder = tmp_path_factory.mktemp("workers")
    arguments = ["measure", f"dir:{tiny_series}", "--root", root, *STEPS, *TINY]
    scratch = {"ONTOGENY_SCRATCH": str(folder / "one"), "ONTOGENY_LOG": "DEBUG"}
    other = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        env=environment | bucket.environment | scratch,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: bool(open_root(root).files("checkpoints")), other, pause=0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONTOGENY_SCRATCH", str(folder / "two"))
        mine = cli(*arguments)
    printed = other.communicate(timeout=240)[0]
    assert (other.returncode, mine.returncode) == (0, 0), printed + mine.stderr
    return root, printed + mine.stdout + mine.stderr


def test_two_workers_on_one_store_give_the_tables_of_one_local_run(
    local: Path, shared: tuple[str, str]
) -> None:
    for table in ROWS:
        there, here = measured_rows(shared[0], table), measured_rows(local, table)
        assert_frame_equal(there, here, check_exact=True)
    assert len(open_root(shared[0]).table("failures")) == 0


def test_no_pass_is_run_twice(shared: tuple[str, str], tiny_series: Path, cli: Cli) -> None:
    counts = open_root(shared[0]).table("provenance", history=True).to_pandas()["counts"].map(json.loads)
    assert sum(c["keys_computed"] for c in counts) == 8 * 3
    again = cli("measure", f"dir:{tiny_series}", "--root", shared[0], *STEPS, *TINY)
    assert "All 8 checkpoints were already there; nothing was measured anew." in again.stdout
    store = open_root(shared[0])
    assert not [path for path in store.fs.find(store.path) if "/locks/" in path]


def test_plain_readers_read_it(shared: tuple[str, str]) -> None:
    store = open_root(shared[0])
    frames = [pd.read_parquet(f"s3://{path}") for path in store.files("metrics")]
    assert sum(map(len, frames)) == len(store.table("metrics", history=True))


def test_states_and_report_are_made_there(shared: tuple[str, str], tiny_series: Path, cli: Cli) -> None:
    few = (
        "--set",
        'states.trajectories=["l2","rankme_cov[final_norm]"]',
        "--set",
        "states.fit.k_max=2",
        "--set",
        "states.fit.restarts=2",
    )
    done = cli("states", f"dir:{tiny_series}", "--root", shared[0], *few)
    assert done.returncode == 0, done.stderr
    assert len(open_root(shared[0]).table("states")) > 0
    done = cli("report", "tiny", "--root", shared[0])
    assert done.returncode == 0, done.stderr
    page = fsspec.open(f"{shared[0]}/reports/tiny.html", "rt").open().read()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")


def test_the_secret_is_in_no_table_log_or_line(shared: tuple[str, str]) -> None:
    store = open_root(shared[0])
    assert SECRET not in shared[1]
    for path in store.fs.find(store.path):
        data = store.fs.cat_file(path)
        assert SECRET.encode() not in data, path
    for table in ("provenance", "failures", "metrics", "checkpoints"):
        text = store.table(table, history=True).to_pandas().to_csv()
        assert SECRET not in text
