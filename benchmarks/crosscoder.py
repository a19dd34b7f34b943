"""What a training step of a crosscoder costs: gathered active latents against dense layouts.

All sides compute the same function: they start from the same weights, see the same batches and choose the
same latents, so that their losses are equal. All use torch's fused Adam, but ``einsum``, which stands for the
layout as it is commonly written, uses torch's default; ``einsum_fused`` shows what the layout alone costs.
``einsum_gated`` has a gate for each snapshot on both sides, as the method's public code has; there the dense
layout compares, masks and multiplies in ``[batch, S, m]``.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analyzers.crosscoder.settings import TrainSettings
from analyzers.crosscoder.training import Trainer, TrainerState
from analyzers.crosscoder.weights import Gate
from benchmarks.memory import peak, peaks, resident
from benchmarks.timing import Line, Seconds, alternate, machine, now


@dataclass(frozen=True)
class Shape:
    """Size of the crosscoder and of a batch."""

    snapshots: int = 8
    width: int = 512
    latents: int = 4096
    k: int = 32
    batch: int = 512


_CPU_BARS = {"einsum": 1 / 6, "einsum_gated": 1 / 6, "einsum_fused": None, "concatenated": 1 / 3}
CPU = Shape()
CUDA = Shape(snapshots=32, width=768, latents=24_576, k=32, batch=2048)


def flops(shape: Shape) -> dict[str, float]:
    """FLOPs per token: 10 S d m dense, 2 S d (m + 4 k) with k active latents (encoder, and four products)."""
    inputs = shape.snapshots * shape.width
    return {"ours": 2 * inputs * (shape.latents + 4 * shape.k), "against": 10 * inputs * shape.latents}


def data(shape: Shape, device: torch.device) -> list[Tensor]:
    """Batches made of shared directions with noise, at the scale of real ones."""
    generator = torch.Generator().manual_seed(0)
    inputs = shape.snapshots * shape.width
    directions = torch.randn(256, inputs, generator=generator)
    found = []
    for _ in range(4):
        active = (torch.rand(shape.batch, 256, generator=generator) < 0.05).float()
        rows = active @ directions + 0.5 * torch.randn(shape.batch, inputs, generator=generator)
        norm = rows.view(shape.batch, shape.snapshots, -1).norm(dim=2).mean()
        found.append((rows * shape.width**0.5 / norm).to(device))
    return found


class Ours:
    """The trainer."""

    def __init__(self, shape: Shape, start: TrainerState, device: torch.device) -> None:
        self.trainer = Trainer.resume(start, device=device)

    def step(self, rows: Tensor) -> float:
        """One step; its loss."""
        return self.trainer.step(rows).loss


class Concatenated:
    """Weights ``[m, S d]``, every product over all latents, features as a dense tensor with a mask."""

    fused: bool | None = True

    def __init__(self, shape: Shape, start: TrainerState, device: torch.device) -> None:
        self.shape, self.settings, self.done = shape, start.settings, start.numbers["step"]
        self.device = device
        names = ("encoder", "encoder_bias", "decoder", "decoder_bias")
        self.encoder, self.encoder_bias, self.decoder, self.decoder_bias = (
            self.laid_out(name, start.tensors[name].to(device, copy=True)).requires_grad_() for name in names
        )
        parameters = [self.encoder, self.encoder_bias, self.decoder, self.decoder_bias]
        self.adam = torch.optim.Adam(parameters, betas=(0.9, 0.999), fused=self.fused)

    def laid_out(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter in this layout."""
        return tensor

    def half(self) -> AbstractContextManager[Any]:
        """bfloat16 for products on CUDA, as our encoder has it there."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def step(self, rows: Tensor) -> float:
        """One step by autograd; its loss."""
        error = self.error(rows)
        loss = error.float().square().sum() / rows.shape[0]
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.adam.param_groups:
            group["lr"] = self.settings.learning_rate * self.settings.rate(int(self.done))
        self.adam.step()
        self.done += 1
        return float(loss.detach())

    def kept(self, before: Tensor, norms: Tensor) -> Tensor:
        """Mask of the largest of the batch."""
        with torch.no_grad():
            compared = before * norms
            count = self.settings.k * before[..., 0].numel()
            return compared >= compared.flatten().topk(count, sorted=False).values.min()

    def error(self, rows: Tensor) -> Tensor:
        """Reconstruction less the rows."""
        with self.half():
            before = torch.relu(torch.addmm(self.encoder_bias, rows, self.encoder.T))
            decoder = self.decoder.detach().view(self.shape.latents, self.shape.snapshots, -1)
            norms = torch.linalg.vector_norm(decoder, dim=2).sum(dim=1)
            features = before * self.kept(before, norms)
            return torch.addmm(self.decoder_bias, features, self.decoder) - rows


class PerSnapshot(Concatenated):
    """Weights ``[S, d, m]`` and ``[S, m, d]``, and einsums whose results are ``[batch, S, m]``."""

    def laid_out(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter in this layout."""
        snapshots = self.shape.snapshots
        if name in ("encoder_bias", "decoder_bias"):
            return tensor if name == "encoder_bias" else tensor.view(snapshots, -1)
        parts = tensor.view(self.shape.latents, snapshots, -1)
        return (
            parts.permute(1, 2, 0).contiguous() if name == "encoder" else parts.transpose(0, 1).contiguous()
        )

    def error(self, rows: Tensor) -> Tensor:
        """Reconstruction less the rows."""
        each = rows.view(rows.shape[0], self.shape.snapshots, -1)
        with self.half():
            parts = torch.einsum("bsd,sdm->bsm", each, self.encoder)
            before = torch.relu(parts.sum(dim=1) + self.encoder_bias)
            norms = torch.linalg.vector_norm(self.decoder.detach(), dim=2).sum(dim=0)
            features = (before * self.kept(before, norms))[:, None].expand_as(parts)
            return torch.einsum("bsm,smd->bsd", features, self.decoder) + self.decoder_bias - each


