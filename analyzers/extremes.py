"""The reduction behind massive activations: largest and median magnitudes, their places, squared norms."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from analyzers.extreme_loops import bracketed, sweep
from analyzers.loops import over_threads
from analyzers.reductions import Batch, real

TOP = 3
# Below this a bracket saves nothing over numpy's partition.
_SMALL = 1 << 14
_SAMPLE = 4096


def lower_median(values: Float[Tensor, "rows n"]) -> Float[Tensor, "rows"]:
    """The lower median of the magnitudes of each row, exactly: the ``(n + 1) // 2``-th smallest; without NaN.

    On a processor a sample of the row brackets the median, and only what lies inside the bracket is
    partitioned.
    """
    if values.device.type != "cpu":
        return values.abs().median(dim=1).values
    rows = values.contiguous().numpy()
    medians = np.empty(len(rows), rows.dtype)

    def work(start: int, end: int) -> None:
        for row in range(start, end):
            medians[row] = _median_of(rows[row])

    over_threads(work, len(rows))
    return torch.from_numpy(medians)


def _median_of(row: Float[np.ndarray, "n"]) -> np.floating:
    n = len(row)
    rank = (n - 1) // 2
    if n >= _SMALL:
        # An odd stride, so that a sample of tokens x channels meets every channel.
        sample = np.sort(np.abs(row[:: (n // _SAMPLE) | 1]))
        middle, margin = len(sample) // 2, 2 * math.isqrt(len(sample)) + 8
        inside = np.empty(n + 1, row.dtype)
        below, count = bracketed(row, sample[middle - margin], sample[middle + margin], inside)
        place = rank - below
        if 0 <= place < count:
            found: np.floating = np.partition(inside[:count], place)[place]
            return found
    whole: np.floating = np.partition(np.abs(row), rank)[rank]
    return whole


def maxima_and_energy(
    values: Float[Tensor, "batch time width"],
) -> tuple[Float[Tensor, "batch time"], Float64[Tensor, "width"]]:
    """The largest magnitude of every token, NaN if one is; the sum of squares of every channel in float64."""
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return values.abs().amax(2), values.double().square().sum((0, 1)).cpu()
    sequences, time, width = values.shape
    rows = values.contiguous().numpy()
    largest, energy = torch.empty(sequences, time), torch.zeros(sequences, width, dtype=torch.float64)
    bits, maxima, squares = rows.view(np.int32), largest.numpy(), energy.numpy()

    def work(start: int, end: int) -> None:
        for each in range(start, end):
            sweep(rows[each], bits[each], maxima[each], squares[each])

    over_threads(work, sequences)
    return largest, energy.sum(0)


@dataclass(frozen=True)
class ExtremesSpec:
    """Largest and median magnitudes of each sequence, where they are, and squared norms of channels.

    A magnitude is massive if it is above ``above`` and at least ``ratio`` times the lower median of its
    sequence.
    """

    site: str
    layer: int | None
    above: float = 100.0
    ratio: float = 1000.0

    def create(self) -> "ExtremesState":
        """An empty state."""
        return ExtremesState(self.above, self.ratio)


class ExtremesState:
    """What is kept of every sequence, over all its tokens and channels; padding does not count.

    ``sums`` over sequences: top-1..3 magnitude, lower median, top-1 / median, number of massive ones.
    ``channels`` and ``positions``: how often a channel, and a position in its sequence (from 0), holds the
    top-1..3. ``energy``: sum over tokens of the squares of each channel.
    """

    knows_padding = True

    def __init__(self, above: float = 100.0, ratio: float = 1000.0) -> None:
        self.above, self.ratio = above, ratio
        self.n = 0
        self.tokens = 0
        self.sums: Float64[Tensor, 6] = torch.zeros(TOP + 3, dtype=torch.float64)
        self.channels: Int64[Tensor, "3 width"] = torch.zeros(TOP, 0, dtype=torch.int64)
        self.positions: Int64[Tensor, "3 time"] = torch.zeros(TOP, 0, dtype=torch.int64)
        self.energy: Float64[Tensor, width] = torch.zeros(0, dtype=torch.float64)
        self._index: list[Tensor] = []
        self._each: list[Tensor] = []

    def update(self, values: Float[Tensor, "batch time width"], batch: Batch) -> None:
        """Take a batch in."""
        mask = real(batch)
        if bool(mask.all()):
            self._take(values, batch.index)
            return
        for sequence, kept, index in zip(values, mask, batch.index, strict=True):
            if bool(kept.any()):
                self._take(sequence[kept.to(values.device)][None], index[None])

    def _take(self, values: Float[Tensor, "batch time width"], index: Int64[Tensor, "batch"]) -> None:
        sequences, time, width = values.shape
        maxima, energy = maxima_and_energy(values)
        # The three largest lie in the three tokens of the largest maxima.
        tokens = maxima.topk(min(TOP, time), dim=1).indices
        rows = values.gather(1, tokens[:, :, None].expand(-1, -1, width)).abs().flatten(1)
        top = rows.topk(min(TOP, rows.shape[1]), dim=1)
        largest = torch.full((sequences, TOP), torch.nan, dtype=torch.float64)
        largest[:, : top.values.shape[1]] = top.values.double().cpu()
        largest[largest[:, 0].isnan()] = torch.nan
        median = lower_median(values.flatten(1)).cpu()
        # A maximum is NaN if anything is; a partition puts NaN aside.
        median = torch.where(largest[:, 0].isnan(), torch.nan, median.double())
        count = self._massive(values, largest[:, 0], median)
        ratio = largest[:, 0] / median
        each = torch.cat([largest, torch.stack([median, ratio, count], dim=1)], dim=1)
        self.sums += each.sum(0)
        self._index.append(index.cpu())
        self._each.append(each)
        self.n += sequences
        self.tokens += sequences * time
        self.energy = _padded(self.energy, width) + energy
        self._count(top.indices, tokens, largest, time, width)

    def sequences(self) -> tuple[Int64[Tensor, "sequences"], Float64[Tensor, "sequences 6"]]:
        """Numbers of the sequences within the probe, ascending, and what ``sums`` adds up of each."""
        if not self._index:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, len(self.sums), dtype=torch.float64)
        index = torch.cat(self._index)
        order = index.argsort(stable=True)
        return index[order], torch.cat(self._each)[order]

    def _massive(self, values: Tensor, largest: Tensor, median: Tensor) -> Float64[Tensor, "batch"]:
        count = torch.where(largest.isnan(), torch.nan, torch.zeros_like(largest))
        least = self.ratio * median
        for index in ((largest > self.above) & (largest >= least)).nonzero().flatten().tolist():
            found = values[index].double().abs()
            count[index] = int(((found > self.above) & (found >= float(least[index]))).sum())
        return count

    def _count(self, flat: Tensor, tokens: Tensor, largest: Tensor, time: int, width: int) -> None:
        positions = tokens.gather(1, flat // width).cpu()
        channels = (flat % width).cpu()
        self.channels = _padded(self.channels, width)
        self.positions = _padded(self.positions, time)
        for k in range(flat.shape[1]):
            there = largest[:, k] > 0  # all of a sequence of zeros is its largest, and NaN is no answer
            self.channels[k] += channels[there, k].bincount(minlength=self.channels.shape[1])
            self.positions[k] += positions[there, k].bincount(minlength=self.positions.shape[1])

    def merge(self, other: "ExtremesState") -> None:
        """Take in what was gathered on other sequences."""
        self.n += other.n
        self.tokens += other.tokens
        self.sums = self.sums + other.sums
        self._index += other._index
        self._each += other._each
        for name in ("channels", "positions", "energy"):
            mine, theirs = getattr(self, name), getattr(other, name)
            size = max(mine.shape[-1], theirs.shape[-1])
            setattr(self, name, _padded(mine, size) + _padded(theirs, size))


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, max(0, size - values.shape[-1])))
