"""The predictor: planted relations across simulated models, no sight of the model left out, no luck."""

import numpy as np
import pytest

from analyzers import predictor
from analyzers.growth import growth
from analyzers.predictor import (
    REGRESSORS,
    Architecture,
    Sample,
    Score,
    curve,
    features,
    leave_one_model_out,
    predict,
    score_curves,
    usable,
)

MODELS = [
    Architecture(4, 128, 4, 512),
    Architecture(4, 512, 8, 2048),
    Architecture(8, 768, 12, 3072),
    Architecture(12, 1024, 16, 4096),
    Architecture(6, 2048, 8, 8192),
    Architecture(10, 2560, 32, 10_240),
]


def planted(rng: np.random.Generator, noise: float = 0.05) -> list[Sample]:
    """log1p of A, lambda, gamma and t0, and K itself, linear in l/L and its square."""
    samples = []
    for model in MODELS:
        for layer in range(model.layers):
            depth = (layer + 1) / model.layers
            logs = [
                4 + 2 * depth,
                0.3 - 0.2 * depth,
                0.01 + 0.02 * depth**2,
                1 + depth,
            ] * (1 + noise * rng.standard_normal(4))
            k = (50 - 30 * depth) * (1 + noise * rng.standard_normal())
            samples.append(Sample(model, layer, (*np.expm1(logs).tolist(), float(k))))
    return samples


def by_name(scores: list[Score]) -> dict[tuple[str, str], Score]:
    return {(score.parameter, score.regressor): score for score in scores}


def test_planted_linear_relation_is_found() -> None:
    scores = by_name(leave_one_model_out(planted(np.random.default_rng(0))))
    assert len(scores) == 5 * 4
    for parameter in ("A", "lambda", "gamma", "t0", "K"):
        for regressor in REGRESSORS:
            score = scores[parameter, regressor]
            assert score.r2 > 0.6, score
            assert score.skill > 0.6, score


def test_what_does_not_depend_on_sizes_is_not_predicted() -> None:
    """A value of its own per model, the same in all its layers: a random split over layers would find it."""
    rng = np.random.default_rng(1)
    samples = []
    for model in MODELS:
        own = tuple(np.exp(rng.standard_normal(5)).tolist())
        samples += [Sample(model, layer, own) for layer in range(model.layers)]
    assert np.mean([score.skill for score in leave_one_model_out(samples)]) <= 0


def test_random_labels_are_not_predicted() -> None:
    rng = np.random.default_rng(2)
    samples = [
        Sample(model, layer, tuple(np.exp(rng.standard_normal(5)).tolist()))
        for model in MODELS
        for layer in range(model.layers)
    ]
    scores = leave_one_model_out(samples)
    for score in scores:
        assert score.r2 <= 0.05, score
    assert np.mean([score.r2 for score in scores]) < 0
    assert np.mean([score.skill for score in scores]) < 0


def test_the_model_left_out_is_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fit gets the rows of all models but one; equal architectures leave together."""
    seen = []

    class Watcher:
        def fit(self, x: np.ndarray, y: np.ndarray) -> "Watcher":
            self.x = x
            return self

        def predict(self, x: np.ndarray) -> np.ndarray:
            seen.append((self.x, x))
            return np.zeros(len(x))

    monkeypatch.setattr(predictor, "REGRESSORS", {"watcher": lambda seed: Watcher()})
    samples = planted(np.random.default_rng(0))
    twin = [Sample(s.architecture, s.layer, s.parameters) for s in samples if s.architecture == MODELS[0]]
    leave_one_model_out([*samples, *twin])
    assert len(seen) == 5 * len(MODELS)
    for training, out in seen:
        # heads/d, d_ff/d, d/L, heads/L and ln d: the same for all layers of a model, and for no other model.
        sizes = {tuple(row) for row in out[:, 4:9]}
        assert len(sizes) == 1
        assert not sizes & {tuple(row) for row in training[:, 4:9]}
        assert len(training) + len(out) == len(samples) + len(twin)


def test_labels_of_the_model_left_out_change_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[np.ndarray] = []

    class Recorder:
        def fit(self, x: np.ndarray, y: np.ndarray) -> "Recorder":
            made.append(y)
            return self

        def predict(self, x: np.ndarray) -> np.ndarray:
            return np.zeros(len(x))

    monkeypatch.setattr(predictor, "REGRESSORS", {"recorder": lambda seed: Recorder()})
    samples = planted(np.random.default_rng(0))
    leave_one_model_out(samples)
    before, made = made, []
    changed = [
        Sample(s.architecture, s.layer, (9.0, 9.0, 9.0, 9.0, 9.0)) if s.architecture == MODELS[0] else s
        for s in samples
    ]
    leave_one_model_out(changed)
    # The first group in order of size is MODELS[0]: its folds come first for every parameter.
    for fold in range(0, len(before), len(MODELS)):
        assert np.array_equal(before[fold], made[fold])
        assert not np.array_equal(before[fold + 1], made[fold + 1])


def test_scores_of_the_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the training models has skill 0 and an R2 below 0."""

    class Mean:
        def fit(self, x: np.ndarray, y: np.ndarray) -> "Mean":
            self.mean = y.mean()
            return self

        def predict(self, x: np.ndarray) -> np.ndarray:
            return np.full(len(x), self.mean)

    monkeypatch.setattr(predictor, "REGRESSORS", {"mean": lambda seed: Mean()})
    for score in leave_one_model_out(planted(np.random.default_rng(0))):
        assert score.skill == pytest.approx(0)
        assert score.r2 <= 0


