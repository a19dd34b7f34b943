"""Trajectories: one column per metric, one row per checkpoint, one table per run, and how they are scaled.

The engine cannot marginalise a missing value, so incomplete frames are left out here, each with a sentence.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

Transform = Literal["none", "log", "symlog"]
ScaleMode = Literal["train", "per-run"]

COLUMNS = ("run", "step", "name", "value")
# A metric that moves by less than this share of its size is rounding noise, not a trajectory.
RELATIVE_SPREAD = 1e-9


@dataclass(frozen=True)
class Trajectories:
    """Complete trajectories of one or more runs.

    Attributes:
        runs: names of the runs, each once.
        steps: per run, the steps of its frames, strictly increasing (optimizer steps).
        values: per run, one row per frame and one column per metric, all finite, in the unit of the metric
            after its transform. Runs may differ in their number of frames.
        metrics: names of the columns.
        dropped: sentences that name each metric, frame and run left out, and why.
        transforms: transform of each metric that has one; "none" for the others.

    Raises:
        ValueError: the parts do not fit together, or a value is not finite.
    """

    runs: tuple[str, ...]
    steps: tuple[Int[np.ndarray, "_frames"], ...]
    values: tuple[Float[np.ndarray, "_frames metrics"], ...]
    metrics: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    transforms: Mapping[str, Transform] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("trajectories need at least one run")
        if len(set(self.runs)) != len(self.runs):
            raise ValueError(f"runs occur twice: {list(self.runs)}")
        if not len(self.runs) == len(self.steps) == len(self.values):
            raise ValueError(f"{len(self.runs)} runs, {len(self.steps)} steps, {len(self.values)} values")
        for run, steps, values in zip(self.runs, self.steps, self.values, strict=True):
            if values.shape != (len(steps), len(self.metrics)):
                expected = (len(steps), len(self.metrics))
                raise ValueError(f"run {run}: values have shape {values.shape}, not {expected}")
            if not np.isfinite(values).all():
                raise ValueError(f"run {run}: values are not all finite")
            if (np.diff(steps) <= 0).any():
                raise ValueError(f"run {run}: steps do not increase")

    def select(self, metrics: Sequence[str]) -> "Trajectories":
        """The same frames with these metrics only, in this order.

        Raises:
            ValueError: a metric is not among the columns.
        """
        unknown = [name for name in metrics if name not in self.metrics]
        if unknown:
            raise ValueError(f"no trajectory is named {unknown[0]!r}")
        columns = [self.metrics.index(name) for name in metrics]
        return Trajectories(
            runs=self.runs,
            steps=self.steps,
            values=tuple(values[:, columns] for values in self.values),
            metrics=tuple(metrics),
            dropped=self.dropped,
            transforms={name: self.transforms[name] for name in metrics if name in self.transforms},
        )


@dataclass(frozen=True)
class Scaler:
    """z = (x - mean) / std, per metric (z has no unit); std is the population one (divided by n).

    Mode ``train``: mean and std of all frames of the training runs, the same for every run. Mode ``per-run``
    (as in arXiv 2308.09543): each run by its own mean and std. That erases differences of level between runs
    and looks ahead, because a frame is scaled with frames that come after it; ``mean`` and ``std`` are None.
    """

    mode: ScaleMode
    metrics: tuple[str, ...]
    mean: Float[np.ndarray, "metrics"] | None = None
    std: Float[np.ndarray, "metrics"] | None = None

    @classmethod
    def fit(
        cls, metrics: tuple[str, ...], runs: Sequence[Float[np.ndarray, "_frames metrics"]], mode: ScaleMode
    ) -> "Scaler":
        """Learn mean and std from the frames of the training runs.

        Raises:
            ValueError: mode is ``train`` and a metric is constant over these runs.
        """
        if mode == "per-run":
            return cls(mode, metrics)
        frames = np.concatenate(runs)
        constant = ~varies(frames)
        if constant.any():
            raise ValueError(f"{metrics[int(constant.argmax())]} is constant over the training runs")
        return cls(mode, metrics, frames.mean(axis=0), frames.std(axis=0))

    def apply(self, values: Float[np.ndarray, "frames metrics"]) -> Float[np.ndarray, "frames metrics"]:
        """Scale one whole run; where a metric is constant in it, mode ``per-run`` only centres it."""
        if self.mean is not None and self.std is not None:
            return np.asarray((values - self.mean) / self.std)
        std = np.where(varies(values), values.std(axis=0), 1.0)
        return np.asarray((values - values.mean(axis=0)) / std)

    def to_dict(self) -> dict[str, Any]:
        """The scaler as plain JSON values."""
        return {
            "mode": self.mode,
            "metrics": list(self.metrics),
            "mean": None if self.mean is None else self.mean.tolist(),
            "std": None if self.std is None else self.std.tolist(),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Scaler":
        """The scaler that ``to_dict`` saved."""
        mean, std = (None if saved[key] is None else np.array(saved[key], float) for key in ("mean", "std"))
        return cls(saved["mode"], tuple(saved["metrics"]), mean, std)


def varies(values: Float[np.ndarray, "frames metrics"]) -> Bool[np.ndarray, "metrics"]:
    """True per metric where max - min > 1e-9 max |x|; NaN is skipped."""
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    return np.asarray(high - low > RELATIVE_SPREAD * np.maximum(np.abs(low), np.abs(high)))


def from_long(
    rows: pd.DataFrame | Iterable[Mapping[str, Any]],
    transform: Mapping[str, str] | None = None,
    min_share: float = 0.5,
) -> Trajectories:
    """Build trajectories from rows with the columns run, step, name and value.

    ``transform`` maps names to "log" (natural, of values > 0), "symlog" (sign(x) ln(1 + |x|)) or "none".
    A value that is missing, NaN, infinite or outside the domain of its transform is not usable.

    In this order, each with a sentence in ``dropped``, these are left out: a metric with usable values in
    less than ``min_share`` of all frames, so that one sparse metric does not cost the frames of all others;
    a constant metric; a frame in which a remaining metric has no usable value; a run left with fewer than
    two frames; a metric that is constant by now.

    Runs and metrics come out sorted by name, frames by step, whatever the order of ``rows``.

    Raises:
        ValueError: a column is missing, a run or a name is null, a step is not a whole number, two rows share
            run, step and name, a transform is unknown or names no metric, or nothing is left.
    """
    frame = _read(rows)
    wide = frame.pivot(index=["run", "step"], columns="name", values="value").sort_index().sort_index(axis=1)
    table = pd.DataFrame(wide.to_numpy(dtype=float), index=wide.index, columns=[str(n) for n in wide.columns])
    table = table.where(np.isfinite(table))
    kinds = _check_transforms(transform or {}, table.columns)

    values = pd.DataFrame(
        {name: _transformed(table[name].to_numpy(), kinds.get(name, "none")) for name in table.columns},
        index=table.index,
    )

    dropped: list[str] = []
    present = values.notna().mean()
    sparse = (present < min_share) | (present == 0)
    dropped += [
        f"metric {name} dropped: {present[name]:.0%} of the frames have a usable value of it, "
        f"and {min_share:.0%} is the least"
        for name in values.columns[sparse]
    ]
    values = _drop_constant(values.loc[:, ~sparse], dropped)
    dropped += _incomplete(table[values.columns], values)
    complete = values[values.notna().all(axis=1)]

    frames = complete.groupby(level="run").size().reindex(table.index.unique("run"), fill_value=0)
    for run in frames.index[frames < 2]:
        dropped.append(f"run {run} dropped: {frames[run]} complete frames, and a trajectory needs 2")
    kept = [str(run) for run in frames.index[frames >= 2]]
    if not kept:
        raise ValueError("no run has 2 complete frames: " + "; ".join(dropped))
    final = _drop_constant(complete.loc[kept], dropped)

    per_run = [final.xs(run, level="run") for run in kept]
    return Trajectories(
        runs=tuple(kept),
        steps=tuple(part.index.to_numpy(dtype=np.int64) for part in per_run),
        values=tuple(part.to_numpy(dtype=float) for part in per_run),
        metrics=tuple(final.columns),
        dropped=tuple(dropped),
        transforms={name: kind for name, kind in kinds.items() if kind != "none" and name in final.columns},
    )


def _read(rows: pd.DataFrame | Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame([dict(row) for row in rows])
    if not len(frame):
        raise ValueError("there are no rows to build trajectories from")
    absent = [name for name in COLUMNS if name not in frame.columns]
    if absent:
        raise ValueError(f"rows lack the column {absent[0]!r}")
    frame = frame[list(COLUMNS)]
    for name in ("run", "name"):
        if frame[name].isna().any():
            raise ValueError(f"a row has no {name}")
    steps = pd.to_numeric(frame["step"])
    # A null step fails this test too: NaN is unequal to 0.
    if ((steps % 1) != 0).any():
        raise ValueError(f"step {frame['step'][(steps % 1) != 0].iloc[0]} is not a whole number")
    frame = pd.DataFrame(
        {
            "run": frame["run"].astype(str),
            "step": steps.astype(np.int64),
            "name": frame["name"].astype(str),
            "value": frame["value"].to_numpy(dtype=float, na_value=np.nan),
        }
    )
    twice = frame.duplicated(["run", "step", "name"])
    if twice.any():
        row = frame[twice].iloc[0]
        raise ValueError(f"run {row['run']}, step {row['step']}: two values of {row['name']}")
    return frame


def _check_transforms(transform: Mapping[str, str], names: Iterable[str]) -> dict[str, Transform]:
    known = set(names)
    for name, kind in transform.items():
        if kind not in get_args(Transform):
            raise ValueError(f"transform {kind!r} of {name} is unknown; use one of {get_args(Transform)}")
        if name not in known:
            raise ValueError(f"a transform is given for {name!r}, but no row has that name")
    return cast("dict[str, Transform]", dict(transform))


def _transformed(values: Float[np.ndarray, "frames"], kind: Transform) -> Float[np.ndarray, "frames"]:
    if kind == "log":
        # Outside the domain there is no value: the frame is dropped with a sentence, never clipped.
        return np.asarray(np.log(np.where(values > 0, values, np.nan)))
    if kind == "symlog":
        return np.asarray(np.copysign(np.log1p(np.abs(values)), values))
    return values


def _drop_constant(table: pd.DataFrame, dropped: list[str]) -> pd.DataFrame:
    """Leave out constant columns; every column has a value."""
    if not table.columns.empty:
        moving = varies(table.to_numpy())
        dropped += [f"metric {name} dropped: it is constant" for name in table.columns[~moving]]
        table = table.loc[:, moving]
    if table.columns.empty:
        raise ValueError("no metric is left: " + "; ".join(dropped))
    return table


def _incomplete(table: pd.DataFrame, transformed: pd.DataFrame) -> list[str]:
    """One sentence per run and set of absent metrics, so that a long gap stays readable."""
    missing = table.isna().to_numpy()
    undefined = transformed.isna().to_numpy() & ~missing
    steps_of: dict[tuple[str, str], list[int]] = {}
    for (run, step), absent, outside in zip(table.index, missing, undefined, strict=True):
        reasons = [f"no value of {name}" for name in table.columns[absent]]
        reasons += [f"{name} is not positive and has no logarithm" for name in table.columns[outside]]
        if reasons:
            steps_of.setdefault((run, ", ".join(reasons)), []).append(step)
    return [
        f"run {run}, {'step' if len(steps) == 1 else 'steps'} {', '.join(map(str, steps))}: "
        f"{'frame' if len(steps) == 1 else 'frames'} dropped, {reason}"
        for (run, reason), steps in steps_of.items()
    ]
