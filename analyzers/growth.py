"""The growth curve of massive activations: its function, its peak, its fit with intervals.

``f(t) = A exp(-lambda x) ln(x) + K`` with ``x = gamma t + t0`` ("Hidden Dynamics of Massive Activations",
arXiv 2508.03616), fitted in other parameters: ``f(t) = exp(-beta t) (A1 ln(t + tau0) + A2) + K``.
docs/growth.md says why, and what the parameters cannot tell.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from scipy import optimize, special

from analyzers.sequence_bootstrap import SequenceSample, resample

Steps = Float[np.ndarray, "n"]
Five = Float[np.ndarray, "5"]

GROWTH_VERSION = 2
GROWTH_FORM = "massive-growth"
PUBLISHED = ("A", "lambda", "gamma", "t0", "K")
FITTED = ("beta", "tau0", "A1", "A2", "K")
# Grid of starts: decay rates from flat within the range to gone at once, offsets below the first step and up.
_RATES, _OFFSETS = 25, 12
_POLISHED, _TOLERANCE = 3, 1e-8
# Of the bootstrap's fits, and of the starts.
_ROUGH, _FINE = (40, 1e-6), (80, 1e-7)


class GrowthSettings(BaseModel):
    """What the fit depends on besides its data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    starts: Annotated[
        int, Field(ge=1, le=50, description="local starts from the grid, beside the published start")
    ] = 8
    evaluations: Annotated[
        int, Field(ge=1, description="evaluations after which TRF counts as not converged")
    ] = 300
    draws: Annotated[int, Field(ge=100, description="draws of the bootstrap")] = 400
    intervals: Annotated[
        Literal["sequences", "residuals"],
        Field(
            description="what the bootstrap draws: sequences where the store has their values (else "
            "residuals), or always residuals"
        ),
    ] = "sequences"
    level: Annotated[float, Field(gt=0, lt=1, description="level of the intervals")] = 0.95
    margin: Annotated[
        float, Field(ge=0, description="lead in AICc by which a form counts as the better one")
    ] = 6.0
    seed: Annotated[int, Field(ge=0, description="seed of the bootstrap")] = 0


def growth(steps: Steps, published: Five) -> Steps:
    """``A exp(-lambda x) ln(x) + K`` with ``x = gamma t + t0``; parameters in the order of ``PUBLISHED``.

    >>> growth(np.array([0.0, 9.0]), np.array([2.0, 0.0, 1.0, 1.0, 5.0])).round(3)
    array([5.   , 9.605])
    """
    a, rate, gamma, t0, k = published
    x = gamma * steps + t0
    return np.asarray(a * np.exp(-rate * x) * np.log(x) + k)


def reparametrised(steps: Steps, fitted: Float[np.ndarray, "*fits 5"]) -> Float[np.ndarray, "*fits n"]:
    """``exp(-beta t) (A1 ln(t + tau0) + A2) + K``; parameters in the order of ``FITTED``."""
    beta, tau0, a1, a2, k = np.moveaxis(fitted[..., None], -2, 0)
    return np.asarray(np.exp(-beta * steps) * (a1 * np.log(steps + tau0) + a2) + k)


def jacobian(steps: Steps, fitted: Float[np.ndarray, "*fits 5"]) -> Float[np.ndarray, "*fits n 5"]:
    """Derivatives of :func:`reparametrised` by its parameters, in the order of ``FITTED``."""
    beta, tau0, a1, a2, _ = np.moveaxis(fitted[..., None], -2, 0)
    decay, log = np.exp(-beta * steps), np.log(steps + tau0)
    columns = (-steps * decay * (a1 * log + a2), decay * a1 / (steps + tau0), decay * log, decay)
    return np.stack([*columns, np.ones_like(decay)], axis=-1)


def to_fitted(published: Five) -> Five:
    """``beta = lambda gamma``, ``tau0 = t0/gamma``, ``A1 = A exp(-lambda t0)``, ``A2 = A1 ln gamma``."""
    a, rate, gamma, t0, k = published
    a1 = a * np.exp(-rate * t0)
    return np.array([rate * gamma, t0 / gamma, a1, a1 * np.log(gamma), k])


