"""Massive activations: the Gaussian null, planted channels, and the order of means and ratios."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from analyzers.adapters import Adapter
from analyzers.base import Row
from analyzers.extremes import ExtremesState, lower_median
from analyzers.massive import MassiveAnalyzer, rms_growth
from analyzers.reductions import Batch, State
from analyzers.runner import batches, run_pass


@dataclass
class Shape:
    layers: int
    width: int


def measured(*parts: Tensor) -> dict[str, float | None]:
    """The analyzer's values for one block whose output comes in these parts ``[sequences, time, width]``."""
    return {row.metric: row.value for row in rows_of(*parts)}


def rows_of(*parts: Tensor, mask: Tensor | None = None, **parameters: float) -> list[Row]:
    """Rows of that block; the embedding is zeros."""
    analyzer, shape = MassiveAnalyzer(parameters), Shape(1, parts[0].shape[-1])
    embedding, block = analyzer.needs(shape)
    states = {embedding: embedding.create(), block: block.create()}
    for part in parts:
        tokens = torch.zeros(part.shape[:2], dtype=torch.int64)
        states[block].update(part, Batch(tokens, torch.arange(len(part)), mask))
        states[embedding].update(torch.zeros_like(part), Batch(tokens, torch.arange(len(part))))
    rows = analyzer.measure(states, shape).rows
    assert {(row.site, row.layer) for row in rows} == {
        ("embedding", None),
        ("resid_post", 0),
        ("resid_post", None),
    }
    return [row for row in rows if row.layer == 0]


FIRST = ("top1", "top2", "top3", "median", "top1_over_median", "top1_over_median_of_means")


def gaussian_null(n: int) -> float:
    """E[max |z|] / median |z| of n standard normal values, by integrating the maximum's survival function."""
    grid = np.linspace(0, 12, 24001)
    log_inside = np.log1p(-2 * np.exp(log_ndtr(-grid[1:])))
    return float(np.trapezoid(1 - np.exp(n * np.concatenate([[-np.inf], log_inside])), grid) / 0.6744897502)


def test_the_null_has_the_published_values() -> None:
    assert 6.5 < gaussian_null(10**5) < gaussian_null(10**6) < 7.8
    assert gaussian_null(1) == pytest.approx((2 / np.pi) ** 0.5 / 0.6744897502, rel=1e-6)


def test_a_random_model_lies_at_the_gaussian_null() -> None:
    # n = 512 x 256 = 131072 values per sequence and layer. The maximum of so many scatters by 0.4 between
    # sequences, so the mean of 4 by 0.2; 0.6 allows for tokens that differ a little in scale.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=4096,
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=1024,
            max_position_embeddings=512,
        )
        adapter = Adapter(GPTNeoXForCausalLM(config).eval())
        tokens = torch.randperm(4096)[:2048].reshape(4, 512)
    analyzer = MassiveAnalyzer()
    result = analyzer.measure(run_pass(adapter, batches(tokens, 2), analyzer.needs(adapter)), adapter)
    ratios = {
        row.layer: row.value
        for row in result.rows
        if (row.metric, row.site) == ("top1_over_median", "resid_post")
    }
    assert set(ratios) == {0, 1}
    assert {row.value for row in result.rows if row.metric == "massive_count"} == {0}
    for ratio in ratios.values():
        assert ratio == pytest.approx(gaussian_null(512 * 256), abs=0.6)


