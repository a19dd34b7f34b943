"""How well a crosscoder reconstructs a pool of activations, and how its latents are used: one pass.

The cross-entropy of spliced reconstructions needs the models and is not here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from analyzers.crosscoder.active import Reader
from analyzers.crosscoder.scaling import LatentScaling, ScalingSums, blocks, residuals
from analyzers.crosscoder.weights import Crosscoder


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a pool says of a crosscoder. Activations are scaled ones throughout.

    Attributes:
        tokens: tokens of the pool.
        error: ``sum over tokens of ||a^s - ahat^s||^2``.
        variance: ``sum over tokens of ||a^s - mean a^s||^2``, the mean being that of the pool.
        active: tokens at which the latent is active at some snapshot.
        active_each: tokens at which it is active at each snapshot; all alike behind a shared gate.
        scaling: latent scaling of every feature.
    """

    tokens: int
    error: Float64[np.ndarray, "snapshots"]
    variance: Float64[np.ndarray, "snapshots"]
    active: Int64[np.ndarray, "latents"]
    active_each: Int64[np.ndarray, "latents snapshots"]
    scaling: LatentScaling

    @property
    def explained_variance(self) -> Float64[np.ndarray, "snapshots"]:
        """``1 - error / variance`` per snapshot; NaN where the activations do not vary.

        1 is perfect, 0 is as good as the mean, and below 0 is worse than it.
        """
        return 1 - self.error / np.where(self.variance > 0, self.variance, np.nan)

    @property
    def l0(self) -> float:
        """Mean number of latents per token that are active at some snapshot."""
        return float(self.active.sum() / self.tokens)

    @property
    def l0_each(self) -> Float64[np.ndarray, "snapshots"]:
        """Mean number of latents per token that are active at each snapshot."""
        return np.asarray(self.active_each.sum(axis=0) / self.tokens)

    @property
    def density(self) -> Float64[np.ndarray, "latents"]:
        """Share of tokens at which a latent is active at some snapshot."""
        return np.asarray(self.active / self.tokens)

    @property
    def dead(self) -> Bool[np.ndarray, "latents"]:
        """Latents that are active at no token of the pool. A larger pool may wake some."""
        return np.asarray(self.active == 0)


class _Spread:
    """Sum of squared distances from the mean, in one pass: parts are centred, then joined (Chan et al.)."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.n = 0
        self.mean = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)

    def update(self, rows: Float[Tensor, "batch inputs"]) -> None:
        near, n = rows.mean(dim=0), len(rows)
        centred = rows - near  # small numbers: float32 keeps their squares to 1e-7
        rest = centred.sum(dim=0, dtype=torch.float64) / n
        squares = centred.square().sum(dim=0, dtype=torch.float64) - n * rest.square()
        apart = near.double() + rest - self.mean
        self.squares += squares + apart.square() * (self.n * n / (self.n + n))
        self.n += n
        self.mean += apart * (n / self.n)


@torch.no_grad()
def evaluate(crosscoder: Crosscoder, batches: Iterable[Float[Tensor, "_ inputs"]]) -> Evaluation:
    """One pass over a pool of scaled activations, in any split.

    Cost per token beside the encoder's product: about ``6 S d`` FLOP for each active latent.

    Raises:
        ValueError: the pool is empty, of another width, or not finite.
    """
    reader = Reader(crosscoder)
    scaling = ScalingSums(reader)
    snapshots, device = crosscoder.snapshots, crosscoder.decoder.device
    inputs = snapshots * crosscoder.width
    spread = _Spread(inputs, device)
    error = torch.zeros(snapshots, dtype=torch.float64, device=device)
    active = torch.zeros(crosscoder.latents, dtype=torch.int64, device=device)
    each = torch.zeros(crosscoder.latents, snapshots, dtype=torch.int64, device=device)
    for batch in batches:
        if batch.ndim != 2 or batch.shape[1] != inputs:
            raise ValueError(f"activations of shape {tuple(batch.shape)}, not of {inputs} channels")
        for rows in blocks(crosscoder, batch):
            if not len(rows):
                continue
            pairs = reader.read(rows)
            left = residuals(crosscoder, pairs, rows)
            scaling.update(pairs, rows, left)
            spread.update(rows)
            error += left.square().sum(dim=(0, 2), dtype=torch.float64)
            active += pairs.counts()
            if pairs.open is not None:
                each.index_add_(0, pairs.feature, pairs.open.long())
    if not spread.n:
        raise ValueError("the pool holds no tokens")
    variance = spread.squares.view(snapshots, -1).sum(dim=1)
    if not bool((variance.isfinite() & error.isfinite()).all()):
        raise ValueError("activations or their reconstructions are not finite")
    if crosscoder.gate == "shared":
        each += active[:, None]
    return Evaluation(
        spread.n,
        error.cpu().numpy(),
        variance.cpu().numpy(),
        active.cpu().numpy(),
        each.cpu().numpy(),
        scaling.finish(),
    )
