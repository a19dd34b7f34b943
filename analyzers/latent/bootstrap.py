"""Bootstrap over runs: refits to resampled runs, how far they agree, where they put each change of state."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix

from analyzers.latent.em import Prior, baum_welch
from analyzers.latent.hmm import decode_runs
from analyzers.latent.parameters import Parameters
from analyzers.latent.settings import StateSettings
from analyzers.latent.training_map import Change

Runs = Sequence[Float[np.ndarray, "_frames metrics"]]

# An interval leaves out so much of the refits on either side.
TAIL = 0.05


@dataclass(frozen=True)
class Spread:
    """Where refits put one change of state of one run.

    Attributes:
        low: 5th percentile of the steps of those refits that have the change, rounded down to one of them;
            None where none has it.
        high: 95th percentile, rounded up. With 20 refits or fewer the two are their range.
        refits: how many have the change, from the same state to the same state.
    """

    low: int | None
    high: int | None
    refits: int


def prior_of(settings: StateSettings) -> Prior:
    """The prior of every fit."""
    return Prior(floor=settings.covariance_floor, probability_floor=settings.probability_floor)


def refit_resampled(parameters: Parameters, train: Runs, settings: StateSettings) -> list[Parameters]:
    """Refits to as many runs as ``train`` has, drawn from it with replacement; each starts at ``parameters``.

    A refit in which a state dies out has failed and is left out: where many do, the states rest on single
    runs. A single run cannot be resampled: there is none.
    """
    found: list[Parameters] = []
    for resample in range(settings.bootstraps if len(train) > 1 else 0):
        drawn = np.random.default_rng([settings.seed, resample]).integers(len(train), size=len(train))
        try:
            (refit,) = baum_welch(
                [train[i] for i in drawn],
                [parameters],
                prior=prior_of(settings),
                iterations=settings.max_iterations,
                tolerance=settings.tolerance,
            )
        except ValueError:
            # The drawn runs lack a metric altogether.
            continue
        if refit.parameters is not None:
            found.append(refit.parameters)
    return found


def agreement(
    refits: Sequence[Parameters],
    runs: Runs,
    path: Int[np.ndarray, "frames"],
    seen: Bool[np.ndarray, "frames"],
) -> float | None:
    """Mean adjusted Rand index of ``path`` and the paths of the refits, on the frames ``seen``."""
    found = []
    for refit in refits:
        other = np.concatenate([each.path for each in decode_runs(refit, runs)])
        found.append(float(adjusted_rand_score(path[seen], other[seen])))
    return float(np.mean(found)) if found else None


def matched_paths(
    refit: Parameters,
    runs: Runs,
    paths: Sequence[Int[np.ndarray, "_frames"]],
    seen: Bool[np.ndarray, "frames"],
) -> list[Int[np.ndarray, "_frames"]]:
    """Paths of a refit, its states renamed so that as many frames ``seen`` as can be agree with ``paths``.

    Hungarian algorithm on the counts of frames per pair of states. EM may exchange states, in principle.
    """
    theirs = [each.path for each in decode_runs(refit, runs)]
    names = np.arange(refit.k)
    # Every pair of states once more than it occurs, so that the table has a row and a column for each.
    grid = np.repeat(names, refit.k), np.tile(names, refit.k)
    mine = np.concatenate([np.concatenate(paths)[seen], grid[0]])
    other = np.concatenate([np.concatenate(theirs)[seen], grid[1]])
    rows, columns = linear_sum_assignment(contingency_matrix(mine, other), maximize=True)
    renamed = np.empty(refit.k, dtype=np.int64)
    renamed[columns] = rows
    return [renamed[path] for path in theirs]


def spread(change: Change, steps: Int[np.ndarray, "frames"], refits: Sequence[Sequence[Change]]) -> Spread:
    """Where refits put ``change``; ``steps`` are those of the run, ``refits`` the run's changes in each.

    Of several changes between the same two states the one fewest checkpoints away is taken.
    """

    def away(other: Change) -> int:
        return abs(int(np.searchsorted(steps, other.step)) - place)

    place, found = int(np.searchsorted(steps, change.step)), []
    for changes in refits:
        alike = [each for each in changes if (each.source, each.target) == (change.source, change.target)]
        if alike:
            found.append(min(alike, key=away).step)
    if not found:
        return Spread(None, None, 0)
    return Spread(
        int(np.quantile(found, TAIL, method="lower")),
        int(np.quantile(found, 1 - TAIL, method="higher")),
        len(found),
    )
