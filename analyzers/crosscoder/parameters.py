"""What a crosscoder learns, its start, and the optimiser: fp32 tensors, one latent per row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

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
    """Adam (0.9, 0.999) on the parameters, one fused pass over memory, with the schedule of the settings."""

    def __init__(self, parameters: Parameters, settings: TrainSettings) -> None:
        self.settings = settings
        self.learned = {
            name: tensor
            for name, tensor in parameters.named()
            if name != "log_threshold" or settings.activation == "jumprelu"
        }
        for tensor in self.learned.values():
            tensor.grad = torch.zeros_like(tensor)
        shares = {"log_threshold": settings.threshold_rate}
        groups = [
            {"params": [tensor], "share": shares.get(name, 1.0)} for name, tensor in self.learned.items()
        ]
        self.adam = torch.optim.Adam(groups, lr=settings.learning_rate, betas=(0.9, 0.999), fused=True)

    def step(self, step: int) -> None:
        """Apply the gradients as step number ``step``, the first of which is 0."""
        rate = self.settings.learning_rate * self.settings.rate(step)
        for group in self.adam.param_groups:
            group["lr"] = rate * group["share"]
        self.adam.step()

    def moments(self) -> dict[str, Tensor]:
        """Adam's running means as tensors, empty before the first step."""
        return {
            f"adam.{name}.{kind}": self.adam.state[tensor][kind]
            for name, tensor in self.learned.items()
            for kind in ("step", "exp_avg", "exp_avg_sq")
            if tensor in self.adam.state
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`moments` gave."""
        for name, tensor in self.learned.items():
            if f"adam.{name}.step" in tensors:
                self.adam.state[tensor] = {
                    kind: tensors[f"adam.{name}.{kind}"].to(tensor.device, torch.float32, copy=True)
                    for kind in ("step", "exp_avg", "exp_avg_sq")
                }
