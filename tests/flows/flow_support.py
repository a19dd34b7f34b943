"""What the tests of the flows share besides fixtures."""

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd

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


# Runs the command line and appends a line to a file at every forward pass of a whole model.
COUNTING = """
import sys, torch
from transformers import GPTNeoXForCausalLM
from flows.cli import main
def count(module, inputs, output):
    if isinstance(module, GPTNeoXForCausalLM):
        with open({log!r}, "a") as stream:
            stream.write("pass\\n")
torch.nn.modules.module.register_module_forward_hook(count)
sys.argv = ["ontogeny", *{arguments!r}]
main()
"""


def measured_rows(root: Path | str, table: str) -> pd.DataFrame:
    """All rows of a table but for the time of writing, in an order of their own."""
    frame = open_root(root).table(table, history=True).to_pandas().drop(columns="recorded_at")
    keys = ("run", "step", "analyzer", "metric", "site", "layer", "head", "half", "centered")
    by = [c for c in keys if c in frame]
    return frame.sort_values(by, na_position="first").reset_index(drop=True)
