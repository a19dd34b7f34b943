"""Generated pages of docs/: ``python -m flows.docs`` writes them, and a test compares them with the code.

metrics.md, commands.md, config.md and audit.md are written whole; schema.md keeps its own text and gets its
tables between two markers.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from analyzers.base import Metric
from analyzers.crosscoder.population import METRICS as CROSSCODER_METRICS
from analyzers.registry import load_all
from flows.cli import app
from flows.config import SeriesConfig
from storage.audit import KINDS
from storage.tables import SCHEMA_VERSION, TABLES
from tasks.specimen.config import TASKS
from tasks.training_log import KNOWN, LOG, OTHER_STEPS, STATE

DOCS = Path(__file__).resolve().parent.parent / "docs"
_GENERATED = "<!-- Written by `make docs` from the code; edit the code instead. -->\n"
_BEGIN, _END = "<!-- tables: written by `make docs` -->\n", "<!-- end of tables -->\n"


_IMPORTED = (
    "## import (no analyzer)",
    "",
    "What `ontogeny import` read from files ([import.md](import.md)): names, units and values are those of",
    "the files, other characters than letters, digits and `_` replaced by `_`. `site`, `layer`, `head` and",
    "`n` are null; `protocol` names the files, their digests and how they were read.",
    "",
)


def metrics_page() -> str:
    """Every metric: formula, unit, range and reference, per analyzer, with the analyzer's parameters."""
    lines = [
        "# Metrics",
        "",
        _GENERATED,
        "A value that cannot be computed is null, with the reason in the column `note`.",
        "The protocol (parameters below, probe, dtype) is part of every row's key and stands in its column",
        "`protocol`.",
        "",
    ]
    for name, cls in load_all().items():
        lines += [f"## {name} (version {cls.version})", "", f"{cls.summary[0].upper()}{cls.summary[1:]}.", ""]
        fields = cls.parameters_type.model_fields
        if fields:
            lines += ["| parameter | default | meaning |", "|---|---|---|"]
            lines += [
                f"| `{key}` | `{_default(f)}` | {_cell(f.description or '')} |" for key, f in fields.items()
            ]
            lines.append("")
        lines += [*_metric_table(cls.metrics), ""]
    return "\n".join([*lines, *_crosscoder(), *_training_log(), *_IMPORTED])


def _metric_table(metrics: Iterable[Metric]) -> list[str]:
    lines = ["| metric | formula | unit | range | reference |", "|---|---|---|---|---|"]
    for m in metrics:
        cells = (f"`{m.name}`", m.formula, m.unit, m.range, m.reference)
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return lines


def _crosscoder() -> list[str]:
    """Metrics of the features of a crosscoder, which reads many checkpoints at once."""
    return [
        "## crosscoder (`ontogeny crosscoder`)",
        "",
        "The population of features at the snapshots of a run",
        "([crosscoder_evolution.md](crosscoder_evolution.md)).",
        "The protocol names pool, snapshots and settings: values of two crosscoders do not compare.",
        "",
        *_metric_table(CROSSCODER_METRICS),
        "",
    ]


def _training_log() -> list[str]:
    """Metrics that no analyzer measures: the training wrote them down."""
    return [
        "## training_log (no analyzer)",
        "",
        f"What the training of a local run logged: `RUN/{LOG}` (JSON lines with `step`), else the",
        f"`{STATE}` of a Trainer's last checkpoint or of the run's folder. Any other number `x` of a log is",
        f"stored as `train_x`. Kept are the steps of checkpoints and, per metric, at most {OTHER_STEPS}",
        "others, evenly spaced; the report shows those of measured checkpoints. Of several entries about one",
        "step the last counts (a resumed run). NaN and Infinity are null with a note. Speeds and a Trainer's",
        "closing summary are left out; `n` is null.",
        "",
        "| metric | formula | unit | range | reference |",
        "|---|---|---|---|---|",
        *(
            f"| `{metric}` | {_cell(meaning)} | {unit} | as logged | {' or '.join(names)} in the log |"
            for metric, (names, meaning, unit) in KNOWN.items()
        ),
        "",
    ]


