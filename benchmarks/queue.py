"""A thousand checkpoints in one run, and a thousand runs that wait: does the Prefect server keep up?"""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import torch
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Scheduled
from safetensors.torch import load_file, save_file

from benchmarks.orchestration import plain
from benchmarks.servers import Database, postgresql, postgresql_programs, server
from benchmarks.timing import Line, Seconds, machine, now
from flows.config import SeriesConfig, resolve
from flows.measure import MeasureSummary, measure_series
from tasks.specimen.config import SpecimenConfig
from tasks.specimen.runs import train_all


@dataclass(frozen=True)
class Shape:
    """How many checkpoints are measured in one run, and how many runs wait meanwhile."""

    checkpoints: int = 1000
    waiting: int = 1000
    width: int = 32
    layers: int = 1
    sequences: int = 8
    length: int = 16


@flow
def queued(number: int = 0) -> int:
    """What waits in the queue."""
    return number


def run(shape: Shape | None = None) -> Iterator[Line]:
    """One line for SQLite, and one for PostgreSQL where it is installed."""
    shape = shape or Shape()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        config = series(work / "tiny", shape)
        alone = _alone(config, work, shape)
        yield _apart("queue.sqlite", config, work, shape, alone, None)
        programs = postgresql_programs()
        if programs is not None:
            with postgresql(programs) as database:
                yield _apart("queue.postgresql", config, work, shape, alone, database)


