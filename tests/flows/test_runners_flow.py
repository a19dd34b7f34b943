"""A series spread over workers: the same tables, whoever runs them, and whatever ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from flow_support import TINY, Cli, measured_rows
from pandas.testing import assert_frame_equal

from storage import open_root
from tasks.runners import dealt
from tasks.walk import parts

SMALL = ("--steps", "0,1,2,4", *TINY)
SMALL += tuple(w for name in ("spectra", "similarity", "weights", "loss") for w in ("--analyzer", name))
ROWS = ("metrics", "spectra")


@pytest.fixture(scope="module")
def alone(tiny_series: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root measured by one worker, in the flow itself."""
    root = tmp_path_factory.mktemp("alone")
    done = cli("measure", f"dir:{tiny_series}", "--root", str(root), *SMALL)
    assert "Measured 8 checkpoints (32 results, 8 forward passes)" in done.stdout, done.stderr
    return root


def test_parts_are_contiguous_and_differ_by_one_at_most() -> None:
    for size in range(1, 12):
        for count in range(1, 6):
            found = parts(list(range(size)), count)  # type: ignore[arg-type]
            assert [item for part in found for item in part] == list(range(size))
            sizes = [len(part) for part in found]
            assert len(sizes) == min(size, count)
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) > 0


def assert_same(root: Path, alone: Path) -> None:
    for table in ROWS:  # the keys too: they are a column
        assert_frame_equal(measured_rows(root, table), measured_rows(alone, table), check_exact=True)


@pytest.mark.parametrize(
    ("kind", "workers", "passes", "settings"),
    [
        ("threads", 2, 8, ()),
        # The second and the third part begin inside a run: its first and the previous checkpoint are run too.
        ("threads", 3, 12, ()),
        ("processes", 2, 8, ()),
        ("dask", 2, 8, ("--set", "measure.gpus=1")),  # its workers offer a resource of that name
        ("ray", 2, 8, ()),
    ],
)
def test_every_runner_gives_the_same_tables(
    kind: str,
    workers: int,
    passes: int,
    settings: tuple[str, ...],
    alone: Path,
    tiny_series: Path,
    cli: Cli,
    tmp_path: Path,
) -> None:
    spread = ("--runner", kind, "--workers", str(workers), *settings)
    done = cli("measure", f"dir:{tiny_series}", "--root", str(tmp_path), *SMALL, *spread)
    assert f"Measured 8 checkpoints (32 results, {passes} forward passes)" in done.stdout, done.stderr
    assert_same(tmp_path, alone)


# What crosses the border of a process is tested above; each process takes many seconds to start.
SPREADS = [
    pytest.param(("--runner", "threads", "--workers", "2"), id="threads"),
    pytest.param(("--runner", "processes", "--workers", "2"), id="processes", marks=pytest.mark.long),
]


@pytest.mark.parametrize("spread", [pytest.param((), id="flow"), *SPREADS])
def test_sequences_split_over_devices_give_equal_rows(
    spread: tuple[str, ...], alone: Path, tiny_series: Path, cli: Cli, tmp_path: Path
) -> None:
    devices = ("--set", f"measure.devices={['cpu'] * 2 * (2 if spread else 1)}")
    done = cli("measure", f"dir:{tiny_series}", "--root", str(tmp_path), *SMALL, *spread, *devices)
    assert "Measured 8 checkpoints (32 results, 8 forward passes)" in done.stdout, done.stderr
    found, expected = measured_rows(tmp_path, "metrics"), measured_rows(alone, "metrics")
    # The keys too: they are a column.
    assert_frame_equal(found, expected, check_exact=False, rtol=1e-9, atol=0)
    # What is sampled, or read from the weights, is no sum over sequences.
    whole = found["analyzer"].isin(["similarity", "weights", "training_log"])
    assert_frame_equal(found[whole], expected[whole], check_exact=True)
    found, expected = measured_rows(tmp_path, "spectra"), measured_rows(alone, "spectra")
    assert_frame_equal(found.drop(columns="eigenvalues"), expected.drop(columns="eigenvalues"))
    for ours, theirs in zip(found["eigenvalues"], expected["eigenvalues"], strict=True):
        # A norm takes one dimension away: its eigenvalue is 0 up to rounding of the largest.
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12 * max(theirs))


def test_devices_are_dealt_to_workers() -> None:
    four = ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert [dealt(four, n, 4) for n in range(4)] == [(device,) for device in four]
    assert [dealt(four, n, 3) for n in range(3)] == [("cuda:0", "cuda:3"), ("cuda:1",), ("cuda:2",)]
    assert dealt(four, 0, 1) == four
    assert [dealt(("cuda:0", "cuda:1"), n, 3) for n in range(3)] == [("cuda:0",), ("cuda:1",), ("cuda:0",)]
    assert dealt((), 0, 2) == ()


