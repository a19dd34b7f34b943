"""The kernels of crosscoders compiled by numba, for the CPU.

Every output row is written by one thread in one order, so the numbers do not depend on the number of threads.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from analyzers.crosscoder.kernels import Pairs
from analyzers.loops import compiled, equal_cuts, over_ranges

_CHUNKS_PER_THREAD = 4
_STRETCH = 32
_CACHED = 1 << 18
"""Numbers of float32 that stay in a core's cache: 1 MB."""


class Compiled:
    """Loops over the active pairs of a row (or a latent), whose output row stays in the cache."""

    def positive(
        self,
        before: Float[Tensor, "batch latents"],
        factor: Float[Tensor, "latents"],
        least: Float[Tensor, "latents"],
    ) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
        """See ``kernels.Kernels``."""
        dense = before.numpy(), factor.numpy(), least.numpy()
        counts = np.empty(before.shape[0], dtype=np.int64)
        cuts = equal_cuts(len(counts), _CHUNKS_PER_THREAD * torch.get_num_threads())
        over_ranges(lambda begin, end: _count_over(*dense, counts, begin, end), cuts)
        ends = counts.cumsum()
        row, latent = np.empty((2, int(ends[-1])), dtype=np.int64)
        over_ranges(lambda begin, end: _list_over(*dense, ends - counts, row, latent, begin, end), cuts)
        return torch.from_numpy(row), torch.from_numpy(latent)

    def decode(
        self,
        pairs: Pairs,
        values: Float[Tensor, "pairs groups"],
        decoder: Float[Tensor, "latents inputs"],
    ) -> Float[Tensor, "batch inputs"]:
        """See ``kernels.Kernels``."""
        out = decoder.new_empty(pairs.batch, decoder.shape[1])
        order = torch.arange(pairs.count)
        _run(_sum_rows, pairs.row_start, order, pairs.latent, values, decoder, out, False)
        return out

    def feature_gradient(
        self,
        pairs: Pairs,
        gradient: Float[Tensor, "batch inputs"],
        decoder: Float[Tensor, "latents inputs"],
        groups: int,
    ) -> Float[Tensor, "pairs groups"]:
        """See ``kernels.Kernels``."""
        out = gradient.new_empty(pairs.count, groups)
        _run(_dot_rows, pairs.row_start, pairs.latent, gradient, decoder, out)
        return out

    def weight_gradient(
        self,
        pairs: Pairs,
        values: Float[Tensor, "pairs groups"],
        rows: Float[Tensor, "batch inputs"],
        out: Float[Tensor, "latents inputs"],
        *,
        add: bool = False,
    ) -> None:
        """See ``kernels.Kernels``."""
        _run(_sum_rows, pairs.latent_start, pairs.by_latent, pairs.row, values, rows, out, add)

    def columns(
        self, rows: Float[Tensor, "batch inputs"]
    ) -> tuple[Float64[Tensor, "inputs"], Float64[Tensor, "inputs"]]:
        """See ``kernels.Kernels``."""
        sums, squares = np.zeros((2, rows.shape[1]))
        table = rows.numpy()
        # Blocks of columns that stay in the cache between the two passes over them.
        cuts = equal_cuts(rows.shape[1], -(-rows.numel() // _CACHED))
        over_ranges(lambda begin, end: _columns(table, sums, squares, begin, end), cuts)
        return torch.from_numpy(sums), torch.from_numpy(squares)


@compiled(reorder=True)
def _hits(before: Any, factor: Any, least: Any, b: int, first: int, last: int) -> int:
    """How many of a row's latents :meth:`Compiled.positive` gives, counted in floats as they are compared."""
    count = np.float32(0)
    for i in range(first, last):
        hit = before[b, i] > 0 and before[b, i] * factor[i] >= least[i]
        count += np.float32(1) if hit else np.float32(0)
    return int(count)


@compiled(reorder=True)
def _count_over(before: Any, factor: Any, least: Any, counts: Any, begin: int, end: int) -> None:
    for b in range(begin, end):
        counts[b] = _hits(before, factor, least, b, 0, before.shape[1])


@compiled(reorder=True)
def _list_over(
    before: Any, factor: Any, least: Any, starts: Any, row: Any, latent: Any, begin: int, end: int
) -> None:
    """List them, from the row's start on; a stretch without any is passed over at once."""
    for b in range(begin, end):
        at = starts[b]
        for first in range(0, before.shape[1], _STRETCH):
            last = min(first + _STRETCH, before.shape[1])
            if _hits(before, factor, least, b, first, last):
                for i in range(first, last):
                    if before[b, i] > 0 and before[b, i] * factor[i] >= least[i]:
                        row[at] = b
                        latent[at] = i
                        at += 1


@compiled(reorder=True)
def _sum_rows(
    starts: Any, order: Any, index: Any, values: Any, table: Any, out: Any, add: bool, begin: int, end: int
) -> None:
    """Row b of ``out``: the sum of ``values[p] * table[index[p]]`` over its pairs, four at a time."""
    groups = values.shape[1]
    width = out.shape[1] // groups
    for b in range(begin, end):
        for g in range(groups):
            first, last = g * width, (g + 1) * width
            total = out[b, first:last]
            if not add:
                total[:] = 0
            j = starts[b]
            while j + 4 <= starts[b + 1]:
                p, q, r, s = order[j], order[j + 1], order[j + 2], order[j + 3]
                vp, vq, vr, vs = values[p, g], values[q, g], values[r, g], values[s, g]
                tp, tq = table[index[p], first:last], table[index[q], first:last]
                tr, ts = table[index[r], first:last], table[index[s], first:last]
                for c in range(width):
                    total[c] += vp * tp[c] + vq * tq[c] + vr * tr[c] + vs * ts[c]
                j += 4
            while j < starts[b + 1]:
                p = order[j]
                vp, tp = values[p, g], table[index[p], first:last]
                for c in range(width):
                    total[c] += vp * tp[c]
                j += 1


@compiled(reorder=True)
def _dot_rows(starts: Any, latent: Any, gradient: Any, decoder: Any, out: Any, begin: int, end: int) -> None:
    """For every pair, the inner product of its row of the gradient and its latent's decoder, by groups."""
    groups = out.shape[1]
    width = gradient.shape[1] // groups
    for b in range(begin, end):
        for p in range(starts[b], starts[b + 1]):
            for g in range(groups):
                left = gradient[b, g * width : (g + 1) * width]
                right = decoder[latent[p], g * width : (g + 1) * width]
                total = np.float32(0)
                for c in range(width):
                    total += left[c] * right[c]
                out[p, g] = total


@compiled(reorder=True)
def _columns(table: Any, sums: Any, squares: Any, begin: int, end: int) -> None:
    """Sum of every column, and the sum of squared distances from its mean."""
    total, spread = sums[begin:end], squares[begin:end]
    for b in range(table.shape[0]):
        row = table[b, begin:end]
        for c in range(end - begin):
            total[c] += row[c]
    mean = (total / table.shape[0]).astype(np.float32)
    for b in range(table.shape[0]):
        row = table[b, begin:end]
        for c in range(end - begin):
            away = np.float64(row[c] - mean[c])
            spread[c] += away * away


def _run(kernel: Callable[..., None], starts: Tensor, *arguments: Tensor | bool) -> None:
    """Run a kernel over ranges of rows that hold about equally many pairs, on torch's number of threads."""
    arrays: list[Any] = [each.detach().numpy() if isinstance(each, Tensor) else each for each in arguments]
    at = starts.numpy()
    threads = torch.get_num_threads()
    # A row costs something beside its pairs: it is set to zero.
    work = at + np.arange(at.size)
    goals = np.linspace(0, work[-1], _CHUNKS_PER_THREAD * threads + 1)
    cuts = np.searchsorted(work, goals)
    cuts[0], cuts[-1] = 0, at.size - 1
    over_ranges(lambda begin, end: kernel(at, *arrays, begin, end), cuts.tolist())
