"""First and second moments of activations: one float64 pass, mergeable, for whatever needs a covariance."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from numba.extending import get_cython_function_address
from threadpoolctl import ThreadpoolController
from torch import Tensor

from analyzers.loops import over_ranges
from analyzers.reductions import Batch

TokenChoice = Literal["all", "last", "mean"]

BLOCK = 1024
"""Rows per matrix product. Fixed, so that a result does not depend on how rows arrive."""

SERIAL_WIDTH = 1024
"""Widest rows whose blocks one thread multiplies: on busy cores two took 48 ms at width 512, one 6 ms.

The halves of the probe then have a thread each.
"""


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


@cache
def _dsyrk() -> Callable[..., None]:
    """BLAS's ``C <- alpha A A^T + beta C`` without the interpreter's lock, which scipy's own call holds."""
    string, pointer = ctypes.c_char_p, ctypes.c_void_p
    kind: Any = ctypes.CFUNCTYPE(None, string, string, *[pointer] * 8)
    call: Callable[..., None] = kind(get_cython_function_address("scipy.linalg.cython_blas", "dsyrk"))
    return call


@contextmanager
def _serial(width: int) -> Iterator[bool]:
    """Within it BLAS has one thread if rows are narrow; whether they are."""
    narrow = width <= SERIAL_WIDTH
    with _blas().limit(limits=1 if narrow else None, user_api="blas"):
        yield narrow


def _add_product(scatter: Float[Tensor, "width width"], rows: Float[Tensor, "rows width"]) -> None:
    """``scatter += rows^T rows``, in place; on the CPU the upper triangle only (dsyrk: half the work)."""
    if scatter.device.type != "cpu":
        scatter.addmm_(rows.T, rows)
        return
    for matrix in (scatter, rows):
        assert matrix.dtype == torch.float64  # BLAS reads plain memory
        assert matrix.is_contiguous()
    width, count = ctypes.byref(ctypes.c_int(len(scatter))), ctypes.byref(ctypes.c_int(len(rows)))
    one = ctypes.byref(ctypes.c_double(1.0))
    # Fortran's lower triangle is C's upper one.
    _dsyrk()(b"L", b"N", width, count, one, rows.data_ptr(), width, one, scatter.data_ptr(), width)


def _copy(rows: Float[Tensor, "rows width"], into: Float[Tensor, "rows width"]) -> None:
    """Copy rows to float64, by numpy on the CPU: torch's threads wait for one another in every such step."""
    if into.device.type != "cpu":
        into.copy_(rows)
        return
    # numpy has no bfloat16.
    into.numpy()[:] = rows.detach().to(torch.promote_types(rows.dtype, torch.float32)).numpy()


def _centre(rows: Float[Tensor, "rows width"]) -> Float[Tensor, "width"]:
    """Take the mean off ``rows``, in place; return it."""
    if rows.device.type != "cpu":
        mean = rows.mean(0)
        rows -= mean
        return mean
    array = rows.numpy()
    centre = array.mean(0)
    array -= centre
    # numpy adds row by row: under a large mean the first centre is off by some hundred roundings.
    rest = array.mean(0)
    array -= rest
    return torch.from_numpy(centre + rest)


