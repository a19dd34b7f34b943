"""What all commands share: the application, their options, and how SERIES becomes a configuration."""

import logging
import os
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from storage.store import Store

app = typer.Typer(
    name="ontogeny",
    help="Watch a language model grow up: measure its training checkpoints, find the phases of its training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _root(root: str) -> str:
    """``root`` if a store can be opened there: a wrong one is said before any work begins."""
    return Store(root).root


class ReportFormat(StrEnum):
    """What `report` writes: the page, or pictures of its plots."""

    HTML = "html"
    PNG = "png"
    SVG = "svg"


SeriesArgument = Annotated[
    str,
    typer.Argument(
        metavar="SERIES",
        help="a name of deploy/series, a TOML file, hub:OWNER/NAME, or dir:PATH",
        show_default=False,
    ),
]
RootOption = Annotated[
    str,
    # Before a run is made, whose parameters stay in Prefect\'s database.
    typer.Option("--root", envvar="ONTOGENY_ROOT", help="folder or fsspec URL of the store", callback=_root),
]
StepsOption = Annotated[
    str | None,
    typer.Option("--steps", metavar="LIST", help="steps to take, as 0,1,2,4..512,1000..143000:1000"),
]
AnalyzerOption = Annotated[
    list[str] | None,
    typer.Option("--analyzer", metavar="NAME", help="analyzer to run; may be given several times"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="any setting of the series file, as measure.batch=8"),
]

RunnerOption = Annotated[
    str | None,
    typer.Option("--runner", metavar="KIND", help="what runs the workers: threads, processes, dask or ray"),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", metavar="N", help="workers that share the checkpoints")
]


def configured(
    series: str,
    steps: str | None,
    analyzers: list[str] | None,
    settings: list[str] | None,
    runner: str | None = None,
    workers: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> Any:
    """The configuration of a series with what the command line says otherwise.

    ``more`` maps ``section.key`` to what other options say.
    """
    from flows.config import parse_override, resolve

    overrides = dict(parse_override(text) for text in settings or []) | dict(more or {})
    if steps is not None:
        overrides["measure.steps"] = steps
    if analyzers:
        overrides["measure.analyzers"] = analyzers
    if runner is not None:
        overrides["measure.runner"] = runner
    if workers is not None:
        overrides["measure.workers"] = workers
    return resolve(series, overrides)


def studied(series: str, root: str, settings: list[str] | None) -> Any:
    """The configuration of a series, or of one that is only in the store."""
    from flows.config import parse_override, resolve_stored

    return resolve_stored(series, Store(root).series(), dict(parse_override(text) for text in settings or []))


def quiet() -> None:
    """Keep Prefect's and transformers' chatter off the terminal; a configured server still gets the logs."""
    from prefect.logging.configuration import setup_logging
    from prefect.logging.handlers import APILogHandler, PrefectConsoleHandler
    from prefect.settings import PREFECT_API_URL
    from transformers.utils import logging as transformers_logging

    setup_logging()
    names = [None, *(name for name in logging.root.manager.loggerDict if name.startswith("prefect"))]
    for name in names:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if isinstance(handler, PrefectConsoleHandler):
                handler.setLevel(os.environ.get("ONTOGENY_LOG", "CRITICAL"))
            elif isinstance(handler, APILogHandler) and not PREFECT_API_URL.value():
                logger.removeHandler(handler)  # the temporary server may be gone before the last line arrives
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def in_store(series: str, root: str) -> str:
    """Name of a series, which may be one of the store's."""
    stored = series in Store(root).series()
    return series if stored else str(configured(series, None, None, None).name)
