"""What a worker is told: which analyzers, on which probe, in which dtype, into which root."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from analyzers.base import Analyzer
from analyzers.registry import find
from storage.probe import ProbeConfig

HarvestMode = Literal["activations", "unembedding", "embedding"]
"""What the rows of a pool are: activations of tokens, or rows of W_U or W_E."""
SITES_OF_BLOCKS = ("resid_post", "attn_out", "mlp_out")
SCRATCH = "ONTOGENY_SCRATCH"
"""Environment variable that names the folder under which downloads lie."""
SNAPSHOTS = 32
"""Snapshots of a run where no steps are named, at most."""


class HarvestJob(BaseModel):
    """Which pool is filled, from which checkpoints (by label), within how many bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: HarvestMode
    site: str
    layer: int | None
    tokens: int | None
    seed: int
    probe: ProbeConfig | None
    chosen: frozenset[str]
    budget: int | None


class MeasureJob(BaseModel):
    """All that a worker needs to measure checkpoints of a series; small and serialisable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str
    probe: ProbeConfig
    analyzers: tuple[str, ...]
    parameters: dict[str, dict[str, Any]]
    dtype: str
    device: str
    batch: int
    loader: str | None = None
    harvest: HarvestJob | None = None
    devices: tuple[str, ...] = ()

    @property
    def on(self) -> tuple[str, ...]:
        """The devices that hold the model, each a replica of it: ``devices``, or ``device`` alone."""
        return self.devices or (self.device,)

    @property
    def scratch(self) -> Path:
        """Folder for downloads, on this machine's disk: under ONTOGENY_SCRATCH, else ROOT.

        If ROOT is a URL, ``ontogeny-scratch`` in the current folder.
        """
        base = self.root if "://" not in self.root else "ontogeny-scratch"
        return Path(os.environ.get(SCRATCH, base)) / "scratch"

    @property
    def kept(self) -> Path:
        """Folder for downloads that stay."""
        return self.scratch.with_name("downloads")

    def build(self) -> list[Analyzer]:
        """The analyzers with their parameters."""
        return [find(name)(self.parameters.get(name, {})) for name in self.analyzers]
