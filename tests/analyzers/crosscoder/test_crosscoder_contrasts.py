"""Contrasts: the sentences, what a tokenizer allows, and what a file may say."""

import json
from collections import Counter

import pytest
import torch

from analyzers.crosscoder.contrasts import Contrast, parse_contrasts, subject_verb_agreement, tokenise


def by_words(text: str) -> list[int]:
    """One token per word: its length."""
    return [len(each) for each in text.split(" ")]


def test_sentences_come_in_pairs_with_exchanged_answers() -> None:
    items = subject_verb_agreement(30)
    assert len(items) == len(set(items)) == 60
    for singular, plural in zip(items[::2], items[1::2], strict=True):
        assert (singular.right, singular.wrong) == (plural.wrong, plural.right)
        assert singular.right in (" is", " was", " has")
        one, many = singular.prefix.split(" "), plural.prefix.split(" ")
        assert one[0] == many[0] == "The"
        assert many[1] == one[1] + "s"
        assert one[2:] == many[2:]
        assert len(one) in (2, 5)


def test_conditions_are_balanced() -> None:
    assert set(Counter(each.kind for each in subject_verb_agreement(30)).values()) == {10}
    between = [each for each in subject_verb_agreement(30) if each.kind == "plural, singular between"]
    assert len(between) == 10
    assert all(not each.prefix.endswith("s") and each.prefix.split(" ")[1].endswith("s") for each in between)


def test_sentences_follow_from_the_seed() -> None:
    assert subject_verb_agreement(20) == subject_verb_agreement(40)[:40]
    assert subject_verb_agreement(20) != subject_verb_agreement(20, seed=1)


def test_more_frames_than_there_are_is_refused() -> None:
    # 16 subjects x 3 verbs alone, and for each number 16 x 15 other nouns x 4 prepositions x 3 verbs.
    there = 48 + 2 * 16 * 15 * 4 * 3
    assert len(subject_verb_agreement(there)) == 2 * there
    with pytest.raises(ValueError, match=f"from 1 to {there}"):
        subject_verb_agreement(there + 1)
    with pytest.raises(ValueError, match="frames is 0"):
        subject_verb_agreement(0)


def test_tokens_are_padded_and_answers_are_ids() -> None:
    found = tokenise(
        [Contrast("a bb", " ccc", " dddd"), Contrast("The big dog", " is", " a")], by_words, bos=99
    )
    assert found.tokens.tolist() == [[99, 1, 2, 0], [99, 3, 3, 3]]
    assert found.last.tolist() == [2, 3]
    assert (found.right.tolist(), found.wrong.tolist()) == ([3, 2], [4, 1])
    assert found.places().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2], [1, 3]]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (Contrast("a b", " ccc ddd", " e"), "is 2 tokens"),
        (Contrast("a b", "ccc", " e"), "changes the tokens"),
        (Contrast("a b", " is", " at"), "same token"),
        (Contrast("a", " is", " a"), "fewer than two"),
    ],
)
def test_what_the_tokenizer_does_not_allow_is_left_out_with_its_reason(item: Contrast, reason: str) -> None:
    good = Contrast("a b", " is", " a")
    found = tokenise([item, good], by_words)
    assert found.items == (good,)
    assert found.left_out[0][0] == item
    assert reason in found.left_out[0][1]
    with pytest.raises(ValueError, match=reason):
        tokenise([item], by_words)


def test_no_items_is_an_error() -> None:
    with pytest.raises(ValueError, match="none was given"):
        tokenise([], by_words)


def test_lines_become_contrasts() -> None:
    lines = [
        json.dumps({"prefix": "He", "right": " is", "wrong": " are"}),
        "",
        json.dumps({"prefix": "They", "right": " are", "wrong": " is", "kind": "plural"}),
    ]
    assert parse_contrasts(lines) == [
        Contrast("He", " is", " are"),
        Contrast("They", " are", " is", "plural"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 is no JSON object"),
        ('{"prefix": "a", "right": " b"}', "line 2: 'wrong' must be a text"),
        ('{"prefix": "", "right": " b", "wrong": " c"}', "line 2: 'prefix'"),
        ('{"prefix": "a", "right": " b", "wrong": 3}', "line 2: 'wrong'"),
        ('{"prefix": "a", "right": " b", "wrong": " b"}', "both ' b'"),
        ('{"prefix": "a", "right": " b", "wrong": " c", "kind": 1}', "'kind' must be"),
        ('{"prefix": "a", "right": " b", "wrong": " c", "more": 1}', "unknown key 'more'"),
    ],
)
def test_a_bad_line_is_named(line: str, reason: str) -> None:
    good = '{"prefix": "a", "right": " b", "wrong": " c"}'
    with pytest.raises(ValueError, match=reason):
        parse_contrasts([good, line])


def test_an_empty_file_is_an_error() -> None:
    with pytest.raises(ValueError, match="no contrast"):
        parse_contrasts([" "])


def test_the_padding_is_behind_the_last_token() -> None:
    found = tokenise(
        [Contrast("a b", " is", " a"), Contrast("a b c d", " is", " a")], lambda text: by_words(text)
    )
    assert torch.equal(found.last, torch.tensor([1, 3]))
