import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.specimen import SpecimenConfig, prepare

TINY: dict[str, Any] = {
    "seeds": 2,
    "steps": 10,
    "log_until": 4,
    "every": 3,
    "width": 16,
    "layers": 1,
    "heads": 1,
    "vocabulary": 300,
    "length": 16,
    "batch": 2,
    "warmup": 2,
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer, tokens and probe and no run yet: reading the text is the slow part."""
    out = tmp_path_factory.mktemp("specimen")
    prepare(SpecimenConfig(out=out, **TINY))
    return out


@pytest.fixture
def tiny(prepared: Path, tmp_path: Path) -> Callable[[str], SpecimenConfig]:
    """Makes a configuration with a prepared folder of its own."""

    def make(name: str = "out") -> SpecimenConfig:
        shutil.copytree(prepared, tmp_path / name)
        return SpecimenConfig(out=tmp_path / name, **TINY)

    return make
