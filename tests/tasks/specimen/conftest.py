import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.specimen.config import SpecimenConfig
from tasks.specimen.data import prepare

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
def tiny(prepared: Path, tmp_path: Path) -> Callable[..., SpecimenConfig]:
    """Makes a configuration, with changes that leave the tokens as they are, and a prepared folder for it."""

    def make(name: str = "out", **changes: Any) -> SpecimenConfig:
        config = SpecimenConfig(out=tmp_path / name, **{**TINY, **changes})
        shutil.copytree(prepared, config.out)
        record = config.out / "specimen.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "recipe": config.recipe}))
        return config

    return make
