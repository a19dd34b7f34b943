"""Decode the runs of a series with a stored model by the filter alone, and store what it says of each."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from analyzers.latent import Parameters, Scaler
from analyzers.latent.online import Belief, OnlineModel, Reading, TrainingFrames
from storage.errors import UsageError
from storage.keys import digest
from storage.store import Store
from tasks.drivers import Tokens, tokens_of
from tasks.trajectories import rows_at, select_trajectories, stored_metrics

# Columns of a row that say something about the checkpoint; the summary repeats them for the newest one.
_TOLD = (
    "step",
    "tokens",
    "state",
    "posterior",
    "surprise",
    "percentile",
    "compared",
    "flags",
    "parts",
    "missing",
)


class DecodeJob(BaseModel):
    """Whose runs are decoded, and by which model: the newest of ``of`` (default: of the series itself)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str
    series: str
    run: str | None = None
    model: str | None = None
    of: str | None = None


@dataclass(frozen=True)
class StoredModel:
    """A model out of the tables, with the checkpoints (run, step) that it was fitted to."""

    identity: str
    series: str
    online: OnlineModel
    fitted: frozenset[tuple[str, int]]


def load_model(store: Store, series: str, model: str | None = None) -> StoredModel:
    """Rebuild the newest model of a series, or the one whose identity begins with ``model``.

    Raises:
        UsageError: there is no such model, several begin so, it cannot be used online, or what that needs was
            not stored with it.
    """
    found = [
        row
        for row in store.table("state_models", series, history=model is not None).to_pylist()
        if row["chosen"] and row["model"].startswith(model or "")
    ]
    identities = sorted({row["model"] for row in found})
    if not found:
        which = "no states" if model is None else f"no model {model!r}"
        raise UsageError(f"{which} of series {series!r} under {store.root!r}: fit the states first")
    if len(identities) > 1:
        raise UsageError(f"model {model!r} of series {series!r} may be {', '.join(identities)}")
    row = found[-1]
    frames = [
        each
        for each in store.table("training_frames", series, history=True).to_pylist()
        if each["model"] == row["model"]
    ]
    if row["grid"] is None or not frames:
        raise UsageError(
            f"model {row['model']} of series {series!r} was stored by an earlier version, without what "
            "online use needs: fit the states again"
        )
    saved = json.loads(row["parameters"])
    try:
        online = OnlineModel(
            Parameters.from_dict(saved),
            Scaler.from_dict(saved["scaler"]),
            saved["transforms"],
            TrainingFrames(
                np.array([each["values"] for each in frames], dtype=float),
                np.array([each["log_predicted"] for each in frames], dtype=float),
            ),
            grid=row["grid"],
            grid_steps=np.array(row["grid_steps"], dtype=np.int64),
        )
    except ValueError as error:
        raise UsageError(f"model {row['model']} of series {series!r}: {error}") from None
    fitted = frozenset((each["run"], each["step"]) for each in frames)
    return StoredModel(row["model"], series, online, fitted)


def decode_series(job: DecodeJob) -> dict[str, Any]:
    """Decode what is new of the runs, write the table online_states, and return a small summary.

    A checkpoint whose frame and whose past are those of its stored row keeps that row. The summary: model,
    model_series, k, decoded (new rows), flagged (new rows with a flag: run, step, flags), absent (metrics of
    the model that the series lacks), runs (per run its newest checkpoint), notes.

    Raises:
        UsageError: as :func:`load_model`; the series has no metrics or none of the model's, or no such run.
    """
    store = Store(job.root)
    model = load_model(store, job.of or job.series, job.model)
    metrics = stored_metrics(store, job.series)
    wide, absent = _wide(metrics, model.online.metrics, job.series)
    runs = sorted(set(wide.index.get_level_values("run")))
    if job.run is not None and job.run not in runs:
        raise UsageError(f"series {job.series!r} has no run {job.run!r} (it has {', '.join(runs)})")
    tokens = tokens_of(metrics)
    summary: dict[str, Any] = {
        "model": model.identity,
        "model_series": model.series,
        "k": model.online.parameters.k,
        "decoded": 0,
        "flagged": [],
        "absent": absent,
        "runs": [],
        "notes": [],
    }
    for run in runs if job.run is None else [job.run]:
        part = wide.loc[run]
        steps, values = part.index.to_numpy(dtype=np.int64), part.to_numpy(dtype=float)
        stored = [
            row
            for row in store.table("online_states", job.series, run).to_pylist()
            if row["model"] == model.identity
        ]
        stored.sort(key=lambda row: row["step"])
        rows = list(_rows(model, job.series, run, steps, values, tokens, stored))
        if not rows:
            summary["notes"].append(f"run {run}: no checkpoint has a value of the model's metrics")
            continue
        new = [row for row in rows if "recorded_at" not in row]
        if new or len(rows) != len(stored):
            store.write("online_states", rows, series=job.series, run=run, name=model.identity)
        summary["decoded"] += len(new)
        summary["flagged"] += [
            {"run": run, "step": row["step"], "flags": row["flags"]} for row in new if row["flags"]
        ]
        summary["runs"].append({"run": run, **{name: rows[-1][name] for name in _TOLD}})
        summary["notes"] += _notes(model.online, run, rows)
    return summary