def to_published(fitted: Float[np.ndarray, "*fits 5"]) -> Float[np.ndarray, "*fits 5"]:
    """The way back: ``gamma = exp(A2/A1)``. Not finite where A1 vanishes, since gamma then has no value."""
    beta, tau0, a1, a2, k = np.moveaxis(fitted, -1, 0)
    with np.errstate(all="ignore"):
        gamma = np.exp(a2 / a1)
        found = np.stack([a1 * np.exp(beta * tau0), beta / gamma, gamma, gamma * tau0, k], axis=-1)
    # Infinite, or zero where it cannot be: exp has left the range of float64.
    broken = ~np.isfinite(found).all(axis=-1) | (gamma == 0)
    found[broken, :4] = np.nan
    return np.asarray(found)


def peak(fitted: Float[np.ndarray, "*fits 5"]) -> Float[np.ndarray, "*fits"]:
    """Step of the maximum, ``t = (exp(W(1/lambda)) - t0) / gamma``; NaN where there is none.

    W is Lambert's function. Computed as ``1 / (beta omega(A2/A1 - ln beta)) - tau0`` with Wright's
    ``omega(z) = W(exp(z))``, which is the same and does not overflow. Negative where the maximum would lie
    before step 0. With A1 <= 0 the extreme is a minimum, and with beta = 0 there is none.
    """
    beta, tau0, a1, a2, _ = np.moveaxis(fitted, -1, 0)
    with np.errstate(all="ignore"):
        place = 1 / (beta * special.wrightomega(a2 / a1 - np.log(beta))) - tau0
    return np.asarray(np.where((a1 > 0) & (beta > 0) & np.isfinite(place), place, np.nan))


@dataclass(frozen=True)
class Scale:
    """How data become of order 1: ``s = t / span``, ``z = (y - low) / height``."""

    span: float
    low: float
    height: float

    @classmethod
    def of(cls, steps: Steps, values: Steps) -> "Scale":
        """Last step, lowest value, range of the values."""
        return cls(float(steps[-1]), float(values.min()), float(np.ptp(values)))

    def back(self, scaled: Float[np.ndarray, "*fits 5"]) -> Float[np.ndarray, "*fits 5"]:
        """From ``FITTED`` of scaled data to ``FITTED`` of the data.

        ``ln(s + c) = ln(t + tau0) - ln(span)``, so A1 ln(span) goes over to A2.
        """
        beta, tau0, a1, a2, k = np.moveaxis(scaled, -1, 0)
        a2 = self.height * (a2 - a1 * np.log(self.span))
        return np.stack(
            [beta / self.span, tau0 * self.span, self.height * a1, a2, self.height * k + self.low], axis=-1
        )


def _opened(inner: Float[np.ndarray, "*fits 5"]) -> Float[np.ndarray, "*fits 5"]:
    """From the parameters that are searched, (ln b, ln c, p, q, z0), to ``FITTED`` of scaled data.

    ``z = z0 + p exp(-b s) phi(s) + q g(s)`` with ``phi(s) = ln(1 + s/c) / ln(1 + 1/c)`` and
    ``g(s) = (1 - exp(-b s)) / (1 - exp(-b))``: both go from 0 to 1 for every b and c. In A1, A2 and K the
    search crawls, since they grow against each other without end for large c or small b.
    """
    log_b, log_c, p, q, z0 = np.moveaxis(inner, -1, 0)
    b, c = np.exp(log_b), np.exp(log_c)
    a1, lost = p / np.log1p(1 / c), q / np.expm1(-b)
    return np.stack([b, c, a1, lost - a1 * log_c, z0 - lost], axis=-1)


