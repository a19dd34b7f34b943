"""Latent scaling: how strong a feature is at every snapshot, by least squares on the activations."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyzers.crosscoder.kernels import Pairs, kernels_for, sum_by_latent
from analyzers.crosscoder.weights import Crosscoder

Target = Literal["activations", "own-share"]
"""What a feature is fitted to: all activations, or what no other feature explains."""


class LatentScaling:
    """The factor with which ``beta f_i d_i`` is nearest to the activations ``Y_s`` of a snapshot.

    ``beta_is = d_i' (Y_s' f_i) / (||f_i||^2 ||d_i||^2)`` (latent scaling, arXiv 2504.02922), in closed form
    from one pass. ``d_i`` is one direction for all snapshots: the decoder row at the snapshot where it is
    longest. So beta is 1 where the feature does what its decoder says there, and what a penalty did to the
    rows of other snapshots does not shrink it.

    ``Y_s`` are scaled activations less the decoder's bias (``activations``), or the reconstruction's error
    plus the feature's own part (``own-share``), which leaves out what correlated features explain.

    With a gate per snapshot ``f_i`` is the encoder's output where the gate is open at any snapshot: a gate
    that shuts at weak snapshots would hide what is asked for.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        target: Target = "activations",
        *,
        latents: Int[Tensor, "chosen"] | None = None,
    ) -> None:
        """Of all latents, or of some of them."""
        self.crosscoder, self.target = crosscoder, target
        self.latents = torch.arange(crosscoder.latents) if latents is None else latents
        strengths = crosscoder.strengths()[self.latents]
        decoder = crosscoder.decoder[self.latents].view(len(self.latents), crosscoder.snapshots, -1)
        peak = strengths.argmax(dim=1)
        self._directions = decoder[torch.arange(len(peak)), peak]
        self._kernels = kernels_for(crosscoder.decoder.device)
        self._products = torch.zeros(*strengths.shape, dtype=torch.float64)
        self._squares = torch.zeros(len(peak), dtype=torch.float64)

    def update(self, rows: Float[Tensor, "batch inputs"]) -> None:
        """Count scaled activations in."""
        crosscoder, snapshots = self.crosscoder, self.crosscoder.snapshots
        rows = rows.float()
        features = self._features(rows)
        pairs = Pairs.where(features[:, self.latents] > 0)
        values = features[:, self.latents][pairs.row, pairs.latent][:, None]
        target = rows - crosscoder.decoder_bias
        if self.target == "own-share":
            target = rows - crosscoder.reconstruct(rows)
        tiled = self._directions.repeat(1, snapshots)
        each = self._kernels.feature_gradient(pairs, target, tiled, snapshots) * values
        if self.target == "own-share":
            each += values * self._own(pairs, values)
        self._products += sum_by_latent(pairs, each).double()
        self._squares += sum_by_latent(pairs, values.square())[:, 0].double()

    def _features(self, rows: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch latents"]:
        before = self.crosscoder.before_gate(rows)
        strengths = self.crosscoder.strengths()
        factor = strengths.sum(dim=1) if self.crosscoder.gate == "shared" else strengths.max(dim=1).values
        return before * (before * factor > self.crosscoder.threshold)

    def _own(self, pairs: Pairs, values: Float[Tensor, "pairs one"]) -> Float[Tensor, "pairs snapshots"]:
        """``<d_i, f_bis d_is>`` of each pair, with the feature as the decoder of each snapshot sees it."""
        crosscoder = self.crosscoder
        decoder = crosscoder.decoder[self.latents].view(len(self.latents), crosscoder.snapshots, -1)
        along = torch.einsum("isd,id->is", decoder, self._directions)[pairs.latent]
        if crosscoder.gate == "shared":
            return values * along
        chosen = self.latents[pairs.latent]
        open_gate = values * crosscoder.strengths()[chosen] > crosscoder.threshold[chosen, None]
        return values * along * open_gate

    def result(self) -> Float[Tensor, "chosen snapshots"]:
        """Beta of every latent at every snapshot; nan where a latent was never active or has no decoder."""
        norms = self._directions.double().square().sum(dim=1)
        bottom = self._squares * norms
        return (self._products / torch.where(bottom > 0, bottom, torch.nan)[:, None]).float()