class PerSnapshotDefault(PerSnapshot):
    """The same with Adam as torch gives it when nothing is asked for."""

    fused = None


class Gated(PerSnapshotDefault):
    """The same with a gate for each snapshot."""

    def error(self, rows: Tensor) -> Tensor:
        """Reconstruction less the rows."""
        each = rows.view(rows.shape[0], self.shape.snapshots, -1)
        with self.half():
            parts = torch.einsum("bsd,sdm->bsm", each, self.encoder)
            before = torch.relu(parts.sum(dim=1) + self.encoder_bias)[:, None].expand_as(parts)
            features = before * self.kept(before, torch.linalg.vector_norm(self.decoder.detach(), dim=2))
            return torch.einsum("bsm,smd->bsd", features, self.decoder) + self.decoder_bias - each


_SIDES: Mapping[str, Callable[[Shape, TrainerState, torch.device], Any]] = {
    "ours": Ours,
    "concatenated": Concatenated,
    "einsum_fused": PerSnapshot,
    "einsum": PerSnapshotDefault,
    "einsum_gated": Gated,
}


def _gate(side: str) -> Gate:
    return "per-snapshot" if side == "einsum_gated" else "shared"


def start_of(shape: Shape, rows: Tensor, device: torch.device, gate: Gate) -> TrainerState:
    """Weights with their norm chosen, and no step of Adam behind them."""
    settings = TrainSettings(
        latents=shape.latents, steps=1000, k=shape.k, gate=gate, warm_up=0.0, learning_rate=1e-4
    )
    trainer = Trainer(settings, shape.snapshots, shape.width, torch.ones(shape.snapshots), device=device)
    trainer.step(rows)
    state = trainer.state()
    weights = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("adam.")}
    return replace(state, tensors=weights)


