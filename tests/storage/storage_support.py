"""Types of the fixtures that the tests of storage share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

WriteCheckpoint = Callable[..., Path]
AskHub = Callable[..., Any]
