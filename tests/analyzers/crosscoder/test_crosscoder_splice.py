"""Splices into random GPT-NeoX: what is perfect changes nothing, what is nothing is an ablation."""

from typing import Any

import pytest
import torch
from meaning_support import loud, perfect_crosscoder, random_crosscoder
from torch.nn.functional import cross_entropy

from analyzers.adapters import Adapter
from analyzers.crosscoder.active import find_active, reconstructed
from analyzers.crosscoder.splice import SpliceLosses, replaced, splice_losses
from analyzers.crosscoder.weights import Crosscoder
from analyzers.runner import batches, run_pass
from analyzers.sample import SampleSpec, SampleState

SITE, LAYER = "resid_post", 1


@pytest.fixture(scope="module")
def model(tiny_neox: Any) -> Adapter:
    return Adapter(loud(tiny_neox()))


@pytest.fixture(scope="module")
def harvest(model: Adapter, tiny_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and places of all tokens from position 1 on, as a pool has them."""
    spec = SampleSpec(SITE, LAYER, count=1 << 20, first=1)
    state = run_pass(model, batches(tiny_tokens, 3), [spec])[spec]
    assert isinstance(state, SampleState)
    return state.finish()


def losses(
    model: Adapter, tokens: torch.Tensor, places: torch.Tensor, rows: torch.Tensor, **more: int
) -> SpliceLosses:
    return splice_losses(model, SITE, LAYER, tokens, places, rows, **more)


def test_the_clean_loss_is_the_models_own(model: Adapter, tiny_tokens: torch.Tensor, harvest: Any) -> None:
    found = losses(model, tiny_tokens, harvest[1], harvest[0])
    with torch.no_grad():
        logits = model.model(tiny_tokens).logits
    wanted = cross_entropy(logits[:, 1:-1].flatten(0, 1), tiny_tokens[:, 2:].flatten())
    assert found.clean == pytest.approx(float(wanted), abs=1e-5)
    assert found.predictions == 8 * 38
    assert found.share == 1


def test_a_perfect_crosscoder_changes_nothing(
    model: Adapter, tiny_tokens: torch.Tensor, harvest: Any
) -> None:
    values, places = harvest
    scale = [0.3, 2.5]
    crosscoder = perfect_crosscoder(scale, 128)
    # The other snapshot is another checkpoint, which this model knows nothing of.
    rows = torch.cat([0.3 * torch.randn(values.shape), 2.5 * values], dim=1)
    rebuilt = reconstructed(find_active(crosscoder, rows), crosscoder, snapshot=1)
    torch.testing.assert_close(rebuilt, values, atol=1e-5, rtol=1e-5)
    found = losses(model, tiny_tokens, places, rebuilt)
    assert found.increase == pytest.approx(0, abs=1e-5)
    assert found.explained == pytest.approx(1, abs=1e-6)
    assert found.recovered(least=-100.0) == pytest.approx(1, abs=1e-3)
    # The scale of another snapshot is seen in what is explained.
    wrong = losses(model, tiny_tokens, places, rebuilt * 2.5 / 0.3)
    assert wrong.explained is not None
    assert wrong.explained < -10


def zero_crosscoder(bias: torch.Tensor, scale: float) -> Crosscoder:
    m, d = 4, len(bias)
    return Crosscoder(
        torch.zeros(m, d),
        torch.zeros(m),
        torch.zeros(m, d),
        bias * scale,
        torch.zeros(m),
        torch.tensor([scale]),
    )


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_without_features_it_is_an_ablation(
    model: Adapter, tiny_tokens: torch.Tensor, harvest: Any, ablation: str
) -> None:
    values, places = harvest
    mean = values.mean(dim=0)
    crosscoder = zero_crosscoder(mean if ablation == "mean" else torch.zeros_like(mean), 1.7)
    rebuilt = reconstructed(find_active(crosscoder, 1.7 * values), crosscoder, 0)
    found = losses(model, tiny_tokens, places, rebuilt)
    wanted = found.mean_ablated if ablation == "mean" else found.zero_ablated
    assert found.spliced == pytest.approx(wanted, abs=1e-5)
    if ablation == "mean":
        assert found.explained == pytest.approx(0, abs=1e-6)
        assert abs(found.mean_ablated - found.clean) > 0.05
        assert found.recovered(least=-100.0) == pytest.approx(0, abs=0.05)


def test_the_splice_is_the_model_with_these_activations(
    model: Adapter, tiny_tokens: torch.Tensor, harvest: Any
) -> None:
    """The rest of the network, run by hand on activations of which position 0 is the model's own."""
    values, places = harvest
    crosscoder = random_crosscoder(64, 1, 128)
    rebuilt = reconstructed(find_active(crosscoder, crosscoder.scale[0] * values), crosscoder, 0)
    found = losses(model, tiny_tokens, places, rebuilt)
    with torch.no_grad():
        own = model.model(tiny_tokens, output_hidden_states=True).hidden_states[LAYER + 1]
        whole = torch.cat([own[:, :1], rebuilt.view(8, 39, 128)], dim=1)
        with replaced(model.blocks[LAYER].output, lambda _: whole):
            logits = model.model(tiny_tokens).logits
    wanted = cross_entropy(logits[:, 1:-1].flatten(0, 1), tiny_tokens[:, 2:].flatten())
    assert found.spliced == pytest.approx(float(wanted), abs=1e-5)


def test_batches_do_not_matter(model: Adapter, tiny_tokens: torch.Tensor, harvest: Any) -> None:
    values, places = harvest
    whole, parts = (losses(model, tiny_tokens, places, 0.5 * values, batch=size) for size in (8, 3))
    for name in ("clean", "spliced", "mean_ablated", "zero_ablated", "explained"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), abs=1e-5)


