"""Configuration of crosscoders: the section ``[crosscoder]`` of a series file."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from analyzers.crosscoder.lifecycle import LifecycleSettings
from analyzers.crosscoder.settings import TrainOptions
from storage.probe import ProbeConfig
from storage.series import StepSelection
from tasks.job import SITES_OF_BLOCKS, SNAPSHOTS, HarvestMode


class CrosscoderTraining(TrainOptions):
    """Size, length and seeds of the training, and its options (docs/crosscoder.md)."""

    latents: Annotated[
        int | None, Field(ge=1, description="latents of the dictionary; absent: 16 for each channel")
    ] = None
    steps: Annotated[int, Field(ge=1, description="steps of the optimiser; the schedule ends with them")] = (
        20_000
    )
    batch: Annotated[int, Field(ge=1, description="tokens of a step, those left out included")] = 2048
    seeds: Annotated[
        int, Field(ge=1, description="crosscoders to train, from `seed` on; 3 or more give a stability")
    ] = 1
    held_out: Annotated[
        int,
        Field(
            ge=0,
            description="every so many-th sequence (vocabulary item) is left out of training and judges it; "
            "0: none",
        ),
    ] = 20
    save_minutes: Annotated[
        float, Field(ge=0, description="minutes between states on disk from which a killed training goes on")
    ] = 5.0

    @model_validator(mode="after")
    def _enough_latents(self) -> "CrosscoderTraining":
        if self.activation == "batch-topk" and self.latents is not None and self.k > self.latents:
            raise ValueError(f"k is {self.k}, more than the {self.latents} latents")
        if self.held_out == 1:
            raise ValueError("held_out 1 leaves nothing to train on")
        return self


class CrosscoderConfig(BaseModel):
    """The pool of activations that a crosscoder is trained on (docs/harvest.md), and its training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    harvest: Annotated[
        bool,
        Field(
            description="whether measuring fills the pool, and a study trains; `measure --harvest` says yes"
        ),
    ] = False
    mode: Annotated[
        HarvestMode,
        Field(description="rows of the pool: activations of tokens, or rows of W_U or W_E (no forward pass)"),
    ] = "activations"
    site: Annotated[
        Literal["resid_post", "attn_out", "mlp_out", "embedding", "final_norm"],
        Field(description="site whose activations are kept"),
    ] = "resid_post"
    layer: Annotated[
        int | None, Field(description="block, from 0; absent: number of blocks // 2, the middle", ge=0)
    ] = None
    tokens: Annotated[
        int | None,
        Field(
            description="tokens, drawn uniformly from those after position 0, or from the vocabulary; "
            "absent: all",
            gt=0,
        ),
    ] = None
    seed: Annotated[int, Field(description="which tokens are drawn")] = 0
    steps: Annotated[
        str | None,
        Field(
            description="snapshots, written as measure.steps, of all steps listed; absent: at most "
            f"{SNAPSHOTS} of each run, evenly over log(step + 1); what is not measured is not harvested"
        ),
    ] = None
    runs: Annotated[
        tuple[str, ...] | None,
        Field(description="runs that are harvested, each into a pool of its own; absent: all", min_length=1),
    ] = None
    probe: Annotated[
        ProbeConfig | None,
        Field(
            description="text of the pool where it is not that of measuring, as [probe]; a pass of its own"
        ),
    ] = None

    train: CrosscoderTraining = CrosscoderTraining()
    lifecycle: LifecycleSettings = LifecycleSettings()
    contexts: Annotated[int, Field(ge=1, description="contexts that are kept of each feature")] = 10
    splice: Annotated[
        bool | None,
        Field(
            description="whether the loss with spliced reconstructions is measured; absent: where no "
            "checkpoint must be downloaded for it"
        ),
    ] = None
    splice_sequences: Annotated[int, Field(ge=1, description="sequences that are spliced, at most")] = 32
    effects: Annotated[
        bool, Field(description="whether indirect effects on a contrast task are computed; `--effects`")
    ] = False
    pairs: Annotated[
        str | None,
        Field(description="JSON lines with the contrasts; absent: subject-verb agreement"),
    ] = None

    @field_validator("steps")
    @classmethod
    def _steps(cls, steps: str | None) -> str | None:
        if steps is not None:
            StepSelection.parse(steps)
        return steps

    @model_validator(mode="after")
    def _layer_of_blocks(self) -> "CrosscoderConfig":
        if self.layer is not None and self.site not in SITES_OF_BLOCKS:
            raise ValueError(f"layer {self.layer} is given, and site {self.site!r} is in no block")
        return self
