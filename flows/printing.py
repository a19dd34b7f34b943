"""What the commands say on the terminal about what a flow returned."""

import math
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

out = Console()
# Of a long list that a table holds as well, so many entries are printed.
_FEW = 10


def print_plan(items: list[Any]) -> None:
    """What would be measured, and how many bytes that is."""
    todo = [item for item in items if item.missing]
    labels = {label for item in todo for label in item.compared}
    others = [item for item in items if item.label in labels and not item.missing]
    measured = [item for item in items if item.wanted]
    table = Table("checkpoint", "MB", "missing")
    for item in todo:
        table.add_row(item.label, f"{(item.bytes or 0) / 1e6:,.1f}", ", ".join(item.missing))
    if todo:
        out.print(table)
    out.print(
        f"{len(todo)} of {len(measured)} checkpoints to measure, {_gigabytes(todo)} of weights to read, "
        f"{_gigabytes([item for item in todo if item.download])} of them to download; "
        f"{len(measured) - len(todo)} have all their results."
    )
    if others:
        out.print(
            f"{len(others)} more are read because others are compared with them: {_gigabytes(others)}, "
            f"{_gigabytes([item for item in others if item.download])} of them to download."
        )
    if todo:
        seconds = sum(item.seconds or 0 for item in todo)
        out.print(
            f"Forward passes: about {timedelta(seconds=round(seconds))} on this machine, judged by a matrix "
            "product; loading and eigenvalues come on top."
        )
    pooled = [item for item in items if item.harvested]
    if pooled:
        gigabytes = sum(item.pool_bytes or 0 for item in pooled) / 1e9
        unknown = sum(item.pool_bytes is None for item in pooled)
        out.print(
            f"Pool: {len(pooled)} snapshots to harvest, {gigabytes:,.2f} GB that stay on disk, "
            f"{sum(item.pool_passes for item in pooled)} forward passes beyond those of the analyzers."
            + (f" The size of {unknown} is not counted: the loaded model says it." * bool(unknown))
        )


def _gigabytes(items: list[Any]) -> str:
    return f"{sum(item.bytes or 0 for item in items) / 1e9:,.2f} GB"


def print_measured(summary: Any) -> None:
    """What was measured, found and failed."""
    if summary.keys_computed or summary.failed or summary.snapshots:
        out.print(
            f"Measured {summary.measured} checkpoints ({summary.keys_computed} results, "
            f"{summary.forward_passes} forward passes); {summary.already_there} were already there."
        )
    else:
        out.print(f"All {summary.checkpoints} checkpoints were already there; nothing was measured anew.")
    if summary.snapshots:
        out.print(f"Harvested {summary.snapshots} snapshots into the pool.")
    if summary.findings:
        counts = ", ".join(f"{number} {severity}" for severity, number in sorted(summary.findings.items()))
        out.print(f"Audit findings: {counts}.")
    if summary.not_asked:
        out.print(
            f"[red]{summary.not_asked} checkpoints were not asked for[/red]: the Hub had stopped answering."
        )
    for label in summary.failed:
        out.print(f"[red]failed:[/red] {label} (see the table failures)")


def print_curves(summary: Any, patterns: tuple[str, ...] = ()) -> None:
    """The phases of each trajectory and run, then the growth curves of all runs.

    ``patterns`` choose trajectories by metric or name, all that fit; without any the first ten are printed,
    and how many more there are.
    """
    trajectories = list(dict.fromkeys(row.trajectory for row in summary.rows))
    growth = summary.growth
    if patterns:
        trajectories = [name for name in trajectories if _named(name, patterns)]
        growth = [row for row in growth if _named(row.trajectory, patterns)]
        if not trajectories and not growth:
            out.print(f"No stored curve is of {', '.join(patterns)}.", markup=False)
    shown = trajectories if patterns else trajectories[:_FEW]
    for trajectory in shown:
        table = Table(
            "run", "shape", "end of collapse", "end of expansion", "compression", title=escape(trajectory)
        )
        for row in summary.rows:
            if row.trajectory == trajectory:
                table.add_row(
                    "all runs" if row.run is None else row.run,
                    (row.shape or "not judged").replace("-", ", "),
                    _end(row, "collapse"),
                    _end(row, "expansion"),
                    _depth(row, "compression"),
                )
        out.print(table)
    for sentence in summary.skipped[:_FEW]:
        out.print(f"No phases: {sentence}.", markup=False)
    _more(len(summary.skipped) - _FEW, "without phases")
    _more(len(trajectories) - len(shown), "trajectories")
    _print_growth(growth, patterns)
    for sentence in summary.growth_skipped:
        out.print(f"No growth curves: {sentence}.", markup=False)
    for line in head_lines(summary.heads):
        out.print(line, markup=False, soft_wrap=True)
    for sentence in summary.heads_skipped:
        out.print(f"No births of heads: {sentence}.", markup=False)
    if (summary.rows or summary.growth or summary.heads) and not summary.computed:
        out.print("The stored curves are of the same data and settings.")


