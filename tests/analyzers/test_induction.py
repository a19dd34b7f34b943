"""Induction: planted heads, uniform attention, random models, tokens, births."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attention_support import build, eager_maps
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from analyzers.adapters import Adapter, Block, Model
from analyzers.attention_blocks import QueryBlock
from analyzers.base import Row
from analyzers.induction import InductionAnalyzer, births
from analyzers.reductions import Batch
from analyzers.repeats import Band, BandsSpec, BandsState, RepeatedTokens
from analyzers.runner import batches, run_pass
from analyzers.softmax import RowStatistics

N, TOKENS, POSITIONS = 8, 20, 20
HEAD = 30
WIDTH = 2 * HEAD
_T, _P, _B = slice(0, TOKENS), slice(TOKENS, TOKENS + POSITIONS), slice(TOKENS + POSITIONS, WIDTH)
SCORES = ("prefix_matching", "repeat_duplicate_token", "repeat_previous_token")
KINDS = ("induction", "duplicate_token", "previous_token")


def measured(model: Any, **parameters: Any) -> dict[tuple[str, int | None, int | None], Row]:
    adapter, analyzer = Adapter(model), InductionAnalyzer(parameters)
    tokens = analyzer.tokens.draw(adapter)
    states = run_pass(adapter, batches(tokens, 3), analyzer.needs(adapter))
    return {(row.metric, row.layer, row.head): row for row in analyzer.measure(states, adapter).rows}


def planted_model() -> GPT2LMHeadModel:
    """Two layers of attention alone, heads of width 30: tokens, positions, and the token before, one-hot.

    Layer 0: head 0 attends to the previous position and writes its token into the last 20 channels; head 1
    attends to equal tokens, itself among them. Layer 1: head 0 looks for its own token in those channels
    and writes the token of the place that it finds, five times as large as tokens are; head 1 is uniform. All
    tokens of a layer have one norm and one mean, so LayerNorm only scales them.
    """
    config = GPT2Config(
        vocab_size=TOKENS, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=POSITIONS, bos_token_id=TOKENS - 1,
        eos_token_id=TOKENS - 1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    sharp = 200.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        trunk = model.transformer
        for norm in (trunk.ln_f, *(block.ln_1 for block in trunk.h)):
            norm.weight.fill_(1)
        trunk.ln_f.weight.fill_(10)
        trunk.wte.weight[:, _T] = torch.eye(TOKENS)
        trunk.wpe.weight[:, _P] = torch.eye(POSITIONS)
        first, second = (block.attn for block in trunk.h)
        query, key, value = (slice(start, start + TOKENS) for start in (0, WIDTH, 2 * WIDTH))
        first.c_attn.weight[_P, query] = sharp * torch.eye(POSITIONS).roll(-1, 1)  # i asks for i - 1
        first.c_attn.weight[TOKENS, :WIDTH] = 0  # position 0 asks for nothing
        first.c_attn.weight[_P, key] = torch.eye(POSITIONS)
        first.c_attn.weight[_T, value] = torch.eye(TOKENS)
        first.c_proj.weight[:TOKENS, _B] = torch.eye(TOKENS)
        other_query, other_key = (slice(start, start + TOKENS) for start in (HEAD, WIDTH + HEAD))
        first.c_attn.weight[_T, other_query] = sharp * torch.eye(TOKENS)
        first.c_attn.weight[_T, other_key] = torch.eye(TOKENS)
        second.c_attn.weight[_T, query] = sharp * torch.eye(TOKENS)
        second.c_attn.weight[_B, key] = torch.eye(TOKENS)
        second.c_attn.weight[_T, value] = torch.eye(TOKENS)
        second.c_proj.weight[:TOKENS, _T] = 5 * torch.eye(TOKENS)
    return model


def harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))


def test_planted_heads_are_found_exactly() -> None:
    rows = measured(planted_model(), length=N, bos=True)
    uniform = (harmonic(2 * N + 1) - harmonic(N + 1)) / N  # BOS is one more key
    found = {
        metric: [[rows[metric, layer, head].value for head in (0, 1)] for layer in (0, 1)]
        for metric in SCORES
    }
    assert found["repeat_previous_token"][0][0] == pytest.approx(1, abs=1e-5)
    assert found["repeat_duplicate_token"][0][1] == pytest.approx(0.5, abs=1e-5)  # the other half on itself
    assert found["prefix_matching"][1][0] == pytest.approx(1, abs=1e-5)
    assert found["prefix_matching"][1][1] == pytest.approx(uniform, rel=1e-5)
    assert found["repeat_duplicate_token"][1][1] == pytest.approx(uniform, rel=1e-5)
    members = {
        (kind, layer, head)
        for kind in KINDS
        for layer in (0, 1)
        for head in (0, 1)
        if rows[f"is_{kind}_head", layer, head].value == 1
    }
    assert members == {("previous_token", 0, 0), ("duplicate_token", 0, 1), ("induction", 1, 0)}
    for kind in KINDS:
        assert rows[f"{kind}_heads", None, None].value == 1
        assert {
            r.value for (metric, *_), r in rows.items() if metric == f"is_{kind}_head" and r.head is not None
        } == {0, 1}
    assert rows["is_induction_head", 1, None].value == 0.5
    assert rows["repeat_loss_second", None, None].value == pytest.approx(0, abs=1e-3)
    assert rows["repeat_loss_first", None, None].value > np.log(TOKENS)
    assert rows["repeat_loss_gain", None, None].value == pytest.approx(
        rows["repeat_loss_first", None, None].value - rows["repeat_loss_second", None, None].value
    )
    assert rows["ov_copying", 1, 0].value == pytest.approx(1, abs=1e-6)
    assert rows["ov_copying", 1, 1].value is None
    assert rows["ov_copying", 1, 1].note == "value is nan"


def test_without_bos_the_first_token_is_its_own_predecessor() -> None:
    # Layer 0 shows position 0 its own token as the one before, so the query r_1 finds two places.
    rows = measured(planted_model(), length=N)
    assert rows["prefix_matching", 1, 0].value == pytest.approx((N - 0.5) / N, abs=1e-5)
    assert rows["repeat_previous_token", 0, 0].value == pytest.approx(1, abs=1e-5)
    assert rows["induction_heads", None, None].value == 1


def test_uniform_attention_has_the_analytic_scores() -> None:
    model = build("gpt_neox")
    with torch.no_grad():
        for block in model.gpt_neox.layers:
            fused = block.attention.query_key_value
            for parameter in (fused.weight, fused.bias):
                parameter.view(4, 3, 8, *parameter.shape[1:])[:, :2] = 0
    n = 12
    rows = measured(model, length=n)
    distant, previous = (harmonic(2 * n) - harmonic(n)) / n, (harmonic(2 * n) - 1) / (2 * n - 1)
    for layer in range(2):
        for head in (None, *range(4)):
            for metric, expected in zip(SCORES, (distant, distant, previous), strict=True):
                assert rows[metric, layer, head].value == pytest.approx(expected, rel=1e-6)
    assert rows["prefix_matching", 0, 0].n == 16 * n
    assert rows["repeat_previous_token", 0, 0].n == 16 * (2 * n - 1)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama-grouped", "mistral-window", "olmo", "olmo2"])
def test_scores_and_losses_are_those_of_the_full_maps(name: str) -> None:
    model, n = build(name), 9
    rows = measured(model, length=n, sequences=5)
    tokens = InductionAnalyzer({"length": n, "sequences": 5}).tokens.draw(Adapter(model))
    maps = eager_maps(model, tokens, None)
    second = np.arange(n, 2 * n)
    for layer, a in enumerate(maps.attention):
        for head in range(4):
            for metric, queries, distance in (
                ("prefix_matching", second, n - 1),
                ("repeat_duplicate_token", second, n),
                ("repeat_previous_token", np.arange(1, 2 * n), 1),
            ):
                expected = a[:, head, queries, queries - distance].mean()
                assert rows[metric, layer, head].value == pytest.approx(expected, abs=1e-5)
    losses = torch.nn.functional.cross_entropy(
        maps.logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    for metric, first in (("repeat_loss_first", 0), ("repeat_loss_second", n)):
        expected = float(losses[:, first : first + n - 1].mean())
        assert rows[metric, None, None].value == pytest.approx(expected, rel=1e-5)
        assert rows[metric, None, None].n == 5 * (n - 1)


def test_a_random_model_has_no_such_heads(tiny_neox: Callable[..., Any]) -> None:
    rows = measured(tiny_neox(), length=50)
    assert [rows[f"{kind}_heads", None, None].value for kind in KINDS] == [0, 0, 0]
    copying = [
        row.value for (metric, _, head), row in rows.items() if metric == "ov_copying" and head is not None
    ]
    assert len(copying) == 12
    assert abs(np.mean([value for value in copying if value is not None])) < 0.15
    assert abs(rows["repeat_loss_gain", None, None].value) < 0.05


def test_small_blocks_and_padding_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 10, 10, generator=generator, dtype=torch.float64).tril()
    bands = (Band(3, 5, 9), Band(1, 1, 10), Band(4, 0, 10))
    tokens = torch.zeros(2, 10, dtype=torch.int64)

    def fed(size: int, mask: Tensor | None) -> BandsState:
        state = BandsSpec(0, bands).create()
        for first in range(0, 10, size):
            p = a[:, :, first : first + size, : min(10, first + size)]
            unread = RowStatistics(*torch.zeros(3, *p.shape[:3], dtype=p.dtype))
            block = QueryBlock(p, unread, p[:, 0] > 0, first, 0, first + size >= 10)
            state.update(block, Batch(tokens, torch.arange(2), mask))
        return state

    for size in (1, 3, 10):
        state = fed(size, None)
        for index, each in enumerate(bands):
            rows = np.arange(max(each.first, each.distance), each.end)
            expected = a.numpy()[:, :, rows, rows - each.distance].mean((0, 2))
            np.testing.assert_allclose(state.mean(index).numpy(), expected, rtol=1e-12)
            assert state.rows[index] == 2 * len(rows)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :3], mask[1, 8:] = False, False
    for size in (1, 4, 10):
        state = fed(size, mask)
        # Sequence 0 begins at 3: its rows 5..6 are places 8 and 9; of sequence 1 rows 5..7 are left.
        chosen = [*(a[0, :, i, i - 3] for i in (8, 9)), *(a[1, :, i, i - 3] for i in (5, 6, 7))]
        torch.testing.assert_close(state.mean(0), torch.stack(chosen).mean(0), rtol=1e-12, atol=0)
        assert state.rows[0] == 5
    one, other, whole = fed(10, None), fed(10, mask), fed(10, None)
    one.merge(other)
    torch.testing.assert_close(
        one.mean(1), (whole.mean(1) * 18 + other.mean(1) * 13) / 31, rtol=1e-12, atol=0
    )


# --- tokens -------------------------------------------------------------------------------------------------


def test_tokens_are_repeated_different_and_not_special(tiny_neox: Callable[..., Any]) -> None:
    adapter = Adapter(tiny_neox())
    source = RepeatedTokens(50, 300, 0)
    tokens = source.draw(adapter)
    assert tuple(tokens.shape) == source.size == (300, 100)
    assert torch.equal(tokens[:, :50], tokens[:, 50:])
    assert all(len(set(row)) == 50 for row in tokens[:, :50].tolist())
    special = {adapter.model.config.bos_token_id, adapter.model.config.eos_token_id}
    assert not special & set(tokens.flatten().tolist())
    # 300 x 50 draws over 255 ids: 58.8 each, binomial with a deviation of 6.9.
    counts = tokens[:, :50].flatten().bincount(minlength=257)
    assert int((counts == 0).sum()) == 257 - 255
    assert 25 < int(counts[counts > 0].min()) < int(counts.max()) < 95


def test_tokens_follow_from_their_parameters(tiny_neox: Callable[..., Any]) -> None:
    adapter = Adapter(tiny_neox())
    drawn = RepeatedTokens(4, 2, 0).draw(adapter)
    assert drawn.tolist() == RepeatedTokens(4, 2, 0).draw(adapter).tolist()
    assert drawn.tolist() != RepeatedTokens(4, 2, 1).draw(adapter).tolist()
    assert drawn.tolist() == RepeatedTokens(4, 3, 0).draw(adapter)[:2].tolist()
    with_bos = RepeatedTokens(4, 2, 0, bos=True)
    assert with_bos.size == (2, 9)
    assert with_bos.draw(adapter)[:, 1:].tolist() == drawn.tolist()
    assert set(with_bos.draw(adapter)[:, 0].tolist()) == {adapter.model.config.bos_token_id}
    assert int(RepeatedTokens(10, 50, 0, vocabulary=14).draw(adapter).max()) < 14


def test_what_the_vocabulary_does_not_allow_is_said(tiny_neox: Callable[..., Any]) -> None:
    adapter = Adapter(tiny_neox())
    for source, why in (
        (RepeatedTokens(300, 1, 0), "the vocabulary has 255 tokens, fewer than the 300 different ones"),
        (RepeatedTokens(5, 1, 0, vocabulary=300), "vocabulary is 300, the model has 257 tokens"),
    ):
        with pytest.raises(ValueError, match=why):
            source.draw(adapter)
    with pytest.raises(ValueError, match="names no BOS token"):
        RepeatedTokens(5, 1, 0, bos=True).draw(Adapter(build("gpt_neox")))
    own = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model = Model(own, [Block(own[0])], own[0], own[0], own[1], 4)
    with pytest.raises(ValueError, match="vocabulary is not known"):
        RepeatedTokens(5, 1, 0).draw(model)


# --- births -------------------------------------------------------------------------------------------------


def test_births() -> None:
    steps = np.array([0, 1, 2, 4, 8, 16])
    nan = np.nan
    columns = {
        None: [
            [0.1] * 6,
            [0.5, 0.1, 0.5, 0.1, 0.5, 0.1],
            [0, 0, 0, 0, 0, 0.9],  # one checkpoint is not enough to tell
            [nan] * 6,
        ],
        0: [[0.3] * 6],  # the threshold itself counts
        4: [[0, 0, 0.1, 0.4, 0.6, 0.2], [0, 0.5, 0, 0.5, nan, 0.5]],
        2: [[0, 0, 0.9, nan, 0.9, 0]],
    }
    for expected, many in columns.items():
        scores = np.array(many, dtype=np.float64).T
        assert births(steps, scores, 0.3) == [expected] * len(many)
    assert births(steps, np.array([[0, 0, 0, 0, 0, 0.9]]).T, 0.3, hold=1) == [16]
    assert births(steps, np.array([[0, 0.4, 0.4, 0, 0.4, 0.4]]).T, 0.3, hold=3) == [None]
    assert births(steps[:0], np.zeros((0, 2)), 0.3) == [None, None]


def test_births_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="do not ascend"):
        births(np.array([1, 1]), np.zeros((2, 1)), 0.3)
    with pytest.raises(ValueError, match="hold is 0"):
        births(np.array([1, 2]), np.zeros((2, 1)), 0.3, hold=0)
