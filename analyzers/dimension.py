"""TwoNN intrinsic dimension of a sample: of the whole, and inside the neighbourhood of every point."""

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from analyzers.neighbours import two_nearest

# Distances are right to 1e-8: ratios nearer to 1 than this are rounding, and would fit a dimension above 1e7.
_EQUAL = 1e-7


def twonn(ratio: Float64[Tensor, "*sets n"], discard: float = 0.1) -> Float64[Tensor, "*sets"]:
    """TwoNN dimension (Facco et al. 2017, Scientific Reports 7:12140) of each set of ratios.

    ``mu = r2 / r1`` are the ratios of the distances to a point's second and first neighbour. Of the ``n``
    finite ones the smallest ``int(n (1 - discard))`` are kept; the dimension is the slope through the origin
    of ``-ln(1 - F)`` on ``ln mu`` with ``F = rank / n``. Dimensionless, > 0. This is the linear method of
    scikit-dimension's ``TwoNN``.

    Args:
        ratio: ratios; those that are not finite (r1 = 0) are left out.
        discard: share of the largest ratios to leave out, above 0 and below 1.

    Returns:
        The dimension; nan if fewer than two ratios are kept, or all kept ones are 1 to seven digits.

    >>> share = torch.arange(1, 100, dtype=torch.float64) / 100
    >>> mu = torch.cat([(1 - share) ** (-1 / 5), torch.tensor([1e6])])  # F = 1 - mu^-5 at every rank
    >>> round(float(twonn(mu)), 9)
    5.0
    """
    mu = _ascending(ratio.where(ratio.isfinite(), torch.inf))
    n = mu.isfinite().sum(dim=-1, keepdim=True).double()
    kept = torch.minimum((n * (1 - discard)).floor(), n - 1)
    rank = torch.arange(1, mu.shape[-1] + 1, dtype=torch.float64, device=mu.device)
    used = rank <= kept
    x = mu.where(used, 1.0).log()
    # Sets are mostly of one size, and have the same shares then.
    sizes, size = torch.unique(n, return_inverse=True)
    y = -torch.log1p(-(rank / sizes[:, None]))[size.squeeze(-1)].where(used, 0.0)
    slope = (x * y).sum(dim=-1) / (x * x).sum(dim=-1)
    equidistant = x.amax(dim=-1) < _EQUAL if mu.shape[-1] else x.new_ones(x.shape[:-1], dtype=torch.bool)
    return slope.where((kept[..., 0] >= 2) & ~equidistant, torch.nan)


def _ascending(values: Float64[Tensor, "*sets n"]) -> Float64[Tensor, "*sets n"]:
    """Each set in order; on the CPU by numpy, which sorts with vector instructions."""
    if values.device.type != "cpu":
        return values.sort(dim=-1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))


def global_dimension(distance: Float64[Tensor, "n k"], discard: float = 0.1) -> float:
    """TwoNN dimension of the whole sample from every point's distances to its neighbours, ascending."""
    return float(twonn(distance[:, 1] / distance[:, 0], discard))


def local_dimensions(
    rows: Float[Tensor, "n width"],
    distance: Float64[Tensor, "n k"],
    index: Int64[Tensor, "n k"],
    discard: float = 0.1,
) -> Float64[Tensor, "n"]:
    """TwoNN dimension inside the neighbourhood of every point; nan where it has none.

    The neighbourhood is the ``k`` nearest other points; the point itself is not in it, and neighbours of its
    members are sought in it alone (arXiv 2506.01034; the same as scikit-dimension's ``fit_pw``).

    Args:
        rows: the sample.
        distance: distances to the ``k`` nearest other rows, ascending.
        index: the numbers of these rows.
        discard: share of the largest ratios to leave out.
    """
    first, second, _ = two_nearest(rows, distance, index)
    return twonn(second / first, discard)
