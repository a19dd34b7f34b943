"""Flow: find phases, growth curves and births of heads in the stored trajectories of a series."""

from typing import Any, Literal

from prefect import flow
from pydantic import BaseModel

from analyzers.growth import GROWTH_FORM
from analyzers.head_births import HEADS_FORM
from flows.config import DEFAULT_GROWTH, DEFAULT_PHASES, SeriesConfig, StoredConfig, default_root
from flows.progress import console
from storage.errors import UsageError
from storage.store import Store, column_name
from tasks.curves import PHASES_FORM, CurvesJob, fit_series_curves
from tasks.growth import GrowthJob, fit_series_growth
from tasks.heads import HeadsJob, find_series_head_births
from tasks.importing import all_imported_instead
from tasks.provenance import invocation


class CurveRow(BaseModel):
    """What was found in one run, or in all runs (``run`` is None), at one place."""

    trajectory: str
    run: str | None
    shape: str | None
    parameters: dict[str, float]
    intervals: dict[str, tuple[float | None, float | None]]
    note: str | None


class CurvesSummary(BaseModel):
    """What the table ``curves`` holds now: ``rows`` are phases, ``growth`` growth curves.

    ``heads`` are counts and first births of heads, per run and over all runs; no single heads.
    """

    computed: bool
    rows: list[CurveRow]
    growth: list[CurveRow]
    heads: list[CurveRow]
    skipped: list[str]
    growth_skipped: list[str]
    heads_skipped: list[str]
    remark: str | None = None


def stored_rows(store: Store, series: str, form: str) -> list[CurveRow]:
    """The newest rows of a form: place by place, the runs in order of name, then all runs.

    Of births of heads those of all heads of a kind together.
    """
    found = [
        row
        for row in store.table("curves", series).to_pylist()
        if row["form"] == form and (form != HEADS_FORM or row["head"] is None)
    ]
    found.sort(key=lambda r: (r["run"] is None, r["run"] or ""))
    found.sort(
        key=lambda r: (r["metric"], r["layer"] is None, r["site"] or "", r["layer"] or 0, r["head"] or 0)
    )
    return [
        CurveRow(
            trajectory=column_name(row["metric"], row["site"], row["layer"], row["head"]),
            run=row["run"],
            shape=row["class"],
            parameters=dict(row["parameters"]),
            intervals={name: (i["low"], i["high"]) for name, i in row["intervals"]},
            note=row["note"],
        )
        for row in found
    ]


@flow(name="curves", flow_run_name="curves {config.name}")
def curves_of(
    config: SeriesConfig | StoredConfig,
    root: str = default_root(),
    absent: Literal["refuse", "skip"] = "refuse",
) -> CurvesSummary:
    """Find phases, growth curves and births of heads, unless those stored are of the same data and settings.

    ``absent`` says what becomes of a trajectory that is not in the store. Those of the defaults are skipped
    in any case, as long as there is something left to do. Where the series has none of the default
    trajectories of phases, all imported metrics are taken, and ``remark`` says so.
    """
    store = Store(root)
    phases, growth = config.curves.phases, config.curves.growth
    trajectories, remark = all_imported_instead(store, config.name, phases.trajectories, DEFAULT_PHASES)
    looking = CurvesJob(
        root=root,
        series=config.name,
        trajectories=trajectories,
        rule=phases.rule,
        absent="skip" if trajectories == DEFAULT_PHASES else absent,
    )
    fitting = GrowthJob(
        root=root,
        series=config.name,
        trajectories=growth.trajectories,
        rule=growth.rule,
        absent="skip" if growth.trajectories == DEFAULT_GROWTH else absent,
    )
    with invocation(store, config.name, "curves", config.model_dump(mode="json")) as counts:
        with console.status(f"curves of {config.name}: looking for phases"):
            found: dict[str, Any] = fit_series_curves(looking)
        with console.status(f"curves of {config.name}: fitting growth curves"):
            fitted: dict[str, Any] = fit_series_growth(fitting)
        with console.status(f"curves of {config.name}: looking for births of heads"):
            born: dict[str, Any] = find_series_head_births(
                HeadsJob(root=root, series=config.name, rule=config.curves.heads)
            )
        counts["curves_computed"] = sum(int(done["computed"]) for done in (found, fitted, born))
    skipped = [*found["skipped"], *fitted["skipped"]]
    nothing = len(skipped) == len(trajectories) + len(growth.trajectories) and bool(born["skipped"])
    if absent == "refuse" and nothing:
        raise UsageError("; ".join(skipped))
    return CurvesSummary(
        computed=found["computed"] or fitted["computed"] or born["computed"],
        rows=stored_rows(store, config.name, PHASES_FORM),
        growth=stored_rows(store, config.name, GROWTH_FORM),
        heads=stored_rows(store, config.name, HEADS_FORM),
        skipped=found["skipped"],
        growth_skipped=fitted["skipped"],
        heads_skipped=born["skipped"],
        remark=remark,
    )
