"""TwoNN: scikit-dimension, manifolds of known dimension, invariances."""

import math

import numpy as np
import pytest
import torch
from skdim.id import TwoNN
from torch import Tensor

from analyzers.dimension import global_dimension, local_dimensions, twonn
from analyzers.neighbours import distinct, nearest, two_nearest

AMBIENT = 64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embedded(points: Tensor, seed: int = 0) -> Tensor:
    """The points turned into a random subspace of 64 dimensions, and moved off the origin."""
    basis = torch.linalg.qr(torch.randn(AMBIENT, points.shape[1], generator=seeded(seed)).double()).Q
    return points.double() @ basis.T + 3


def local(rows: Tensor, k: int) -> Tensor:
    return local_dimensions(rows, *nearest(rows, k))


def test_exact_quantiles_of_a_pareto_law_give_its_exponent() -> None:
    # F(mu) = 1 - mu^-d at every rank: all points are on the line. The last, F = 1, is among the discarded.
    share = torch.arange(1, 40, dtype=torch.float64) / 40
    exponents = torch.tensor([0.5, 3.0, 60.0], dtype=torch.float64)
    mu = torch.cat([(1 - share) ** (-1 / exponents[:, None]), torch.full((3, 1), 1e30)], dim=1)
    shuffled = mu[:, torch.randperm(40, generator=seeded(0))]
    for discard in (0.01, 0.1, 0.5):
        torch.testing.assert_close(twonn(shuffled, discard), exponents, rtol=1e-12, atol=0)


def test_the_slope_by_hand() -> None:
    # Four ratios, half discarded: points (ln 2, ln 4/3) and (ln 3, ln 2).
    x, y = np.log([2.0, 3.0]), np.log([4 / 3, 2.0])
    ratio = torch.tensor([5.0, 3.0, 2.0, 4.0], dtype=torch.float64)
    assert float(twonn(ratio, 0.5)) == pytest.approx((x @ y) / (x @ x), rel=1e-14)


def test_ratios_that_are_not_finite_count_nothing() -> None:
    ratio = 1 + torch.rand(30, generator=seeded(0)).double()
    more = torch.cat(
        [torch.tensor([torch.nan, torch.inf]).double(), ratio, torch.tensor([torch.inf]).double()]
    )
    assert float(twonn(more)) == pytest.approx(float(twonn(ratio)), rel=1e-14)


@pytest.mark.parametrize("ratio", [[], [2.0], [2.0, 3.0], [1.0] * 20, [math.nan] * 20])
def test_nothing_to_fit_is_nan(ratio: list[float]) -> None:
    assert math.isnan(float(twonn(torch.tensor(ratio, dtype=torch.float64))))


@pytest.mark.parametrize("width", [5, 40])  # scikit-dimension searches in another way above 25
@pytest.mark.parametrize("discard", [0.1, 0.3])
def test_the_global_form_agrees_with_scikit_dimension(width: int, discard: float) -> None:
    rows = torch.randn(300, width, generator=seeded(1))
    theirs = TwoNN(discard_fraction=discard).fit(rows.double().numpy()).dimension_
    assert global_dimension(nearest(rows, 2)[0], discard) == pytest.approx(theirs, rel=1e-10)


# With few neighbours the lists rarely meet, and distances are computed; with many they are looked up.
@pytest.mark.parametrize(("width", "k"), [(40, 3), (40, 10), (5, 40), (40, 40), (40, 128)])
def test_the_pointwise_form_agrees_with_scikit_dimension(width: int, k: int) -> None:
    rows = torch.randn(260, width, generator=seeded(2)) * torch.arange(1, width + 1) ** -0.5 + 5
    theirs = TwoNN().fit_pw(rows.double().numpy(), n_neighbors=k).dimension_pw_
    np.testing.assert_allclose(local(rows, k).numpy(), theirs, rtol=1e-9)


def test_distances_are_computed_only_where_lists_do_not_meet() -> None:
    rows = torch.randn(200, 30, generator=seeded(3))
    *_, few = two_nearest(rows, *nearest(rows, 3))
    *_, many = two_nearest(rows, *nearest(rows, 64))
    assert 0 < few < 200 * 3
    assert many == 0


def test_a_neighbourhood_of_one_has_no_two_nearest() -> None:
    rows = torch.randn(20, 3, generator=seeded(3))
    assert bool(local(rows, 1).isnan().all())


