"""Whether the same channels stay the largest: overlap of the top channels with another checkpoint's."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated

import torch
from pydantic import Field

from analyzers.base import (
    REFERENCES,
    ActivationComparison,
    ComparisonParameters,
    Metric,
    ModelShape,
    Reference,
    Result,
    attempted,
)
from analyzers.extremes import ExtremesSpec, ExtremesState
from analyzers.reductions import Spec, State
from analyzers.registry import register


class MassiveChannelParameters(ComparisonParameters):
    """Protocol of the comparison."""

    channels: Annotated[int, Field(description="top channels compared", ge=1)] = 3


def top_channels(state: ExtremesState, count: int) -> frozenset[int]:
    """The ``count`` channels of the largest sum of squares over all tokens.

    Raises:
        ValueError: fewer channels are other than 0, or a sum is not finite.
    """
    if not bool(torch.isfinite(state.energy).all()):
        raise ValueError("activations are not finite")
    positive = int((state.energy > 0).sum())
    if positive < count:
        raise ValueError(f"{positive} channels are other than 0, the top {count} are asked for")
    return frozenset(state.energy.topk(count).indices.tolist())


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Share of the union that is in both.

    >>> jaccard(frozenset({1, 2, 3}), frozenset({2, 3, 4}))
    0.5
    """
    return len(one & other) / len(one | other)


def _overlap(mine: ExtremesState, theirs: ExtremesState, count: int) -> float:
    return jaccard(top_channels(mine, count), top_channels(theirs, count))


@register
class MassiveChannelAnalyzer(ActivationComparison):
    """Overlap of the channels that carry the most energy after every block."""

    name = "massive_channels"
    version = 1
    summary = "overlap of the top channels with the first, previous or last checkpoint's, at every layer"
    parameters_type = MassiveChannelParameters
    metrics = tuple(
        Metric(
            f"top_channels_overlap_{name}",
            f"|A n B| / |A u B|, A, B: the `channels` channels of largest sum of h^2, here and at {says}",
            "1",
            "0 to 1; k^2 / (d (2k - 1)) for k << d unrelated ones",
            "ours (Jaccard index); channels stay fixed by Sun et al. 2024, arXiv 2402.17762",
        )
        for name, says in REFERENCES.items()
    )
    parameters: MassiveChannelParameters

    def needs(self, shape: ModelShape) -> list[Spec]:
        """Squared norms of channels: the reduction of `massive`."""
        return [ExtremesSpec("resid_post", layer) for layer in range(shape.layers)]

    def compare(
        self,
        states: Mapping[Spec, State],
        others: Mapping[Reference, Mapping[Spec, State]],
        shape: ModelShape,
    ) -> Result:
        """One row per block and reference."""
        result = Result()
        for spec in self.needs(shape):
            mine = states[spec]
            assert isinstance(mine, ExtremesState)
            for name, found in others.items():
                theirs = found[spec]
                assert isinstance(theirs, ExtremesState)
                overlap = partial(_overlap, mine, theirs, self.parameters.channels)
                result.rows.append(
                    attempted(f"top_channels_overlap_{name}", overlap, mine.tokens, spec.site, spec.layer)
                )
        return result