def _wide(metrics: pd.DataFrame, names: tuple[str, ...], series: str) -> tuple[pd.DataFrame, list[str]]:
    """One row per run and step, one column per metric of the model; and the metrics that are nowhere."""
    there = [name for name in names if _is_there(metrics, name)]
    absent = [name for name in names if name not in there]
    if not there:
        raise UsageError(f"series {series!r} has none of the model's metrics ({', '.join(names)})")
    long = select_trajectories(metrics, there)
    long = long[long["run"].notna() & long["step"].notna()]
    twice = long.duplicated(["run", "step", "name"])
    if twice.any():
        row = long[twice].iloc[0]
        raise UsageError(f"run {row['run']}, step {row['step']}: two values of {row['name']}")
    table = long.pivot(index=["run", "step"], columns="name", values="value").sort_index()
    return table.reindex(columns=list(names)).astype(float), absent


def _is_there(metrics: pd.DataFrame, name: str) -> bool:
    try:
        rows_at(metrics, name)
    except UsageError:
        return False
    return True


def _rows(
    model: StoredModel,
    series: str,
    run: str,
    steps: Int[np.ndarray, "frames"],
    values: Float[np.ndarray, "frames metrics"],
    tokens: Tokens,
    stored: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Rows of the table online_states of one run, the stored ones as far as they hold."""
    frames = model.online.frames(values)
    inputs, belief, place = "", None, 0
    for t in np.flatnonzero(model.online.on_grid(steps)):
        frame, step = frames[t], int(steps[t])
        if np.isnan(frame).all():
            continue
        # Digest of this frame and of all before it: a value that came late or changed shows in all after it.
        inputs = digest([inputs, step, [None if np.isnan(x) else float(x) for x in frame]])
        old = stored[place] if place < len(stored) else None
        place += 1
        if old is not None and old["inputs"] == inputs:
            belief = Belief(step, np.array(old["log_posterior"], dtype=float))
            yield old
            continue
        reading = model.online.step(belief, step, frame)
        belief = reading.belief
        fitted = model.series == series and (run, step) in model.fitted
        yield {
            "model": model.identity,
            "model_series": model.series,
            "step": step,
            "tokens": tokens.get((run, step)),
            "fitted": fitted,
            "inputs": inputs,
            **_reading(reading),
        }


def _reading(reading: Reading) -> dict[str, Any]:
    return {
        "state": reading.state,
        "posterior": reading.posterior,
        "surprise": reading.surprise,
        "misfit": reading.misfit,
        "percentile": reading.percentile,
        "compared": reading.compared,
        "flags": list(reading.flags),
        "parts": [vars(part) for part in reading.parts],
        "missing": list(reading.missing),
        "log_posterior": reading.belief.log_posterior.tolist(),
    }


def _notes(model: OnlineModel, run: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the probabilities of the model are used for what no run of the fit showed."""
    first, last = int(model.grid_steps[0]), int(model.grid_steps[-1])
    notes = []
    if rows[0]["step"] > first:
        notes.append(
            f"run {run} begins at step {rows[0]['step']}, the runs of the fit at {first}: the start "
            "probabilities hold for its first checkpoint all the same"
        )
    if rows[-1]["step"] > last:
        notes.append(
            f"run {run} is beyond step {last}, the last of the fit: every checkpoint there counts as one "
            "transition"
        )
    return notes


@task(name="decode", cache_policy=NO_CACHE)
def decode_online(job: DecodeJob) -> dict[str, Any]:
    """Task: :func:`decode_series`."""
    return decode_series(job)
