"""What compiled loops do with float32 in vector registers, where numba would call a function per number."""

from typing import Any

import numpy as np

from analyzers.loops import compiled

_SINGLE = np.float32
_LEAST = _SINGLE(-87)  # e^-87 is not yet subnormal
_LOG2_E = _SINGLE(1.4426950408889634)
# ln 2 in two parts: the product of the first and an exponent is exact.
_LN2_HIGH, _LN2_LOW = _SINGLE(0.693359375), _SINGLE(-2.12194440e-4)
# e^u for |u| <= ln 2 / 2 with the least error: coefficients of Cephes' expf.
_C7, _C6, _C5 = _SINGLE(1.9875691500e-4), _SINGLE(1.3981999507e-3), _SINGLE(8.3334519073e-3)
_C4, _C3, _C2 = _SINGLE(4.1665795894e-2), _SINGLE(0.16666665459), _SINGLE(0.5)
_BUT_SIGN = np.int32(0x7FFFFFFF)


@compiled(reorder=False)
def exponential(x: Any) -> Any:
    """``e^x`` of a float32 up to 0, to 2^-22 of it; exactly 0 below -87; NaN of NaN."""
    power = np.floor(x * _LOG2_E + _SINGLE(0.5))
    u = x - power * _LN2_HIGH - power * _LN2_LOW
    value = ((((_C7 * u + _C6) * u + _C5) * u + _C4) * u + _C3) * u + _C2
    value = value * u * u + u + _SINGLE(1)
    scale = np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
    return _SINGLE(0) if x < _LEAST else value * scale


@compiled(reorder=False)
def ordered(bits: Any) -> Any:
    """The bits of a float32 as an integer of the same order. Positive NaN is above all, negative below."""
    return bits ^ ((bits >> np.int32(31)) & _BUT_SIGN)


@compiled(reorder=False)
def largest(bits: Any) -> Any:
    """The largest of a row of float32, given by their bits: of integers that is a vector operation.

    A negative NaN may be passed over, a positive one is the answer.
    """
    most = ordered(bits[0])
    for place in range(len(bits)):
        most = max(most, ordered(bits[place]))
    return np.int32(ordered(most)).view(np.float32)


@compiled(reorder=False)
def largest_magnitude(bits: Any) -> Any:
    """The largest absolute value of a row of float32, given by their bits; NaN if there is one."""
    most = np.int32(0)
    for place in range(len(bits)):
        most = max(most, bits[place] & _BUT_SIGN)
    return np.int32(most).view(np.float32)
