"""Nearest neighbours of sampled tokens: exact Euclidean distances, in blocks of bounded memory."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from analyzers.loops import over_threads
from analyzers.neighbour_loops import centred, nearest_of_block, row_keys, two_nearest_inside

# Numbers in one block of work: 8 MB in float32.
BLOCK = 1 << 21
_UNIT = 2.0**-24
_TINY = 2.0**-125


def distinct(rows: Float[Tensor, "n width"]) -> Int64[Tensor, "kept"]:
    """Numbers of the rows that equal no earlier one, in order. Equal means in every bit, but 0 equals -0.

    Only rows of equal keys are compared.
    """
    values = _contiguous(rows + 0.0)
    bits = values.view(np.dtype(f"i{values.itemsize}"))
    factors = np.random.default_rng(0).integers(-(2**62), 2**62, bits.shape[1]) * 2 + 1
    keys = np.empty(len(bits), np.int64)
    row_keys(bits, factors, keys)
    _, group, size = np.unique(keys, return_inverse=True, return_counts=True)
    kept = size[group] == 1
    seen: set[bytes] = set()
    for number in np.flatnonzero(~kept):
        row = values[number].tobytes()
        kept[number] = row not in seen
        seen.add(row)
    return torch.from_numpy(np.flatnonzero(kept))


def nearest(
    rows: Float[Tensor, "n width"], k: int, block: int = BLOCK
) -> tuple[Float64[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """Distances to the ``k`` nearest other rows, ascending, and the numbers of these rows.

    Dot products of the centred rows in float32 only say which rows may be among the nearest: their squared
    distances have an error of at most ``(width + 24) 2^-24 (|a|^2 + |b|^2)``, and no row that this leaves
    open is dropped. The distances are those of the differences in float64, so nothing cancels, whatever the
    mean is. Of equal distances the lower number goes first. Work: ``2 n^2 width`` operations in float32 and
    some ``3 n k width`` in float64; with many near-copies far from the mean, up to ``3 n^2 width``. Memory:
    4 bytes per entry of ``rows``, and a few blocks.

    Args:
        rows: finite, on the CPU; differences of float64 rows below 1e150.
        k: 1 to n - 1.
        block: numbers in a block of work.

    Raises:
        ValueError: ``k`` is not in 1 to n - 1.
    """
    n, width = rows.shape
    if not 1 <= k < n:
        raise ValueError(f"{k} neighbours asked for among {n} rows")
    exact = _contiguous(rows)
    points, norms = _centred(exact)
    distance = torch.empty(n, k, dtype=torch.float64)
    index = torch.empty(n, k, dtype=torch.int64)
    filled = distance.numpy(), index.numpy()
    share, floor = (width + 24) * _UNIT, width * _TINY
    step = min(n, max(1, block // n))
    products = torch.empty(step, n)  # made once: new memory takes a fifth of the time of the products
    for start in range(0, n, step):
        part = points[start : start + step]
        dots = torch.mm(part, points.T, out=products[: len(part)]).numpy()

        def fill(first: int, last: int, start: int = start, dots: Any = dots) -> None:
            nearest_of_block(exact, dots[first:last], norms, start + first, share, floor, *filled)

        over_threads(fill, len(dots))
    return distance, index


def _centred(rows: Any) -> tuple[Float[Tensor, "n width"], Any]:
    """Rows less their mean, at a scale where no square overflows or vanishes, and their squared norms."""
    mean = rows.mean(axis=0, dtype=np.float64)
    largest = float(max((rows.max(axis=0) - mean).max(), (mean - rows.min(axis=0)).max()))
    points, norms = torch.empty(rows.shape), np.empty(len(rows))
    filled, factor = points.numpy(), 1.0 / (largest or 1.0)

    def fill(start: int, end: int) -> None:
        centred(rows[start:end], mean, factor, filled[start:end], norms[start:end])

    over_threads(fill, len(rows))
    return points, norms


def two_nearest(
    rows: Float[Tensor, "n width"],
    distance: Float64[Tensor, "n k"],
    index: Int64[Tensor, "n k"],
) -> tuple[Float64[Tensor, "n k"], Float64[Tensor, "n k"], int]:
    """Within the neighbourhood of every row: each member's distances to its nearest and second nearest there.

    The neighbourhood of a row are its ``k`` nearest, which :func:`nearest` gives. Infinite where there are
    not so many. The third answer is how many members' distances had to be computed: for all others they are
    looked up in the members' own lists, some 16 look-ups each.
    """
    first, second = torch.empty_like(distance), torch.empty_like(distance)
    exact = _contiguous(rows)
    lists = _contiguous(distance), _contiguous(index.int())  # half as much to read
    one, two = first.numpy(), second.numpy()

    def fill(start: int, end: int) -> int:
        computed: int = two_nearest_inside(exact, *lists, start, one[start:end], two[start:end])
        return computed

    return first, second, sum(over_threads(fill, len(rows)))


def _contiguous(values: Tensor) -> Any:
    return values.contiguous().numpy()
