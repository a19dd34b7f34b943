"""Active features of tokens, pair by pair: what evaluation works on instead of dense features.

A crosscoder's encoder reads all snapshots of a token at once. A model sees its own snapshot only. So features
are found once, from the rows of a pool, and decoded for one snapshot at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from analyzers.crosscoder.weights import Crosscoder


@dataclass(frozen=True)
class Active:
    """Pairs of a token and a feature that is active on it, ordered by token and then by feature.

    Behind a gate per snapshot a pair is there if the gate is open at any snapshot; :meth:`at` keeps those
    that one snapshot's decoder sees.

    Attributes:
        token: row of the token among those that were encoded.
        feature: number of the latent.
        value: activation, above 0. Where a gate per snapshot is open it is the same at every snapshot.
        tokens: number of tokens that were encoded.
        latents: number of features of the crosscoder.
        open: whether a gate per snapshot lets the pair through there; None behind a shared gate: it does.
    """

    token: Int64[Tensor, "pairs"]
    feature: Int64[Tensor, "pairs"]
    value: Float[Tensor, "pairs"]
    tokens: int
    latents: int
    open: Bool[Tensor, "pairs snapshots"] | None = None

    @property
    def starts(self) -> Int64[Tensor, "tokens"]:
        """First pair of each token."""
        counts = torch.bincount(self.token, minlength=self.tokens)
        return counts.cumsum(0) - counts

    def value_at(self, snapshot: int) -> Float[Tensor, "pairs"]:
        """Features as the decoder of a snapshot sees them: 0 where a gate per snapshot is closed."""
        return self.value if self.open is None else self.value * self.open[:, snapshot]

    def at(self, snapshot: int) -> "Active":
        """The pairs that the decoder of one snapshot sees."""
        return self if self.open is None else self.kept(self.open[:, snapshot])

    def kept(self, mask: Bool[Tensor, "pairs"]) -> "Active":
        """Some of the pairs, of the same tokens."""
        there = None if self.open is None else self.open[mask]
        return Active(
            self.token[mask], self.feature[mask], self.value[mask], self.tokens, self.latents, there
        )

    def of_tokens(self, mask: Bool[Tensor, "tokens"]) -> "Active":
        """The pairs of some of the tokens, which are numbered anew."""
        mine = self.kept(mask[self.token])
        number = mask.cumsum(0)[mine.token] - 1
        return Active(number, mine.feature, mine.value, int(mask.sum()), self.latents, mine.open)

    def to(self, device: torch.device | str) -> "Active":
        """The same on a device."""
        there = None if self.open is None else self.open.to(device)
        pairs = (self.token.to(device), self.feature.to(device), self.value.to(device))
        return Active(*pairs, self.tokens, self.latents, there)

    def counts(self) -> Int64[Tensor, "latents"]:
        """Tokens on which each feature is active."""
        return torch.bincount(self.feature, minlength=self.latents)


def joined(parts: Sequence[Active]) -> Active:
    """The pairs of tokens that were encoded one part after another. At least one part is needed."""
    first, offset, tokens = parts[0], 0, []
    for part in parts:
        tokens.append(part.token + offset)
        offset += part.tokens
    return Active(
        torch.cat(tokens),
        torch.cat([part.feature for part in parts]),
        torch.cat([part.value for part in parts]),
        offset,
        first.latents,
        None if first.open is None else torch.cat([part.open for part in parts if part.open is not None]),
    )


class Reader:
    """Encodes scaled activations into active pairs, with what is constant computed once.

    The same numbers as :meth:`Crosscoder.encode_each`, without a tensor of batch x snapshots x latents.

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

    def read(self, rows: Float[Tensor, "batch inputs"]) -> Active:
        """The active pairs of scaled activations."""
        crosscoder = self.crosscoder
        before = crosscoder.before_gate(rows)
        token, feature = (before * self._weight > crosscoder.threshold).nonzero(as_tuple=True)
        value, each = before[token, feature], None
        if crosscoder.gate == "per-snapshot":
            each = value[:, None] * self.norms[feature] > crosscoder.threshold[feature, None]
        return Active(token, feature, value, len(rows), crosscoder.latents, each)

    def directions(self) -> Float[Tensor, "latents width"]:
        """Each latent's decoder at its reference snapshot."""
        places = torch.arange(self.crosscoder.latents, device=self.reference.device)
        return _table(self.crosscoder)[places * self.crosscoder.snapshots + self.reference]


def find_active(crosscoder: Crosscoder, rows: Float[Tensor, "tokens inputs"], size: int = 1024) -> Active:
    """Active features of scaled rows, ``size`` tokens at a time: no more than ``size x latents`` is built.

    Raises:
        ValueError: a row is not finite.
    """
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("activations are not finite")
    reader = Reader(crosscoder)
    return joined([reader.read(part) for part in torch.split(rows, size)])


def decode(active: Active, crosscoder: Crosscoder, snapshot: int) -> Float[Tensor, "tokens width"]:
    """What the active features add to one snapshot's scaled activations: ``sum_i f_i W_dec,i^s``."""
    table = _table(crosscoder)
    return torch.nn.functional.embedding_bag(
        active.feature * crosscoder.snapshots + snapshot,
        table,
        active.starts,
        mode="sum",
        per_sample_weights=active.value_at(snapshot).to(table.dtype),
    )


def written(active: Active, crosscoder: Crosscoder, snapshot: int) -> Float[Tensor, "tokens width"]:
    """The same in the model's units, without the bias: ``sum_i f_i W_dec,i^s / scale_s``."""
    return decode(active, crosscoder, snapshot) / crosscoder.scale[snapshot]


def reconstructed(active: Active, crosscoder: Crosscoder, snapshot: int) -> Float[Tensor, "tokens width"]:
    """One snapshot's activations as the crosscoder gives them, in the model's units.

    ``(sum_i f_i W_dec,i^s + b_dec^s) / scale_s``.
    """
    bias = crosscoder.decoder_bias.view(crosscoder.snapshots, crosscoder.width)[snapshot]
    return (decode(active, crosscoder, snapshot) + bias) / crosscoder.scale[snapshot]


def decoder_of(crosscoder: Crosscoder, snapshot: int) -> Float[Tensor, "latents width"]:
    """W_dec of one snapshot in the model's units: divided by the snapshot's scale."""
    decoder = crosscoder.decoder.view(crosscoder.latents, crosscoder.snapshots, crosscoder.width)
    return decoder[:, snapshot] / crosscoder.scale[snapshot]


def _table(crosscoder: Crosscoder) -> Float[Tensor, "rows width"]:
    """One row for every latent and snapshot."""
    return crosscoder.decoder.view(-1, crosscoder.width)
