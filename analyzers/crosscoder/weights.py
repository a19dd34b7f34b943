"""The weights of a crosscoder and what they compute, in plain torch: the definition all kernels must meet.

A pool gives, for every token, the activations of ``snapshots`` checkpoints at one site, side by side in one
row of ``snapshots * width`` numbers, each snapshot multiplied by its ``scale``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Gate = Literal["shared", "per-snapshot"]
"""Whether one number decides that a latent is active, or one for each snapshot."""

Activation = Literal["batch-topk", "jumprelu", "relu"]
"""What keeps latents few: the largest of a batch, a learned threshold, or an L1 penalty on a ReLU."""


@dataclass
class Crosscoder:
    """Encoder and decoder over ``snapshots`` checkpoints, one latent's snapshots side by side in one row.

    ``f(x) = gate(relu(encoder x + encoder_bias))`` and ``decoder' f + decoder_bias``, where ``x`` is scaled.
    The norms of decoder rows are not fixed: that of latent i at snapshot s, ``n_is``, is its strength there.

    With the gate ``shared`` latent i is active where ``relu(pre_i) sum_s n_is`` is above ``threshold_i``;
    with ``per-snapshot`` it is active at s where ``relu(pre_i) n_is`` is. ``threshold`` is 0 for ``relu``,
    learned for ``jumprelu``, and for ``batch-topk`` the running mean of the smallest value that training
    kept, the same for all latents.

    Attributes:
        encoder: rows are latents.
        encoder_bias: of each latent.
        decoder: rows are latents.
        decoder_bias: of each channel of each snapshot.
        threshold: of each latent, at least 0.
        scale: factor of each snapshot that brings the mean norm of its activations to ``sqrt(width)``.
        activation: how it was trained.
        gate: one for all snapshots, or each its own.
    """

    encoder: Float[Tensor, "latents inputs"]
    encoder_bias: Float[Tensor, "latents"]
    decoder: Float[Tensor, "latents inputs"]
    decoder_bias: Float[Tensor, "inputs"]
    threshold: Float[Tensor, "latents"]
    scale: Float[Tensor, "snapshots"]
    activation: Activation = "batch-topk"
    gate: Gate = "shared"

    @property
    def latents(self) -> int:
        """Number of latents."""
        return self.decoder.shape[0]

    @property
    def snapshots(self) -> int:
        """Number of checkpoints."""
        return self.scale.shape[0]

    @property
    def width(self) -> int:
        """Channels of one snapshot."""
        return self.decoder.shape[1] // self.snapshots

    def strengths(self) -> Float[Tensor, "latents snapshots"]:
        """Norm of every latent's decoder at every snapshot, in units of scaled activations."""
        return self.decoder.view(self.latents, self.snapshots, self.width).square().sum(dim=2).sqrt()

    def before_gate(self, rows: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch latents"]:
        """``relu(encoder x + encoder_bias)`` of scaled activations."""
        return torch.relu(torch.addmm(self.encoder_bias, rows, self.encoder.T))

    def encode(self, rows: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch latents"]:
        """Features of scaled activations behind the shared gate.

        Raises:
            ValueError: the gate is per snapshot; see :meth:`encode_each`.
        """
        if self.gate != "shared":
            raise ValueError("features of a gate per snapshot have one value for each snapshot")
        before = self.before_gate(rows)
        return before * (before * self.strengths().sum(dim=1) > self.threshold)

    def encode_each(self, rows: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch snapshots latents"]:
        """Features as every snapshot's decoder sees them; alike for all of them behind a shared gate.

        For evaluation on few rows: training never builds a tensor of this shape.
        """
        before = self.before_gate(rows)[:, None]
        if self.gate == "shared":
            return self.encode(rows)[:, None].expand(-1, self.snapshots, -1)
        return before * (before * self.strengths().T > self.threshold)

    def decode(self, features: Float[Tensor, "batch latents"]) -> Float[Tensor, "batch inputs"]:
        """Scaled activations of all snapshots from features behind a shared gate."""
        return torch.addmm(self.decoder_bias, features, self.decoder)

    def reconstruct(self, rows: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch inputs"]:
        """Scaled activations of all snapshots, encoded and decoded."""
        if self.gate == "shared":
            return self.decode(self.encode(rows))
        decoder = self.decoder.view(self.latents, self.snapshots, self.width)
        each = torch.einsum("bsm,msd->bsd", self.encode_each(rows), decoder)
        return each.flatten(1) + self.decoder_bias
