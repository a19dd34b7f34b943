"""Which latents are active on which rows: the gates of training.

``before`` is ``relu(encoder x + encoder_bias)`` and ``factors`` has one column per group: the sum of a
latent's decoder norms for a shared gate, its norm at each snapshot for a gate per snapshot. What is compared
is ``before_bi * factor_ig``. No tensor has a number for every row, latent and snapshot: groups pass in turn.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyzers.crosscoder.kernels import Pairs
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
    """The ``count`` largest positive values in any order, fewer if there are fewer.

    A sample says from where on to look; the answer is exact whatever the sample says.
    """
    if values.shape[0] > 4 * _SAMPLES:
        sample = values[:: values.shape[0] // _SAMPLES]
        rank = int(1.3 * count * sample.shape[0] / values.shape[0]) + 20
        if rank < sample.shape[0]:
            from_here = sample.topk(rank, sorted=False).values.min()
            found = values[values >= from_here]
            if found.shape[0] >= count:
                values = found
    values = values[values > 0]
    return values.topk(count, sorted=False).values if values.shape[0] > count else values


def batch_top(
    before: Float[Tensor, "batch latents"],
    factors: Float[Tensor, "latents groups"],
    count: int,
    shards: Shards,
) -> GatedPairs:
    """The ``count`` largest positive ``before * factor`` of the batch, all groups together.

    Values equal to the smallest kept one are kept too, so the order of latents decides nothing.
    """
    kept = before.new_zeros(0)
    for factor in factors.T:
        compared = before * factor
        if kept.shape[0] == count:
            compared = compared[compared > kept.min()]
        kept = largest(torch.cat([kept, compared.flatten()]), count)
    if shards.count > 1:
        # Every process sends equally many; zeros stand for none.
        padded = torch.nn.functional.pad(kept, (0, count - kept.shape[0]))
        kept = largest(shards.joined(padded), count)
    if not kept.shape[0]:
        nothing = Pairs.where(torch.zeros_like(before, dtype=torch.bool))
        return GatedPairs(
            nothing, before.new_zeros(0), torch.zeros(0, factors.shape[1], dtype=torch.bool).to(before.device)
        )
    cut = kept.min()
    # The largest factor decides first whether a pair is active anywhere.
    pairs = Pairs.where(before * factors.max(dim=1).values >= cut)
    here = before[pairs.row, pairs.latent]
    return GatedPairs(pairs, here, here[:, None] * factors[pairs.latent] >= cut, float(cut))


def above(
    before: Float[Tensor, "batch latents"],
    factors: Float[Tensor, "latents groups"],
    threshold: Float[Tensor, "latents"],
    bandwidth: float = 0.0,
) -> GatedPairs:
    """The pairs whose ``before * factor`` exceeds the latent's threshold in a group.

    With a bandwidth also those that are less than half of it below, with a closed gate: the threshold's
    gradient needs them.
    """
    compared = before * factors.max(dim=1).values
    near = (compared > threshold - bandwidth / 2) & (before > 0)
    pairs = Pairs.where(near)
    here = before[pairs.row, pairs.latent]
    return GatedPairs(pairs, here, here[:, None] * factors[pairs.latent] > threshold[pairs.latent, None])


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
