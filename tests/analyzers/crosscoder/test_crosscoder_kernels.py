"""Kernels against the plain products: forward and all gradients, with every kind of activity."""

import pytest
import torch
from torch import Tensor

from analyzers.crosscoder.compiled import Compiled
from analyzers.crosscoder.kernels import (
    Bags,
    Dense,
    Descent,
    Kernels,
    Learned,
    Pairs,
    Share,
    kernels_for,
    sum_by_latent,
)

BATCH, LATENTS, WIDTH = 13, 24, 30


def masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    random = torch.rand(BATCH, LATENTS, generator=generator)
    ragged = random < torch.linspace(0, 0.9, BATCH)[:, None]
    dead = random < 0.3
    dead[:, 5:11] = False
    dead[:, -1] = False
    one = torch.zeros(BATCH, LATENTS, dtype=torch.bool)
    one[4, 7] = True
    return {
        "ragged": ragged,
        "dead latents": dead,
        "all active": torch.ones_like(ragged),
        "one pair": one,
        "none": torch.zeros_like(ragged),
    }


def where(mask: Tensor) -> Pairs:
    return Pairs.of(*torch.nonzero(mask, as_tuple=True), *mask.shape)


def plain_adam(
    gradient: Tensor, weights: Tensor, mean: Tensor, square: Tensor, rate: float, number: int
) -> None:
    """Algorithm 1 of Kingma and Ba (2015)."""
    mean.copy_(0.9 * mean + 0.1 * gradient)
    square.copy_(0.999 * square + 0.001 * gradient**2)
    weights -= rate * (mean / (1 - 0.9**number)) / ((square / (1 - 0.999**number)).sqrt() + 1e-8)


def check(kernels: Kernels, mask: Tensor, groups: int, device: str = "cpu") -> None:
    """Against autograd of the dense formula, and against the plain products."""
    generator = torch.Generator().manual_seed(groups)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    pairs = where(mask.to(device))
    values, decoder = draw(pairs.count, groups), draw(LATENTS, WIDTH)
    gradient, start = draw(BATCH, WIDTH), draw(LATENTS, WIDTH)
    features = values.new_zeros(BATCH, LATENTS, groups)
    features[pairs.row, pairs.latent] = values
    leaf, weights = features.clone().requires_grad_(), decoder.clone().requires_grad_()
    out = torch.einsum("big,igw->bgw", leaf, weights.view(LATENTS, groups, -1)).flatten(1)
    by_feature, by_weight = torch.autograd.grad(out, (leaf, weights), gradient)
    expected = by_feature[pairs.row, pairs.latent]
    for each in (kernels, Dense()):
        torch.testing.assert_close(each.decode(pairs, values, decoder), out.detach(), rtol=1e-5, atol=1e-5)
        found = each.feature_gradient(pairs, gradient, decoder, groups)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for add in (False, True):
            into = start.clone()
            each.weight_gradient(pairs, values, gradient, into, add=add)
            torch.testing.assert_close(into, by_weight + (start if add else 0), rtol=1e-5, atol=1e-5)
    for number, sums in enumerate((None, start), 1):
        descent, gradient_of_all = Descent(0.01, number), by_weight + (0 if sums is None else start)
        state = [decoder, draw(LATENTS, WIDTH), draw(LATENTS, WIDTH).square()]
        found_state, expected_state = ([each.clone() for each in state] for _ in range(2))
        own = None if sums is None else sums.clone()
        kernels.descend(Share(pairs, values, gradient), own, Learned(*found_state), descent)
        plain_adam(gradient_of_all, *expected_state, 0.01, number)
        torch.testing.assert_close(found_state, expected_state, rtol=1e-5, atol=1e-5)
    before = draw(BATCH, LATENTS).relu()
    factor, least = draw(LATENTS).abs(), 0.5 * draw(LATENTS)
    row, latent = kernels.positive(before, factor, least)
    assert torch.equal(
        torch.stack([row, latent], dim=1), torch.stack(Dense().positive(before, factor, least), 1)
    )
    assert 0 < len(row) < int((before > 0).sum())
    rows = draw(BATCH, WIDTH) + 100
    sums, spread = kernels.columns(rows)
    torch.testing.assert_close(sums, rows.double().sum(dim=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        spread, (rows.double() - rows.double().mean(dim=0)).square().sum(dim=0), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(sum_by_latent(pairs, values), features.sum(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("activity", list(masks()))
@pytest.mark.parametrize("kernels", [Bags(), Compiled()], ids=["bags", "compiled"])
def test_kernels_are_the_plain_products(kernels: Kernels, activity: str, groups: int) -> None:
    check(kernels, masks()[activity], groups)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("activity", list(masks()))
def test_kernels_on_cuda_are_the_plain_products(activity: str, groups: int) -> None:
    check(kernels_for(torch.device("cuda")), masks()[activity], groups, "cuda")


def test_the_number_of_threads_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = where(torch.rand(64, 50, generator=generator) < 0.2)
    # Several blocks of columns: 64 rows of 8192 numbers do not fit into a core's cache.
    values, decoder, rows = (
        torch.randn(*shape, generator=generator) for shape in ((pairs.count, 1), (50, 8192), (64, 8192))
    )

    def all_of_them() -> list[Tensor]:
        into = torch.zeros(50, 8192)
        Compiled().weight_gradient(pairs, values, rows, into)
        features = Compiled().feature_gradient(pairs, rows, decoder, 1)
        state = [into.clone(), into.clone(), into.square()]
        Compiled().descend(Share(pairs, values, rows), None, Learned(*state), Descent(0.1, 3))
        decoded = Compiled().decode(pairs, values, decoder)
        return [decoded, features, into, *state, *Compiled().columns(rows)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_of_them()
        torch.set_num_threads(3)
        assert all(torch.equal(one, other) for one, other in zip(all_of_them(), alone, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_a_number_stays_so() -> None:
    pairs = where(torch.tensor([[True, True]]))
    out = Compiled().decode(pairs, torch.tensor([[0.0], [1.0]]), torch.tensor([[float("nan")], [1.0]]))
    assert out.isnan().all()
