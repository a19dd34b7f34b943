"""Massive activations: the largest magnitudes of the residual stream against its median."""

from collections.abc import Mapping

from analyzers.base import ActivationAnalyzer, Metric, ModelShape, Result, Row
from analyzers.reductions import ExtremesSpec, ExtremesState, Spec, State
from analyzers.registry import register

_SUN = "Sun et al. 2024, arXiv 2402.17762"


@register
class MassiveAnalyzer(ActivationAnalyzer):
    """Top-1..3 and median magnitude after every block, per sequence over tokens and channels, averaged."""

    name = "massive"
    version = 1
    summary = "top-1..3 and median magnitude of the residual stream, and their ratio, at every layer"
    metrics = (
        Metric("top1", "mean over sequences of the largest |h|", "activation", ">= 0", _SUN),
        Metric("top2", "mean over sequences of the second largest |h|", "activation", ">= 0", _SUN),
        Metric("top3", "mean over sequences of the third largest |h|", "activation", ">= 0", _SUN),
        Metric("median", "mean over sequences of the lower median of |h|", "activation", ">= 0", _SUN),
        Metric(
            "top1_over_median",
            "mean over sequences of top-1 / median",
            "1",
            ">= 1; 6.5 to 7.8 for Gaussian values, n = 1e5 to 1e6",
            "arXiv 2508.03616 (mean of ratios)",
        ),
        Metric(
            "top1_over_median_of_means",
            "(mean of top-1) / (mean of median)",
            "1",
            ">= 1",
            "arXiv 2508.03616 (ratio of means)",
        ),
    )

    def needs(self, shape: ModelShape) -> list[Spec]:
        """Extremes after every block."""
        return [ExtremesSpec("resid_post", layer) for layer in range(shape.layers)]

    def measure(self, states: Mapping[Spec, State], shape: ModelShape) -> Result:
        """Means over sequences, per block."""
        result = Result()
        for spec in self.needs(shape):
            state = states[spec]
            assert isinstance(state, ExtremesState)
            means = (state.sums / state.n).tolist()
            names = ("top1", "top2", "top3", "median", "top1_over_median")
            values = dict(zip(names, means, strict=True))
            if values["median"] != 0:
                values["top1_over_median_of_means"] = values["top1"] / values["median"]
            for name, value in values.items():
                result.rows.append(Row(name, value, state.n, spec.site, spec.layer))
        return result
