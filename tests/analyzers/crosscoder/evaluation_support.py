"""Crosscoders and pools made by hand, of which the right answers are known."""

import torch
from torch import Tensor

from analyzers.crosscoder.weights import Activation, Crosscoder, Gate


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_crosscoder(
    latents: int = 24,
    snapshots: int = 3,
    width: int = 5,
    seed: int = 0,
    gate: Gate = "shared",
    activation: Activation = "jumprelu",
) -> Crosscoder:
    """Random weights with thresholds, biases and ragged activity; latent 3 never fires, latent 4 is zero."""
    g = generator(seed)
    inputs = snapshots * width
    bias = torch.randn(latents, generator=g) * 0.3
    bias[3] = -1e6
    strength = torch.rand(latents, snapshots, 1, generator=g) + 0.1
    decoder = torch.randn(latents, snapshots, width, generator=g) * strength
    decoder[4] = 0
    return Crosscoder(
        torch.randn(latents, inputs, generator=g) / inputs**0.5,
        bias,
        decoder.reshape(latents, inputs),
        torch.randn(inputs, generator=g),
        torch.rand(latents, generator=g) * 2,
        torch.ones(snapshots),
        activation,
        gate,
    )


def orthonormal_crosscoder(strengths: Tensor, width: int) -> Crosscoder:
    """Latent i reads and writes channel i of all snapshots, with these norms; reads where it is strongest."""
    latents, snapshots = strengths.shape
    encoder, decoder = torch.zeros(2, latents, snapshots, width)
    for latent in range(latents):
        strongest = int(strengths[latent].argmax())
        encoder[latent, strongest, latent] = 1 / strengths[latent, strongest]
        decoder[latent, :, latent] = strengths[latent]
    return Crosscoder(
        encoder.flatten(1),
        torch.zeros(latents),
        decoder.flatten(1),
        torch.zeros(snapshots * width),
        torch.zeros(latents),
        torch.ones(snapshots),
        "relu",
    )


def sparse_features(tokens: int, latents: int, seed: int, share: float = 0.3) -> Tensor:
    """Features that are 0, or between 1 and 2 at a share of the tokens."""
    g = generator(seed)
    on = torch.rand(tokens, latents, generator=g) < share
    return on * (1 + torch.rand(tokens, latents, generator=g))
