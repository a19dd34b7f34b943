"""The compiled loops over float32: exponentials, order, softmax rows, logits, against float64 and torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from analyzers.extremes import maxima_and_energy
from analyzers.logit_reductions import position_statistics
from analyzers.single_floats import exponential, largest, largest_magnitude
from analyzers.softmax import softmax_


def gaussian(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale


def bits(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(np.int32)


def test_exponentials_of_all_sizes() -> None:
    x = np.concatenate([np.linspace(-87, 0, 40_001), -np.logspace(-12, 1.9, 1001)]).astype(np.float32)
    found = np.array([exponential(each) for each in x], np.float64)
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=2.0**-22)
    assert exponential(np.float32(0)) == 1
    for low in (-87.01, -1e4, -3e38, -math.inf):
        assert exponential(np.float32(low)) == 0
    assert math.isnan(exponential(np.float32(math.nan)))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_the_largest_of_a_row(values: list[float]) -> None:
    row = np.array(values, np.float32)
    assert largest(row.view(np.int32)) == row.max()
    assert largest_magnitude(row.view(np.int32)) == np.abs(row).max()


def test_no_number_is_a_magnitude_above_all() -> None:
    for sign in (1.0, -1.0):
        found = largest_magnitude(bits(1.0, math.copysign(math.nan, sign), math.inf))
        assert math.isnan(found)


@pytest.mark.parametrize("keys", [1, 7, 64, 1000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_rows_are_those_of_float64(keys: int, scale: float) -> None:
    z = gaussian(2, 3, 5, keys, scale=scale)
    exact = z.double()
    found, expected = softmax_(z), softmax_(exact)
    torch.testing.assert_close(z.double(), exact, rtol=2e-5, atol=1e-30)
    torch.testing.assert_close(z.sum(-1), torch.ones(2, 3, 5), rtol=0, atol=2e-6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6)


def test_faults_show_and_stay_in_their_row() -> None:
    z = gaussian(5, 20)
    z[1, 3], z[2, 0], z[4, 7] = math.nan, math.inf, -math.inf
    z[3, 3] = -torch.tensor(math.nan).abs()
    statistics = softmax_(z)
    for row, broken in enumerate((False, True, True, True, False)):
        assert bool(z[row].isnan().all()) is broken
        assert bool(statistics.entropy[row].isnan()) is broken
    assert z[4, 7] == 0
    assert z[4].sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 20.0])
def test_logits_are_those_of_float64(dtype: torch.dtype, scale: float) -> None:
    logits, targets = gaussian(150, 3001, scale=scale).to(dtype), torch.arange(150) * 20
    found, exact = position_statistics(logits, targets), position_statistics(logits.double(), targets)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    wide = logits.double()
    torch.testing.assert_close(exact[1], wide.logsumexp(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(exact[2], wide.square().mean(1), rtol=1e-12, atol=0)


def test_a_logit_that_is_no_number_shows_in_its_position_alone() -> None:
    logits, targets = gaussian(4, 50), torch.zeros(4, dtype=torch.int64)
    logits[1, 20], logits[2, 0] = math.nan, math.inf
    loss, log_z, square, _ = position_statistics(logits, targets)
    assert loss.isfinite().tolist() == [True, False, False, True]
    assert log_z.isfinite().tolist() == [True, False, False, True]
    assert square.isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("contiguous", [True, False])
def test_largest_magnitudes_and_squares(contiguous: bool) -> None:
    values = gaussian(3, 40, 24)
    values[0, 7, 3], values[2, 1, 0] = math.nan, -1e4
    if not contiguous:
        values = torch.cat([values, values], dim=2)[:, :, :24]
    maxima, energy = maxima_and_energy(values)
    expected, squares = maxima_and_energy(values.double())
    torch.testing.assert_close(maxima.double(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(energy, squares, rtol=1e-12, atol=0, equal_nan=True)
    assert energy.isnan().nonzero().tolist() == [[3]]