class Moments:
    """Count, mean and centred second moment of rows, in float64, on the device where the rows are.

    Rows are gathered into blocks of fixed size; a block is centred by its own mean, so nothing cancels under
    a large mean. Blocks are joined by the update of Chan, Golub and LeVeque (1983, "Algorithms for computing
    the sample variance"): its rank-one term enters the matrix product as one more row,
    ``(block mean - mean) sqrt(n m / (n + m))``.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None
        self._block: Tensor | None = None
        self._filled = 0

    def add(self, rows: Float[Tensor, "rows width"]) -> None:
        """Take rows in."""
        if self._block is None:
            # One row more than a block: that of the join.
            self._block = torch.empty(BLOCK + 1, rows.shape[1], dtype=torch.float64, device=rows.device)
        start = 0
        while start < rows.shape[0]:
            part = rows[start : start + BLOCK - self._filled]
            _copy(part, self._block[self._filled : self._filled + len(part)])
            self._filled += len(part)
            start += len(part)
            if self._filled == BLOCK:
                self._flush()

    def _flush(self) -> None:
        if self._block is None or self._filled == 0:
            return
        block, count = self._block, self._filled
        mean = _centre(block[:count])
        self._filled = 0
        if self._mean is None or self._scatter is None:
            width = block.shape[1]
            self._mean = torch.zeros_like(mean)
            self._scatter = torch.zeros(width, width, dtype=torch.float64, device=block.device)
        block[count] = self._shift(mean, count)
        _add_product(self._scatter, block[: count + 1])

    def _shift(self, mean: Tensor, count: int) -> Tensor:
        """Move count and mean to the union with ``count`` rows of another mean; return the join's row."""
        assert self._mean is not None
        total = self.n + count
        shift = mean - self._mean
        row: Tensor = shift * (self.n * count / total) ** 0.5
        self._mean = self._mean + shift * (count / total)
        self.n = total
        return row

    def merge(self, other: "Moments") -> None:
        """Take in the moments of other rows."""
        mean, scatter = other.finish()
        if not other.n:
            return
        self._flush()
        if self._mean is None or self._scatter is None:
            self.n, self._mean, self._scatter = other.n, mean.clone(), scatter.clone()
            return
        row = self._shift(mean.to(self._mean.device), other.n)
        self._scatter += scatter.to(self._scatter.device)
        _add_product(self._scatter, row[None])

    def finish(self) -> tuple[Float[Tensor, "width"], Float[Tensor, "width width"]]:
        """Mean and scatter matrix ``sum (x - mean)(x - mean)^T``, both float64; empty if no row came.

        They are this state's own: more rows may follow, and change them.
        """
        self._flush()
        if self._mean is None or self._scatter is None:
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        scatter: Tensor = self._scatter.triu_()
        scatter += scatter.triu(1).T
        return self._mean, scatter


class GramState:
    """Moments of the two halves of the probe (sequences of even and of odd number)."""

    def __init__(self, tokens: TokenChoice) -> None:
        self.tokens = tokens
        self.halves = (Moments(), Moments())

    def update(self, values: Float[Tensor, "batch time width"], batch: Batch) -> None:
        """Take the chosen tokens of a batch in."""
        if self.tokens == "last":
            values = values[:, -1:]
        elif self.tokens == "mean":
            values = values.double().mean(1, keepdim=True)
        shares: tuple[list[Tensor], list[Tensor]] = ([], [])
        for sequence, second in zip(values, (batch.index % 2 == 1).tolist(), strict=True):
            shares[second].append(sequence)

        def take(first: int, last: int) -> None:
            for half in range(first, last):
                for sequence in shares[half]:
                    self.halves[half].add(sequence)

        if values.device.type != "cpu":
            take(0, 2)
            return
        with _serial(values.shape[2]) as narrow:
            # Few rows do not pay for the way to another thread.
            if narrow and self.tokens == "all":
                over_ranges(take, (0, 1, 2))
            else:
                take(0, 2)

    def merge(self, other: "GramState") -> None:
        """Take in the moments of other sequences."""
        for mine, theirs in zip(self.halves, other.halves, strict=True):
            mine.merge(theirs)

    def whole(self) -> Moments:
        """Moments of both halves together."""
        both = Moments()
        for half in self.halves:
            both.merge(half)
        return both


@dataclass(frozen=True)
class GramSpec:
    """Mean and scatter matrix of activations: all tokens, each sequence's last, or its mean over tokens."""

    site: str
    layer: int | None
    tokens: TokenChoice

    def create(self) -> GramState:
        """An empty state."""
        return GramState(self.tokens)
