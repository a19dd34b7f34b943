"""The one pass: batches, hooks, and what is computed only when asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analyzers.adapters import Adapter
from analyzers.base import ActivationAnalyzer
from analyzers.extremes import ExtremesSpec
from analyzers.gram import GramSpec
from analyzers.logit_reductions import LogitsSpec
from analyzers.loss import LossAnalyzer
from analyzers.massive import MassiveAnalyzer
from analyzers.reductions import Batch, Spec
from analyzers.runner import batches, run_pass
from analyzers.spectra import SpectraAnalyzer

ANALYZERS: tuple[ActivationAnalyzer, ...] = (LossAnalyzer(), MassiveAnalyzer(), SpectraAnalyzer())


@dataclass(frozen=True)
class CountingSpec:
    """Records the batches its one state is updated with; raises at the batch ``fails_at``."""

    site: str
    layer: int | None
    fails_at: int | None = None

    def create(self) -> "Counting":
        return Counting(self.fails_at)


class Counting:
    def __init__(self, fails_at: int | None) -> None:
        self.seen: list[list[int]] = []
        self._fails_at = fails_at

    def update(self, values: Tensor, batch: Batch) -> None:
        if len(self.seen) == self._fails_at:
            raise RuntimeError("planted")
        assert values.shape[:2] == batch.tokens.shape
        self.seen.append(batch.index.tolist())

    def merge(self, other: "Counting") -> None:
        self.seen += other.seen


@pytest.fixture(scope="module")
def adapter(tiny_neox: Callable[..., Any]) -> Adapter:
    return Adapter(tiny_neox(torch.float64))


@contextmanager
def calls(module: nn.Module) -> Iterator[list[int]]:
    """Length of the list is the number of calls of the module."""
    made: list[int] = []
    handle = module.register_forward_hook(lambda *_: made.append(1))
    yield made
    handle.remove()


def hooks_of(adapter: Adapter) -> int:
    return sum(len(module._forward_hooks) for module in adapter.model.modules())


def values(adapter: Adapter, tokens: Tensor, size: int) -> dict[tuple[Any, ...], float | None]:
    specs = [spec for analyzer in ANALYZERS for spec in analyzer.needs(adapter)]
    states = run_pass(adapter, batches(tokens, size), specs)
    return {
        (analyzer.name, row.metric, row.site, row.layer, row.n): row.value
        for analyzer in ANALYZERS
        for row in analyzer.measure(states, adapter).rows
    }


def test_batches_cover_the_probe_in_order() -> None:
    tokens = torch.arange(14).reshape(7, 2)
    parts = list(batches(tokens, 3))
    assert [part.index.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(torch.cat([part.tokens for part in parts]), tokens)


@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_the_batch_size_changes_nothing(adapter: Adapter, tiny_tokens: Tensor, size: int) -> None:
    found, expected = values(adapter, tiny_tokens, size), values(adapter, tiny_tokens, 8)
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        assert found[place] == (None if value is None else pytest.approx(value, rel=1e-9)), place


def test_the_unembedding_runs_only_for_a_reduction_of_the_logits(
    adapter: Adapter, tiny_tokens: Tensor
) -> None:
    without: list[Spec] = [ExtremesSpec("resid_post", 1), GramSpec("final_norm", None, "all")]
    with calls(adapter.model.get_output_embeddings()) as unembedded:
        run_pass(adapter, batches(tiny_tokens, 3), without)
        assert len(unembedded) == 0
        run_pass(adapter, batches(tiny_tokens, 3), [*without, LogitsSpec()])
        assert len(unembedded) == 3


def test_the_model_runs_once_for_all_analyzers(adapter: Adapter, tiny_tokens: Tensor) -> None:
    with calls(adapter.trunk) as passes:
        values(adapter, tiny_tokens, 3)
    assert len(passes) == 3


def test_equal_specs_are_one_state_updated_once(adapter: Adapter, tiny_tokens: Tensor) -> None:
    spec, same = CountingSpec("resid_post", 0), CountingSpec("resid_post", 0)
    states = run_pass(adapter, batches(tiny_tokens, 3), [spec, same, CountingSpec("resid_post", 1)])
    assert len(states) == 2
    state = states[same]
    assert isinstance(state, Counting)
    assert state.seen == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_hooks_are_gone_afterwards(adapter: Adapter, tiny_tokens: Tensor) -> None:
    before = hooks_of(adapter)  # transformers leaves its own on a model that has once returned hidden states
    run_pass(adapter, batches(tiny_tokens, 3), [CountingSpec("resid_post", 0)])
    assert hooks_of(adapter) == before
    broken = [CountingSpec("embedding", None), CountingSpec("resid_post", 2, fails_at=1)]
    with pytest.raises(RuntimeError, match="planted"):
        run_pass(adapter, batches(tiny_tokens, 3), broken)
    assert hooks_of(adapter) == before
    with pytest.raises(KeyError):
        run_pass(adapter, batches(tiny_tokens, 3), [CountingSpec("embedding", None), CountingSpec("x", 0)])
    assert hooks_of(adapter) == before


def test_nothing_is_recorded_for_autograd(adapter: Adapter, tiny_tokens: Tensor) -> None:
    states = run_pass(adapter, batches(tiny_tokens, 3), [GramSpec("resid_post", 0, "all")])
    mean, scatter = states[GramSpec("resid_post", 0, "all")].whole().finish()  # type: ignore[attr-defined]
    assert not mean.requires_grad
    assert not scatter.requires_grad
    scatter += 1  # states are used in place after the pass: no inference tensors
