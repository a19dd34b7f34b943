"""KL to the unigram and the bigram: models that are exactly those, brute force over all pairs, padding."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from analyzers.adapters import Adapter
from analyzers.ngram_reductions import PRIORS, Bigrams, NgramSpec, NgramState
from analyzers.ngrams import NgramAnalyzer
from analyzers.reductions import Batch
from analyzers.runner import batches, run_pass


class Shape:
    layers, width = 1, 8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def skewed_tokens(sequences: int = 6, length: int = 150, vocabulary: int = 9, seed: int = 0) -> Tensor:
    """A Markov chain with one likely follower of each token; token 8 never appears."""
    g = generator(seed)
    rows = torch.rand(vocabulary - 1, vocabulary - 1, generator=g) ** 4
    tokens = torch.zeros(sequences, length, dtype=torch.int64)
    for t in range(1, length):
        tokens[:, t] = torch.multinomial(rows[tokens[:, t - 1]], 1, generator=g)[:, 0]
    return tokens


def brute_force(tokens: list[list[int]], vocabulary: int, prior: float) -> tuple[Tensor, list[Tensor]]:
    """q1, and q2 at every position that predicts, from loops over all pairs."""
    pairs = [(u, v) for row in tokens for u, v in itertools.pairwise(row)]
    q1 = torch.tensor([sum(v == each for _, v in pairs) for each in range(vocabulary)]).double() / len(pairs)
    q2 = []
    for index, (u, _) in enumerate(pairs):
        rest = [v for i, (w, v) in enumerate(pairs) if w == u and i != index]
        counts = torch.tensor([rest.count(v) for v in range(vocabulary)]).double()
        q2.append((counts + prior * q1) / (len(rest) + prior))
    return q1, q2


def divergence(q: Tensor, logits: Tensor) -> float:
    p = logits.double().log_softmax(-1)
    return float(torch.where(q > 0, q * (q.clamp(min=1e-300).log() - p), 0).sum())


def fed(logits: Tensor, tokens: Tensor, prior: float | None, size: int = 100) -> NgramState:
    state = NgramState(prior)
    for batch in batches(tokens, size):
        state.update(logits[batch.index], batch)
    return state


@pytest.mark.parametrize("prior", [0.5, 30.0])
def test_both_against_loops_over_all_pairs(prior: float) -> None:
    tokens = skewed_tokens(3, 40)
    logits = torch.randn(3, 40, 9, dtype=torch.float64, generator=generator(1)) * 3
    q1, q2 = brute_force(tokens.tolist(), 9, prior)
    predicting = logits[:, :-1].reshape(-1, 9)
    state = fed(logits, tokens, prior)
    assert state.n == 3 * 39
    assert state.unigram == pytest.approx(sum(divergence(q1, z) for z in predicting), rel=1e-12)
    bigram = sum(divergence(q, z) for q, z in zip(q2, predicting, strict=True))
    assert state.bigram == pytest.approx(bigram, rel=1e-12)
    assert state.bigram / state.n > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_is_the_unigram_or_the_bigram_has_no_divergence(dtype: torch.dtype) -> None:
    tokens = skewed_tokens(3, 40)
    q1, q2 = brute_force(tokens.tolist(), 9, 5.0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    shift = (
        torch.randn(3, 40, 1, dtype=torch.float64, generator=generator(2)) * 5
    )  # logits have no zero point
    unigram = (q1.clamp(min=1e-30).log().expand(3, 40, 9) + shift).to(dtype)
    state = fed(unigram, tokens, 5.0)
    assert state.unigram / state.n == pytest.approx(0, abs=tolerance)
    assert state.bigram / state.n > 0.1
    rows = torch.stack(q2).clamp(min=1e-30).log().view(3, 39, 9)
    bigram = (torch.cat([rows, torch.randn(3, 1, 9, dtype=torch.float64)], dim=1) + shift).to(dtype)
    state = fed(bigram, tokens, 5.0)
    assert state.bigram / state.n == pytest.approx(0, abs=tolerance)
    assert state.unigram / state.n > 0.1


def test_a_uniform_model_is_as_far_as_the_entropy_says() -> None:
    tokens = skewed_tokens()
    state = fed(torch.zeros(6, 150, 9), tokens, None)
    q1 = torch.bincount(tokens[:, 1:].flatten(), minlength=9) / (6 * 149)
    entropy = float(torch.special.entr(q1.double()).sum())
    assert state.unigram / state.n == pytest.approx(math.log(9) - entropy, rel=1e-6)


def test_the_prior_is_the_likeliest_with_each_pair_left_out() -> None:
    tokens = skewed_tokens(4, 60)
    pairs = torch.stack([tokens[:, :-1].flatten(), tokens[:, 1:].flatten()], dim=1)

    def likelihood(prior: float) -> float:
        _, q2 = brute_force(tokens.tolist(), 9, prior)
        return sum(math.log(q[v]) for q, (_, v) in zip(q2, pairs.tolist(), strict=True))

    chosen = Bigrams(pairs, 9).prior
    assert chosen == max(PRIORS[:8], key=likelihood)
    # Tokens that do not depend on the last one ask for the unigram, tokens that do so wholly for the counts.
    free = torch.randint(0, 9, (3000, 2), generator=generator(3))
    assert Bigrams(free, 9).prior >= 64
    cycle = torch.arange(3000) % 9
    assert Bigrams(torch.stack([cycle, (cycle + 1) % 9], dim=1), 9).prior == 1


def test_what_the_pair_itself_says_is_left_out() -> None:
    """Every pair is seen once: without leaving it out, the bigram would know each next token."""
    tokens = torch.arange(20)[None]
    logits = torch.randn(1, 20, 20, dtype=torch.float64, generator=generator(4))
    state = fed(logits, tokens, 3.0)
    assert state.bigram == pytest.approx(state.unigram, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_any_split_has_the_ngrams_of_the_whole_probe(size: int) -> None:
    tokens = skewed_tokens()
    logits = torch.randn(6, 150, 9, dtype=torch.float64, generator=generator(5))
    whole = fed(logits, tokens, None)
    state = fed(logits, tokens, None, size)
    assert (state.n, state.unigram, state.bigram) == pytest.approx((whole.n, whole.unigram, whole.bigram))
    one, other = NgramState(None), NgramState(None)
    for batch in batches(tokens, size):
        (one if int(batch.index[0]) < 3 else other).update(logits[batch.index], batch)
    one.merge(other)
    assert (one.n, one.unigram, one.bigram) == pytest.approx((whole.n, whole.unigram, whole.bigram))


def test_padding_is_in_neither_the_counts_nor_the_sums() -> None:
    tokens = skewed_tokens(3, 40)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :10], mask[1, 25:], mask[2, 1:] = False, False, False
    logits = torch.randn(3, 40, 9, dtype=torch.float64, generator=generator(6))
    padded = Batch(tokens, torch.arange(3), mask)
    state = NgramState(2.0)
    state.update(
        torch.where(mask[:, :, None], logits, torch.nan), Batch(tokens, padded.index, mask, probe=padded)
    )
    kept = [tokens[0, 10:].tolist(), tokens[1, :25].tolist(), tokens[2, :1].tolist()]
    q1, q2 = brute_force(kept, 9, 2.0)
    predicting = torch.cat([logits[0, 10:-1], logits[1, :24]])
    assert state.n == 29 + 24
    assert state.unigram == pytest.approx(sum(divergence(q1, z) for z in predicting), rel=1e-12)
    bigram = sum(divergence(q, z) for q, z in zip(q2, predicting, strict=True))
    assert state.bigram == pytest.approx(bigram, rel=1e-12)


def test_the_analyzer_on_a_model(tiny_neox: Callable[..., Any], tiny_tokens: Tensor) -> None:
    for dtype, rel in ((torch.float64, 1e-10), (torch.bfloat16, 1e-4)):
        adapter, analyzer = Adapter(tiny_neox(dtype)), NgramAnalyzer({"prior": 4})
        states = run_pass(adapter, batches(tiny_tokens, 3), analyzer.needs(adapter))
        rows = {row.metric: row for row in analyzer.measure(states, adapter).rows}
        with torch.no_grad():
            z = adapter.model(tiny_tokens).logits[:, :-1]
        q1, q2 = brute_force(tiny_tokens.tolist(), z.shape[2], 4.0)
        n = 8 * 39
        unigram = sum(divergence(q1, each) for each in z.reshape(n, -1)) / n
        bigram = sum(divergence(q, each) for q, each in zip(q2, z.reshape(n, -1), strict=True)) / n
        assert rows["unigram_kl"].value == pytest.approx(unigram, rel=rel)
        assert rows["bigram_kl"].value == pytest.approx(bigram, rel=rel)
        assert {row.n for row in rows.values()} == {n}


def test_what_has_no_answer() -> None:
    analyzer = NgramAnalyzer()
    state = NgramSpec().create()
    state.update(torch.randn(2, 1, 7), Batch(torch.zeros(2, 1, dtype=torch.int64), torch.arange(2)))
    rows = analyzer.measure({NgramSpec(): state}, Shape()).rows
    assert [(row.value, row.note) for row in rows] == [(None, "no sequence has two tokens")] * 2
    with pytest.raises(ValueError, match="which probe"):
        state.update(torch.randn(2, 3, 7), Batch(torch.zeros(2, 3, dtype=torch.int64), torch.arange(2)))
    with pytest.raises(ValueError, match="token 8 is beyond a vocabulary of 7"):
        fed(torch.randn(1, 3, 7), torch.tensor([[1, 8, 1]]), None)
    with pytest.raises(ValueError, match="prior"):
        NgramAnalyzer({"prior": 0})