def test_places_come_in_any_order_and_may_be_few(
    model: Adapter, tiny_tokens: torch.Tensor, harvest: Any
) -> None:
    values, places = harvest
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    whole = losses(model, tiny_tokens, places, 0.5 * values)
    mixed = losses(model, tiny_tokens, places[order], 0.5 * values[order])
    assert mixed.spliced == pytest.approx(whole.spliced, abs=1e-6)
    few = losses(model, tiny_tokens, places[order[:50]], 0.5 * values[order[:50]])
    assert few.share == pytest.approx(50 / (8 * 39))
    assert abs(few.increase) > 0.01
    assert few.clean == whole.clean


def test_a_model_that_does_not_need_the_site_recovers_nothing() -> None:
    assert SpliceLosses(5.0, 5.1, 5.001, 5.2, 10, 1.0, 0.5).recovered() is None
    assert SpliceLosses(5.0, 5.1, 5.5, 5.2, 10, 1.0, 0.5).recovered() == pytest.approx(0.8)
    assert SpliceLosses(5.0, 5.1, float("nan"), 5.2, 10, 1.0, 0.5).recovered() is None


def test_after_a_splice_the_model_is_as_before(
    model: Adapter, tiny_tokens: torch.Tensor, harvest: Any
) -> None:
    with torch.no_grad():
        before = model.model(tiny_tokens).logits
        losses(model, tiny_tokens, harvest[1], 0 * harvest[0])
        assert torch.equal(model.model(tiny_tokens).logits, before)


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ([[0, 0]], "position 0"),
        ([[0, 40]], "outside"),
        ([[8, 1]], "outside"),
        ([[0, 1], [0, 1]], "repeat"),
        ([], "0 places"),
    ],
)
def test_bad_places_are_refused(
    model: Adapter, tiny_tokens: torch.Tensor, places: list[list[int]], reason: str
) -> None:
    at = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
    with pytest.raises(ValueError, match=reason):
        losses(model, tiny_tokens, at, torch.zeros(len(at), 128))


def test_short_sequences_are_refused(model: Adapter) -> None:
    with pytest.raises(ValueError, match="at least 3"):
        losses(model, torch.zeros(2, 2, dtype=torch.int64), torch.tensor([[0, 1]]), torch.zeros(1, 128))
