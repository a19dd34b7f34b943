"""Massive activations: largest magnitudes of residual stream and branches, their places, RMS over depth."""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

import numpy as np
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor

from analyzers.adapters import Model
from analyzers.base import (
    ActivationAnalyzer,
    Metric,
    ModelShape,
    Parameters,
    Result,
    Row,
    SequenceValues,
    attempted,
)
from analyzers.extremes import TOP, ExtremesSpec, ExtremesState
from analyzers.reductions import Spec, State
from analyzers.registry import register

_SUN = "Sun et al. 2024, arXiv 2402.17762"
_PERI = "variance growth of Peri-LN, arXiv 2502.02732"
_ORDINAL = ("largest", "second largest", "third largest")
_SEQUENCE_MEANS = ("top1", "top2", "top3", "median", "top1_over_median", "massive_count")
_KEPT_OF_SEQUENCES = ("top1", "median", "top1_over_median")
_BLOCK_SITES = ("resid_post", "attn_out", "mlp_out")


class MassiveParameters(Parameters):
    """Protocol of the massive activations."""

    above: Annotated[float, Field(description="a massive activation is above this", gt=0)] = 100.0
    ratio: Annotated[
        float, Field(description="and at least this many times its sequence's lower median", gt=0)
    ] = 1000.0
    channels: Annotated[int, Field(description="number of channels of `top_channels_energy_share`", ge=1)] = 3
    sequence_values: Annotated[
        bool,
        Field(
            description="keep top1, median and top1_over_median of every sequence after each block, in the "
            "table `sequence_values`: what a bootstrap over sequences needs"
        ),
    ] = True


def _places() -> Iterator[Metric]:
    for k, ordinal in enumerate(_ORDINAL, start=1):
        for what, range_ in (("channel", "0 to d - 1"), ("position", "0 to T - 1")):
            yield Metric(
                f"top{k}_{what}",
                f"the {what} that holds the {ordinal} |h| in most sequences; of equals the first",
                "index, from 0",
                range_,
                _SUN,
            )
            yield Metric(
                f"top{k}_{what}_share",
                f"share of sequences whose {ordinal} |h| is at that {what}",
                "1",
                "above 0 to 1; small: no fixed place",
                _SUN,
            )


def rms_growth(rms: Float64[np.ndarray, "layers"]) -> float:
    """Slope of the least-squares line through ``ln RMS_l`` over the blocks ``l``; per block.

    0: constant over depth; g: RMS grows by the factor exp(g) from block to block.

    Raises:
        ValueError: there are fewer than two blocks, or an RMS is not finite and above 0.

    >>> round(rms_growth(np.exp([0.5, 1.0, 1.5])), 9)
    0.5
    """
    if len(rms) < 2:
        raise ValueError("one block has no slope")
    if not (np.isfinite(rms).all() and (rms > 0).all()):
        raise ValueError("an RMS is 0 or not finite")
    layer = np.arange(len(rms)) - (len(rms) - 1) / 2
    return float(layer @ np.log(rms) / (layer @ layer))


