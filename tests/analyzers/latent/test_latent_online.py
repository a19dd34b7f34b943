"""Online use: the filter step by step is the batch filter, knows nothing of later checkpoints, and flags."""

import numpy as np
import pytest
from latent_support import planted_series, random_model, with_gaps

from analyzers.latent import Parameters, Scaler, Trajectories, filter_runs, fit_states, from_long, sample
from analyzers.latent.hmm import log_predicted
from analyzers.latent.online import FEWEST, OnlineModel, TrainingFrames
from analyzers.latent.settings import StateSettings

CASES = [(c, t) for c in ("diag", "full") for t in ("ergodic", "left-to-right")]


def online_of(parameters, train, *, grid="own", grid_steps=(0,), transforms=None, scaler=None):
    d = parameters.means.shape[1]
    names = tuple(f"m{i}" for i in range(d))
    scaler = scaler or Scaler("train", names, np.zeros(d), np.ones(d))
    training = TrainingFrames.of(parameters, train)
    return OnlineModel(
        parameters, scaler, transforms or {}, training, grid=grid, grid_steps=np.array(grid_steps)
    )


def readings(model, steps, values):
    belief, found = None, []
    for step, frame in zip(steps, model.frames(np.asarray(values)), strict=True):
        if not np.isnan(frame).all():
            found.append(model.step(belief, step, frame))
            belief = found[-1].belief
    return found


