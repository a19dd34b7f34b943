"""Contrast tasks: prefixes with a right and a wrong next token.

Ours is subject-verb agreement, made of words; others come as JSON lines.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from analyzers.sample import priorities


@dataclass(frozen=True)
class Contrast:
    """A text, the continuation that is right, and one that is wrong; ``kind`` names the condition."""

    prefix: str
    right: str
    wrong: str
    kind: str | None = None


@dataclass(frozen=True)
class ContrastTokens:
    """Contrasts as tokens of one model, padded on the right.

    What lies behind ``last`` is padding, which a causal model does not see before it.

    Attributes:
        tokens: of BOS, if there is one, and the prefix.
        last: position of the prefix's last token, at which the answer is predicted.
        right: id of the right answer.
        wrong: id of the wrong answer.
        items: the contrasts, in the same order.
        left_out: contrasts that this tokenizer does not allow, with the reason.
    """

    tokens: Int64[Tensor, "items time"]
    last: Int64[Tensor, "items"]
    right: Int64[Tensor, "items"]
    wrong: Int64[Tensor, "items"]
    items: tuple[Contrast, ...]
    left_out: tuple[tuple[Contrast, str], ...] = ()

    def places(self) -> Int64[Tensor, "n 2"]:
        """(item, position) of every token that features are needed of: from position 1 to ``last``.

        In this order the rows of a harvest are to be given to :mod:`analyzers.crosscoder.effects`.
        """
        position = torch.arange(self.tokens.shape[1])
        return torch.nonzero((position >= 1) & (position <= self.last[:, None]))


def tokenise(
    items: Iterable[Contrast], encode: Callable[[str], Sequence[int]], bos: int | None = None
) -> ContrastTokens:
    """Contrasts that the tokenizer allows: prefix + answer must be the prefix's tokens and one more.

    Position 0 is not spliced, so that a prefix must have two tokens, with BOS.

    Args:
        items: the contrasts.
        encode: token ids of a text, without special tokens.
        bos: id before every prefix.

    Raises:
        ValueError: no contrast is left; the message has the first reason.
    """
    head = [] if bos is None else [bos]
    kept: list[tuple[Contrast, list[int], int, int]] = []
    left_out: list[tuple[Contrast, str]] = []
    for item in items:
        prefix = list(encode(item.prefix))
        try:
            right, wrong = (_answer(prefix, item, each, encode) for each in (item.right, item.wrong))
            if right == wrong:
                raise ValueError(f"{item.right!r} and {item.wrong!r} are the same token")
            if len(head) + len(prefix) < 2:
                raise ValueError(f"the prefix {item.prefix!r} has fewer than two tokens")
        except ValueError as error:
            left_out.append((item, str(error)))
        else:
            kept.append((item, head + prefix, right, wrong))
    if not kept:
        raise ValueError("no contrast is left" + (f": {left_out[0][1]}" if left_out else ", none was given"))
    tokens = torch.zeros(len(kept), max(len(each[1]) for each in kept), dtype=torch.int64)
    for row, (_, ids, _, _) in enumerate(kept):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return ContrastTokens(
        tokens,
        torch.tensor([len(ids) - 1 for _, ids, _, _ in kept]),
        torch.tensor([right for _, _, right, _ in kept]),
        torch.tensor([wrong for _, _, _, wrong in kept]),
        tuple(item for item, _, _, _ in kept),
        tuple(left_out),
    )


def _answer(prefix: list[int], item: Contrast, answer: str, encode: Callable[[str], Sequence[int]]) -> int:
    whole = list(encode(item.prefix + answer))
    if whole[: len(prefix)] != prefix:
        raise ValueError(f"{answer!r} changes the tokens of the prefix {item.prefix!r}")
    if len(whole) != len(prefix) + 1:
        raise ValueError(f"{answer!r} is {len(whole) - len(prefix)} tokens after {item.prefix!r}, not one")
    return whole[-1]


def parse_contrasts(lines: Iterable[str]) -> list[Contrast]:
    """Contrasts from JSON lines ``{"prefix": .., "right": .., "wrong": .., "kind": ..}``.

    ``kind`` may be absent. Answers are continuations: they begin with the space if there is one. Empty lines
    are passed over.

    Raises:
        ValueError: a line is no such object; the message has its number.
    """
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is no JSON: {error.msg}") from None
        if not isinstance(value, dict):
            raise ValueError(f"line {number} is no JSON object")
        unknown = sorted(set(value) - {"prefix", "right", "wrong", "kind"})
        if unknown:
            raise ValueError(f"line {number} has the unknown key {unknown[0]!r}")
        for key in ("prefix", "right", "wrong"):
            if not isinstance(value.get(key), str) or not value[key]:
                raise ValueError(f"line {number}: {key!r} must be a text that is not empty")
        if value["right"] == value["wrong"]:
            raise ValueError(f"line {number}: the right and the wrong answer are both {value['right']!r}")
        kind = value.get("kind")
        if kind is not None and not isinstance(kind, str):
            raise ValueError(f"line {number}: 'kind' must be a text")
        found.append(Contrast(value["prefix"], value["right"], value["wrong"], kind))
    if not found:
        raise ValueError("there is no contrast in the file")
    return found


_NOUNS = (
    ("key", "keys"),
    ("book", "books"),
    ("picture", "pictures"),
    ("table", "tables"),
    ("letter", "letters"),
    ("road", "roads"),
    ("house", "houses"),
    ("tree", "trees"),
    ("boy", "boys"),
    ("girl", "girls"),
    ("teacher", "teachers"),
    ("king", "kings"),
    ("doctor", "doctors"),
    ("horse", "horses"),
    ("ship", "ships"),
    ("garden", "gardens"),
)
_PREPOSITIONS = ("near", "behind", "beside", "above")
_VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))
_NUMBERS = ("singular", "plural")


def subject_verb_agreement(frames: int = 60, seed: int = 0) -> list[Contrast]:
    """Sentences "The keys near the cabinet are/is", two for every frame.

    A frame is a subject, a preposition with a second noun or nothing, and a verb; it comes once with the
    subject in the singular and once in the plural, so that the two answers change places and a feature that
    merely favours one verb cancels. Frames without a second noun, with one in the singular and with one in
    the plural take turns. ``kind`` is like ``plural, singular between`` or ``plural``. Frames follow from the
    seed alone.

    Raises:
        ValueError: more frames are asked for than there are, or none.
    """
    pools = [_frames(number, seed) for number in (None, 0, 1)]
    order = [frame for turn in _turns(pools) for frame in turn]
    if not 1 <= frames <= len(order):
        raise ValueError(f"frames is {frames}, from 1 to {len(order)} there are")
    return [item for frame in order[:frames] for item in _sentences(*frame)]


_Frame = tuple[int, str, int | None, int]


def _frames(number: int | None, seed: int) -> list[_Frame]:
    """(subject, phrase between, its number, verb) in an order that the seed gives."""
    between = [("", -1)]
    if number is not None:
        between = [
            (f" {preposition} the {noun[number]}", other)
            for preposition in _PREPOSITIONS
            for other, noun in enumerate(_NOUNS)
        ]
    found = [
        (subject, phrase, number, verb)
        for subject in range(len(_NOUNS))
        for phrase, other in between
        for verb in range(len(_VERBS))
        if other != subject
    ]
    pool = -1 if number is None else number
    index = torch.arange(len(found))
    order = priorities(torch.full_like(index, pool + 1), index, seed).argsort().tolist()
    return [found[each] for each in order]


def _turns(pools: Sequence[list[_Frame]]) -> Iterator[list[_Frame]]:
    for turn in range(max(len(pool) for pool in pools)):
        yield [pool[turn] for pool in pools if turn < len(pool)]


def _sentences(subject: int, phrase: str, number: int | None, verb: int) -> Iterator[Contrast]:
    for own, name in enumerate(_NUMBERS):
        kind = name if number is None else f"{name}, {_NUMBERS[number]} between"
        answers = _VERBS[verb]
        yield Contrast(f"The {_NOUNS[subject][own]}{phrase}", answers[own], answers[1 - own], kind)
