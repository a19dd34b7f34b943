"""A reduction that hands chosen tokens' activations on as they come, and keeps none.

Which tokens they are depends on their place in the probe alone, so that the rows of two checkpoints belong
together (arXiv 2509.17196 trains crosscoders on such rows). Position 0 is left out there and here: it holds
the massive activations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from analyzers.base import ModelShape, PassAnalyzer, TokenSource
from analyzers.reductions import Batch, Spec
from analyzers.sample import priorities

Sink = Callable[[Float[np.ndarray, "n width"], Int64[np.ndarray, "n 3"]], None]
"""Takes activations, and (sequence, position, token id) of each, in the order of the probe."""


@dataclass(frozen=True)
class TokenChoice:
    """Tokens from position ``first`` on whose priority is at most ``limit``; None: all of those."""

    first: int = 1
    seed: int = 0
    limit: int | None = None

    def mask(self, index: Int64[Tensor, "batch"], time: int) -> Bool[Tensor, "batch time"]:
        """Where the chosen tokens of these sequences are."""
        sequence = index[:, None].expand(-1, time)
        position = torch.arange(time).expand_as(sequence)
        chosen = position >= self.first
        if self.limit is not None:
            chosen = chosen & (priorities(sequence, position, self.seed) <= self.limit)
        return chosen

    def tokens(self, tokens: Int64[Tensor, "sequences time"]) -> Int64[Tensor, "n 3"]:
        """(sequence, position, token id) of the chosen tokens of a whole probe, in its order."""
        return _listed(
            self.mask(torch.arange(len(tokens)), tokens.shape[1]), torch.arange(len(tokens)), tokens
        )


def _listed(
    chosen: Bool[Tensor, "batch time"], index: Int64[Tensor, "batch"], tokens: Int64[Tensor, "batch time"]
) -> Int64[Tensor, "n 3"]:
    row, position = chosen.nonzero(as_tuple=True)
    return torch.stack([index[row], position, tokens[row, position]], dim=1)


@lru_cache(maxsize=16)
def choose(sequences: int, length: int, count: int | None, seed: int = 0, first: int = 1) -> TokenChoice:
    """``count`` tokens of a probe, drawn uniformly without replacement by ``seed``; None: all.

    Raises:
        ValueError: the probe has fewer from position ``first`` on.
    """
    there = sequences * max(0, length - first)
    if there == 0 or (count is not None and count > there):
        raise ValueError(f"{count or 1:,} tokens are asked for, and there are {there:,}")
    if count is None:
        return TokenChoice(first, seed)
    sequence = torch.arange(sequences)[:, None].expand(-1, length - first)
    position = torch.arange(first, length).expand_as(sequence)
    numbers = priorities(sequence.flatten(), position.flatten(), seed)
    return TokenChoice(first, seed, int(numbers.kthvalue(count).values))


class HarvestState:
    """Counts what it handed on. A sink that fails is asked no more, so that the pass goes on for others."""

    def __init__(self, choice: TokenChoice, sink: Sink) -> None:
        self.choice, self.sink = choice, sink
        self.n = 0
        self._error: Exception | None = None

    def update(self, values: Float[Tensor, "batch time width"], batch: Batch) -> None:
        """Hand the chosen tokens of a batch on."""
        if self._error is not None:
            return
        chosen = self.choice.mask(batch.index, values.shape[1])
        taken = values[chosen.to(values.device)].cpu().numpy()
        try:
            self.sink(taken, _listed(chosen, batch.index, batch.tokens).numpy())
        except Exception as error:  # a full disk or an overflow must not take the others' pass away
            self._error = error
        self.n += len(taken)

    def merge(self, other: "HarvestState") -> None:
        """Take in what was handed on of other sequences."""
        self.n += other.n
        self._error = self._error or other._error

    def finish(self) -> int:
        """Number of tokens handed on.

        Raises:
            Exception: what the sink raised.
        """
        if self._error is not None:
            raise self._error
        return self.n


@dataclass(frozen=True)
class HarvestSpec:
    """Activations of the chosen tokens at a site, handed to ``sink`` batch by batch."""

    site: str
    layer: int | None
    choice: TokenChoice
    sink: Sink

    def create(self) -> HarvestState:
        """An empty state."""
        return HarvestState(self.choice, self.sink)


class Harvest(PassAnalyzer):
    """A reader of the one pass that measures nothing: it hands activations on.

    It reads the probe, or tokens of its own, which cost a pass of their own. It is not registered: what it
    gives is no row.
    """

    name, version, summary = "harvest", 1, "activations of chosen tokens, handed on"
    metrics = ()

    def __init__(self, spec: HarvestSpec, source: TokenSource | None = None) -> None:
        super().__init__()
        self.spec, self._source = spec, source

    @property
    def tokens(self) -> TokenSource | None:
        """Tokens of its own; None: the probe."""
        return self._source

    def needs(self, shape: ModelShape) -> list[Spec]:
        """The one reduction; none where the model has no such block, so that others keep their pass."""
        return [] if self.beyond(shape) else [self.spec]

    def beyond(self, shape: ModelShape) -> bool:
        """Whether the model has fewer blocks."""
        return self.spec.layer is not None and self.spec.layer >= shape.layers
