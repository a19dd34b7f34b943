"""Births of heads with their intervals, on scores with known births."""

import numpy as np
import pytest

from analyzers.head_births import Birth, find_births

STEPS = np.array([0, 1, 2, 4, 8])


def test_a_birth_lies_between_two_measured_checkpoints() -> None:
    nan = np.nan
    heads = [
        [0.1, 0.1, 0.4, 0.5, 0.35],
        [0.1, nan, nan, 0.6, 0.7],  # not measured for a while: born somewhere in it
        [0.9, 0.1, 0.1, 0.1, 0.1],
        [0.1, 0.1, 0.1, 0.1, 0.9],  # at the last checkpoint alone
        [nan, nan, nan, nan, nan],
    ]
    assert find_births(STEPS, np.array(heads).T, 0.3) == [
        Birth(2, 1, 5, 0.5, 0.35),
        Birth(4, 0, 3, 0.7, 0.7),
        Birth(None, None, 5, 0.9, 0.1),
        Birth(None, None, 5, 0.9, 0.9),
        Birth(None, None, 0, None, None),
    ]
    always = find_births(STEPS, np.full((5, 1), 0.8), 0.3)
    assert always == [Birth(0, None, 5, 0.8, 0.8)]


def test_one_checkpoint_is_enough_where_asked() -> None:
    scores = np.array([[0.1], [0.1], [0.9], [0.1], [0.1]])
    assert find_births(STEPS, scores, 0.3, hold=1)[0].step == 2
    assert find_births(STEPS, scores, 0.3, hold=2)[0].step is None
    with pytest.raises(ValueError, match="hold is 0"):
        find_births(STEPS, scores, 0.3, hold=0)
