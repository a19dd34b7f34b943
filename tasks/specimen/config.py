"""What a specimen is: the size of its models, how they are trained, and when they are saved."""

import os
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tasks.specimen.grid import checkpoint_steps

# What may differ between two calls on one folder: none of it changes the numbers of a run.
_NOT_RECIPE = {"out", "seeds", "workers"}


class SpecimenConfig(BaseModel):
    """Runs ``seed0``, ``seed1``, ... of one small GPT-NeoX recipe. Frozen; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    out: Path = Field(
        description="folder that receives the runs, the probe and the description of the series"
    )
    seeds: int = Field(
        4, ge=1, le=1000, description="number of runs; run seedN takes weights and data order from seed N"
    )
    steps: int = Field(384, ge=1, description="optimiser updates per run")
    log_until: int = Field(64, ge=1, description="checkpoints at 0, 1, 2, 4, ... up to this step")
    every: int = Field(32, ge=1, description="steps between checkpoints after log_until")
    width: int = Field(128, ge=8, description="size of the residual stream")
    layers: int = Field(4, ge=1, description="number of transformer blocks")
    heads: int = Field(4, ge=1, description="attention heads per block; width / heads is a multiple of 8")
    vocabulary: int = Field(
        2048, ge=258, le=65536, description="tokens: 256 bytes, <|endoftext|>, and merges"
    )
    length: int = Field(128, ge=2, description="tokens per sequence")
    batch: int = Field(12, ge=1, description="sequences per optimiser update")
    lr: float = Field(2e-3, gt=0, description="peak learning rate of AdamW")
    warmup: int = Field(32, ge=0, description="steps of linear warm-up; a cosine to 10 % of lr follows")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, on matrices only")
    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="decay rates of AdamW's two moments, in [0, 1)"
    )
    grad_clip: float = Field(1.0, gt=0, description="largest global norm of the gradient")
    threads: int = Field(
        1,
        ge=1,
        description="threads per run; the bits of the weights depend on it, so it belongs to the recipe",
    )
    workers: int | None = Field(
        None, ge=1, description="runs trained at a time, one process each; by default CPU cores / threads"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.width % (8 * self.heads):
            raise ValueError(
                f"width {self.width} over {self.heads} heads: the size of a head must be a multiple of 8"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: both must lie in [0, 1)")
        return self

    @property
    def grid(self) -> list[int]:
        """Steps of the checkpoints of every run."""
        return checkpoint_steps(self.steps, self.log_until, self.every)

    @property
    def recipe(self) -> dict[str, Any]:
        """The fields that decide a run's numbers, as JSON values."""
        return self.model_dump(mode="json", exclude=_NOT_RECIPE)

    @property
    def processes(self) -> int:
        """How many runs are trained at a time."""
        cores = os.cpu_count() or 1
        return min(self.seeds, self.workers or max(1, cores // self.threads))

    def run_path(self, seed: int) -> Path:
        """Folder of the run with this seed: ``OUT/seedN``."""
        return self.out / f"seed{seed}"
