"""AUCs against scikit-learn; planted features get their label and random ones none."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from meaning_support import of_dense
from sklearn.metrics import roc_auc_score

from analyzers.crosscoder.active import Active
from analyzers.crosscoder.labels import Criteria, Label, Labeller, rank_auc
from analyzers.crosscoder.rules import NONE, look

SEQUENCES, TIME, VOCABULARY = 80, 60, 50


def probe() -> torch.Tensor:
    made = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (SEQUENCES, TIME), generator=made)


TOKENS = probe()
PLACES = torch.cartesian_prod(torch.arange(SEQUENCES), torch.arange(1, TIME))
SEEN = look(TOKENS.numpy(), PLACES.numpy())


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_is_scikit_learns(pairs: list[tuple[int, bool]]) -> None:
    values, positive = (np.array(each) for each in zip(*pairs, strict=True))
    active = values > 0
    found = rank_auc(values[active].astype(float), positive[active], len(values), int(positive.sum()))
    if positive.all() or not positive.any():
        assert found is None
    else:
        assert found == pytest.approx(roc_auc_score(positive, values), abs=1e-12)


def test_what_the_rules_say_of_a_short_sequence() -> None:
    #                      A  B  C  A  B  B  D
    tokens = np.array([[1, 2, 3, 1, 2, 2, 4]])
    seen = look(tokens, np.stack([np.zeros(7, dtype=np.int64), np.arange(7)], axis=1))
    assert seen.previous.tolist() == [NONE, 1, 2, 3, 1, 2, 2]
    assert seen.predicted.tolist() == [NONE, NONE, NONE, 2, 3, 2, NONE]
    assert seen.bigram.tolist() == [False, False, False, False, True, False, False]


def test_a_place_outside_the_probe_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        look(np.zeros((2, 3), dtype=np.int64), np.array([[0, 3]]))


def labels(*features: np.ndarray, criteria: Criteria | None = None) -> list[Label]:
    """Labels of features that are active where the masks say, with strengths that vary."""
    strengths = np.random.default_rng(0).uniform(0.5, 2, (len(PLACES), len(features)))
    dense = torch.from_numpy(np.stack(features, axis=1) * strengths)
    return Labeller(TOKENS, PLACES, criteria).labels(of_dense(dense))


PLANTED = {
    "token": (SEEN.token == 7, 7),
    "previous-token": (SEEN.previous == 11, 11),
    "position": (SEEN.position < 5, (1, 5)),
    "induction": (SEEN.predicted != NONE, None),
    "induction-token": (SEEN.predicted == 3, 3),
    "repeated-bigram": (SEEN.bigram, None),
}


@pytest.mark.parametrize("rule", PLANTED)
def test_planted_features_get_their_label(rule: str) -> None:
    mask, argument = PLANTED[rule]
    (label,) = labels(mask)
    assert label.rule == rule
    assert label.best is not None
    assert label.best.argument == argument
    assert (label.best.auc, label.best.precision, label.best.recall) == (1.0, 1.0, 1.0)
    odd = PLACES[:, 0].numpy() % 2 == 1
    assert label.best.positives == label.active == (mask & odd).sum()
    assert label.best.base == pytest.approx(mask[odd].mean())
    assert label.chance is not None
    assert label.chance < 0.75


def test_a_planted_feature_with_noise_keeps_its_label() -> None:
    rng = np.random.default_rng(2)
    mask = PLANTED["previous-token"][0] & (rng.random(len(PLACES)) < 0.9) | (rng.random(len(PLACES)) < 0.003)
    (label,) = labels(mask)
    assert label.rule == "previous-token"
    assert label.best is not None
    assert 0.85 < label.best.auc < 1


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.97])
def test_random_features_get_none(density: float) -> None:
    rng = np.random.default_rng(1)
    found = labels(*(rng.random((30, len(PLACES))) < density))
    assert [each.rule for each in found] == [None] * 30
    assert all(each.best is not None and each.note for each in found)


def test_scores_are_those_of_the_held_out_half() -> None:
    mask = (SEEN.token == 7) & (PLACES[:, 0].numpy() % 2 == 0)
    noise = np.random.default_rng(0).random(len(PLACES)) < 0.05
    (label,) = labels(mask | noise)
    assert label.rule is None
    scores = {each.rule: each for each in label.scores}
    assert scores["token"].argument == 7
    assert abs(scores["token"].auc - 0.5) < 0.1


def test_active_everywhere_marks_nothing() -> None:
    """It is active after every 11, and after all else: the AUC alone is high, as it is stronger there."""
    strength = np.where(SEEN.previous == 11, 2.0, 1.0)
    dense = torch.from_numpy(strength[:, None])
    (label,) = Labeller(TOKENS, PLACES).labels(of_dense(dense))
    assert label.best is not None
    assert label.best.auc == 1.0
    assert label.best.purity < 0.1
    assert label.rule is None


def test_no_label_where_random_features_do_as_well() -> None:
    low = Criteria(auc=0.5, purity=-1.0, support=5)
    rng = np.random.default_rng(1)
    found = labels(*(rng.random((20, len(PLACES))) < 0.02), criteria=low)
    refused = [each for each in found if each.note == "a random feature of the same density does as well"]
    assert len(refused) >= 15
    assert all(each.rule is None and each.chance >= each.best.auc for each in refused)  # type: ignore[operator,union-attr]
    assert any(
        each.rule for each in labels(*(rng.random((20, len(PLACES))) < 0.02), criteria=replace(low, draws=0))
    )


def test_too_few_active_tokens_is_a_reason() -> None:
    mask = np.zeros(len(PLACES), dtype=bool)
    mask[:5] = True
    (label,) = labels(mask)
    assert (label.rule, label.best, label.scores) == (None, None, ())
    assert label.note == "active on 0 held-out tokens, 20 are needed"


def test_the_order_of_tokens_does_not_matter() -> None:
    dense = torch.from_numpy(np.stack([mask for mask, _ in PLANTED.values()], axis=1) * 1.0)
    order = torch.randperm(len(PLACES), generator=torch.Generator().manual_seed(1))
    mixed: Active = of_dense(dense[order])
    first, second = (
        Labeller(TOKENS, PLACES).labels(of_dense(dense)),
        Labeller(TOKENS, PLACES[order]).labels(mixed),
    )
    assert [(a.rule, a.best, a.scores) for a in first] == [(b.rule, b.best, b.scores) for b in second]


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ([[0, 1], [0, 1]], "repeat"),
        ([[0, 1], [2, 1]], "one half is empty"),
        ([[0, 1], [1, 99]], "outside"),
    ],
)
def test_places_that_give_no_halves_are_refused(places: list[list[int]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Labeller(TOKENS, torch.tensor(places))


def test_features_of_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens"):
        Labeller(TOKENS, PLACES).labels(of_dense(torch.ones(3, 2)))
