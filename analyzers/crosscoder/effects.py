"""Indirect effects of features on a contrast task, and what their ablation does beside random features'.

Source: Marks et al. 2024 (arXiv 2403.19647) for indirect effects by integrated gradients; RelIE of arXiv
2509.05291. docs/crosscoder_meaning.md has the definitions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from analyzers.adapters import Model
from analyzers.crosscoder.active import Active, decoder_of, written
from analyzers.crosscoder.contrasts import ContrastTokens
from analyzers.crosscoder.controls import random_k_control
from analyzers.crosscoder.splice import placed, replaced, row_of
from analyzers.crosscoder.weights import Crosscoder


@dataclass(frozen=True)
class Effects:
    """Indirect effects of all features at one snapshot, in nats: means over the items.

    The metric is ``m = ln p(wrong) - ln p(right)`` at the last position: below 0 where the model is right. A
    feature that carries the task has a negative effect.

    Attributes:
        effects: IE of every feature; 0 for one that is never active on the items.
        full: mean metric of the model as it is.
        ablated: mean metric with all features at 0 and the error kept.
        correct: share of the items whose metric is below 0.
        items: number of items.
    """

    effects: Float64[np.ndarray, "latents"]
    full: float
    ablated: float
    correct: float
    items: int

    @property
    def gap(self) -> float:
        """``sum IE - (full - ablated)``: 0 but for the integration's error, which more steps make smaller."""
        return float(self.effects.sum()) - (self.full - self.ablated)


@dataclass(frozen=True)
class Site:
    """One checkpoint on a contrast task, with what its crosscoder says of the items' tokens.

    Args:
        model: the checkpoint of the snapshot. Low precision rounds gradients: load it in float32.
        site: where the rows were harvested.
        layer: block of the site.
        crosscoder: its weights.
        snapshot: number of the checkpoint in the crosscoder.
        contrasts: the items as tokens.
        active: features of the tokens at ``contrasts.places()``, in that order, from the rows of all
            snapshots.
        batch: items at a time.
    """

    model: Model
    site: str
    layer: int | None
    crosscoder: Crosscoder
    snapshot: int
    contrasts: ContrastTokens
    active: Active
    batch: int = 8

    def __post_init__(self) -> None:
        wanted = len(self.contrasts.places())
        if self.active.tokens != wanted:
            raise ValueError(f"features are of {self.active.tokens} tokens, the items have {wanted}")

    def metrics(self, removed: Float[Tensor, "n width"] | None = None) -> Float64[Tensor, "items"]:
        """``ln p(wrong) - ln p(right)`` of every item, with ``removed`` subtracted at the site."""
        found = []
        for part, rows in self._parts():
            with torch.no_grad():
                found.append(self._run(part, rows, removed, 1.0)[0].double().cpu())
        return torch.cat(found)

    def mean_gradients(self, removed: Float[Tensor, "n width"], steps: int) -> Float[Tensor, "n width"]:
        """d metric / d activation at every place: the mean at ``x - (1 - a) removed``, a = 1/2n, 3/2n, .."""
        total = torch.zeros_like(removed)
        for part, rows in self._parts():
            for step in range(steps):
                metric, point = self._run(part, rows, removed, 1 - (step + 0.5) / steps)
                (gradient,) = torch.autograd.grad(metric.sum(), point)
                there = rows >= 0
                taken = gradient[there.to(gradient.device)].to(total.device, total.dtype)
                total.index_add_(0, rows[there].to(total.device), taken)
        return total / steps

    def _parts(self) -> Iterator[tuple[slice, Int64[Tensor, "batch time"]]]:
        tokens = self.contrasts.tokens
        rows = row_of(self.contrasts.places(), (tokens.shape[0], tokens.shape[1]))
        for start in range(0, len(tokens), self.batch):
            part = slice(start, start + self.batch)
            yield part, rows[part]

    def _run(
        self,
        part: slice,
        rows: Int64[Tensor, "batch time"],
        removed: Float[Tensor, "n width"] | None,
        share: float,
    ) -> tuple[Tensor, Tensor]:
        """Metric of some items and the activations it came from, ``share`` of ``removed`` taken away."""
        points: list[Tensor] = []
        metrics: list[Tensor] = []

        def change(activations: Tensor) -> Tensor:
            less = activations
            if removed is not None:
                less = activations - share * placed(removed, rows, activations)
            # What lies below the site is not differentiated.
            points.append(less.detach().requires_grad_(torch.is_grad_enabled()))
            return points[0]

        def take(_module: nn.Module, _inputs: object, output: Any) -> None:
            logits = output[0] if isinstance(output, tuple) else output
            item = torch.arange(len(rows), device=logits.device)
            last, right, wrong = (
                each[part].to(logits.device)
                for each in (self.contrasts.last, self.contrasts.right, self.contrasts.wrong)
            )
            # ln p(wrong) - ln p(right): the normalisation is the same and drops out.
            at_last = logits[item, last].float()
            metrics.append(at_last[item, wrong] - at_last[item, right])

        device = next(self.model.model.parameters()).device
        handle = self.model.module("logits").register_forward_hook(take)
        try:
            with replaced(self.model.module(self.site, self.layer), change):
                self.model.run(self.contrasts.tokens[part].to(device), logits=True)
        finally:
            handle.remove()
        return metrics[0], points[0]


