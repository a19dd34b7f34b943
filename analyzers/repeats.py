"""Random tokens that are repeated, and the reduction that looks at fixed distances of attention."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from analyzers.adapters import ATTENTION, Model
from analyzers.attention_blocks import QueryBlock
from analyzers.attention_reductions import band
from analyzers.base import ModelShape
from analyzers.reductions import Batch, ranks, real
from analyzers.sample import priorities


@dataclass(frozen=True)
class RepeatedTokens:
    """``sequences`` of ``[BOS] r_1..r_n r_1..r_n``: ``n = length`` different tokens, drawn uniformly.

    Ids are those below ``vocabulary`` (None: all of the model's) that are not special. The tokens of a
    sequence differ, so that each has one earlier place, but for BOS. They follow from the seed and the ids
    alone.
    """

    length: int
    sequences: int
    seed: int
    bos: bool = False
    vocabulary: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Number of sequences and their length."""
        return self.sequences, 2 * self.length + self.start

    @property
    def start(self) -> int:
        """Position of r_1."""
        return int(self.bos)

    def draw(self, shape: ModelShape) -> Int64[Tensor, "sequences length"]:
        """The tokens for a model.

        Raises:
            ValueError: its vocabulary is not known, too small, or has no BOS that is asked for.
        """
        known = shape.vocabulary if isinstance(shape, Model) else None
        if known is None:
            raise ValueError("the model's vocabulary is not known: its loader does not say it")
        size = known.size if self.vocabulary is None else self.vocabulary
        if size > known.size:
            raise ValueError(f"vocabulary is {size}, the model has {known.size} tokens")
        ids = torch.tensor([each for each in range(size) if each not in known.special])
        if len(ids) < self.length:
            raise ValueError(
                f"the vocabulary has {len(ids)} tokens, fewer than the {self.length} different ones"
            )
        if self.bos and known.bos is None:
            raise ValueError("bos is asked for, and the model's configuration names no BOS token")
        head = [] if not self.bos else [known.bos]
        drawn = []
        for sequence in range(self.sequences):
            # Not torch's generator: the tokens must be the same with every version.
            order = priorities(torch.full_like(ids, sequence), ids, self.seed).argsort()
            once = ids[order[: self.length]].tolist()
            drawn.append([*head, *once, *once])
        return torch.tensor(drawn, dtype=torch.int64)


@dataclass(frozen=True)
class Band:
    """``A[i, i - distance]`` for the rows ``first <= i < end`` of a sequence, from 0."""

    distance: int
    first: int
    end: int


@dataclass(frozen=True)
class BandsSpec:
    """Mean attention to keys at fixed distances, of a layer's heads."""

    layer: int | None
    bands: tuple[Band, ...]
    site: str = ATTENTION

    def create(self) -> "BandsState":
        """An empty state."""
        return BandsState(self.bands)


class BandsState:
    """Sums over rows of every head, per band. Rows of padding do not count; positions are of the sequence."""

    knows_padding = True

    def __init__(self, bands: tuple[Band, ...]) -> None:
        self.bands = bands
        self.rows = [0] * len(bands)
        self._sums: Tensor | None = None

    def update(self, values: QueryBlock, batch: Batch) -> None:
        """Take a block of rows in."""
        block = values
        queries = slice(block.query, block.query + block.maximum.shape[2])
        mask = real(batch)
        rank, kept = ranks(mask)[:, queries], mask[:, queries]
        sums = []
        for index, each in enumerate(self.bands):
            chosen = kept & (rank >= max(each.first, each.distance)) & (rank < each.end)
            self.rows[index] += int(chosen.sum())
            found = band(block, each.distance)
            where = chosen.to(found.device)[:, None]
            sums.append(torch.where(where, found, 0).sum((0, 2), dtype=torch.float64))
        self._add(torch.stack(sums))

    def _add(self, sums: Tensor) -> None:
        self._sums = sums if self._sums is None else self._sums + sums

    def merge(self, other: "BandsState") -> None:
        """Take in the sums of other sequences."""
        if other._sums is not None:
            self._add(other._sums if self._sums is None else other._sums.to(self._sums.device))
        self.rows = [mine + theirs for mine, theirs in zip(self.rows, other.rows, strict=True)]

    def mean(self, index: int) -> Float64[Tensor, "heads"]:
        """Mean of a band over its rows; NaN without rows."""
        return torch.zeros(0) if self._sums is None else self._sums[index].cpu() / self.rows[index]
