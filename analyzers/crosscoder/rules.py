"""What the tokens up to a place say: the properties that rule-based labels are made of."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int64

Rule = Literal["token", "previous-token", "position", "induction", "induction-token", "repeated-bigram"]
"""A property of a place ``t`` of a sequence ``x``:

- ``token``: ``x[t] = v``, for one token v.
- ``previous-token``: ``x[t - 1] = v``, for one token v.
- ``position``: ``a <= t < b``, for one range.
- ``induction``: ``x[t]`` has occurred before in the sequence, so that what followed it is predicted.
- ``induction-token``: the token that followed the latest earlier ``x[t]`` is v, for one token v.
- ``repeated-bigram``: the pair ``x[t - 1], x[t]`` has occurred before in the sequence.
"""

RULES: tuple[Rule, ...] = (
    "token",
    "previous-token",
    "position",
    "induction",
    "induction-token",
    "repeated-bigram",
)
"""In this order: of rules that do equally well the first is the label."""

NONE = -1
"""Id where there is no token: before the first, or nothing predicted."""


@dataclass(frozen=True)
class Places:
    """Some places of a probe, and what each rule says of them.

    Attributes:
        sequence: number of the sequence.
        position: in the sequence, from 0.
        token: its id.
        previous: id of the token before, ``NONE`` at position 0.
        predicted: id of the token that followed the latest earlier place with the same token; ``NONE`` where
            there is no such place. In ``A A`` the second A predicts A.
        bigram: whether the token and the one before occurred in this order earlier in the sequence.
    """

    sequence: Int64[np.ndarray, "places"]
    position: Int64[np.ndarray, "places"]
    token: Int64[np.ndarray, "places"]
    previous: Int64[np.ndarray, "places"]
    predicted: Int64[np.ndarray, "places"]
    bigram: Bool[np.ndarray, "places"]

    def __len__(self) -> int:
        return len(self.sequence)

    def part(self, mask: Bool[np.ndarray, "places"]) -> "Places":
        """Some of the places."""
        fields = (self.sequence, self.position, self.token, self.previous, self.predicted, self.bigram)
        return Places(*(each[mask] for each in fields))


def look(tokens: Int64[np.ndarray, "sequences time"], places: Int64[np.ndarray, "places 2"]) -> Places:
    """What the rules say of (sequence, position) in the tokens of a probe.

    Raises:
        ValueError: a place lies outside the probe.
    """
    sequence, position = places[:, 0], places[:, 1]
    outside = (places < 0).any(axis=1) | (sequence >= tokens.shape[0]) | (position >= tokens.shape[1])
    if outside.any():
        where = tuple(places[outside][0].tolist())
        raise ValueError(f"place {where} lies outside the probe of {tokens.shape} tokens")
    used, row = np.unique(sequence, return_inverse=True)
    predicted = np.full((len(used), tokens.shape[1]), NONE, dtype=np.int64)
    bigram = np.zeros(predicted.shape, dtype=bool)
    for index, number in enumerate(used):
        predicted[index], bigram[index] = _repeats(tokens[number].tolist())
    token = tokens[sequence, position]
    previous = np.where(position > 0, tokens[sequence, np.maximum(position - 1, 0)], NONE)
    return Places(sequence, position, token, previous, predicted[row, position], bigram[row, position])


def _repeats(ids: list[int]) -> tuple[list[int], list[bool]]:
    latest: dict[int, int] = {}
    pairs: set[tuple[int, int]] = set()
    predicted, bigram = [], []
    for t, token in enumerate(ids):
        predicted.append(ids[latest[token] + 1] if token in latest else NONE)
        latest[token] = t
        pair = (ids[t - 1], token) if t else None
        bigram.append(pair in pairs)
        if pair is not None:
            pairs.add(pair)
    return predicted, bigram


def heaviest(ids: Int64[np.ndarray, "n"], weight: Float[np.ndarray, "n"]) -> int | None:
    """The id with the largest sum of weights, the lowest of equal ones; None without ids but ``NONE``.

    >>> heaviest(np.array([5, 7, 7, -1]), np.array([2.0, 1.0, 1.0, 9.0]))
    5
    """
    there = ids != NONE
    if not there.any():
        return None
    found, at = np.unique(ids[there], return_inverse=True)
    return int(found[np.bincount(at, weight[there]).argmax()])


def best_range(
    position: Int64[np.ndarray, "n"],
    weight: Float[np.ndarray, "n"],
    counts: Int64[np.ndarray, "time"],
) -> tuple[int, int]:
    """The range [a, b) of positions whose share of the weights exceeds its share of all tokens by most.

    ``counts`` are all tokens by position. Of equal ranges the one that ends first is taken.

    >>> best_range(np.array([1, 2, 3]), np.ones(3), np.array([0, 10, 10, 10, 10, 10]))
    (1, 4)
    """
    mass = np.bincount(position, weight, minlength=len(counts))
    total = np.concatenate([[0.0], (mass / mass.sum() - counts / counts.sum()).cumsum()])
    # The latest of the lowest starts: a range does not begin with positions that have no tokens.
    lowest = np.minimum.accumulate(total)
    fresh = np.maximum.accumulate(np.where(total <= lowest, np.arange(len(total)), 0))
    end = int((total - lowest).argmax())
    return int(fresh[end]), end
