"""What a crosscoder learns, its start, and the optimiser: fp32 tensors, one latent per row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from analyzers.crosscoder.kernels import Descent, Kernels, Learned, Pairs, Share
from analyzers.crosscoder.settings import TrainSettings
from analyzers.crosscoder.shards import Shards


@dataclass
class Parameters:
    """This process's latents, and the decoder's bias, which all processes hold.

    ``log_threshold`` learns with jumprelu only.
    """

    encoder: Float[Tensor, "latents inputs"]
    encoder_bias: Float[Tensor, "latents"]
    decoder: Float[Tensor, "latents inputs"]
    decoder_bias: Float[Tensor, "inputs"]
    log_threshold: Float[Tensor, "latents"]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors."""
        for each in fields(self):
            yield each.name, getattr(self, each.name)

    @classmethod
    def like(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "Parameters":
        """Copies of named tensors on a device."""
        return cls(
            **{each.name: tensors[each.name].to(device, torch.float32, copy=True) for each in fields(cls)}
        )

    @classmethod
    def random(
        cls, settings: TrainSettings, snapshots: int, width: int, device: torch.device, shards: Shards
    ) -> "Parameters":
        """One random unit direction per latent, the same at every snapshot, in decoder and encoder; biases 0.

        The directions depend on the seed alone, not on device or processes. Their length is chosen on the
        first batch (``training.Trainer``).
        """
        generator = torch.Generator().manual_seed(settings.seed)
        directions = torch.randn(settings.latents, width, generator=generator)
        directions = torch.nn.functional.normalize(directions)[shards.part(settings.latents)].to(device)
        latents = directions.shape[0]
        return cls(
            directions.repeat(1, snapshots),
            torch.zeros(latents, device=device),
            directions.repeat(1, snapshots),
            torch.zeros(snapshots * width, device=device),
            torch.full((latents,), settings.threshold * settings.unit(snapshots, width), device=device).log(),
        )


class Optimiser:
    """Adam (0.9, 0.999) with the schedule of the settings; gradients come in shares, of one step at a time.

    Shares of a matrix but the last are summed up. The last is formed row by row where the row is updated:
    most steps have no other, and then a gradient as large as the weights is neither written nor read.
    """

    def __init__(self, parameters: Parameters, settings: TrainSettings, kernels: Kernels) -> None:
        self.settings, self.kernels = settings, kernels
        self.learned = {
            name: tensor
            for name, tensor in parameters.named()
            if name != "log_threshold" or settings.activation == "jumprelu"
        }
        self.steps = 0
        self._moments = {
            name: torch.zeros(2, *each.shape, device=each.device) for name, each in self.learned.items()
        }
        self._sums: dict[str, Tensor] = {}  # kept from step to step; new memory is slow
        self._begun: set[str] = set()
        self._last: dict[str, Share] = {}

    def begin(self) -> None:
        """Forget the gradients of a step."""
        self._begun.clear()
        self._last.clear()

    def take(
        self,
        name: str,
        pairs: Pairs,
        values: Float[Tensor, "pairs groups"],
        rows: Float[Tensor, "batch inputs"],
    ) -> None:
        """A share of the gradient of ``decoder`` or ``encoder``: ``sum_b v_bi rows_b``."""
        before = self._last.get(name)
        if before is not None:
            into, add = self._sum(name), name in self._begun
            self.kernels.weight_gradient(before.pairs, before.values, before.rows, into, add=add)
            self._begun.add(name)
        self._last[name] = Share(pairs, values, rows)

    def onto(self, name: str) -> Tensor:
        """Where to add a share that is dense."""
        into = self._sum(name)
        if name not in self._begun:
            into.zero_()
            self._begun.add(name)
        return into

    def _sum(self, name: str) -> Tensor:
        if name not in self._sums:
            self._sums[name] = torch.empty_like(self.learned[name])
        return self._sums[name]

    def step(self, step: int) -> None:
        """Apply the gradients as step number ``step``, the first of which is 0."""
        self.steps += 1
        rate = self.settings.learning_rate * self.settings.rate(step)
        for name, weights in self.learned.items():
            share = self.settings.threshold_rate if name == "log_threshold" else 1.0
            descent = Descent(rate * share, self.steps)
            learned = Learned(weights, *self._moments[name])
            last, sums = self._last.get(name), self._sums[name] if name in self._begun else None
            if last is not None:
                self.kernels.descend(last, sums, learned, descent)
            elif sums is not None:
                descent.apply(learned, sums)
        self.begin()

    def moments(self) -> dict[str, Tensor]:
        """Adam's running means as tensors, empty before the first step."""
        if not self.steps:
            return {}
        found: dict[str, Tensor] = {}
        for name, (mean, square) in self._moments.items():
            found |= {f"adam.{name}.exp_avg": mean, f"adam.{name}.exp_avg_sq": square}
            found[f"adam.{name}.step"] = torch.tensor(float(self.steps))
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`moments` gave."""
        for name, (mean, square) in self._moments.items():
            if f"adam.{name}.step" in tensors:
                self.steps = int(tensors[f"adam.{name}.step"])
                mean.copy_(tensors[f"adam.{name}.exp_avg"])
                square.copy_(tensors[f"adam.{name}.exp_avg_sq"])