def head_lines(rows: list[Any]) -> list[str]:
    """Per run, how many heads of each kind were born, and the first of them with its interval."""
    from analyzers.head_births import HEAD_KINDS

    found: dict[str, list[str]] = {}
    for row in rows:
        if row.run is not None:
            kind = HEAD_KINDS[row.trajectory.partition("[")[0]][0]
            found.setdefault(row.run, []).append(f"{kind} heads: {_born(row)}")
    return [f"{run}: {'; '.join(sorted(parts))}." for run, parts in sorted(found.items())]


def _born(row: Any) -> str:
    step = row.parameters.get("birth_step")
    if step is None:
        return "not seen"
    low, _ = row.intervals["birth_step"]
    before = "there from the first checkpoint on" if low is None else f"after {low:,.0f}"
    return f"{row.parameters['heads']:.0f}, first at step {step:,.0f} ({before})"


def _named(trajectory: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern is that of the trajectory or of its metric; brackets stand for themselves."""
    names = (trajectory, trajectory.partition("[")[0])
    return any(fnmatchcase(name, pattern.replace("[", "[[]")) for name in names for pattern in patterns)


def _more(count: int, what: str) -> None:
    if count > 0:
        out.print(f"And {count} more {what}: table curves, or --metric PATTERN.", markup=False)


def _print_growth(rows: list[Any], patterns: tuple[str, ...]) -> None:
    from analyzers.growth_forms import CLASSES

    tables: dict[str, Table] = {}
    for row in rows:
        if row.run is not None:
            continue
        metric, _, place = row.trajectory.removesuffix("]").partition("[")
        if metric not in tables:
            columns = ("place", "class", "runs", "peak step", "R2, median")
            tables[metric] = Table(*columns, title=f"growth curves of {metric}")
        numbers = row.parameters
        counts = {name: numbers.get(f"runs_{name.replace('-', '_')}", 0) for name in CLASSES}
        peak = ""
        if "peak_step" in numbers:
            low, high = ("no end" if end is None else f"{end:,.0f}" for end in row.intervals["peak_step"])
            peak = f"{numbers['peak_step']:,.0f} ({low} to {high})"
        tables[metric].add_row(
            escape(place or "whole model"),
            row.shape or "not judged",
            ", ".join(f"{count:.0f} {name}" for name, count in counts.items() if count),
            peak,
            f"{numbers['r2_median']:.3f}" if "r2_median" in numbers else "",
        )
    shown = list(tables.values()) if patterns else list(tables.values())[:_FEW]
    for table in shown:
        out.print(table)
    _more(len(tables) - len(shown), "metrics with growth curves")


def print_predicted(summary: Any) -> None:
    """Scores of every regressor on every parameter, and what they rest on."""
    table = Table("parameter", "regressor", "R2", "skill against the mean", title="models left out in turn")
    for score in summary.scores:
        table.add_row(score.parameter, score.regressor, f"{score.r2:.3f}", f"{score.skill:.3f}")
    out.print(table)
    used = ", ".join(f"{name} {count}" for name, count in summary.used.items())
    out.print(f"{summary.models} models; curves used: {used}.", markup=False)
    if summary.left_out:
        out.print(f"{summary.left_out} curves are neither early-peak nor log-rise, or lack a parameter.")


# Layers that a table of predicted curves has room for.
_LAYERS = 6


def print_predicted_curves(found: Any, metric: str) -> None:
    """Predicted values at some steps and layers, and how far such curves are off for models left out."""
    from flows.predict import score_sentence

    last = len(found.curves) - 1
    layers = sorted(
        {round(i * last / max(1, min(_LAYERS, last + 1) - 1)) for i in range(min(_LAYERS, last + 1))}
    )
    sizes = ", ".join(f"{name} {size}" for name, size in found.architecture.items())
    table = Table("step", *(f"layer {i}" for i in layers), title=f"predicted {metric}: {sizes}")
    for at, step in enumerate(found.steps):
        if step == 0 or step & (step - 1) == 0 or step == found.steps[-1]:
            values = [found.curves[i] for i in layers]
            table.add_row(f"{step:,}", *("no curve" if v is None else f"{v[at]:,.4g}" for v in values))
    out.print(table)
    out.print(score_sentence(found), markup=False)
    for remark in found.remarks:
        out.print(f"Mind: {remark}.", markup=False)


def _end(row: Any, phase: str) -> str:
    """Step and interval of the end of a phase, or that there is none."""
    if not row.parameters.get(f"{phase}_seen"):
        return "not seen"
    step = row.parameters.get(f"{phase}_end_step")
    if step is None:
        return f"no end ({_depth(row, phase)})"
    low, high = row.intervals[f"{phase}_end_step"]
    return f"{step:,.0f} ({low:,.0f} to {high:,.0f})"


def _depth(row: Any, phase: str) -> str:
    """Change of a phase in per cent, or that it is not seen."""
    if not row.parameters.get(f"{phase}_seen"):
        return "not seen"
    return f"{math.expm1(row.parameters[f'{phase}_change']):+.0%}"


def print_states(summary: Any) -> None:
    """The states of every run and where they change."""
    how = "fitted" if summary.computed else "the stored model is of the same data and settings"
    out.print(f"{summary.k} states ({how}).")
    if summary.refits:
        out.print(
            f"In brackets: 5th to 95th percentile of the step over {summary.refits} refits to resampled runs."
        )
    else:
        out.print("No bootstrap intervals: they need two training runs and refits that keep all states.")
    for run, changes in summary.boundaries.items():
        by_refits = summary.spreads.get(run) or [None] * len(changes)
        path = ", ".join(
            f"{left} -> {right} at step {step:,}{_spread(found, summary.refits)}"
            for (step, left, right), found in zip(changes, by_refits, strict=True)
        )
        out.print(f"  {run}: {path or 'no change of state'}", markup=False, soft_wrap=True)


def _spread(found: tuple[int | None, int | None, int] | None, refits: int) -> str:
    """The steps at which refits have a change of state, and how many have it if not all."""
    if found is None:
        return ""
    low, high, count = found
    if low is None or high is None:
        return " [in no refit]"
    where = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f" [{where}]" if count == refits else f" [{where} in {count} of {refits}]"


_FLAGS = {
    "new": "new: no state explains it",
    "unexpected": "unexpected: a state explains it, the checkpoints before it do not",
}


def print_decoded(summary: Any) -> None:
    """The newest checkpoint of every run, then what is flagged among the checkpoints decoded just now."""
    out.print(
        f"Model {summary['model'][:8]} of series {summary['model_series']} ({summary['k']} states): "
        f"{summary['decoded']} checkpoints decoded now.",
        markup=False,
    )
    table = Table(
        "run", "step", "state", "posterior", "surprise (nats)", "percentile", title="newest checkpoints"
    )
    for row in summary["runs"]:
        rank = "unknown" if row["percentile"] is None else f"{row['percentile']:.1f} of {row['compared']}"
        table.add_row(
            escape(row["run"]),
            f"{row['step']:,}",
            str(row["state"]),
            f"{row['posterior']:.3f}",
            f"{row['surprise']:.2f}",
            rank,
        )
    if summary["runs"]:
        out.print(table)
    for row in summary["runs"]:
        for flag in row["flags"]:
            out.print(
                f"{row['run']}, step {row['step']:,}: {_FLAGS[flag]} ({_parts(row)}).",
                markup=False,
                soft_wrap=True,
            )
    newest = {(row["run"], row["step"]) for row in summary["runs"]}
    earlier = [each for each in summary["flagged"] if (each["run"], each["step"]) not in newest]
    if earlier:
        shown = ", ".join(f"{e['run']} step {e['step']:,} ({', '.join(e['flags'])})" for e in earlier[:_FEW])
        more = f" and {len(earlier) - _FEW} more: table online_states" if len(earlier) > _FEW else ""
        out.print(f"Flagged before the newest: {shown}{more}.", markup=False, soft_wrap=True)
    if summary["absent"]:
        out.print(f"Not in the series: {', '.join(summary['absent'])}.", markup=False, soft_wrap=True)
    for note in summary["notes"]:
        out.print(f"{note[:1].upper()}{note[1:]}.", markup=False, soft_wrap=True)


def _parts(row: Any) -> str:
    """The metrics farthest from the state, with their values."""
    found = []
    for part in row["parts"][:3]:
        values = "" if part["value"] is None else f" is {part['value']:.4g}"
        if part["mean"] is not None:
            values += f", the state's mean {part['mean']:.4g}"
        found.append(f"{part['metric']}{values}, z = {part['z']:+.1f}")
    return "; ".join(found)


def print_beside(store: Any, series: str) -> None:
    """What smooth surrogates and simpler methods say of the newest map."""
    from flows.report.baselines import baseline_lines, null_lines

    model = next((row["model"] for row in store.table("state_models", series).to_pylist()), None)
    nulls, beside = (
        [row for row in store.table(table, series).to_pylist() if row["model"] == model]
        for table in ("nulls", "baselines")
    )
    for line in null_lines(nulls):
        out.print(line, markup=False, soft_wrap=True)
    if not nulls:
        out.print("No surrogates were fitted: nothing says whether smooth curves would do as well.")
    if beside:
        out.print("Agreement with the states (adjusted Rand index, 1: the same, 0: chance):")
    for line in baseline_lines(beside):
        out.print(f"  {line}", markup=False, soft_wrap=True)


def print_study(summary: Any, root: str) -> None:
    """All that a study did, and where its results are."""
    print_measured(summary.measure)
    print_curves(summary.curves)
    if summary.crosscoder is not None:
        print_crosscoders(summary.crosscoder)
    print_states(summary.states)
    if not summary.anything_new:
        out.print("Nothing was computed anew.")
    out.print(f"tables: {root}/tables\nreport: {summary.report}", soft_wrap=True)


def print_crosscoders(summary: Any) -> None:
    """What was trained, how good it is at each snapshot, and what kinds of features there are."""
    if summary.harvested:
        out.print(f"Harvested {summary.harvested} snapshots into the pool.")
    for label in summary.failed:
        out.print(f"[red]failed:[/red] {escape(label)} (see the table failures)")
    for run in summary.runs:
        done = f"trained {run.trained}" if run.trained else "nothing was trained anew"
        shared = "" if run.shared is None else f", {run.shared:.0%} of them found again in other seeds"
        kinds = ", ".join(f"{count} {name}" for name, count in run.classes.items())
        out.print(
            f"{run.run}: {done}; {run.latents:,} latents on {run.rows:,} rows, {run.dead:.1%} dead. "
            f"{run.features:,} features{shared}: {kinds or 'none'}.",
            markup=False,
            soft_wrap=True,
        )
        table = Table("step", "explained", "held out", "L0", "loss increase", "recovered")
        for q in run.quality:
            numbers = (q.explained_variance, q.explained_held_out, q.l0, q.loss_increase, q.loss_recovered)
            forms = (".3f", ".3f", ".1f", ".3f", ".2f")
            cells = ["" if x is None else format(x, f) for x, f in zip(numbers, forms, strict=True)]
            table.add_row(f"{q.step:,}", *cells)
        out.print(table)
        for note in run.notes:
            out.print(f"  {note}", markup=False, soft_wrap=True)
        out.print(f"  weights: {run.folder}", markup=False, soft_wrap=True)
