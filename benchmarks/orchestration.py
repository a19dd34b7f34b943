"""What Prefect costs: the measure flow with a server, against the plain functions on the same checkpoints."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from prefect.settings import PREFECT_API_URL, temporary_settings

from benchmarks.timing import Line, Seconds, alternate, machine, now
from flows.config import SeriesConfig, resolve
from flows.measure import MeasureSummary, job_of, list_catalogue, measure_series
from storage.store import Store
from storage.window import Window
from tasks.measure import measure, plan, show_newest
from tasks.specimen.config import SpecimenConfig
from tasks.specimen.runs import train_all
from tasks.training_log import record_training_logs

BAR = 1.05
PER_CHECKPOINT = 0.5
"""Seconds that orchestration may cost per checkpoint."""


@dataclass(frozen=True)
class Shape:
    """Size of the specimen: by default that of ``ontogeny demo``, one run of it, with untrained steps."""

    width: int = 128
    layers: int = 4
    vocabulary: int = 8192
    length: int = 128
    sequences: int = 256
    steps: int = 10
    every: int = 1


def run(shape: Shape | None = None, repeats: int = 3) -> Iterator[Line]:
    """The specimen's checkpoints, measured from an empty store by both sides in turn."""
    shape = shape or Shape()
    with tempfile.TemporaryDirectory() as work, server(Path(work) / "prefect") as url:
        folder = Path(work) / "series"
        train_all(
            SpecimenConfig(
                out=folder,
                seeds=1,
                steps=shape.steps,
                log_until=1,
                every=shape.every,
                width=shape.width,
                layers=shape.layers,
                heads=4 if shape.width % 4 == 0 else 1,
                vocabulary=shape.vocabulary,
                length=shape.length,
                batch=2,
                warmup=1,
            )
        )
        settings = {
            "probe.length": shape.length,
            "probe.sequences": shape.sequences,
            "measure.device": "cpu",
            "measure.analyzers": ["attention", "logits", "loss", "massive", "spectra", "weights"],
        }
        config = resolve(f"dir:{folder}", settings)
        with temporary_settings({PREFECT_API_URL: url}):
            yield _line(config, Path(work), shape, repeats)


@contextmanager
def server(home: Path, seconds: float = 180) -> Iterator[str]:
    """URL of a Prefect server of its own, on SQLite."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    home.mkdir(parents=True)
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/api"
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + seconds
            while not _answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((home / "server.log").read_text())
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def plain(config: SeriesConfig, root: Path) -> int:
    """Measure a series as the flow does, without Prefect; return the checkpoints measured."""
    store = Store(str(root))
    found = list_catalogue(config, str(root))
    record_training_logs(store, config.name, found.listed)
    job = job_of(config, str(root), found)
    plans = [(c, plan(job, store, c)) for c in found.sound]
    todo = [c for c, each in plans if each.names]
    for arrival in Window(store, job.scratch).walk(todo, lambda c: bool(plan(job, store, c).names)):
        if measure(job, arrival.checkpoint, arrival.folder)["failures"]:
            raise RuntimeError(f"{arrival.checkpoint.label} failed")
    show_newest(store, plans)
    return len(todo)


def _line(config: SeriesConfig, work: Path, shape: Shape, repeats: int) -> Line:
    measured: list[int] = []

    def theirs() -> None:
        measured.append(plain(config, work / "plain"))
        shutil.rmtree(work / "plain")

    def ours() -> None:
        summary: MeasureSummary = measure_series(config, str(work / "flow"))
        if summary.failed:
            raise RuntimeError(f"failed: {summary.failed}")
        measured.append(summary.measured)
        shutil.rmtree(work / "flow")

    times = alternate({"ours": ours, "against": theirs}, repeats)
    if len(set(measured)) != 1:
        raise RuntimeError(f"the sides measured {sorted(set(measured))} checkpoints")
    sides = {name: Seconds.of(values) for name, values in times.items()}
    extra = (sides["ours"].median - sides["against"].median) / measured[0]
    ratio = sides["ours"].median / sides["against"].median
    return Line(
        name="orchestration",
        ratio=ratio,
        against="the same functions called without Prefect, same checkpoints, same store",
        bar=BAR,
        limit={"kind": "no orchestration", "ratio": 1.0, "share_reached": 1 / ratio},
        seconds=sides,
        repeats=repeats,
        shapes=asdict(shape),
        machine=machine(torch.device("cpu")),
        date=now(),
        notes={
            "checkpoints": measured[0],
            "seconds_per_checkpoint": extra,
            "bar_per_checkpoint": PER_CHECKPOINT,
        },
    )
