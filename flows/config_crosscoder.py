"""Configuration of crosscoders: the section ``[crosscoder]`` of a series file."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from storage.probe import ProbeConfig
from storage.series import StepSelection
from tasks.job import SITES_OF_BLOCKS, SNAPSHOTS, HarvestMode


class CrosscoderConfig(BaseModel):
    """The pool of activations that a crosscoder is trained on (docs/harvest.md)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    harvest: Annotated[
        bool, Field(description="whether measuring fills the pool; `measure --harvest` says yes")
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
