"""Top activating contexts: the tokens on which each feature is most active, and the text around them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from analyzers.crosscoder.active import Active


@dataclass(frozen=True)
class Context:
    """One of a feature's strongest activations, with the tokens around it.

    Attributes:
        feature: number of the latent.
        rank: 0 for the strongest.
        value: activation.
        sequence: number of the sequence in the probe.
        position: of the active token in the sequence, from 0.
        before: ids of the tokens before it.
        token: id of the active token.
        after: ids of the tokens behind it.
    """

    feature: int
    rank: int
    value: float
    sequence: int
    position: int
    before: tuple[int, ...]
    token: int
    after: tuple[int, ...]


class TopContexts:
    """The ``count`` strongest activations of every feature, from a stream of tokens.

    Of equal activations the one at the earlier place (sequence, then position) is kept. Feed every token
    once. Memory is ``latents x count``, whatever the number of tokens.
    """

    def __init__(self, latents: int, count: int = 10) -> None:
        if count < 1:
            raise ValueError(f"count is {count}, at least 1 is needed")
        self.latents, self.count, self.tokens = latents, count, 0
        # 0 is an empty slot: activations are above 0.
        self._value = np.zeros((latents, count), dtype=np.float32)
        self._place = np.zeros((latents, count, 2), dtype=np.int64)

    def update(self, active: Active, places: Int64[Tensor, "tokens 2"]) -> None:
        """Take tokens in; ``places`` are (sequence, position) of the rows that were encoded."""
        self.tokens += active.tokens
        feature, value = active.feature.cpu().numpy(), active.value.float().cpu().numpy()
        # Equal values may still win by their place.
        maybe = value >= self._value[feature, -1]
        token = active.token.cpu().numpy()[maybe]
        self._join(feature[maybe], value[maybe], places.cpu().numpy()[token])

    def merge(self, other: "TopContexts") -> None:
        """Take in what was gathered on other tokens, of the same features and with the same ``count``."""
        self.tokens += other.tokens
        feature, slot = np.nonzero(other._value)
        self._join(feature, other._value[feature, slot], other._place[feature, slot])

    def _join(self, feature: np.ndarray, value: np.ndarray, place: np.ndarray) -> None:
        touched = np.unique(feature)
        old, slot = np.nonzero(self._value[touched])
        owner = np.concatenate([touched[old], feature])
        values = np.concatenate([self._value[touched[old], slot], value])
        places = np.concatenate([self._place[touched[old], slot], place])
        order = np.lexsort((places[:, 1], places[:, 0], -values, owner))
        owner, values, places = owner[order], values[order], places[order]
        rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
        kept = rank < self.count
        self._value[touched], self._place[touched] = 0, 0
        self._value[owner[kept], rank[kept]] = values[kept]
        self._place[owner[kept], rank[kept]] = places[kept]

    def contexts(
        self, tokens: Int64[Tensor, "sequences time"], before: int = 16, after: int = 8
    ) -> Iterator[Context]:
        """Contexts by feature and rank; a feature that was never active has none.

        ``tokens`` are those of the probe. A window ends where its sequence does.
        """
        for feature, rank in zip(*np.nonzero(self._value), strict=True):
            sequence, position = (int(each) for each in self._place[feature, rank])
            ids = tokens[sequence].tolist()
            yield Context(
                int(feature),
                int(rank),
                float(self._value[feature, rank]),
                sequence,
                position,
                tuple(ids[max(position - before, 0) : position]),
                ids[position],
                tuple(ids[position + 1 : position + 1 + after]),
            )


def texts(context: Context, decode: Callable[[Sequence[int]], str]) -> tuple[str, str, str]:
    """Text before the active token, of it, and behind it.

    ``decode`` makes text of token ids. Each part is decoded by itself: where a character's bytes are spread
    over several tokens, a part shows the tokenizer's replacement character.
    """
    before, token, after = (
        decode(ids) if ids else "" for ids in (context.before, (context.token,), context.after)
    )
    return before, token, after


def marked(
    context: Context, decode: Callable[[Sequence[int]], str], marks: tuple[str, str] = ("⟦", "⟧")
) -> str:
    """The window as one text with the active token between marks.

    >>> context = Context(0, 0, 1.5, 0, 1, (7,), 8, (9, 9))
    >>> marked(context, lambda ids: "".join(f" {each}" for each in ids))
    ' 7⟦ 8⟧ 9 9'
    """
    before, token, after = texts(context, decode)
    return f"{before}{marks[0]}{token}{marks[1]}{after}"