def test_a_planted_channel_is_found_exactly() -> None:
    values = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    for sequence, size in enumerate((1000.0, 2000.0, 6000.0)):
        values[sequence, 0, 17] = -size
        values[sequence, 9, 17] = size / 2
        values[sequence, 9, 40] = -size / 4
    found = measured(values)
    assert found["top1"] == 3000
    assert found["top2"] == 1500
    assert found["top3"] == 750
    medians = [float(np.sort(np.abs(v.numpy()).ravel())[(50 * 64 - 1) // 2]) for v in values]
    assert found["median"] == pytest.approx(np.mean(medians), rel=1e-12)
    assert found["top1_over_median"] == pytest.approx(
        np.mean([size / median for size, median in zip((1000, 2000, 6000), medians, strict=True)]), rel=1e-12
    )
    assert found["top1_over_median_of_means"] == pytest.approx(3000 / np.mean(medians), rel=1e-12)


def test_the_median_is_the_lower_one_and_ratios_are_kept_apart() -> None:
    # Magnitudes 1 2 3 4 (lower median 2, ratio 2) and 1 1 9 10 (lower median 1, ratio 10).
    one, two = torch.tensor([[[1.0, -2], [3, -4]]]), torch.tensor([[[-10.0, 1], [1, 9]]])
    expected = {
        "top1": 7,
        "top2": 6,
        "top3": 1.5,
        "median": 1.5,
        "top1_over_median": 6,
        "top1_over_median_of_means": 7 / 1.5,
    }
    for found in (measured(torch.cat([one, two])), measured(one, two)):
        assert {name: found[name] for name in FIRST} == expected


def test_states_merge() -> None:
    values = torch.randn(5, 8, 16, generator=torch.Generator().manual_seed(2))
    batch = Batch(torch.zeros(5, 8, dtype=torch.int64), torch.arange(5))
    whole, one, other = ExtremesState(), ExtremesState(), ExtremesState()
    whole.update(values, batch)
    one.update(values[:2], batch.part(slice(2)))
    other.update(values[2:], batch.part(slice(2, 5)))
    one.merge(other)
    assert (one.n, other.n) == (5, 3)
    torch.testing.assert_close(one.sums, whole.sums, rtol=1e-14, atol=0)
    torch.testing.assert_close(one.energy, whole.energy, rtol=1e-14, atol=0)
    assert torch.equal(one.channels, whole.channels)
    assert torch.equal(one.positions, whole.positions)
    assert (one.tokens, whole.tokens) == (40, 40)


def test_zero_activations_give_no_finite_ratio() -> None:
    found = measured(torch.zeros(2, 4, 4))
    assert found["top1"] == found["median"] == 0
    assert not np.isfinite(found["top1_over_median"] or 0.0)
    absent = {row.metric: row.note for row in rows_of(torch.zeros(2, 4, 4)) if row.value is None}
    assert absent == {
        "top1_over_median_of_means": "the median is 0",
        "top_channel_energy_share": "the sum of squares is 0",
        "top_channels_energy_share": "the sum of squares is 0",
        **{
            f"top{k}_{what}{share}": "no sequence has a value other than 0 and NaN"
            for k in (1, 2, 3)
            for what in ("channel", "position")
            for share in ("", "_share")
        },
    }


def test_half_precision_models_are_reduced_in_float32(
    tiny_neox: Callable[..., Any], tiny_tokens: Tensor
) -> None:
    adapter = Adapter(tiny_neox(torch.bfloat16))
    seen: list[torch.dtype] = []

    class Watch(ExtremesState):
        def update(self, values: Tensor, batch: Batch) -> None:
            seen.append(values.dtype)

    class WatchSpec:
        site, layer = "resid_post", 1

        def create(self) -> State:
            return Watch()

    run_pass(adapter, batches(tiny_tokens, 8), [WatchSpec()])
    assert seen == [torch.float32]


@pytest.mark.parametrize("n", [1, 2, 7, 100, 16384, 50001, 262144])
@pytest.mark.parametrize("kind", ["normal", "ties", "heavy", "sorted", "scaled"])
def test_the_median_is_exact(n: int, kind: str) -> None:
    generator = np.random.default_rng(n)
    values = np.abs(generator.standard_normal((3, n)))
    if kind == "ties":
        values = np.round(values)
    elif kind == "heavy":
        values = np.exp(10 * values)
    elif kind == "sorted":  # a stride through it meets every part evenly
        values.sort(axis=1)
    elif kind == "scaled":  # channels of other sizes, in the period of a power of two
        values *= np.where(np.arange(n) % 64 < 31, 1e-3, 1e3)
    for dtype in (np.float32, np.float64):
        rows = values.astype(dtype)
        expected = np.sort(rows, axis=1)[:, (n - 1) // 2]
        found = lower_median(torch.from_numpy(rows))
        np.testing.assert_array_equal(found.numpy(), expected)
        assert found.dtype == torch.from_numpy(rows).dtype


def test_planted_massive_activations_are_found_with_their_places() -> None:
    # Ones, so that the median is 1; channel 5 of the first token is massive in three sequences of four.
    values = torch.ones(4, 20, 32)
    values[:3, 0, 5] = torch.tensor([3000.0, -2000, 1000])
    values[:3, 7, 9] = 150.0  # above 100, and not 1000 times the median
    values[3, 4, 2] = 6000.0
    values[:, 11, 30] = -90.0
    rows = {row.metric: (row.value, row.n) for row in rows_of(values)}
    assert rows["massive_count"] == (1, 4)
    assert rows["top1"] == (3000, 4)
    assert rows["top1_channel"] == (5, 4)
    assert rows["top1_channel_share"] == (0.75, 4)
    assert rows["top1_position"] == (0, 4)
    assert rows["top1_position_share"] == (0.75, 4)
    assert (rows["top2_channel"], rows["top2_position"]) == ((9, 4), (7, 4))
    assert rows["top2_channel_share"] == (0.75, 4)
    assert (rows["top3_channel"], rows["top3_position"]) == ((30, 4), (11, 4))
    energy = values.double().square().sum((0, 1))
    assert rows["rms"] == pytest.approx((float(energy.mean() / 80) ** 0.5, 80))
    assert rows["top_channel_energy_share"][0] == pytest.approx(float(energy[2] / energy.sum()))
    assert rows["top_channels_energy_share"][0] == pytest.approx(
        float((energy[2] + energy[5] + energy[9]) / energy.sum())
    )
    loose = {row.metric: row.value for row in rows_of(values, ratio=80, above=89.0, channels=1)}
    # Now also 150 in three sequences and -90 in all: (3 + 3 + 4 + 1) / 4.
    assert loose["massive_count"] == 11 / 4
    assert loose["top_channels_energy_share"] == loose["top_channel_energy_share"]


def test_a_massive_channel_planted_in_a_model_is_found(
    tiny_neox: Callable[..., Any], tiny_tokens: Tensor
) -> None:
    adapter = Adapter(copy.deepcopy(tiny_neox()))
    with torch.no_grad():  # block 1 writes 5000 into channel 77 of every token, from its MLP's bias
        adapter.model.gpt_neox.layers[1].mlp.dense_4h_to_h.bias[77] = 5000.0
    analyzer = MassiveAnalyzer()
    rows = analyzer.measure(run_pass(adapter, batches(tiny_tokens, 3), analyzer.needs(adapter)), adapter).rows
    found = {(row.metric, row.site, row.layer): row.value for row in rows}
    for layer in (1, 2):
        assert found["top1_channel", "resid_post", layer] == 77
        assert found["top1_channel_share", "resid_post", layer] == 1
        assert found["massive_count", "resid_post", layer] == 40  # every token of a sequence
    assert found["top_channel_energy_share", "mlp_out", 1] == pytest.approx(1, abs=1e-4)
    for site, layer in (
        ("resid_post", 0),
        ("attn_out", 1),
        ("mlp_out", 0),
        ("mlp_out", 2),
        ("embedding", None),
    ):
        assert found["massive_count", site, layer] == 0
    assert found["rms", "mlp_out", 1] == pytest.approx(5000 / 128**0.5, rel=1e-4)
    assert found["rms_growth", "resid_post", None] == pytest.approx(
        np.log(found["rms", "resid_post", 2] / found["rms", "resid_post", 0]) / 2
    )
    assert found["rms_last_over_embedding", "resid_post", None] == pytest.approx(
        found["rms", "resid_post", 2] / found["rms", "embedding", None]
    )


def test_rms_is_that_of_the_branches(tiny_neox: Callable[..., Any], tiny_tokens: Tensor) -> None:
    adapter, analyzer = Adapter(tiny_neox(torch.float64)), MassiveAnalyzer()
    states = run_pass(adapter, batches(tiny_tokens, 3), analyzer.needs(adapter))
    found = {(r.metric, r.site, r.layer): r.value for r in analyzer.measure(states, adapter).rows}
    seen: dict[str, Tensor] = {}
    block = adapter.model.gpt_neox.layers[2]
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
        for name, module in (("attn_out", block.attention.dense), ("mlp_out", block.mlp.dense_4h_to_h))
    ]
    with torch.no_grad():
        adapter.model(tiny_tokens)
    for handle in handles:
        handle.remove()
    for site, values in seen.items():
        assert found["rms", site, 2] == pytest.approx(float(values.square().mean().sqrt()), rel=1e-12)


def test_growth_over_depth() -> None:
    assert rms_growth(np.exp(0.3 * np.arange(7) - 2)) == pytest.approx(0.3, rel=1e-12)
    assert rms_growth(np.full(4, 3.0)) == pytest.approx(0, abs=1e-15)
    noisy = np.exp(np.random.default_rng(0).normal(size=9))
    assert rms_growth(noisy) == pytest.approx(np.polyfit(np.arange(9), np.log(noisy), 1)[0], rel=1e-9)
    for wrong, why in (([1.0], "one block"), ([1.0, 0.0], "is 0"), ([1.0, np.inf], "not finite")):
        with pytest.raises(ValueError, match=why):
            rms_growth(np.array(wrong))


@pytest.mark.parametrize("fill", [0.0, 1e9, float("nan")])
def test_padding_does_not_count(fill: float) -> None:
    values = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(3))
    alone = rows_of(values[:1, 4:], values[1:2, :9], values[2:])
    padded = values.clone()
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, :4], mask[1, 9:] = False, False
    padded[~mask] = fill
    assert rows_of(padded, mask=mask) == alone


def test_nan_is_no_number() -> None:
    values = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(4))
    values[1, 3, 3] = torch.nan
    rows = {row.metric: row for row in rows_of(values)}
    for name in (*FIRST, "massive_count", "rms"):
        assert rows[name].value is None or np.isnan(rows[name].value)
    assert rows["top1_channel"].n == 1  # of the other sequence
    assert rows["top_channel_energy_share"].value is None


