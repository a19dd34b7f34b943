"""The engine: Baum-Welch, scoring and decoding of a Gaussian HMM with diagonal covariance, by hmmlearn.

The only module that knows hmmlearn. All values are scaled ones (no unit), likelihoods are in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hmmlearn.hmm import GaussianHMM
from jaxtyping import Float, Int
from sklearn.cluster import kmeans_plusplus

STARTS = ("k-means++", "random frames", "time segments")
# A state with less weight than this (in frames) has no estimate of its own in the M-step.
MIN_WEIGHT = 1e-10
# Probability of staying with which every restart begins: training moves slowly against its checkpoints.
STAY = 0.9


@dataclass(frozen=True)
class Parameters:
    """A Gaussian HMM with diagonal covariance, in scaled units.

    ``start`` and the rows of ``transition`` (from, to) sum to one and hold per checkpoint, however unevenly
    checkpoints are spaced.
    """

    start: Float[np.ndarray, "k"]
    transition: Float[np.ndarray, "k k"]
    means: Float[np.ndarray, "k metrics"]
    variances: Float[np.ndarray, "k metrics"]

    @property
    def k(self) -> int:
        """Number of states."""
        return len(self.start)

    @property
    def free(self) -> int:
        """Free parameters: (k - 1) + k (k - 1) + 2 k d for d metrics."""
        return self.k - 1 + self.k * (self.k - 1) + 2 * self.means.size

    def relabelled(self, order: Int[np.ndarray, "k"]) -> "Parameters":
        """The same model with state ``order[i]`` renamed to ``i``."""
        return Parameters(
            self.start[order], self.transition[np.ix_(order, order)], self.means[order], self.variances[order]
        )

    def to_dict(self) -> dict[str, Any]:
        """The parameters as plain JSON values; ``covariances`` are the diagonals."""
        return {
            "start": self.start.tolist(),
            "transition": self.transition.tolist(),
            "means": self.means.tolist(),
            "covariances": self.variances.tolist(),
        }

    def to_hmmlearn(self) -> GaussianHMM:
        """The model as hmmlearn's, to score, decode and sample scaled values in a notebook."""
        model = GaussianHMM(self.k, covariance_type="diag", params="", init_params="")
        model.startprob_, model.transmat_ = self.start.copy(), self.transition.copy()
        model.means_, model.covars_ = self.means.copy(), self.variances
        model.n_features = self.means.shape[1]
        return model


@dataclass(frozen=True)
class Restart:
    """One run of Baum-Welch that ended well: log-likelihood in nats over all training frames."""

    parameters: Parameters
    loglik: float
    converged: bool


class _FlooredHMM(GaussianHMM):  # type: ignore[misc]  # hmmlearn is untyped
    """Maximum likelihood subject to variances >= floor and probabilities >= probability_floor.

    Every M-step is the exact maximum under these bounds, so EM stays monotone: for a diagonal Gaussian the
    best variance under a floor is the floored estimate. Without a floor, Baum-Welch drives a transition no
    training run takes to 0, and then no other run can be decoded as taking it: detours would be hidden.
    """

    _covars_: Any

    def __init__(
        self,
        parameters: Parameters,
        floor: float,
        probability_floor: float,
        iterations: int,
        tolerance: float,
    ) -> None:
        super().__init__(
            parameters.k,
            covariance_type="diag",
            covars_prior=0.0,
            n_iter=iterations,
            tol=tolerance,
            init_params="",
            implementation="log",  # "scaling" fails on one outlier frame
        )
        self.startprob_, self.transmat_ = parameters.start, parameters.transition
        self.means_, self.covars_ = parameters.means, parameters.variances
        self.floor, self.probability_floor = floor, probability_floor

    def _init(self, X: Any, lengths: Any = None) -> None:  # noqa: N803 (hmmlearn's name)
        """Everything is set already; hmmlearn's version would only log a warning about small data."""
        self._check_and_set_n_features(X)

    def _do_mstep(self, stats: Any) -> None:
        transition, means, variances = self.transmat_, self.means_, self._covars_
        with np.errstate(divide="ignore", invalid="ignore"):
            super()._do_mstep(stats)
        # Nothing was seen of such a state or such a row: any value is as likely, and the old one is valid.
        empty = stats["post"][:, None] < MIN_WEIGHT
        self.means_ = np.where(empty, means, self.means_)
        self._covars_ = np.where(empty, variances, np.maximum(self._covars_, self.floor))
        left = stats["trans"].sum(axis=1, keepdims=True)
        counts = np.where(left < MIN_WEIGHT, transition, stats["trans"])
        self.transmat_ = _distribution(counts, self.probability_floor)
        self.startprob_ = _distribution(stats["start"][None], self.probability_floor)[0]


