"""Random models and the oracle that sums over all paths."""

import itertools

import numpy as np
from scipy.stats import multivariate_normal

from analyzers.latent import Parameters
from analyzers.latent.parameters import allowed


def random_model(rng, k, d, covariance="diag", topology="ergodic", spread=1.5):
    """A model whose states overlap: no posterior is trivial."""
    start_allowed, transition_allowed = allowed(topology, k)
    start = rng.dirichlet(np.ones(k)) * start_allowed
    transition = rng.dirichlet(np.ones(k), k) * transition_allowed
    means = spread * rng.normal(size=(k, d))
    if covariance == "diag":
        covariances = rng.uniform(0.3, 1.5, (k, d))
    else:
        factor = rng.normal(size=(k, d, d))
        covariances = factor @ factor.transpose(0, 2, 1) / d + 0.3 * np.eye(d)
    transition /= transition.sum(axis=1, keepdims=True)
    return Parameters(start / start.sum(), transition, means, covariances, topology)


def with_gaps(rng, frames, share=0.3):
    """The frames with single values and one whole frame missing."""
    frames = np.where(rng.uniform(size=frames.shape) < share, np.nan, frames)
    frames[len(frames) // 2] = np.nan
    return frames


def density(parameters, frames):
    """ln p(seen metrics | state) by scipy, one frame and state at a time."""
    values = np.zeros((len(frames), parameters.k))
    for t, frame in enumerate(frames):
        seen = np.flatnonzero(~np.isnan(frame))
        for state in range(parameters.k):
            covariance = parameters.covariances[state]
            covariance = np.diag(covariance) if covariance.ndim == 1 else covariance
            if len(seen):
                values[t, state] = multivariate_normal.logpdf(
                    frame[seen], parameters.means[state, seen], covariance[np.ix_(seen, seen)]
                )
    return values


def brute_force(parameters, frames):
    """Log-likelihood, best path, its log probability, posteriors and expected transitions, over k^T paths."""
    k, length = parameters.k, len(frames)
    with np.errstate(divide="ignore"):
        start, transition = np.log(parameters.start), np.log(parameters.transition)
    paths = np.array(list(itertools.product(range(k), repeat=length)))
    joint = start[paths[:, 0]] + density(parameters, frames)[np.arange(length), paths].sum(axis=1)
    joint += transition[paths[:, :-1], paths[:, 1:]].sum(axis=1)
    loglik = np.logaddexp.reduce(joint)
    weight = np.exp(joint - loglik)
    posterior = np.stack([[weight[paths[:, t] == i].sum() for i in range(k)] for t in range(length)])
    counts = np.zeros((k, k))
    for t in range(1, length):
        np.add.at(counts, (paths[:, t - 1], paths[:, t]), weight)
    return loglik, paths[joint.argmax()], joint.max(), posterior, counts


def planted_runs(seed=0, runs=12, frames=40, states=4, d=5, noise=0.5):
    """Runs that pass through the states in order, with cuts of their own; and the true states."""
    rng = np.random.default_rng(seed)
    centers = 2 * rng.normal(size=(states, d))
    values, truth = [], []
    for run in range(runs):
        length = frames - run % 3 * 5
        cuts = np.sort(rng.choice(np.arange(3, length - 3), states - 1, replace=False))
        path = np.searchsorted(cuts, np.arange(length), side="right")
        values.append(centers[path] + noise * rng.normal(size=(length, d)))
        truth.append(path)
    return values, truth


def planted_series(seed=0, runs=40, frames=100, d=14, noise=0.7):
    """Runs through 6 states with a fork and a detour: 0, 1 or 2, 3, in a quarter of the runs 4, then 5.

    Returns values and true states.
    """
    rng = np.random.default_rng(seed)
    centers = 2 * rng.normal(size=(6, d))
    values, truth = [], []
    for run in range(runs):
        states = np.array([0, 1 + run % 2, 3, *([4] if run % 4 == 3 else []), 5])
        # At least an eighth of the run between two changes, and each run has cuts of its own.
        gap = frames // 8
        free = np.sort(rng.integers(0, frames - gap * len(states), len(states) - 1))
        cuts = free + gap * np.arange(1, len(states))
        path = states[np.searchsorted(cuts, np.arange(frames), side="right")]
        values.append(centers[path] + noise * rng.normal(size=(frames, d)))
        truth.append(path)
    return values, truth


def saturation_curves(seed=0, runs=40, frames=100, d=14, noise=0.3, steps=None):
    """Runs without phases: every metric goes to its limit at a rate of its own, much alike in all runs."""
    rng = np.random.default_rng(seed)
    steps = np.arange(frames) if steps is None else steps
    size = 2 * rng.normal(size=d)
    constant = steps[-1] * np.exp(rng.uniform(np.log(0.05), np.log(0.6), d))
    return [
        size
        * rng.normal(1, 0.05, d)
        * -np.expm1(-steps[:, None] / (constant * np.exp(0.1 * rng.normal(size=d))))
        + noise * rng.normal(size=(len(steps), d))
        for _ in range(runs)
    ]
