"""Nearest neighbours: brute force, near-copies beside a large mean, duplicates."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from analyzers import neighbours
from analyzers.neighbour_loops import limit_of_smallest
from analyzers.neighbours import distinct, nearest


def brute(rows: Tensor) -> Tensor:
    """All distances from differences, in float64, inf on the diagonal."""
    rows = rows.double()
    distance = torch.stack([(rows - row).square().sum(dim=1).sqrt() for row in rows])
    return distance.fill_diagonal_(torch.inf)


def assert_nearest(rows: Tensor, k: int, block: int = 1 << 21, rel: float = 1e-8) -> None:
    """What is found has the k smallest distances, and the rows named are at these distances."""
    distance, index = nearest(rows, k, block)
    everything = brute(rows)
    torch.testing.assert_close(distance, everything.sort(dim=1).values[:, :k], rtol=rel, atol=0)
    torch.testing.assert_close(everything.gather(1, index), distance, rtol=rel, atol=0)
    assert all(len(set(each)) == k for each in index.tolist())


def gaussian(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "width", "k"), [(2, 3, 1), (50, 1, 7), (300, 40, 1), (300, 40, 299)])
def test_brute_force_finds_the_same(n: int, width: int, k: int) -> None:
    assert_nearest(gaussian(n, width), k)


@pytest.mark.parametrize("block", [1, 1000, 4096])
def test_blocks_change_nothing(block: int) -> None:
    rows = gaussian(200, 16)
    assert_nearest(rows, 9, block)
    assert torch.equal(nearest(rows, 9, block)[1], nearest(rows, 9)[1])


def test_near_copies_beside_a_large_mean_keep_their_distance() -> None:
    # A mean of 300 sigma, and pairs at 1e-4 of a row's own distance to the mean: what float32 dot products
    # of raw rows give for these is rounding.
    rows = gaussian(400, 64).double()
    gaps = 1e-4 * torch.nn.functional.normalize(gaussian(100, 64, 1).double()) * 8
    rows = (torch.cat([rows, rows[:100] + gaps]) + 300).float()
    distance, index = nearest(rows, 5)
    planted = (rows[:100].double() - rows[400:].double()).norm(dim=1)
    assert torch.equal(index[:100, 0], torch.arange(400, 500))
    torch.testing.assert_close(distance[:100, 0], planted, rtol=1e-8, atol=0)
    assert_nearest(rows, 5)
    raw = rows[:100].square().sum(1) + rows[400:].square().sum(1) - 2 * (rows[:100] * rows[400:]).sum(1)
    assert float((raw.clamp(min=0).sqrt() / planted - 1).abs().median()) > 0.9


def test_copies_that_differ_in_one_rounding_are_apart() -> None:
    rows = gaussian(100, 32)
    twin = rows[:40].clone()
    twin[:, 3] = torch.nextafter(twin[:, 3], torch.tensor(torch.inf))
    assert_nearest(torch.cat([rows, twin]), 4)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
def test_a_tight_cluster_far_from_the_mean(gap: float) -> None:
    # More near-copies than neighbours: which of them are the nearest is itself lost in dot products.
    rows = gaussian(200, 24).double()
    cluster = 50 + gap * gaussian(60, 24, 1).double()
    assert_nearest(torch.cat([rows, cluster]), 10)


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_the_unit_does_not_matter(scale: float) -> None:
    rows = gaussian(150, 20)
    one, other = nearest(rows, 6), nearest(rows * scale, 6)
    torch.testing.assert_close(one[0], other[0] / scale, rtol=1e-12, atol=0)
    assert torch.equal(one[1], other[1])


def test_equal_rows_are_at_distance_zero() -> None:
    distance, _ = nearest(torch.ones(6, 4), 3)
    assert torch.equal(distance, torch.zeros(6, 3, dtype=torch.float64))


@pytest.mark.parametrize("k", [0, 5])
def test_an_impossible_number_of_neighbours_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"{k} neighbours asked for among 5 rows"):
        nearest(gaussian(5, 2), k)


def test_rows_whose_float32_products_vanish_are_still_told_apart() -> None:
    # One row far out takes all of float32's range: of the others every dot product underflows.
    rows = torch.cat([gaussian(60, 4) * 2.0**-80, torch.full((1, 4), 2.0**20)])
    assert_nearest(rows, 5)


def test_of_equal_distances_the_lower_number_goes_first() -> None:
    assert nearest(torch.eye(5), 4)[1].tolist() == [[j for j in range(5) if j != i] for i in range(5)]


def test_the_first_of_equal_rows_stays() -> None:
    rows = torch.tensor([[1.0, 0.0], [2.0, 3.0], [1.0, -0.0], [2.0, 3.0], [1.0, 1e-7]])
    assert distinct(rows).tolist() == [0, 1, 4]
    assert distinct(rows.double()[:, :1]).tolist() == [0, 1]
    assert distinct(torch.zeros(0, 3)).tolist() == []


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60), st.integers(1, 70))
def test_the_limit_of_the_smallest(values: list[float], k: int) -> None:
    row = np.array(values, np.float32)
    limit = limit_of_smallest(row, k)
    if k > len(row):
        assert limit == np.inf
    else:
        kth = np.sort(row)[k - 1]
        assert (row[row <= limit] <= kth).all()
        assert limit >= kth


def test_rows_of_equal_keys_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randint(0, 2, (200, 5), generator=torch.Generator().manual_seed(0)).float()
    kept = distinct(rows)
    firsts: dict[tuple[float, ...], int] = {}
    for number, row in enumerate(rows.tolist()):
        firsts.setdefault(tuple(row), number)
    assert kept.tolist() == list(firsts.values())
    monkeypatch.setattr(neighbours, "row_keys", lambda bits, factors, keys: keys.fill(0))
    assert distinct(rows).tolist() == kept.tolist()
