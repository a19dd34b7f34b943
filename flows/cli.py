"""The command line. It mirrors the flows one to one; each command's help teaches what it does."""

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from pydantic import ValidationError
from rich.table import Column, Table

from flows import printing
from flows.options import (
    AnalyzerOption,
    ReportFormat,
    RootOption,
    RunnerOption,
    SeriesArgument,
    SetOption,
    StepsOption,
    WorkersOption,
    app,
    configured,
    in_store,
    quiet,
)
from flows.printing import out
from storage.errors import OntogenyError, UsageError
from storage.secrets import redact
from storage.store import DEFAULT_ROOT, Store
from storage.tables import TABLES

__all__ = ["app", "main"]


@app.command()
def demo(root: RootOption = DEFAULT_ROOT) -> None:
    """Train the embedded specimen series, then study it. No network, no GPU; some minutes on 2 cores.

    A second call finds everything done and says so.
    """
    from flows.config import resolve
    from flows.specimen import train_specimen
    from flows.study import study_series
    from tasks.specimen.config import SpecimenConfig

    quiet()
    trained = train_specimen(SpecimenConfig(out=Path(root) / "specimen"))
    summary = study_series(resolve("specimen"), root)
    if trained:
        out.print(f"Trained {trained} runs of the specimen under {root}/specimen.")
    printing.print_study(summary, root)
    raise typer.Exit(1 if summary.failed else 0)


@app.command()
def study(
    series: SeriesArgument,
    root: RootOption = DEFAULT_ROOT,
    steps: StepsOption = None,
    analyzer: AnalyzerOption = None,
    settings: SetOption = None,
    runner: RunnerOption = None,
    workers: WorkersOption = None,
) -> None:
    """Audit, measure, find phases, fit the states and write the report of a series."""
    from flows.study import study_series

    config = configured(series, steps, analyzer, settings, runner, workers)
    quiet()
    summary = study_series(config, root)
    printing.print_study(summary, root)
    raise typer.Exit(1 if summary.failed else 0)


@app.command()
def specimen(
    out_folder: Annotated[Path, typer.Option("--out", help="folder that receives the runs")],
    task: Annotated[str, typer.Option(help="what is learned: text, or bigram-backcopy")] = "text",
    seeds: Annotated[int | None, typer.Option(help="number of runs")] = None,
    steps: Annotated[int | None, typer.Option(help="optimizer updates per run")] = None,
    log_until: Annotated[
        int | None, typer.Option(help="checkpoints at 0, 1, 2, 4, ... up to this step")
    ] = None,
    every: Annotated[int | None, typer.Option(help="steps between checkpoints after that")] = None,
    width: Annotated[int | None, typer.Option(help="size of the residual stream")] = None,
    layers: Annotated[int | None, typer.Option(help="transformer blocks")] = None,
    heads: Annotated[int | None, typer.Option(help="attention heads per block")] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="then serve the runs as a hub on this machine until Ctrl-C")
    ] = False,
    port: Annotated[int, typer.Option(help="port of that hub; 0 takes a free one", min=0, max=65535)] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="any other setting of docs/config.md, as lr=1e-3"),
    ] = None,
) -> None:
    """Train small GPT-NeoX runs on text that every Python install carries, or on Bigram-Backcopy.

    Bigram-Backcopy is a task with known answers (docs/backcopy.md). What is not given has the default of its
    task, in docs/config.md.

    Checkpoints come in the layout of Hugging Face, on a log-then-linear grid, with a log of the training and
    a probe that is not trained on. Interrupted training resumes; finished runs are left alone.
    """
    from flows.config import parse_override, validated
    from flows.specimen import train_specimen
    from tasks.specimen.config import TASKS

    if task not in TASKS:
        raise UsageError(f"there is no task {task!r}: give {' or '.join(TASKS)}")
    given = {
        "out": out_folder,
        "seeds": seeds,
        "steps": steps,
        "log_until": log_until,
        "every": every,
        "width": width,
        "layers": layers,
        "heads": heads,
    }
    given = {key: value for key, value in given.items() if value is not None}
    config = validated(TASKS[task], given | dict(parse_override(text) for text in settings or []), "specimen")
    quiet()
    trained = train_specimen(config)
    done = f"trained {trained} of {config.seeds} runs" if trained else "all runs were there; trained nothing"
    out.print(f"{out_folder}: {done}. Study them with: ontogeny study dir:{out_folder}")
    if serve:
        _serve(out_folder, port)


