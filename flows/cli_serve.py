"""Commands for use day by day: watch a series, serve the deployments, prepare a Prefect server."""

import time
from typing import Annotated

import typer

from flows.options import RootOption, SetOption, StepsOption, app, configured, quiet
from flows.printing import out
from storage.errors import UsageError
from storage.store import DEFAULT_ROOT, Store


@app.command()
def watch(
    series: Annotated[
        str,
        typer.Argument(
            metavar="SERIES",
            help="a series in the store, as it was measured last; else as for measure",
            show_default=False,
        ),
    ],
    root: RootOption = DEFAULT_ROOT,
    once: Annotated[bool, typer.Option("--once", help="look once, then end")] = False,
    every: Annotated[float, typer.Option(help="minutes between two looks", min=0.1)] = 60.0,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="DIGEST", help="model to use, by the first digits of its identity"),
    ] = None,
    of: Annotated[
        str | None,
        typer.Option("--of", metavar="OTHER_SERIES", help="use the state model of this series of the store"),
    ] = None,
    steps: StepsOption = None,
    settings: SetOption = None,
) -> None:
    """Look at SERIES again and again: measure what is new, decode its state, tell what is unlike before.

    An anomaly or a new phase is printed, and emitted as a Prefect event that an automation can react to
    (docs/serving.md). With --steps or --set the series file counts, not the last measuring. Exit code 1
    with --once if a checkpoint failed.
    """
    from flows.watch import as_measured, watch_series

    config = None if steps or settings else as_measured(Store(root), series)
    config = config or configured(series, steps, None, settings)
    quiet()
    while True:
        summary = watch_series(config, root, of, model)
        measured = summary.measure
        out.print(
            f"{config.name}: {measured.measured} checkpoints measured, {measured.already_there} were there, "
            f"{len(measured.failed)} failed; {summary.decoded} decoded.",
            markup=False,
        )
        for alert in summary.alerts:
            out.print(f"{alert.kind}: {alert.sentence}.", markup=False, soft_wrap=True)
        for note in summary.notes:
            out.print(f"{note[:1].upper()}{note[1:]}.", markup=False, soft_wrap=True)
        if once:
            raise typer.Exit(1 if measured.failed else 0)
        time.sleep(60 * every)


@app.command()
def serve(
    root: RootOption = DEFAULT_ROOT,
    limit: Annotated[int, typer.Option(help="runs at the same time on this machine", min=1)] = 1,
) -> None:
    """Register the deployments with the Prefect server and run them on this machine until Ctrl-C.

    They are those of deploy/prefect.yaml, with their schedules and forms. PREFECT_API_URL says where the
    server is. On Ctrl-C their schedules are paused.
    """
    from flows.serving import serve_all

    serve_all(root, limit)


@app.command()
def bootstrap(
    gpus: Annotated[int, typer.Option(help="checkpoints on GPUs at once, over all workers", min=1)] = 1,
    downloads: Annotated[int, typer.Option(help="runs that download at once", min=1)] = 2,
    silence: Annotated[
        int | None,
        typer.Option(
            metavar="SECONDS",
            help="a run without a sign of life for so long counts as crashed; more than twice what workers "
            "have in PREFECT_FLOWS_HEARTBEAT_FREQUENCY; default 400",
            min=61,
        ),
    ] = None,
    webhook: Annotated[
        str | None,
        typer.Option(metavar="URL", help="call this URL on every anomaly and new phase that a watch finds"),
    ] = None,
) -> None:
    """Create on the Prefect server what the deployments rest on: work pool, limits, automations.

    A second call renews them. PREFECT_API_URL says where the server is.
    """
    from flows.serving import bootstrap as prepare

    if webhook is not None and not webhook.startswith(("http://", "https://")):
        raise UsageError("--webhook is not a URL that begins with http:// or https://")
    for line in prepare(gpus, downloads, webhook, silence):
        out.print(line, markup=False)
