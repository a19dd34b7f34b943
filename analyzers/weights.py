"""The 14 weight metrics of "Latent State Models of Training Dynamics" (arXiv 2308.09543), tensor by tensor.

Measured matrices: Q, K, V (a fused projection is split), attention output, and the MLP's. Embeddings,
unembedding and norms are left out, as in the paper. Variances are without Bessel's correction, as the paper
says (its code applies it).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from analyzers.base import Metric, Result, Row, WeightAnalyzer, WeightMatrices
from analyzers.eigen import symmetric_eigenvalues
from analyzers.registry import register

_HU = "Hu et al. 2023, arXiv 2308.09543"


def singular_values(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rank"]:
    """All singular values in descending order, float64, from the eigenvalues of the smaller Gram matrix.

    Four to eight times cheaper than an SVD; the absolute error is below ``1e-8 sigma_max``.
    """
    matrix = matrix.double()
    small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return symmetric_eigenvalues(small).clamp_min(0).sqrt().flip(0)


def matrix_metrics(matrix: Float[Tensor, "rows columns"]) -> dict[str, float]:
    """The eight metrics of one matrix, computed in float64.

    ``l1`` sum of |w|; ``l2`` Frobenius norm; their ratio; ``trace`` of the main diagonal; ``spectral_norm``
    largest singular value; trace / spectral norm; mean and population variance of the singular values. A
    ratio whose denominator is 0 is NaN; so is all that is made of singular values if a weight is not finite.
    """
    matrix = matrix.double()
    finite = bool(torch.isfinite(matrix).all())
    sigma = singular_values(matrix) if finite else matrix.new_full((1,), float("nan"))
    l1, l2 = float(matrix.abs().sum()), float(torch.linalg.vector_norm(matrix))
    trace, spectral = float(matrix.diagonal().sum()), float(sigma[0])
    return {
        "l1": l1,
        "l2": l2,
        "l1_over_l2": l1 / l2 if l2 else float("nan"),
        "trace": trace,
        "spectral_norm": spectral,
        "trace_over_spectral_norm": trace / spectral if spectral else float("nan"),
        "singular_mean": float(sigma.mean()),
        "singular_var": float(sigma.var(correction=0)),
    }


class PooledMoments:
    """Count, mean and population variance of all values of many tensors, joined pairwise in float64."""

    def __init__(self) -> None:
        self.n, self.mean, self._scatter = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        """Take all values of a tensor in."""
        values = values.double()
        n, mean = values.numel(), float(values.mean())
        scatter = float(((values - mean) ** 2).sum())
        total = self.n + n
        shift = mean - self.mean
        self._scatter += scatter + shift * shift * self.n * n / total
        self.mean += shift * n / total
        self.n = total

    @property
    def variance(self) -> float:
        """Mean squared deviation (divided by n)."""
        return self._scatter / self.n


def _sortable(values: Tensor) -> Tensor:
    """Map float32 to integers 0..2^32-1 in the same order (two's complement of negative numbers' bits)."""
    bits = values.float().flatten().view(torch.int32).to(torch.int64)
    return torch.where(bits >= 0, bits + 2**31, -(bits & 0x7FFFFFFF) + 2**31 - 1)


def _from_sortable(code: int) -> float:
    bits = code - 2**31 if code >= 2**31 else (2**31 - 1 - code) | (1 << 31)
    signed = bits - 2**32 if bits >= 2**31 else bits
    return float(torch.tensor([signed], dtype=torch.int32).view(torch.float32)[0])


def lower_median(tensors: Callable[[], Iterable[Tensor]]) -> float:
    """Lower median of all values of many tensors: the value of rank ``floor((n - 1) / 2)`` from 0.

    Exact for finite values stored in at most float32, in two passes that hold one tensor at a time: a
    histogram of the upper 16 bits of an order-preserving code, then of the lower 16 bits within the median's
    bin.
    """
    upper = torch.zeros(65536, dtype=torch.int64)
    for tensor in tensors():
        upper += torch.bincount(_sortable(tensor) >> 16, minlength=65536)
    rank = (int(upper.sum()) - 1) // 2
    below = upper.cumsum(0)
    bin_ = int(torch.searchsorted(below, rank, right=True))
    rank -= int(below[bin_ - 1]) if bin_ else 0
    lower = torch.zeros(65536, dtype=torch.int64)
    for tensor in tensors():
        code = _sortable(tensor)
        lower += torch.bincount(code[code >> 16 == bin_] & 0xFFFF, minlength=65536)
    rest = int(torch.searchsorted(lower.cumsum(0), rank, right=True))
    return _from_sortable(bin_ << 16 | rest)


@register
class WeightsAnalyzer(WeightAnalyzer):
    """Eight metrics per matrix and their means over matrices; six pooled over all weights and biases."""

    name = "weights"
    version = 1
    summary = "the 14 weight metrics of latent-state models, per matrix and aggregated; no forward pass"
    metrics = (
        Metric("l1", "sum |w|", "weight", ">= 0", _HU),
        Metric("l2", "Frobenius norm", "weight", ">= 0", _HU),
        Metric("l1_over_l2", "l1 / l2", "1", "1 to sqrt(entries)", _HU),
        Metric("trace", "sum of the main diagonal", "weight", "real", _HU),
        Metric("spectral_norm", "largest singular value", "weight", ">= 0", _HU),
        Metric("trace_over_spectral_norm", "trace / spectral_norm", "1", "-rank to rank", _HU),
        Metric("singular_mean", "mean of the singular values", "weight", ">= 0", _HU),
        Metric("singular_var", "population variance of the singular values", "weight^2", ">= 0", _HU),
        Metric("weight_mean", "mean over all measured weights", "weight", "real", _HU),
        Metric("weight_median", "lower median over all measured weights", "weight", "real", _HU),
        Metric("weight_var", "population variance over all measured weights", "weight^2", ">= 0", _HU),
        Metric("bias_mean", "mean over the biases of the measured matrices", "weight", "real", _HU),
        Metric("bias_median", "lower median over those biases", "weight", "real", _HU),
        Metric("bias_var", "population variance over those biases", "weight^2", ">= 0", _HU),
    )

    def measure_weights(self, weights: WeightMatrices) -> Result:
        """Rows per matrix, their means, and the pooled ones; without biases there are no bias rows."""
        result = Result()
        columns: dict[str, list[float]] = defaultdict(list)
        pooled = PooledMoments()
        for site, layer, matrix in weights.matrices():
            pooled.add(matrix)
            for name, value in matrix_metrics(matrix).items():
                columns[name].append(value)
                result.rows.append(Row(name, value, matrix.numel(), site, layer))
        if not columns:
            raise ValueError("the weights hold no matrix that the model's family names")
        for name, values in columns.items():
            result.rows.append(Row(name, sum(values) / len(values), pooled.n))

        def matrices() -> Iterator[Tensor]:
            return (matrix for _, _, matrix in weights.matrices())

        self._pooled("weight", pooled, matrices, result)
        biases = PooledMoments()
        for bias in weights.biases():
            biases.add(bias)
        if biases.n:
            self._pooled("bias", biases, weights.biases, result)
        return result

    @staticmethod
    def _pooled(
        kind: str, moments: PooledMoments, tensors: Callable[[], Iterable[Tensor]], result: Result
    ) -> None:
        median = lower_median(tensors) if isfinite(moments.mean) else float("nan")
        values = {"mean": moments.mean, "median": median, "var": moments.variance}
        result.rows += [Row(f"{kind}_{name}", value, moments.n) for name, value in values.items()]
