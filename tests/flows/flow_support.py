"""What the tests of the flows share besides fixtures."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import GPTNeoXForCausalLM

from analyzers.crosscoder.training import Trainer
from flows.config import DEFAULT_ANALYZERS
from storage import open_root

Cli = Callable[..., subprocess.CompletedProcess[str]]
# The default analyzers that look at one checkpoint alone and need no tokens but the probe's.
COMPARING = ("massive_channels", "similarity", "weight_change")
ALONE = tuple(
    word
    for name in DEFAULT_ANALYZERS
    if name not in (*COMPARING, "induction")
    for word in ("--analyzer", name)
)
TINY = ("--set", "probe.length=32", "--set", "probe.sequences=24", "--set", "measure.batch=8")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def counting(log: Path) -> Iterator[None]:
    """Append a line to a file at every forward pass of a whole model in this process."""

    def count(module: torch.nn.Module, inputs: object, output: object) -> None:
        if isinstance(module, GPTNeoXForCausalLM):
            with log.open("a") as stream:
                stream.write("pass\n")

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def stepping(log: Path) -> Iterator[None]:
    """Append its number to a file at every step of a training in this process."""
    step = Trainer.step

    def counted(self: Trainer, rows: Any) -> Any:
        report = step(self, rows)
        with log.open("a") as stream:
            stream.write(f"{report.step}\n")
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", counted)
        yield


_WATCHED = """
import sys
from pathlib import Path
sys.path.append({here!r})
from flow_support import {watch}
from flows.cli import main
sys.argv = ["ontogeny", *{arguments!r}]
with {watch}(Path({log!r})):
    main()
"""


def watched(watch: Callable[[Path], Any], log: Path, arguments: Sequence[str]) -> list[str]:
    """A process that runs the command line within ``counting(log)`` or ``stepping(log)``."""
    here = str(Path(__file__).parent)
    script = _WATCHED.format(here=here, watch=watch.__name__, log=str(log), arguments=list(arguments))
    return [sys.executable, "-c", script]


def in_a_process(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line as a process of its own: its events do not wait behind those of other tests."""
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def lines_in(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any], pause: float = 0.002) -> None:
    """Until it holds, while the process lives."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(pause)


def measured_rows(root: Path | str, table: str) -> pd.DataFrame:
    """All rows of a table but for the time of writing, in an order of their own."""
    frame = open_root(root).table(table, history=True).to_pandas().drop(columns="recorded_at")
    keys = ("run", "step", "analyzer", "metric", "site", "layer", "head", "half", "centered")
    by = [c for c in keys if c in frame]
    return frame.sort_values(by, na_position="first").reset_index(drop=True)
