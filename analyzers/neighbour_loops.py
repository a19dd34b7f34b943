"""Compiled loops over rows for nearest neighbours."""

from typing import Any

import numpy as np

from analyzers.loops import compiled


@compiled(reorder=True)
def squared_distance(one: Any, other: Any) -> Any:
    """Of two rows, from their differences in float64."""
    total = 0.0
    for column in range(len(one)):
        gap = np.float64(one[column]) - np.float64(other[column])
        total += gap * gap
    return total


@compiled(reorder=False)
def replace_largest(heap: Any, value: Any) -> None:
    """Put ``value`` in place of the root of a heap whose root is its largest."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= len(heap):
            break
        if child + 1 < len(heap) and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= value:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = value


@compiled(reorder=False)
def nearest_of_block(
    rows: Any, dots: Any, norms: Any, start: int, share: float, floor: float, distance: Any, index: Any
) -> None:
    """Fill ``distance`` and ``index`` for the rows from ``start`` on, one for each row of ``dots``.

    ``norms_i + norms_j - 2 dots_ij`` is a squared distance with an error of at most ``share (norms_i +
    norms_j) + floor``. Every row whose lower bound is not above the k-th smallest upper bound may be one of
    the k nearest; only those distances are computed, from the rows.
    """
    n, k = len(rows), distance.shape[1]
    upper, lower = np.empty(k), np.empty(n)
    found = np.empty(n, np.int64)
    for query in range(len(dots)):
        row = start + query
        upper[:] = np.inf
        for other in range(n):
            if other == row:
                lower[other] = np.inf
                continue
            total = norms[row] + norms[other]
            square, error = total - 2.0 * dots[query, other], share * total + floor
            lower[other] = square - error
            if square + error < upper[0]:
                replace_largest(upper, square + error)
        count = 0
        for other in range(n):
            if lower[other] <= upper[0] and other != row:
                found[count] = other
                count += 1
        square = np.empty(count)
        for place in range(count):
            square[place] = squared_distance(rows[row], rows[found[place]])
        order = np.argsort(square, kind="mergesort")
        for place in range(k):
            distance[row, place] = np.sqrt(square[order[place]])
            index[row, place] = found[order[place]]


@compiled(reorder=False)
def two_nearest_inside(rows: Any, distance: Any, index: Any, start: int, first: Any, second: Any) -> int:
    """Distances of every member of a neighbourhood to its two nearest other members, from ``start`` on.

    A member's list of neighbours is ascending: its first two entries that are members too are the two. Only
    where it holds fewer are the distances to all members computed. Returns how many members that were.
    """
    n, k = index.shape
    inside = np.zeros(n, np.bool_)
    computed = 0
    for point in range(len(first)):
        members = index[start + point]
        inside[members] = True
        for place in range(k):
            member = members[place]
            one, two, seen = np.inf, np.inf, 0
            for entry in range(k):
                if inside[index[member, entry]]:
                    seen += 1
                    if seen == 1:
                        one = distance[member, entry]
                    else:
                        two = distance[member, entry]
                        break
            if seen < 2:
                computed += 1
                one, two = np.inf, np.inf
                for other in members:
                    if other != member:
                        gap = np.sqrt(squared_distance(rows[member], rows[other]))
                        if gap < one:
                            one, two = gap, one
                        elif gap < two:
                            two = gap
            first[point, place], second[point, place] = one, two
        inside[members] = False
    return computed
