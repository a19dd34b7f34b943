"""Bootstrap over sequences: sequences stay together over steps, and intervals hold the planted peak."""

from dataclasses import replace

import numpy as np
import pytest

from analyzers.growth import GrowthSettings, growth, peak, to_fitted
from analyzers.growth_forms import fit_trajectory, pool
from analyzers.sequence_bootstrap import SequenceSample, resample

PYTHIA = np.array([0, *(2**k for k in range(10)), *range(1000, 143_001, 1000)])
EARLY = np.array([300, 0.12, 8e-4, 1.5, 20.0])
TRUE = growth(PYTHIA.astype(float), EARLY)
PLACE = float(peak(to_fitted(EARLY)))


def test_a_draw_takes_the_same_sequences_at_all_steps() -> None:
    # Sequence i is the constant 2^i, so a mean of draws tells how often each was taken.
    m, draws = 8, 50
    values = np.tile(2.0 ** np.arange(m), (5, 1))
    found = resample(SequenceSample(values), draws, seed=3)
    assert found.shape == (draws, 5)
    assert (found == found[:, :1]).all()
    assert len(np.unique(found[:, 0])) > 40
    # Steps in another order are the same draws in another order.
    scale = np.array([1.0, 5.0, 2.0, 4.0, 3.0])
    scaled = resample(SequenceSample(values * scale[:, None]), draws, seed=3)
    assert scaled == pytest.approx(found * scale, rel=1e-12)


def test_the_spread_is_the_standard_error_of_the_mean() -> None:
    values = np.random.default_rng(0).standard_normal((3, 10))
    found = resample(SequenceSample(values), 40_000, seed=0)
    error = values.std(axis=1, ddof=1) / np.sqrt(10)
    assert found.std(axis=0) == pytest.approx(error, rel=0.02)
    assert found.mean(axis=0) == pytest.approx(values.mean(axis=1), abs=0.02 * error.max())


def test_a_ratio_of_means_is_one_in_every_draw() -> None:
    rng = np.random.default_rng(1)
    above, over = rng.uniform(1, 2, (4, 9)), rng.uniform(1, 2, (4, 9))
    counts = np.array([[9, *[0] * 8], [1] * 9])
    found = SequenceSample(above, over).metric(counts)
    assert found[0] == pytest.approx(above[:, 0] / over[:, 0])
    assert found[1] == pytest.approx(above.mean(axis=1) / over.mean(axis=1))


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="7 sequences, and 8 are the fewest"):
        resample(SequenceSample(np.ones((3, 7))), 10, 0)
    with pytest.raises(ValueError, match="no finite value"):
        resample(SequenceSample(np.full((3, 8), np.nan)), 10, 0)
    with pytest.raises(ValueError, match="3 checkpoints of sequences for 4 values"):
        fit_trajectory(np.arange(4), np.ones(4), sequences=SequenceSample(np.ones((3, 8))))


def planted(rng: np.random.Generator, sequences: int = 32) -> SequenceSample:
    """The true curve with sequences of different height, and noise of each at every step."""
    height = 1 + 0.2 * rng.standard_normal(sequences)
    return SequenceSample(TRUE[:, None] * (height + 0.3 * rng.standard_normal((len(TRUE), sequences))))


def test_the_trajectory_says_what_was_drawn() -> None:
    sample = planted(np.random.default_rng(0))
    values = sample.values.mean(axis=1)
    settings = GrowthSettings(draws=100)
    drawn = fit_trajectory(PYTHIA, values, settings, "a", sample)
    asked = fit_trajectory(
        PYTHIA, values, settings.model_copy(update={"intervals": "residuals"}), "b", sample
    )
    without = fit_trajectory(PYTHIA, values, settings, "c")
    assert [t.method for t in (drawn, asked, without)] == ["sequences", "residuals", "residuals"]
    assert asked.peak == without.peak
    assert drawn.form("massive-growth").parameters == without.form("massive-growth").parameters  # type: ignore[union-attr]
    assert pool([drawn, asked], settings).method == "mixed"
    assert pool([drawn], settings).method == "sequences"
    few = replace(sample, values=sample.values[:, :5])
    fallen = fit_trajectory(PYTHIA, few.values.mean(axis=1), settings, "d", few)
    assert fallen.method == "residuals"
    assert "intervals are of residuals: 5 sequences are too few" in fallen.notes


def test_a_height_that_sequences_share_moves_no_peak() -> None:
    # All sequences have the same curve but for a factor: any draw peaks at the same step.
    height = np.random.default_rng(0).uniform(0.5, 2, 16)
    sample = SequenceSample(TRUE[:, None] * height)
    found = fit_trajectory(PYTHIA, sample.values.mean(axis=1), GrowthSettings(draws=100), sequences=sample)
    assert found.peak == pytest.approx((PLACE,) * 3, rel=1e-3)


def coverage(count: int) -> float:
    """Share of simulations whose interval holds the true step, at the default number of draws."""
    inside = []
    for seed in range(count):
        sample = planted(np.random.default_rng(seed))
        settings = GrowthSettings(seed=10**6 + seed)
        found = fit_trajectory(PYTHIA, sample.values.mean(axis=1), settings, sequences=sample)
        low, high = found.form("massive-growth").intervals["peak_step"]  # type: ignore[union-attr]
        inside.append(low <= PLACE <= high)
    return float(np.mean(inside))


def test_intervals_hold_the_planted_peak() -> None:
    assert coverage(20) >= 0.75  # at 0.927, 20 simulations fall below it in 1 % of seeds


@pytest.mark.long
def test_intervals_hold_the_planted_peak_in_400_simulations() -> None:
    assert coverage(400) >= 0.9
