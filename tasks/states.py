"""Fit the latent-state model of a series to its metrics, and store the map."""

from typing import Any

import numpy as np
import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from analyzers.latent import Grid, StateFit, StateSettings, Transform, fit_states, from_long
from storage.errors import UsageError
from storage.keys import digest
from storage.store import Store
from tasks.comparison import BESIDE, store_comparison
from tasks.drivers import store_map
from tasks.trajectories import select_trajectories, stored_metrics, transforms_of

# Part of the identity of a fit: raised when more is stored with it, or other numbers.
VERSION = 2


class StatesJob(BaseModel):
    """All that the fit of a series needs; small and serialisable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str
    series: str
    trajectories: tuple[str, ...]
    transforms: dict[str, Transform]
    grid: Grid
    min_share: float
    fit: StateSettings


def fit_series(job: StatesJob) -> dict[str, Any]:
    """Fit the map unless the newest one stored is of the same data and settings; say which.

    What stands beside the map (null, baselines) is made where the store lacks it, for a stored fit too.
    Returns a summary: model, computed, compared.

    Raises:
        UsageError: there are no metrics, a trajectory is not in the store, or the data cannot be fitted.
    """
    store = Store(job.root)
    metrics = stored_metrics(store, job.series)
    chosen = select_trajectories(metrics, job.trajectories)
    ordered = chosen.sort_values(["run", "step", "name"]).astype(object)  # however the rows came in
    identity = digest(
        {
            "version": VERSION,
            "job": job.model_dump(mode="json", exclude={"root": True, "fit": set(BESIDE)}),
            "data": digest([[*row] for row in ordered.where(ordered.notna(), None).to_numpy()]),
        }
    )
    newest = store.table("state_models", job.series).to_pylist()
    known = bool(newest) and newest[0]["model"] == identity
    names = list(dict.fromkeys(chosen["name"]))
    try:
        trajectories = from_long(
            chosen, transforms_of(names, job.transforms), job.min_share, order=names, grid=job.grid
        )
        fit = None if known else fit_states(trajectories, job.fit)
    except ValueError as error:
        raise UsageError(f"states of series {job.series!r}: {error}") from None
    if fit is not None:
        _store_fit(store, job, identity, fit, metrics)
    compared = store_comparison(store, job.series, identity, trajectories, job.fit)
    return {"model": identity, "computed": not known, "compared": compared}


def _store_fit(store: Store, job: StatesJob, identity: str, fit: StateFit, metrics: pd.DataFrame) -> None:
    series = job.series
    tokens = {(r.run, r.step): r.tokens for r in metrics[["run", "step", "tokens"]].itertuples(index=False)}
    rows = [
        {**row, "tokens": _whole(tokens.get((row["run"], row["step"])))} for row in fit.state_rows(identity)
    ]
    for run in sorted({row["run"] for row in rows}):
        mine = [row for row in rows if row["run"] == run]
        store.write("states", mine, series=series, run=run, name=identity)
    store_map(store, series, identity, fit, metrics)
    # Last: its file says that the fit is complete.
    known = {"grid": job.grid, "grid_steps": np.unique(np.concatenate(fit.trajectories.steps)).tolist()}
    models = [{**row, **known} for row in fit.state_model_rows(identity)]
    store.write("state_models", models, series=series, name=identity)


def _whole(value: Any) -> int | None:
    return None if value is None or value != value else int(value)


@task(name="fit-states", cache_policy=NO_CACHE)
def fit_series_states(job: StatesJob) -> dict[str, Any]:
    """Task: :func:`fit_series`."""
    return fit_series(job)
