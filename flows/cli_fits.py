"""Commands over what is stored: curves, states, outcomes, and trajectories from elsewhere."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flows import printing
from flows.options import RootOption, SeriesArgument, SetOption, app, configured, in_store, quiet, studied
from flows.printing import out
from storage.errors import UsageError
from storage.store import DEFAULT_ROOT, Store


@app.command()
def curves(
    series: SeriesArgument,
    root: RootOption = DEFAULT_ROOT,
    settings: SetOption = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="print these trajectories only, as rankme_* or rankme_cov[resid_post.3]; may be repeated",
        ),
    ] = None,
) -> None:
    """Find phases of geometry and fit growth curves in the stored trajectories of a series, and store them.

    The rules are in docs/phases.md and docs/growth.md; "not seen" is an answer. Of many trajectories the
    first ten are printed, or those that --metric names; all of them are stored. SERIES may also be the name
    of any series in the store.
    """
    from flows.curves import curves_of

    config = studied(series, root, settings)
    quiet()
    summary = curves_of(config, root)
    if summary.remark:
        out.print(f"{summary.remark}.", markup=False)
    printing.print_curves(summary, tuple(metric or ()))


@app.command()
def crosscoder(
    series: SeriesArgument,
    root: RootOption = DEFAULT_ROOT,
    run: Annotated[
        list[str] | None,
        typer.Option("--run", metavar="RUN", help="run to train on; may be given several times"),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option("--steps", metavar="LIST", help="snapshots, as 0,1,2,4..512,1000..143000:1000"),
    ] = None,
    train_steps: Annotated[
        int | None, typer.Option("--train-steps", metavar="N", help="steps of the crosscoder's training")
    ] = None,
    latents: Annotated[
        int | None, typer.Option(metavar="M", help="latents; default: 16 for each channel")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", metavar="K", help="active latents per token")] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="crosscoders to train; 3 or more give a stability")
    ] = None,
    splice: Annotated[
        bool | None,
        typer.Option("--splice/--no-splice", help="measure the loss with spliced reconstructions"),
    ] = None,
    effects: Annotated[
        bool, typer.Option("--effects", help="also compute indirect effects on subject-verb agreement")
    ] = False,
    settings: SetOption = None,
) -> None:
    """Train crosscoders over the checkpoints of each run, and follow their features from birth to death.

    Activations that the pool lacks are harvested first. An interrupted training goes on from its last state;
    what is there is not computed again. docs/crosscoder.md says what is computed and how to read it.
    """
    from flows.crosscoder import crosscoder_series

    given = {
        "steps": steps,
        "train.steps": train_steps,
        "train.latents": latents,
        "train.k": k,
        "train.seeds": seeds,
        "splice": splice,
        "effects": effects or None,
        "runs": run or None,
    }
    overrides = {f"crosscoder.{key}": value for key, value in given.items() if value is not None}
    config = configured(series, None, None, settings, more=overrides)
    quiet()
    summary = crosscoder_series(config, root)
    printing.print_crosscoders(summary)
    raise typer.Exit(1 if summary.failed else 0)


@app.command()
def predict(
    series: Annotated[
        list[str],
        typer.Argument(
            metavar="SERIES SERIES...", help="series in the store, of 3 or more models", show_default=False
        ),
    ],
    root: RootOption = DEFAULT_ROOT,
    metric: Annotated[
        str, typer.Option(help="metric whose growth curves are predicted")
    ] = "top1_over_median",
    site: Annotated[str, typer.Option(help="place of those curves; every layer counts")] = "resid_post",
    seed: Annotated[int, typer.Option(help="seed of the regressors", min=0)] = 0,
    architecture: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="predict this model: layers=12,width=768,heads=12,d_ff=3072, or a config.json",
        ),
    ] = None,
    regressor: Annotated[str, typer.Option(help="regressor of that prediction")] = "Ridge",
    out_files: Annotated[
        list[Path] | None,
        typer.Option("--out", metavar="FILE", help="write that prediction as .csv or as a plot in .html"),
    ] = None,
) -> None:
    """Score how well a model's sizes foretell its growth curves, each model left out in turn.

    With --architecture, also predict the curves of a model of those sizes. Nothing is stored. What the scores
    mean is in docs/growth.md.
    """
    from flows.predict import predict_growth, predict_model, write_predicted

    if out_files and architecture is None:
        raise UsageError("--out writes the prediction of a model: give its --architecture")
    for file in out_files or []:
        if file.suffix not in (".csv", ".html"):
            raise UsageError(f"{str(file)!r} ends in neither .csv nor .html")
    quiet()
    printing.print_predicted(predict_growth(series, root, metric, site, seed))
    if architecture is None:
        return
    found = predict_model(series, architecture, root, metric, site, regressor, seed)
    printing.print_predicted_curves(found, metric)
    for file in out_files or []:
        write_predicted(found, metric, file)
        out.print(f"written: {file}", markup=False, soft_wrap=True)


@app.command()
def states(series: SeriesArgument, root: RootOption = DEFAULT_ROOT, settings: SetOption = None) -> None:
    """Fit the latent-state model over the stored metrics of a series, and store its training map.

    SERIES may also be the name of any series in the store.
    """
    from flows.report.drivers import driver_lines
    from flows.states import fit_states_of

    config = studied(series, root, settings)
    quiet()
    summary = fit_states_of(config, root)
    if summary.remark:
        out.print(f"{summary.remark}.", markup=False)
    printing.print_states(summary)
    printing.print_beside(Store(root), config.name)
    lines = driver_lines(Store(root).table("drivers", config.name).to_pylist())
    if lines:
        out.print("What drives each transition, strongest first, with the shift of the state's mean:")
    for line in lines:
        out.print(f"  {line}", markup=False, soft_wrap=True)


@app.command()
def decode(
    series: SeriesArgument,
    root: RootOption = DEFAULT_ROOT,
    run: Annotated[str | None, typer.Option("--run", metavar="NAME", help="decode this run only")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="DIGEST", help="model to use, by the first digits of its identity"),
    ] = None,
    of: Annotated[
        str | None,
        typer.Option("--of", metavar="OTHER_SERIES", help="use the model of this series of the store"),
    ] = None,
) -> None:
    """Decode the runs of SERIES by a stored model without looking ahead: state and surprise of what is new.

    The newest model of the series is used unless --model or --of name another. Checkpoints decoded before
    keep their rows. docs/decode.md says what the flags mean. SERIES may also be the name of any series in
    the store.
    """
    from flows.decode import decode_of

    name = in_store(series, root)
    quiet()
    printing.print_decoded(decode_of(name, root, run, model, of))


@app.command()
def outcomes(
    series: SeriesArgument,
    root: RootOption = DEFAULT_ROOT,
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="NAME", help="trajectory that converges, as loss or l2[mlp.up.3]"),
    ] = None,
    below: Annotated[
        float | None, typer.Option("--below", help="a run has converged at its first value below this")
    ] = None,
    above: Annotated[
        float | None, typer.Option("--above", help="a run has converged at its first value above this")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", metavar="CSV", help="instead: columns run and outcome, larger is later or worse"
        ),
    ] = None,
    permutations: Annotated[int, typer.Option(help="reassignments of the permutation test", min=99)] = 9999,
    seed: Annotated[int, typer.Option(help="seed of the permutation test", min=0)] = 0,
) -> None:
    """Do the fitted states tell when a run converges? Detour states are named.

    Example: ontogeny outcomes specimen --metric loss --below 5. SERIES may also be the name of any series in
    the store. docs/training_map.md has the definitions.
    """
    from flows.outcomes import outcomes_of
    from flows.report.outcomes import describe

    threshold = below if above is None else above
    if (metric is None) == (file is None) or (metric is None) != (threshold is None):
        raise UsageError("give --metric with --below or --above, or --file")
    if below is not None and above is not None:
        raise UsageError("--below and --above exclude each other")
    name = in_store(series, root)
    quiet()
    direction: Any = None if metric is None else "above" if below is None else "below"
    for line in describe(outcomes_of(name, root, metric, direction, threshold, file, permutations, seed)):
        out.print(line, markup=False, soft_wrap=True)


@app.command("import")
def import_(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="files to read", show_default=False)],
    series: Annotated[str, typer.Option("--series", metavar="NAME", help="series that receives the metrics")],
    root: RootOption = DEFAULT_ROOT,
    layout: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="auto, wide, long, wandb, trainer or lm-eval")
    ] = "auto",
    run: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="column that names the run; several are joined by -"),
    ] = None,
    run_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="name of the run where no column says it")
    ] = None,
    step: Annotated[str | None, typer.Option(metavar="COLUMN", help="column of the optimizer step")] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="column of the training tokens seen")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="long: column that names the metric, several are joined by _; wide: a column to take",
        ),
    ] = None,
    value: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="column of the value: the table is long")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=VALUE", help="only such rows; of one column any of its values"),
    ] = None,
    rename: Annotated[list[str] | None, typer.Option(metavar="OLD=NEW", help="name of a metric")] = None,
    duplicates: Annotated[
        str, typer.Option(metavar="RULE", help="of different values of one step: error, mean, last or first")
    ] = "error",
    sort: Annotated[bool, typer.Option("--sort", help="accept a log whose steps go back")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show what is understood and some values; write nothing")
    ] = False,
) -> None:
    """Import metric trajectories from elsewhere: CSV, Parquet, JSON lines; wide or long.

    Also charts and histories of Weights & Biases, a Trainer's trainer_state.json, and result files of
    lm-evaluation-harness (docs/import.md). Importing the same files again changes nothing.
    """
    from flows.importing import import_metrics, options_of, preview_import, print_import

    options = options_of(
        where,
        rename,
        format=layout,
        run=run,
        run_name=run_name,
        step=step,
        tokens=tokens,
        metric=metric,
        value=value,
        duplicates=duplicates,
        sort=sort,
    )
    if dry_run:
        print_import(out, preview_import(files, series, options, root), series, dry_run=True)
        return
    quiet()
    print_import(out, import_metrics(files, series, options, root), series)
