"""Fit the latent-state model of a series to its metrics, and store the map."""

from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from analyzers.latent import Grid, StateSettings, Transform, fit_states, from_long
from storage.errors import UsageError
from storage.keys import digest
from storage.store import Store
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

    Returns a summary: model, k, computed, boundaries (run -> [step, from, to]), notes.

    Raises:
        UsageError: there are no metrics, a trajectory is not in the store, or the data cannot be fitted.
    """
    store = Store(job.root)
    metrics = stored_metrics(store, job.series)
    chosen = select_trajectories(metrics, job.trajectories)
    identity = digest(
        {
            "version": VERSION,
            "job": job.model_dump(mode="json", exclude={"root"}),
            "data": digest([[*row] for row in chosen.astype(object).where(chosen.notna(), None).to_numpy()]),
        }
    )
    newest = store.table("state_models", job.series).to_pylist()
    if newest and newest[0]["model"] == identity:
        return {"model": identity, "computed": False}
    names = list(dict.fromkeys(chosen["name"]))
    try:
        trajectories = from_long(
            chosen, transforms_of(names, job.transforms), job.min_share, order=names, grid=job.grid
        )
        fit = fit_states(trajectories, job.fit)
    except ValueError as error:
        raise UsageError(f"states of series {job.series!r}: {error}") from None
    tokens = {(r.run, r.step): r.tokens for r in metrics[["run", "step", "tokens"]].itertuples(index=False)}
    rows = [
        {**row, "tokens": _whole(tokens.get((row["run"], row["step"])))} for row in fit.state_rows(identity)
    ]
    for run in sorted({row["run"] for row in rows}):
        mine = [row for row in rows if row["run"] == run]
        store.write("states", mine, series=job.series, run=run, name=identity)
    store_map(store, job.series, identity, fit, metrics)
    # Last: its file says that the fit is complete.
    known = {"grid": job.grid, "grid_steps": np.unique(np.concatenate(fit.trajectories.steps)).tolist()}
    models = [{**row, **known} for row in fit.state_model_rows(identity)]
    store.write("state_models", models, series=job.series, name=identity)
    return {"model": identity, "computed": True}


def _whole(value: Any) -> int | None:
    return None if value is None or value != value else int(value)


@task(name="fit-states", cache_policy=NO_CACHE)
def fit_series_states(job: StatesJob) -> dict[str, Any]:
    """Task: :func:`fit_series`."""
    return fit_series(job)
