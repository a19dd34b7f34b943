"""A planted dictionary is found again: directions, births, a rotation, a death; and what an L1 does to it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from crosscoder_support import Planted, match, train
from torch import Tensor

from analyzers.crosscoder.scaling import latent_scaling
from analyzers.crosscoder.settings import TrainSettings
from analyzers.crosscoder.training import StepReport
from analyzers.crosscoder.weights import Crosscoder

FEATURES, SNAPSHOTS, WIDTH = 24, 6, 32
ROTATING, DYING, DIES_AT = 0, 5, 3


@pytest.fixture(scope="module")
def planted() -> Planted:
    """Births at snapshots 0 to 4; feature 0 turns by 90 degrees, feature 5 ends before snapshot 3."""
    generator = torch.Generator().manual_seed(1234)
    directions = torch.randn(FEATURES, WIDTH, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    raw = directions[:, None].repeat(1, SNAPSHOTS, 1)
    for feature in range(FEATURES):
        raw[feature, : feature % 5] = 0
    raw[DYING, DIES_AT:] = 0
    start, other = directions[ROTATING], torch.randn(WIDTH, generator=generator)
    end = torch.nn.functional.normalize(other - (other @ start) * start, dim=0)
    angle = torch.linspace(0, torch.pi / 2, SNAPSHOTS)[:, None]
    raw[ROTATING] = angle.cos() * start + angle.sin() * end
    return Planted.of(5 * raw, share=0.08, noise=0.05)


SPARSE: dict[str, dict[str, Any]] = {
    "batch-topk": {"k": 2},
    # Features are active on 8 % of the tokens: below that frequency nothing is to be gained by splitting one.
    "jumprelu": {"activation": "jumprelu", "penalty": 0.02, "tanh_frequency": 0.1},
    "jumprelu-per-snapshot": {
        "activation": "jumprelu",
        "gate": "per-snapshot",
        "penalty": 0.02,
        "tanh_frequency": 0.1,
    },
    "jumprelu-defaults": {"activation": "jumprelu"},
}


def settings_of(name: str, **changes: Any) -> TrainSettings:
    common = {"latents": 48, "steps": 600, "learning_rate": 1e-2, "dead_after": 20_000}
    return TrainSettings(**common, **SPARSE[name], **changes)


@pytest.fixture(scope="module", params=list(SPARSE))
def found(planted: Planted, request: pytest.FixtureRequest) -> tuple[Crosscoder, list[StepReport]]:
    return train(planted, settings_of(request.param), batch=256)


def relative(strengths: Tensor) -> Tensor:
    return strengths / strengths.max(dim=1, keepdim=True).values


def test_the_dictionary_is_recovered(planted: Planted, found: tuple[Crosscoder, list[StepReport]]) -> None:
    latents, cosines = match(found[0], planted.truth)
    assert (cosines > 0.9).float().mean() >= 0.95
    assert len(set(latents.tolist())) == FEATURES
    report = found[1][-1]
    assert min(report.explained) > 0.9
    # A planted token has 1.92 features; with a gate per snapshot those that are not yet born are not counted.
    assert 1.3 < report.l0 < 2.4
    if found[0].activation == "batch-topk":
        assert report.l0 == 2


def test_births_are_at_the_right_snapshot(
    planted: Planted, found: tuple[Crosscoder, list[StepReport]]
) -> None:
    latents, _ = match(found[0], planted.truth)
    strengths = relative(found[0].strengths()[latents])
    births = (strengths >= 0.5).int().argmax(dim=1)
    assert births.tolist() == [feature % 5 for feature in range(FEATURES)]
    assert strengths[DYING, DIES_AT:].max() < 0.05
    torch.testing.assert_close(strengths, relative(planted.truth.norm(dim=2)), rtol=0, atol=0.05)


def test_the_rotation_is_seen(planted: Planted, found: tuple[Crosscoder, list[StepReport]]) -> None:
    latents, _ = match(found[0], planted.truth)
    decoder = found[0].decoder.view(-1, SNAPSHOTS, WIDTH)
    for feature in (ROTATING, 10):
        mine = decoder[latents[feature]]
        cosines = torch.nn.functional.cosine_similarity(mine, mine[:1], dim=1)
        angles = torch.linspace(0, torch.pi / 2 if feature == ROTATING else 0, SNAPSHOTS)
        torch.testing.assert_close(cosines, angles.cos(), rtol=0, atol=0.03)


def test_a_flat_tanh_leaves_jumprelu_without_a_penalty(planted: Planted) -> None:
    """In other units c = 4 is far out in the tail: what made jumprelu find few features before."""
    crosscoder, reports = train(planted, settings_of("jumprelu", tanh_scale=136), batch=256)
    _, cosines = match(crosscoder, planted.truth)
    assert (cosines > 0.9).float().mean() < 0.5
    assert reports[-1].l0 > 5


def shrunk(activation: str) -> tuple[Crosscoder, Planted, Sequence[int]]:
    """Eight orthogonal features, the first four at a quarter of their strength at the first snapshot."""
    generator = torch.Generator().manual_seed(1234)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q[:8]
    raw = 5 * directions[:, None].repeat(1, 4, 1)
    raw[:4, 0] *= 0.25
    planted = Planted.of(raw, share=0.15, noise=0.02)
    if activation == "relu":
        settings = TrainSettings(
            latents=24, steps=400, activation="relu", penalty=5, penalty_warm_up=0.3, learning_rate=3e-3
        )
    else:
        settings = TrainSettings(latents=24, steps=400, k=1, learning_rate=1e-2)
    crosscoder, _ = train(planted, settings, batch=128)
    latents, cosines = match(crosscoder, planted.truth)
    assert cosines.min() > 0.95
    return crosscoder, planted, latents[:4].tolist()


def test_an_l1_shrinks_weak_snapshots_to_nothing_and_beta_shows_them() -> None:
    crosscoder, planted, latents = shrunk("relu")
    truth = relative(planted.truth.norm(dim=2))[:4]
    assert truth[:, 0].min() > 0.35
    # The features are there at the first snapshot at more than a third; the decoder says they are not.
    assert relative(crosscoder.strengths()[latents])[:, 0].max() < 0.01
    generator = torch.Generator().manual_seed(100)
    scaling = latent_scaling(crosscoder, [planted.rows(512, generator) for _ in range(4)])
    beta = torch.from_numpy(scaling.beta)[latents].float()
    torch.testing.assert_close(relative(beta), truth, rtol=0, atol=0.05)
    # Features were shrunk too: their contribution is more than twice what the crosscoder says.
    assert beta.max(dim=1).values.min() > 2


def test_batch_topk_does_not_shrink_them() -> None:
    crosscoder, planted, latents = shrunk("batch-topk")
    truth = relative(planted.truth.norm(dim=2))[:4]
    torch.testing.assert_close(relative(crosscoder.strengths()[latents]), truth, rtol=0, atol=0.05)
    scaling = latent_scaling(crosscoder, [planted.rows(2048, torch.Generator().manual_seed(100))])
    beta = torch.from_numpy(scaling.beta)[latents].float()
    torch.testing.assert_close(beta, truth, rtol=0, atol=0.1)