def run(shape: Shape | None = None, repeats: int = 7, *, memory: bool = True) -> Iterator[Line]:
    """Both dense layouts on the CPU; on CUDA the concatenated one at the size of a study of Pythia-160M."""
    yield from _lines(shape or CPU, torch.device("cpu"), _CPU_BARS, repeats, memory)
    if torch.cuda.is_available():
        yield from _lines(shape or CUDA, torch.device("cuda"), {"concatenated": 1 / 3}, repeats, False)


def _lines(
    shape: Shape, device: torch.device, bars: Mapping[str, float | None], repeats: int, memory: bool
) -> Iterator[Line]:
    batches = data(shape, device)
    for against, bar in bars.items():
        start = start_of(shape, batches[0], device, _gate(against))
        yield _line(shape, device, batches, start, against, bar, repeats, memory)


def _line(
    shape: Shape,
    device: torch.device,
    batches: list[Tensor],
    start: TrainerState,
    against: str,
    bar: float | None,
    repeats: int,
    memory: bool,
) -> Line:
    sides = {"ours": Ours(shape, start, device), "against": _SIDES[against](shape, start, device)}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}

    def stepper(name: str) -> Callable[[], None]:
        def call() -> None:
            before = time.process_time()
            losses[name].append(sides[name].step(batches[len(losses[name]) % len(batches)]))
            cpu[name].append(time.process_time() - before)

        return call

    times = alternate({name: stepper(name) for name in sides}, repeats)
    seconds = {name: Seconds.of(each) for name, each in times.items()}
    processor = {name: Seconds.of(each[1:]).median for name, each in cpu.items()}
    ratio = seconds["ours"].median / seconds["against"].median
    work = flops(shape)
    least = work["ours"] / work["against"]
    pairs = zip(losses["ours"], losses["against"], strict=True)
    notes: dict[str, Any] = {
        "times_faster": 1 / ratio,
        "tokens_per_second": {name: shape.batch / each.median for name, each in seconds.items()},
        "cpu_ratio": processor["ours"] / processor["against"],
        "losses": losses,
        "largest_relative_difference_of_loss": max(abs(a - b) / b for a, b in pairs),
    }
    if memory:
        notes["peak_mb_above_weights"] = _peaks(shape)
    if device.type == "cuda":
        notes["share_of_matrix_peak"] = (
            work["ours"] * shape.batch / seconds["ours"].median / _matrix_peak(device)
        )
    layout = "[m, S d] in one product" if against == "concatenated" else "[S, d, m] by einsum"
    adam = "default" if against in ("einsum", "einsum_gated") else "fused"
    return Line(
        name=f"crosscoder.{against}" + (".cuda" if device.type == "cuda" else ""),
        ratio=ratio,
        against=f"all latents, weights {layout}, a mask, autograd; {adam} Adam, same batches",
        bar=bar,
        limit={
            "kind": "FLOP",
            "ours_per_token": work["ours"],
            "against_per_token": work["against"],
            "ratio": least,
            "share_reached": least / ratio,
        },
        seconds=seconds,
        repeats=repeats,
        shapes=asdict(shape),
        machine=machine(device),
        date=now(),
        notes=notes,
    )


def _matrix_peak(device: torch.device) -> float:
    """FLOP per second of a large bfloat16 product, the fastest of several."""
    left = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    times = alternate({"product": lambda: left @ left}, 10)["product"]
    return 2 * 8192**3 / min(times)


def print_peak(side: str, **shape: Any) -> None:
    """Print by how many bytes the steps of a side raise the peak of this process, once its weights are there.

    Gradients and Adam's means are above the weights; they are equal for all sides.
    """
    measured, device = Shape(**shape), torch.device("cpu")
    # A short batch first: what is loaded and compiled once is not counted.
    few = data(replace(measured, batch=max(1, measured.batch // 16)), device)
    one = _SIDES[side](measured, start_of(measured, few[0], device, _gate(side)), device)
    one.step(few[0])
    batches = data(measured, device)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    for rows in batches[:2]:
        one.step(rows)
    print(peak() - before)


@cache
def _peaks(shape: Shape) -> dict[str, float]:
    """Megabytes of every side above its weights."""
    return peaks(__name__, _SIDES, shape)
