"""What the training of a crosscoder depends on besides its data."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from analyzers.crosscoder.weights import Activation, Gate

Matmul = Literal["auto", "float32", "bfloat16"]
"""Number format of the encoder's product; ``auto`` is bfloat16 on CUDA and float32 elsewhere."""


class TrainOptions(BaseModel):
    """All of :class:`TrainSettings` but its size and its length."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    activation: Annotated[Activation, Field(description="what keeps latents few")] = "batch-topk"
    gate: Annotated[Gate, Field(description="one gate for all snapshots, or each its own")] = "shared"
    k: Annotated[
        int,
        Field(
            ge=1,
            description="batch-topk: active latents per token (and snapshot, with a gate per snapshot)",
        ),
    ] = 32
    auxiliary: Annotated[
        float, Field(ge=0, description="batch-topk: weight of the error that dead latents are to explain")
    ] = 1 / 32
    auxiliary_k: Annotated[
        int | None,
        Field(ge=1, description="dead latents per token in it; absent: half of one snapshot's width"),
    ] = None
    threshold_decay: Annotated[
        float,
        Field(ge=0, lt=1, description="batch-topk: decay per batch of the mean that becomes the threshold"),
    ] = 0.99
    penalty: Annotated[
        float | None,
        Field(
            ge=0,
            description="weight of the penalty, for jumprelu relative to the mean squared norm of a row; "
            "absent: 0.005 for jumprelu, 5 for relu; batch-topk has none",
        ),
    ] = None
    penalty_warm_up: Annotated[
        float, Field(ge=0, le=1, description="share of the steps over which the penalty rises linearly")
    ] = 0.1
    tanh_scale: Annotated[
        float, Field(gt=0, description="jumprelu: c of the penalty, for values relative to a row's mean norm")
    ] = 4.0
    tanh_frequency: Annotated[
        float,
        Field(gt=0, description="jumprelu: s0, the frequency from which the penalty grows quadratically"),
    ] = 0.01
    threshold: Annotated[
        float, Field(gt=0, description="jumprelu: threshold at the start, relative to a row's mean norm")
    ] = 0.03
    bandwidth: Annotated[
        float,
        Field(
            gt=0,
            description="jumprelu: width of the window where a threshold has a gradient, relative likewise",
        ),
    ] = 0.06
    threshold_rate: Annotated[
        float,
        Field(gt=0, description="jumprelu: learning rate of the log-threshold over that of the weights"),
    ] = 0.1
    learning_rate: Annotated[float, Field(gt=0, description="Adam's, between warm-up and decay")] = 5e-5
    warm_up: Annotated[float, Field(ge=0, le=1, description="share of the steps that rise linearly")] = 0.1
    decay: Annotated[
        float, Field(ge=0, le=1, description="share of the steps, the last, that fall linearly")
    ] = 0.2
    dead_after: Annotated[
        int, Field(ge=1, description="tokens without activity from which a latent is dead")
    ] = 500_000
    micro_batch: Annotated[
        int | None, Field(ge=1, description="rows computed at once; absent: all rows of a step")
    ] = None
    matmul: Annotated[Matmul, Field(description="number format of the encoder's product")] = "auto"
    seed: Annotated[int, Field(ge=0, description="seed of the start, and of the order of the rows")] = 0

    @model_validator(mode="after")
    def _possible(self) -> "TrainOptions":
        if self.activation == "batch-topk" and self.penalty is not None:
            raise ValueError("batch-topk has no penalty: leave it out")
        if self.warm_up + self.decay > 1:
            raise ValueError(
                f"warm_up and decay are shares of the steps: {self.warm_up} and {self.decay} exceed 1"
            )
        return self


class TrainSettings(TrainOptions):
    """Size, sparsity and schedule of one crosscoder (docs/crosscoder.md)."""

    latents: Annotated[int, Field(ge=1, description="latents of the dictionary")]
    steps: Annotated[int, Field(ge=1, description="steps of the optimiser; the schedule ends with them")]

    @model_validator(mode="after")
    def _fits(self) -> "TrainSettings":
        if self.activation == "batch-topk" and self.k > self.latents:
            raise ValueError(f"k is {self.k}, more than the {self.latents} latents")
        return self

    @property
    def penalty_weight(self) -> float:
        """The penalty's weight with its default filled in."""
        if self.penalty is not None:
            return self.penalty
        return {"batch-topk": 0.0, "jumprelu": 0.005, "relu": 5.0}[self.activation]

    def unit(self, snapshots: int, width: int) -> float:
        """What jumprelu measures compared values in: the norm that a row has on average.

        ``sqrt(d)`` for each snapshot; a shared gate compares ``S`` of them added up. A fixed scale would mean
        something else for every width and number of snapshots: where ``c f n`` is large, tanh is flat and the
        penalty has no gradient.
        """
        return math.sqrt(width) * (snapshots if self.gate == "shared" else 1)

    def penalty_share(self, step: int) -> float:
        """Share of the penalty's weight at a step, the first of which is 0."""
        up = self.penalty_warm_up * self.steps
        return min(1.0, (step + 1) / up) if up else 1.0

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step, the first of which is 0: up, level, down towards 0."""
        up, down = self.warm_up * self.steps, self.decay * self.steps
        rise = (step + 1) / up if up else 1.0
        fall = (self.steps - step) / down if down else 1.0
        return min(1.0, rise, fall)