def _distribution(counts: Float[np.ndarray, "rows k"], floor: float) -> Float[np.ndarray, "rows k"]:
    """Per row, argmax_p sum_j n_j ln p_j with sum_j p_j = 1 and p_j >= floor."""
    low = np.zeros(counts.shape, dtype=bool)
    while True:
        free = np.where(low, 0.0, counts)
        share = 1 - floor * low.sum(axis=1, keepdims=True)
        p = np.where(low, floor, share * free / free.sum(axis=1, keepdims=True))
        # What the floor takes from the others may push one of them under it.
        below = ~low & (p < floor)
        if not below.any():
            return p
        low |= below


def fit_restarts(
    runs: Sequence[Float[np.ndarray, "_frames metrics"]],
    k: int,
    *,
    restarts: int,
    seed: int,
    floor: float,
    probability_floor: float,
    iterations: int,
    tolerance: float,
) -> tuple[list[Restart], list[str]]:
    """Fit ``k`` states ``restarts`` times; return the restarts, best first, and a sentence per failed one.

    ``floor`` bounds the variances, ``probability_floor`` the start and transition probabilities, from below.
    Restart i starts from k-means++ seeds, random frames or random time segments, in turn, with a generator
    seeded by (seed, k, i): it depends on no other restart.
    """
    frames, lengths = np.concatenate(runs), [len(run) for run in runs]
    done: list[Restart] = []
    failures: list[str] = []
    for index in range(restarts):
        kind = STARTS[index % len(STARTS)]
        try:
            start = _start(runs, k, kind, np.random.default_rng([seed, k, index]), floor)
            model = _FlooredHMM(start, floor, probability_floor, iterations, tolerance)
            model.fit(frames, lengths)
            parameters = Parameters(model.startprob_, model.transmat_, model.means_, model._covars_)
            loglik = score(parameters, runs)
        except (ValueError, ArithmeticError) as error:
            failures.append(f"K = {k}, restart {index} ({kind}) failed: {error}")
            continue
        if not np.isfinite(loglik):
            failures.append(f"K = {k}, restart {index} ({kind}) failed: its log-likelihood is {loglik}")
            continue
        # hmmlearn's own flag is also true when the iterations ran out.
        history = model.monitor_.history
        done.append(Restart(parameters, loglik, len(history) > 1 and history[-1] - history[-2] < tolerance))
    return sorted(done, key=lambda restart: -restart.loglik), failures


def score(parameters: Parameters, runs: Sequence[Float[np.ndarray, "_frames metrics"]]) -> float:
    """Log-likelihood sum_r ln p(x_r) in nats; the runs are independent sequences."""
    model = parameters.to_hmmlearn()
    return float(model.score(np.concatenate(runs), [len(run) for run in runs]))


def decode(
    parameters: Parameters, run: Float[np.ndarray, "frames metrics"]
) -> tuple[Int[np.ndarray, "frames"], Float[np.ndarray, "frames k"]]:
    """Viterbi path argmax_s p(s, x) and smoothed posterior p(s_t = k | x) of one run."""
    model = parameters.to_hmmlearn()
    _, path = model.decode(run, algorithm="viterbi")
    return path.astype(np.int64), model.predict_proba(run)


def _start(
    runs: Sequence[Float[np.ndarray, "_frames metrics"]],
    k: int,
    kind: str,
    rng: np.random.Generator,
    floor: float,
) -> Parameters:
    """Means of ``k`` groups of frames, their pooled variance, and a sticky transition matrix."""
    frames = np.concatenate(runs)
    if kind == "time segments":
        # The same relative cuts in every run, so that a segment means the same part of training.
        cuts = np.sort(rng.uniform(size=k - 1))
        label = np.concatenate(
            [np.searchsorted(cuts, (np.arange(len(run)) + 0.5) / len(run)) for run in runs]
        )
        centers = frames[rng.choice(len(frames), k, replace=False)]
    else:
        if kind == "k-means++":
            centers, _ = kmeans_plusplus(frames, k, random_state=int(rng.integers(2**31)))
        else:
            centers = frames[rng.choice(len(frames), k, replace=False)]
        label = ((frames[:, None, :] - centers) ** 2).sum(axis=2).argmin(axis=1)
    # A group without frames keeps the frame drawn for it.
    means = np.stack(
        [frames[label == i].mean(axis=0) if (label == i).any() else centers[i] for i in range(k)]
    )
    pooled = np.maximum(((frames - means[label]) ** 2).mean(axis=0), floor)
    stay = STAY if k > 1 else 1.0
    transition = np.full((k, k), (1 - stay) / max(k - 1, 1))
    np.fill_diagonal(transition, stay)
    return Parameters(np.full(k, 1 / k), transition, means, np.tile(pooled, (k, 1)))
