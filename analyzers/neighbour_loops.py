"""Compiled loops over rows for nearest neighbours."""

from typing import Any

import numpy as np

from analyzers.loops import compiled

SAMPLE = 512
"""Bounds of a row that a guess is made from."""
GENEROUS = 1.4
"""By how much the guess's share of the rows is more than that of the neighbours sought."""


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


@compiled(reorder=True)
def bound_squares(dots: Any, norms: Any, share: float, lower: Any, upper: Any) -> None:
    """``norms_j - 2 dots_j``, less and plus ``share norms_j``: one row's squares up to its own norm."""
    for other in range(len(norms)):
        square, error = norms[other] - 2.0 * dots[other], share * norms[other]
        lower[other] = square - error
        upper[other] = square + error


@compiled(reorder=False)
def smallest(values: Any, k: int, stride: int) -> Any:
    """The ``k``-th smallest of every ``stride``-th value; infinite if there are fewer."""
    heap = np.full(k, np.inf)
    for place in range(0, len(values), stride):
        if values[place] < heap[0]:
            replace_largest(heap, values[place])
    return heap[0]


@compiled(reorder=False)
def at_most(values: Any, limit: float, found: Any) -> Any:
    """Write the places of the values up to ``limit`` to ``found`` (one longer than needed); their number."""
    count: Any = 0
    for place in range(len(values)):
        found[count] = place  # without a branch, which the processor would often guess wrong
        count += np.int64(values[place] <= limit)
    return count


@compiled(reorder=False)
def nearest_of_block(
    rows: Any, dots: Any, norms: Any, start: int, share: float, floor: float, distance: Any, index: Any
) -> None:
    """Fill ``distance`` and ``index`` for the rows from ``start`` on, one for each row of ``dots``.

    ``norms_i + norms_j - 2 dots_ij`` is a squared distance with an error of at most ``share (norms_i +
    norms_j) + floor``. Every row whose lower bound is not above the k-th smallest upper bound may be one of
    the k nearest; only those distances are computed, from the rows.

    The k-th smallest upper bound is sought among those below a guess from a sample, which is a little too
    large on purpose; where it was too small, among all.
    """
    n, k = len(rows), distance.shape[1]
    lower, upper = np.empty(n), np.empty(n)
    found, near = np.empty(n + 1, np.int64), np.empty(n)
    stride = max(1, n // SAMPLE)
    sampled = int(GENEROUS * k / stride) + 8
    for query in range(len(dots)):
        row = start + query
        bound_squares(dots[query], norms, share, lower, upper)
        lower[row] = upper[row] = np.inf
        count = at_most(upper, smallest(upper, sampled, stride), found) if stride > 1 else 0
        for place in range(count):
            near[place] = upper[found[place]]
        limit = smallest(near[:count], k, 1) if count >= k else smallest(upper, k, 1)
        count = at_most(lower, limit + 2.0 * (share * norms[row] + floor), found)
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
