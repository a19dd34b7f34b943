"""What an interrupted run needs to go on exactly: one file, replaced as a whole at every checkpoint."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from storage import OntogenyError

STATE = ".trainer_state.pt"
LOG = "training_log.jsonl"
LOCK = ".lock"


def save_state(run: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Keep model, optimiser, position and the length of the log (bytes) as of ``step``.

    No random state belongs to it: nothing is drawn after the initialisation, and the order of the data is
    a function of seed and step.
    """
    state = {
        "step": step,
        "log_bytes": (run / LOG).stat().st_size,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    temporary = run / f"{STATE}.tmp"
    torch.save(state, temporary)
    temporary.replace(run / STATE)


def load_state(run: Path) -> dict[str, Any] | None:
    """The last saved state; None where there is none, or where the log is shorter than it was then."""
    if not (run / STATE).exists():
        return None
    state: dict[str, Any] = torch.load(run / STATE, weights_only=True)
    log = run / LOG
    return state if log.exists() and log.stat().st_size >= state["log_bytes"] else None


@contextmanager
def locked(run: Path, patience: float = 20.0) -> Iterator[None]:
    """Hold the run's folder for one process; the system releases it when that process dies.

    A process whose parent was killed ends at its next step, so a newcomer waits up to ``patience``
    seconds. Raises :class:`OntogenyError` where the other one is still at work then.
    """
    with (run / LOCK).open("w") as stream:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OntogenyError(
                        f"run {os.fspath(run)!r} is being trained by another process"
                    ) from None
                time.sleep(0.1)
        yield