@pytest.mark.parametrize("spread", SPREADS)
def test_a_broken_checkpoint_is_recorded_and_the_others_are_measured(
    spread: tuple[str, ...], series: Path, cli: Cli, tmp_path: Path
) -> None:
    weights = series / "seed0" / "step1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    root = tmp_path / "root"
    done = cli("measure", f"dir:{series}", "--root", str(root), *SMALL, *spread)
    assert done.returncode == 1
    failures = open_root(root).table("failures").to_pandas()
    assert set(failures["step"]) == {1}
    rows = measured_rows(root, "metrics")
    assert set(rows["step"][rows["analyzer"] == "loss"]) == {0, 1, 2, 4}
    assert len(rows[(rows["run"] == "seed0") & (rows["step"] == 1) & (rows["analyzer"] == "loss")]) == 0


LOADER = """
import os, signal
from tasks.models import load_adapter

def load(folder):
    if folder.parent.name == "seed1" and folder.name == "step2" and not os.path.exists({mark!r}):
        open({mark!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return load_adapter(folder, "float32", "cpu")
"""


def test_a_worker_that_dies_is_recorded_and_the_next_call_goes_on(
    tiny_series: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killer.py").write_text(LOADER.format(mark=str(tmp_path / "killed")))
    monkeypatch.syspath_prepend(tmp_path)
    root = tmp_path / "root"
    own = ("--set", "source.loader=killer:load", "--analyzer", "loss", "--steps", "0,1,2,4", *TINY)
    call = ("measure", f"dir:{tiny_series}", "--root", str(root), *own)
    done = cli(*call, "--runner", "processes", "--workers", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    failures = open_root(root).table("failures").to_pandas()
    assert failures["error"].str.startswith("its worker died").all()
    assert {("seed1", 2), ("seed1", 4)} <= set(zip(failures["run"], failures["step"], strict=True))
    again = cli(*call)
    assert again.returncode == 0, again.stderr
    loss = open_root(root).table("metrics").to_pandas().query("metric == 'loss'")
    assert len(loss) == 8


def killed(flow: int) -> None:
    os.kill(flow, signal.SIGKILL)


def interrupted(flow: int) -> None:
    os.kill(flow, signal.SIGINT)


def control_c(flow: int) -> None:
    """A terminal sends the signal to all processes of the command."""
    os.killpg(flow, signal.SIGINT)


@pytest.mark.parametrize(
    "end", [killed, *(pytest.param(end, marks=pytest.mark.long) for end in (interrupted, control_c))]
)
def test_workers_end_with_the_flow_and_the_next_call_equals_one_undisturbed(
    end: Callable[[int], None],
    alone: Path,
    tiny_series: Path,
    environment: dict[str, str],
    cli: Cli,
    tmp_path: Path,
) -> None:
    call = ("measure", f"dir:{tiny_series}", "--root", str(tmp_path), *SMALL)
    spread = ("--runner", "processes", "--workers", "2")
    flow = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *call, *spread],
        env=environment,
        start_new_session=True,
        # A shell that runs the tests in the background lets its children ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = tmp_path / "tables" / "metrics"
    while len(list(metrics.rglob("loss-*.parquet"))) < 1:
        assert flow.poll() is None
        time.sleep(0.02)
    workers = psutil.Process(flow.pid).children(recursive=True)
    assert workers
    end(flow.pid)
    assert flow.wait(120) == (-signal.SIGKILL if end is killed else 130)
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert not alive
    assert open_root(tmp_path).table("failures").to_pandas().empty
    done = cli(*call)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, alone)


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_a_missing_extra_is_one_sentence(
    kind: str, tiny_series: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"prefect_{kind}", None)
    done = cli("measure", f"dir:{tiny_series}", "--root", str(tmp_path), "--runner", kind)
    assert done.returncode == 2
    assert f"pip install -e '.[{kind}]'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--runner", "slurm"), "measure.runner"),
        (("--workers", "0"), "measure.workers"),
        (("--runner", "processes", "--set", "measure.address=tcp://x:1"), "runs on this machine"),
        (("--runner", "ray", "--set", "measure.gpus=64"), "this machine has"),
        (("--runner", "ray", "--set", "measure.devices=['cpu']"), "those of their workers"),
        (("--set", "measure.devices=['cpu', 'auto']"), "device 'auto' is not 'cpu' or 'cuda:N'"),
        (("--set", "measure.devices=['cpu']", "--set", "measure.device=cpu"), "name them in one of the two"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_listed(
    options: tuple[str, ...], sentence: str, tiny_series: Path, cli: Cli, tmp_path: Path
) -> None:
    done = cli("measure", f"dir:{tiny_series}", "--root", str(tmp_path), *options)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not list(tmp_path.iterdir())
