"""The plain definition of a crosscoder, on numbers worked out by hand."""

import pytest
import torch

from analyzers.crosscoder.weights import Crosscoder, Gate


def two_latents(gate: Gate, threshold: float) -> Crosscoder:
    """Latent 0 reads channel 0 of snapshot 0 and writes 3 and 1 there; latent 1 is its like in channel 1."""
    encoder = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    decoder = torch.tensor([[3.0, 0, 1.0, 0], [0, 0.5, 0, 0.25]])
    zero = torch.zeros(2)
    return Crosscoder(
        encoder, zero, decoder, torch.zeros(4), torch.full((2,), threshold), torch.ones(2), gate=gate
    )


def test_strengths_are_the_norms_by_snapshot() -> None:
    assert two_latents("shared", 0.0).strengths().tolist() == [[3.0, 1.0], [0.5, 0.25]]


def test_the_shared_gate_sums_the_norms() -> None:
    rows = torch.tensor([[1.0, 1.0, 0, 0]])
    # 1 * (3 + 1) = 4 is above 1, 1 * 0.75 is not.
    crosscoder = two_latents("shared", 1.0)
    assert crosscoder.encode(rows).tolist() == [[1.0, 0.0]]
    assert crosscoder.reconstruct(rows).tolist() == [[3.0, 0, 1.0, 0]]


def test_a_gate_per_snapshot_opens_where_its_own_norm_suffices() -> None:
    rows = torch.tensor([[1.5, 1.0, 0, 0]])
    crosscoder = two_latents("per-snapshot", 2.0)
    # 1.5 * 3 is above 2 at snapshot 0, 1.5 * 1 is not at snapshot 1.
    assert crosscoder.encode_each(rows).tolist() == [[[1.5, 0.0], [0.0, 0.0]]]
    assert crosscoder.reconstruct(rows).tolist() == [[4.5, 0, 0, 0]]
    with pytest.raises(ValueError, match="per snapshot"):
        crosscoder.encode(rows)


def test_what_is_below_zero_is_not_active() -> None:
    assert two_latents("shared", 0.0).encode(torch.tensor([[-1.0, 0, 0, 0]])).tolist() == [[0.0, 0.0]]
