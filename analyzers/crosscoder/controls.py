"""Random-k control: what a statistic of the top-k features would be for any k features as dense as they."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

Statistic = Callable[[Int64[np.ndarray, "k"]], "float | Float64[np.ndarray, '*shape']"]
"""From ids of features to a number or an array, of one shape for all sets."""


@dataclass(frozen=True)
class Control:
    """A statistic of chosen features beside its distribution over random ones.

    Attributes:
        value: of the chosen features.
        mean: over the draws.
        quantiles: of the draws, one row for each of ``levels``.
        levels: of the quantiles.
        above: ``(1 + number of draws at or above the value) / (1 + draws)``: the one-sided p-value of a
            permutation test within strata of density.
        draws: number of random sets.
        overlap: mean share of the chosen features in a random set. Near 1 there are hardly any other
            features of that density, and the control says nothing.
    """

    value: Float64[np.ndarray, "*shape"]
    mean: Float64[np.ndarray, "*shape"]
    quantiles: Float64[np.ndarray, "levels *shape"]
    levels: tuple[float, ...]
    above: Float64[np.ndarray, "*shape"]
    draws: int
    overlap: float


def random_k_control(
    statistic: Statistic,
    chosen: Int64[np.ndarray, "k"],
    density: Float64[np.ndarray, "latents"],
    *,
    seed: int,
    draws: int = 200,
    factor: float = 2.0,
    levels: tuple[float, ...] = (0.025, 0.5, 0.975),
) -> Control:
    """Compare a statistic of ``chosen`` features with that of ``draws`` random sets of equal density.

    A random set has as many features in every stratum of density as the chosen one; a stratum is the
    densities from ``factor^j`` to ``factor^(j+1)``, so two features of one differ by less than ``factor``.
    The chosen features are among the candidates, as in a permutation test. Dead features (density 0) are not.

    Raises:
        ValueError: no feature is chosen, one twice, one that is dead or not there; or ``factor`` is not above
            1, or ``draws`` not positive.
    """
    chosen = np.asarray(chosen, dtype=np.int64)
    if not len(chosen) or len(np.unique(chosen)) != len(chosen):
        raise ValueError("choose at least one feature, and each once")
    if chosen.min() < 0 or chosen.max() >= len(density):
        raise ValueError(f"features are numbered from 0 to {len(density) - 1}, one of {chosen} is not there")
    if not (density[chosen] > 0).all():
        raise ValueError("a chosen feature is never active: there is no density to match")
    if not factor > 1:
        raise ValueError(f"factor is {factor}, it must be above 1")
    if draws < 1:
        raise ValueError(f"draws is {draws}, at least 1 is needed")
    alive = np.flatnonzero(density > 0)
    strata = np.floor(np.log(density[alive]) / np.log(factor)).astype(np.int64)
    place = {int(feature): index for index, feature in enumerate(alive)}
    wanted, counts = np.unique([strata[place[int(i)]] for i in chosen], return_counts=True)
    candidates = [alive[strata == stratum] for stratum in wanted]
    generator = np.random.default_rng(seed)
    found, common = [], 0
    for _ in range(draws):
        drawn = np.concatenate(
            [
                generator.choice(each, int(k), replace=False)
                for each, k in zip(candidates, counts, strict=True)
            ]
        )
        common += len(np.intersect1d(drawn, chosen))
        found.append(np.asarray(statistic(drawn), dtype=np.float64))
    null, value = np.stack(found), np.asarray(statistic(chosen), dtype=np.float64)
    return Control(
        value,
        np.asarray(null.mean(axis=0)),
        np.quantile(null, levels, axis=0),
        levels,
        np.asarray((1 + (null >= value).sum(axis=0)) / (1 + draws)),
        draws,
        common / (draws * len(chosen)),
    )