def _chain(inner: Float[np.ndarray, "*fits 5"]) -> Float[np.ndarray, "*fits 5 5"]:
    """Derivatives of :func:`_opened`: rows are its results, columns what is searched."""
    log_b, log_c, p, q, _ = np.moveaxis(inner, -1, 0)
    b, c = np.exp(log_b), np.exp(log_c)
    whole, lost = np.log1p(1 / c), np.expm1(-b)
    found = np.zeros((*inner.shape, 5))
    found[..., 0, 0], found[..., 1, 1] = b, c
    found[..., 2, 1] = p / (whole**2 * (1 + c))
    found[..., 2, 2] = 1 / whole
    found[..., 3, 0] = q * b * np.exp(-b) / lost**2
    found[..., 3, 1] = -found[..., 2, 1] * log_c - p / whole
    found[..., 3, 2] = -log_c / whole
    found[..., 3, 3] = 1 / lost
    found[..., 4, 0], found[..., 4, 3] = -found[..., 3, 0], -found[..., 3, 3]
    found[..., 4, 4] = 1
    return found


def _closed(scaled: Five) -> Five:
    """The way back from ``FITTED`` of scaled data."""
    b, c, a1, a2, k = scaled
    lost = a2 + a1 * np.log(c)
    return np.array([np.log(b), np.log(c), a1 * np.log1p(1 / c), lost * np.expm1(-b), k + lost])


@dataclass(frozen=True)
class CurveFit:
    """A fit of the growth curve.

    Attributes:
        fitted: parameters in the order of ``FITTED``; None when no start converged.
        values: the curve at the steps.
        draws: parameters of the bootstrap's fits, ``[draws, 5]``.
        notes: sentences for the reader.
    """

    fitted: Five | None
    values: Steps | None
    draws: Float[np.ndarray, "draws 5"]
    notes: tuple[str, ...] = ()


def fit_growth(
    steps: Steps, values: Steps, settings: GrowthSettings, sequences: SequenceSample | None = None
) -> CurveFit:
    """Least squares by scipy's TRF with the analytic Jacobian, from several starts, and its bootstrap.

    The rate and the offset are fitted as logarithms, so that lambda > 0 holds by itself. Starts: the
    published one, and the best local minima of a grid over rate and offset, the other three parameters being
    solved for exactly at each point (the curve is linear in them). :func:`refit` goes down from all of them;
    TRF goes on from the lowest, or from the next where it does not converge.

    Args:
        steps: strictly increasing, not negative, the last positive; at least 6 of them.
        values: finite, not all equal.
        settings: how to fit.
        sequences: the metric on single sequences at these steps: the bootstrap draws these. Without, it
            draws residuals.

    Raises:
        ValueError: sequences are too few, or have a value that is not finite.
    """
    scale = Scale.of(steps, values)
    s, z = steps / scale.span, (values - scale.low) / scale.height
    low, high = _bounds(s)
    starts = np.clip([*_grid_starts(s, z, settings.starts), _published_start(s)], low, high)
    near = refit(s, np.tile(z, (len(starts), 1)), starts, low, high, *_FINE)
    order = np.argsort(np.square(_curve(s, near) - z).sum(axis=1), kind="stable")
    best, evaluated = None, 0
    for start in near[order[:_POLISHED]]:
        solution = optimize.least_squares(
            lambda p: _curve(s, p) - z,
            np.clip(start, low + 1e-6, high - 1e-6),
            jac=lambda p: _slopes(s, p),
            bounds=(low, high),
            method="trf",
            x_scale="jac",
            ftol=_TOLERANCE,
            xtol=_TOLERANCE,
            gtol=_TOLERANCE,
            max_nfev=settings.evaluations,
        )
        evaluated += solution.nfev
        if solution.status > 0:
            best = solution
            break
    if best is None:
        note = f"no start converged in {evaluated} evaluations"
        return CurveFit(None, None, np.empty((0, 5)), (note,))
    if sequences is None:
        targets = _residual_draws(s, z, best.x, settings)
    else:
        targets = (resample(sequences, settings.draws, settings.seed) - scale.low) / scale.height
    draws = refit(s, targets, np.tile(best.x, (len(targets), 1)), low, high, *_ROUGH)
    curve = scale.height * _curve(s, best.x) + scale.low
    return CurveFit(scale.back(_opened(best.x)), curve, scale.back(_opened(draws)), _edges(best.x, s))


