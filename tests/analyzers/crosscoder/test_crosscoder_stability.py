"""Stability over seeds: permutations, planted partners, what has none; and the random-k control."""

import itertools

import numpy as np
import pytest
import torch
from evaluation_support import generator, random_crosscoder

from analyzers.crosscoder.controls import random_k_control, random_like
from analyzers.crosscoder.stability import match, stability
from analyzers.crosscoder.weights import Crosscoder


def of_decoder(decoder: torch.Tensor, snapshots: int) -> Crosscoder:
    latents, inputs = decoder.shape
    zero = torch.zeros(latents)
    return Crosscoder(
        torch.zeros(latents, inputs), zero, decoder, torch.zeros(inputs), zero, torch.ones(snapshots)
    )


def permuted(crosscoder: Crosscoder, seed: int) -> tuple[Crosscoder, np.ndarray]:
    """The same latents in another order and at other lengths, and where each went."""
    order = torch.randperm(crosscoder.latents, generator=generator(seed))
    sizes = torch.rand(crosscoder.latents, 1, generator=generator(seed + 1)) + 0.5
    return of_decoder((crosscoder.decoder * sizes)[order], crosscoder.snapshots), order.argsort().numpy()


def test_permuted_latents_find_themselves() -> None:
    one = random_crosscoder()
    (a, where), (b, other) = permuted(one, 1), permuted(one, 3)
    found = stability(one, [a, b])
    there = np.arange(24) != 4  # latent 4 is zero: it has no direction
    np.testing.assert_array_equal(found.matchings[0].partner[there], where[there])
    np.testing.assert_array_equal(found.matchings[1].partner[there], other[there])
    np.testing.assert_allclose(found.stability[there], 1, rtol=1e-6)
    np.testing.assert_allclose(found.stability_each[there], 1, rtol=1e-6)
    assert found.matchings[0].partner[4] == -1
    assert np.isnan(found.stability[4])
    assert found.shared == 1
    assert found.shared_by_seed.tolist() == [1, 1]


def test_the_assignment_is_the_best_of_all() -> None:
    a, b = (torch.randn(6, 8, generator=generator(seed)) for seed in (5, 6))
    found = match(of_decoder(a, 2), of_decoder(b, 2))
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2).double()
    best = max(
        itertools.permutations(range(6)), key=lambda p: float(sum(cosines[i, j] for i, j in enumerate(p)))
    )
    assert tuple(found.partner) == best
    np.testing.assert_allclose(found.cosine, [cosines[i, j] for i, j in enumerate(best)], rtol=1e-5)
    each = torch.nn.functional.cosine_similarity(a.view(6, 2, 4), b[list(best)].view(6, 2, 4), dim=2)
    np.testing.assert_allclose(found.cosine_each, each, rtol=1e-5)


def test_shared_features_are_those_over_the_threshold_in_the_mean() -> None:
    basis = torch.eye(12)
    one = of_decoder(basis[:4], 2)
    turn = 0.6 * basis[:4] + 0.8 * basis[6:10]  # cosine .6
    first = torch.stack([basis[0], basis[1], turn[2], turn[3]])
    second = torch.stack([basis[0], turn[1], basis[2], turn[3]])
    found = stability(one, [of_decoder(first, 2), of_decoder(second, 2)])
    np.testing.assert_allclose(found.stability, [1, 0.8, 0.8, 0.6], rtol=1e-6)
    assert found.shared == 0.75
    assert found.shared_by_seed.tolist() == [0.5, 0.5]
    assert found.threshold == 0.7
    assert stability(one, [of_decoder(first, 2)] * 2, threshold=0.5).shared == 1


def test_dead_and_missing_latents_have_no_partner() -> None:
    one = random_crosscoder(latents=6)
    kept = np.array([True, True, True, False, True, True])
    few = of_decoder(one.decoder[:3].clone(), 3)
    found = stability(one, [few, few], kept=kept, others_kept=[np.array([True, True, False])] * 2)
    assert sorted(found.matchings[0].partner.tolist()) == [-1, -1, -1, -1, 0, 1]
    np.testing.assert_allclose(found.stability[:2], 1, rtol=1e-6)
    assert np.isnan(found.stability[2:]).all()
    assert found.shared == 2 / 4  # of latents 0, 1, 2 and 5; 3 is dead and 4 has no direction
    opposite = of_decoder(-one.decoder, 3)
    assert match(one, opposite).cosine[0] < 0.99  # a feature is not its negative


def test_what_cannot_be_matched_is_refused() -> None:
    one = random_crosscoder()
    with pytest.raises(ValueError, match="needs another seed"):
        stability(one, [])
    with pytest.raises(ValueError, match="cannot be matched"):
        match(one, random_crosscoder(snapshots=5, width=3))


