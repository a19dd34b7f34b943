"""The reduction of the output logits: loss, log Z, largest logit and RMS, in one reading of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from analyzers.loops import compiled, over_threads
from analyzers.reductions import Batch, real
from analyzers.single_floats import exponential, largest

_POSITIONS = 64
_SUMMED = 1024
"""Numbers added in float32 before the sum goes on in float64."""


def position_statistics(
    logits: Float[Tensor, "n vocabulary"], targets: Int64[Tensor, "n"]
) -> Float64[Tensor, "4 n"]:
    """Of every position: ``log Z - z_target``, ``log Z = ln sum exp z``, mean of ``z^2``, largest ``z``.

    On a processor a compiled loop reads a position's logits while they are in the cache. Elsewhere torch's
    operations do it a few positions at a time, and ``log Z`` is the target's logit plus its loss, so that
    the softmax of the loss serves both.
    """
    if logits.device.type == "cpu" and logits.dtype != torch.float64:
        return _in_the_cache(logits, targets)
    found = []
    for part, target in zip(logits.split(_POSITIONS), targets.split(_POSITIONS), strict=True):  # type: ignore[no-untyped-call]
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        loss = torch.nn.functional.cross_entropy(wide, target, reduction="none").double()
        log_z = wide.gather(1, target[:, None]).squeeze(1).double() + loss
        square = torch.linalg.vector_norm(wide, dim=1).double().square() / wide.shape[1]
        found.append(torch.stack([loss, log_z, square, wide.amax(1).double()]))
    return torch.cat(found, dim=1).cpu()


def _in_the_cache(
    logits: Float[Tensor, "n vocabulary"], targets: Int64[Tensor, "n"]
) -> Float64[Tensor, "4 n"]:
    found = torch.empty(4, len(logits), dtype=torch.float64)
    filled, chosen = found.numpy(), targets.numpy()

    def work(start: int, end: int) -> None:
        for first in range(start, end, _POSITIONS):  # 16 bits are widened so many at a time
            part = slice(first, min(first + _POSITIONS, end))
            wide = logits[part].float().contiguous().numpy()
            _sweep(wide, wide.view(np.int32), chosen[part], filled[:, part])

    over_threads(work, len(logits))
    return found


@compiled(reorder=True)
def _sums(row: Any, maximum: Any) -> Any:
    """``sum exp (z - maximum)`` and ``sum z^2`` of some logits, in float32."""
    total, square = np.float32(0), np.float32(0)
    for place in range(len(row)):
        total += exponential(row[place] - maximum)
        square += row[place] * row[place]
    return total, square


@compiled(reorder=False)
def _sweep(rows: Any, bits: Any, targets: Any, found: Any) -> None:
    """Fill ``found`` for some positions; ``bits`` are those of the same logits."""
    vocabulary = rows.shape[1]
    for place in range(len(rows)):
        maximum = largest(bits[place])
        total, square = 0.0, 0.0
        for first in range(0, vocabulary, _SUMMED):
            part = _sums(rows[place, first : first + _SUMMED], maximum)
            total += np.float64(part[0])
            square += np.float64(part[1])
        log_z = np.log(total) + np.float64(maximum)
        found[0, place] = log_z - np.float64(rows[place, targets[place]])
        found[1, place] = log_z
        found[2, place] = square / vocabulary
        found[3, place] = maximum


class LogitsState:
    """Sums over the positions that predict a token; padding neither predicts nor is predicted.

    ``losses`` and ``counts`` are by the predicted token's position in its sequence, from 1; place 0 is
    empty. Losses are in nats.
    """

    knows_padding = True
    widens = True

    def __init__(self) -> None:
        self.n = 0
        self.losses: Float64[Tensor, time] = torch.zeros(0, dtype=torch.float64)
        self.counts: Int64[Tensor, time] = torch.zeros(0, dtype=torch.int64)
        self.log_z = 0.0
        self.log_z_squared = 0.0
        self.mean_square = 0.0
        self.maximum = -float("inf")

    @property
    def total(self) -> float:
        """Sum of the losses."""
        return float(self.losses.sum())

    def update(self, values: Float[Tensor, "batch time vocabulary"], batch: Batch) -> None:
        """Take the logits of a batch in, a sequence at a time: no second copy of them all arises."""
        kept = real(batch)
        for logits, tokens, mask in zip(values, batch.tokens, kept, strict=True):
            (places,) = mask.nonzero(as_tuple=True)
            if len(places) < 2:
                continue
            first, last = int(places[0]), int(places[-1])
            self._take(logits[first:last], tokens[first + 1 : last + 1].to(values.device))

    def _take(self, logits: Float[Tensor, "n vocabulary"], targets: Int64[Tensor, "n"]) -> None:
        loss, log_z, square, largest = position_statistics(logits, targets)
        self._resize(len(loss) + 1)
        self.losses[1 : len(loss) + 1] += loss
        self.counts[1 : len(loss) + 1] += 1
        self.n += len(loss)
        self.log_z += float(log_z.sum())
        self.log_z_squared += float(log_z.square().sum())
        self.mean_square += float(square.sum())
        self._raise(float(largest.max()))

    def _raise(self, largest: float) -> None:
        # max() of Python drops a NaN that comes second.
        self.maximum = float(torch.tensor([self.maximum, largest], dtype=torch.float64).max())

    def _resize(self, size: int) -> None:
        more = max(0, size - len(self.losses))
        self.losses = torch.nn.functional.pad(self.losses, (0, more))
        self.counts = torch.nn.functional.pad(self.counts, (0, more))

    def mean_loss(self, first: int, end: int) -> tuple[float | None, int]:
        """Mean loss of the predicted tokens at positions ``first`` to ``end - 1``, and their number."""
        n = int(self.counts[first:end].sum())
        return (float(self.losses[first:end].sum()) / n if n else None), n

    def merge(self, other: "LogitsState") -> None:
        """Take in the sums of other sequences."""
        self._resize(len(other.losses))
        self.losses[: len(other.losses)] += other.losses
        self.counts[: len(other.counts)] += other.counts
        self.n += other.n
        self.log_z += other.log_z
        self.log_z_squared += other.log_z_squared
        self.mean_square += other.mean_square
        self._raise(other.maximum)


@dataclass(frozen=True)
class LogitsSpec:
    """Loss, log Z, largest logit and RMS of the model's logits."""

    site: str = "logits"
    layer: int | None = None

    def create(self) -> LogitsState:
        """An empty state."""
        return LogitsState()