def _apart(*arguments: Any) -> Line:
    """The line from a process of its own: Prefect's thread that sends events keeps to the first server."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
        return own.submit(_line, *arguments).result()


def series(folder: Path, shape: Shape) -> SeriesConfig:
    """Checkpoints of one small model whose weights differ a little; all other files are the same ones."""
    recipe = SpecimenConfig(
        out=folder.with_name("recipe"),
        seeds=1,
        steps=1,
        log_until=1,
        every=1,
        width=shape.width,
        layers=shape.layers,
        heads=1,
        vocabulary=300,
        length=shape.length,
        batch=2,
        warmup=1,
    )
    train_all(recipe)
    first = recipe.out / "seed0" / "step0"
    weights = load_file(first / "model.safetensors")
    for step in range(shape.checkpoints):
        here = folder / f"step{step}"
        here.mkdir(parents=True)
        for file in first.iterdir():
            if file.name != "model.safetensors":
                os.link(file, here / file.name)
        moved = {name: tensor + 1e-4 * step for name, tensor in weights.items()}
        save_file(moved, here / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "probe.text": str(recipe.out / "probe.jsonl"),
        "probe.length": shape.length,
        "probe.sequences": shape.sequences,
        "measure.device": "cpu",
        "measure.analyzers": ["loss"],
    }
    return resolve(f"dir:{folder}", settings)


def _alone(config: SeriesConfig, work: Path, shape: Shape) -> list[float]:
    """Seconds per checkpoint without Prefect, three times over a tenth of the checkpoints."""
    steps = f"0..{max(0, shape.checkpoints // 10 - 1)}"
    few = config.model_copy(update={"measure": config.measure.model_copy(update={"steps": steps})})
    times = []
    for _ in range(4):
        start = time.perf_counter()
        summary = plain(few, work / "plain")
        times.append((time.perf_counter() - start) / summary.measured)
        shutil.rmtree(work / "plain")
    return times[1:]


def _line(
    name: str, config: SeriesConfig, work: Path, shape: Shape, alone: list[float], database: Database | None
) -> Line:
    home, root = work / f"{name}-home", work / name
    with (
        server(home, None if database is None else database.url) as url,
        temporary_settings({PREFECT_API_URL: url}),
        get_client(sync_client=True) as client,
    ):
        for number in range(shape.waiting):
            client.create_flow_run(queued, parameters={"number": number}, state=Scheduled())
        with _asked(url) as answers:
            start = time.perf_counter()
            summary: MeasureSummary = measure_series(config, str(root))
            seconds = time.perf_counter() - start
        if (summary.measured, summary.failed) != (shape.checkpoints, []):
            raise RuntimeError(f"{summary.measured} of {shape.checkpoints} checkpoints: {summary.failed[:3]}")
        scheduled = _scheduled(client)
        recorded = _recorded(client, shape.checkpoints)
        state = FlowRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED"]}}})
        waiting = client.count_flow_runs(flow_run_filter=state)
        if waiting < shape.waiting:
            raise RuntimeError(f"{waiting} of {shape.waiting} runs wait")
        size = _size(home, database)
    tenths = _tenths(root)
    ours = Seconds(seconds / shape.checkpoints, min(tenths), max(tenths))
    against = Seconds.of(alone)
    return Line(
        name=name,
        ratio=ours.median / against.median,
        against="the same functions called without Prefect on a tenth of the checkpoints, per checkpoint",
        bar=None,
        limit={"kind": "no orchestration", "ratio": 1.0, "share_reached": against.median / ours.median},
        seconds={"ours": ours, "against": against},
        repeats=1,
        shapes=asdict(shape),
        machine=machine(torch.device("cpu")),
        date=now(),
        notes={
            "first_tenth": tenths[0],
            "last_tenth": tenths[-1],
            "slowest_health": max(answers["/health"]),
            "slowest_count_of_runs": max(answers["/flow_runs/count"]),
            "scheduled_after": scheduled,
            "task_runs_recorded_after": recorded,
            "database_bytes": size,
        },
    )


@contextmanager
def _asked(url: str) -> Iterator[dict[str, list[float]]]:
    """Seconds that the server takes to answer, asked twice a second from another thread."""
    answers: dict[str, list[float]] = {"/health": [], "/flow_runs/count": []}
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=120) as client:
            while not ended.wait(0.5):
                for path, times in answers.items():
                    start = time.perf_counter()
                    method = "GET" if path == "/health" else "POST"
                    client.request(method, f"{url}{path}").raise_for_status()
                    times.append(time.perf_counter() - start)

    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(ask)
        try:
            yield answers
        finally:
            ended.set()
        asking.result()


def _scheduled(client: SyncPrefectClient, seconds: float = 300) -> float:
    """Seconds until the server has scheduled a run of a new deployment."""
    start = time.perf_counter()
    made = client.create_deployment(
        client.create_flow(queued),
        "after",
        schedules=[DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(hours=1)))],
    )
    mine = DeploymentFilter.model_validate({"id": {"any_": [made]}})
    while not client.count_flow_runs(deployment_filter=mine):
        if time.perf_counter() > start + seconds:
            raise RuntimeError(f"the server scheduled nothing within {seconds:g} s")
        time.sleep(0.2)
    return time.perf_counter() - start


def _recorded(client: SyncPrefectClient, count: int, seconds: float = 300) -> float:
    """Seconds until the server knows of all task runs: they come as events, written in the background."""
    start = time.perf_counter()
    request = {"task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    while int(client.request("POST", "/task_runs/count", json=request).json()) < count:
        if time.perf_counter() > start + seconds:
            raise RuntimeError(f"the server does not know of {count} task runs after {seconds:g} s")
        time.sleep(0.2)
    return time.perf_counter() - start


def _tenths(root: Path) -> list[float]:
    """Seconds per checkpoint of every tenth of the checkpoints, by the times of their files."""
    times = sorted(file.stat().st_mtime for file in root.glob("tables/metrics/**/loss-*.parquet"))
    size = max(1, len(times) // 10)
    cuts = times[::size]
    return [(end - start) / size for start, end in pairwise(cuts)]


def _size(home: Path, database: Database | None) -> int:
    if database is None:
        return sum(file.stat().st_size for file in home.glob("prefect.db*"))
    return int(database.ask("select pg_database_size('prefect')"))