def test_threads_change_nothing() -> None:
    rows = torch.randn(150, 12, generator=seeded(4))
    alone = local(rows, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert torch.equal(local(rows, 3), alone)
    finally:
        torch.set_num_threads(before)


# TwoNN takes the density as constant out to the second neighbour. On a sphere of n points in d dimensions the
# distance to it grows as n^(-1/d), and with it a bias that is low: less than 1 % for d <= 3, 10 % for d = 10.
@pytest.mark.parametrize(("d", "bias"), [(1, 0.0), (2, 0.0), (3, 0.01), (5, 0.05), (10, 0.1)])
def test_spheres_have_their_dimension(d: int, bias: float) -> None:
    # No border. The standard error of the fit is about d / sqrt(n), here 2.2 %: three of them.
    points = torch.nn.functional.normalize(torch.randn(2000, d + 1, generator=seeded(d)))
    rows = embedded(points)
    distance, index = nearest(rows, 128)
    mean = float(local_dimensions(rows, distance, index).mean())
    for value in (global_dimension(distance), mean):
        assert (1 - bias - 0.07) * d < value < 1.07 * d


@pytest.mark.parametrize("d", [1, 2, 4, 7, 10])
def test_cubes_have_their_dimension_less_the_border(d: int) -> None:
    # Near a border half of the space is empty; that adds to the bias, 15 % in all for d = 10.
    rows = embedded(torch.rand(2000, d, generator=seeded(d)))
    distance, index = nearest(rows, 128)
    mean = float(local_dimensions(rows, distance, index).mean())
    for value in (global_dimension(distance), mean):
        assert (1 - 0.015 * d - 0.07) * d < value < 1.07 * d


@pytest.mark.parametrize("d", [1, 3, 10])
def test_gaussians_in_subspaces_do_not_see_the_space_around_them(d: int) -> None:
    flat = torch.randn(1000, d, generator=seeded(d)).double()
    inside, outside = (local(rows, 64) for rows in (flat, embedded(flat)))
    torch.testing.assert_close(inside, outside, rtol=1e-8, atol=0)


def test_scale_rotation_and_shift_do_not_matter() -> None:
    rows = torch.randn(300, 16, generator=seeded(5)).double()
    turn = torch.linalg.qr(torch.randn(16, 16, generator=seeded(6)).double()).Q
    moved = 37.5 * rows @ turn + 100
    torch.testing.assert_close(local(moved, 50), local(rows, 50), rtol=1e-8, atol=0)
    one, other = (global_dimension(nearest(each, 2)[0]) for each in (rows, moved))
    assert one == pytest.approx(other, rel=1e-8)


def test_order_does_not_matter() -> None:
    rows = torch.randn(300, 16, generator=seeded(7)).double()
    order = torch.randperm(300, generator=seeded(8))
    torch.testing.assert_close(local(rows[order], 40), local(rows, 40)[order], rtol=1e-9, atol=0)


def test_duplicates_dropped_are_as_if_they_had_never_been() -> None:
    rows = torch.randn(300, 16, generator=seeded(9))
    repeated = torch.cat([rows, rows[:200], rows[:50]])
    assert torch.equal(repeated[distinct(repeated)], rows)


def test_duplicates_left_in_lose_their_ratio_as_in_scikit_dimension() -> None:
    # Three dimensions: above 25, scikit-dimension's own distances of equal rows are not all zero.
    rows = torch.randn(200, 3, generator=seeded(10))
    repeated = torch.cat([rows, rows[:20]])
    with pytest.warns(UserWarning, match="Dropping 40 points"):
        theirs = TwoNN().fit(repeated.double().numpy()).dimension_
    assert global_dimension(nearest(repeated, 2)[0]) == pytest.approx(theirs, rel=1e-9)


def test_a_mixture_shows_in_the_quantiles() -> None:
    line = embedded(torch.rand(1000, 1, generator=seeded(11)))
    cloud = embedded(torch.rand(1000, 8, generator=seeded(12)), seed=1) + 100
    values = local(torch.cat([line, cloud]), 64)
    assert float(values[:1000].median()) == pytest.approx(1, rel=0.1)
    assert 5.5 < float(values[1000:].median()) < 8.5
    low, high = torch.quantile(values, torch.tensor([0.05, 0.95]).double()).tolist()
    assert low < 1.3
    assert high > 5.5
