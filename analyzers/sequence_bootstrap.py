"""Bootstrap over sequences: what a trajectory would be on another draw of the probe's sequences."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

# Fewer say nothing on how sequences spread.
FEWEST_SEQUENCES = 8
# Metrics that are a ratio of two means over sequences; any other with values per sequence is their mean.
RATIOS_OF_MEANS = {"top1_over_median_of_means": ("top1", "median")}


@dataclass(frozen=True)
class SequenceSample:
    """A metric on every sequence at every checkpoint; the columns are the same sequences throughout.

    The metric is ``mean_i values[t, i]``, over ``mean_i over[t, i]`` where that is given.
    """

    values: Float[np.ndarray, "checkpoints sequences"]
    over: Float[np.ndarray, "checkpoints sequences"] | None = None

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return int(self.values.shape[1])

    def at(self, kept: Bool[np.ndarray, "checkpoints"]) -> "SequenceSample":
        """Some of its checkpoints."""
        return SequenceSample(self.values[kept], None if self.over is None else self.over[kept])

    def metric(self, counts: Int[np.ndarray, "draws sequences"]) -> Float[np.ndarray, "draws checkpoints"]:
        """The metric where each sequence is taken ``counts`` times."""
        above = counts @ self.values.T
        if self.over is not None:
            return np.asarray(above / (counts @ self.over.T))
        return np.asarray(above / counts.sum(axis=1, keepdims=True))


def resample(sample: SequenceSample, draws: int, seed: int) -> Float[np.ndarray, "draws checkpoints"]:
    """Trajectories of the metric on sequences drawn with replacement, the same ones at all checkpoints.

    ``m`` sequences drawn from ``m`` spread by ``(m - 1)/m`` of the variance of a mean, so deviations from the
    metric of all sequences are multiplied by ``sqrt(m / (m - 1))`` (Efron and Tibshirani 1993, section 5.3).

    Raises:
        ValueError: there are fewer than ``FEWEST_SEQUENCES``, or a value is not finite.
    """
    m = sample.sequences
    if m < FEWEST_SEQUENCES:
        raise ValueError(f"{m} sequences, and {FEWEST_SEQUENCES} are the fewest to draw from")
    if not all(np.isfinite(part).all() for part in (sample.values, sample.over) if part is not None):
        raise ValueError("a sequence has no finite value at a checkpoint")
    whole = sample.metric(np.ones((1, m), dtype=np.int64))
    counts = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), size=draws)
    return np.asarray(whole + np.sqrt(m / (m - 1)) * (sample.metric(counts) - whole))
