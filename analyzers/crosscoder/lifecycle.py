"""Birth, peak and death of features over the snapshots, and the class that follows by a written rule.

The rule and its thresholds are ours (docs/crosscoder_evolution.md); they are settings, to be stored with what
they gave.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64
from pydantic import BaseModel, ConfigDict, Field

LifeClass = Literal["initialisation", "emergent", "transient", "decayed", "persistent"]


class LifecycleSettings(BaseModel):
    """Thresholds of life and of the classes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alive: Annotated[
        float,
        Field(description="a feature is alive where its strength is this part of its largest", gt=0, le=1),
    ] = 0.5
    initial_step: Annotated[
        int,
        Field(description="the first snapshot shows the initialisation if its step is at most this", ge=0),
    ] = 0
    transient_decades: Annotated[
        float,
        Field(
            description="decades of log10(step + 1) from birth to death below which a feature is transient"
        ),
    ] = 1.0
    turned: Annotated[
        float,
        Field(description="a feature turns if the cosine of its directions before and after is below this"),
    ] = 0.5


@dataclass(frozen=True)
class Lifecycles:
    """The lives of all features. Snapshots are numbered from 0; -1: the feature has no curve.

    Attributes:
        strength: the curves divided by their maxima; NaN for a feature without a curve.
        alive: where the strength is at least the threshold.
        birth: first snapshot alive.
        death: last snapshot alive; the last snapshot of all means that no death was seen.
        peak: snapshot of the maximum (the first of equals).
        spans: number of separate stretches of being alive.
        decades: ``tau(death) - tau(birth)``, tau = log10(step + 1); NaN for a feature without a curve.
        classes: None for a feature without a curve.
    """

    strength: Float64[np.ndarray, "features snapshots"]
    alive: Bool[np.ndarray, "features snapshots"]
    birth: Int64[np.ndarray, "features"]
    death: Int64[np.ndarray, "features"]
    peak: Int64[np.ndarray, "features"]
    spans: Int64[np.ndarray, "features"]
    decades: Float64[np.ndarray, "features"]
    classes: tuple[LifeClass | None, ...]


def tau(steps: Int64[np.ndarray, "snapshots"]) -> Float64[np.ndarray, "snapshots"]:
    """``log10(step + 1)``: the axis on which lives are drawn and measured; step 0 is at 0."""
    return np.log10(steps.astype(np.float64) + 1)


def normalised(
    curves: Float64[np.ndarray, "features snapshots"],
) -> Float64[np.ndarray, "features snapshots"]:
    """Curves divided by their maxima. A curve with a gap, or whose maximum is not above 0, becomes NaN.

    >>> normalised(np.array([[1.0, 4.0, 2.0], [0.0, 0.0, 0.0]])).tolist()
    [[0.25, 1.0, 0.5], [nan, nan, nan]]
    """
    largest = curves.max(axis=1, keepdims=True)  # NaN where any is
    return curves / np.where(largest > 0, largest, np.nan)


def lifecycles(
    curves: Float64[np.ndarray, "features snapshots"],
    steps: Int64[np.ndarray, "steps"],
    settings: LifecycleSettings | None = None,
) -> Lifecycles:
    """Lives of features from their strengths: decoder norms, or latent scaling (negative values: not there).

    The class is the first of these that holds:

    1. alive at the first snapshot and at all others: ``persistent``;
    2. alive at the first snapshot, which shows the initialisation: ``initialisation`` (it dips or dies);
    3. alive at the last snapshot: ``emergent`` if it was not alive at the first, else ``persistent``;
    4. less than ``transient_decades`` from birth to death: ``transient``;
    5. ``decayed``.

    Where the series begins after ``initial_step``, a feature alive at its first snapshot was born at a
    time not seen: it is never ``initialisation``, and its decades are too few.

    Raises:
        ValueError: steps do not ascend, are negative, or are not as many as snapshots; a curve is infinite.
    """
    settings = settings or LifecycleSettings()
    if curves.ndim != 2 or len(steps) != curves.shape[1] or not len(steps):
        raise ValueError(f"{len(steps)} steps for curves of shape {curves.shape}")
    if (np.diff(steps) <= 0).any() or steps[0] < 0:
        raise ValueError(f"steps do not ascend from 0 or above: {steps.tolist()}")
    if np.isinf(curves).any():
        raise ValueError("a strength is infinite")
    strength = normalised(curves)
    alive = np.asarray(strength >= settings.alive)  # NaN is not
    has = np.asarray(alive.any(axis=1))  # every curve is alive at its peak
    last = curves.shape[1] - 1
    birth = np.where(has, alive.argmax(axis=1), -1)
    death = np.where(has, last - alive[:, ::-1].argmax(axis=1), -1)
    peak = np.where(has, np.where(np.isnan(strength), -1, strength).argmax(axis=1), -1)
    spans = alive[:, 0].astype(np.int64) + (alive[:, 1:] & ~alive[:, :-1]).sum(axis=1)
    time = tau(steps)
    decades = np.where(has, time[death] - time[birth], np.nan)
    from_start = steps[0] <= settings.initial_step
    classes = tuple(
        _class(alive[i], decades[i], bool(from_start), settings.transient_decades) if has[i] else None
        for i in range(len(curves))
    )
    return Lifecycles(strength, alive, birth, death, peak, spans, decades, classes)


def _class(
    alive: Bool[np.ndarray, "snapshots"], decades: float, from_start: bool, transient: float
) -> LifeClass:
    if alive.all():
        return "persistent"
    if alive[0] and from_start:
        return "initialisation"
    if alive[-1]:
        return "persistent" if alive[0] else "emergent"
    # The threshold itself is no longer transient; rounding of logarithms must not decide it.
    return "transient" if decades < transient - 1e-12 else "decayed"
