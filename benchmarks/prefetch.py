"""What a hub series costs in wall time: measuring while the next checkpoints download, from a throttled hub.

The larger of downloading alone and measuring alone is what no order of work can beat.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from benchmarks.timing import Line, Seconds, machine, now
from storage.probe import ProbeConfig
from storage.series import Checkpoint, DirSource, HubSource
from storage.sources import describe, download, evict, folder_of, list_source
from storage.store import Store
from storage.window import Window
from tasks.measure import MeasureJob, measure, plan

BAR = 1.15

_SERVE = """
import sys
from pathlib import Path
from storage.mirror import Mirror
with Mirror({"bench/series": Path(sys.argv[1])}, bytes_per_second=int(sys.argv[2])) as mirror:
    print(mirror.url, flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Shape:
    """Size of the series and of its models."""

    checkpoints: int = 12
    width: int = 128
    layers: int = 4
    vocabulary: int = 8192
    length: int = 128
    sequences: int = 128


def run(shape: Shape | None = None, repeats: int = 3) -> Iterator[Line]:
    """Download alone, measure alone, both at once; the throttle makes the two alike, the hardest case."""
    shape = shape or Shape()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        _write_series(folder / "series", shape)
        compute = _measuring_alone(folder, shape)
        size = sum(f.stat().st_size for f in (folder / "series" / "step0").iterdir())
        speed = int(size * shape.checkpoints / compute)
        with _hub(folder / "series", speed) as url:
            os.environ["HF_ENDPOINT"] = url
            yield _line(folder, shape, speed, repeats)


@contextmanager
def _hub(series: Path, speed: int) -> Iterator[str]:
    """A throttled hub in a process of its own, as a real one would be: it must not share our interpreter."""
    command = [sys.executable, "-c", _SERVE, str(series), str(speed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def _write_series(folder: Path, shape: Shape) -> None:
    config = GPTNeoXConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        intermediate_size=4 * shape.width,
        max_position_embeddings=shape.length,
    )
    letters = {chr(33 + i): i for i in range(90)}
    words = Tokenizer(models.WordLevel({**letters, "?": 90}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    for step in range(shape.checkpoints):
        torch.manual_seed(step)
        target = folder / f"step{step}"
        GPTNeoXForCausalLM(config).save_pretrained(target)
        tokenizer.save_pretrained(target)


def _job(root: Path, shape: Shape) -> MeasureJob:
    return MeasureJob(
        root=str(root),
        probe=ProbeConfig(sequences=shape.sequences, length=shape.length),
        analyzers=("loss", "massive", "spectra", "weights"),
        parameters={},
        dtype="float32",
        device="cpu",
        batch=16,
    )


def _described(root: Path, source: HubSource) -> list[Checkpoint]:
    return [describe(c) for c in list_source("bench", source, str(root)).checkpoints]


def _measuring_alone(folder: Path, shape: Shape) -> float:
    root = folder / "alone"
    checkpoints = [
        describe(c)
        for c in list_source("bench", DirSource(path=str(folder / "series")), str(root)).checkpoints
    ]
    job = _job(root, shape)
    measure(job, checkpoints[0], Path(checkpoints[0].location))  # the first call of everything
    shutil.rmtree(root)
    start = time.perf_counter()
    for checkpoint in checkpoints:
        counts = measure(job, checkpoint, Path(checkpoint.location))
        if counts["failures"]:
            raise RuntimeError(f"{checkpoint.label} failed")
    seconds = time.perf_counter() - start
    shutil.rmtree(root)
    return seconds


def _line(folder: Path, shape: Shape, speed: int, repeats: int) -> Line:
    source = HubSource(repos={"main": "bench/series"})
    checkpoints = _described(folder, source)
    times: dict[str, list[float]] = {"download": [], "measure": [], "ours": []}
    for _ in range(repeats):
        times["measure"].append(_measuring_alone(folder, shape))
        times["download"].append(_downloading_alone(folder / "downloads", checkpoints))
        times["ours"].append(_together(folder / "together", checkpoints, shape))
    sides = {name: Seconds.of(values) for name, values in times.items()}
    larger = max(sides["download"], sides["measure"], key=lambda side: side.median)
    return Line(
        name="prefetch",
        ratio=sides["ours"].median / larger.median,
        against="the larger of downloading alone and measuring alone, same checkpoints, same throttle",
        bar=BAR,
        limit={
            "kind": "pipeline: the first download overlaps nothing",
            "bytes_per_second": speed,
            "ratio": (shape.checkpoints + 1) / shape.checkpoints,
            "share_reached": (shape.checkpoints + 1)
            / shape.checkpoints
            / (sides["ours"].median / larger.median),
        },
        seconds={"ours": sides["ours"], "against": larger},
        repeats=repeats,
        shapes=asdict(shape),
        machine=machine(torch.device("cpu")),
        date=now(),
        notes={
            "download_alone": sides["download"].median,
            "measure_alone": sides["measure"].median,
            "sum": sides["download"].median + sides["measure"].median,
        },
    )


def _downloading_alone(scratch: Path, checkpoints: list[Checkpoint]) -> float:
    start = time.perf_counter()
    for checkpoint in checkpoints:
        folder = folder_of(checkpoint, scratch)
        download(checkpoint, folder)
        evict(folder)
    return time.perf_counter() - start


def _together(root: Path, checkpoints: list[Checkpoint], shape: Shape) -> float:
    job, store = _job(root, shape), Store(str(root))
    start = time.perf_counter()
    window = Window(store, job.scratch)
    for arrival in window.walk(checkpoints, lambda c: bool(plan(job, store, c).missing)):
        counts = measure(job, arrival.checkpoint, arrival.folder)
        if counts["failures"]:
            raise RuntimeError(f"{arrival.checkpoint.label} failed: {arrival.error}")
    seconds = time.perf_counter() - start
    shutil.rmtree(root)
    return seconds
