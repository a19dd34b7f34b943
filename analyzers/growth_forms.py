"""The growth curve against simpler curves: Akaike's criterion, the class of a trajectory, all runs together.

docs/growth.md has the rule. The simpler curves: a constant, a logarithm, a logistic curve, a step.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special

from analyzers.growth import (
    FITTED,
    GROWTH_FORM,
    PUBLISHED,
    CurveFit,
    GrowthSettings,
    Steps,
    fit_growth,
    peak,
    to_published,
)
from analyzers.phases import middle
from analyzers.sequence_bootstrap import FEWEST_SEQUENCES, SequenceSample

FORMS = ("constant", "step", "logarithm", "logistic", GROWTH_FORM)
# Parameters of each form with the variance of the noise.
SIZES = {"constant": 2, "step": 4, "logarithm": 4, "logistic": 5, GROWTH_FORM: 6}
CLASSES = ("early-peak", "log-rise", "none")
# AICc of the largest form needs two more checkpoints than it has parameters.
FEWEST = 8
# A sum of squares below that of rounding says nothing more.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Form:
    """One form fitted to one trajectory.

    Attributes:
        parameters: by name; empty when the fit did not converge.
        intervals: low and high of those that have an interval; infinite where there is no end.
        r2: share of the variance explained; None when all values are equal.
        aic, aicc: Akaike's criterion and that for small samples; None when the fit did not converge.
        notes: sentences for the reader.
    """

    name: str
    parameters: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    r2: float | None = None
    aic: float | None = None
    aicc: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """What is found in one run, or in all runs.

    Attributes:
        run: name of the run; None for all runs.
        n: checkpoints with a usable value.
        shape: one of ``CLASSES``, ``mixed`` (all runs: no majority), None when it could not be judged.
        preferred: the form that AICc prefers.
        forms: all forms in the order of ``FORMS``; empty when not judged, and for all runs.
        peak: step of the peak of the growth curve and its interval; only where the class is ``early-peak``.
        peaks: the peak in each draw of the bootstrap.
        votes: all runs: how many are of which class.
        method: what the bootstrap drew: ``sequences``, ``residuals``, ``mixed`` (all runs); None: nothing.
        notes: sentences for the reader.
    """

    run: str | None
    n: int
    shape: str | None = None
    preferred: str | None = None
    forms: tuple[Form, ...] = ()
    peak: tuple[float, float, float] | None = None
    peaks: Float[np.ndarray, "draws"] = field(default_factory=lambda: np.empty(0), repr=False)
    votes: dict[str, int] = field(default_factory=dict)
    method: str | None = None
    notes: tuple[str, ...] = ()

    def form(self, name: str) -> Form | None:
        """The form of that name; None where it was not fitted."""
        return next((form for form in self.forms if form.name == name), None)


def akaike(squares: float, n: int, size: int) -> tuple[float, float]:
    """AIC and AICc of a least-squares fit whose noise variance is estimated.

    ``AIC = n (ln(2 pi squares / n) + 1) + 2 size`` and ``AICc = AIC + 2 size (size + 1) / (n - size - 1)``,
    where ``size`` counts the variance (Burnham and Anderson 2002, sections 2.2 and 2.4).

    Raises:
        ValueError: ``n`` is not larger than ``size + 1``.
    """
    if n <= size + 1:
        raise ValueError(f"{n} values are too few for {size} parameters")
    aic = n * (np.log(2 * np.pi * squares / n) + 1) + 2 * size
    return float(aic), float(aic + 2 * size * (size + 1) / (n - size - 1))


def fit_trajectory(
    steps: Int[np.ndarray, "n"],
    values: Float[np.ndarray, "n"],
    settings: GrowthSettings | None = None,
    run: str | None = None,
    sequences: SequenceSample | None = None,
) -> Trajectory:
    """Fit all forms to one trajectory, compare them, and name its class.

    Values that are not finite are left out. With fewer than ``FEWEST`` left, nothing is judged.

    Args:
        steps: optimizer steps, strictly increasing, not negative.
        values: the metric, in its own unit.
        settings: how to fit.
        run: name of the run.
        sequences: the metric on single sequences at these steps, whose metric ``values`` are. The intervals
            are then those of a bootstrap over sequences, unless ``settings`` ask for residuals.

    Raises:
        ValueError: steps do not increase or are negative, or shapes differ.
    """
    settings = settings or GrowthSettings()
    if len(steps) != len(values):
        raise ValueError(f"{len(steps)} steps for {len(values)} values")
    if sequences is not None and len(sequences.values) != len(values):
        raise ValueError(f"{len(sequences.values)} checkpoints of sequences for {len(values)} values")
    if (np.diff(steps) <= 0).any() or (steps < 0).any():
        raise ValueError("steps do not increase from 0 or later")
    usable = np.isfinite(values)
    notes = []
    if lost := int((~usable).sum()):
        notes.append(f"{lost} of {len(values)} checkpoints have no value and are left out")
    t, y = steps[usable].astype(np.float64), values[usable].astype(np.float64)
    n = len(t)
    if n < FEWEST:
        notes.append(f"{n} usable checkpoints, and {FEWEST} are the fewest that can be judged")
        return Trajectory(run, n, notes=tuple(notes))
    if np.ptp(y) <= 1e-12 * np.abs(y).max():
        return Trajectory(run, n, "none", "constant", (_constant(y),), notes=(*notes, "all values are equal"))
    drawn = sequences.at(usable) if sequences is not None and settings.intervals == "sequences" else None
    if drawn is not None and (reason := _not_drawn(drawn)):
        notes.append(f"intervals are of residuals: {reason}")
        drawn = None
    curve = fit_growth(t, y, settings, drawn)
    forms = (_constant(y), _step(t, y), _logarithm(t, y), _logistic(t, y), _growth(y, curve, settings.level))
    preferred = prefer(forms, settings.margin)
    method = "residuals" if drawn is None else "sequences"
    result = Trajectory(run, n, None, preferred, forms, method=method, notes=tuple(notes))
    if curve.fitted is None or curve.values is None:
        return replace(result, shape="log-rise" if _rises(forms, preferred) else "none")
    peaks = peak(curve.draws)
    low, high = _quantiles(peaks, settings.level)
    inside = t[0] < low and high < t[-1]
    if preferred == GROWTH_FORM and inside:
        place = float(peak(curve.fitted))
        return replace(result, shape="early-peak", peak=(place, low, high), peaks=peaks)
    rising = curve.values[-1] > curve.values[0] and high >= t[-1] and curve.fitted[2] > 0
    grows = rising if preferred == GROWTH_FORM else _rises(forms, preferred)
    return replace(result, shape="log-rise" if grows else "none", peaks=peaks)


def _not_drawn(sample: SequenceSample) -> str | None:
    """Why there can be no bootstrap over these sequences."""
    if sample.sequences < FEWEST_SEQUENCES:
        return f"{sample.sequences} sequences are too few"
    parts = (sample.values, sample.over)
    if not all(np.isfinite(part).all() for part in parts if part is not None):
        return "a sequence has no finite value at a checkpoint"
    return None


def prefer(forms: Sequence[Form], margin: float) -> str:
    """The form that AICc prefers, where a difference up to ``margin`` counts as none.

    The growth curve must lead the logarithm by more than ``margin``; a logistic curve or a step (the lower
    of the two) must lead the better of those by more; and all must lead the constant by more.
    """
    known = {form.name: form.aicc for form in forms if form.aicc is not None}

    def leads(name: str, others: Sequence[str]) -> bool:
        return name in known and all(known[name] < known[o] - margin for o in others if o in known)

    best = "constant"
    for name in ("logarithm", GROWTH_FORM):
        if leads(name, [best]):
            best = name
    for name in ("step", "logistic"):
        if leads(name, ["constant", "logarithm", GROWTH_FORM]) and (
            best not in ("step", "logistic") or known[name] < known[best]
        ):
            best = name
    return best


def _rises(forms: Sequence[Form], preferred: str) -> bool:
    return any(f.name == preferred == "logarithm" and f.parameters["slope"] > 0 for f in forms)


def _quantiles(draws: Float[np.ndarray, "draws"], level: float) -> tuple[float, float]:
    """Equal-tailed interval; a draw without a number counts as beyond every end."""
    ends = [(1 - level) / 2, (1 + level) / 2]
    found = np.quantile(np.where(np.isnan(draws), np.inf, draws), ends, method="nearest")
    return float(found[0]), float(found[1])


def _form(
    name: str, y: Steps, fitted: Steps, parameters: dict[str, float], notes: tuple[str, ...] = ()
) -> Form:
    n = len(y)
    squares = max(float(np.square(y - fitted).sum()), n * (_ROUNDING * float(np.abs(y).max())) ** 2)
    total = float(np.square(y - y.mean()).sum())
    aic, aicc = akaike(max(squares, np.finfo(np.float64).tiny), n, SIZES[name])
    freedom = n - SIZES[name] + 1
    parameters = parameters | {"residual_sd": float(np.sqrt(squares / freedom))}
    return Form(name, parameters, {}, None if total == 0 else 1 - squares / total, aic, aicc, notes)


def _constant(y: Steps) -> Form:
    return _form("constant", y, np.full(len(y), y.mean()), {"level": float(y.mean())})


def _step(t: Steps, y: Steps) -> Form:
    """Two levels of at least two checkpoints each; the place of the step counts as a parameter."""
    n = len(y)
    after = np.arange(2, n - 1)  # checkpoints before the step
    sums = np.cumsum(y)[after - 1]
    explained = sums**2 / after + (y.sum() - sums) ** 2 / (n - after)
    i = int(after[np.argmax(explained)])
    before, behind = float(y[:i].mean()), float(y[i:].mean())
    parameters = {"before": before, "after": behind, "last_step_before": t[i - 1], "first_step_after": t[i]}
    fitted = np.where(np.arange(n) < i, before, behind)
    return _form("step", y, fitted, {name: float(value) for name, value in parameters.items()})


def _solved(columns: Float[np.ndarray, "n k"], y: Steps) -> tuple[Float[np.ndarray, "k"], Steps]:
    """Coefficients of least squares, and the fit."""
    coefficients = np.linalg.lstsq(columns, y)[0]
    return coefficients, np.asarray(columns @ coefficients)


def _logarithm(t: Steps, y: Steps) -> Form:
    """``slope ln(t + tau) + level``: tau by a search over its logarithm, the other two solved for exactly."""
    first = float(t[t > 0][0])

    def columns(log_tau: float) -> Float[np.ndarray, "n 2"]:
        # The mean is taken out, or the columns are all but parallel for large tau.
        log = np.log(t + np.exp(log_tau))
        return np.stack([log - log.mean(), np.ones_like(t)], axis=1)

    def squares(log_tau: float) -> float:
        return float(np.square(_solved(columns(log_tau), y)[1] - y).sum())

    low, high = np.log(first / 10), np.log(10 * t[-1])
    log_tau = _lowest(squares, np.linspace(low, high, 25))
    (slope, level), fitted = _solved(columns(log_tau), y)
    level -= slope * np.log(t + np.exp(log_tau)).mean()
    parameters = {"slope": float(slope), "tau": float(np.exp(log_tau)), "level": float(level)}
    return _form("logarithm", y, fitted, parameters)


def _lowest(function: Callable[[float], float], grid: Float[np.ndarray, "grid"]) -> float:
    """Where a function of one number is lowest: best of the grid, then a search between its neighbours."""
    i = int(np.argmin([function(float(x)) for x in grid]))
    between = (grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)])
    found = optimize.minimize_scalar(function, bounds=between, method="bounded", options={"xatol": 1e-6})
    return float(found.x if found.fun < function(float(grid[i])) else grid[i])


def _logistic(t: Steps, y: Steps) -> Form:
    """``low + height / (1 + exp(-rate (u - middle)))``, ``u = ln(1 + t)``, by TRF from a grid of starts."""
    u = np.log1p(t)
    width = float(u[-1] - u[0])
    bounds = (np.array([u[0], np.log(1 / width)]), np.array([u[-1], np.log(10 / np.diff(u).min())]))

    def columns(p: Float[np.ndarray, "2"]) -> Float[np.ndarray, "n 2"]:
        rise = special.expit(np.exp(p[1]) * (u - p[0]))
        return np.stack([rise, np.ones_like(u)], axis=1)

    def residual(p: Float[np.ndarray, "2"]) -> Steps:
        return np.asarray(_solved(columns(p), y)[1] - y)

    def slopes(p: Float[np.ndarray, "2"]) -> Float[np.ndarray, "n 2"]:
        # Kaufman's approximation: what the two linear parameters would undo is taken out.
        both, rate = columns(p), np.exp(p[1])
        rise, height = both[:, 0], _solved(both, y)[0][0]
        moved = (
            height * (rise * (1 - rise))[:, None] * np.stack([np.full_like(u, -rate), rate * (u - p[0])], 1)
        )
        basis = np.linalg.qr(both)[0]
        return np.asarray(moved - basis @ (basis.T @ moved))

    grid = [
        np.array([middle_, rate])
        for middle_ in np.linspace(bounds[0][0], bounds[1][0], 9)[1:-1]
        for rate in np.linspace(np.log(3 / width), np.log(60 / width), 5)
    ]
    start = min(grid, key=lambda p: float(np.square(residual(p)).sum()))
    found = optimize.least_squares(
        residual,
        np.clip(start, bounds[0] + 1e-6, bounds[1] - 1e-6),
        jac=slopes,
        bounds=bounds,
        method="trf",
        x_scale="jac",
        max_nfev=200,
    )
    if found.status <= 0:
        return Form("logistic", notes=(f"the fit did not converge in {found.nfev} evaluations",))
    (height, low), fitted = _solved(columns(found.x), y)
    numbers = {"low": low, "height": height, "rate": np.exp(found.x[1]), "middle_step": np.expm1(found.x[0])}
    return _form("logistic", y, fitted, {name: float(value) for name, value in numbers.items()})


def _growth(y: Steps, curve: CurveFit, level: float) -> Form:
    if curve.fitted is None or curve.values is None:
        return Form(GROWTH_FORM, notes=curve.notes)
    names = (*PUBLISHED[:-1], *FITTED)
    best = np.concatenate([to_published(curve.fitted)[:-1], curve.fitted])
    draws = np.concatenate([to_published(curve.draws)[:, :-1], curve.draws], axis=1)
    notes = curve.notes
    if not np.isfinite(best).all():
        notes = (*notes, "A1 is all but 0, so that A, lambda, gamma and t0 have no value in float64")
    place = float(peak(curve.fitted))
    parameters = {name: float(v) for name, v in zip(names, best, strict=True) if np.isfinite(v)}
    intervals = {}
    for i, name in enumerate(names):
        column = draws[:, i]
        if name in parameters and np.isfinite(column).all():
            intervals[name] = _quantiles(column, level)
    if place > 0:
        parameters["peak_step"] = place
        intervals["peak_step"] = _quantiles(peak(curve.draws), level)
    return replace(_form(GROWTH_FORM, y, curve.values, parameters, notes), intervals=intervals)


def pool(runs: Sequence[Trajectory], settings: GrowthSettings | None = None) -> Trajectory:
    """All runs together: the class of more than half of the runs that could be judged.

    Where that is ``early-peak``, the peak is the median over ln(1 + step) of the runs of that class, and its
    interval that of their bootstrap's draws taken together: spread over runs and noise of each. Parameters
    are not averaged, because curves that are all but equal have far different ones.
    """
    settings = settings or GrowthSettings()
    judged = [run for run in runs if run.shape is not None]
    notes = [f"not judged: {run.run}" for run in runs if run.shape is None]
    votes = Counter(run.shape for run in judged if run.shape is not None)
    n = sum(run.n for run in runs)
    if not judged:
        return Trajectory(None, n, notes=tuple(notes))
    shape, most = votes.most_common(1)[0]
    shape = shape if 2 * most > len(judged) else "mixed"
    found = [run for run in judged if run.shape == "early-peak" and run.peak is not None]
    methods = {run.method for run in judged if run.method is not None}
    method = "mixed" if len(methods) > 1 else next(iter(methods), None)
    result = Trajectory(None, n, shape, votes=dict(votes), method=method, notes=tuple(notes))
    if shape != "early-peak":
        return result
    place = middle([round(run.peak[0]) for run in found if run.peak is not None])
    low, high = _quantiles(np.concatenate([run.peaks for run in found]), settings.level)
    return replace(result, peak=(float(place), low, high))
