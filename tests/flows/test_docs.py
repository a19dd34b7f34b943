"""The pages of docs/ say what the code says."""

import tomllib
from pathlib import Path

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from analyzers.registry import load_all
from flows.cli import app
from flows.docs import DOCS, pages
from storage.tables import TABLES

ROOT = Path(__file__).parents[2]


def test_generated_pages_are_up_to_date() -> None:
    for name, text in pages().items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, f"docs/{name} is old: run make docs"


def test_every_command_and_option_is_documented_and_has_help() -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():
        assert f"## ontogeny {name}\n" in page
        for parameter in command.params:
            if parameter.name != "help" and parameter.param_type_name == "option":
                assert parameter.help, f"{name} {parameter.name}"
                assert f"`{parameter.opts[0]}`" in page


def test_every_metric_and_table_is_documented() -> None:
    metrics = (DOCS / "metrics.md").read_text(encoding="utf-8")
    for cls in load_all().values():
        for metric in cls.metrics:
            assert f"| `{metric.name}` |" in metrics
    schema = (DOCS / "schema.md").read_text(encoding="utf-8")
    for name, spec in TABLES.items():
        assert f"### {name}\n" in schema
        for column in spec.schema.names:
            assert f"| `{column}` |" in schema


def test_pinned_versions_are_inside_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    for requirement in map(Requirement, wanted):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), requirement
