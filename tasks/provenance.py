"""What ran, on what, with which versions: one row of ``provenance`` per invocation."""

import json
import os
import platform
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from storage.store import Store, now

_PACKAGES = ("ontogeny", "torch", "transformers", "numpy", "scikit-learn", "hmmlearn", "pyarrow", "prefect")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def machine() -> dict[str, Any]:
    """Processor, cores, torch threads, accelerator and operating system; no names of hosts or users."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": gpu,
    }


@contextmanager
def invocation(store: Store, series: str, command: str, config: dict[str, Any]) -> Iterator[dict[str, int]]:
    """Record an invocation when it ends, however it ends; the caller fills the yielded counts."""
    counts: dict[str, int] = {}
    identity = uuid.uuid4().hex
    started = now()
    try:
        yield counts
    finally:
        row = {
            "invocation": identity,
            "command": command,
            "config": json.dumps(config, sort_keys=True),
            "versions": json.dumps(versions(), sort_keys=True),
            "machine": json.dumps(machine(), sort_keys=True),
            "started": started,
            "finished": now(),
            "counts": json.dumps(counts, sort_keys=True),
        }
        store.write("provenance", [row], series=series, name=f"{started:%Y%m%dT%H%M%S}-{identity[:8]}")