def _serve(folder: Path, port: int) -> None:
    """Serve a series' folder by the Hub's protocol on loopback, until interrupted."""
    from threading import Event

    from storage.mirror import Mirror, repositories

    with Mirror(repositories(folder, "specimen"), port=port) as mirror:
        out.print(
            f"Serving {', '.join(mirror.repos)} at {mirror.url}; Ctrl-C ends it. From another terminal:"
        )
        out.print(f"HF_ENDPOINT={mirror.url} ontogeny study hub:{next(iter(mirror.repos))}", soft_wrap=True)
        with contextlib.suppress(KeyboardInterrupt):
            Event().wait()


@app.command()
def audit(
    series: SeriesArgument,
    root: RootOption = DEFAULT_ROOT,
    steps: StepsOption = None,
    settings: SetOption = None,
) -> None:
    """Catalogue a series and list what is wrong with it. No weights are downloaded.

    Exit code 1 if there is a finding of severity error.
    """
    from flows.audit import audit_series

    config = configured(series, steps, None, settings)
    quiet()
    findings = audit_series(config, root)
    table = Table("run", "step", "kind", "severity", "detail", title=f"audit of {config.name}")
    for f in findings:
        table.add_row(f.run, "" if f.step is None else str(f.step), f.kind, f.severity, f.detail)
    out.print(table if findings else f"{config.name}: no findings.")
    raise typer.Exit(1 if any(f.severity == "error" for f in findings) else 0)


@app.command()
def measure(
    series: SeriesArgument,
    root: RootOption = DEFAULT_ROOT,
    steps: StepsOption = None,
    analyzer: AnalyzerOption = None,
    settings: SetOption = None,
    runner: RunnerOption = None,
    workers: WorkersOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be measured and how many bytes that is")
    ] = False,
    from_spectra: Annotated[
        bool,
        typer.Option(
            "--from-spectra", help="recompute spectra from stored eigenvalues: no model, no network"
        ),
    ] = False,
    harvest: Annotated[
        bool,
        typer.Option(
            "--harvest", help="also fill the pool of activations that a crosscoder needs (docs/harvest.md)"
        ),
    ] = False,
) -> None:
    """Measure every checkpoint whose results are not in the store yet. Exit code 1 if some failed."""
    from flows.measure import measure_series, plan_series

    if harvest and from_spectra:
        raise UsageError("--harvest and --from-spectra exclude each other")
    if harvest:
        settings = [*(settings or []), "crosscoder.harvest=true"]
    config = configured(series, steps, analyzer, settings, runner, workers)
    if from_spectra:
        _measure_from_spectra(config, root, dry_run)
    quiet()
    if dry_run:
        printing.print_plan(plan_series(config, root))
        return
    summary = measure_series(config, root)
    printing.print_measured(summary)
    raise typer.Exit(1 if summary.failed else 0)


def _measure_from_spectra(config: Any, root: str, dry_run: bool) -> NoReturn:
    from flows.respectra import measure_from_spectra

    if dry_run:
        raise UsageError("--dry-run and --from-spectra exclude each other")
    quiet()
    summary = measure_from_spectra(config, root)
    out.print(
        f"Recomputed the metrics of spectra of {summary.recomputed} checkpoints from stored eigenvalues; "
        f"{summary.already_there} were already there."
    )
    for label in summary.failed:
        out.print(f"[red]failed:[/red] {label} (see the table failures)")
    raise typer.Exit(1 if summary.failed else 0)


