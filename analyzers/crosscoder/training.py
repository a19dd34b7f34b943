"""Training a crosscoder: steps on batches of scaled activations, and a state from which to go on exactly."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from analyzers.crosscoder.gates import GatedPairs, above, batch_top, dead_top, factors_of
from analyzers.crosscoder.kernels import kernels_for, sum_by_latent
from analyzers.crosscoder.losses import (
    Penalty,
    l1,
    log_threshold_gradient,
    tanh_quadratic,
    through_norms,
)
from analyzers.crosscoder.parameters import Optimiser, Parameters
from analyzers.crosscoder.settings import TrainSettings
from analyzers.crosscoder.shards import Shards
from analyzers.crosscoder.weights import Crosscoder

_NORMS = tuple(10 ** (exponent / 10) for exponent in range(-20, 11))
"""Decoder norms that are tried on the first batch: 0.01 to 10, ten per decade."""


@dataclass(frozen=True)
class StepReport:
    """What a step saw, before its update.

    Attributes:
        step: number of steps done, this one included.
        loss: reconstruction, penalty and auxiliary loss.
        error: mean over rows of the squared error, summed over snapshots and channels.
        penalty: the weighted penalty on features.
        auxiliary: the weighted error that dead latents left.
        explained: for each snapshot, 1 - squared error / squared distance from the batch's mean.
        l0: mean number of active latents per row and gate.
        dead: share of latents without activity for ``dead_after`` tokens.
        rate: learning rate.
    """

    step: int
    loss: float
    error: float
    penalty: float
    auxiliary: float
    explained: tuple[float, ...]
    l0: float
    dead: float
    rate: float


@dataclass(frozen=True)
class TrainerState:
    """All that a trainer needs to go on: settings, tensors (on the CPU) and numbers, each by name."""

    settings: TrainSettings
    tensors: dict[str, Tensor]
    numbers: dict[str, int | float]


@dataclass
class _Sums:
    """Sums over the parts of a step."""

    error: Float64[Tensor, "snapshots"]
    spread: Float64[Tensor, "snapshots"]
    penalty: Tensor
    auxiliary: Tensor
    open: Tensor
    fired: Bool[Tensor, "latents"]


class Trainer:
    """A crosscoder in training. All gradients are written out: autograd would keep dense features.

    With ``shards`` of more than one process, each holds ``latents / processes`` of the latents and calls
    :meth:`step` as often as the others; their rows are the first process's.
    """

    def __init__(
        self,
        settings: TrainSettings,
        snapshots: int,
        width: int,
        scale: Float[Tensor, "snapshots"],
        *,
        device: torch.device | str = "cpu",
        shards: Shards | None = None,
    ) -> None:
        """Start from the seed; the decoder's norm is chosen on the rows of the first step.

        Args:
            settings: size, sparsity, schedule.
            snapshots: checkpoints whose activations stand side by side in a row.
            width: channels of one snapshot.
            scale: factor of each snapshot with which rows were multiplied; kept beside the weights.
            device: where weights and steps are.
            shards: processes that share out the latents; absent: this one holds all.

        Raises:
            ValueError: the scale has another number of snapshots, or latents do not divide by processes.
        """
        if scale.shape != (snapshots,):
            raise ValueError(f"the scale has shape {tuple(scale.shape)}, there are {snapshots} snapshots")
        self.settings, self.snapshots, self.width = settings, snapshots, width
        self.unit = settings.unit(snapshots, width)
        self.scale = scale.detach().to("cpu", torch.float32, copy=True)
        self.device, self.shards = torch.device(device), shards or Shards()
        self.kernels = kernels_for(self.device)
        start = Parameters.random(settings, snapshots, width, self.device, self.shards)
        self._place(start)
        self.idle = torch.zeros(start.decoder.shape[0], dtype=torch.int64, device=self.device)
        self.steps_done = 0
        self._cut_sum = self._cut_weight = 0.0

    def _place(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.optimiser = Optimiser(parameters, self.settings, self.kernels)

    @torch.no_grad()
    def step(self, rows: Float[Tensor, "batch inputs"]) -> StepReport:
        """One step of the optimiser on scaled activations, computed ``micro_batch`` rows at a time.

        The gradient is the mean over rows. What is decided per batch (the largest values, the frequencies in
        the penalty) is decided per part of it when there are several.

        Raises:
            ValueError: the rows have another width, there are none, or all steps are done.
            FloatingPointError: the loss is not finite; nothing was updated.
        """
        if rows.ndim != 2 or rows.shape[1] != self.snapshots * self.width or not rows.shape[0]:
            raise ValueError(
                f"rows have shape {tuple(rows.shape)}, expected (batch, {self.snapshots * self.width})"
            )
        if self.steps_done == self.settings.steps:
            raise ValueError(f"all {self.settings.steps} steps of the schedule are done")
        rows = self.shards.rows(rows.to(self.device, torch.float32))
        parts = rows.split(self.settings.micro_batch or rows.shape[0])  # type: ignore[no-untyped-call]
        if not self.steps_done:
            self._choose_norm(parts[0])
        dead = self.idle >= self.settings.dead_after
        zero = rows.new_zeros(())
        sums = _Sums(
            rows.new_zeros(self.snapshots, dtype=torch.float64),
            rows.new_zeros(self.snapshots, dtype=torch.float64),
            zero.clone(),
            zero.clone(),
            zero.clone(),
            torch.zeros_like(dead),
        )
        self.optimiser.begin()
        for part in parts:
            self._gradients(part, rows.shape[0], dead, sums)
        report = self._report(rows, dead, sums)
        self.optimiser.step(self.steps_done)
        self.idle = torch.where(sums.fired, 0, self.idle + rows.shape[0])
        self.steps_done += 1
        return report

    def _report(self, rows: Tensor, dead: Bool[Tensor, "latents"], sums: _Sums) -> StepReport:
        batch = rows.shape[0]
        counted = self.shards.total(
            torch.stack([sums.open.double(), dead.sum().double(), sums.penalty.double()])
        )
        gates = self.settings.activation != "relu" and self.settings.gate == "per-snapshot"
        error, penalty, auxiliary = float(sums.error.sum()) / batch, float(counted[2]), float(sums.auxiliary)
        loss = error + penalty + auxiliary
        if not torch.isfinite(torch.tensor(loss)):
            raise FloatingPointError(
                f"the loss of step {self.steps_done + 1} is {loss} (largest input {float(rows.abs().max())})"
            )
        return StepReport(
            step=self.steps_done + 1,
            loss=loss,
            error=error,
            penalty=penalty,
            auxiliary=auxiliary,
            explained=tuple((1 - sums.error / sums.spread).tolist()),
            l0=float(counted[0]) / batch / (self.snapshots if gates else 1),
            dead=float(counted[1]) / self.settings.latents,
            rate=self.settings.learning_rate * self.settings.rate(self.steps_done),
        )

    def _gradients(self, rows: Tensor, batch: int, dead: Bool[Tensor, "latents"], sums: _Sums) -> None:
        """Give the gradients of one part of a step to the optimiser, and count what is reported."""
        settings, p, kernels, optimiser = self.settings, self.parameters, self.kernels, self.optimiser
        before = self._before(rows)
        strengths = self._strengths()
        factors = factors_of(strengths, "shared" if settings.activation == "relu" else settings.gate)
        active = self._active(before, factors)
        pairs, values = active.pairs, active.values
        share = rows.shape[0] / batch

        error = self.shards.total(kernels.decode(pairs, values, p.decoder)).add_(p.decoder_bias).sub_(rows)
        # The error's gradient is 2 / batch times the error: that goes to the few values, not to the rows.
        factor = 2 / batch
        features = kernels.feature_gradient(pairs, error, p.decoder, values.shape[1]).mul_(factor)
        weight = settings.penalty_weight * settings.penalty_share(self.steps_done)
        penalty = self._penalty(active, factors, weight * share)
        if penalty is not None:
            features += penalty.features
            sums.penalty += penalty.value

        sums_of_error, spread_of_error = kernels.columns(error)
        optimiser.onto("decoder_bias").add_(sums_of_error * factor)
        optimiser.take("decoder", pairs, values * factor, error)
        self._into_encoder(active, features, rows)
        if penalty is not None:
            through_norms(p.decoder, strengths, penalty.factors, optimiser.onto("decoder"))
        if settings.activation == "jumprelu":
            threshold = p.log_threshold.exp()
            bandwidth = settings.bandwidth * self.unit
            found = log_threshold_gradient(active, factors, threshold, features, bandwidth)
            optimiser.onto("log_threshold").add_(found)
        elif settings.activation == "batch-topk" and settings.auxiliary:
            sums.auxiliary += self._auxiliary(before, dead, error, rows, batch)

        squares = spread_of_error + sums_of_error.square() / rows.shape[0]
        sums.error += squares.view(self.snapshots, -1).sum(dim=1)
        sums.spread += kernels.columns(rows)[1].view(self.snapshots, -1).sum(dim=1)
        sums.open += active.open.sum()
        sums.fired[pairs.latent[active.open.any(dim=1)]] = True

    def _auxiliary(
        self, before: Tensor, dead: Bool[Tensor, "latents"], error: Tensor, rows: Tensor, batch: int
    ) -> Tensor:
        """What dead latents leave of the error, with its gradients to them; the error is taken as given.

        ``alpha / B * sum_b ||(x - xhat) - sum_dead f_bi d_i||^2``, the largest ``auxiliary_k`` of a row,
        without the decoder's bias (arXiv 2406.04093, A.2).
        """
        if not bool(self.shards.total(dead.sum())):
            return rows.new_zeros(())
        p = self.parameters
        active = dead_top(before, dead, self.settings.auxiliary_k or max(1, self.width // 2), self.shards)
        values = active.values
        left = self.shards.total(self.kernels.decode(active.pairs, values, p.decoder)).add_(error)
        weight = self.settings.auxiliary / batch
        gradient = left * (2 * weight)
        features = self.kernels.feature_gradient(active.pairs, gradient, p.decoder, 1)
        self.optimiser.take("decoder", active.pairs, values, gradient)
        self._into_encoder(active, features, rows)
        return left.square().sum() * weight

    def _into_encoder(
        self, active: GatedPairs, features: Float[Tensor, "pairs groups"], rows: Tensor
    ) -> None:
        """Gradients of features to the encoder: through open gates, whose outputs are all positive."""
        each = (features * active.open).sum(dim=1, keepdim=True)
        self.optimiser.take("encoder", active.pairs, each, rows)
        self.optimiser.onto("encoder_bias").add_(sum_by_latent(active.pairs, each)[:, 0])

    def _before(self, rows: Tensor) -> Float[Tensor, "batch latents"]:
        p, wanted = self.parameters, self.settings.matmul
        half = wanted == "bfloat16" or (
            wanted == "auto" and self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            before: Tensor = torch.addmm(p.encoder_bias, rows, p.encoder.T)
        return before.float().relu_()

    def _strengths(self) -> Float[Tensor, "latents snapshots"]:
        rows = self.parameters.decoder.view(-1, self.snapshots, self.width)
        norms: Tensor = torch.linalg.vector_norm(rows, dim=2)
        return norms

    def _active(self, before: Tensor, factors: Float[Tensor, "latents groups"]) -> GatedPairs:
        settings = self.settings
        if settings.activation == "batch-topk":
            count = settings.k * before.shape[0] * factors.shape[1]
            active = batch_top(before, factors, count, self.shards, self.kernels)
            if active.cut is not None:
                keep = settings.threshold_decay
                self._cut_sum = keep * self._cut_sum + (1 - keep) * active.cut
                self._cut_weight = keep * self._cut_weight + (1 - keep)
            return active
        if settings.activation == "jumprelu":
            threshold = self.parameters.log_threshold.exp()
            return above(before, factors, threshold, self.kernels, settings.bandwidth * self.unit)
        # Plain ReLU: no norm decides, so that a decoder row of zeros can grow again.
        ones, zeros = torch.ones_like(factors), torch.zeros_like(factors[:, 0])
        return above(before, ones, zeros, self.kernels)

    def _penalty(
        self, active: GatedPairs, factors: Float[Tensor, "latents groups"], weight: float
    ) -> Penalty | None:
        if self.settings.activation == "relu":
            return l1(active, factors, weight)
        if self.settings.activation == "jumprelu":
            # As much for a latent in one snapshot as the settings say of that snapshot's squared norm.
            scale, energy = self.settings.tanh_scale / self.unit, self.unit * math.sqrt(self.width)
            return tanh_quadratic(active, factors, weight * energy, scale, self.settings.tanh_frequency)
        return None

    def _choose_norm(self, rows: Tensor) -> None:
        """Give decoder and encoder the row norm per snapshot that leaves the least error on these rows.

        Encoder outputs grow with the norm and the reconstruction with its square, so one encoding serves all.
        """
        p = self.parameters
        cut = self._cut_sum, self._cut_weight
        unit, best = self._before(rows), (float("inf"), 1.0)
        for norm in _NORMS:
            strengths = self._strengths() * norm
            factors = factors_of(
                strengths, "shared" if self.settings.activation == "relu" else self.settings.gate
            )
            active = self._active(unit * norm, factors)
            found = self.shards.total(self.kernels.decode(active.pairs, active.values * norm, p.decoder))
            best = min(best, (float((found - rows).square().sum()), norm))
        self._cut_sum, self._cut_weight = cut
        p.encoder.mul_(best[1])
        p.decoder.mul_(best[1])

    @property
    def threshold(self) -> Float[Tensor, "latents"]:
        """Of this process's latents, as it would be used after training."""
        if self.settings.activation == "jumprelu":
            return self.parameters.log_threshold.exp()
        mean = self._cut_sum / self._cut_weight if self._cut_weight else 0.0
        return torch.full_like(self.parameters.log_threshold, mean)

    def crosscoder(self) -> Crosscoder:
        """A copy of the weights as they are now, of all processes, on the CPU."""
        p, whole = self.parameters, self.shards.joined
        return Crosscoder(
            encoder=whole(p.encoder).to("cpu", copy=True),
            encoder_bias=whole(p.encoder_bias).to("cpu", copy=True),
            decoder=whole(p.decoder).to("cpu", copy=True),
            decoder_bias=p.decoder_bias.to("cpu", copy=True),
            threshold=whole(self.threshold).to("cpu", copy=True),
            scale=self.scale.clone(),
            activation=self.settings.activation,
            gate=self.settings.gate,
        )

    def state(self) -> TrainerState:
        """A copy of all that :meth:`resume` needs; with shards, this process's part.

        No random number is drawn after the start, so there is no generator to keep.
        """
        tensors: dict[str, Tensor] = {**dict(self.parameters.named()), **self.optimiser.moments()}
        tensors |= {"idle": self.idle, "scale": self.scale}
        numbers = {
            "step": self.steps_done,
            "snapshots": self.snapshots,
            "cut_sum": self._cut_sum,
            "cut_weight": self._cut_weight,
            "rank": self.shards.rank,
            "processes": self.shards.count,
        }
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return TrainerState(self.settings, copies, numbers)

    @classmethod
    def resume(
        cls, state: TrainerState, *, device: torch.device | str = "cpu", shards: Shards | None = None
    ) -> "Trainer":
        """A trainer that goes on as the one that gave the state would have: the same bits, on one machine.

        Raises:
            ValueError: the state is that of another process, or of another number of processes.
        """
        shards = shards or Shards()
        numbers: dict[str, Any] = dict(state.numbers)
        if (numbers["rank"], numbers["processes"]) != (shards.rank, shards.count):
            raise ValueError(
                f"the state is that of process {numbers['rank']} of {numbers['processes']}, "
                f"this is process {shards.rank} of {shards.count}"
            )
        snapshots = int(numbers["snapshots"])
        width = state.tensors["decoder"].shape[1] // snapshots
        trainer = cls(state.settings, snapshots, width, state.tensors["scale"], device=device, shards=shards)
        trainer._place(Parameters.like(state.tensors, trainer.device))
        trainer.optimiser.load(state.tensors)
        trainer.idle = state.tensors["idle"].to(trainer.device, copy=True)
        trainer.steps_done = int(numbers["step"])
        trainer._cut_sum, trainer._cut_weight = numbers["cut_sum"], numbers["cut_weight"]
        return trainer