def test_features_by_hand() -> None:
    row = features([Sample(Architecture(8, 64, 4, 256), 1, (1.0, 1.0, 1.0, 1.0, 1.0))])[0]
    expected = [0.25, 0.0625, 0.015625, 0.5, 4 / 64, 4, 8, 0.5, np.log(64), 16]
    assert row == pytest.approx(expected)


def test_too_few_models_and_bad_parameters() -> None:
    samples = planted(np.random.default_rng(0))
    two = [s for s in samples if s.architecture in MODELS[:2]]
    with pytest.raises(ValueError, match="2 models, and 3 are the fewest"):
        leave_one_model_out(two)
    bad = [*samples, Sample(MODELS[0], 0, (-2.0, 1.0, 1.0, 1.0, 1.0))]
    with pytest.raises(ValueError, match="its logarithm has no value"):
        leave_one_model_out(bad)
    assert usable((1.0, 1.0, 1.0, 1.0, -5.0))
    assert not usable((1.0, 1.0, 1.0, float("nan"), 1.0))
    assert not usable((1.0, 1.0, 1.0))


def test_predicted_curves_are_those_that_were_planted() -> None:
    steps = np.array([0.0, 1, 10, 100, 1000, 10_000])
    samples = planted(np.random.default_rng(0), noise=0)
    wanted = Architecture(9, 900, 12, 3600)
    found = predict(samples, wanted)
    assert found.shape == (9, 5)
    for layer, parameters in enumerate(found):
        depth = (layer + 1) / 9
        logs = np.array([4 + 2 * depth, 0.3 - 0.2 * depth, 0.01 + 0.02 * depth**2, 1 + depth])
        true = growth(steps, np.array([*np.expm1(logs), 50 - 30 * depth]))
        shown = curve(steps, parameters)
        assert shown is not None
        assert np.linalg.norm(shown - true) < 0.1 * np.linalg.norm(true)
    scores = {score.regressor: score for score in score_curves(samples, steps)}
    assert set(scores) == set(REGRESSORS)
    assert scores["Ridge"].error < 0.1 < scores["Ridge"].baseline
    assert (scores["Ridge"].n, scores["Ridge"].broken) == (len(samples), 0)


def test_what_is_no_curve_is_none() -> None:
    steps = np.array([0.0, 10.0])
    good = np.array([2.0, 0.1, 0.5, 1.0, 5.0])
    assert curve(steps, good) == pytest.approx(growth(steps, good))
    for place, value in ((1, -0.1), (3, 0.0), (2, -1.0), (0, np.nan)):
        broken = good.copy()
        broken[place] = value
        assert curve(steps, broken) is None


def test_curves_need_models_and_a_known_regressor() -> None:
    samples = planted(np.random.default_rng(0))
    few = [sample for sample in samples if sample.architecture in MODELS[:2]]
    for refuse in (lambda: predict(few, MODELS[0]), lambda: score_curves(few, np.ones(2))):
        with pytest.raises(ValueError, match="2 models, and 3 are the fewest"):
            refuse()
    with pytest.raises(ValueError, match="no regressor 'Best'"):
        predict(samples, MODELS[0], "Best")