@app.command()
def report(
    series: SeriesArgument,
    format_: Annotated[
        ReportFormat, typer.Option("--format", help="html: the page; png or svg: pictures of its plots")
    ] = ReportFormat.HTML,
    plot: Annotated[
        list[str] | None,
        typer.Option(
            help="plot drawn as a picture: trajectories, layers, phases, growth, heads, map, pieces"
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="trajectory drawn, for instance rankme_cov[resid_post.3]")
    ] = None,
    root: RootOption = DEFAULT_ROOT,
) -> None:
    """Write the report of a series: one page that needs no network, or pictures of its plots.

    SERIES may also be the name of any series in the store. Pictures need the extra "figures" and a Chromium.
    """
    from flows.render import figures_of_series, report_series

    name = in_store(series, root)
    if format_ is ReportFormat.HTML and (plot or metric):
        raise UsageError("--plot and --metric are for pictures: add --format png or --format svg")
    quiet()
    if format_ is ReportFormat.HTML:
        out.print(f"report: {report_series(name, root)}")
        return
    kind: Literal["png", "svg"] = "svg" if format_ is ReportFormat.SVG else "png"
    for path in figures_of_series(name, kind, plot, metric, root):
        out.print(f"picture: {path}")


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="series|analyzers|metrics|tables", show_default=False)],
    root: RootOption = DEFAULT_ROOT,
) -> None:
    """List the series that can be studied, the analyzers, the metrics, or the tables of the store."""
    if what == "series":
        from flows.config import resolve, shipped

        table = Table("series", "title", "in the store")
        there = Store(root).series()
        names = shipped()
        for name in names:
            table.add_row(name, resolve(name).title, "yes" if name in there else "")
        for name in sorted(set(there) - set(names)):
            table.add_row(name, "", "yes")
    elif what in ("analyzers", "metrics"):
        from analyzers.crosscoder.population import METRICS as CROSSCODER_METRICS
        from analyzers.registry import load_all

        if what == "analyzers":
            table = Table("analyzer", "version", "what it measures")
            for name, cls in load_all().items():
                table.add_row(name, str(cls.version), cls.summary)
        else:
            # The name is what a reader copies: it is never cut, the formula wraps instead.
            table = Table(Column("metric", no_wrap=True), "analyzer", "formula", "unit", "range")
            for name, cls in load_all().items():
                for m in cls.metrics:
                    table.add_row(m.name, name, m.formula, m.unit, m.range)
            for m in CROSSCODER_METRICS:
                table.add_row(m.name, "crosscoder", m.formula, m.unit, m.range)
    elif what == "tables":
        store = Store(root)
        table = Table("table", "files", "rows", "what")
        for name, spec in TABLES.items():
            table.add_row(name, str(len(store.files(name))), str(len(store.table(name))), spec.what)
        if not store.series():
            table.caption = f"There is no series in the store at {root} yet."
    else:
        raise UsageError(f"cannot list {what!r}; choose series, analyzers, metrics or tables")
    out.print(table)


from flows import cli_fits, cli_serve  # noqa: E402, F401  (their commands stand after these)


def main() -> None:
    """Entry point: one clear sentence and exit code 2 for bad usage, 1 where something failed."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    # A server's automation calls a run dead that is silent for too long (deploy/automations/zombies.yaml).
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    # On a busy machine the temporary server takes longer than Prefect's 20 s to come up.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    # Threads that spin while they wait cost a few per cent less alone, and many times more on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.filterwarnings("ignore", module="prefect|pydantic|hmmlearn|sklearn")
    try:
        app()
    except UsageError as error:
        sys.exit(_say(error, 2))
    except OntogenyError as error:
        sys.exit(_say(error, 1))
    except ValidationError as error:
        from flows.config import explain

        sys.exit(_say(explain(error), 2))


def _say(error: object, code: int) -> int:
    print(f"ontogeny: {redact(str(error))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
