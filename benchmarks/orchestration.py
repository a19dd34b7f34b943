"""What Prefect costs: the measure flow with a server, against the plain functions on the same checkpoints."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from prefect.settings import PREFECT_API_URL, temporary_settings
from transformers.utils import logging as transformers_logging

import tasks.walk
from benchmarks.servers import server
from benchmarks.timing import Line, Seconds, alternate, machine, now
from flows.config import SeriesConfig, resolve
from flows.measure import MeasureSummary, measure_series
from tasks.measure import measure_checkpoint
from tasks.specimen.config import SpecimenConfig
from tasks.specimen.runs import train_all

transformers_logging.disable_progress_bar()  # as commands do

BAR = 1.05
PER_CHECKPOINT = 0.5
"""Seconds that orchestration may cost per checkpoint."""


@dataclass(frozen=True)
class Shape:
    """Size of the specimen: by default that of ``ontogeny demo``, one run of it over its first steps."""

    width: int = 128
    layers: int = 4
    vocabulary: int = 2048
    length: int = 128
    sequences: int = 128
    steps: int = 8
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
            "probe.text": str(folder / "probe.jsonl"),
            "probe.length": shape.length,
            "probe.sequences": shape.sequences,
            "measure.device": "cpu",
        }
        config = resolve(f"dir:{folder}", settings)
        with temporary_settings({PREFECT_API_URL: url}):
            yield _line(config, Path(work), shape, repeats)


def plain(config: SeriesConfig, root: Path) -> MeasureSummary:
    """Measure a series as the flow does, without Prefect: outside of a run there are no artifacts either."""

    def call(*arguments: Any, return_state: bool) -> Any:
        return measure_checkpoint.fn(*arguments)

    with patch.object(tasks.walk, "measure_checkpoint", call):
        summary: MeasureSummary = measure_series.fn(config, str(root))
    return summary


def _line(config: SeriesConfig, work: Path, shape: Shape, repeats: int) -> Line:
    measured: list[int] = []
    busy: dict[str, list[float]] = {"ours": [], "against": []}

    def side(name: str, call: Callable[[SeriesConfig, Path], MeasureSummary]) -> Callable[[], None]:
        def run() -> None:
            start = time.process_time()
            summary = call(config, work / name)
            busy[name].append(time.process_time() - start)
            if summary.failed:
                raise RuntimeError(f"failed: {summary.failed}")
            measured.append(summary.measured)
            shutil.rmtree(work / name)

        return run

    def ours(config: SeriesConfig, root: Path) -> MeasureSummary:
        summary: MeasureSummary = measure_series(config, str(root))
        return summary

    times = alternate({"ours": side("ours", ours), "against": side("against", plain)}, repeats)
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
            # Of this process, without the server's: less disturbed by what else the machine does.
            "processor_seconds": {name: median(values[1:]) for name, values in busy.items()},
        },
    )
