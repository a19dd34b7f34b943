"""A pass over parts of the probe, merged, is the pass over all of it: for every registered analyzer."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_contract import REFERENCES, assert_equal
from torch import Tensor

from analyzers.adapters import Adapter
from analyzers.base import ActivationAnalyzer, ActivationComparison, PassAnalyzer, Result
from analyzers.gram import GramSpec
from analyzers.reductions import Spec, State
from analyzers.registry import load_all
from analyzers.runner import batches, merged, run_pass, run_replicas

# Parts are added in another order; all else is the same. In float64, so that only rounding is left.
TOLERANCE = 1e-9
PASSES = [name for name, cls in load_all().items() if issubclass(cls, PassAnalyzer)]


@pytest.fixture(params=PASSES)
def reader(request: pytest.FixtureRequest) -> PassAnalyzer:
    found = load_all()[request.param]()
    assert isinstance(found, PassAnalyzer)
    return found


def rows(reader: PassAnalyzer, states: dict[Spec, State], adapter: Adapter) -> Result:
    if isinstance(reader, ActivationComparison):
        return reader.compare(states, dict.fromkeys(REFERENCES, states), adapter)
    assert isinstance(reader, ActivationAnalyzer)
    return reader.measure(states, adapter)


def in_parts(adapter: Adapter, tokens: Tensor, cuts: list[int], specs: list[Spec]) -> dict[Spec, State]:
    """As workers would do it: each sees its sequences only, by their numbers within the probe."""
    whole = next(batches(tokens, len(tokens)))
    ends = zip([0, *cuts], [*cuts, len(tokens)], strict=True)
    parts = [whole.part(slice(start, end)) for start, end in ends]
    split = [[part.part(slice(k, k + 2)) for k in range(0, len(part.tokens), 2)] for part in parts]
    return merged([run_pass(adapter, stream, specs) for stream in split])


@pytest.mark.parametrize("cuts", [[4], [1, 3, 7]], ids=["halves", "uneven"])
def test_parts_merged_are_the_whole(
    reader: PassAnalyzer, cuts: list[int], tiny_neox: Callable[..., Any], tiny_tokens: Tensor
) -> None:
    adapter = Adapter(tiny_neox(torch.float64))
    tokens = tiny_tokens if reader.tokens is None else reader.tokens.draw(adapter)
    specs = reader.needs(adapter)
    whole = run_pass(adapter, batches(tokens, 2), specs)
    parts = in_parts(adapter, tokens, cuts, specs)
    assert_equal(rows(reader, parts, adapter), rows(reader, whole, adapter), rel=TOLERANCE)


@pytest.mark.parametrize("replicas", [2, 5])
def test_replicas_give_the_rows_of_one_model(
    reader: PassAnalyzer, replicas: int, tiny_neox: Callable[..., Any], tiny_tokens: Tensor
) -> None:
    adapter = Adapter(tiny_neox(torch.float64))
    models = [adapter, *(Adapter(copy.deepcopy(adapter.model)) for _ in range(replicas - 1))]
    tokens = tiny_tokens if reader.tokens is None else reader.tokens.draw(adapter)
    specs = reader.needs(adapter)
    whole = run_pass(adapter, batches(tokens, 2), specs)
    split = run_replicas(models, batches(tokens, 2), specs)
    assert_equal(rows(reader, split, adapter), rows(reader, whole, adapter), rel=TOLERANCE)


def test_an_error_of_a_replica_is_the_error_of_the_pass(
    tiny_neox: Callable[..., Any], tiny_tokens: Tensor
) -> None:
    adapter = Adapter(tiny_neox(torch.float64))
    other = Adapter(copy.deepcopy(adapter.model))
    other.model.gpt_neox.layers[1].register_forward_hook(lambda *_: torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="resid_post of block 1 is of shape"):
        run_replicas([adapter, other], batches(tiny_tokens, 2), [GramSpec("resid_post", 1, "all")])


def test_one_part_is_the_pass_to_the_bit(
    reader: PassAnalyzer, tiny_neox: Callable[..., Any], tiny_tokens: Tensor
) -> None:
    adapter = Adapter(tiny_neox(torch.float64))
    tokens = tiny_tokens if reader.tokens is None else reader.tokens.draw(adapter)
    specs = reader.needs(adapter)
    whole = run_pass(adapter, batches(tokens, 2), specs)
    assert_equal(rows(reader, in_parts(adapter, tokens, [], specs), adapter), rows(reader, whole, adapter), 0)


def test_parts_of_different_passes_are_refused() -> None:
    with pytest.raises(ValueError, match="different statistics"):
        merged([{GramSpec("resid_post", 0, "all"): GramSpec("resid_post", 0, "all").create()}, {}])
    with pytest.raises(ValueError, match="at least one part"):
        merged([])
