"""The null of a training map: does the same fit do as well on smooth surrogates of the runs?

A Gaussian HMM cuts any drift into states, so a map by itself is no evidence of phases. A surrogate of a run
has its metrics, its steps, its gaps and its noise, and no phase: each metric follows a smooth curve. A fit
that does as well on surrogates has found nothing that needs phases. docs/training_map.md says what that can
and cannot rule out.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int
from threadpoolctl import threadpool_limits

from analyzers.latent.fit import times_of
from analyzers.latent.hmm import decode_runs, score
from analyzers.latent.parameters import Parameters, relabelled_by_time
from analyzers.latent.selection import candidate, choose, fit_k, seen_frames
from analyzers.latent.settings import StateSettings
from analyzers.latent.training_map import forks, reentries, stays

Frames = Float[np.ndarray, "_frames metrics"]

# A metric of a run has at most a third as many parameters as values, and these at the most:
# six of a polynomial of degree 5, the size and the time constant of a saturation.
DEGREE = 5
VALUES_PER_PARAMETER = 3
TIME_CONSTANTS = 24
# A gap of at most so many nats per value counts for nothing: curves of another form than ours give that ...
LEAST = 0.02
# ... and one of at most so many standard deviations of the surrogates may be chance.
SPREADS = 4.0
# Fewer surrogates have no spread to speak of.
FEWEST_SURROGATES = 3


@dataclass(frozen=True)
class MapShape:
    """What a decoded map looks like.

    Attributes:
        edges: changes of state (from, to) that at least one run makes.
        forks: states that not all runs leave for the same states.
        returning: runs that re-enter a state.
        usual: runs that visit the states in the commonest order.
    """

    edges: frozenset[tuple[int, int]]
    forks: int
    returning: int
    usual: int

    @property
    def linear(self) -> bool:
        """No fork and no re-entry."""
        return not self.forks and not self.returning


@dataclass(frozen=True)
class Null:
    """The observed runs beside their surrogates; fits of both have the same settings, K and restarts.

    Attributes:
        k: number of states.
        heldout: whether likelihoods are of held-out runs; else of the run that was fitted.
        loglik: log-likelihood of the observed runs, nats per frame with a value.
        surrogates: the same of each surrogate that could be fitted.
        values: values per frame with a value, on average (metrics without gaps).
        shape: the map of the observed runs.
        shapes: the maps of the surrogates.
        rule_k: number of states that the rule chooses for the observed runs with these few restarts; None
            when it was not applied.
        rule_ks: the same for the first surrogates.
        failed: surrogates of which every restart failed.
        notes: sentences on what this null cannot support.
    """

    k: int
    heldout: bool
    loglik: float
    surrogates: tuple[float, ...]
    values: float
    shape: MapShape
    shapes: tuple[MapShape, ...]
    rule_k: int | None
    rule_ks: tuple[int, ...]
    failed: int
    notes: tuple[str, ...]

    @property
    def gap(self) -> float | None:
        """Observed log-likelihood minus the mean of the surrogates, nats per frame."""
        return self.loglik - float(np.mean(self.surrogates)) if self.surrogates else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the surrogates' log-likelihoods, nats per frame."""
        return float(np.std(self.surrogates, ddof=1)) if len(self.surrogates) > 1 else None

    @property
    def explained(self) -> bool | None:
        """Whether smooth surrogates do as well; None where that is open.

        They do where a surrogate reaches the observed runs, or the gap is at most 0.02 nats per value. They
        do not where the observed runs lead every surrogate by more than that, and the gap is more than 4
        standard deviations of the surrogates. In between, and with fewer than three surrogates, it is open.
        """
        if self.gap is None or self.spread is None or len(self.surrogates) < FEWEST_SURROGATES:
            return None
        if self.loglik <= max(self.surrogates) or self.gap <= LEAST * self.values:
            return True
        return False if self.gap > SPREADS * self.spread else None

    @property
    def same_map(self) -> int:
        """Surrogates with the edges of the observed map, states numbered by time in both."""
        return sum(shape.edges == self.shape.edges for shape in self.shapes)


@dataclass(frozen=True)
class Smooth:
    """A run as smooth curves and what they leave; NaN where a value is missing."""

    curve: Frames
    residual: Frames


