"""Penalties on active latents, and the straight-through gradient of thresholds; with their gradients by hand.

A penalty sees features ``f`` of the active pairs and ``factors`` n, the decoder norms of each gate. It
answers with its value, its gradient to the features and its gradient to the factors.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from analyzers.crosscoder.gates import GatedPairs
from analyzers.crosscoder.kernels import sum_by_latent


@dataclass(frozen=True)
class Penalty:
    """Value of a penalty and its gradients."""

    value: Tensor
    features: Float[Tensor, "pairs groups"]
    factors: Float[Tensor, "latents groups"]


def l1(active: GatedPairs, factors: Float[Tensor, "latents groups"], weight: float) -> Penalty:
    """``weight * mean_b sum_i f_bi n_i``: the L1 of features, weighted by decoder norms."""
    scale = weight / active.pairs.batch
    sums = sum_by_latent(active.pairs, active.values)
    return Penalty((sums * factors).sum() * scale, factors[active.pairs.latent] * scale, sums * scale)


def tanh_quadratic(
    active: GatedPairs,
    factors: Float[Tensor, "latents groups"],
    weight: float,
    scale: float,
    frequency: float,
) -> Penalty:
    """``weight * sum_ig p_ig (1 + p_ig / s0)`` with ``p_ig = mean_b tanh(c f_big n_ig)``.

    ``p`` is a smooth frequency of activity; beyond ``s0`` the penalty grows with its square.
    (arXiv 2509.17196, from its public code.)
    """
    pairs, values = active.pairs, active.values
    norm = factors[pairs.latent]
    tanh = torch.tanh(scale * values * norm)
    p = sum_by_latent(pairs, tanh) / pairs.batch
    outer = weight * (1 + 2 * p / frequency)
    # Of one pair: d tanh(c f n) = c (1 - tanh^2) (n df + f dn).
    slope = outer[pairs.latent] * (1 - tanh.square()) * (scale / pairs.batch)
    return Penalty(
        weight * (p * (1 + p / frequency)).sum(), slope * norm, sum_by_latent(pairs, slope * values)
    )


def log_threshold_gradient(
    active: GatedPairs,
    factors: Float[Tensor, "latents groups"],
    threshold: Float[Tensor, "latents"],
    features: Float[Tensor, "pairs groups"],
    bandwidth: float,
) -> Float[Tensor, "latents"]:
    """Straight-through gradient to the logarithm of the thresholds, from the gradient to the features.

    ``f = before * H(before n - theta)``; the step's derivative is a rectangle of unit area and width
    ``bandwidth``, so that ``df/d log theta = -theta before / bandwidth`` where ``|before n - theta|`` is
    less than half the width (after arXiv 2407.14435, eq. 11).
    """
    pairs = active.pairs
    distance = active.before[:, None] * factors[pairs.latent] - threshold[pairs.latent, None]
    inside = distance.abs() < bandwidth / 2
    each = (features * inside).sum(dim=1) * active.before
    return -threshold / bandwidth * sum_by_latent(pairs, each[:, None])[:, 0]


def through_norms(
    decoder: Float[Tensor, "latents inputs"],
    strengths: Float[Tensor, "latents snapshots"],
    gradient: Float[Tensor, "latents groups"],
    out: Float[Tensor, "latents inputs"],
) -> None:
    """Add to ``out`` a gradient to decoder norms (or to their sum), as one to the decoder: along its rows.

    A norm of 0 has the gradient 0.
    """
    latents, snapshots = strengths.shape
    along = torch.where(strengths > 0, gradient / strengths, 0.0)
    out.view(latents, snapshots, -1).addcmul_(decoder.view(latents, snapshots, -1), along[:, :, None])
