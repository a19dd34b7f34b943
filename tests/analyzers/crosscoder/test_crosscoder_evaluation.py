"""Evaluation and latent scaling: hand-made crosscoders, and the dense formulas as an oracle."""

from typing import get_args

import numpy as np
import pytest
import torch
from evaluation_support import generator, orthonormal_crosscoder, random_crosscoder, sparse_features

from analyzers.crosscoder.active import Reader, decode
from analyzers.crosscoder.evaluation import Evaluation, evaluate
from analyzers.crosscoder.scaling import latent_scaling
from analyzers.crosscoder.weights import Crosscoder, Gate

GATES = get_args(Gate)


def assert_alike(one: Evaluation, other: Evaluation, rtol: float) -> None:
    assert one.tokens == other.tokens
    np.testing.assert_array_equal(one.active, other.active)
    np.testing.assert_array_equal(one.active_each, other.active_each)
    for name in ("error", "variance"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=rtol)
    for name in ("beta", "beta_activation", "reference"):
        np.testing.assert_allclose(
            getattr(one.scaling, name), getattr(other.scaling, name), rtol=rtol, atol=rtol
        )


@pytest.mark.parametrize("gate", GATES)
def test_pairs_are_the_dense_features(gate: Gate) -> None:
    crosscoder = random_crosscoder(gate=gate)
    rows = torch.randn(40, 15, generator=generator(1)) * 2
    rows[7] = 0  # may have no active latent: its pairs are none
    reader = Reader(crosscoder)
    pairs = reader.read(rows)
    dense = crosscoder.encode_each(rows)
    assert 0 < len(pairs.token) < 40 * 24 / 2
    for snapshot in range(3):
        mine = torch.zeros(40, 24)
        mine[pairs.token, pairs.feature] = pairs.value_at(snapshot)
        torch.testing.assert_close(mine, dense[:, snapshot], rtol=0, atol=0)
        whole = decode(pairs, crosscoder, snapshot) + crosscoder.decoder_bias.view(3, 5)[snapshot]
        torch.testing.assert_close(whole, crosscoder.reconstruct(rows).view(40, 3, 5)[:, snapshot])
    number = pairs.token * 24 + pairs.feature
    assert torch.equal(torch.unique(number), number)
    if gate == "per-snapshot":
        assert pairs.open is not None
        assert bool(pairs.open.any(dim=1).all())
        assert not bool(pairs.open.all())