def commands_page() -> str:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    lines = [
        "# Commands",
        "",
        _GENERATED,
        "Exit codes: 0 all done, 1 something failed and is named, 2 bad usage.",
        "",
    ]
    for name, command in group.commands.items():
        lines += [f"## ontogeny {name}", "", command.help.strip(), ""]
        lines += ["| argument or option | default | meaning |", "|---|---|---|"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            label = (
                parameter.metavar or parameter.name
                if parameter.param_type_name == "argument"
                else parameter.opts[0]
            )
            default = "" if parameter.default is None or parameter.required else f"`{parameter.default}`"
            lines.append(f"| `{_cell(str(label))}` | {default} | {_cell(parameter.help or '')} |")
        lines.append("")
    return "\n".join(lines)


def config_page() -> str:
    """Every setting of a series file and of the specimen."""
    lines = [
        "# Configuration",
        "",
        _GENERATED,
        "A series is a TOML file (deploy/series holds those that come with the project). Any setting can be",
        "given on the command line as `--set section.key=value`. An unknown setting is an error.",
        "",
        "## Series file",
        "",
        "| setting | default | meaning |",
        "|---|---|---|",
        *dict.fromkeys(_settings(SeriesConfig, "")),
        "",
    ]
    for task, recipe in TASKS.items():
        lines += [
            f"## Specimen, task {task} (`ontogeny specimen --task {task} --set key=value`)",
            "",
            "| setting | default | meaning |",
            "|---|---|---|",
            *_settings(recipe, ""),
            "",
        ]
    return "\n".join(lines)


def _settings(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in model.model_fields.items():
        sections = [kind for kind in _types(info.annotation) if issubclass(kind, BaseModel)]
        if sections:
            for section in sections:
                yield from _settings(section, f"{prefix}{name}.")
        else:
            yield f"| `{prefix}{name}` | {_shown(info)} | {_cell(info.description or '')} |"


def _types(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        yield annotation
    for part in get_args(annotation):
        yield from _types(part)


def _default(info: FieldInfo) -> Any:
    return "" if info.default is PydanticUndefined else info.default


def _shown(info: FieldInfo) -> str:
    default = _default(info)
    if default == "" or default is None:
        return ""
    if isinstance(default, tuple):
        default = ", ".join(str(item) for item in default)
    return f"`{_cell(str(default))}`"


def audit_page() -> str:
    """Every kind of finding."""
    lines = [
        "# Audit",
        "",
        _GENERATED,
        "`ontogeny audit SERIES` (and every measuring) lists the series and writes its findings to the",
        "table `findings`. A finding of severity `error` excludes the checkpoint from measuring; it then",
        "has a row in `failures`. No weights are downloaded: names, sizes and digests come from the Hub's",
        "metadata, or are taken from the files of a folder.",
        "",
        "| kind | what it means |",
        "|---|---|",
        *(f"| `{kind}` | {_cell(what)} |" for kind, what in KINDS.items()),
        "",
    ]
    return "\n".join(lines)


def schema_tables() -> str:
    """The columns of every table."""
    lines = [f"Schema version {SCHEMA_VERSION}.", ""]
    for name, spec in TABLES.items():
        folder = f"tables/{name}/SERIES/RUN/" if spec.per == "run" else f"tables/{name}/SERIES/"
        lines += [
            f"### {name}",
            "",
            f"{spec.what[0].upper()}{spec.what[1:]}. Files: `{folder}*.parquet`.",
            "",
        ]
        lines += ["| column | type | meaning |", "|---|---|---|"]
        for column in spec.schema:
            doc = column.metadata[b"doc"].decode()
            lines.append(f"| `{column.name}` | `{column.type}` | {_cell(doc)} |")
        lines.append("")
    return "\n".join(lines)


def schema_page(current: str) -> str:
    """docs/schema.md with its tables made anew."""
    before, found, rest = current.partition(_BEGIN)
    _, closed, after = rest.partition(_END)
    if not found or not closed:
        raise ValueError("docs/schema.md lacks the markers of its tables")
    return f"{before}{_BEGIN}\n{schema_tables()}\n{_END}{after}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def pages() -> dict[str, str]:
    """All generated pages by file name."""
    return {
        "metrics.md": metrics_page(),
        "commands.md": commands_page(),
        "config.md": config_page(),
        "audit.md": audit_page(),
        "schema.md": schema_page((DOCS / "schema.md").read_text(encoding="utf-8")),
    }


def main() -> int:
    """Write the pages; return 0."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
