"""Compiled loops over rows: nearest neighbours, and keys by which equal rows are found."""

from typing import Any

import numpy as np

from analyzers.loops import compiled
from analyzers.single_floats import ordered

SAMPLE = 256
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


@compiled(reorder=True)
def squared_distances(one: Any, rows: Any, places: Any) -> Any:
    """Of a row and some others, from their differences in float64.

    Four at a time: their reading from memory overlaps (two thirds of the time).
    """
    squares = np.empty(len(places))
    at = 0
    while at + 4 <= len(places):
        a, b, c, d = rows[places[at]], rows[places[at + 1]], rows[places[at + 2]], rows[places[at + 3]]
        to_a = to_b = to_c = to_d = 0.0
        for column in range(len(one)):
            value = one[column]
            gap_a, gap_b = value - np.float64(a[column]), value - np.float64(b[column])
            gap_c, gap_d = value - np.float64(c[column]), value - np.float64(d[column])
            to_a += gap_a * gap_a
            to_b += gap_b * gap_b
            to_c += gap_c * gap_c
            to_d += gap_d * gap_d
        squares[at], squares[at + 1], squares[at + 2], squares[at + 3] = to_a, to_b, to_c, to_d
        at += 4
    for place in range(at, len(places)):
        squares[place] = squared_distance(one, rows[places[place]])
    return squares


@compiled(reorder=False)
def limit_of_smallest(values: Any, k: int) -> Any:
    """A number that the ``k`` smallest float32 values do not exceed, and others only if equal to them.

    Infinite if there are fewer. No value is NaN. The range of their ordered bits is halved until it is found:
    each count is a vector operation, where every step of a heap is a branch that the processor guesses.
    """
    if k > len(values):
        return np.float32(np.inf)
    places = np.empty(len(values), np.int32)
    bits = values.view(np.int32)
    for place in range(len(values)):
        places[place] = ordered(bits[place])
    low, high = np.int64(-(2**31)), np.int64(0x7F800000)  # infinity
    while low < high:
        middle = (low + high) >> 1
        limit, count = np.int32(middle), np.int32(0)
        for place in range(len(places)):
            count += np.int32(places[place] <= limit)
        if count >= k:
            high = middle
        else:
            low = middle + 1
        if count == k:
            break
    return np.int32(ordered(np.int32(high))).view(np.float32)


@compiled(reorder=False)
def not_above(dots: Any, low: Any, limit: float, found: Any) -> Any:
    """Write the places where ``low - 2 dots`` is not above a limit to ``found`` (one longer); their number.

    The limit is rounded up.
    """
    most = np.float32(limit + abs(limit) * 2.0**-23)
    count = np.int64(0)
    for place in range(len(low)):
        found[count] = place  # without a branch, which the processor would often guess wrong
        count += np.int64(low[place] - np.float32(2) * dots[place] <= most)
    return count


@compiled(reorder=False)
def nearest_of_block(
    rows: Any, dots: Any, norms: Any, start: int, share: float, floor: float, distance: Any, index: Any
) -> None:
    """Fill ``distance`` and ``index`` for the rows from ``start`` on, one for each row of ``dots``.

    ``norms_i + norms_j - 2 dots_ij`` is a squared distance with an error of at most ``share (norms_i +
    norms_j) + floor``, with ``norms_j - 2 dots_ij`` taken in float32. Every row whose lower bound is not
    above the k-th smallest upper bound may be one of the k nearest; only those distances are computed, from
    the rows.

    The k-th smallest upper bound is sought among the rows whose lower bound is not above a guess from a
    sample, which is a little too large on purpose; where it was too small, among all.
    """
    n, k = len(rows), distance.shape[1]
    low, high = ((1.0 - share) * norms).astype(np.float32), ((1.0 + share) * norms).astype(np.float32)
    found, near = np.empty(n + 1, np.int64), np.empty(n, np.float32)
    stride = max(1, n // SAMPLE)
    sampled = int(GENEROUS * k / stride) + 8
    for query in range(len(dots)):
        row = start + query
        dot = dots[query]
        slack = 2.0 * (share * norms[row] + floor)
        count = np.int64(0)
        for other in range(0, n, stride):
            near[count] = high[other] - np.float32(2) * dot[other]
            count += 1
        guess = limit_of_smallest(near[:count], sampled)
        while True:
            count = not_above(dot, low, guess + slack, found)
            bounded = np.int64(0)
            for place in range(count):
                other = found[place]
                bound = high[other] - np.float32(2) * dot[other]
                near[bounded] = bound
                bounded += np.int64((bound <= guess) & (other != row))
            if bounded >= k:
                break
            guess = np.float32(np.inf)
        limit = limit_of_smallest(near[:bounded], k) + slack
        kept = np.int64(0)
        for place in range(count):
            other = found[place]
            if other != row and low[other] - np.float32(2) * dot[other] <= limit:
                found[kept] = other
                kept += 1
        square = squared_distances(rows[row].astype(np.float64), rows, found[:kept])
        order = np.argsort(square, kind="mergesort")
        for place in range(k):
            distance[row, place] = np.sqrt(square[order[place]])
            index[row, place] = found[order[place]]


@compiled(reorder=True)
def centred(rows: Any, mean: Any, factor: float, points: Any, norms: Any) -> None:
    """Write rows less their mean, times a factor, to ``points``, and their squared norms before rounding."""
    for row in range(len(rows)):
        total = 0.0
        for column in range(len(mean)):
            value = (np.float64(rows[row, column]) - mean[column]) * factor
            points[row, column] = np.float32(value)
            total += value * value
        norms[row] = total


@compiled(reorder=False)
def row_keys(bits: Any, factors: Any, keys: Any) -> None:
    """Sums over a row of its bits times odd factors, modulo 2^64: equal rows have equal keys."""
    for row in range(len(bits)):
        total = np.int64(0)
        for column in range(bits.shape[1]):
            total += np.int64(bits[row, column]) * factors[column]
        keys[row] = total


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