def test_values_of_single_sequences_do_not_depend_on_batches_or_padding() -> None:
    values = torch.randn(5, 8, 16, generator=torch.Generator().manual_seed(2))
    values[3, 0, 2] = 50
    mask = torch.ones(5, 8, dtype=torch.bool)
    mask[1, 5:] = False
    mask[4] = False  # nothing but padding: no such sequence
    batch = Batch(torch.zeros(5, 8, dtype=torch.int64), torch.arange(7, 12), mask)
    whole, one, other = ExtremesState(), ExtremesState(), ExtremesState()
    whole.update(values, batch)
    other.update(values[2:], batch.part(slice(2, 5)))
    one.update(values[:2], batch.part(slice(2)))
    other.merge(one)  # the later sequences come first
    for state in (whole, other):
        index, each = state.sequences()
        assert index.tolist() == [7, 8, 9, 10]
        for number, row in zip(index.tolist(), each.numpy(), strict=True):
            h = np.sort(np.abs(values[number - 7][mask[number - 7]].double().numpy()).ravel())
            median = h[(len(h) - 1) // 2]
            assert row[:5] == pytest.approx([*h[::-1][:3], median, h[-1] / median], rel=1e-12)
        torch.testing.assert_close(each.sum(0), state.sums, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kept", [True, False])
def test_the_metric_is_the_mean_of_what_is_kept_of_sequences(
    kept: bool, tiny_neox: Callable[..., Any], tiny_tokens: Tensor
) -> None:
    adapter = Adapter(tiny_neox())
    analyzer = MassiveAnalyzer({"sequence_values": kept})
    result = analyzer.measure(run_pass(adapter, batches(tiny_tokens, 2), analyzer.needs(adapter)), adapter)
    rows = {(row.metric, row.site, row.layer): row.value for row in result.rows}
    assert len(result.sequence_values) == 3 * adapter.layers * kept
    for each in result.sequence_values:
        assert each.sequences.tolist() == list(range(len(tiny_tokens)))
        assert each.values.mean() == pytest.approx(rows[each.metric, each.site, each.layer], rel=1e-12)