@register
class MassiveAnalyzer(ActivationAnalyzer):
    """Extremes at the embedding, after every block and of its branches; ``h`` is the activation there.

    Branches are what is added to the residual stream, where the model shows them.
    """

    name = "massive"
    version = 2
    summary = (
        "top-1..3 magnitudes with channel and position, median, massive count, RMS: "
        "residual stream and branches"
    )
    parameters_type = MassiveParameters
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
        Metric(
            "massive_count",
            "mean over sequences of the number of |h| > `above` with |h| >= `ratio` x median",
            "activations per sequence",
            ">= 0",
            _SUN,
        ),
        *_places(),
        Metric("rms", "sqrt(mean of h^2 over tokens and channels)", "activation", ">= 0", _PERI),
        Metric(
            "top_channel_energy_share",
            "max_c E_c / sum_c E_c, E_c = sum over all tokens of h_c^2",
            "1",
            "1/d to 1",
            f"ours; after {_SUN}",
        ),
        Metric(
            "top_channels_energy_share",
            "the same for the `channels` largest E_c together",
            "1",
            "channels/d to 1",
            f"ours; after {_SUN}",
        ),
        Metric(
            "rms_growth",
            "slope of ln RMS_l on l by least squares over blocks l = 0..L-1",
            "1 per block",
            "real; 0: constant",
            _PERI,
        ),
        Metric(
            "rms_last_over_embedding",
            "RMS after the last block / RMS of the embedding",
            "1",
            ">= 0",
            _PERI,
        ),
    )
    parameters: MassiveParameters

    def needs(self, shape: ModelShape) -> list[Spec]:
        """Extremes at the embedding and of every block."""
        return [self._spec("embedding", None), *(s for site in self._by_site(shape).values() for s in site)]

    def _spec(self, site: str, layer: int | None) -> ExtremesSpec:
        return ExtremesSpec(site, layer, self.parameters.above, self.parameters.ratio)

    def _by_site(self, shape: ModelShape) -> dict[str, list[ExtremesSpec]]:
        found = {}
        for site in _BLOCK_SITES:
            # Not every model of a person's own has branches, nor every block both.
            layers = [
                layer
                for layer in range(shape.layers)
                if site == "resid_post" or (isinstance(shape, Model) and shape.has(site, layer))
            ]
            if layers:
                found[site] = [self._spec(site, layer) for layer in layers]
        return found

    def measure(self, states: Mapping[Spec, State], shape: ModelShape) -> Result:
        """Rows of every place; the growth over depth has a site and no layer."""
        result = Result()
        embedding = self._spec("embedding", None)
        result.rows += self._place(embedding, _extremes(states[embedding]))
        for site, specs in self._by_site(shape).items():
            found = [_extremes(states[spec]) for spec in specs]
            for spec, state in zip(specs, found, strict=True):
                result.rows += self._place(spec, state)
                if site == "resid_post" and self.parameters.sequence_values:
                    result.sequence_values += _sequences(spec, state)
            result.rows.append(_growth(site, found))
        last = _extremes(states[self._spec("resid_post", shape.layers - 1)])
        result.rows.append(_over_embedding(last, _extremes(states[embedding])))
        return result

    def _place(self, spec: ExtremesSpec, state: ExtremesState) -> Iterator[Row]:
        def row(metric: str, value: float | None, n: int, note: str | None = None) -> Row:
            return Row(metric, value, n, spec.site, spec.layer, note=note)

        means = dict(zip(_SEQUENCE_MEANS, (state.sums / state.n).tolist(), strict=True))
        for metric, value in means.items():
            yield row(metric, value, state.n, None if math.isfinite(value) else f"value is {value}")
        if means["median"] != 0:
            yield row("top1_over_median_of_means", means["top1"] / means["median"], state.n)
        else:
            yield row("top1_over_median_of_means", None, state.n, "the median is 0")
        for k in range(TOP):
            for what, counts in (("channel", state.channels[k]), ("position", state.positions[k])):
                yield from _mode(spec, f"top{k + 1}_{what}", counts, state.n)
        yield row("rms", _rms(state), state.tokens)
        total = float(state.energy.sum())
        for metric, count in (
            ("top_channel_energy_share", 1),
            ("top_channels_energy_share", self.parameters.channels),
        ):
            width = len(state.energy)
            if count > width:
                yield row(metric, None, state.tokens, f"there are {width} channels")
            elif not (math.isfinite(total) and total > 0):
                yield row(metric, None, state.tokens, f"the sum of squares is {total:g}")
            else:
                yield row(metric, float(state.energy.topk(count).values.sum()) / total, state.tokens)


def _extremes(state: State) -> ExtremesState:
    assert isinstance(state, ExtremesState)
    return state


def _sequences(spec: ExtremesSpec, state: ExtremesState) -> Iterator[SequenceValues]:
    index, values = state.sequences()
    for metric in _KEPT_OF_SEQUENCES:
        column = values[:, _SEQUENCE_MEANS.index(metric)]
        yield SequenceValues(metric, spec.site, spec.layer, index.numpy(), column.numpy())


def _rms(state: ExtremesState) -> float:
    return math.sqrt(float(state.energy.sum()) / (state.tokens * len(state.energy)))


def _mode(spec: ExtremesSpec, metric: str, counts: Tensor, sequences: int) -> Iterator[Row]:
    """Where most sequences have it, and their share; sequences of zeros and with NaN have it nowhere."""
    n = int(counts.sum())
    if not n:
        note = "no sequence has a value other than 0 and NaN"
        for name in (metric, f"{metric}_share"):
            yield Row(name, None, sequences, spec.site, spec.layer, note=note)
        return
    best = int(counts.argmax())
    yield Row(metric, float(best), n, spec.site, spec.layer)
    yield Row(f"{metric}_share", int(counts[best]) / n, n, spec.site, spec.layer)


def _growth(site: str, states: list[ExtremesState]) -> Row:
    def growth() -> float:
        return rms_growth(np.array([_rms(state) for state in states]))

    return attempted("rms_growth", growth, states[0].tokens, site)


def _over_embedding(last: ExtremesState, embedding: ExtremesState) -> Row:
    ours, first = _rms(last), _rms(embedding)
    value = ours / first if first else None
    note = None if first else "the embedding is 0"
    return Row("rms_last_over_embedding", value, last.tokens, "resid_post", note=note)
