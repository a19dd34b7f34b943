"""Indirect effects: completeness, exact products behind a linear readout, and controls of equal density."""

from typing import Any

import numpy as np
import pytest
import torch
from meaning_support import linear_model, loud, of_dense, random_crosscoder

from analyzers.adapters import Adapter
from analyzers.crosscoder.active import decoder_of, find_active, written
from analyzers.crosscoder.contrasts import ContrastTokens
from analyzers.crosscoder.effects import (
    Site,
    ablate,
    indirect_effects,
    relative_effects,
    strongest,
)
from analyzers.crosscoder.splice import replaced
from analyzers.crosscoder.weights import Gate
from analyzers.runner import Batch, run_pass
from analyzers.sample import SampleSpec, SampleState


def contrasts(items: int = 6, time: int = 9, vocabulary: int = 257) -> ContrastTokens:
    made = torch.Generator().manual_seed(4)
    return ContrastTokens(
        torch.randint(0, vocabulary, (items, time), generator=made),
        torch.randint(3, time, (items,), generator=made),
        torch.arange(items),
        torch.arange(items) + 20,
        (),
    )


def site_of(model: Adapter, gate: Gate = "shared", batch: int = 8, place: str = "resid_post") -> Site:
    """A random crosscoder of two snapshots; the model is its snapshot 1."""
    items = contrasts()
    crosscoder = random_crosscoder(200, 2, model.width, seed=1, gate=gate, threshold=0.3)
    spec = SampleSpec(place, 1, count=1 << 20)
    state = run_pass(model, [Batch(items.tokens, torch.arange(len(items.tokens)))], [spec])[spec]
    assert isinstance(state, SampleState)
    values, places = state.finish()
    wanted = {tuple(each) for each in items.places().tolist()}
    kept = torch.tensor([tuple(each) in wanted for each in places.tolist()])
    assert torch.equal(places[kept], items.places())
    own = values[kept] * crosscoder.scale[1]
    rows = torch.cat([torch.randn(own.shape, generator=torch.Generator().manual_seed(0)), own], dim=1)
    return Site(model, place, 1, crosscoder, 1, items, find_active(crosscoder, rows), batch)


@pytest.fixture(scope="module")
def model(tiny_neox: Any) -> Adapter:
    return Adapter(loud(tiny_neox()))


@pytest.mark.parametrize("gate", ["shared", "per-snapshot"])
@pytest.mark.parametrize("place", ["resid_post", "mlp_out"])
def test_effects_add_up_to_what_all_features_do(model: Adapter, gate: Gate, place: str) -> None:
    at = site_of(model, gate, place=place)
    few, many = indirect_effects(at, 4), indirect_effects(at, 64)
    whole = many.full - many.ablated
    assert abs(whole) > 1e-3
    assert abs(many.gap) < 1e-3 * abs(whole) + 1e-5
    assert abs(many.gap) < abs(few.gap) + 1e-6
    assert many.items == 6


def test_the_metric_is_the_models_own(model: Adapter) -> None:
    at = site_of(model)
    found = indirect_effects(at, 1)
    with torch.no_grad():
        logs = model.model(at.contrasts.tokens).logits.log_softmax(dim=-1)
    item = torch.arange(6)
    last = logs[item, at.contrasts.last]
    wanted = last[item, at.contrasts.wrong] - last[item, at.contrasts.right]
    assert found.full == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert found.correct == pytest.approx(float((wanted < 0).float().mean()))
    assert 0 < found.correct < 1


def test_one_features_gradient_is_a_derivative(model: Adapter) -> None:
    """With one step the slope is taken halfway; here against a central difference of a single activation."""
    at = site_of(model)
    found = indirect_effects(at, 1)
    feature = int(strongest(found.effects, 1)[0])
    removed = written(at.active, at.crosscoder, 1)
    mine = at.active.kept(at.active.feature == feature)
    step = 1e-2
    ends = [
        float(at.metrics(0.5 * removed + sign * step * written(mine, at.crosscoder, 1)).mean())
        for sign in (-1, 1)
    ]
    assert found.effects[feature] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2, abs=1e-5)


def test_silent_features_have_no_effect(model: Adapter) -> None:
    at = site_of(model)
    silent = at.active.counts().numpy() == 0
    effects = indirect_effects(at, 2).effects
    assert (effects[silent] == 0).all()
    assert (effects[~silent] != 0).any()


def test_batches_do_not_matter(model: Adapter) -> None:
    whole, parts = (indirect_effects(site_of(model, batch=size), 3) for size in (8, 4))
    np.testing.assert_allclose(parts.effects, whole.effects, atol=1e-6)
    assert parts.full == pytest.approx(whole.full, abs=1e-6)


