"""The reduction that hands tokens on: which tokens, in which order, and what happens when the sink fails."""

from typing import Any

import numpy as np
import pytest
import torch

from analyzers.harvest import Harvest, HarvestSpec, HarvestState, TokenChoice, choose
from analyzers.reductions import Batch
from analyzers.sample import SampleSpec

SEQUENCES, TIME = 12, 20
TOKENS = torch.arange(SEQUENCES * TIME).reshape(SEQUENCES, TIME) * 3 % 101


def activations() -> torch.Tensor:
    """Values that say where they come from."""
    sequence, position = torch.meshgrid(torch.arange(SEQUENCES), torch.arange(TIME), indexing="ij")
    return torch.stack([sequence, position], dim=2).float()


def handed(choice: TokenChoice, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Values and tokens that arrive when the probe comes in batches of these sizes."""
    arrived: list[tuple[np.ndarray, np.ndarray]] = []
    state = HarvestSpec("embedding", None, choice, lambda v, t: arrived.append((v, t))).create()
    values = activations()
    for index in torch.arange(SEQUENCES).split(sizes):
        state.update(values[index], Batch(TOKENS[index], index))
    assert state.finish() == sum(len(v) for v, _ in arrived)
    return np.concatenate([v for v, _ in arrived]), np.concatenate([t for _, t in arrived])


@pytest.mark.parametrize("count", [None, 1, 30, 228])
def test_chosen_tokens_arrive_in_the_order_of_the_probe_whatever_the_batches(count: int | None) -> None:
    choice = choose(SEQUENCES, TIME, count, seed=5)
    values, tokens = handed(choice, [SEQUENCES])
    assert len(values) == (count or SEQUENCES * (TIME - 1))
    assert (tokens[:, 1] > 0).all()
    assert np.array_equal(values, tokens[:, :2])
    assert np.array_equal(tokens[:, 2], TOKENS[tokens[:, 0], tokens[:, 1]])
    assert np.array_equal(tokens, choice.tokens(TOKENS))
    assert (np.diff(tokens[:, 0] * TIME + tokens[:, 1]) > 0).all()
    for sizes in ([1] * SEQUENCES, [5, 4, 3]):
        again = handed(choice, sizes)
        assert np.array_equal(again[0], values)
        assert np.array_equal(again[1], tokens)


def test_they_are_the_tokens_of_the_sample_in_memory() -> None:
    sample = SampleSpec("embedding", None, 30, seed=5, first=1).create()
    sample.update(activations(), Batch(TOKENS, torch.arange(SEQUENCES)))
    _, tokens = handed(choose(SEQUENCES, TIME, 30, seed=5), [4, 8])
    assert np.array_equal(sample.finish()[1], tokens[:, :2])


def test_more_tokens_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="229 tokens are asked for, and there are 228"):
        choose(SEQUENCES, TIME, SEQUENCES * (TIME - 1) + 1)
    with pytest.raises(ValueError, match="there are 0"):
        choose(SEQUENCES, 1, None)


def test_a_sink_that_fails_is_asked_no_more_and_its_error_comes_at_the_end() -> None:
    asked = []

    def sink(values: np.ndarray, tokens: np.ndarray) -> None:
        asked.append(len(values))
        raise OSError("the disk is full")

    state = HarvestState(TokenChoice(), sink)
    for index in torch.arange(SEQUENCES).split(3):
        state.update(activations()[index], Batch(TOKENS[index], index))
    assert asked == [57]
    whole = HarvestState(TokenChoice(), sink)
    whole.merge(state)
    for each in (state, whole):
        with pytest.raises(OSError, match="the disk is full"):
            each.finish()


def test_a_block_that_the_model_lacks_is_not_asked_for() -> None:
    class Shape:
        layers, width = 2, 2

    def ignore(*_: Any) -> None:
        """Take nothing."""

    for layer, beyond in ((1, False), (2, True)):
        reader = Harvest(HarvestSpec("resid_post", layer, TokenChoice(), ignore))
        assert reader.beyond(Shape()) is beyond
        assert reader.needs(Shape()) == ([] if beyond else [reader.spec])
