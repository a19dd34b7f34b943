"""Weight metrics, tensor by tensor: size, spectrum and distribution of every matrix, whole or by heads.

Measured matrices: Q, K, V (a fused projection is split), attention output, and the MLP's. Embeddings,
unembedding and norms are left out, as in "Latent State Models of Training Dynamics" (arXiv 2308.09543), whose
14 metrics are among these. Variances are without Bessel's correction, as that paper says (its code applies
it). docs/weights.md is the method page.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import isfinite

from pydantic import Field
from torch import Tensor

from analyzers.base import Metric, Parameters, Result, Row, WeightAnalyzer, WeightMatrices
from analyzers.matrix_metrics import NAMES, POWER_LAW, Measured, Value, measure_matrix
from analyzers.pooled import MedianWindow, PooledMoments, lower_median
from analyzers.registry import register

_HU = "Hu et al. 2023, arXiv 2308.09543"
_CLAUSET = "Clauset et al. 2009, arXiv 0706.1062; of spectra: Martin and Mahoney 2021, arXiv 1810.01075"
_GG = "Wu et al. 2025, arXiv 2506.00486; estimator: Sharifi and Leon-Garcia 1995"

HEAD_AXIS = {"attention.query": 0, "attention.key": 0, "attention.value": 0, "attention.output": 1}
"""Sites that part into heads, and whether rows or columns of ``[out, in]`` belong to a head."""


def heads_of(site: str, matrix: Tensor, counts: Mapping[str, int]) -> Iterator[tuple[int, Tensor]]:
    """(head, its rows or columns) of an attention matrix; nothing for a site whose heads are not known.

    Grouped keys and values have as many heads as there are groups.

    Raises:
        ValueError: the heads do not divide the matrix.
    """
    if site not in HEAD_AXIS or site not in counts:
        return
    axis, count = HEAD_AXIS[site], counts[site]
    if count < 1 or matrix.shape[axis] % count:
        raise ValueError(f"{site} of shape {tuple(matrix.shape)} does not part into {count} heads")
    yield from enumerate(matrix.chunk(count, axis))


class WeightsParameters(Parameters):
    """Whether heads are measured too, and how many eigenvalues a power law needs."""

    heads: bool = Field(False, description="measure each head of query, key, value and output as well")
    min_eigenvalues: int = Field(50, ge=3, description="fewest eigenvalues that a power law is fitted to")


@register
class WeightsAnalyzer(WeightAnalyzer):
    """Sixteen metrics per matrix and their means over matrices; six pooled over all weights and biases."""

    name = "weights"
    version = 2
    summary = "size, spectrum and distribution of the weights, per matrix and aggregated; no forward pass"
    parameters_type = WeightsParameters
    parameters: WeightsParameters
    metrics = (
        *(
            replace(metric, formula=f"{metric.formula}; whole model: mean over matrices")
            for metric in (
                Metric("l1", "sum |w|", "weight", ">= 0", _HU),
                Metric("l2", "Frobenius norm", "weight", ">= 0", _HU),
                Metric("l1_over_l2", "l1 / l2", "1", "1 to sqrt(entries)", _HU),
                Metric("trace", "sum of the main diagonal", "weight", "real", _HU),
                Metric("spectral_norm", "largest singular value", "weight", ">= 0", _HU),
                Metric("trace_over_spectral_norm", "trace / spectral_norm", "1", "-rank to rank", _HU),
                Metric("singular_mean", "mean of the singular values", "weight", ">= 0", _HU),
                Metric("singular_var", "population variance of the singular values", "weight^2", ">= 0", _HU),
                Metric(
                    "stable_rank",
                    "l2^2 / spectral_norm^2",
                    "1",
                    "1 to rank",
                    "Rudelson and Vershynin 2007, arXiv math/0503442",
                ),
                Metric(
                    "effective_rank",
                    "exp(-sum p ln p), p = sigma / sum sigma, of the singular values",
                    "1",
                    "1 to rank",
                    "Roy and Vetterli 2007",
                ),
                Metric(
                    "weight_alpha",
                    "1 + n / sum ln(lambda / xmin) over the n eigenvalues lambda >= xmin of W^T W; "
                    "n is in column n",
                    "1",
                    "> 1",
                    _CLAUSET,
                ),
                Metric(
                    "weight_alpha_ks",
                    "max |F_fit - F| over those eigenvalues, F(lambda) the share of them below lambda",
                    "1",
                    "0 to 1",
                    _CLAUSET,
                ),
                Metric(
                    "weight_alpha_xmin",
                    "the eigenvalue that makes weight_alpha_ks least",
                    "weight^2",
                    "> 0",
                    _CLAUSET,
                ),
                Metric(
                    "gg_shape",
                    "b of the density ~ exp(-(abs(w - mean) / s)^b): "
                    "Gamma(1/b) Gamma(3/b) / Gamma(2/b)^2 = var / (mean abs deviation)^2",
                    "1",
                    "0.1 to 100; 1 Laplace, 2 Gaussian",
                    _GG,
                ),
                Metric(
                    "gg_scale", "s of that density: sqrt(var Gamma(1/b) / Gamma(3/b))", "weight", "> 0", _GG
                ),
                Metric("weight_kurtosis", "E (w - mean)^4 / var^2 - 3", "1", ">= -2", "definition"),
            )
        ),
        Metric("weight_mean", "mean over all measured weights", "weight", "real", _HU),
        Metric("weight_median", "lower median over all measured weights", "weight", "real", _HU),
        Metric("weight_var", "population variance over all measured weights", "weight^2", ">= 0", _HU),
        Metric("bias_mean", "mean over the biases of the measured matrices", "weight", "real", _HU),
        Metric("bias_median", "lower median over those biases", "weight", "real", _HU),
        Metric("bias_var", "population variance over those biases", "weight^2", ">= 0", _HU),
    )

    def measure_weights(self, weights: WeightMatrices) -> Result:
        """Rows per matrix, their means, and the pooled ones; without biases there are no bias rows.

        Each tensor is read and decomposed once; one is held at a time. Only where the pooled median lies
        outside the window kept for it are all read twice more.

        Raises:
            ValueError: there is no matrix, or heads are asked for and not known.
        """
        result = Result()
        columns: dict[str, list[Value]] = {name: [] for name in NAMES}
        counts = weights.heads() if self.parameters.heads else {}
        pooled = _Pool()
        for site, layer, matrix in weights.matrices():
            whole = self._measure(matrix, site, layer, None, result)
            pooled.join(matrix, whole)
            for name, value in whole.values.items():
                columns[name].append(value)
            for head, part in heads_of(site, matrix, counts):
                self._measure(part, site, layer, head, result)
        if not pooled.total:
            raise ValueError("the weights hold no matrix that the model's family names")
        if self.parameters.heads and not any(row.head is not None for row in result.rows):
            raise ValueError("heads are asked for, but the model does not say how many its matrices have")
        result.rows += [_mean(name, values, pooled.total) for name, values in columns.items()]

        def matrices() -> Iterator[Tensor]:
            return (matrix for _, _, matrix in weights.matrices())

        result.rows += pooled.rows("weight", matrices)
        biases = _Pool()
        for bias in weights.biases():
            biases.add(bias)
        if biases.total:
            result.rows += biases.rows("bias", weights.biases)
        return result

    def _measure(self, matrix: Tensor, site: str, layer: int, head: int | None, result: Result) -> Measured:
        measured = measure_matrix(matrix, self.parameters.min_eigenvalues)
        for name, value in measured.values.items():
            n = measured.tail if name in POWER_LAW and measured.tail else matrix.numel()
            result.rows.append(_row(name, value, n, site, layer, head))
        return measured


def _row(
    name: str,
    value: Value,
    n: int,
    site: str | None = None,
    layer: int | None = None,
    head: int | None = None,
) -> Row:
    if isinstance(value, str):
        return Row(name, None, n, site, layer, head, value)
    if not isfinite(value):
        return Row(name, None, n, site, layer, head, "the result is not finite in float64")
    return Row(name, value, n, site, layer, head)


def _mean(name: str, values: list[Value], n: int) -> Row:
    """Mean over matrices; absent where one of them is, as means over changing sets do not compare."""
    numbers = [value for value in values if not isinstance(value, str)]
    missing = len(values) - len(numbers)
    if missing:
        reason = next(value for value in values if isinstance(value, str))
        return _row(name, f"{missing} of {len(values)} matrices have none; the first: {reason}", n)
    return _row(name, sum(numbers) / len(numbers), n)


class _Pool:
    """All values of one kind together; without statistics once a value is not finite."""

    def __init__(self) -> None:
        self.total = 0
        self._moments, self._median = PooledMoments(), MedianWindow()
        self._broken = 0

    def join(self, values: Tensor, measured: Measured) -> None:
        """Take in a matrix whose moments are known."""
        entries = measured.entries
        self._take(values, entries.finite, entries.mean, entries.scatter)

    def add(self, values: Tensor) -> None:
        """Take in a tensor."""
        exact = values.double()
        mean = float(exact.mean())
        self._take(values, isfinite(mean), mean, float((exact - mean).square().sum()))

    def _take(self, values: Tensor, finite: bool, mean: float, scatter: float) -> None:
        self.total += values.numel()
        if finite:
            self._moments.join(values.numel(), mean, scatter)
            self._median.add(values)
        else:
            self._broken += 1

    def rows(self, kind: str, tensors: Callable[[], Iterable[Tensor]]) -> list[Row]:
        """Mean, median and variance; ``tensors`` gives all values again, should the median need it."""
        values: dict[str, Value]
        if self._broken:
            reason = f"{self._broken} tensors hold values that are not finite"
            values = dict.fromkeys(("mean", "median", "var"), reason)
        else:
            median = self._median.value()
            values = {
                "mean": self._moments.mean,
                "median": lower_median(tensors) if median is None else median,
                "var": self._moments.variance,
            }
        return [_row(f"{kind}_{name}", value, self.total) for name, value in values.items()]
