"""Divergence of a model's predictions from the unigram and the bigram distribution of the probe."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from analyzers.base import ActivationAnalyzer, Metric, ModelShape, Parameters, Result, Row
from analyzers.ngram_reductions import NgramSpec, NgramState
from analyzers.reductions import Spec, State
from analyzers.registry import register

_PHASES = "after arXiv 2509.17196 (two phases of training); direction and smoothing are ours"


class NgramParameters(Parameters):
    """How the bigram distribution is smoothed."""

    prior: Annotated[
        float | None,
        Field(
            description="weight of the unigram in the bigram distribution, in pairs of tokens; absent: the "
            "power of two up to 65536 under which the probe is likeliest, each pair left out in turn",
            gt=0,
        ),
    ] = None


@register
class NgramAnalyzer(ActivationAnalyzer):
    """The reference text is the probe itself: its neighbouring tokens are counted before the first batch."""

    name = "ngram_kl"
    version = 1
    summary = "KL divergence of the next-token predictions from the probe's unigram and bigram distributions"
    parameters_type = NgramParameters
    metrics = (
        Metric(
            "unigram_kl",
            "mean over positions of sum_v q(v) ln(q(v) / p(v)), q: shares of the tokens that the probe "
            "asks to predict",
            "nats",
            ">= 0; 0: the model predicts by frequency alone",
            _PHASES,
        ),
        Metric(
            "bigram_kl",
            "the same with q(v) = (c(u,v) - [v = next] + prior q1(v)) / (c(u) - 1 + prior), u: the token "
            "at the position, c: counts of pairs in the probe, q1: the unigram; the pair itself is left out",
            "nats",
            ">= 0; 0: the model predicts from the last token alone",
            _PHASES,
        ),
    )
    parameters: NgramParameters

    def needs(self, shape: ModelShape) -> list[Spec]:
        """The divergences, taken from the logits as they come."""
        return [NgramSpec(self.parameters.prior)]

    def measure(self, states: Mapping[Spec, State], shape: ModelShape) -> Result:
        """One row per metric."""
        state = states[NgramSpec(self.parameters.prior)]
        assert isinstance(state, NgramState)
        if not state.n:
            return Result([Row(m.name, None, 0, note="no sequence has two tokens") for m in self.metrics])
        sums = (("unigram_kl", state.unigram), ("bigram_kl", state.bigram))
        return Result([Row(metric, total / state.n, state.n) for metric, total in sums])
