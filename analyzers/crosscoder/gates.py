"""Which latents are active on which rows: the gates of training.

``before`` is ``relu(encoder x + encoder_bias)`` and ``factors`` has one column per group: the sum of a
latent's decoder norms for a shared gate, its norm at each snapshot for a gate per snapshot. What is compared
is ``before_bi * factor_ig``. No tensor has a number for every row, latent and snapshot: groups pass in turn.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyzers.crosscoder.kernels import Kernels, Pairs
from analyzers.crosscoder.shards import Shards
from analyzers.crosscoder.weights import Gate

_SAMPLES = 1 << 15


@dataclass(frozen=True)
class GatedPairs:
    """Pairs that matter in a step, and what decode sees of them.

    Attributes:
        pairs: of row and latent, where a gate is open or near its threshold.
        before: the encoder's output.
        open: whether the gate of each group is open.
        cut: the smallest compared value that was kept, where a batch decides; None where none was.
    """

    pairs: Pairs
    before: Float[Tensor, "pairs"]
    open: Bool[Tensor, "pairs groups"]
    cut: float | None = None

    @property
    def values(self) -> Float[Tensor, "pairs groups"]:
        """Features: the encoder's output where the gate is open, else 0."""
        return self.before[:, None] * self.open


def factors_of(strengths: Float[Tensor, "latents snapshots"], gate: Gate) -> Float[Tensor, "latents groups"]:
    """What a gate multiplies the encoder's output with."""
    return strengths.sum(dim=1, keepdim=True) if gate == "shared" else strengths


def largest(values: Float[Tensor, "values"], count: int) -> Float[Tensor, "largest"]:
    """The ``count`` largest positive values in any order, fewer if there are fewer."""
    values = values[values > 0]
    return values.topk(count, sorted=False).values if values.shape[0] > count else values


def _about(
    before: Float[Tensor, "batch latents"], factors: Float[Tensor, "latents groups"], count: int
) -> float:
    """A value that somewhat more than ``count`` of ``before * factor`` are likely to exceed, from a sample.

    0 where the sample would be no smaller than the whole.
    """
    step = before.numel() // _SAMPLES
    if step < 4:
        return 0.0
    # An odd step passes through all latents, whatever their number is a multiple of.
    step |= 1
    sample = before.flatten()[::step]
    latent = torch.arange(0, before.numel(), step, device=before.device) % before.shape[1]
    compared = (sample[:, None] * factors[latent]).flatten()
    rank = int(1.3 * count / step) + 20
    return max(0.0, float(compared.topk(rank, sorted=False).values.min())) if rank < compared.numel() else 0.0


def batch_top(
    before: Float[Tensor, "batch latents"],
    factors: Float[Tensor, "latents groups"],
    count: int,
    shards: Shards,
    kernels: Kernels,
) -> GatedPairs:
    """The ``count`` largest positive ``before * factor`` of the batch, all groups together.

    Values equal to the smallest kept one are kept too, so the order of latents decides nothing. A sample says
    from where on to look; the answer is exact whatever the sample says.
    """
    most = factors.max(dim=1).values  # it decides whether a pair is active anywhere

    def over(least: float) -> tuple[Tensor, Tensor, Tensor]:
        row, latent = kernels.positive(before, most, torch.full_like(most, least))
        return row, latent, before[row, latent][:, None] * factors[latent]

    least = _about(before, factors, count)
    row, latent, compared = over(least)
    if least and int((compared >= least).sum()) < count:
        row, latent, compared = over(0.0)
    kept = largest(compared.flatten(), count)
    if shards.count > 1:
        # Every process sends equally many; zeros stand for none.
        padded = torch.nn.functional.pad(kept, (0, count - kept.shape[0]))
        kept = largest(shards.joined(padded), count)
    cut = float(kept.min()) if kept.shape[0] else None
    open_ = compared >= (math.inf if cut is None else cut)
    active = open_.any(dim=1)
    pairs = Pairs.of(row[active], latent[active], *before.shape)
    return GatedPairs(pairs, before[pairs.row, pairs.latent], open_[active], cut)


def above(
    before: Float[Tensor, "batch latents"],
    factors: Float[Tensor, "latents groups"],
    threshold: Float[Tensor, "latents"],
    kernels: Kernels,
    bandwidth: float = 0.0,
) -> GatedPairs:
    """The pairs whose ``before * factor`` exceeds the latent's threshold in a group.

    With a bandwidth also those that are at most half of it below, with a closed gate: the threshold's
    gradient needs them.
    """
    row, latent = kernels.positive(before, factors.max(dim=1).values, threshold - bandwidth / 2)
    pairs = Pairs.of(row, latent, *before.shape)
    here = before[row, latent]
    return GatedPairs(pairs, here, here[:, None] * factors[latent] > threshold[latent, None])


def dead_top(
    before: Float[Tensor, "batch latents"],
    dead: Bool[Tensor, "latents"],
    count: int,
    shards: Shards,
) -> GatedPairs:
    """For each row the ``count`` largest positive outputs of dead latents, for the auxiliary loss."""
    index = torch.nonzero(dead)[:, 0]
    ours = before[:, index]
    best = ours.topk(min(count, ours.shape[1]), dim=1, sorted=False).values
    if shards.count > 1:
        padded = torch.nn.functional.pad(best, (0, count - best.shape[1]))
        best = shards.joined(padded.T).T
    best = best.topk(min(count, best.shape[1]), dim=1, sorted=False).values
    cut = best.min(dim=1).values if best.shape[1] else before.new_zeros(before.shape[0])
    row, column = torch.nonzero((ours >= cut[:, None]) & (ours > 0), as_tuple=True)
    pairs = Pairs.of(row, index[column], *before.shape)
    here = before[pairs.row, pairs.latent]
    return GatedPairs(pairs, here, torch.ones_like(here, dtype=torch.bool)[:, None])
