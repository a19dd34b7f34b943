"""The null: curves that are followed and jumps that are not, what a surrogate keeps, and the two answers."""

import numpy as np
import pytest
from latent_support import planted_series, saturation_curves, with_gaps
from threadpoolctl import threadpool_limits

from analyzers.latent import StateSettings
from analyzers.latent.null import MapShape, Null, Smooth, compare, map_shape, smooth, surrogate

STEPS = np.arange(0, 1000, 10)
LOG_STEPS = np.unique(np.concatenate([[0], 2 ** np.arange(12), np.arange(2000, 143000, 1600)]))
QUICK = StateSettings(surrogates=5, surrogate_restarts=3, surrogate_selections=0)


def as_runs(values, frames=None):
    frames = STEPS if frames is None else frames
    everything = np.concatenate(values)
    mean, spread = np.nanmean(everything, axis=0), np.nanstd(everything, axis=0)
    runs = {f"run{i:02}": (run - mean) / spread for i, run in enumerate(values)}
    return runs, {name: frames[: len(run)] for name, run in runs.items()}


def judged(values, k, settings=QUICK, frames=None):
    runs, steps = as_runs(values, frames)
    names = sorted(runs)
    heldout = names[::4] if len(names) > 1 else []
    return compare(runs, steps, [name for name in names if name not in heldout], heldout, k, settings)


def test_smooth_curves_are_followed_to_rounding():
    rank = np.linspace(0, 1, len(STEPS))
    # A time constant on the grid of those that are tried: geometric from 10 to 990 steps.
    tau = np.geomspace(10, 990, 24)[11]
    values = np.column_stack([3 - 2 * np.exp(-STEPS / tau), np.log1p(STEPS / tau) - rank, 5 * rank**5 - rank])
    assert np.abs(smooth(STEPS, values).residual).max() < 1e-9
    # Any other time constant is all but met, and a saturation in steps on a grid that is logarithmic too.
    for steps in (STEPS, LOG_STEPS):
        for share in (0.03, 0.1, 0.3, 1.0):
            curve = (1 - np.exp(-steps / (share * steps[-1])))[:, None]
            assert smooth(steps, curve).residual.std() < 0.02 * curve.std()


def test_a_jump_is_not_followed():
    jump = (STEPS >= 500).astype(float)[:, None]
    assert smooth(STEPS, jump).residual.std() > 0.2 * jump.std()
    steps = (np.arange(len(STEPS)) * 6 // len(STEPS) % 2).astype(float)[:, None]
    assert smooth(STEPS, steps).residual.std() > 0.4 * steps.std()


def test_short_metrics_have_fewer_parameters():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(len(STEPS), 4))
    for column, count in enumerate((2, 6, 0, 9)):
        values[count:, column] = np.nan
    found = smooth(STEPS, values)
    assert found.curve[:2, 0] == pytest.approx(np.full(2, values[:2, 0].mean()))
    line = np.polyval(np.polyfit(np.arange(6), values[:6, 1], 1), np.arange(6))
    assert found.curve[:6, 1] == pytest.approx(line)
    assert np.isnan(found.curve[:, 2]).all()
    assert (np.isnan(found.curve) == np.isnan(values)).all()
    # Three parameters leave six of nine values free.
    assert found.residual[:9, 3].std() > 0


def test_a_surrogate_permutes_whole_frames_of_noise():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(100, 3))
    drawn = surrogate(Smooth(np.zeros((100, 3)), noise), np.random.default_rng(1))
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, noise))
    assert (drawn != noise).any()


def test_a_surrogate_keeps_curve_and_gaps_and_draws_noise_of_the_same_metric():
    rng = np.random.default_rng(0)
    values = with_gaps(rng, np.column_stack([np.arange(100.0), 1000 + np.arange(100.0)]))
    run = Smooth(values.round(-3), values - values.round(-3))
    drawn = surrogate(run, np.random.default_rng(1))
    assert (np.isnan(drawn) == np.isnan(values)).all()
    for column in range(2):
        there = ~np.isnan(values[:, column])
        left = set(np.round(run.residual[there, column], 9))
        assert set(np.round(drawn[there, column] - run.curve[there, column], 9)) <= left


def test_forty_phase_free_curves_are_explained_by_surrogates():
    for seed in range(3):
        null = judged(saturation_curves(seed), 6)
        assert null.explained
        assert null.heldout
        # No surrogate is told from the observed runs by more than a few hundredths of a nat per value.
        assert abs(null.gap) < 0.02 * 14


