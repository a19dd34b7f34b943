"""Compiled loops over the activations of a sequence: largest magnitudes, squares, what lies in a bracket."""

from typing import Any

import numpy as np

from analyzers.loops import compiled
from analyzers.single_floats import largest_magnitude


@compiled(reorder=True)
def sweep(values: Any, bits: Any, maxima: Any, energy: Any) -> None:
    """The largest magnitude of every token, and the squares of every channel added to ``energy``.

    ``bits`` are those of the same float32.
    """
    for token in range(len(values)):
        maxima[token] = largest_magnitude(bits[token])
        for channel in range(values.shape[1]):
            wide = np.float64(values[token, channel])
            energy[channel] += wide * wide


@compiled(reorder=False)
def bracketed(values: Any, low: float, high: float, inside: Any) -> Any:
    """Write the magnitudes from ``low`` to ``high`` to ``inside`` (one longer); how many are less, are in.

    There is no branch, which the processor would often guess wrong.
    """
    below, count = np.int64(0), np.int64(0)
    for place in range(len(values)):
        magnitude = abs(values[place])
        inside[count] = magnitude
        below += np.int64(magnitude < low)
        count += np.int64((magnitude >= low) & (magnitude <= high))
    return below, count
