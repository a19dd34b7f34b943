"""Timing of alternatives in turn, and what is said about the result."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Seconds:
    """Times of one side, all repeats."""

    median: float
    fastest: float
    slowest: float

    @classmethod
    def of(cls, times: list[float]) -> "Seconds":
        """Summary of measured times."""
        return cls(statistics.median(times), min(times), max(times))


@dataclass(frozen=True)
class Line:
    """One ratio. ``seconds`` holds ``ours`` and ``against``; ``ratio`` is that of their medians.

    ``bar`` is the largest ratio that is good enough (None: not set yet), ``limit`` what arithmetic or
    bandwidth allows and the share of it that is reached.
    """

    name: str
    ratio: float
    against: str
    bar: float | None
    limit: dict[str, Any]
    seconds: dict[str, Seconds]
    repeats: int
    shapes: dict[str, Any]
    machine: dict[str, Any]
    date: str
    notes: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Line":
        """The line of such an object."""
        seconds = {side: Seconds(**each) for side, each in record["seconds"].items()}
        return cls(**{**record, "seconds": seconds})


def alternate(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Wall-clock seconds of every side, ``repeats`` times in turn, after one run of each that is not counted.

    The order is turned round from one repeat to the next, so that a drift of the machine hits all alike.
    """
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            _synchronize()
            start = time.perf_counter()
            sides[name]()
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on: processor, threads, load of the last minute, device, versions."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
