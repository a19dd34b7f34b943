"""Progress bars for a person at a terminal; nothing where the output is not one."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Progress goes to stderr, so that a command's output can be piped.
console = Console(stderr=True)


@contextmanager
def bars() -> Iterator[Progress]:
    """A set of progress bars; their rows are added with ``add_task``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        yield progress
