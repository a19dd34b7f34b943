"""Unigram and bigram distributions of a text, and the reduction that compares predictions with them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from analyzers.reductions import Batch, real

_POSITIONS = 64
PRIORS = tuple(2.0**power for power in range(17))
"""Strengths of the prior from which the one of greatest likelihood is taken."""


class Bigrams:
    """Counts of the pairs of neighbouring tokens of a text, and the distributions that follow from them.

    With ``c(u, v)`` the number of pairs, ``q1(v) = sum_u c(u, v) / N`` is the unigram distribution of
    predicted tokens, not smoothed. The bigram distribution at a position where v* follows u leaves that pair
    itself out, so that it does not know the answer, and is smoothed by q1 with the weight ``prior``:

        q2(v) = (c(u, v) - [v = v*] + prior q1(v)) / (c(u) - 1 + prior)

    (the Dirichlet smoothing of MacKay and Peto 1995). ``prior`` absent: the value of :data:`PRIORS` under
    which the text's own tokens are likeliest, ``sum ln q2(v*)``.

    Raises:
        ValueError: the text has no two neighbouring tokens, or one beyond the vocabulary.
    """

    def __init__(
        self,
        tokens: Int64[Tensor, "pairs 2"],
        vocabulary: int,
        prior: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not len(tokens):
            raise ValueError("the text has no two neighbouring tokens")
        if int(tokens.max()) >= vocabulary:
            raise ValueError(f"token {int(tokens.max())} is beyond a vocabulary of {vocabulary}")
        pairs, counts = torch.unique(tokens, dim=0, return_counts=True)
        before, after = pairs.T
        total = torch.bincount(tokens[:, 0], minlength=vocabulary).double()
        unigram = torch.bincount(tokens[:, 1], minlength=vocabulary).double() / len(tokens)
        if prior is None:
            once = counts.double() - 1
            likelihood = [
                (counts * ((once + each * unigram[after]) / (total[before] - 1 + each)).log()).sum()
                for each in PRIORS
            ]
            prior = PRIORS[int(torch.stack(likelihood).argmax())]
        self.prior = prior
        self.unigram = unigram.to(device)
        self.total = total.to(device)
        self._after, self._counts = after.to(device), counts.double().to(device)
        self._number = torch.bincount(before, minlength=vocabulary).to(device)  # different followers of u
        self._start = self._number.cumsum(0) - self._number
        self._negentropy = torch.special.entr(self.unigram).sum().neg()

    @classmethod
    def of_probe(cls, probe: Batch, vocabulary: int, prior: float | None, device: torch.device) -> "Bigrams":
        """Those of the tokens of a probe; padding is left out."""
        mask = real(probe)
        both = mask[:, 1:] & mask[:, :-1]
        tokens = probe.tokens.cpu()
        return cls(torch.stack([tokens[:, :-1][both], tokens[:, 1:][both]], dim=1), vocabulary, prior, device)

    def divergences(
        self,
        logits: Float[Tensor, "n vocabulary"],
        before: Int64[Tensor, "n"],
        after: Int64[Tensor, "n"],
    ) -> tuple[Float64[Tensor, "n"], Float64[Tensor, "n"]]:
        """``KL(q1 || p)`` and ``KL(q2 || p)`` in nats where the token ``after`` follows ``before``.

        p is the softmax of each row of logits. Of the bigram only followers that were seen are visited: all
        others have ``prior q1 / (c(u) - 1 + prior)``, whose part of the sums is known from q1.
        """
        log_z = logits.logsumexp(dim=1).double()
        expected = (logits @ self.unigram.to(logits.dtype)).double()
        number = self._number[before]
        position = torch.arange(len(before), device=logits.device).repeat_interleave(number)
        place = torch.arange(len(position), device=logits.device)
        place = place - (number.cumsum(0) - number)[position] + self._start[before][position]
        seen = self._after[place]
        size = self.total[before] - 1 + self.prior
        weight = self.prior / size
        base = weight[position] * self.unigram[seen]
        own = (seen == after[position]).double()
        bigram = (self._counts[place] - own) / size[position] + base
        gain = torch.xlogy(bigram, bigram) - torch.xlogy(base, base)
        gain = gain - (bigram - base) * logits[position, seen].double()
        unseen = torch.xlogy(weight, weight) + weight * (self._negentropy - expected)
        return self._negentropy + log_z - expected, (unseen + log_z).index_add(0, position, gain)


class NgramState:
    """Sums of both divergences over the positions that predict a token; padding does not count.

    The distributions are those of the whole probe, whichever of its sequences the state sees.
    """

    knows_padding = True
    widens = True

    def __init__(self, prior: float | None) -> None:
        self.n = 0
        self.unigram = 0.0
        self.bigram = 0.0
        self._prior = prior
        self._reference: Bigrams | None = None

    def update(self, values: Float[Tensor, "batch time vocabulary"], batch: Batch) -> None:
        """Take the logits of a batch in, a few positions at a time: no second copy of all logits arises.

        Raises:
            ValueError: the batch does not say which probe it is of.
        """
        kept = real(batch)
        for logits, tokens, mask in zip(values, batch.tokens, kept, strict=True):
            (places,) = mask.nonzero(as_tuple=True)
            if len(places) < 2:
                continue
            first, last = int(places[0]), int(places[-1])
            reference = self._known(batch, values)
            pairs = torch.stack([tokens[first:last], tokens[first + 1 : last + 1]], dim=1).to(values.device)
            for part, pair in zip(
                torch.split(logits[first:last], _POSITIONS), torch.split(pairs, _POSITIONS), strict=True
            ):
                wide = part.to(torch.promote_types(part.dtype, torch.float32))
                unigram, bigram = reference.divergences(wide, pair[:, 0], pair[:, 1])
                self.unigram += float(unigram.sum())
                self.bigram += float(bigram.sum())
                self.n += len(pair)

    def _known(self, batch: Batch, values: Tensor) -> Bigrams:
        if self._reference is None:
            if batch.probe is None:
                raise ValueError("the batch does not say which probe it is of, and its n-grams are not known")
            self._reference = Bigrams.of_probe(batch.probe, values.shape[2], self._prior, values.device)
        return self._reference

    def merge(self, other: "NgramState") -> None:
        """Take in the sums of other sequences of the same probe."""
        self.n += other.n
        self.unigram += other.unigram
        self.bigram += other.bigram


@dataclass(frozen=True)
class NgramSpec:
    """Divergence of the model's predictions from the probe's unigram and bigram distributions."""

    prior: float | None = None
    site: str = "logits"
    layer: int | None = None

    def create(self) -> NgramState:
        """An empty state."""
        return NgramState(self.prior)
