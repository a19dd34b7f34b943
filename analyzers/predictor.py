"""Parameters of growth curves from a model's architecture, judged on models that were left out.

After "Hidden Dynamics of Massive Activations" (arXiv 2508.03616, section 5): its features, its models but for
XGBoost, its transforms. Its split is not copied: it draws layers at random, so that a model's other layers
stand in the training set. docs/growth.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from sklearn.base import RegressorMixin
from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor
from sklearn.linear_model import Lasso, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PowerTransformer, StandardScaler

from analyzers.growth import PUBLISHED, growth

FEATURES = (
    "l/L",
    "(l/L)^2",
    "(l/L)^3",
    "sqrt(l/L)",
    "heads/d",
    "d_ff/d",
    "d/L",
    "heads/L",
    "ln d",
    "l L",
)
FEWEST_MODELS = 3
# A regressor with settings that are not tuned: with a handful of models there is nothing to tune on.
REGRESSORS: dict[str, Callable[[int], RegressorMixin]] = {
    "Ridge": lambda seed: make_pipeline(StandardScaler(), Ridge(alpha=1.0)),
    "Lasso": lambda seed: make_pipeline(StandardScaler(), Lasso(alpha=0.01, max_iter=100_000)),
    "RandomForest": lambda seed: RandomForestRegressor(n_estimators=100, random_state=seed),
    "GradientBoosting": lambda seed: GradientBoostingRegressor(random_state=seed),
}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model: blocks L, width d, heads, inner width of the MLP."""

    layers: int
    width: int
    heads: int
    d_ff: int


@dataclass(frozen=True)
class Sample:
    """The fitted curve of one layer of one run: its parameters in the order of ``PUBLISHED``."""

    architecture: Architecture
    layer: int
    parameters: tuple[float, ...]


@dataclass(frozen=True)
class Score:
    """How well one regressor predicts one parameter of models it has not seen.

    ``r2`` is about the mean of what is predicted; ``skill`` is the share of the squared error of the mean of
    the training models that is taken away: 0 for a prediction that is no better than it.
    """

    parameter: str
    regressor: str
    r2: float
    skill: float


def features(samples: Sequence[Sample]) -> Float[np.ndarray, "n 10"]:
    """The ten features in the order of ``FEATURES``; layers l are counted from 1 to L.

    >>> features([Sample(Architecture(4, 16, 2, 64), 1, (1.0, 1.0, 1.0, 1.0, 1.0))])[0].round(3).tolist()
    [0.5, 0.25, 0.125, 0.707, 0.125, 4.0, 4.0, 0.5, 2.773, 8.0]
    """
    rows = []
    for sample in samples:
        a, number = sample.architecture, sample.layer + 1
        depth = number / a.layers
        shape = (a.heads / a.width, a.d_ff / a.width, a.width / a.layers, a.heads / a.layers)
        rows.append([depth, depth**2, depth**3, depth**0.5, *shape, np.log(a.width), number * a.layers])
    return np.array(rows, dtype=np.float64).reshape(-1, len(FEATURES))


def usable(parameters: Sequence[float]) -> bool:
    """Whether the transforms can take them: all known, and those on log1p above -1."""
    known = [p for p in parameters if np.isfinite(p)]
    return len(known) == len(PUBLISHED) and all(p > -1 for p in known[:-1])


