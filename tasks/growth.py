"""Fit growth curves to the stored trajectories of a series, and store them in the table ``curves``."""

import json
import math
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from analyzers.growth import GROWTH_FORM, GROWTH_VERSION, GrowthSettings
from analyzers.growth_forms import CLASSES, FORMS, Form, Trajectory, fit_trajectory, pool
from storage.errors import UsageError
from storage.keys import digest
from storage.store import Store, column_name
from tasks.curve_rows import TrajectoriesJob, describe_settings, identity_of, is_stored, write_rows
from tasks.sequences import SequenceValues
from tasks.trajectories import PLACE, chosen_rows, place_of, stored_metrics


class GrowthJob(TrajectoriesJob):
    """All that the growth curves of a series need; small and serialisable."""

    rule: GrowthSettings


def fit_growth_curves(job: GrowthJob) -> dict[str, Any]:
    """Fit the growth curve and the simpler ones unless the newest rows stored are of the same data.

    Returns a summary: curve, computed, skipped (sentences on trajectories that are not in the store).

    Raises:
        UsageError: there are no metrics, a trajectory is not one value per run and step, or one is not in the
            store and ``absent`` is ``refuse``.
    """
    store = Store(job.root)
    chosen, skipped = chosen_rows(stored_metrics(store, job.series), job.trajectories, job.absent)
    settings = {"version": GROWTH_VERSION, **job.rule.model_dump(mode="json")}
    whole = identity_of(settings, chosen)
    curves = {form: digest({"form": form, "fit": whole}) for form in FORMS}
    identity = curves[GROWTH_FORM]
    if chosen.empty or is_stored(store, job.series, GROWTH_FORM, identity):
        return {"curve": identity, "computed": False, "skipped": skipped}
    kept = SequenceValues(store, job.series)
    found: dict[str | None, list[dict[str, Any]]] = {}
    for group, rows in chosen.groupby(PLACE, dropna=False, sort=True):
        place = place_of(group)
        try:
            runs = [
                fit_trajectory(
                    mine["step"].to_numpy(dtype=np.int64),
                    mine["value"].to_numpy(dtype=np.float64),
                    job.rule,
                    str(run),
                    kept.of(mine),
                )
                for run, mine in rows.groupby("run", sort=True)
            ]
        except ValueError as error:
            raise UsageError(f"growth of {column_name(*place)}: {error}") from None
        about, mixed = describe_settings(settings, rows)
        common = dict(zip(PLACE, place, strict=True))
        for run in runs:
            found.setdefault(run.run, []).extend(
                common | row | {"curve": curves[row["form"]], "settings": _drawn(about, run)}
                for row in _rows(run)
            )
        every = pool(runs, job.rule)
        found.setdefault(None, []).append(
            common | _pooled(every, runs, mixed) | {"curve": identity, "settings": _drawn(about, every)}
        )
    write_rows(store, job.series, identity, found)
    return {"curve": identity, "computed": True, "skipped": skipped}


def _drawn(about: str, found: Trajectory) -> str:
    """The settings with what the bootstrap drew in fact, as ``drawn``."""
    return json.dumps({**json.loads(about), "drawn": found.method}, sort_keys=True)


def _rows(run: Trajectory) -> list[dict[str, Any]]:
    """One row per form: one that was not fitted too, so that no older row shows in its place."""
    rows = []
    for name in FORMS:
        form = run.form(name) or Form(name, notes=("not fitted",))
        judged = name == GROWTH_FORM
        numbers = form.parameters
        if form.aicc is not None:
            numbers = numbers | {"aicc": form.aicc, "preferred": float(name == run.preferred)}
        notes = [*form.notes, *run.notes]
        rows.append(
            {
                "form": name,
                "class": run.shape if judged else None,
                "n": run.n,
                "runs": [run.run],
                "parameters": list(numbers.items()),
                "intervals": [(key, _interval(*ends)) for key, ends in form.intervals.items()],
                "r2": form.r2,
                "aic": form.aic,
                "peak_step": round(run.peak[0]) if judged and run.peak is not None else None,
                "note": "; ".join(notes) or None,
            }
        )
    return rows


def _interval(low: float, high: float) -> dict[str, float | None]:
    """An end that is not finite is null: the data set none."""
    ends = {"low": low, "high": high}
    return {name: end if math.isfinite(end) else None for name, end in ends.items()}


def _pooled(every: Trajectory, runs: list[Trajectory], notes: list[str]) -> dict[str, Any]:
    """The row of all runs: votes, the peak, and how well the growth curve fits them."""
    numbers = {"runs_judged": float(sum(every.votes.values()))}
    numbers |= {f"runs_{name.replace('-', '_')}": float(every.votes.get(name, 0)) for name in CLASSES}
    shares = [form.r2 for run in runs if (form := run.form(GROWTH_FORM)) is not None and form.r2 is not None]
    if shares:
        numbers |= {"r2_median": float(np.median(shares)), "r2_lowest": min(shares)}
    intervals = []
    if every.peak is not None:
        place, low, high = every.peak
        numbers["peak_step"] = place
        intervals = [("peak_step", _interval(low, high))]
    return {
        "form": GROWTH_FORM,
        "class": every.shape,
        "n": every.n,
        "runs": [run.run for run in runs],
        "parameters": list(numbers.items()),
        "intervals": intervals,
        "peak_step": None if every.peak is None else round(every.peak[0]),
        "note": "; ".join([*every.notes, *notes]) or None,
    }


@task(name="fit-growth", cache_policy=NO_CACHE)
def fit_series_growth(job: GrowthJob) -> dict[str, Any]:
    """Task: :func:`fit_growth_curves`."""
    return fit_growth_curves(job)
