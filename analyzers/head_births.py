"""Births of heads: when each induction and previous-token head of a run is first seen."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import BaseModel, ConfigDict, Field

from analyzers.induction import births

HEADS_VERSION = 1
HEADS_FORM = "head-birth"
# Metric of the score: (class of the heads that reach the threshold, parameter of `induction` that sets it).
HEAD_KINDS = {
    "prefix_matching": ("induction", "induction_threshold"),
    "repeat_previous_token": ("previous-token", "previous_threshold"),
}
NOT_SEEN = "not-seen"


class HeadSettings(BaseModel):
    """What counts as a birth, beside the thresholds of the analyzer `induction`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hold: Annotated[
        int,
        Field(
            ge=1,
            description="checkpoints in a row at the threshold or above, of which the first is the birth",
        ),
    ] = 2


@dataclass(frozen=True)
class Birth:
    """What is known of one head.

    Attributes:
        step: first checkpoint at which it is such a head; None: not seen.
        before: last measured checkpoint before that; None: it is one from the first checkpoint on, or never.
        n: checkpoints with a score.
        highest, last: scores; None without any.
    """

    step: int | None
    before: int | None
    n: int
    highest: float | None
    last: float | None


def find_births(
    steps: Int64[np.ndarray, "checkpoints"],
    scores: Float64[np.ndarray, "checkpoints heads"],
    threshold: float,
    hold: int = 2,
) -> list[Birth]:
    """The birth of every head by the rule of :func:`analyzers.induction.births`; it lies in (before, step].

    Raises:
        ValueError: steps do not ascend, or ``hold`` is not positive.

    >>> find_births(np.array([1, 2, 4, 8]), np.array([[0.1], [0.2], [0.5], [0.6]]), 0.3)
    [Birth(step=4, before=2, n=4, highest=0.6, last=0.6)]
    """
    found = []
    for step, column in zip(births(steps, scores, threshold, hold), scores.T, strict=True):
        there = ~np.isnan(column)
        known, at = column[there], steps[there]
        earlier = at[at < step] if step is not None else at[:0]
        found.append(
            Birth(
                step,
                int(earlier[-1]) if len(earlier) else None,
                len(known),
                float(known.max()) if len(known) else None,
                float(known[-1]) if len(known) else None,
            )
        )
    return found
