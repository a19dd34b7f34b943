"""The number of states: planted structure, criteria by hand, named rules, and what is said aloud."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from latent_support import planted_runs, planted_series, random_model
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from analyzers.latent import (
    Candidate,
    Parameters,
    StateSettings,
    Trajectories,
    choose,
    decode_runs,
    fit_restarts,
    fit_states,
    sample,
    score,
)
from analyzers.latent.outcomes import bag_of_states, regress
from analyzers.latent.selection import candidate, heldout_loglik

QUICK = StateSettings(k_max=4, restarts=6, folds=3, fold_restarts=3, bootstraps=4)
MODEL = Parameters(np.ones(1), np.ones((1, 1)), np.zeros((1, 1)), np.ones((1, 1)))


def as_trajectories(values):
    return Trajectories(
        tuple(f"run{i:02}" for i in range(len(values))),
        tuple(np.arange(len(run)) for run in values),
        tuple(values),
        tuple(f"m{i:02}" for i in range(values[0].shape[1])),
    )


def without(values, what):
    rng = np.random.default_rng(1)
    shape = {"frames": (1,), "values": (values[0].shape[1],)}[what]
    return [np.where(rng.uniform(size=(len(run), *shape)) < 0.2, np.nan, run) for run in values]


def recovered(values, truth, settings):
    fit = fit_states(as_trajectories(values), settings)
    path = np.concatenate([run.state for run in fit.runs])
    return fit, adjusted_rand_score(np.concatenate(truth), path)


@pytest.mark.parametrize(("what", "least"), [(None, 0.95), ("frames", 0.9), ("values", 0.9)])
def test_forks_and_a_detour_are_found_in_a_small_series(what, least):
    values, truth = planted_series(runs=20, frames=50)
    settings = StateSettings(k_max=7, folds=0, bootstraps=0)
    fit, ari = recovered(without(values, what) if what else values, truth, settings)
    assert fit.k == 6
    assert ari > least
    assert not any("cap" in note for note in fit.notes)
    assert_detour_is_named(fit, truth)


def assert_detour_is_named(fit, truth):
    """The planted detour is state 4; the planted outcome is 10 later in the runs that take it."""
    numbers = np.concatenate([run.state for run in fit.runs])
    detour = np.bincount(numbers[np.concatenate(truth) == 4], minlength=6).argmax()
    noise = np.random.default_rng(2).normal(size=len(truth))
    outcome = {
        run.run: 30.0 + 10 * (path == 4).any() + each
        for run, path, each in zip(fit.runs, truth, noise, strict=True)
    }
    shares = {run.run: bag_of_states(run.state, 6) for run in fit.runs}
    found = {each.state: each for each in regress(outcome, shares).coefficients if each.detour}
    assert detour in found
    assert found[detour].p_later < 0.05
    assert found[detour].p_later == min(each.p_later for each in found.values())
    visiting = {run.run for run, path in zip(fit.runs, truth, strict=True) if (path == 4).any()}
    assert set(found[detour].with_state) == visiting


@pytest.mark.long
@pytest.mark.timeout(900)  # a CPU minute each
@pytest.mark.parametrize(("what", "least"), [(None, 0.95), ("frames", 0.9), ("values", 0.9)])
def test_forks_and_a_detour_are_found(what, least):
    values, truth = planted_series()
    fit, ari = recovered(without(values, what) if what else values, truth, StateSettings(k_max=12))
    assert fit.k == 6
    assert ari > least
    chosen = fit.candidates[5]
    assert chosen.ari > 0.99
    assert chosen.bootstrap_ari > 0.99
    if what is None:
        edges = {(edge.from_state, edge.to_state) for edge in fit.transitions}
        order = [
            fit.runs[0].state[np.flatnonzero(truth[0] == 0)[0]],
            *(fit.runs[run].state[np.flatnonzero(truth[run] == state)[0]] for run, state in [(0, 1), (1, 2)]),
            *(fit.runs[3].state[np.flatnonzero(truth[3] == state)[0]] for state in (3, 4, 5)),
        ]
        planted = {(0, 1), (0, 2), (1, 3), (2, 3), (3, 4), (4, 5), (3, 5)}
        assert edges == {(order[left], order[entered]) for left, entered in planted}
    assert_detour_is_named(fit, truth)


def test_criteria_by_hand():
    values, _ = planted_runs(runs=4, frames=20, noise=2.0)
    values[0][3] = np.nan
    train, held = values[:3], values[3:]
    found = candidate(3, train, held, QUICK)
    n, p = sum(map(len, train)) - 1, found.parameters.free
    assert found.loglik == pytest.approx(score(found.parameters, train))
    assert found.aic == pytest.approx(-2 * found.loglik + 2 * p)
    assert found.bic == pytest.approx(-2 * found.loglik + p * math.log(n))
    joint = sum(each.log_joint for each in decode_runs(found.parameters, train))
    assert found.icl == pytest.approx(-2 * joint + p * math.log(n))
    # The path is one of many: its probability is less than that of all.
    assert found.icl > found.bic


def test_the_heldout_likelihood_is_that_of_fits_without_the_run():
    values, _ = planted_runs(runs=3, frames=20)
    settings = QUICK.model_copy(update={"folds": 5})
    expected = 0.0
    for left in range(3):
        others = [run for i, run in enumerate(values) if i != left]
        done, _ = fit_restarts(others, 2, restarts=3, seed=0)
        expected += score(done[0].parameters, [values[left]])
    assert heldout_loglik(2, values, settings) == pytest.approx(expected)
    assert heldout_loglik(2, values[:1], settings) is None
    assert heldout_loglik(2, values, settings.model_copy(update={"folds": 1})) is None
    # A metric of one run alone: the others cannot be fitted to it.
    lone = [np.column_stack([run, np.full(len(run), np.nan if i else 1.0)]) for i, run in enumerate(values)]
    assert heldout_loglik(2, lone, settings) is None


def test_the_bootstrap_tells_states_of_all_runs_from_states_of_one():
    values, _ = planted_runs(runs=6, frames=30)
    sure = candidate(4, values, [], QUICK)
    assert sure.bootstrap_ari > 0.95
    assert sure.bootstrap_refits == 4
    # A fifth state that one run alone visits dies in a resample without that run.
    lone = [*values[:-1], np.concatenate([values[-1], 30 + np.random.default_rng(0).normal(size=(10, 5))])]
    found = candidate(5, lone, [], QUICK.model_copy(update={"bootstraps": 12}))
    assert 0 < found.bootstrap_refits < 12
    alone = candidate(2, values[:1], [], QUICK)
    assert (alone.bootstrap_ari, alone.bootstrap_refits, alone.refits) == (None, None, ())


def candidates(*rows):
    """Candidates of K = 1, 2, ... from (bic, ari, held-out BIC, held-out log-likelihood)."""
    return [
        Candidate(k, -1.0, bic, bic - 1, bic + k, held, heldout, ari, parameters=MODEL, converged=True)
        for k, (bic, ari, held, heldout) in enumerate(rows, 1)
    ]


ROWS = candidates(
    (100.0, 1.0, 60.0, -90.0),
    (90.0, 0.95, 50.0, -80.0),
    (80.0, 0.60, 55.0, -70.0),
    (70.0, 0.92, 58.0, -60.0),
    (75.0, 1.00, 70.0, -65.0),
    (60.0, 0.50, 80.0, -55.0),
    (99.0, 1.00, 90.0, -75.0),
)


@pytest.mark.parametrize(
    ("rule", "k"), [("agreement", 4), ("paper", 2), ("bic", 6), ("aic", 6), ("icl", 6), ("heldout", 6)]
)
def test_rules_by_hand(rule, k):
    # By agreement: 5 agrees but its BIC is above that of 4; 6 has the lowest BIC but does not agree.
    choice = choose(ROWS, StateSettings(rule=rule), one_run=False)
    assert choice.candidate.k == k


def test_what_the_rule_passed_over_is_said():
    (note,) = choose(ROWS, StateSettings(), one_run=False).notes
    assert note.startswith("BIC is lowest at K = 6, but the adjusted Rand index of its best restarts")
    assert "is 0.50" in note
    cut = choose(ROWS[:6], StateSettings(), one_run=False)
    assert cut.candidate.k == 4
    assert cut.notes[1].startswith("cap reached: BIC still improves at K = 6, the largest tried")
    capped = choose(ROWS[:4], StateSettings(), one_run=False)
    assert capped.notes == (
        "cap reached: K = 4 is the cap, no larger K was tried, so the cap may have chosen K",
    )


def test_a_rule_without_values_falls_back_to_bic_and_says_so():
    unknown = [replace(each, ari=None, heldout=None) for each in ROWS]
    for rule, note in [
        ("agreement", "the agreement of restarts is not known"),
        ("paper", "the rule paper has no"),
    ]:
        choice = choose(unknown, StateSettings(rule=rule), one_run=False)
        assert choice.candidate.k == 6
        assert choice.notes[0].startswith(note)
    # With one run the fit itself says why nothing was held out.
    assert choose(unknown, StateSettings(rule="paper"), one_run=True).notes == ()


def test_failed_numbers_of_states_are_never_chosen():
    rows = [Candidate(1, failures=("planted",)), replace(ROWS[1], ari=None), replace(ROWS[2], ari=1.0)]
    assert choose(rows, StateSettings(), one_run=False).candidate.k == 3
    with pytest.raises(RuntimeError, match="no restart succeeded: planted"):
        choose(rows[:1], StateSettings(), one_run=False)


@pytest.mark.parametrize("rule", ["agreement", "paper", "heldout"])
def test_twelve_states_on_one_run_of_twenty_checkpoints(rule):
    rng = np.random.default_rng(0)
    run = np.cumsum(rng.normal(size=(20, 3)), axis=0)
    fit = fit_states(as_trajectories([run]), StateSettings(k_max=12, restarts=8, rule=rule))
    assert fit.k <= 10
    assert len(fit.candidates) == 10
    assert "K was limited to 10 instead of 12: the training runs have 20 frames" in fit.notes
    assert any(note.startswith("one run only: no held-out run") for note in fit.notes)
    for each in fit.candidates:
        assert (each.heldout, each.heldout_loglik, each.bootstrap_ari) == (None, None, None)


def test_threads_do_not_change_a_result_and_a_seed_repeats_it():
    values, _ = planted_runs(runs=5, frames=25, noise=1.5)
    first = list(fit_states(as_trajectories(values), QUICK).state_model_rows("m"))
    with threadpool_limits(2):
        again = list(fit_states(as_trajectories(values), QUICK).state_model_rows("m"))
    assert again == first


def test_seeds_find_the_same_planted_states():
    values, truth = planted_series(runs=20, frames=50)
    for seed in range(3):
        settings = StateSettings(k_max=7, folds=0, bootstraps=0, seed=seed)
        fit, ari = recovered(values, truth, settings)
        assert fit.k == 6
        assert ari > 0.95


def test_collinear_metrics_keep_the_earlier_of_the_list():
    values, _ = planted_runs(runs=5, frames=25)
    wider = [np.column_stack([run, -3 * run[:, 1] + 7, run[:, 0] + 0.5 * run[:, 2]]) for run in values]
    fit = fit_states(as_trajectories(wider), QUICK)
    assert fit.trajectories.metrics == ("m00", "m01", "m02", "m03", "m04", "m06")
    (note,) = [note for note in fit.notes if note.startswith("metric")]
    assert note.startswith(
        "metric m05 dropped: on the training frames its correlation with m01 is above 0.999"
    )
    turned = fit_states(as_trajectories([run[:, ::-1] for run in wider]), QUICK)
    assert turned.trajectories.metrics == ("m00", "m01", "m02", "m03", "m04", "m06")
    kept = fit_states(as_trajectories(wider), QUICK.model_copy(update={"collinear": 1.0}))
    assert len(kept.trajectories.metrics) == 7


def test_one_outlier_frame_makes_no_metrics_collinear():
    values, _ = planted_runs(runs=5, frames=25)
    for run in values:
        run[7] = 1e5
    values[1:] = [np.delete(run, 7, axis=0) for run in values[1:]]
    assert len(fit_states(as_trajectories(values), QUICK).trajectories.metrics) == 5


def test_frames_without_values_have_a_state_and_no_row():
    model = replace(random_model(np.random.default_rng(3), 2, 3, spread=6.0), transition=np.full((2, 2), 0.5))
    rng = np.random.default_rng(4)
    values = [sample(model, 30, rng)[1] for _ in range(4)]
    values[2][[5, 6, 20]] = np.nan
    fit = fit_states(as_trajectories(values), QUICK)
    run = fit.runs[2]
    assert np.flatnonzero(~run.seen).tolist() == [5, 6, 20]
    assert len(run.state) == 30
    rows = [row for row in fit.state_rows("m") if row["run"] == run.run]
    assert [row["step"] for row in rows] == [step for step in range(30) if step not in (5, 6, 20)]
    # Boundaries and edges are those a reader of the table would find in it.
    changes = [(b["step"], a["state"], b["state"]) for a, b in pairwise(rows) if a["state"] != b["state"]]
    assert run.boundaries() == changes
    assert sum(edge.count for edge in fit.transitions) == sum(len(r.boundaries()) for r in fit.runs)


def test_a_metric_that_no_training_run_has_is_dropped_with_its_reason():
    values, _ = planted_runs(runs=4, frames=20)
    names = fit_states(as_trajectories(values), QUICK).train_runs
    wider = [
        np.column_stack([run, np.full(len(run), np.nan) if f"run{i:02}" in names else np.arange(len(run))])
        for i, run in enumerate(values)
    ]
    fit = fit_states(as_trajectories(wider), QUICK)
    assert "metric m05 dropped: no training run has a value of it" in fit.notes
    assert fit.trajectories.metrics == ("m00", "m01", "m02", "m03", "m04")
