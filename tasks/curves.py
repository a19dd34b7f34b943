"""Fit forms to the stored trajectories of a series, and store what was found in the table ``curves``."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.dataset as ds
from jaxtyping import Float
from prefect import task
from prefect.cache_policies import NO_CACHE

from analyzers.geometry import rankme_cov
from analyzers.phases import PHASES, RULE_VERSION, Phases, PhaseSettings, find_phases, middle, pool
from storage.errors import UsageError
from storage.store import Store, column_name
from tasks.curve_rows import TrajectoriesJob, describe_settings, identity_of, is_stored, write_rows
from tasks.trajectories import PLACE, chosen_rows, place_of, stored_metrics

PHASES_FORM = "geometric-phases"
# Run, metric, site, layer, head.
_Place = tuple[str, str, str | None, int | None, int | None]
# Metrics that can be computed anew from the spectra of the two halves.
_OF_SPECTRUM = {"rankme_cov": rankme_cov}


class CurvesJob(TrajectoriesJob):
    """All that the curves of a series need; small and serialisable."""

    rule: PhaseSettings


def fit_curves(job: CurvesJob) -> dict[str, Any]:
    """Find the phases unless the newest rows stored are of the same data and settings.

    Returns a summary: curve, computed, skipped (sentences on trajectories that are not in the store).

    Raises:
        UsageError: there are no metrics, a trajectory is not one value per run and step, or one is not in the
            store and ``absent`` is ``refuse``.
    """
    store = Store(job.root)
    chosen, skipped = chosen_rows(stored_metrics(store, job.series), job.trajectories, job.absent)
    if chosen["head"].notna().any():
        raise UsageError("phases are those of the residual stream: a trajectory of a head has none")
    settings = {"form": PHASES_FORM, "version": RULE_VERSION, **job.rule.model_dump(mode="json")}
    identity = identity_of(settings, chosen, ["tokens"])
    if chosen.empty or is_stored(store, job.series, PHASES_FORM, identity):
        return {"curve": identity, "computed": False, "skipped": skipped}
    halves = _halves(store, job.series, chosen)
    found: dict[str | None, list[dict[str, Any]]] = {}
    for place, rows in chosen.groupby(PLACE, dropna=False, sort=True):
        try:
            runs = [
                _run_phases(str(run), mine, halves.get((str(run), *place_of(place)), {}), job.rule)
                for run, mine in rows.groupby("run", sort=True)
            ]
        except ValueError as error:
            raise UsageError(f"phases of {column_name(*place_of(place))}: {error}") from None
        tokens = {
            str(run): dict(zip(mine["step"].astype(int), mine["tokens"], strict=True))
            for run, mine in rows.groupby("run")
        }
        about, mixed = describe_settings(settings, rows)
        for phases in [*runs, pool(runs, job.rule)]:
            mine = [phases] if phases.run is not None else runs
            row = dict(zip(PLACE, place_of(place), strict=True)) | _row(phases, mine, tokens)
            notes = [*phases.notes, *(mixed if phases.run is None else [])]
            row |= {"curve": identity, "settings": about, "note": "; ".join(notes) or None}
            found.setdefault(phases.run, []).append(row)
    write_rows(store, job.series, identity, found)
    return {"curve": identity, "computed": True, "skipped": skipped}


def _run_phases(
    run: str, rows: pd.DataFrame, halves: Mapping[int, tuple[float, float]], rule: PhaseSettings
) -> Phases:
    steps = rows["step"].to_numpy(dtype=np.int64)
    both: Float[np.ndarray, "n 2"] | None = None
    if halves:
        both = np.array([halves.get(int(step), (np.nan, np.nan)) for step in steps], dtype=np.float64)
    return find_phases(steps, rows["value"].to_numpy(dtype=np.float64), both, rule, run)


def _halves(store: Store, series: str, rows: pd.DataFrame) -> dict[_Place, dict[int, tuple[float, float]]]:
    """Per run and place, step -> the metric on the first and on the second half of the probe.

    Spectra are matched by the key of the metric's row, so that both are of one protocol and one weights'
    digest; only the files of those keys are opened.
    """
    found: dict[_Place, dict[int, dict[str, float]]] = {}
    wanted = rows[rows["metric"].isin(list(_OF_SPECTRUM)) & rows["key"].notna() & rows["site"].notna()]
    for run, mine in wanted.groupby("run"):
        keys = set(mine["key"])
        files = [
            path
            for path in store.files("spectra", series, str(run))
            if PurePosixPath(path).stem.rpartition("-")[2] in keys
        ]
        if not files:
            continue
        places = mine[PLACE].drop_duplicates().itertuples(index=False)
        here = [place_of(place) for place in places]
        spectra = ds.dataset(files, format="parquet", filesystem=store.fs).to_table(
            columns=["step", "site", "layer", "half", "eigenvalues"],
            filter=(pc.field("half") != "all")
            & pc.field("centered")
            & pc.field("site").isin(sorted({str(site) for _, site, _, _ in here})),
        )
        for spectrum in spectra.to_pylist():
            for metric, site, layer, head in here:
                if (spectrum["site"], spectrum["layer"]) == (site, layer):
                    eigenvalues = np.array(spectrum["eigenvalues"], dtype=np.float64)
                    value = _OF_SPECTRUM[metric](eigenvalues) if eigenvalues.any() else np.nan
                    steps = found.setdefault((str(run), metric, site, layer, head), {})
                    steps.setdefault(spectrum["step"], {})[spectrum["half"]] = value
    return {
        place: {step: (pair.get("first", np.nan), pair.get("second", np.nan)) for step, pair in steps.items()}
        for place, steps in found.items()
    }


def _row(phases: Phases, runs: Sequence[Phases], tokens: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """A row of ``curves`` without its place; ``runs`` are those that ``phases`` is about."""
    numbers = {"runs_judged": phases.judged, "noise": phases.noise, "threshold": phases.threshold}
    parameters = {name: float(number) for name, number in numbers.items() if number is not None}
    intervals: dict[str, dict[str, float]] = {}
    for name in PHASES:
        phase = phases.phase(name)
        if phase.change is None or phase.low is None or phase.high is None:
            continue
        parameters |= {
            f"{name}_seen": float(phase.seen),
            f"{name}_runs": phase.runs,
            f"{name}_change": phase.change,
        }
        intervals[f"{name}_change"] = {"low": phase.low, "high": phase.high}
        if phase.end is None:
            continue
        parameters |= {f"{name}_end_step": phase.end.step, f"{name}_end_value": phase.end.value}
        intervals[f"{name}_end_step"] = {"low": phase.end.low, "high": phase.end.high}
        seen = [tokens[str(run.run)][end.step] for run in runs if (end := run.phase(name).end) is not None]
        if not pd.isna(seen).any():
            parameters[f"{name}_end_tokens"] = middle([int(count) for count in seen])
    return {
        "form": PHASES_FORM,
        "class": phases.shape,
        "n": phases.n,
        "runs": [run.run for run in runs],
        "parameters": list(parameters.items()),
        "intervals": list(intervals.items()),
        "peak_step": parameters.get("expansion_end_step"),
    }


@task(name="fit-curves", cache_policy=NO_CACHE)
def fit_series_curves(job: CurvesJob) -> dict[str, Any]:
    """Task: :func:`fit_curves`."""
    return fit_curves(job)