@pytest.mark.parametrize("gate", GATES)
def test_all_numbers_against_the_dense_formulas(gate: Gate) -> None:
    crosscoder = random_crosscoder(gate=gate, seed=2)
    rows = torch.randn(300, 15, generator=generator(3)) * 2 + 1
    found = evaluate(crosscoder, [rows])
    a = rows.double().view(300, 3, 5)
    f = crosscoder.encode_each(rows).double()
    decoder = crosscoder.decoder.double().view(24, 3, 5)
    bias = crosscoder.decoder_bias.double().view(3, 5)
    left = a - torch.einsum("bsm,msd->bsd", f, decoder) - bias
    np.testing.assert_allclose(found.error, left.square().sum((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.variance, (a - a.mean(0)).square().sum((0, 2)), rtol=1e-6)
    np.testing.assert_array_equal(found.active_each, (f > 0).sum(0).T)
    np.testing.assert_array_equal(found.active, (f > 0).any(1).sum(0))
    assert found.l0 == pytest.approx(float((f > 0).any(1).sum(1).double().mean()))
    np.testing.assert_allclose(found.l0_each, (f > 0).sum(2).double().mean(0))
    assert found.dead[3]
    assert found.density[3] == 0
    norms = crosscoder.strengths()
    for i in range(24):
        reference = int(norms[i].argmax())
        assert found.scaling.reference[i] == reference
        d, fi = decoder[i, reference], f[:, reference, i]
        for s in range(3):
            size = fi.square().sum() * d.square().sum()
            target = left[:, s] + f[:, s, i, None] * decoder[i, s]
            beta, plain = (d @ (y.T @ fi) / size for y in (target, a[:, s] - bias[s]))
            np.testing.assert_allclose(found.scaling.beta[i, s], beta, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.scaling.beta_activation[i, s], plain, rtol=1e-4, atol=1e-5)
    assert np.isnan(found.scaling.beta[3]).all()  # never active
    assert np.isnan(found.scaling.beta[4]).all()  # no direction


@pytest.mark.parametrize("gate", GATES)
def test_any_split_gives_the_whole(gate: Gate) -> None:
    crosscoder = random_crosscoder(gate=gate, seed=4)
    rows = torch.randn(1300, 15, generator=generator(5)) + 100  # a mean far beyond the spread
    whole = evaluate(crosscoder, [rows])
    for size in (13, 512, 700):
        assert_alike(evaluate(crosscoder, rows.split(size)), whole, rtol=1e-5)
    ragged = [rows[:5], rows[5:5], rows[5:900], rows[900:]]
    assert_alike(evaluate(crosscoder, iter(ragged)), whole, rtol=1e-5)
    np.testing.assert_allclose(
        whole.variance, rows.double().view(-1, 3, 5).var(dim=0, correction=0).sum(1) * 1300, rtol=1e-6
    )
    alone = latent_scaling(crosscoder, rows.split(100))
    np.testing.assert_allclose(alone.beta, whole.scaling.beta, rtol=1e-4, atol=1e-4)


def test_a_perfect_crosscoder_explains_all_and_beta_is_its_strength() -> None:
    strengths = torch.tensor([[1.0, 2.0, 4.0], [3.0, 3.0, 1.5], [2.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    crosscoder = orthonormal_crosscoder(strengths, width=6)
    rows = sparse_features(500, 4, seed=6) @ crosscoder.decoder
    found = evaluate(crosscoder, rows.split(128))
    np.testing.assert_allclose(found.explained_variance, 1, atol=1e-10)
    expected = strengths / strengths.amax(1, keepdim=True)
    # A feature that is there as its decoder says has exactly its normalised strength; 1 at the strongest.
    np.testing.assert_allclose(found.scaling.beta, expected, atol=1e-6)
    np.testing.assert_allclose(found.scaling.beta_activation, expected, atol=1e-6)
    assert found.scaling.reference.tolist() == [2, 0, 0, 0]


def test_the_mean_explains_nothing() -> None:
    rows = torch.randn(400, 12, generator=generator(7), dtype=torch.float32) * 3 + 2
    zero = torch.zeros(8, 12)
    mean = rows.double().mean(0).float()
    nothing = Crosscoder(zero, torch.zeros(8), zero, mean, torch.zeros(8), torch.ones(2), activation="relu")
    found = evaluate(nothing, [rows])
    np.testing.assert_allclose(found.explained_variance, 0, atol=1e-6)
    assert found.l0 == 0
    assert found.dead.all()
    assert np.isnan(found.scaling.beta).all()


def test_beta_reveals_a_shrunk_decoder() -> None:
    true = torch.tensor([[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    truth = orthonormal_crosscoder(true, width=4)
    rows = sparse_features(400, 2, seed=8) @ truth.decoder
    shrunk = orthonormal_crosscoder(true, width=4)
    shrunk.decoder.view(2, 3, 4)[0, 1] = 0  # the feature is there at snapshot 1, and its decoder says not
    shrunk.decoder.view(2, 3, 4)[1, 2] *= 0.3
    assert shrunk.strengths()[0].tolist() == [2, 0, 2]
    found = evaluate(shrunk, [rows])
    np.testing.assert_allclose(found.scaling.beta, 1, atol=1e-6)
    assert found.explained_variance[1] < 0.5


def test_beta_of_a_twin_falls_and_that_of_the_activation_does_not() -> None:
    """Latent 1 has taken the part of latent 0 at snapshot 1: the activation shows that it is one feature."""
    twins = orthonormal_crosscoder(torch.tensor([[1.0, 1.0]]), width=3)
    row = twins.decoder.repeat(2, 1).view(2, 2, 3)
    row[0, 1], row[1, 0] = 0, 0
    twins.decoder = row.flatten(1)
    twins.encoder = twins.encoder.repeat(2, 1)
    twins.encoder_bias, twins.threshold = torch.zeros(2), torch.zeros(2)
    rows = sparse_features(200, 1, seed=9) @ torch.tensor([[1.0, 0, 0, 1.0, 0, 0]])
    found = evaluate(twins, [rows])
    np.testing.assert_allclose(found.explained_variance, 1, atol=1e-10)
    np.testing.assert_allclose(found.scaling.beta, [[1, 0], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(found.scaling.beta_activation, 1, atol=1e-6)


def test_snapshots_that_do_not_vary_have_no_explained_variance() -> None:
    crosscoder = random_crosscoder(snapshots=2, width=3)
    rows = torch.randn(50, 6, generator=generator(10))
    rows[:, 3:] = 1.5
    found = evaluate(crosscoder, [rows])
    assert np.isfinite(found.explained_variance[0])
    assert np.isnan(found.explained_variance[1])


def test_pools_that_give_no_numbers_are_refused() -> None:
    crosscoder = random_crosscoder()
    with pytest.raises(ValueError, match="no tokens"):
        evaluate(crosscoder, [])
    with pytest.raises(ValueError, match="not of 15 channels"):
        evaluate(crosscoder, [torch.zeros(4, 14)])
    rows = torch.zeros(4, 15)
    rows[2, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        evaluate(crosscoder, [rows])
