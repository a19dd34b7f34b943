"""Store the training map of a fit: edges, boundaries, means in natural units, drivers."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from analyzers.latent import StateFit
from analyzers.latent.bootstrap import Spread, spread
from analyzers.latent.drivers import Driver, drivers, natural_means
from analyzers.latent.hmm import log_predicted
from analyzers.latent.training_map import Boundary, Change, boundaries, changes, dwell, dwell_tokens, stays
from storage.store import Store

Tokens = Mapping[tuple[str, int], int | None]


def store_map(store: Store, series: str, model: str, fit: StateFit, metrics: pd.DataFrame) -> None:
    """Write the tables of the map and what online use compares with; ``metrics`` knows the tokens."""
    tokens = tokens_of(metrics)
    found = seen_boundaries(fit)
    tables = {
        "transitions": edge_rows(fit, model, found, tokens),
        "boundaries": boundary_rows(model, found, spreads(fit, found), tokens),
        "state_means": mean_rows(fit, model),
        "drivers": driver_rows(fit, model),
        "training_frames": training_rows(fit, model),
    }
    for table, rows in tables.items():
        store.write(table, list(rows), series=series, name=model)


def tokens_of(metrics: pd.DataFrame) -> dict[tuple[str, int], int | None]:
    """Tokens by run and step, where a row of the table metrics knows them."""
    known = metrics[metrics["tokens"].notna()].drop_duplicates(["run", "step"])
    columns = (known[name].tolist() for name in ("run", "step", "tokens"))
    return {(str(run), int(step)): int(count) for run, step, count in zip(*columns, strict=True)}


def seen_boundaries(fit: StateFit) -> list[Boundary]:
    """Changes of state of all runs between checkpoints that have a value; runs in order of name."""
    scaled = fit.scaled()
    found = []
    for run in fit.runs:
        seen = ~np.isnan(scaled[run.run]).all(axis=1)
        found += boundaries(run.run, run.steps[seen], run.state[seen], run.posterior[seen])
    return found


def spreads(fit: StateFit, found: list[Boundary]) -> list[Spread | None]:
    """Where the refits to resampled runs put each of the changes; None without refits."""
    by_run: dict[str, tuple[np.ndarray, list[list[Change]]]] = {}
    for index, run in enumerate(fit.runs):
        steps = run.steps[run.seen]
        walks = [stays(steps.tolist(), paths[index][run.seen].tolist()) for paths in fit.refit_paths]
        each = [[c for edge in changes({run.run: walk}).values() for c in edge] for walk in walks]
        by_run[run.run] = steps, each
    if not fit.refit_paths:
        return [None] * len(found)
    return [spread(b.change, *by_run[b.change.run]) for b in found]


def edge_rows(fit: StateFit, model: str, found: list[Boundary], tokens: Tokens) -> Iterator[dict[str, Any]]:
    """Rows of the table transitions."""
    for row in fit.transition_rows(model):
        taken = [b.change for b in found if (b.change.source, b.change.target) == (row["from"], row["to"])]
        held = dwell(taken, tokens)
        yield {
            **row,
            "dwell_checkpoints": held.checkpoints,
            "dwell_steps": held.steps,
            "dwell_tokens": held.tokens,
        }


def boundary_rows(
    model: str, found: list[Boundary], spreads: list[Spread | None], tokens: Tokens
) -> Iterator[dict[str, Any]]:
    """Rows of the table boundaries."""
    for b, by_refits in zip(found, spreads, strict=True):
        yield {
            "run": b.change.run,
            "model": model,
            "from": b.change.source,
            "to": b.change.target,
            "before": b.change.before,
            "step": b.change.step,
            "tokens": tokens.get((b.change.run, b.change.step)),
            "low": b.low,
            "high": b.high,
            "bootstrap_low": None if by_refits is None else by_refits.low,
            "bootstrap_high": None if by_refits is None else by_refits.high,
            "bootstrap_refits": None if by_refits is None else by_refits.refits,
            "dwell_checkpoints": b.change.stay.checkpoints,
            "dwell_steps": b.change.dwell_steps,
            "dwell_tokens": dwell_tokens(b.change, tokens),
        }


def mean_rows(fit: StateFit, model: str) -> Iterator[dict[str, Any]]:
    """Rows of the table state_means."""
    parameters, transforms = fit.parameters, fit.trajectories.transforms
    spread = np.sqrt(parameters.variances)
    mean, low, high = (
        natural_means(parameters.means + sign * spread, fit.scaler, transforms) for sign in (0, -1, 1)
    )
    note = "every run was scaled by itself: no common unit" if fit.scaler.mean is None else None
    for state in range(parameters.k):
        for column, metric in enumerate(fit.trajectories.metrics):
            value = number(mean[state, column])
            yield {
                "model": model,
                "state": state,
                "metric": metric,
                "mean": value,
                "low": number(low[state, column]),
                "high": number(high[state, column]),
                "mean_scaled": float(parameters.means[state, column]),
                "note": note or ("the inverse of the transform overflows" if value is None else None),
            }


def driver_rows(fit: StateFit, model: str) -> Iterator[dict[str, Any]]:
    """Rows of the table drivers: per edge and metric the mean over runs (run null), then each run."""
    paths = {run.run: run.state for run in fit.runs}
    found = drivers(fit.parameters, fit.scaled(), paths, fit.scaler, fit.trajectories.transforms)
    rank: dict[tuple[int, int], int] = {}
    for each in found:
        edge = (each.source, each.target)
        rank[edge] = rank.get(edge, 0) + 1
        yield {
            **_driver(each, model, each.score),
            "run": None,
            # Scores of 0 (the other states have vanished beyond floating point) have no order.
            "rank": rank[edge] if each.score else None,
            "runs": len(each.per_run),
        }
    for each in found:
        for run, score in sorted(each.per_run.items()):
            place = 1 + sum(
                other.per_run.get(run, -1.0) > score
                for other in found
                if (other.source, other.target) == (each.source, each.target)
            )
            yield {**_driver(each, model, score), "run": run, "rank": place if score else None, "runs": 1}


def _driver(each: Driver, model: str, score: float | None) -> dict[str, Any]:
    return {
        "model": model,
        "from": each.source,
        "to": each.target,
        "metric": each.metric,
        "score": score,
        "shift": each.shift,
        "shift_scaled": each.shift_scaled,
    }


def training_rows(fit: StateFit, model: str) -> Iterator[dict[str, Any]]:
    """Rows of the table training_frames."""
    scaled, steps = fit.scaled(), dict(zip(fit.trajectories.runs, fit.trajectories.steps, strict=True))
    predicted = log_predicted(fit.parameters, [scaled[run] for run in fit.train_runs])
    for run, expected in zip(fit.train_runs, predicted, strict=True):
        for step, frame, before in zip(steps[run], scaled[run], expected, strict=True):
            if not np.isnan(frame).all():
                yield {
                    "run": run,
                    "model": model,
                    "step": int(step),
                    "values": [number(value) for value in frame],
                    "log_predicted": before.tolist(),
                }


def number(value: float) -> float | None:
    """A float of Python, None for NaN: absent is absent."""
    return None if np.isnan(value) else float(value)
