"""Rule-based labels of features, scored by the area under the ROC curve on tokens they were not chosen on.

docs/crosscoder_meaning.md says how to read them.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int64
from scipy.stats import rankdata
from torch import Tensor

from analyzers.crosscoder.active import Active
from analyzers.crosscoder.rules import NONE, RULES, Places, Rule, best_range, heaviest, look


def rank_auc(
    values: Float[np.ndarray, "active"],
    positive: Bool[np.ndarray, "active"],
    tokens: int,
    positives: int,
) -> float | None:
    """P(activation on a positive token > on another) + P(they are equal) / 2, exactly.

    Only the active tokens are given (``values > 0``): the ``tokens - len(values)`` others are one tie at 0,
    ``positives`` counts all tokens with the property. None where all tokens have it, or none.

    >>> rank_auc(np.array([2.0, 1.0]), np.array([True, False]), 4, 2)
    0.625
    """
    others = tokens - positives
    if positives <= 0 or others <= 0:
        return None
    seen = int(positive.sum())
    silent = others - (len(values) - seen)
    above = 0.0 if not seen else float(rankdata(values)[positive].sum()) - seen * (seen + 1) / 2
    wins = above + seen * silent + (positives - seen) * silent / 2
    return wins / (positives * others)


@dataclass(frozen=True)
class Score:
    """How well a feature's activation marks the places that have a property.

    Attributes:
        rule: see :data:`analyzers.crosscoder.rules.Rule`.
        argument: what the rule was completed by: an id, a range [a, b), or nothing.
        auc: of the activation as a score for the property.
        precision: share of the summed activation on tokens with the property.
        recall: share of the tokens with the property on which the feature is active.
        base: share of all tokens that have the property.
        positives: tokens with the property.
    """

    rule: Rule
    argument: int | tuple[int, int] | None
    auc: float
    precision: float
    recall: float
    base: float
    positives: int

    @property
    def purity(self) -> float:
        """``(precision - base) / (1 - base)``: 0 by chance, 1 if it is active on such tokens alone."""
        return (self.precision - self.base) / (1 - self.base)


@dataclass(frozen=True)
class Criteria:
    """When a rule becomes a label.

    Attributes:
        auc: least AUC on the held-out half.
        purity: least purity there: a feature that is active nearly everywhere also marks every rare token.
        support: least number of held-out tokens on which the feature is active, and of those with the
            property and without it.
        draws: random features of the same density per labelled feature, each of which must do worse.
        seed: of the draws.
    """

    auc: float = 0.75
    purity: float = 0.5
    support: int = 20
    draws: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Label:
    """What is said of one feature.

    Attributes:
        feature: number of the latent.
        rule: the label; None: there is none, ``note`` says why.
        best: the score of the label; without one the highest AUC found. None where no rule has the support.
        chance: highest AUC among the random features; None where none were drawn.
        active: held-out tokens on which the feature is active.
        scores: of every rule that has the support, in the order of ``RULES``.
        note: why there is no label.
    """

    feature: int
    rule: Rule | None
    best: Score | None
    chance: float | None
    active: int
    scores: tuple[Score, ...]
    note: str | None = None


class _Half:
    """Tokens of one half, with the counts that all features share."""

    def __init__(self, places: Places, time: int) -> None:
        self.places = places
        self.by_position = np.bincount(places.position, minlength=time)
        self.ids = {
            "token": places.token,
            "previous-token": places.previous,
            "induction-token": places.predicted,
        }
        self.counts = {rule: _counted(ids) for rule, ids in self.ids.items()}
        self.flags = {"induction": places.predicted != NONE, "repeated-bigram": places.bigram}
        self.totals = {rule: int(flag.sum()) for rule, flag in self.flags.items()}


def _counted(ids: Int64[np.ndarray, "n"]) -> dict[int, int]:
    found, counts = np.unique(ids, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


class Labeller:
    """Labels features over one sample of tokens.

    What completes a rule (a token, a range) is chosen on the sequences with an even number: the id with the
    largest share of the activation, the range with the largest excess of it. All scores are of the sequences
    with an odd number, so that choosing among many does not raise them.

    Args:
        tokens: of the probe.
        places: (sequence, position) of the sampled tokens, each once.
        criteria: when a rule becomes a label.

    Raises:
        ValueError: places lie outside the probe or repeat, or are all of one half.
    """

    def __init__(
        self,
        tokens: Int64[Tensor, "sequences time"],
        places: Int64[Tensor, "places 2"],
        criteria: Criteria | None = None,
    ) -> None:
        self.criteria = criteria or Criteria()
        at, self.places = tokens.cpu().numpy(), places.cpu().numpy()
        if len(np.unique(self.places, axis=0)) < len(self.places):
            raise ValueError("places repeat: every token must be given once")
        seen = look(at, self.places)
        self._held_out = seen.sequence % 2 == 1
        if self._held_out.all() or not self._held_out.any():
            raise ValueError("labels need sequences with even and with odd numbers: one half is empty")
        # The place of a token within its half.
        self._within = np.where(self._held_out, self._held_out.cumsum(), (~self._held_out).cumsum()) - 1
        self._chosen_on, self._scored_on = (
            _Half(seen.part(mask), at.shape[1]) for mask in (~self._held_out, self._held_out)
        )

    def labels(self, active: Active) -> list[Label]:
        """The label of every feature. ``active`` are the features of the sampled tokens, in their order.

        Raises:
            ValueError: ``active`` is of another number of tokens.
        """
        if active.tokens != len(self.places):
            raise ValueError(f"features are of {active.tokens} tokens, places of {len(self.places)}")
        feature, token = active.feature.cpu().numpy(), active.token.cpu().numpy()
        # By feature and then by place, so that neither batches nor the order of tokens show in the draws.
        order = np.lexsort((self.places[token, 1], self.places[token, 0], feature))
        feature, token = feature[order], token[order]
        value = active.value.double().cpu().numpy()[order]
        bounds = np.searchsorted(feature, np.arange(active.latents + 1))
        return [
            self._label(number, token[start:stop], value[start:stop])
            for number, (start, stop) in enumerate(pairwise(bounds))
        ]

    def _label(self, feature: int, token: Int64[np.ndarray, "n"], value: Float[np.ndarray, "n"]) -> Label:
        wanted = self.criteria
        active = int(self._held_out[token].sum())
        scores = self._scores(token, value)
        if not scores:
            note = f"active on {active} held-out tokens, {wanted.support} are needed"
            if active >= wanted.support:
                note = f"no rule holds on {wanted.support} held-out tokens and fails on as many"
            return Label(feature, None, None, None, active, (), note)
        passing = [each for each in scores if each.auc >= wanted.auc and each.purity >= wanted.purity]
        if not passing:
            best = max(scores, key=lambda each: each.auc)
            note = f"no rule has AUC {wanted.auc:g} and purity {wanted.purity:g}"
            return Label(feature, None, best, None, active, scores, note)
        best = max(passing, key=lambda each: each.auc)
        chance = self._chance(feature, value)
        if chance is not None and chance >= best.auc:
            note = "a random feature of the same density does as well"
            return Label(feature, None, best, chance, active, scores, note)
        return Label(feature, best.rule, best, chance, active, scores)

    def _chance(self, feature: int, value: Float[np.ndarray, "n"]) -> float | None:
        """The highest AUC of random features: the same activations on tokens drawn without replacement."""
        rng = np.random.default_rng([self.criteria.seed, feature])
        found: list[float] = []
        for _ in range(self.criteria.draws):
            token = rng.choice(len(self.places), len(value), replace=False)
            found += [each.auc for each in self._scores(token, value)]
        return max(found, default=None)

    def _scores(self, token: Int64[np.ndarray, "n"], value: Float[np.ndarray, "n"]) -> tuple[Score, ...]:
        held_out = self._held_out[token]
        at, weight = self._within[token[~held_out]], value[~held_out]
        test, values = self._within[token[held_out]], value[held_out]
        if len(test) < max(self.criteria.support, 1):
            return ()
        found = []
        for rule in RULES:
            half = self._scored_on
            argument: int | tuple[int, int] | None = None
            if rule in half.flags:
                positive, positives = half.flags[rule][test], half.totals[rule]
            elif not len(at):
                continue
            elif rule == "position":
                first = self._chosen_on
                argument = start, end = best_range(first.places.position[at], weight, first.by_position)
                position = half.places.position[test]
                positive = (position >= start) & (position < end)
                positives = int(half.by_position[start:end].sum())
            else:
                argument = heaviest(self._chosen_on.ids[rule][at], weight)
                if argument is None:
                    continue
                positive = half.ids[rule][test] == argument
                positives = half.counts[rule].get(argument, 0)
            score = self._score(rule, argument, values, positive, positives)
            found += [] if score is None else [score]
        return tuple(found)

    def _score(
        self,
        rule: Rule,
        argument: int | tuple[int, int] | None,
        values: Float[np.ndarray, "n"],
        positive: Bool[np.ndarray, "n"],
        positives: int,
    ) -> Score | None:
        tokens = len(self._scored_on.places)
        if min(positives, tokens - positives) < max(self.criteria.support, 1):
            return None
        auc = rank_auc(values, positive, tokens, positives)
        assert auc is not None
        return Score(
            rule,
            argument,
            auc,
            float(values[positive].sum() / values.sum()),
            float(positive.sum() / positives),
            positives / tokens,
            positives,
        )
