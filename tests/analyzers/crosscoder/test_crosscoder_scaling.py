"""Latent scaling against least squares done one feature and one snapshot at a time."""

import pytest
import torch
from torch import Tensor

from analyzers.crosscoder.scaling import LatentScaling, Target
from analyzers.crosscoder.weights import Crosscoder, Gate

LATENTS, SNAPSHOTS, WIDTH, BATCH = 7, 3, 5, 40


def crosscoder(gate: Gate) -> Crosscoder:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    bias = draw(LATENTS)
    bias[4] = -1e6  # never active
    return Crosscoder(
        draw(LATENTS, SNAPSHOTS * WIDTH),
        bias,
        draw(LATENTS, SNAPSHOTS * WIDTH),
        draw(SNAPSHOTS * WIDTH),
        torch.full((LATENTS,), 2.0),
        torch.ones(SNAPSHOTS),
        gate=gate,
    )


@pytest.mark.parametrize("target", ["activations", "own-share"])
@pytest.mark.parametrize("gate", ["shared", "per-snapshot"])
def test_beta_is_least_squares(gate: Gate, target: Target) -> None:
    model = crosscoder(gate)
    rows = torch.randn(BATCH, SNAPSHOTS * WIDTH, generator=torch.Generator().manual_seed(3))
    chosen = torch.tensor([6, 4, 0, 2])
    scaling = LatentScaling(model, target, latents=chosen)
    for part in rows.split(13):
        scaling.update(part)
    found = scaling.result()
    each = model.encode_each(rows)
    decoder = model.decoder.view(LATENTS, SNAPSHOTS, WIDTH)
    for place, latent in enumerate(chosen.tolist()):
        feature = each[:, :, latent].max(dim=1).values
        direction = decoder[latent, model.strengths()[latent].argmax()]
        for snapshot in range(SNAPSHOTS):
            at = slice(snapshot * WIDTH, (snapshot + 1) * WIDTH)
            wanted = (rows - model.decoder_bias)[:, at]
            if target == "own-share":
                own = each[:, snapshot, latent, None] * decoder[latent, snapshot]
                wanted = (rows - model.reconstruct(rows))[:, at] + own
            if latent == 4:
                assert found[place, snapshot].isnan()
                continue
            design = torch.outer(feature, direction).flatten()[:, None]
            beta = torch.linalg.lstsq(design, wanted.flatten()[:, None]).solution
            assert float(found[place, snapshot]) == pytest.approx(float(beta), rel=1e-4, abs=1e-5)
