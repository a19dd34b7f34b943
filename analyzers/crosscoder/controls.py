"""Random-k control: what a statistic of the top-k features would be for other features as dense as they."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Real

Statistic = Callable[[Int64[np.ndarray, "k"]], "float | Float64[np.ndarray, '*shape']"]
"""From ids of features to a number or an array, of one shape for all sets."""


@dataclass(frozen=True)
class Control:
    """A statistic of chosen features beside its distribution over random ones.

    Attributes:
        value: of the chosen features.
        random: of each random set.
    """

    value: Float64[np.ndarray, "*shape"]
    random: Float64[np.ndarray, "draws *shape"]

    @property
    def mean(self) -> Float64[np.ndarray, "*shape"]:
        """Over the draws."""
        return np.asarray(self.random.mean(axis=0))

    def quantiles(
        self, levels: tuple[float, ...] = (0.025, 0.5, 0.975)
    ) -> Float64[np.ndarray, "levels *shape"]:
        """Of the draws, one row for each of ``levels``."""
        return np.asarray(np.quantile(self.random, levels, axis=0))

    @property
    def above(self) -> Float64[np.ndarray, "*shape"]:
        """One-sided p: ``(1 + number of draws at or above the value) / (1 + draws)``."""
        return self._share(self.random >= self.value)

    @property
    def beyond(self) -> Float64[np.ndarray, "*shape"]:
        """Two-sided p: draws at least as large in size."""
        return self._share(np.abs(self.random) >= np.abs(self.value))

    def _share(self, hit: np.ndarray) -> Float64[np.ndarray, "*shape"]:
        return np.asarray((1 + hit.sum(axis=0)) / (1 + len(self.random)))


def random_like(
    chosen: Int64[np.ndarray, "k"],
    density: Real[np.ndarray, "latents"],
    rng: np.random.Generator,
    nearest: int = 10,
) -> Int64[np.ndarray, "k"]:
    """Random features of about the same densities, none of them chosen and none twice.

    For each chosen feature, in random order, one of the ``nearest`` features still free whose density is
    nearest to its own in log; features that are never active are not drawn. Density is any multiple of the
    number of active tokens.

    Raises:
        ValueError: there are fewer other active features than chosen ones.
    """
    free = np.setdiff1d(np.flatnonzero(density), chosen)
    if len(free) < len(chosen):
        raise ValueError(f"{len(free)} other features are active, {len(chosen)} are needed as a control")
    drawn = []
    for feature in rng.permutation(chosen):
        # Mixed first, so that which of many equally near ones come into question is left to chance.
        free = rng.permutation(free)
        away = np.abs(np.log(density[free]) - np.log(density[feature]))
        taken = int(rng.choice(np.argsort(away, kind="stable")[:nearest]))
        drawn.append(int(free[taken]))
        free = np.delete(free, taken)
    return np.array(drawn, dtype=np.int64)


def random_k_control(
    statistic: Statistic,
    chosen: Int64[np.ndarray, "k"],
    density: Real[np.ndarray, "latents"],
    *,
    seed: int,
    draws: int = 200,
) -> Control:
    """Compare a statistic of ``chosen`` features with that of ``draws`` random sets of :func:`random_like`.

    The question is whether others of that density would do as well, so the chosen are not among them.

    Raises:
        ValueError: no feature is chosen, one twice, one that is never active or not there; there are too few
            others; or ``draws`` is not positive.
    """
    chosen = np.asarray(chosen, dtype=np.int64)
    if not len(chosen) or len(np.unique(chosen)) != len(chosen):
        raise ValueError("choose at least one feature, and each once")
    if chosen.min() < 0 or chosen.max() >= len(density):
        raise ValueError(f"features are numbered from 0 to {len(density) - 1}, one of {chosen} is not there")
    if not (density[chosen] > 0).all():
        raise ValueError("a chosen feature is never active: there is no density to match")
    if draws < 1:
        raise ValueError(f"draws is {draws}, at least 1 is needed")
    rng = np.random.default_rng(seed)
    random = [
        np.asarray(statistic(random_like(chosen, density, rng)), dtype=np.float64) for _ in range(draws)
    ]
    return Control(np.asarray(statistic(chosen), dtype=np.float64), np.stack(random))
