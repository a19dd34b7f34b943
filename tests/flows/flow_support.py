"""What the tests of the flows share besides fixtures."""

import socket
import subprocess
from collections.abc import Callable

Cli = Callable[..., subprocess.CompletedProcess[str]]
TINY = ("--set", "probe.length=32", "--set", "probe.sequences=24", "--set", "measure.batch=8")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