class _Scaled:
    """A parameter in units of the training models: log1p (K: Yeo-Johnson), minus mean, over sd."""

    def __init__(self, name: str, training: Float[np.ndarray, "n"]) -> None:
        self._power = None
        if name == "K" and np.ptp(training) > 0:
            self._power = PowerTransformer("yeo-johnson", standardize=False).fit(training[:, None])
        self._log = name != "K"
        moved = self._moved(training)
        self._mean, self._sd = moved.mean(), moved.std() or 1.0

    def _moved(self, values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        if self._log:
            return np.asarray(np.log1p(values))
        return values if self._power is None else np.asarray(self._power.transform(values[:, None])[:, 0])

    def back(self, scaled: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """From units of the training models to the parameter's own; NaN or infinite out of the range."""
        moved = scaled * self._sd + self._mean
        with np.errstate(over="ignore"):
            if self._log:
                return np.asarray(np.expm1(moved))
            if self._power is None:
                return np.asarray(moved)
            return np.asarray(self._power.inverse_transform(moved[:, None])[:, 0])

    def __call__(self, values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        return np.asarray((self._moved(values) - self._mean) / self._sd)


def leave_one_model_out(samples: Sequence[Sample], seed: int = 0) -> list[Score]:
    """Scores of every regressor on every parameter, each model predicted from all others.

    A model is an architecture: runs and series of equal sizes are left out together, since their features
    are the same. Transforms, their constants and the regressors see the training models only. Errors are in
    units of the training models' standard deviation, and are pooled over the models left out.

    Raises:
        ValueError: there are fewer than ``FEWEST_MODELS`` models, or a parameter that no transform takes.
    """
    groups = sorted({s.architecture for s in samples}, key=lambda a: (a.layers, a.width, a.heads, a.d_ff))
    if len(groups) < FEWEST_MODELS:
        raise ValueError(f"{len(groups)} models, and {FEWEST_MODELS} are the fewest that can be left out")
    if not all(usable(s.parameters) for s in samples):
        raise ValueError("a parameter is not finite, or its logarithm has no value")
    x = features(samples)
    y = np.array([s.parameters for s in samples], dtype=np.float64)
    member = np.array([groups.index(s.architecture) for s in samples])
    scores = []
    for column, name in enumerate(PUBLISHED):
        truth = np.empty(len(samples))
        guess = {regressor: np.empty(len(samples)) for regressor in REGRESSORS}
        for group in range(len(groups)):
            out = member == group
            scaled = _Scaled(name, y[~out, column])
            truth[out] = scaled(y[out, column])
            for regressor, make in REGRESSORS.items():
                fitted = make(seed).fit(x[~out], scaled(y[~out, column]))
                guess[regressor][out] = fitted.predict(x[out])
        spread, baseline = float(np.square(truth - truth.mean()).sum()), float(np.square(truth).sum())
        for regressor, predicted in guess.items():
            error = float(np.square(truth - predicted).sum())
            scores.append(Score(name, regressor, _share(error, spread), _share(error, baseline)))
    return scores


def predict(
    samples: Sequence[Sample], architecture: Architecture, regressor: str = "Ridge", seed: int = 0
) -> Float[np.ndarray, "layers 5"]:
    """Parameters of the curve of every layer of a model, in the order of ``PUBLISHED``, from all samples.

    Raises:
        ValueError: there are fewer than ``FEWEST_MODELS`` models, or there is no such regressor.
    """
    models = {sample.architecture for sample in samples}
    if len(models) < FEWEST_MODELS:
        raise ValueError(f"{len(models)} models, and {FEWEST_MODELS} are the fewest to predict from")
    if regressor not in REGRESSORS:
        raise ValueError(f"there is no regressor {regressor!r}: give one of {', '.join(REGRESSORS)}")
    layers = [Sample(architecture, layer, ()) for layer in range(architecture.layers)]
    return _predicted(samples, layers, regressor, seed)


def _predicted(
    training: Sequence[Sample], wanted: Sequence[Sample], regressor: str, seed: int
) -> Float[np.ndarray, "n 5"]:
    x, y = features(training), np.array([s.parameters for s in training], dtype=np.float64)
    found = np.empty((len(wanted), len(PUBLISHED)))
    for column, name in enumerate(PUBLISHED):
        scaled = _Scaled(name, y[:, column])
        fitted = REGRESSORS[regressor](seed).fit(x, scaled(y[:, column]))
        found[:, column] = scaled.back(fitted.predict(features(wanted)))
    return found


def curve(
    steps: Float[np.ndarray, "steps"], parameters: Sequence[float] | Float[np.ndarray, "5"]
) -> Float[np.ndarray, "steps"] | None:
    """The growth curve of predicted parameters; None where they are no curve.

    Its logarithm needs ``gamma t + t0 > 0`` at every step, and a curve that decays needs lambda >= 0.
    """
    numbers = np.asarray(parameters, dtype=np.float64)
    if not np.isfinite(numbers).all() or numbers[1] < 0 or (numbers[2] * steps + numbers[3] <= 0).any():
        return None
    values = growth(steps, numbers)
    return values if np.isfinite(values).all() else None


@dataclass(frozen=True)
class CurveScore:
    """How near one regressor's curves come to the fitted curves of models it has not seen.

    ``error``: median over the layers left out of ``|predicted - fitted| / |fitted|``, norms over the steps.
    ``baseline``: the same for the mean of the training curves. ``broken``: predictions that are no curve;
    they count as infinitely wrong. ``n``: layers.
    """

    regressor: str
    error: float
    baseline: float
    broken: int
    n: int


def score_curves(
    samples: Sequence[Sample], steps: Float[np.ndarray, "steps"], seed: int = 0
) -> list[CurveScore]:
    """Scores of every regressor on whole curves, each model predicted from all others.

    Raises:
        ValueError: there are fewer than ``FEWEST_MODELS`` models.
    """
    groups = {sample.architecture for sample in samples}
    if len(groups) < FEWEST_MODELS:
        raise ValueError(f"{len(groups)} models, and {FEWEST_MODELS} are the fewest that can be left out")
    errors: dict[str, list[float]] = {name: [] for name in REGRESSORS}
    baseline: list[float] = []
    for group in sorted(groups, key=lambda a: (a.layers, a.width, a.heads, a.d_ff)):
        training = [s for s in samples if s.architecture != group]
        out = [s for s in samples if s.architecture == group]
        truth = [growth(steps, np.array(s.parameters)) for s in out]
        mean = np.mean([growth(steps, np.array(s.parameters)) for s in training], axis=0)
        baseline += [_relative(mean, fitted) for fitted in truth]
        for name in REGRESSORS:
            found = _predicted(training, out, name, seed)
            errors[name] += [_relative(curve(steps, p), t) for p, t in zip(found, truth, strict=True)]
    return [
        CurveScore(
            name,
            float(np.median(each)),
            float(np.median(baseline)),
            int(np.isinf(each).sum()),
            len(each),
        )
        for name, each in errors.items()
    ]


def _relative(found: Float[np.ndarray, "steps"] | None, truth: Float[np.ndarray, "steps"]) -> float:
    if found is None:
        return float("inf")
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def _share(error: float, whole: float) -> float:
    """``1 - error / whole``; of nothing to explain, 1 if nothing is wrong and minus infinity otherwise."""
    if whole == 0:
        return 1.0 if error == 0 else float("-inf")
    return 1 - error / whole