def indirect_effects(at: Site, steps: int = 10) -> Effects:
    """IE of every feature by integrated gradients from 0 to its activation, by the midpoint rule.

    ``IE_i = sum_t f_ti mean_a dm/df_ti (a f)``, the mean over the items. At a the site holds
    ``x - (1 - a) sum_i f_i d_i``, that is the reconstruction from ``a f`` with the error kept, and
    ``dm/df_ti = d_i . dm/dx_t``: gradients are taken by the activations and projected onto decoder rows.
    ``sum_i IE_i = m(f) - m(0)`` up to :attr:`Effects.gap`.

    Raises:
        ValueError: ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, at least 1 is needed")
    removed = written(at.active, at.crosscoder, at.snapshot)
    full, ablated = at.metrics(), at.metrics(removed)
    with torch.enable_grad():
        gradients = at.mean_gradients(removed, steps)
    seen = at.active.at(at.snapshot)
    decoder = decoder_of(at.crosscoder, at.snapshot)
    effects = torch.zeros(seen.latents, dtype=torch.float64)
    for start in range(0, len(seen.value), 1 << 16):
        pairs = slice(start, start + (1 << 16))
        token, feature = seen.token[pairs], seen.feature[pairs]
        slope = (gradients[token].double() * decoder[feature].double()).sum(dim=1)
        effects.index_add_(0, feature.cpu(), (seen.value[pairs].double() * slope).cpu())
    return Effects(
        (effects / len(full)).numpy(),
        float(full.mean()),
        float(ablated.mean()),
        float((full < 0).double().mean()),
        len(full),
    )


def relative_effects(
    effects: Float64[np.ndarray, "snapshots latents"],
) -> Float64[np.ndarray, "snapshots latents"]:
    """RelIE: ``|IE_s| / sum_s |IE_s|`` of every feature; NaN where it has no effect at any snapshot."""
    size = np.abs(effects)
    total = size.sum(axis=0)
    return np.where(total > 0, size / np.where(total > 0, total, 1), np.nan)


def strongest(effects: Float64[np.ndarray, "latents"], k: int) -> Int64[np.ndarray, "k"]:
    """The k features with the largest ``|IE|``, the largest first; of equal ones the lower number.

    Raises:
        ValueError: fewer than k features have an effect.
    """
    there = int((effects != 0).sum())
    if not 1 <= k <= there:
        raise ValueError(f"k is {k}, and {there} features have an effect")
    return np.argsort(-np.abs(effects), kind="stable")[:k].astype(np.int64)


@dataclass(frozen=True)
class Ablation:
    """What setting some features to 0 does to the mean metric, beside random features of like density.

    Attributes:
        features: the ablated features.
        change: mean metric with them at 0, minus that of the model as it is, in nats: positive where they
            carried the task.
        correct: share of items still right without them.
        random: the change for each draw of as many random features.
        p: share of draws whose change is at least as large in size: ``(1 + #) / (1 + draws)``.
    """

    features: tuple[int, ...]
    change: float
    correct: float
    random: Float64[np.ndarray, "draws"]
    p: float


def ablate(at: Site, features: Int64[np.ndarray, "k"], draws: int = 20, seed: int = 0) -> Ablation:
    """Set features to 0 on all tokens of the items, the error kept; then random ones, ``draws`` times.

    Densities are those on the items. One pass over the items for each draw.

    Raises:
        ValueError: a feature is not active on the items, or there are too few others for a control.
    """
    seen = at.active.at(at.snapshot)
    full = float(at.metrics().mean())

    def without(chosen: Int64[np.ndarray, "_k"]) -> Float64[np.ndarray, "2"]:
        mask = torch.isin(seen.feature, torch.from_numpy(chosen).to(seen.feature.device))
        metrics = at.metrics(written(seen.kept(mask), at.crosscoder, at.snapshot))
        return np.array([float(metrics.mean()) - full, float((metrics < 0).double().mean())])

    found = random_k_control(without, features, seen.counts().cpu().numpy(), seed=seed, draws=draws)
    change, correct = (float(each) for each in found.value)
    return Ablation(tuple(features.tolist()), change, correct, found.random[:, 0], float(found.beyond[0]))
