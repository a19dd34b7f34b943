"""Crosscoders written out densely for autograd, and a planted dictionary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from analyzers.crosscoder.settings import TrainSettings
from analyzers.crosscoder.training import StepReport, Trainer
from analyzers.crosscoder.weights import Crosscoder

NAMES = ("encoder", "encoder_bias", "decoder", "decoder_bias", "log_threshold")


def dense_gradients(
    parameters: dict[str, Tensor], rows: Tensor, settings: TrainSettings, snapshots: int, dead: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by autograd of the formula with every row, snapshot and latent in one tensor."""
    p = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}
    latents, batch = p["encoder"].shape[0], rows.shape[0]
    decoder = p["decoder"].view(latents, snapshots, -1)
    norms = decoder.norm(dim=2)
    shared = settings.gate == "shared" or settings.activation == "relu"
    factors = norms.sum(dim=1, keepdim=True).expand(-1, snapshots) if shared else norms
    before = torch.relu(rows @ p["encoder"].T + p["encoder_bias"])
    compared = before[:, None] * factors.T
    threshold = p["log_threshold"].exp()
    # Settings of jumprelu are relative to the norm of what a gate sees: all snapshots, or one.
    width = rows.shape[1] // snapshots
    norm = width**0.5 * (snapshots if shared else 1)
    square = width * (snapshots if shared else 1)
    if settings.activation == "batch-topk":
        flat = (compared[:, 0] if shared else compared).flatten()
        count = settings.k * batch * (1 if shared else snapshots)
        f = before[:, None] * (compared >= flat.topk(count).values.min())
    elif settings.activation == "jumprelu":
        f = before[:, None] * (compared > threshold)
        inside = (compared - threshold).abs() < settings.bandwidth * norm / 2
        slope = -(before[:, None] * inside / (settings.bandwidth * norm)).detach()
        f = f + slope * (threshold - threshold.detach())
    else:
        f = before[:, None].expand(-1, snapshots, -1)
    error = torch.einsum("bsm,msd->bsd", f, decoder).flatten(1) + p["decoder_bias"] - rows
    loss = error.square().sum() / batch
    once = slice(0, 1) if shared else slice(None)
    if settings.activation == "relu":
        loss = loss + settings.penalty_weight * (f * factors.T)[:, once].sum() / batch
    elif settings.activation == "jumprelu":
        frequency = torch.tanh(settings.tanh_scale * f * factors.T / norm)[:, once].mean(dim=0)
        each = frequency * (1 + frequency / settings.tanh_frequency)
        loss = loss + settings.penalty_weight * square * each.sum()
    elif dead.any():
        count = min(settings.auxiliary_k or rows.shape[1] // snapshots // 2, int(dead.sum()))
        idle = before * dead
        helpers = idle * (idle >= idle.topk(count, dim=1).values.min(dim=1, keepdim=True).values)
        left = helpers @ p["decoder"] + error.detach()
        loss = loss + settings.auxiliary * left.square().sum() / batch
    loss.backward()
    return float(loss.detach()), {
        n: t.grad if t.grad is not None else torch.zeros_like(t) for n, t in p.items()
    }


@dataclass
class Planted:
    """A dictionary over snapshots, and activations made of it.

    Attributes:
        truth: what each feature adds where its value is 1, per snapshot, scaled.
        scale: of each snapshot.
        share: probability that a feature is active.
        noise: standard deviation of each channel before scaling.
    """

    truth: Tensor
    scale: Tensor
    share: float
    noise: float

    @classmethod
    def of(cls, raw: Tensor, share: float, noise: float) -> "Planted":
        """From unscaled directions; the scale brings the mean norm to the root of the width."""
        self = cls(raw, torch.ones(raw.shape[1]), share, noise)
        norms = self.rows(4096, torch.Generator().manual_seed(99)).view(4096, *raw.shape[1:]).norm(dim=2)
        scale = raw.shape[2] ** 0.5 / norms.mean(dim=0)
        return cls(raw * scale[:, None], scale, share, noise)

    def rows(self, count: int, generator: torch.Generator) -> Tensor:
        """Scaled activations of that many tokens."""
        features, snapshots, width = self.truth.shape
        active = torch.rand(count, features, generator=generator) < self.share
        values = active * (0.5 + torch.rand(count, features, generator=generator))
        noise = self.noise * torch.randn(count, snapshots, width, generator=generator)
        clean = torch.einsum("bi,isd->bsd", values, self.truth)
        return (clean + noise * self.scale[:, None]).flatten(1)


def train(planted: Planted, settings: TrainSettings, batch: int) -> tuple[Crosscoder, list[StepReport]]:
    """A crosscoder trained on fresh tokens at every step."""
    _, snapshots, width = planted.truth.shape
    trainer = Trainer(settings, snapshots, width, planted.scale)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    reports = [trainer.step(planted.rows(batch, generator)) for _ in range(settings.steps)]
    return trainer.crosscoder(), reports


def match(crosscoder: Crosscoder, truth: Tensor) -> tuple[Tensor, Tensor]:
    """For each planted feature the latent whose decoder rows are most like it, and their cosine."""
    ours = torch.nn.functional.normalize(crosscoder.decoder)
    cosines = torch.nn.functional.normalize(truth.flatten(1)) @ ours.T
    best = cosines.max(dim=1)
    return best.indices, best.values
