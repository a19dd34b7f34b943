"""The order in which a pool's rows are handed out: shuffled, yet read in runs of neighbouring rows."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

BLOCK_ROWS = 64
"""Neighbouring rows that are read together: one piece of a file for each snapshot."""


def shuffled(
    rows: int, buffer: int, seed: int, epoch: int
) -> Iterator[tuple[int, Int64[np.ndarray, "group"]]]:
    """Every row number once, in groups of about ``buffer`` rows, each with its place in the order.

    The pool is cut into blocks of ``BLOCK_ROWS`` rows, the blocks are permuted, and the rows of every
    ``buffer // BLOCK_ROWS`` blocks (at least one) are permuted together. With PCG64 seeded by (seed, epoch)
    for the blocks and (seed, epoch, group + 1) for a group: a group can be made without those before it.
    A batch is thus drawn from as many random places of the pool as its buffer has blocks.
    """
    blocks = np.random.default_rng([seed, epoch]).permutation(-(-rows // BLOCK_ROWS))
    together = max(1, buffer // BLOCK_ROWS)
    place = 0
    for number, first in enumerate(range(0, len(blocks), together)):
        starts = blocks[first : first + together].astype(np.int64) * BLOCK_ROWS
        group = (starts[:, None] + np.arange(BLOCK_ROWS)).ravel()
        group = group[group < rows]
        yield place, np.random.default_rng([seed, epoch, number + 1]).permutation(group)
        place += len(group)
