"""The softmax of attention rows in place, with what can be known of a row in the same sweep."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analyzers.loops import compiled, over_threads
from analyzers.single_floats import exponential, largest


class RowStatistics(NamedTuple):
    """Of rows of logits ``z``: the maximum, ``ln sum exp (z - maximum)``, and the entropy of the softmax."""

    maximum: Float[Tensor, "*rows"]
    log_sum: Float[Tensor, "*rows"]
    entropy: Float[Tensor, "*rows"]
    """In nats, from shifted logits: with those of thousands, ``lse - sum p z`` would lose all digits."""


def softmax_(logits: Float[Tensor, "*rows keys"]) -> RowStatistics:
    """Put the softmax of every row in the place of its logits, which are finite or not; return what was seen.

    A row with NaN or positive infinity becomes NaN. Logits 87 and more below the maximum get exactly 0 in
    float32 on a processor, where a compiled loop works on row after row in the cache: one pass over memory
    where torch's operations need nine. Elsewhere those operations do it.

    Args:
        logits: contiguous.
    """
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return _by_operations(logits)
    shape = logits.shape[:-1]
    rows = logits.view(-1, logits.shape[-1]).numpy()
    found = torch.empty(3, len(rows))
    filled = found.numpy()

    def work(start: int, end: int) -> None:
        _sweep(rows[start:end], rows[start:end].view(np.int32), filled[:, start:end])

    over_threads(work, len(rows))
    return RowStatistics(*(each.view(shape) for each in found))


def _by_operations(logits: Float[Tensor, "*rows keys"]) -> RowStatistics:
    """The same by torch's operations."""
    maximum = logits.amax(-1)
    logits -= maximum[..., None]
    weights = logits.exp()
    total = weights.sum(-1)
    weights /= total[..., None]
    log_sum = total.log()
    entropy = log_sum - (weights * logits.clamp_(min=torch.finfo(logits.dtype).min)).sum(-1)
    logits.copy_(weights)
    return RowStatistics(maximum, log_sum, entropy)


@compiled(reorder=False)
def _exponentials(row: Any, maximum: Any, weights: Any) -> None:
    """Shift a row by its maximum, and write the exponentials."""
    for key in range(len(row)):
        shifted = row[key] - maximum
        weights[key] = exponential(shifted)
        row[key] = shifted if weights[key] != 0 else np.float32(0)  # 0 times minus infinity would be NaN


@compiled(reorder=True)
def _normalised(row: Any, weights: Any) -> Any:
    """Write the exponentials to the row, divided by their sum; return the sum and ``sum p (z - max)``."""
    total, mixed = np.float32(0), np.float32(0)
    for key in range(len(row)):
        total += weights[key]
        mixed += weights[key] * row[key]
    inverse = np.float32(1) / total
    for key in range(len(row)):
        row[key] = weights[key] * inverse
    return total, mixed * inverse


@compiled(reorder=False)
def _sweep(rows: Any, bits: Any, found: Any) -> None:
    """``softmax_`` of some rows; ``bits`` are those of the same numbers."""
    weights = np.empty(rows.shape[1], np.float32)
    for place in range(len(rows)):
        maximum = largest(bits[place])
        _exponentials(rows[place], maximum, weights)
        total, mixed = _normalised(rows[place], weights)
        log_sum = np.log(total)
        found[0, place], found[1, place], found[2, place] = maximum, log_sum, log_sum - mixed