def smooth(steps: Int[np.ndarray, "frames"], values: Float[np.ndarray, "frames metrics"]) -> Smooth:
    """Least-squares curve of every metric of one run, without any jump:

    ``f = c0 + c1 r + ... + c5 r^5 + b g(s / tau)``, where r in [0, 1] is the place of the frame among the
    run's frames, s the steps since the first one, and g(u) is 1 - exp(-u) (saturation) or ln(1 + u) (a
    logarithm); g and tau are those of 2 x 24 that leave least, tau geometric from the smallest distance of
    two steps to all of them. A metric with n values has at most n / 3 parameters: the highest powers go
    first, a metric with fewer than nine values has a line, with fewer than six a constant.
    """
    rank = np.linspace(0.0, 1.0, len(steps))
    since = (steps - steps[0]).astype(float)
    taus = np.geomspace(np.diff(steps).min(initial=max(since[-1], 1.0)), max(since[-1], 1.0), TIME_CONSTANTS)
    ways = [-np.expm1(-since / tau) for tau in taus] + [np.log1p(since / tau) for tau in taus]
    curve = np.full(values.shape, np.nan)
    seen = ~np.isnan(values)
    patterns, which = np.unique(seen, axis=1, return_inverse=True)
    for pattern, there in enumerate(patterns.T):
        columns = np.flatnonzero(which.ravel() == pattern)
        if not there.any():
            continue
        size = max(int(there.sum()) // VALUES_PER_PARAMETER, 1)
        if size < 3:
            powers = rank[:, None] ** np.arange(size)
            fitted = _fitted(powers, values[:, columns], there)
        else:
            powers = rank[:, None] ** np.arange(min(DEGREE, size - 3) + 1)
            fits = np.stack(
                [_fitted(np.column_stack([powers, way]), values[:, columns], there) for way in ways]
            )
            squares = ((fits[:, there] - values[there][:, columns]) ** 2).sum(axis=1)
            fitted = fits[squares.argmin(axis=0), :, np.arange(len(columns))].T
        curve[np.ix_(there, columns)] = fitted[there]
    return Smooth(curve, values - curve)


def _fitted(
    basis: Float[np.ndarray, "frames terms"],
    values: Float[np.ndarray, "frames columns"],
    there: Bool[np.ndarray, "frames"],
) -> Float[np.ndarray, "frames columns"]:
    return np.asarray(basis @ np.linalg.lstsq(basis[there], values[there], rcond=None)[0])


def surrogate(run: Smooth, rng: np.random.Generator) -> Frames:
    """The smooth curve of a run with its residuals in random order: whatever they had in time is gone.

    Whole frames are permuted, so that noise that metrics share stays shared. Where a frame lacks a metric its
    residual is drawn from that metric's others; the gaps of the run stay where they are. Residuals are not
    enlarged for the parameters: what the curve has swallowed of the noise is in the curve.
    """
    noise = run.residual.copy()
    for column in noise.T:
        absent = np.isnan(column)
        if absent.any() and not absent.all():
            column[absent] = rng.choice(column[~absent], int(absent.sum()))
    # Frames without any value have no noise of their own to give.
    seen = np.flatnonzero(~np.isnan(run.residual).all(axis=1))
    noise[seen] = noise[rng.permutation(seen)]
    return np.asarray(run.curve + noise)


def compare(
    runs: Mapping[str, Frames],
    steps: Mapping[str, Int[np.ndarray, "_frames"]],
    train: Sequence[str],
    heldout: Sequence[str],
    k: int,
    settings: StateSettings,
) -> Null:
    """Fit ``k`` states to the runs and to their surrogates, with ``surrogate_restarts`` restarts each.

    ``runs`` are scaled frames; the surrogates keep that scale, so that nats compare. Likelihoods are those of
    the held-out runs, or of the run itself where there is only one. The rule for K is applied to the observed
    runs and to the first ``surrogate_selections`` surrogates. The result does not depend on the order of the
    runs nor on the number of threads.

    Raises:
        ValueError: the settings ask for no surrogate.
        RuntimeError: every restart on the observed runs failed.
    """
    if not settings.surrogates:
        raise ValueError("a null needs at least one surrogate")
    names = sorted(runs)
    train, heldout = sorted(train), sorted(heldout)
    few = settings.model_copy(
        update={
            "restarts": settings.surrogate_restarts,
            "bootstraps": 0,
            "folds": settings.folds if settings.rule == "heldout" else 0,
        }
    )
    with threadpool_limits(1):
        curves = {name: smooth(steps[name], runs[name]) for name in names}
        times = times_of([steps[name] for name in names])
        observed = _fitted_map({name: runs[name] for name in names}, times, train, heldout, k, few)
        if observed is None:
            raise RuntimeError(f"no restart with K = {k} succeeded on the observed runs")
        drawn = [
            {
                name: surrogate(curves[name], np.random.default_rng([settings.seed, index, place]))
                for place, name in enumerate(names)
            }
            for index in range(settings.surrogates)
        ]
        fits = [_fitted_map(each, times, train, heldout, k, few) for each in drawn]
        count = min(settings.surrogate_selections, len(drawn))
        rules = [
            _rule_k(each, train, heldout, few) for each in ([dict(runs), *drawn[:count]] if count else [])
        ]
    done = [each for each in fits if each is not None]
    judged = [runs[name] for name in (heldout or train)]
    return Null(
        k=k,
        heldout=bool(heldout),
        loglik=observed[0],
        surrogates=tuple(value for value, _ in done),
        values=float((~np.isnan(np.concatenate(judged))).sum() / seen_frames(judged).sum()),
        shape=observed[1],
        shapes=tuple(shape for _, shape in done),
        rule_k=rules[0] if rules else None,
        rule_ks=tuple(number for number in rules[1:] if number is not None),
        failed=len(fits) - len(done),
        notes=tuple(_notes(runs, train, heldout, k, len(fits) - len(done))),
    )


def map_shape(
    paths: Mapping[str, Int[np.ndarray, "_frames"]], seen: Mapping[str, Bool[np.ndarray, "_frames"]]
) -> MapShape:
    """Edges, forks, re-entries and the commonest order of decoded paths, over the frames with a value."""
    walks = {
        name: stays(range(int(seen[name].sum())), path[seen[name]].tolist()) for name, path in paths.items()
    }
    orders = {name: tuple(stay.state for stay in walk) for name, walk in walks.items()}
    return MapShape(
        edges=frozenset(pair for order in orders.values() for pair in pairwise(order)),
        forks=len(forks(walks)),
        returning=len({name for back in reentries(walks).values() for name in back}),
        usual=Counter(orders.values()).most_common(1)[0][1],
    )


def _fitted_map(
    runs: Mapping[str, Frames],
    times: Sequence[Int[np.ndarray, "_frames"]],
    train: Sequence[str],
    heldout: Sequence[str],
    k: int,
    settings: StateSettings,
) -> tuple[float, MapShape] | None:
    """Log-likelihood per frame and map of the best restart; None when all failed."""
    done, _ = fit_k([runs[name] for name in train], k, settings.restarts, settings)
    if not done:
        return None
    parameters: Parameters = done[0].parameters
    judged = [runs[name] for name in (heldout or train)]
    frames = list(runs.values())
    paths = [each.path for each in decode_runs(parameters, frames)]
    parameters = relabelled_by_time(parameters, paths, times)[0]
    paths = [each.path for each in decode_runs(parameters, frames)]
    seen = {name: seen_frames([run]) for name, run in runs.items()}
    return score(parameters, judged) / float(seen_frames(judged).sum()), map_shape(
        dict(zip(runs, paths, strict=True)), seen
    )


def _rule_k(
    runs: Mapping[str, Frames], train: Sequence[str], heldout: Sequence[str], settings: StateSettings
) -> int | None:
    """K by the rule of the settings; None when every restart of every K failed."""
    training, held = [runs[name] for name in train], [runs[name] for name in heldout]
    largest = min(settings.k_max, max(int(seen_frames(training).sum()) // 2, 1))
    candidates = [candidate(number, training, held, settings) for number in range(1, largest + 1)]
    try:
        return choose(candidates, settings, one_run=not heldout).candidate.k
    except RuntimeError:
        return None


def _notes(
    runs: Mapping[str, Frames], train: Sequence[str], heldout: Sequence[str], k: int, failed: int
) -> list[str]:
    notes = []
    if not heldout:
        notes.append(
            "the gap is on the run that was fitted, and one run cannot say whether a fork or a re-entry is "
            "more than noise"
        )
    seen = {name: int(seen_frames([run]).sum()) for name, run in runs.items()}
    short = [name for name in sorted(runs) if seen[name] < VALUES_PER_PARAMETER * VALUES_PER_PARAMETER]
    if short:
        notes.append(
            f"{len(short)} of {len(runs)} runs have fewer than 9 checkpoints with a value: their surrogate "
            "is a line or a constant, and a bend counts as structure"
        )
    frames = sum(seen[name] for name in train)
    if frames < 10 * k:
        notes.append(
            f"{k} states share {frames} fitted checkpoints, fewer than 10 each: the fit follows noise in the "
            "observed runs and in the surrogates, and the gap says little"
        )
    if failed:
        notes.append(f"{failed} surrogates could not be fitted with {k} states")
    return notes
