"""Latent scaling: how strongly a feature is present in each snapshot's activations, in closed form.

The decoder's norm at a snapshot may be smaller than the feature is there: a penalty on norms shrinks it, to
zero at worst ("complete shrinkage", arXiv 2504.02922). Latent scaling asks the data instead. For feature i
with activations ``f_i`` over the tokens and one direction ``d_i``, the factor that brings ``f_i d_i`` nearest
to a target ``Y_s`` in least squares over the pool is

    beta_i^s = d_i' (Y_s' f_i) / (||f_i||^2 ||d_i||^2).

``d_i`` is the decoder row at the snapshot where its norm is largest (the first of equals), and ``f_i`` the
activation that this snapshot's decoder sees: the same for all s, so that beta is comparable between them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from analyzers.crosscoder.active import Active, Reader, decode
from analyzers.crosscoder.weights import Crosscoder

_ELEMENTS = 1 << 23  # of activations at a time


@dataclass(frozen=True)
class LatentScaling:
    """Latent scaling of every feature at every snapshot; NaN for a feature that is never active.

    Attributes:
        beta: the target is what the other features leave over, ``Y_s = a^s - ahat^s + f_i^s d_i^s``: the
            residual with the feature's own part put back. 1: present as strongly as the decoder says at the
            reference snapshot; 0: not present, or another feature has taken its part; below 0: opposed.
        beta_activation: the target is the activation less the decoder's bias, ``Y_s = a^s - b^s``. Also
            counts what other features write along ``d_i`` at the tokens where feature i is active:
            near-copies of it ("latent decoupling") and everything correlated with it.
        reference: snapshot whose decoder row is ``d_i``.
    """

    beta: Float64[np.ndarray, "latents snapshots"]
    beta_activation: Float64[np.ndarray, "latents snapshots"]
    reference: Int64[np.ndarray, "latents"]


class ScalingSums:
    """The sums of latent scaling over the pool. Memory is of latents x snapshots and latents x width."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        crosscoder = reader.crosscoder
        shape, device = (crosscoder.latents, crosscoder.snapshots), crosscoder.decoder.device
        self._directions = reader.directions()
        self._left = torch.zeros(shape, dtype=torch.float64, device=device)
        self._whole = torch.zeros_like(self._left)
        # sum over tokens of f_i f_i^s; at the reference snapshot it is ||f_i||^2.
        self._square = torch.zeros_like(self._left)

    def update(
        self,
        pairs: Active,
        rows: Float[Tensor, "batch inputs"],
        residual: Float[Tensor, "batch snapshots width"],
    ) -> None:
        """Take in tokens: their active pairs, scaled activations, and what their reconstruction leaves."""
        crosscoder = self.reader.crosscoder
        features = (rows - crosscoder.decoder_bias).view(residual.shape)
        if not len(pairs.feature):
            return
        # Pairs in order of latents: those of one latent are one bag, Y' f of it one weighted sum of rows.
        order = pairs.feature.argsort(stable=True)
        latents, counts = torch.unique_consecutive(pairs.feature[order], return_counts=True)
        starts, tokens, values = counts.cumsum(0) - counts, pairs.token[order], pairs.value[order]
        bags = torch.arange(len(latents), device=latents.device).repeat_interleave(counts)
        directions = self._directions[latents]
        for snapshot in range(crosscoder.snapshots):
            places = tokens * crosscoder.snapshots + snapshot
            for target, sums in ((residual, self._left), (features, self._whole)):
                weighted = torch.nn.functional.embedding_bag(
                    places,
                    target.view(-1, crosscoder.width),
                    starts,
                    mode="sum",
                    per_sample_weights=values,
                )
                sums[latents, snapshot] += (weighted * directions).sum(dim=1, dtype=torch.float64)
            products = values.double() * pairs.value_at(snapshot)[order].double()
            square = torch.zeros(len(latents), dtype=torch.float64, device=latents.device)
            self._square[latents, snapshot] += square.index_add_(0, bags, products)

    def finish(self) -> LatentScaling:
        """The factors of all that was taken in."""
        crosscoder, reference = self.reader.crosscoder, self.reader.reference
        directions = self._directions.double()
        own = torch.empty_like(self._left)
        for snapshot in range(crosscoder.snapshots):
            decoder = crosscoder.decoder.view(crosscoder.latents, crosscoder.snapshots, -1)[:, snapshot]
            own[:, snapshot] = (decoder * directions).sum(dim=1)
        size = self._square.gather(1, reference[:, None]) * directions.square().sum(dim=1, keepdim=True)
        size = torch.where(size > 0, size, torch.nan)
        beta = (self._left + self._square * own) / size
        return LatentScaling(beta.cpu().numpy(), (self._whole / size).cpu().numpy(), reference.cpu().numpy())


@torch.no_grad()
def latent_scaling(crosscoder: Crosscoder, batches: Iterable[Float[Tensor, "_ inputs"]]) -> LatentScaling:
    """Latent scaling over a pool of scaled activations.

    :func:`analyzers.crosscoder.evaluation.evaluate` gives the same from its own pass.
    """
    reader = Reader(crosscoder)
    sums = ScalingSums(reader)
    for batch in batches:
        for rows in blocks(crosscoder, batch):
            pairs = reader.read(rows)
            sums.update(pairs, rows, residuals(crosscoder, pairs, rows))
    return sums.finish()


def blocks(
    crosscoder: Crosscoder, batch: Float[Tensor, "batch inputs"]
) -> Sequence[Float[Tensor, "_ inputs"]]:
    """The tokens of a batch on the crosscoder's device, so few at a time that copies of them stay small."""
    return torch.split(batch.to(crosscoder.decoder.device), max(1, _ELEMENTS // batch.shape[1]))


def residuals(
    crosscoder: Crosscoder, pairs: Active, rows: Float[Tensor, "batch inputs"]
) -> Float[Tensor, "batch snapshots width"]:
    """``a^s - ahat^s`` of tokens whose active pairs are known."""
    left = (rows - crosscoder.decoder_bias).view(len(rows), crosscoder.snapshots, crosscoder.width)
    for snapshot in range(crosscoder.snapshots):
        left[:, snapshot] -= decode(pairs, crosscoder, snapshot)
    return left