def test_padding_does_not_matter(model: Adapter) -> None:
    at = site_of(model)
    items = at.contrasts
    behind = torch.arange(items.tokens.shape[1]) > items.last[:, None]
    assert bool(behind.any())
    other = ContrastTokens(items.tokens.masked_fill(behind, 5), items.last, items.right, items.wrong, ())
    again = Site(model, at.site, at.layer, at.crosscoder, 1, other, at.active)
    np.testing.assert_allclose(indirect_effects(again, 2).effects, indirect_effects(at, 2).effects, atol=1e-6)


def linear_site() -> tuple[Site, torch.Tensor]:
    model = linear_model(30, 12)
    items = contrasts(5, 7, 30)
    crosscoder = random_crosscoder(40, 3, 12, seed=2)
    made = torch.Generator().manual_seed(6)
    dense = torch.relu(torch.randn(len(items.places()), 40, generator=made))
    return Site(model, "resid_post", 0, crosscoder, 2, items, of_dense(dense)), dense


def test_behind_a_linear_readout_effects_are_exact_products() -> None:
    at, dense = linear_site()
    head = at.model.model.head.weight.detach()
    readout = head[at.contrasts.wrong] - head[at.contrasts.right]
    item = at.contrasts.places()[:, 0]
    # The running sum hands every token to the last position alike.
    wanted = (dense * (readout[item] @ decoder_of(at.crosscoder, 2).T)).sum(dim=0) / 5
    for steps in (1, 5):
        found = indirect_effects(at, steps)
        np.testing.assert_allclose(found.effects, wanted.numpy(), atol=1e-5)
        assert found.gap == pytest.approx(0, abs=1e-4)


def test_behind_a_linear_readout_ablation_takes_the_effects_away() -> None:
    at, _ = linear_site()
    effects = indirect_effects(at, 1).effects
    chosen = strongest(effects, 4)
    found = ablate(at, chosen, draws=25, seed=3)
    assert found.change == pytest.approx(-effects[chosen].sum(), abs=1e-4)
    assert len(found.random) == 25
    assert len(np.unique(found.random)) > 10
    assert found.p == (1 + (np.abs(found.random) >= abs(found.change)).sum()) / 26
    again = ablate(at, chosen, draws=25, seed=3)
    assert np.array_equal(again.random, found.random)


def test_the_strongest_stand_out_of_random_ones() -> None:
    """The strongest of one sign: all 39 random draws of as many do less."""
    at, _ = linear_site()
    effects = indirect_effects(at, 1).effects
    helping = strongest(np.minimum(effects, 0), 5)
    found = ablate(at, helping, draws=39)
    assert found.change > 0
    assert found.p == 1 / 40


def test_the_error_is_kept(model: Adapter) -> None:
    """Taking features away subtracts what they write and leaves the rest of the activations."""
    at = site_of(model)
    features = strongest(indirect_effects(at, 2).effects, 3)
    found = ablate(at, features, draws=1)
    mine = at.active.kept(torch.isin(at.active.feature, torch.from_numpy(features)))
    less = torch.zeros(6, 9, 128)
    item, position = at.contrasts.places().T
    less[item, position] = written(mine, at.crosscoder, 1)
    with torch.no_grad(), replaced(model.blocks[1].output, lambda values: values - less):
        logits = model.model(at.contrasts.tokens).logits
    each = torch.arange(6)
    last = logits[each, at.contrasts.last]
    metric = last[each, at.contrasts.wrong] - last[each, at.contrasts.right]
    assert found.change == pytest.approx(float(metric.mean() - at.metrics().mean()), abs=1e-5)
    assert found.correct == pytest.approx(float((metric < 0).float().mean()))


def test_relative_effects_sum_to_one_over_snapshots() -> None:
    found = relative_effects(np.array([[1.0, 0.0, -2.0], [-3.0, 0.0, 0.0]]))
    np.testing.assert_allclose(found[:, [0, 2]], [[0.25, 1.0], [0.75, 0.0]])
    assert np.isnan(found[:, 1]).all()


def test_the_strongest_are_those_of_largest_size() -> None:
    effects = np.array([0.0, -3.0, 2.0, 3.0, 1.0])
    assert strongest(effects, 3).tolist() == [1, 3, 2]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k is {k}, and 4 features"):
            strongest(effects, k)


def test_features_of_other_tokens_are_refused() -> None:
    at, _ = linear_site()
    with pytest.raises(ValueError, match="features are of 3 tokens"):
        Site(at.model, at.site, at.layer, at.crosscoder, 2, at.contrasts, of_dense(torch.ones(3, 40)))


def test_no_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="steps is 0"):
        indirect_effects(linear_site()[0], 0)
