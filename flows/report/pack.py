"""What makes the page small: plotly.js and the values of all trajectories, compressed, as base64.

The browser unpacks both with its own gzip. A value takes about 2.7 characters at 5 significant digits, where
JSON takes 7.5 (and, compressed in the same way, 4).
"""

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float64
from plotly.offline import get_plotlyjs

from flows.report.data import Run, Trajectory

# Significant digits, and the bits of a mantissa that tell any two numbers of so many digits apart.
BITS = {5: 17, 4: 14, 3: 10}
# Characters that the values of a page may take; plotly.js takes 2 million of the 8 million to be mailed.
LIMIT = 5_000_000


@dataclass(frozen=True)
class Packed:
    """Values of all trajectories: base64 text, and the significant digits that they keep."""

    text: str
    digits: int


@cache
def packed_plotly() -> str:
    """plotly.js as base64 of gzip."""
    return _base64(get_plotlyjs().encode())


def pack_values(trajectories: Sequence[Trajectory], runs: Sequence[Run]) -> Packed:
    """All values, by trajectory, run and step, at as many digits as fit; an absent value is NaN.

    Of each value in double precision the page holds the upper 32 bits, rounded, as four planes of bytes:
    first the highest bytes of all values, then the next. Rounding first to the digits and then to the bits
    makes a number of so many digits come back exactly.
    """
    absent = {len(run.steps): np.full(len(run.steps), np.nan) for run in runs}
    parts = [
        absent[len(run.steps)] if values is None else np.array(values, dtype=np.float64)
        for trajectory in trajectories
        for run, values in zip(runs, trajectory.values, strict=True)
    ]
    values = np.concatenate(parts) if parts else np.empty(0)
    packed = Packed("", min(BITS))
    for digits, bits in BITS.items():
        packed = Packed(_base64(planes(_at_digits(values, digits), bits)), digits)
        if len(packed.text) <= LIMIT:
            break
    return packed


def _at_digits(values: Float64[np.ndarray, "n"], digits: int) -> Float64[np.ndarray, "n"]:
    return np.array([float(f"{value:.{digits}g}") for value in values.tolist()], dtype=np.float64)


def planes(values: Float64[np.ndarray, "n"], bits: int) -> bytes:
    """The upper halves of doubles, mantissas rounded to ``bits`` (20 at most), as four planes of bytes."""
    below = np.uint64(52 - bits)
    whole = values.view(np.uint64)
    rounded = ((whole + (np.uint64(1) << (below - np.uint64(1)))) >> below) << below
    rounded[np.isnan(values)] = np.float64(np.nan).view(np.uint64)
    upper = (rounded >> np.uint64(32)).astype(">u4")
    return upper.view(np.uint8).reshape(-1, 4).T.tobytes()


def _base64(raw: bytes) -> str:
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()
