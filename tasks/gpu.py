"""The limit on checkpoints that run on GPUs at once, kept by the Prefect server for all workers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from storage.errors import UsageError

GPU_LIMIT = "ontogeny-gpu"
"""Name of the limit that ``ontogeny bootstrap`` creates."""
VARIABLE = "ONTOGENY_GPU_LIMIT"
"""A worker keeps the limit that this names; where it is not set there is none."""


def limit_for(device: torch.device) -> str | None:
    """Name of the limit that a pass on ``device`` has to keep."""
    return os.environ.get(VARIABLE) or None if device.type == "cuda" else None


def check_limit(device: torch.device) -> None:
    """Say before anything is downloaded that the limit is missing.

    Raises:
        UsageError: the worker names a limit that the server does not have.
    """
    name = limit_for(device)
    if name is None:
        return
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            raise UsageError(
                f"{VARIABLE} names the limit {name!r}, which the Prefect server does not have: "
                "run `ontogeny bootstrap`"
            ) from None


@contextmanager
def gpu_slot(device: torch.device) -> Iterator[None]:
    """Hold a slot of the limit, if this worker keeps one and ``device`` is a GPU.

    Taking a slot costs up to two seconds, so it is taken once for a checkpoint. A limit that is missing is an
    error: Prefect would else go on without one.
    """
    name = limit_for(device)
    if name is None:
        yield
        return
    with concurrency(name, occupy=1, strict=True):
        yield
