"""The kernels of crosscoders compiled by numba, for the CPU.

Every output row is written by one thread in one order, so the numbers do not depend on the number of threads.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analyzers.crosscoder.kernels import Pairs
from analyzers.loops import compiled, over_ranges

_CHUNKS_PER_THREAD = 4


class Compiled:
    """Loops over the active pairs of a row (or a latent), whose output row stays in the cache."""

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
