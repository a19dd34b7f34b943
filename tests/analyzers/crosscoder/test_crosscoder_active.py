"""Active pairs are what the plain crosscoder computes, and decode to what it decodes."""

import pytest
import torch
from meaning_support import random_crosscoder

from analyzers.crosscoder.active import find_active, reconstructed, written
from analyzers.crosscoder.weights import Gate


def rows_of(tokens: int, inputs: int) -> torch.Tensor:
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_pairs_are_the_dense_features(size: int) -> None:
    crosscoder = random_crosscoder(30, 3, 8)
    rows = rows_of(20, 24)
    found = find_active(crosscoder, rows, size)
    dense = torch.zeros(20, 30)
    dense[found.token, found.feature] = found.value
    wanted = crosscoder.encode(rows)
    assert 0 < (wanted > 0).float().mean() < 0.9
    torch.testing.assert_close(dense, wanted, atol=1e-6, rtol=0)
    assert torch.equal(found.counts(), (wanted > 0).sum(dim=0))
    assert bool((found.value > 0).all())


@pytest.mark.parametrize("gate", ["shared", "per-snapshot"])
def test_each_snapshot_is_what_the_whole_reconstruction_says_of_it(gate: Gate) -> None:
    crosscoder = random_crosscoder(30, 3, 8, gate=gate)
    rows = rows_of(20, 24)
    active = find_active(crosscoder, rows, 6)
    whole = crosscoder.reconstruct(rows).view(20, 3, 8) / crosscoder.scale[:, None]
    for snapshot in range(3):
        torch.testing.assert_close(
            reconstructed(active, crosscoder, snapshot), whole[:, snapshot], atol=1e-5, rtol=1e-5
        )
    assert len(active.at(0).value) <= len(active.value)
    assert (gate == "shared") == (len(active.at(0).value) == len(active.value))


def test_the_bias_is_no_part_of_what_features_write() -> None:
    crosscoder = random_crosscoder(30, 2, 8)
    active = find_active(crosscoder, rows_of(5, 16))
    bias = reconstructed(active, crosscoder, 1) - written(active, crosscoder, 1)
    wanted = crosscoder.decoder_bias[8:] / crosscoder.scale[1]
    torch.testing.assert_close(bias, wanted.expand(5, 8), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", ["shared", "per-snapshot"])
def test_pairs_of_some_tokens_are_those_that_they_have_alone(gate: Gate) -> None:
    crosscoder = random_crosscoder(30, 3, 8, gate=gate)
    rows = rows_of(20, 24)
    some = torch.arange(20) % 3 == 0
    alone, among = find_active(crosscoder, rows[some], 4), find_active(crosscoder, rows).of_tokens(some)
    assert (alone.tokens, alone.latents) == (among.tokens, among.latents) == (7, 30)
    for name in ("token", "feature", "starts"):
        assert torch.equal(getattr(alone, name), getattr(among, name))
    for snapshot in range(3):
        torch.testing.assert_close(alone.value_at(snapshot), among.value_at(snapshot))


def test_no_rows_have_no_pairs() -> None:
    crosscoder = random_crosscoder(4, 1, 2)
    active = find_active(crosscoder, torch.zeros(0, 2))
    assert (active.tokens, len(active.value)) == (0, 0)
    assert written(active, crosscoder, 0).shape == (0, 2)


def test_tokens_without_active_features_are_written_nothing() -> None:
    crosscoder = random_crosscoder(4, 1, 2, threshold=1e9)
    assert torch.equal(written(find_active(crosscoder, rows_of(3, 2)), crosscoder, 0), torch.zeros(3, 2))


def test_rows_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        find_active(random_crosscoder(4, 1, 2), torch.tensor([[1.0, torch.inf]]))
