"""The kernels of crosscoders compiled by numba, for the CPU.

Every output row is written by one thread in one order, so the numbers do not depend on the number of threads.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from analyzers.crosscoder.kernels import Descent, Learned, Pairs, Share
from analyzers.loops import compiled, equal_cuts, over_ranges

_CHUNKS_PER_THREAD = 4
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

        def listed(begin: int, end: int) -> Any:
            # Room for all of them: what is not written to takes no memory.
            latent = np.empty((end - begin) * before.shape[1] + 1, dtype=np.int64)
            return latent[: _list_over(*dense, counts, latent, begin, end)].copy()

        latent = np.concatenate([np.empty(0, np.int64), *over_ranges(listed, cuts)])
        row = np.repeat(np.arange(len(counts)), counts)
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

    def descend(
        self,
        share: Share,
        sums: Float[Tensor, "latents inputs"] | None,
        learned: Learned,
        descent: Descent,
    ) -> None:
        """See ``kernels.Kernels``; a latent's gradient stays in the cache."""
        first, second = descent.FIRST, descent.SECOND
        # The biases of the means, taken off the rate and off the root.
        rate = descent.rate / (1 - first**descent.number)
        root = (1 - second**descent.number) ** -0.5
        _run(
            _descend_rows,
            share.pairs.latent_start,
            share.pairs.by_latent,
            share.pairs.row,
            share.values,
            share.rows,
            learned.weights if sums is None else sums,
            sums is not None,
            learned.weights,
            learned.mean,
            learned.square,
            torch.tensor([first, second, rate, root, descent.EPSILON]),
        )

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
def _list_over(before: Any, factor: Any, least: Any, counts: Any, latent: Any, begin: int, end: int) -> Any:
    """List the latents of :meth:`Compiled.positive` in ``latent`` (one longer), row after row; their number.

    There is no branch, which the processor would often guess wrong.
    """
    at = np.int64(0)
    for b in range(begin, end):
        start = at
        for i in range(before.shape[1]):
            latent[at] = i
            at += np.int64((before[b, i] > 0) & (before[b, i] * factor[i] >= least[i]))
        counts[b] = at - start
    return at


@compiled(reorder=True)
def _add_row(starts: Any, order: Any, index: Any, values: Any, table: Any, b: int, out: Any) -> None:
    """Onto ``out``: the sum of ``values[p] * table[index[p]]`` over the pairs of row b, four at a time."""
    groups = values.shape[1]
    width = len(out) // groups
    for g in range(groups):
        first, last = g * width, (g + 1) * width
        total = out[first:last]
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
def _sum_rows(
    starts: Any, order: Any, index: Any, values: Any, table: Any, out: Any, add: bool, begin: int, end: int
) -> None:
    """Row b of ``out``, or onto it: what :func:`_add_row` adds."""
    for b in range(begin, end):
        if not add:
            out[b] = 0
        _add_row(starts, order, index, values, table, b, out[b])


@compiled(reorder=True)
def _descend_rows(
    starts: Any,
    order: Any,
    index: Any,
    values: Any,
    table: Any,
    sums: Any,
    add: bool,
    weights: Any,
    mean: Any,
    square: Any,
    numbers: Any,
    begin: int,
    end: int,
) -> None:
    """Adam with what :func:`_sum_rows` would write; ``numbers`` as :meth:`Compiled.descend` gives them."""
    first, second, rate, root, epsilon = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    one = np.float32(1)
    gradient = np.empty(weights.shape[1], np.float32)
    for b in range(begin, end):
        if add:
            gradient[:] = sums[b]
        else:
            gradient[:] = 0
        _add_row(starts, order, index, values, table, b, gradient)
        w, m, v = weights[b], mean[b], square[b]
        for c in range(len(gradient)):
            g = gradient[c]
            m[c] += (g - m[c]) * (one - first)
            v[c] = second * v[c] + (one - second) * g * g
            w[c] -= rate * m[c] / (np.sqrt(v[c]) * root + epsilon)


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
