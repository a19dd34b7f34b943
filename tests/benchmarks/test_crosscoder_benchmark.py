"""The benchmark of crosscoders: its sides compute the same, and its limit counts operations."""

import pytest

from benchmarks.crosscoder import Shape, _peaks, flops, run


def test_the_sides_train_alike() -> None:
    shape = Shape(snapshots=3, width=16, latents=96, k=4, batch=32)
    lines = [line for line in run(shape, repeats=3, memory=False) if line.machine["device"] == "cpu"]
    assert [(line.name, line.bar) for line in lines] == [
        ("crosscoder.einsum", pytest.approx(1 / 6)),
        ("crosscoder.einsum_gated", pytest.approx(1 / 6)),
        ("crosscoder.einsum_fused", None),
        ("crosscoder.concatenated", pytest.approx(1 / 3)),
    ]
    for line in lines:
        assert line.notes["largest_relative_difference_of_loss"] < 1e-5
        losses = line.notes["losses"]["ours"]
        assert len(losses) == 4
        assert line.limit["share_reached"] == pytest.approx(line.limit["ratio"] / line.ratio)


def test_the_limit_counts_operations() -> None:
    # The encoder's product over all latents; decode and three gradients over the active ones.
    shape = Shape(snapshots=2, width=10, latents=100, k=5)
    assert flops(shape) == {"ours": 2 * 20 * 100 + 4 * 2 * 20 * 5, "against": 10 * 20 * 100}


@pytest.mark.long
def test_the_einsum_layout_needs_tensors_of_batch_snapshots_latents() -> None:
    shape = Shape(snapshots=8, width=16, latents=4096, k=8, batch=256)
    found = _peaks(shape)
    assert found["einsum"] > 8 * 4096 * 256 * 4 / 1e6
    assert found["ours"] < found["einsum"] / 2
