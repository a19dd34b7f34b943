from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.specimen.config import SpecimenConfig


def test_defaults_round_trip() -> None:
    config = SpecimenConfig(out=Path("here"))
    assert SpecimenConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.grid[0] == 0
    assert config.grid[-1] == config.steps


def test_every_field_is_described() -> None:
    assert all(field.description for field in SpecimenConfig.model_fields.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "0"),
        ({"lr": float("nan")}, "nan"),
        ({"lr": -1.0}, "-1.0"),
        ({"width": 100}, "width 100"),
        ({"betas": (0.9, 1.5)}, "1.5"),
        ({"vocabulary": 100}, "100"),
        ({"stepz": 3}, "stepz"),
    ],
)
def test_the_message_names_the_value(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SpecimenConfig(out=Path("here"), **changes)


def test_recipe_leaves_out_what_changes_no_number() -> None:
    config = SpecimenConfig(out=Path("here"))
    other = SpecimenConfig(out=Path("there"), seeds=1, workers=1)
    assert config.recipe == other.recipe
    assert "threads" in config.recipe


def test_processes_are_no_more_than_runs() -> None:
    assert SpecimenConfig(out=Path("here"), seeds=1).processes == 1
    assert SpecimenConfig(out=Path("here"), seeds=8, workers=3).processes == 3
