"""Simpler ways to cut runs: planted groups with gaps, exact change points, labels of published phases."""

import itertools

import numpy as np
import pytest
from latent_support import planted_runs, planted_series
from threadpoolctl import threadpool_limits

from analyzers.latent.baselines import (
    Pieces,
    agreement,
    change_points,
    kmeans,
    matched,
    peak_labels,
    phase_labels,
    pieces,
)


def named(values):
    return {f"run{i:02}": each for i, each in enumerate(values)}


def hidden(values, share=0.2):
    rng = np.random.default_rng(1)
    return [np.where(rng.uniform(size=run.shape) < share, np.nan, run) for run in values]


def test_k_means_finds_planted_groups_in_held_out_runs_too():
    values, truth = planted_series(runs=12, frames=60, noise=0.5)
    runs = named(values)
    labels = kmeans(runs, sorted(runs)[:8], 6, seed=0)
    assert agreement(list(labels.values()), truth) > 0.99


def test_gaps_are_filled_by_the_centres():
    values, truth = planted_series(runs=12, frames=60, noise=0.5)
    runs = named(hidden(values))
    # No training frame is complete.
    runs = {
        name: np.where(np.arange(14) == i % 14, np.nan, run) for i, (name, run) in enumerate(runs.items())
    }
    labels = kmeans(runs, sorted(runs), 6, seed=0)
    assert agreement(list(labels.values()), truth) > 0.95


def test_k_means_depends_neither_on_the_order_of_runs_nor_on_threads():
    runs = named(hidden(planted_runs(runs=6, noise=1.5)[0]))
    first = kmeans(runs, sorted(runs), 4, seed=0)
    with threadpool_limits(2):
        again = kmeans({name: runs[name] for name in reversed(runs)}, sorted(runs)[::-1], 4, seed=0)
    for name in runs:
        assert (first[name] == again[name]).all()


def test_fewer_distinct_frames_than_centres():
    runs = {"r": np.array([[0.0], [0.0], [1.0]])}
    assert len(set(kmeans(runs, ["r"], 12, seed=0)["r"])) == 2


def test_labels_get_the_numbers_of_their_states():
    states = {"a": np.array([0, 0, 1, 1, 2]), "b": np.array([2, 2, 0])}
    labels = {"a": np.array([2, 2, 0, 0, 1]), "b": np.array([1, 1, 2])}
    found = matched(labels, states)
    assert all((found[name] == states[name]).all() for name in states)


@pytest.mark.parametrize("changes", [1, 2, 3])
def test_change_points_are_the_best_of_all_cuts(changes):
    run = np.random.default_rng(changes).normal(size=(12, 2))
    labels = change_points(run, changes)
    found = tuple(np.flatnonzero(np.diff(labels)) + 1)

    def squares(cuts):
        return sum(((part - part.mean(axis=0)) ** 2).sum() for part in np.split(run, cuts))

    best = min(itertools.combinations(range(1, 12), changes), key=squares)
    assert found == best


def test_change_points_of_planted_states_with_gaps():
    values, truth = planted_runs(runs=4, noise=0.3)
    for run, states in zip(hidden(values, 0.3), truth, strict=True):
        labels = change_points(run, len(set(states)) - 1)
        assert agreement([labels], [states]) > 0.9
    assert (change_points(values[0], 0) == 0).all()
    absent = np.column_stack([values[0], np.full(len(values[0]), np.nan)])
    assert (change_points(absent, 3) == change_points(values[0], 3)).all()


def test_agreement_puts_runs_together():
    one, other = [np.array([0, 0, 1, 1]), np.array([0, 1])], [np.array([5, 5, 3, 3]), np.array([5, 3])]
    assert agreement(one, other) == 1
    # By hand, Hubert and Arabie: pairs together in both 1, in either 2 and 2, of 6.
    assert agreement([np.array([0, 0, 1, 1])], [np.array([0, 0, 1, 2])]) == pytest.approx(
        (1 - 2 * 1 / 6) / ((2 + 1) / 2 - 2 * 1 / 6)
    )


def test_labels_of_published_phases():
    steps = np.array([0, 1, 2, 4, 8])
    assert phase_labels(steps, 1.0, 4.0).tolist() == [0, 0, 1, 1, 2]
    assert phase_labels(steps, None, 4.0).tolist() == [1, 1, 1, 1, 2]
    assert phase_labels(steps, 1.0, None).tolist() == [0, 0, 1, 1, 1]
    assert phase_labels(steps, None, None) is None
    assert peak_labels(steps, 2).tolist() == [0, 0, 0, 1, 1]
    assert peak_labels(steps, None) is None
    assert pieces(steps, np.array([1, 1, 1, 1, 1])) == Pieces((), (1,))
