"""Active features of tokens, pair by pair: what contexts, labels, splices and effects work on.

A crosscoder's encoder reads all snapshots of a token at once. A model sees its own snapshot only. So features
are found once, from the rows of a pool, and decoded for one snapshot at a time.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from analyzers.crosscoder.pairs import PairReader
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
    """

    token: Int64[Tensor, "pairs"]
    feature: Int64[Tensor, "pairs"]
    value: Float[Tensor, "pairs"]
    tokens: int
    latents: int

    def at(self, crosscoder: Crosscoder, snapshot: int) -> "Active":
        """The pairs that the decoder of one snapshot sees."""
        if crosscoder.gate == "shared":
            return self
        strengths = crosscoder.strengths()[self.feature, snapshot]
        return self.kept(self.value * strengths > crosscoder.threshold[self.feature])

    def kept(self, mask: Tensor) -> "Active":
        """Some of the pairs, of the same tokens."""
        return Active(self.token[mask], self.feature[mask], self.value[mask], self.tokens, self.latents)

    def counts(self) -> Int64[Tensor, "latents"]:
        """Tokens on which each feature is active."""
        return torch.bincount(self.feature, minlength=self.latents)


def find_active(crosscoder: Crosscoder, rows: Float[Tensor, "tokens inputs"], size: int = 1024) -> Active:
    """Active features of scaled rows, ``size`` tokens at a time: no more than ``size x latents`` is built.

    A latent counts as active behind a gate per snapshot if ``relu(pre_i) max_s n_is > threshold_i``.

    Raises:
        ValueError: a row is not finite.
    """
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("activations are not finite")
    reader = PairReader(crosscoder)  # what is active is decided there alone
    tokens, features, values = [], [], []
    for start in range(0, rows.shape[0], size):
        pairs = reader.read(rows[start : start + size])
        tokens.append(pairs.tokens + start)
        features.append(pairs.latents)
        values.append(pairs.values)
    if not tokens:
        none = torch.zeros(0, dtype=torch.int64)
        return Active(none, none, torch.zeros(0), 0, crosscoder.latents)
    return Active(
        torch.cat(tokens), torch.cat(features), torch.cat(values), rows.shape[0], crosscoder.latents
    )


def written(active: Active, crosscoder: Crosscoder, snapshot: int) -> Float[Tensor, "tokens width"]:
    """What the active features add to one snapshot's activations, without the bias, in the model's units.

    ``sum_i f_i W_dec,i^s / scale_s``.
    """
    seen = active.at(crosscoder, snapshot)
    sparse = torch.sparse_coo_tensor(
        torch.stack([seen.token, seen.feature]),
        seen.value,
        (seen.tokens, seen.latents),
        is_coalesced=True,
        check_invariants=True,
    )
    result: Tensor = torch.sparse.mm(sparse, decoder_of(crosscoder, snapshot))
    return result


def reconstructed(active: Active, crosscoder: Crosscoder, snapshot: int) -> Float[Tensor, "tokens width"]:
    """One snapshot's activations as the crosscoder gives them, in the model's units.

    ``(sum_i f_i W_dec,i^s + b_dec^s) / scale_s``.
    """
    bias = crosscoder.decoder_bias.view(crosscoder.snapshots, crosscoder.width)[snapshot]
    return written(active, crosscoder, snapshot) + bias / crosscoder.scale[snapshot]


def decoder_of(crosscoder: Crosscoder, snapshot: int) -> Float[Tensor, "latents width"]:
    """W_dec of one snapshot in the model's units: divided by the snapshot's scale."""
    decoder = crosscoder.decoder.view(crosscoder.latents, crosscoder.snapshots, crosscoder.width)
    return decoder[:, snapshot] / crosscoder.scale[snapshot]
