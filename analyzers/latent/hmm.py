"""Inference with one set of parameters: filter, smoother, Viterbi, sampling. Pure functions.

Runs are independent sequences of scaled values with one row per frame; NaN is a missing value and is
marginalised out, and a frame without any value is bridged by the transitions. All recursions are in
logarithms, so nothing underflows. Likelihoods are in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from analyzers.latent.emissions import log_density
from analyzers.latent.packing import Packing
from analyzers.latent.parameters import Parameters
from analyzers.latent.recursions import in_logarithms, log, log_forward, logsumexp, viterbi


@dataclass(frozen=True)
class Filtered:
    """One run as it looked while it went on: no frame knows of a later one.

    Attributes:
        posterior: p(s_t = k | x_1:t).
        surprise: -ln p(x_t | x_1:t-1), in nats; their sum is -ln p(x). A density of scaled values: it may be
            negative, and frames with gaps have fewer terms than complete ones.
    """

    posterior: Float[np.ndarray, "frames k"]
    surprise: Float[np.ndarray, "frames"]

    @property
    def loglik(self) -> float:
        """ln p(x) of the run."""
        return -float(self.surprise.sum())


@dataclass(frozen=True)
class Decoded:
    """The most probable path of one run, argmax_s p(s, x), and ln p(s, x) of it."""

    path: Int[np.ndarray, "frames"]
    log_joint: float


def filter_runs(
    parameters: Parameters, runs: Sequence[Float[np.ndarray, "_frames metrics"]]
) -> list[Filtered]:
    """Forward filter of every run."""
    packing, density, start, transition = _prepared(parameters, runs)
    forward = log_forward(density, start, transition, packing)
    filtered = []
    for joint in packing.unpack(forward):
        evidence = logsumexp(joint)
        filtered.append(Filtered(np.exp(joint - evidence[:, None]), -np.diff(evidence, prepend=0.0)))
    return filtered


def log_predicted(
    parameters: Parameters, runs: Sequence[Float[np.ndarray, "_frames metrics"]]
) -> list[Float[np.ndarray, "_frames k"]]:
    """ln p(s_t = k | x_1:t-1) of every run: what the filter expects before it sees a frame."""
    packing, density, start, transition = _prepared(parameters, runs)
    found = []
    for joint in packing.unpack(log_forward(density, start, transition, packing)):
        past = joint[:-1] - logsumexp(joint[:-1])[:, None]
        later = logsumexp(log(parameters.transition).T + past[:, None, :])
        found.append(np.concatenate([log(parameters.start)[None], later]))
    return found


def smooth_runs(
    parameters: Parameters, runs: Sequence[Float[np.ndarray, "_frames metrics"]]
) -> list[Float[np.ndarray, "_frames k"]]:
    """Smoothed posterior p(s_t = k | x) of every run."""
    packing, density, start, transition = _prepared(parameters, runs)
    return packing.unpack(in_logarithms(density, start, transition, packing).smoothed)


def decode_runs(
    parameters: Parameters, runs: Sequence[Float[np.ndarray, "_frames metrics"]]
) -> list[Decoded]:
    """Viterbi path of every run; of equally probable paths, one with lower states."""
    packing, density, start, transition = _prepared(parameters, runs)
    path, joint = viterbi(density, start, transition, packing)
    each = np.empty(len(runs))
    each[packing.order] = joint
    return [Decoded(one, float(value)) for one, value in zip(packing.unpack(path), each, strict=True)]


def score(parameters: Parameters, runs: Sequence[Float[np.ndarray, "_frames metrics"]]) -> float:
    """Log-likelihood sum_r ln p(x_r) of the observed values, in nats."""
    return sum(each.loglik for each in filter_runs(parameters, runs))


def decode(
    parameters: Parameters, run: Float[np.ndarray, "frames metrics"]
) -> tuple[Int[np.ndarray, "frames"], Float[np.ndarray, "frames k"]]:
    """Viterbi path and smoothed posterior of one run."""
    return decode_runs(parameters, [run])[0].path, smooth_runs(parameters, [run])[0]


def sample(
    parameters: Parameters, frames: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "frames"], Float[np.ndarray, "frames metrics"]]:
    """Draw the states and the scaled values of one run."""
    states = np.empty(frames, dtype=np.int64)
    for time in range(frames):
        weights = parameters.transition[states[time - 1]] if time else parameters.start
        states[time] = rng.choice(parameters.k, p=weights / weights.sum())
    noise = rng.normal(size=(frames, parameters.means.shape[1]))
    if parameters.covariance == "diag":
        return states, parameters.means[states] + noise * np.sqrt(parameters.covariances[states])
    factor = np.linalg.cholesky(parameters.covariances)
    return states, parameters.means[states] + np.einsum("tij,tj->ti", factor[states], noise)


def _prepared(
    parameters: Parameters, runs: Sequence[Float[np.ndarray, "_frames metrics"]]
) -> tuple[Packing, Float[np.ndarray, "rows k"], Float[np.ndarray, "runs k"], Float[np.ndarray, "runs k k"]]:
    packing = Packing.of([len(run) for run in runs])
    density = log_density(parameters, packing.pack(runs))
    start = np.broadcast_to(log(parameters.start), (len(runs), parameters.k))
    transition = np.broadcast_to(log(parameters.transition), (len(runs), parameters.k, parameters.k))
    return packing, density, start, transition