@pytest.mark.parametrize(("covariance", "topology"), CASES)
@pytest.mark.parametrize("gaps", [False, True])
def test_step_by_step_is_the_batch_filter_at_every_prefix(covariance, topology, gaps):
    rng = np.random.default_rng(3)
    parameters = random_model(rng, 4, 5, covariance, topology)
    run = sample(parameters, 30, rng)[1]
    run = with_gaps(rng, run) if gaps else run
    seen = ~np.isnan(run).all(axis=1)
    model = online_of(parameters, [run], grid="union", grid_steps=np.arange(30))
    found = readings(model, range(30), run)
    for length in (1, 7, 30):
        batch = filter_runs(parameters, [run[:length]])[0]
        mine = found[: seen[:length].sum()]
        posterior = np.exp([each.belief.log_posterior for each in mine])
        np.testing.assert_allclose(posterior, batch.posterior[seen[:length]], rtol=0, atol=1e-12)
        surprise = [each.surprise for each in mine]
        np.testing.assert_allclose(surprise, batch.surprise[seen[:length]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_a_surprise_is_the_difference_of_two_of_hmmlearns_scores(covariance):
    rng = np.random.default_rng(4)
    parameters = random_model(rng, 3, 4, covariance)
    run = sample(parameters, 12, rng)[1]
    theirs = parameters.to_hmmlearn()
    scores = [0.0, *(theirs.score(run[: t + 1]) for t in range(len(run)))]
    found = readings(online_of(parameters, [run]), range(len(run)), run)
    np.testing.assert_allclose([each.surprise for each in found], -np.diff(scores), rtol=1e-9, atol=1e-9)
    assert [each.state for each in found] == [
        theirs.predict_proba(run[: t + 1])[-1].argmax() for t in range(12)
    ]


def test_later_checkpoints_change_no_earlier_reading_to_the_last_bit():
    rng = np.random.default_rng(5)
    parameters = random_model(rng, 3, 4)
    run = np.exp(sample(parameters, 20, rng)[1])
    transforms = {"m0": "log", "m1": "difference", "m2": "symlog"}
    model = online_of(parameters, [run], transforms=transforms)
    whole = readings(model, range(20), run)
    for length in (1, 2, 11):
        part = readings(model, range(length), run[:length])
        for mine, its in zip(part, whole, strict=False):
            assert (mine.surprise, mine.flags, mine.parts) == (its.surprise, its.flags, its.parts)
            assert (mine.belief.log_posterior == its.belief.log_posterior).all()


def test_transforms_are_those_of_the_fit():
    rng = np.random.default_rng(6)
    values = np.exp(rng.normal(size=(10, 3)))
    values[4, 1] = -2.0
    rows = [
        {"run": "a", "step": t, "name": f"m{i}", "value": values[t, i]} for t in range(10) for i in range(3)
    ]
    transforms = {"m0": "log", "m1": "symlog", "m2": "difference"}
    expected = from_long(rows, transforms)
    parameters = random_model(rng, 2, 3)
    model = online_of(parameters, [values], transforms=transforms)
    np.testing.assert_array_equal(model.frames(values), expected.values[0])
    # What has no logarithm is missing, and so is what is infinite.
    odd = np.array([[0.0, np.inf, 1.0], [1.0, 0.0, np.nan]])
    np.testing.assert_array_equal(model.frames(odd), [[np.nan] * 3, [0.0, 0.0, np.nan]])


@pytest.mark.parametrize(("grid", "gaps"), [("own", (0, 0, 0)), ("union", (0, 2, 0)), ("common", (0, 2, 0))])
def test_a_missing_checkpoint_is_bridged_as_on_the_grid_of_the_fit(grid, gaps):
    """Steps 0, 10, 40 and 55 of a run; the grid is 0, 10, .. 40: two of its steps are missing."""
    rng = np.random.default_rng(7)
    parameters = random_model(rng, 3, 2)
    run = sample(parameters, 4, rng)[1]
    model = online_of(parameters, [run], grid=grid, grid_steps=range(0, 50, 10))
    found = readings(model, (0, 10, 40, 55), run)
    blank = np.full((1, 2), np.nan)
    parts = [run[:1], *(np.concatenate([*[blank] * gap, run[t : t + 1]]) for t, gap in enumerate(gaps, 1))]
    batch = filter_runs(parameters, [np.concatenate(parts)])[0]
    np.testing.assert_allclose(
        [each.surprise for each in found], batch.surprise[np.cumsum([1, *(gap + 1 for gap in gaps)]) - 1]
    )


def test_on_a_common_grid_other_checkpoints_are_no_frames():
    rng = np.random.default_rng(8)
    parameters = random_model(rng, 2, 2)
    steps = np.array([0, 5, 10, 15, 25])
    values = sample(parameters, 5, rng)[1]
    common = online_of(parameters, [values], grid="common", grid_steps=(0, 10, 20))
    assert common.on_grid(steps).tolist() == [True, False, True, False, True]
    union = online_of(parameters, [values], grid="union", grid_steps=(0, 10, 20))
    assert union.on_grid(steps).all()


def test_what_cannot_be_read_is_refused():
    rng = np.random.default_rng(9)
    parameters = random_model(rng, 2, 2)
    run = sample(parameters, 5, rng)[1]
    model = online_of(parameters, [run])
    first = model.step(None, 3, run[0])
    with pytest.raises(ValueError, match="step 3 does not lie after step 3"):
        model.step(first.belief, 3, run[1])
    with pytest.raises(ValueError, match="step 4 has no value"):
        model.step(first.belief, 4, np.full(2, np.nan))
    with pytest.raises(ValueError, match=r"per-run.*cannot be used online"):
        online_of(parameters, [run], scaler=Scaler("per-run", ("m0", "m1")))


def test_expected_states_are_the_transitions_of_the_filter():
    rng = np.random.default_rng(10)
    parameters = random_model(rng, 3, 2)
    runs = [with_gaps(rng, sample(parameters, length, rng)[1]) for length in (7, 4)]
    for found, filtered in zip(log_predicted(parameters, runs), filter_runs(parameters, runs), strict=True):
        np.testing.assert_allclose(np.exp(found[0]), parameters.start)
        np.testing.assert_allclose(np.exp(found[1:]), filtered.posterior[:-1] @ parameters.transition)


def by_hand():
    """Two states in one metric and one that says nothing, means 0 and 10, unit variance."""
    parameters = Parameters(
        np.array([1.0, 0.0]),
        np.array([[0.99, 0.01], [0.0, 1.0]]),
        np.array([[0.0, 0.0], [10.0, 0.0]]),
        np.ones((2, 2)),
    )
    rng = np.random.default_rng(11)
    runs = [np.column_stack([10.0 * (np.arange(40) >= 20), np.zeros(40)]) for _ in range(5)]
    return parameters, [run + rng.normal(size=run.shape).clip(-2, 2) for run in runs]


def test_the_surprise_of_a_training_frame_has_its_own_percentile():
    parameters, runs = by_hand()
    model = online_of(parameters, runs)
    found = [each for run in runs for each in readings(model, range(40), run)]
    surprises = np.array([each.surprise for each in found])
    expected = [100 * (surprises <= each).mean() for each in surprises]
    np.testing.assert_allclose([each.percentile for each in found], expected)
    assert {each.compared for each in found} == {200}
    # 200 frames: nothing that was seen is above the quantile .999.
    assert not any(each.flags for each in found)


def test_what_no_state_explains_is_new_and_what_the_past_forbids_is_unexpected():
    parameters, runs = by_hand()
    model = online_of(parameters, runs)
    usual = readings(model, range(4), np.array([[0.5, 0.1], [10.2, 0.0], [9.5, -0.5], [10.0, 0.4]]))
    assert [each.state for each in usual] == [0, 1, 1, 1]
    assert not any(each.flags for each in usual)
    between = readings(model, range(2), np.array([[0.5, 0.1], [5.0, 0.0]]))[1]
    assert between.flags == ("new",)
    assert between.percentile == 100.0
    assert abs(between.parts[0].z) == pytest.approx(5.0)
    assert between.parts[0].metric == "m0"
    # Back to the first state, which the model never leaves the second for.
    back = readings(model, range(2), np.array([[0.0, 0.0], [10.0, 0.0]]))[1]
    again = model.step(back.belief, 2, np.array([0.0, 0.0]))
    # The first state explains it, and only a path that never left it leads there: its frame before was then
    # ten deviations (50 nats) off. Such a path has .99 * .99, one that stays in the second state .01.
    assert (again.state, again.flags) == (0, ("unexpected",))
    assert again.surprise - again.misfit == pytest.approx(50 - np.log(0.9801 + 0.01) + np.log(0.01))


def test_a_frame_with_gaps_is_compared_with_the_same_metrics_of_the_training_frames():
    parameters, runs = by_hand()
    runs[0][:, 1] = np.nan
    model = online_of(parameters, runs)
    whole = model.step(None, 0, np.array([0.3, 0.2]))
    half = model.step(None, 0, np.array([0.3, np.nan]))
    assert (whole.compared, half.compared) == (160, 200)
    assert half.missing == ("m1",)
    # One metric of unit variance: its own density, whatever the other one is like.
    assert half.surprise == pytest.approx(0.5 * np.log(2 * np.pi) + 0.045)
    # Nothing to compare with: no percentile and no flag.
    few = online_of(parameters, [run[: FEWEST // 5 - 1] for run in runs])
    strange = few.step(None, 0, np.array([500.0, 0.0]))
    assert strange.compared < FEWEST
    assert strange.flags == ()
    none = [np.column_stack([run[:, 0], np.full(40, np.nan)]) for run in runs]
    assert online_of(parameters, none).step(None, 0, np.array([0.0, 0.0])).percentile is None


def test_parts_are_deviations_from_the_state_in_natural_units():
    parameters = Parameters(np.ones(1), np.ones((1, 1)), np.array([[1.0, -1.0]]), np.array([[4.0, 0.25]]))
    scaler = Scaler("train", ("m0", "m1"), np.array([2.0, 5.0]), np.array([0.5, 10.0]))
    model = online_of(parameters, [np.zeros((30, 2))], scaler=scaler, transforms={"m0": "log"})
    values = np.array([[np.exp(3.0), 5.0]])
    (reading,) = readings(model, [0], values)
    first, second = reading.parts
    assert (first.metric, second.metric) == ("m1", "m0")
    assert first.z == pytest.approx(2.0)
    assert (first.value, first.mean) == (pytest.approx(5.0), pytest.approx(-5.0))
    assert second.z == pytest.approx(0.5)
    assert (second.value, second.mean) == (pytest.approx(np.exp(3.0)), pytest.approx(np.exp(2.5)))


@pytest.fixture(scope="module")
def planted():
    """A fit to 20 planted runs, and 20 fresh runs of the same kind."""
    values, _ = planted_series(runs=40, frames=50)
    names = tuple(f"m{i}" for i in range(14))
    trajectories = Trajectories(
        tuple(f"run{i:02}" for i in range(20)),
        tuple(np.arange(50) for _ in range(20)),
        tuple(values[:20]),
        names,
    )
    settings = StateSettings(k_max=6, restarts=6, folds=0, bootstraps=0, rule="bic", heldout_fraction=0.05)
    fit = fit_states(trajectories, settings)
    assert fit.k == 6
    train = [fit.scaled()[run] for run in fit.train_runs]
    model = OnlineModel(
        fit.parameters,
        fit.scaler,
        {},
        TrainingFrames.of(fit.parameters, train),
        grid="union",
        grid_steps=np.arange(50),
    )
    return model, values[20:]


def test_normal_runs_are_flagged_at_about_the_stated_rate(planted):
    model, fresh = planted
    found = [each for run in fresh for each in readings(model, range(50), run)]
    share = np.mean([bool(each.flags) for each in found])
    # Stated: .001 of the training frames. Fresh ones are a little less likely under what was fitted.
    assert share <= 0.01
    assert np.mean([each.percentile for each in found]) == pytest.approx(50, abs=5)


def test_a_planted_anomaly_is_flagged_and_named(planted):
    model, fresh = planted
    rng = np.random.default_rng(12)
    for run in fresh[:10]:
        strange = run.copy()
        metric = int(rng.integers(14))
        strange[30, metric] += 8.0 * run[:, metric].std()
        found = readings(model, range(50), strange)
        assert found[30].flags == ("new",)
        assert found[30].parts[0].metric == f"m{metric}"
        assert sum(bool(each.flags) for each in found) <= 2
