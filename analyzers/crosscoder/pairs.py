"""The active (token, latent) pairs of a crosscoder: what evaluation works on instead of dense features."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from analyzers.crosscoder.weights import Crosscoder


@dataclass(frozen=True)
class ActivePairs:
    """The latents that are active at some snapshot, token by token, in order of tokens and latents.

    Attributes:
        tokens: token of each pair, from 0, ascending.
        latents: latent of each pair.
        values: ``relu(pre)`` of each pair, above 0.
        starts: first pair of each token.
        open: whether a gate per snapshot lets the pair through there; None behind a shared gate: it does.
    """

    tokens: Int64[Tensor, "pairs"]
    latents: Int64[Tensor, "pairs"]
    values: Float[Tensor, "pairs"]
    starts: Int64[Tensor, "batch"]
    open: Bool[Tensor, "pairs snapshots"] | None

    def at(self, snapshot: int) -> Float[Tensor, "pairs"]:
        """Features as the decoder of a snapshot sees them."""
        return self.values if self.open is None else self.values * self.open[:, snapshot]


class PairReader:
    """Encodes scaled activations into active pairs, and decodes those, with what is constant computed once.

    The same numbers as :meth:`Crosscoder.encode_each` and :meth:`Crosscoder.reconstruct`, without a tensor of
    batch x snapshots x latents: one product encodes, a gather over the pairs decodes.

    Attributes:
        reference: snapshot at which each latent's decoder has its largest norm (the first of equals).
    """

    def __init__(self, crosscoder: Crosscoder) -> None:
        self.crosscoder = crosscoder
        self.norms: Float[Tensor, "latents snapshots"] = crosscoder.strengths()
        self.reference: Int64[Tensor, latents] = self.norms.argmax(dim=1)
        # Behind a gate per snapshot a latent is active somewhere if it is where its norm is largest.
        shared = crosscoder.gate == "shared"
        self._weight = self.norms.sum(dim=1) if shared else self.norms.amax(dim=1)
        self._table = crosscoder.decoder.reshape(-1, crosscoder.width)

    def read(self, rows: Float[Tensor, "batch inputs"]) -> ActivePairs:
        """The active pairs of scaled activations."""
        before = self.crosscoder.before_gate(rows)
        tokens, latents = (before * self._weight > self.crosscoder.threshold).nonzero(as_tuple=True)
        values = before[tokens, latents]
        counts = torch.bincount(tokens, minlength=len(rows))
        each = None
        if self.crosscoder.gate == "per-snapshot":
            each = values[:, None] * self.norms[latents] > self.crosscoder.threshold[latents, None]
        return ActivePairs(tokens, latents, values, counts.cumsum(0) - counts, each)

    def decode(self, pairs: ActivePairs, snapshot: int) -> Float[Tensor, "batch width"]:
        """Scaled activations of one snapshot, without the decoder's bias."""
        return torch.nn.functional.embedding_bag(
            pairs.latents * self.crosscoder.snapshots + snapshot,
            self._table,
            pairs.starts,
            mode="sum",
            per_sample_weights=pairs.at(snapshot).to(self._table.dtype),
        )

    def directions(self) -> Float[Tensor, "latents width"]:
        """Each latent's decoder at its reference snapshot."""
        places = torch.arange(self.crosscoder.latents, device=self._table.device)
        return self._table[places * self.crosscoder.snapshots + self.reference]