def densities() -> np.ndarray:
    values = np.exp(np.random.default_rng(0).uniform(np.log(1e-4), np.log(0.5), 2000))
    values[:100] = 0
    return values


def test_random_features_have_the_same_density() -> None:
    counts = np.repeat([0, 1, 10, 100, 1000], 200)
    chosen = np.array([210, 410, 411, 810])
    seen = set()
    for seed in range(50):
        drawn = random_like(chosen, counts, np.random.default_rng(seed))
        assert len(set(drawn.tolist())) == 4
        assert not set(drawn) & set(chosen)
        assert sorted(counts[drawn]) == sorted(counts[chosen])
        seen |= set(drawn.tolist())
    assert len(seen) > 120


def test_too_few_features_for_a_control_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 other features are active, 2 are needed"):
        random_like(np.array([0, 1]), np.array([5, 5, 5, 0]), np.random.default_rng(0))


def test_the_control_draws_sets_of_equal_density() -> None:
    density = densities()
    chosen = np.flatnonzero(density > 0)[::40]
    seen = []

    def statistic(features: np.ndarray) -> float:
        seen.append(features)
        return float(np.log(density[features]).mean())

    found = random_k_control(statistic, chosen, density, seed=1, draws=50)
    for features in seen[:50]:
        assert len(np.unique(features)) == len(chosen)
        assert not set(features) & set(chosen)
        apart = np.sort(np.log(density[features])) - np.sort(np.log(density[chosen]))
        assert np.abs(apart).max() < 0.1
    assert np.array_equal(seen[50], chosen)
    low, middle, high = found.quantiles()
    assert low < middle < high
    assert found.value == pytest.approx(found.mean, abs=0.02)
    assert found.random.shape == (50,)


def test_planted_features_stand_out_and_random_ones_do_not() -> None:
    density = densities()
    effect = np.random.default_rng(2).exponential(1, 2000) * density  # dense features do more
    alive = np.flatnonzero(density > 0)
    planted = np.random.default_rng(3).choice(alive, 20, replace=False)

    def total(features: np.ndarray) -> float:
        return float(effect[features].sum())

    below = random_k_control(total, planted, density, seed=4, draws=400)
    assert below.quantiles()[0] <= below.value <= below.quantiles()[2]
    assert below.above > 0.05
    effect[planted] += 5 * density[planted]
    standing = random_k_control(total, planted, density, seed=4, draws=400)
    assert standing.value > standing.quantiles()[2]
    assert standing.above < 0.01
    # The densest features do most, and no more than others of their density.
    densest = np.argsort(-density)[:20]
    control = random_k_control(lambda ids: float(density[ids].sum()), densest, density, seed=5)
    assert control.mean > 0.5 * control.value


def test_the_null_is_uniform_for_random_choices() -> None:
    """The p-value of features chosen at random is below 0.1 for about a tenth of the choices."""
    density, generator_ = np.full(200, 0.1), np.random.default_rng(6)
    effect = generator_.normal(size=200)
    found = [
        random_k_control(
            lambda ids: float(effect[ids].sum()),
            generator_.choice(200, 10, replace=False),
            density,
            seed=i,
            draws=99,
        ).above
        for i in range(300)
    ]
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.06)  # 3.5 standard errors


def test_it_follows_from_its_seed_and_takes_arrays() -> None:
    density = densities()
    chosen = np.flatnonzero(density > 0.2)[:5]
    curves = np.random.default_rng(7).normal(size=(2000, 3))

    def run(seed: int) -> np.ndarray:
        found = random_k_control(lambda ids: curves[ids].sum(axis=0), chosen, density, seed=seed)
        assert found.value.shape == found.mean.shape == found.above.shape == found.beyond.shape == (3,)
        assert found.quantiles().shape == (3, 3)
        return found.mean

    np.testing.assert_array_equal(run(1), run(1))
    assert (run(1) != run(2)).any()


@pytest.mark.parametrize(
    ("chosen", "settings", "why"),
    [
        ([], {}, "at least one"),
        ([3, 3], {}, "each once"),
        ([0], {}, "never active"),
        ([9], {}, "not there"),
        ([1, 2], {}, "1 other features are active, 2 are needed"),
        ([2], {"draws": 0}, "at least 1"),
    ],
)
def test_choices_without_a_control_are_refused(
    chosen: list[int], settings: dict[str, float], why: str
) -> None:
    density = np.array([0, 0.1, 0.1, 0.2])
    with pytest.raises(ValueError, match=why):
        random_k_control(lambda ids: 0.0, np.array(chosen, dtype=np.int64), density, seed=0, **settings)  # type: ignore[arg-type]