def _curve(s: Steps, inner: Float[np.ndarray, "*fits 5"]) -> Float[np.ndarray, "*fits n"]:
    return reparametrised(s, _opened(inner))


def _slopes(s: Steps, inner: Float[np.ndarray, "*fits 5"]) -> Float[np.ndarray, "*fits n 5"]:
    return np.asarray(jacobian(s, _opened(inner)) @ _chain(inner))


def _bounds(s: Steps) -> tuple[Five, Five]:
    """Rates from nothing lost within the range to all lost at once, offsets that the steps can tell apart."""
    first = float(s[s > 0][0])
    low = np.array([np.log(1e-4), np.log(first / 10), -np.inf, -np.inf, -np.inf])
    high = np.array([np.log(1 / first), np.log(10.0), np.inf, np.inf, np.inf])
    return low, high


def _edges(inner: Five, s: Steps) -> tuple[str, ...]:
    """What it means that a rate or an offset lies at the end of its range."""
    low, high = _bounds(s)
    notes = []
    if inner[0] < low[0] + 0.1:
        notes.append("lambda is at its lower bound: the curve is a logarithm")
    if inner[0] > high[0] - 0.1:
        notes.append("lambda is at its upper bound: the decay is faster than the checkpoints show")
    if inner[1] < low[1] + 0.1:
        notes.append("t0 is at its lower bound: it rests on the first checkpoint")
    if inner[1] > high[1] - 0.1:
        notes.append("t0 is at its upper bound: the logarithm is a straight line within the range")
    return tuple(notes)


def _published_start(s: Steps) -> Five:
    """A = range, K = lowest + A/2, lambda = 1/sd(t), gamma = 1/range(t), t0 = 1, of scaled data."""
    gamma = 1 / np.ptp(s)
    return _closed(to_fitted(np.array([1.0, 1 / s.std(), gamma, 1.0, 0.5])))


@lru_cache(maxsize=8)
def _grid(steps: bytes) -> tuple[Float[np.ndarray, "grid 2"], Float[np.ndarray, "grid n 3"]]:
    """Points (ln b, ln c), and at each the three columns that the curve is linear in.

    Layers share their steps, hence the cache.
    """
    s = np.frombuffer(steps, dtype=np.float64)
    low, high = _bounds(s)
    rates = np.linspace(low[0] + 2, high[0] - 0.5, _RATES)
    offsets = np.linspace(low[1] + 0.5, high[1] - 0.5, _OFFSETS)
    points = np.stack(np.meshgrid(rates, offsets, indexing="ij"), axis=-1).reshape(-1, 2)
    b, c = np.exp(points[:, :1]), np.exp(points[:, 1:])
    rise = np.exp(-b * s) * np.log1p(s / c) / np.log1p(1 / c)
    columns = np.stack([rise, np.expm1(-b * s) / np.expm1(-b), np.ones_like(rise)], axis=-1)
    return points, columns


@lru_cache(maxsize=8)
def _bases(steps: bytes) -> Float[np.ndarray, "grid n 3"]:
    """Orthonormal bases of the columns of :func:`_grid`."""
    return np.asarray(np.linalg.qr(_grid(steps)[1])[0])


def _grid_starts(s: Steps, z: Steps, count: int) -> list[Five]:
    """The best local minima of the sum of squares over the grid."""
    key = s.tobytes()
    points, columns = _grid(key)
    explained = np.square(np.einsum("gnk,n->gk", _bases(key), z, optimize=True)).sum(axis=1)
    table = -explained.reshape(_RATES, _OFFSETS)
    padded = np.pad(table, 1, constant_values=np.inf)
    sides = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    minima = np.flatnonzero((table <= np.minimum.reduce(sides)).ravel())
    best = minima[np.argsort(table.ravel()[minima], kind="stable")][:count]
    return [np.concatenate([points[g], np.linalg.lstsq(columns[g], z)[0]]) for g in best]