def test_phase_free_curves_on_a_logarithmic_grid_and_with_gaps_are_explained():
    rng = np.random.default_rng(0)
    values = [with_gaps(rng, run, 0.2) for run in saturation_curves(0, runs=16, steps=LOG_STEPS)]
    assert judged(values, 5, frames=LOG_STEPS).explained


def test_planted_states_are_not_explained():
    for seed in range(2):
        null = judged(planted_series(seed, runs=20)[0], 6)
        assert null.explained is False
        assert null.gap > 1
        assert null.loglik > max(null.surrogates)
        assert null.same_map == 0
        # Observed: six states, a fork, a detour; nothing is re-entered.
        assert (null.shape.linear, null.shape.returning) == (False, 0)
        assert null.shape.forks > 0


def test_planted_states_with_gaps_are_not_explained():
    rng = np.random.default_rng(0)
    assert judged([with_gaps(rng, run, 0.2) for run in planted_series(runs=20)[0]], 6).explained is False


def test_order_of_runs_and_threads_change_nothing_and_a_seed_repeats_it():
    values = planted_series(runs=8, frames=40, d=4)[0]
    runs, steps = as_runs(values)
    train, heldout = ["run00", "run02", "run03", "run05", "run06", "run07"], ["run01", "run04"]
    settings = QUICK.model_copy(update={"surrogate_selections": 1, "k_max": 3})
    first = compare(runs, steps, train, heldout, 3, settings)
    turned = {name: runs[name] for name in reversed(runs)}
    with threadpool_limits(2):
        again = compare(turned, steps, train[::-1], heldout[::-1], 3, settings)
    assert again == first
    other = compare(runs, steps, train, heldout, 3, settings.model_copy(update={"seed": 1}))
    assert other.surrogates != first.surrogates


@pytest.mark.parametrize("k", [1, 4, 8])
def test_one_run_of_twenty_checkpoints_says_what_it_cannot_support(k):
    run = np.cumsum(np.random.default_rng(0).normal(size=(20, 3)), axis=0)
    null = judged([run], k, QUICK.model_copy(update={"surrogate_selections": 1, "k_max": 12}))
    assert not null.heldout
    notes = " ".join(null.notes)
    assert "the gap is on the run that was fitted" in notes
    assert ("fewer than 10 each" in notes) == (k > 2)


def test_two_surrogates_are_too_few_to_answer():
    null = judged(
        saturation_curves(0, runs=4, d=3),
        3,
        QUICK.model_copy(update={"surrogates": 2, "surrogate_restarts": 2}),
    )
    assert null.gap is not None
    assert null.explained is None
    with pytest.raises(ValueError, match="at least one surrogate"):
        judged(saturation_curves(0, runs=4, d=3), 3, QUICK.model_copy(update={"surrogates": 0}))


def test_the_shape_of_a_map():
    paths = {"a": [0, 0, 1, 2], "b": [0, 1, 1, 2], "c": [0, 2, 2, 2], "d": [0, 1, 2, 1]}
    seen = {name: np.ones(4, dtype=bool) for name in paths}
    shape = map_shape({name: np.array(path) for name, path in paths.items()}, seen)
    assert shape.edges == {(0, 1), (1, 2), (0, 2), (2, 1)}
    assert (shape.forks, shape.returning, shape.usual, shape.linear) == (1, 1, 2, False)
    linear = map_shape({name: np.array([0, 1, 1, 2]) for name in paths}, seen)
    assert (linear.forks, linear.returning, linear.usual, linear.linear) == (0, 0, 4, True)
    # What no value was seen of is passed over.
    hidden = {name: np.array([True, True, True, name != "d"]) for name in paths}
    shape = map_shape({name: np.array(path) for name, path in paths.items()}, hidden)
    assert shape.returning == 0


@pytest.mark.parametrize(
    ("loglik", "explained"),
    # Surrogates: mean -10, standard deviation 1, highest -9; ten values: 0.2 nats count for nothing.
    [(-11.0, True), (-9.0, True), (-8.9, None), (-6.1, None), (-5.9, False)],
)
def test_what_lies_between_the_answers_is_open(loglik, explained):
    shape = MapShape(frozenset(), 0, 0, 1)
    null = Null(2, True, loglik, (-11.0, -10.0, -9.0), 10.0, shape, (shape,) * 3, None, (), 0, ())
    assert (null.gap, null.spread) == pytest.approx((loglik + 10, 1.0))
    assert null.explained is explained
    # All surrogates within a hair: a gap that is too small to mean anything is none, however sure it is.
    sure = Null(2, True, loglik, (loglik - 0.1,) * 3, 10.0, shape, (shape,) * 3, None, (), 0, ())
    assert sure.explained is True
