"""Bootstrap over runs: states matched across refits, and the interval of a change of state."""

import numpy as np
import pytest
from latent_support import planted_runs

from analyzers.latent import StateSettings, Trajectories, decode_runs, fit_states
from analyzers.latent.bootstrap import Spread, matched_paths, refit_resampled, spread
from analyzers.latent.training_map import Change, Stay

SETTINGS = StateSettings(k_max=4, restarts=6, folds=0, bootstraps=12, rule="bic")


def fit_of(values):
    return fit_states(
        Trajectories(
            tuple(f"run{i:02}" for i in range(len(values))),
            tuple(10 * np.arange(len(run)) for run in values),
            tuple(values),
            tuple(f"m{i}" for i in range(values[0].shape[1])),
        ),
        SETTINGS,
    )


def change(step, source=0, target=1, before=None):
    before = step - 10 if before is None else before
    return Change("a", source, target, before, step, Stay(source, 0, before, 1))


def test_a_spread_by_hand():
    steps = np.arange(0, 300, 10)
    refits = [[change(step)] for step in range(50, 150, 10)]
    assert spread(change(100), steps, refits) == Spread(50, 140, 10)
    # From twenty-one refits on the farthest on either side is left out.
    many = [[change(step)] for step in (0, *[100] * 38, 290)]
    assert spread(change(100), steps, many) == Spread(100, 100, 40)
    assert spread(change(100), steps, [*refits, [change(100, target=2)], []]) == Spread(50, 140, 10)
    assert spread(change(100), steps, [[], []]) == Spread(None, None, 0)


def test_of_several_changes_the_nearest_in_checkpoints_counts():
    """Steps 1, 2, 4, .. 1024: 512 is nearer to 256 than 16 is, though more steps away."""
    steps = 2 ** np.arange(11)
    again = [[change(16, before=8), change(512, before=256)]]
    assert spread(change(256, before=128), steps, again) == Spread(512, 512, 1)


def test_exchanged_states_are_matched():
    values, _ = planted_runs(runs=6)
    fit = fit_of(values)
    scaled = [fit.scaled()[run] for run in fit.trajectories.runs]
    paths, seen = [run.state for run in fit.runs], np.ones(sum(map(len, values)), dtype=bool)
    for order in ([3, 1, 0, 2], [1, 2, 3, 0]):
        exchanged = fit.parameters.relabelled(np.array(order))
        assert any(
            (each.path != path).any()
            for each, path in zip(decode_runs(exchanged, scaled), paths, strict=True)
        )
        for found, path in zip(matched_paths(exchanged, scaled, paths, seen), paths, strict=True):
            assert (found == path).all()


def test_the_refits_of_the_selection_are_those_of_the_boundaries():
    values, _ = planted_runs(runs=8)
    fit = fit_of(values)
    chosen = fit.candidates[fit.k - 1]
    assert len(fit.refit_paths) == chosen.bootstrap_refits == len(chosen.refits) == 12
    train = [fit.scaled()[run] for run in fit.train_runs]
    again = refit_resampled(fit.parameters, train, SETTINGS)
    for refit, paths in zip(again, fit.refit_paths, strict=True):
        # Runs that were held out are decoded as well; the order of the states does not matter.
        scaled = [fit.scaled()[run.run] for run in fit.runs]
        theirs = matched_paths(
            refit, scaled, [run.state for run in fit.runs], np.full(sum(map(len, values)), True)
        )
        share = np.mean(np.concatenate(theirs) == np.concatenate(paths))
        assert share > 0.99


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_a_blurred_change_has_the_wider_interval(noise):
    values, truth = planted_runs(runs=10, noise=noise)
    fit = fit_of(values)
    widths = []
    for index, run in enumerate(fit.runs):
        refits = []
        for paths in fit.refit_paths:
            walk, moves = paths[index].tolist(), np.flatnonzero(np.diff(paths[index])) + 1
            refits.append([change(10 * t, walk[t - 1], walk[t]) for t in moves.tolist()])
        for step, left, entered in run.boundaries():
            found = spread(change(step, left, entered), run.steps, refits)
            if found.refits:
                assert found.low <= found.high
                widths.append((found.high - found.low) // 10)
    if noise < 1:
        assert len(widths) == 3 * len(truth)
        assert max(widths) == 0
    else:
        assert np.mean(widths) > 0.5


def test_a_single_run_cannot_be_resampled():
    values, _ = planted_runs(runs=1)
    fit = fit_of(values)
    assert fit.refit_paths == ()
    assert any("no boundary has a bootstrap interval" in note for note in fit.notes)
    two = fit_of(planted_runs(runs=2)[0])
    assert two.refit_paths == ()
    assert any("one training run only" in note for note in two.notes)