def local_sd(residual: Steps) -> Steps:
    """Root mean square over each value and its nearest neighbours: a tenth of all, at least 5."""
    n = len(residual)
    side = max(2, round(n / 20))
    sums = np.concatenate([[0.0], np.cumsum(np.square(residual))])
    first, last = np.maximum(np.arange(n) - side, 0), np.minimum(np.arange(n) + side + 1, n)
    return np.asarray(np.sqrt((sums[last] - sums[first]) / (last - first)))


def block_length(residual: Steps) -> int:
    """``n^(1/3)`` (rounded, at least 2) if neighbours err alike, else 1.

    They do where the autocorrelation at lag 1 exceeds its standard error under independence, ``1/sqrt(n)``.
    Blocks where nothing is correlated make intervals 10 % too short.
    """
    n, total = len(residual), float(np.square(residual).sum())
    alike = total > 0 and float(residual[1:] @ residual[:-1]) / total > 1 / np.sqrt(n)
    return max(2, round(n ** (1 / 3))) if alike else 1


def _residual_draws(s: Steps, z: Steps, best: Five, settings: GrowthSettings) -> Float[np.ndarray, "draws n"]:
    """The curve plus residuals drawn in blocks.

    Residuals are divided by ``1 - leverage``, since the curve follows its own data (HC3), and by
    :func:`local_sd`, since noise may grow along the run; drawn in blocks of neighbours (circular blocks,
    Politis and Romano 1992); and multiplied by the local size of where they arrive.
    """
    curve, n = _curve(s, best), len(s)
    basis = np.linalg.qr(_slopes(s, best))[0]
    leverage = np.minimum(np.square(basis).sum(axis=1), 0.9)
    residual = (z - curve) / (1 - leverage)
    local = local_sd(residual)
    standard = np.divide(residual, local, out=np.zeros(n), where=local > 0)
    standard -= standard.mean()
    length = block_length(standard)
    first = np.random.default_rng(settings.seed).integers(n, size=(settings.draws, -(-n // length)))
    places = (first[:, :, None] + np.arange(length)).reshape(settings.draws, -1)[:, :n] % n
    return np.asarray(curve + local * standard[places])


def refit(
    s: Steps,
    targets: Float[np.ndarray, "fits n"],
    starts: Float[np.ndarray, "fits 5"],
    low: Five,
    high: Five,
    iterations: int,
    tolerance: float,
) -> Float[np.ndarray, "fits 5"]:
    """Levenberg-Marquardt on many targets at once, a start each; a call of scipy for each takes far longer.

    Parameters are those of :func:`_opened`. A fit stops after ``iterations``, or when an accepted step lowers
    its sum of squares by less than ``tolerance`` of it.
    """
    found = starts.copy()
    damping = np.full(len(targets), 1e-3)
    residual = _curve(s, found) - targets
    cost = np.square(residual).sum(axis=1)
    active = np.flatnonzero(cost > 0)
    for _ in range(iterations):
        if not active.size:
            break
        here = found[active]
        slopes = _slopes(s, here)
        normal = np.swapaxes(slopes, 1, 2) @ slopes
        gradient = (np.swapaxes(slopes, 1, 2) @ residual[active][:, :, None])[:, :, 0]
        diagonal = np.einsum("dkk->dk", normal).copy()
        floor = 1e-12 * diagonal.max(axis=1, keepdims=True)
        normal += np.eye(5) * (damping[active, None] * (diagonal + floor) + floor)[:, :, None]
        moved = np.clip(here - np.linalg.solve(normal, gradient[:, :, None])[:, :, 0], low, high)
        tried = _curve(s, moved) - targets[active]
        new = np.square(tried).sum(axis=1)
        better = new < cost[active]
        won = active[better]
        gain = cost[won] - new[better]
        small = gain < tolerance * cost[won]
        found[won], residual[won], cost[won] = moved[better], tried[better], new[better]
        damping[active] = np.where(better, damping[active] / 5, damping[active] * 4)
        stuck = ~better & (damping[active] > 1e8)
        done = np.concatenate([won[small], active[stuck]])
        active = np.setdiff1d(active, done, assume_unique=True)
    return found
