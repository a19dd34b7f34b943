"""Online use of a fitted model: which state is a run in now, and how surprising is its newest checkpoint?

The filter alone, one checkpoint at a time: nothing of a later checkpoint enters, neither by the recursion nor
by scale, transform or grid. docs/decode.md has the definitions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from analyzers.latent.drivers import untransformed
from analyzers.latent.emissions import log_density
from analyzers.latent.hmm import log_predicted
from analyzers.latent.parameters import Parameters
from analyzers.latent.recursions import log, logsumexp
from analyzers.latent.trajectories import Grid, Scaler
from analyzers.latent.transforms import Transform, transformed

Flag = Literal["new", "unexpected"]
# A checkpoint is flagged when its surprise is above this quantile of the training frames' surprises.
QUANTILE = 0.999
# With fewer comparable training frames than this, "more surprising than any of them" says too little.
FEWEST = 20
# Step by step and in one go, the filter differs by so much at most, relatively.
ROUNDING = 1e-9
# Metrics named as what sets a checkpoint apart from its state.
NAMED = 5


@dataclass(frozen=True)
class TrainingFrames:
    """What the surprise of a new checkpoint is compared with: every training frame that has a value.

    Attributes:
        values: scaled values as the model saw them; NaN is missing.
        log_predicted: ln p(s_t = k | x_1:t-1), what the filter expected before it saw the frame.
    """

    values: Float[np.ndarray, "frames metrics"]
    log_predicted: Float[np.ndarray, "frames k"]

    @classmethod
    def of(
        cls, parameters: Parameters, runs: Sequence[Float[np.ndarray, "_frames metrics"]]
    ) -> "TrainingFrames":
        """The frames with a value of all training runs, in turn."""
        values, predicted = np.concatenate(runs), np.concatenate(log_predicted(parameters, runs))
        seen = ~np.isnan(values).all(axis=1)
        return cls(values[seen], predicted[seen])


@dataclass(frozen=True)
class Belief:
    """What is believed of a run after one of its checkpoints.

    Attributes:
        step: step of the checkpoint.
        log_posterior: ln p(s_t = k | x_1:t).
    """

    step: int
    log_posterior: Float[np.ndarray, "k"]


@dataclass(frozen=True)
class Part:
    """How far one metric of a checkpoint is from the mean of its state.

    ``z`` is in standard deviations of the state; ``value`` and ``mean`` are in the metric's own unit, None
    where they have none.
    """

    metric: str
    z: float
    value: float | None
    mean: float | None


@dataclass(frozen=True)
class Reading:
    """One checkpoint as the filter sees it.

    Attributes:
        belief: the filtering posterior, from which the next checkpoint is read.
        state: the most probable state; of equally probable ones the lowest.
        posterior: p(s_t = state | x_1:t).
        surprise: -ln p(x_t | x_1:t-1), in nats, a density of scaled values: it may be negative.
        misfit: min_k -ln p(x_t | s_t = k), in nats: the part of the surprise that no path explains away.
        percentile: share in per cent of the comparable training frames whose surprise, of the same metrics,
            is at most this one; None without any.
        compared: training frames that have all metrics that this checkpoint has.
        flags: ``new``: surprise and misfit are above the quantile .999 of the comparable training frames, so
            that no state explains the checkpoint. ``unexpected``: the surprise alone is, so that a state
            explains it, but the run was not expected to be there.
        parts: the metrics farthest from the mean of the state, the farthest first.
        missing: metrics without a value.
    """

    belief: Belief
    state: int
    posterior: float
    surprise: float
    misfit: float
    percentile: float | None
    compared: int
    flags: tuple[Flag, ...]
    parts: tuple[Part, ...]
    missing: tuple[str, ...]


class OnlineModel:
    """A fitted model that reads runs as they come, rebuilt from what is stored of it.

    Raises:
        ValueError: every run was scaled by itself: scaling a new checkpoint so needs those that come after.
    """

    def __init__(
        self,
        parameters: Parameters,
        scaler: Scaler,
        transforms: Mapping[str, Transform],
        training: TrainingFrames,
        *,
        grid: Grid,
        grid_steps: Int[np.ndarray, "steps"],
    ) -> None:
        if scaler.mean is None or scaler.std is None:
            raise ValueError(
                "the model was fitted with scale = per-run, which scales a checkpoint with those that come "
                "after it: it cannot be used online"
            )
        self.parameters, self.scaler, self.transforms = parameters, scaler, dict(transforms)
        self.grid, self.grid_steps = grid, np.asarray(grid_steps, dtype=np.int64)
        self._training = training
        self._log_transition = log(parameters.transition)
        self._references = cache(self._reference)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return self.scaler.metrics

    def frames(self, values: Float[np.ndarray, "frames metrics"]) -> Float[np.ndarray, "frames metrics"]:
        """Checkpoints of one run in order of step, in the metrics' own units, as the model sees them.

        A row depends on itself and, for a ``difference``, on the row before. What is infinite or outside the
        domain of its transform is missing.
        """
        finite = np.where(np.isfinite(values), values, np.nan)
        columns = [
            transformed(finite[:, i], self.transforms.get(name, "none"))
            for i, name in enumerate(self.metrics)
        ]
        return self.scaler.apply(np.stack(columns, axis=1))

    def on_grid(self, steps: Int[np.ndarray, "frames"]) -> Bool[np.ndarray, "frames"]:
        """Whether each step is a frame: on a ``common`` grid those between its steps are none."""
        if self.grid != "common" or not len(self.grid_steps):
            return np.ones(len(steps), dtype=bool)
        return np.asarray(np.isin(steps, self.grid_steps) | (steps > self.grid_steps[-1]))

    def step(self, belief: Belief | None, step: int, frame: Float[np.ndarray, "metrics"]) -> Reading:
        """Read the next checkpoint of a run; ``belief`` is that of the one before, None for the first.

        Between two checkpoints the chain makes one transition for every step of the model's grid that lies
        between them and one for the new checkpoint: a missing checkpoint is bridged.

        Raises:
            ValueError: the step does not lie after the one before, or the frame has no value.
        """
        seen = ~np.isnan(frame)
        if not seen.any():
            raise ValueError(f"step {step} has no value of any metric of the model")
        predicted = self._predicted(belief, step)
        density = log_density(self.parameters, frame[None])[0]
        joint = predicted + density
        evidence = float(logsumexp(joint[None])[0])
        posterior = joint - evidence
        state = int(posterior.argmax())
        surprise, misfit = -evidence, -float(density.max())
        surprises, misfits = self._references(seen.tobytes())
        flags: tuple[Flag, ...] = ()
        if len(surprises) >= FEWEST and surprise > _threshold(surprises):
            flags = ("new",) if misfit > _threshold(misfits) else ("unexpected",)
        percentile = 100 * float((surprises <= _above(surprise)).mean()) if len(surprises) else None
        return Reading(
            belief=Belief(int(step), posterior),
            state=state,
            posterior=float(np.exp(posterior[state])),
            surprise=surprise,
            misfit=misfit,
            percentile=percentile,
            compared=len(surprises),
            flags=flags,
            parts=self._parts(state, frame),
            missing=tuple(name for name, there in zip(self.metrics, seen, strict=True) if not there),
        )

    def _predicted(self, belief: Belief | None, step: int) -> Float[np.ndarray, "k"]:
        """ln p(s_t = k | x_1:t-1)."""
        if belief is None:
            return log(self.parameters.start)
        if step <= belief.step:
            raise ValueError(f"step {step} does not lie after step {belief.step}")
        between = 0
        if self.grid != "own":
            between = int(((self.grid_steps > belief.step) & (self.grid_steps < step)).sum())
        predicted = belief.log_posterior
        for _ in range(between + 1):
            predicted = logsumexp(self._log_transition.T + predicted)
        return predicted

    def _reference(
        self, seen: bytes
    ) -> tuple[Float[np.ndarray, "_comparable"], Float[np.ndarray, "_comparable"]]:
        """Surprise and misfit of the training frames had they been seen in these metrics alone.

        A density of few metrics cannot be compared with one of many. Frames that lack one of them are no
        comparison. What the filter expected of a training frame rests on all that it saw before.
        """
        columns = np.frombuffer(seen, dtype=bool)
        there = ~np.isnan(self._training.values[:, columns]).any(axis=1)
        values = np.where(columns, self._training.values[there], np.nan)
        density = log_density(self.parameters, values)
        if not len(density):
            return np.zeros(0), np.zeros(0)
        return -logsumexp(self._training.log_predicted[there] + density), -density.max(axis=1)

    def _parts(self, state: int, frame: Float[np.ndarray, "metrics"]) -> tuple[Part, ...]:
        z = (frame - self.parameters.means[state]) / np.sqrt(self.parameters.variances[state])
        far = [i for i in np.argsort(-np.abs(z), kind="stable") if not np.isnan(z[i])][:NAMED]
        scaled = np.stack([frame, self.parameters.means[state]])
        natural = untransformed(scaled * self.scaler.std + self.scaler.mean, self.metrics, self.transforms)
        return tuple(
            Part(self.metrics[i], float(z[i]), _number(natural[0, i]), _number(natural[1, i])) for i in far
        )


def _threshold(values: Float[np.ndarray, "_comparable"]) -> float:
    """The quantile, rounded up to a value that was seen: below 1000 frames it is their largest one."""
    return _above(float(np.quantile(values, QUANTILE, method="higher")))


def _above(value: float) -> float:
    """The value with what rounding may add: a training frame must not be above itself."""
    return value + ROUNDING * (1 + abs(value))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
