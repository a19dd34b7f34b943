"""Memory of a process as Linux counts it, and the peaks of alternatives, each in a process of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_ROOT = Path(__file__).parents[1]
_STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    return _status("VmRSS")


def peak() -> int:
    """Most bytes that this process held; 0 where the system does not say."""
    # Not ru_maxrss: a new process inherits that of the one which started it.
    return _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", _STATUS.read_text()) if _STATUS.is_file() else None
    return 1024 * int(found[1]) if found else 0


def peaks(module: str, sides: Iterable[str], shape: "DataclassInstance") -> dict[str, float]:
    """Megabytes that ``module.print_peak(side, **shape)`` prints of every side; empty but on Linux.

    On the CPU: what a GPU holds is not in the process.
    """
    if not _STATUS.is_file():
        return {}
    found = {}
    for side in sides:
        numbers: dict[str, Any] = asdict(shape)
        code = f"from {module} import print_peak; print_peak({side!r}, **{numbers!r})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=_ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        found[side] = round(int(done.stdout) / 1e6, 1)
    return found
