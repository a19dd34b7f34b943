"""Streaming, mergeable statistics of one pass. Analyzers that need the same one share it.

A :class:`Spec` says what is reduced and where; equal specs are one reduction. Its :class:`State` takes
activations batch by batch and merges with the state of other sequences, so that a pass can be split.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the model together; ``index`` numbers them within the probe.

    ``mask`` is False at padding, which lies before or after a sequence; None: there is none. ``domains``
    are the labels of the sequences, where the probe has them. ``probe`` is the whole that they are a part of.
    """

    tokens: Int64[Tensor, "batch time"]
    index: Int64[Tensor, "batch"]
    mask: Bool[Tensor, "batch time"] | None = None
    domains: tuple[str | None, ...] | None = None
    probe: "Batch | None" = None

    def part(self, rows: slice) -> "Batch":
        """Some of its sequences."""
        return Batch(
            self.tokens[rows],
            self.index[rows],
            None if self.mask is None else self.mask[rows],
            None if self.domains is None else self.domains[rows],
            self.probe,
        )


def real(batch: Batch) -> Bool[Tensor, "batch time"]:
    """Where a batch has tokens and not padding.

    Raises:
        ValueError: padding lies inside a sequence.
    """
    if batch.mask is None:
        return torch.ones(batch.tokens.shape, dtype=torch.bool)
    mask = batch.mask.cpu()
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    if bool((starts > 1).any()):
        raise ValueError("padding lies inside a sequence")
    return mask


def ranks(mask: Bool[Tensor, "batch time"]) -> Int64[Tensor, "batch time"]:
    """Number of a token within its sequence, from 0; -1 at padding before it."""
    return mask.long().cumsum(1) - 1


@runtime_checkable
class State(Protocol):
    """What a reduction has gathered so far."""

    def update(self, values: Any, batch: Batch) -> None:
        """Take one batch of activations ``[batch, time, width]`` in.

        At the site ``attention``, values are an :class:`analyzers.attention_blocks.QueryBlock` and the batch
        is that block's sequences. A state that leaves padding out says so by ``knows_padding = True``, and
        one that widens values of 16 bits itself, a part at a time, by ``widens = True``.
        """
        ...

    def merge(self, other: Any) -> None:
        """Take in what a state of the same spec has gathered on other sequences."""
        ...


@runtime_checkable
class Spec(Protocol):
    """A reduction at a site; hashable, equal when it is the same statistic."""

    @property
    def site(self) -> str:
        """Site whose activations are reduced."""
        ...

    @property
    def layer(self) -> int | None:
        """Block of the site; None outside the blocks."""
        ...

    def create(self) -> State:
        """An empty state."""
        ...
