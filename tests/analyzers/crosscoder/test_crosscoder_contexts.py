"""Top contexts against sorting all activations."""

import pytest
import torch
from meaning_support import of_dense

from analyzers.crosscoder.contexts import Context, TopContexts, marked, texts

TOKENS = torch.arange(6 * 9).reshape(6, 9)
PLACES = torch.cartesian_prod(torch.arange(6), torch.arange(1, 9))


def activations(features: int = 7) -> torch.Tensor:
    """Whole numbers, so that many are equal, and a feature that is never active."""
    made = torch.Generator().manual_seed(0)
    values = torch.randint(0, 5, (len(PLACES), features), generator=made).float()
    values[:, 3] = 0
    return values


def brute_force(values: torch.Tensor, count: int) -> list[tuple[int, int, float, int, int]]:
    found = []
    for feature in range(values.shape[1]):
        pairs = [
            (-value, *place)
            for value, place in zip(values[:, feature].tolist(), PLACES.tolist(), strict=True)
            if value > 0
        ]
        found += [(feature, rank, -v, s, p) for rank, (v, s, p) in enumerate(sorted(pairs)[:count])]
    return found


def seen(top: TopContexts) -> list[tuple[int, int, float, int, int]]:
    return [(c.feature, c.rank, c.value, c.sequence, c.position) for c in top.contexts(TOKENS)]


@pytest.mark.parametrize("size", [1, 5, 48])
@pytest.mark.parametrize("count", [1, 4, 100])
def test_contexts_are_those_of_brute_force(size: int, count: int) -> None:
    values = activations()
    # In an order of its own: ties go by place and not by arrival.
    order = torch.randperm(len(PLACES), generator=torch.Generator().manual_seed(1))
    top = TopContexts(values.shape[1], count)
    for part in order.split(size):
        top.update(of_dense(values[part]), PLACES[part])
    assert seen(top) == brute_force(values, count)
    assert top.tokens == len(PLACES)


def test_halves_merge_to_the_whole() -> None:
    values = activations()
    halves = [TopContexts(values.shape[1], 3) for _ in range(2)]
    for half, part in zip(halves, torch.arange(len(PLACES)).chunk(2), strict=True):
        half.update(of_dense(values[part]), PLACES[part])
    halves[1].merge(halves[0])
    assert seen(halves[1]) == brute_force(values, 3)


def test_the_window_ends_with_its_sequence() -> None:
    values = torch.zeros(len(PLACES), 1)
    values[[0, 6, len(PLACES) - 1]] = torch.tensor([[3.0], [2.0], [1.0]])
    top = TopContexts(1, 3)
    top.update(of_dense(values), PLACES)
    first, middle, last = top.contexts(TOKENS, before=3, after=2)
    assert first == Context(0, 0, 3.0, 0, 1, (0,), 1, (2, 3))
    assert middle == Context(0, 1, 2.0, 0, 7, (4, 5, 6), 7, (8,))
    assert last == Context(0, 2, 1.0, 5, 8, (50, 51, 52), 53, ())


def test_text_is_made_of_the_three_parts() -> None:
    def decode(ids: object) -> str:
        return "".join(chr(97 + each) for each in ids)  # type: ignore[attr-defined]

    context = Context(0, 0, 1.0, 0, 2, (0, 1), 2, ())
    assert texts(context, decode) == ("ab", "c", "")
    assert marked(context, decode, ("<", ">")) == "ab<c>"


def test_a_count_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match="count is 0"):
        TopContexts(3, 0)
