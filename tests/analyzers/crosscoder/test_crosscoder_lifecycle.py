"""Lives of features on hand-made curves, at the boundaries of every rule."""

from typing import Any

import numpy as np
import pytest

from analyzers.crosscoder.lifecycle import LifecycleSettings, lifecycles, normalised, tau

STEPS = np.array([0, 9, 99, 999, 9999])  # tau = 0, 1, 2, 3, 4


def classes(*curves: list[float], steps: np.ndarray = STEPS, **settings: Any) -> list[str | None]:
    return list(lifecycles(np.array(curves, dtype=float), steps, LifecycleSettings(**settings)).classes)


def test_tau_is_zero_at_step_zero() -> None:
    np.testing.assert_allclose(tau(STEPS), [0, 1, 2, 3, 4], rtol=1e-14)


def test_hand_made_lives() -> None:
    found = lifecycles(
        np.array(
            [
                [4, 4, 4, 4, 4],  # always there
                [2, 0, 4, 1, 1],  # at the start, dips, peaks, decays
                [0, 0, 1, 3, 6],  # comes and stays; alive at 3 = half of 6
                [0, 5, 5, 1, 1],  # comes and goes within a decade
                [0, 5, 0, 5, 0],
                [0, 0, 0, 0, 0],  # no curve
            ],
            dtype=float,
        ),
        STEPS,
    )
    assert found.birth.tolist() == [0, 0, 3, 1, 1, -1]
    assert found.death.tolist() == [4, 2, 4, 2, 3, -1]
    assert found.peak.tolist() == [0, 2, 4, 1, 1, -1]
    assert found.spans.tolist() == [1, 2, 1, 1, 2, 0]
    np.testing.assert_allclose(found.decades, [4, 2, 1, 1, 2, np.nan], rtol=1e-12)
    assert found.classes == ("persistent", "initialisation", "emergent", "decayed", "decayed", None)
    assert found.strength[2].tolist() == [0, 0, 1 / 6, 0.5, 1]
    assert np.isnan(found.strength[5]).all()
    assert not found.alive[5].any()


def test_the_threshold_itself_is_alive() -> None:
    assert classes([0.5, 1, 1, 1, 1]) == ["persistent"]
    assert classes([0.4999, 1, 1, 1, 1]) == ["emergent"]
    assert classes([0.4, 1, 1, 1, 1], alive=0.4) == ["persistent"]
    assert classes([1, 1, 1, 1, 0.5], [1, 1, 1, 1, 0.4999]) == ["persistent", "initialisation"]
    assert classes([0.3, 0.9, 1, 0.9, 0.95], alive=1.0) == ["transient"]  # alive at its peak alone


def test_a_decade_is_the_boundary_between_transient_and_decayed() -> None:
    assert classes([0, 1, 1, 0, 0], [0, 1, 0, 0, 0]) == ["decayed", "transient"]
    assert classes([0, 1, 1, 0, 0], transient_decades=1.01) == ["transient"]
    assert classes([0, 1, 0, 1, 0], transient_decades=2) == ["decayed"]  # from birth to death, with the gap
    steps = np.array([0, 200, 2009, 20099])  # exactly a decade: 201, 2010, 20100
    assert classes([0, 1, 1, 0], steps=steps) == ["decayed"]


def test_whatever_is_alive_at_the_start_and_dips_or_dies_is_of_the_initialisation() -> None:
    assert classes([1, 0, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]) == ["initialisation"] * 3


def test_a_series_that_begins_late_has_no_initialisation() -> None:
    late = np.array([1000, 2000, 4000, 80000])
    lives = ([1.0, 1, 1, 1], [1.0, 0, 1, 1], [1.0, 1, 0, 0], [1.0, 0, 0, 1], [1.0, 1, 1, 0], [0.0, 0, 1, 1])
    expected = ["persistent", "persistent", "transient", "persistent", "transient", "emergent"]
    assert classes(*lives, steps=late) == expected
    assert classes(*lives[:3], steps=late, initial_step=1000) == [
        "persistent",
        "initialisation",
        "initialisation",
    ]


def test_a_curve_may_be_latent_scaling() -> None:
    found = lifecycles(np.array([[-0.5, 0.2, 1.0], [-1.0, -2.0, 0.0], [0.1, np.nan, 1.0]]), STEPS[:3])
    assert found.strength[0].tolist() == [-0.5, 0.2, 1]
    assert found.classes == ("emergent", None, None)
    assert normalised(np.array([[2.0, 4.0]])).tolist() == [[0.5, 1.0]]


def test_a_life_does_not_depend_on_scale() -> None:
    curves = np.random.default_rng(0).random((50, 5))
    one, other = lifecycles(curves, STEPS), lifecycles(curves * 1e-20, STEPS)
    assert one.classes == other.classes
    np.testing.assert_allclose(one.strength, other.strength)


def test_one_snapshot_is_a_life() -> None:
    assert classes([1.0], steps=np.array([5])) == ["persistent"]


@pytest.mark.parametrize(
    ("curves", "steps", "why"),
    [
        ([[1.0, 2.0]], [0], "1 steps for curves"),
        ([[1.0, 2.0]], [1, 1], "do not ascend"),
        ([[1.0, 2.0]], [-1, 1], "do not ascend"),
        ([[1.0, np.inf]], [0, 1], "infinite"),
    ],
)
def test_curves_that_make_no_sense_are_refused(curves: list[list[float]], steps: list[int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        lifecycles(np.array(curves), np.array(steps))


@pytest.mark.parametrize("setting", [{"alive": 0}, {"alive": 1.1}, {"initial_step": -1}, {"unknown": 1}])
def test_settings_are_checked(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        LifecycleSettings(**setting)
