"""What a reconstruction is worth to the model: the loss when it stands in for the activations at a site."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from analyzers.adapters import Model

Change = Callable[[Float[Tensor, "batch time width"]], Float[Tensor, "batch time width"]]


@contextmanager
def replaced(module: nn.Module, change: Change) -> Iterator[None]:
    """While it is open, the module's output (the first of a tuple) is what ``change`` makes of it."""

    def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def placed(
    values: Float[Tensor, "n width"], rows: Int64[Tensor, "batch time"], activations: Tensor
) -> Float[Tensor, "batch time width"]:
    """``values[rows]`` in the dtype and on the device of the activations; 0 where ``rows`` is below 0."""
    there = (rows >= 0).to(activations.device)
    found = values[rows.clamp(min=0).to(values.device)].to(activations.device, activations.dtype)
    return torch.where(there[..., None], found, 0)


def row_of(places: Int64[Tensor, "n 2"], shape: tuple[int, int]) -> Int64[Tensor, "sequences time"]:
    """Which row of ``places`` stands at each place of the tokens; -1 where none does.

    Raises:
        ValueError: a place lies outside the tokens, is position 0, or repeats.
    """
    places = places.cpu()
    limits = torch.tensor(shape)
    if bool(((places < 0) | (places >= limits)).any()):
        raise ValueError(f"a place lies outside the tokens, {shape[0]} sequences of {shape[1]}")
    if bool((places[:, 1] == 0).any()):
        raise ValueError("a place is position 0, which pools leave out and a splice leaves as it is")
    rows = torch.full(shape, -1)
    rows[places[:, 0], places[:, 1]] = torch.arange(len(places))
    if int((rows >= 0).sum()) < len(places):
        raise ValueError("places repeat: every token must be given once")
    return rows


@torch.no_grad()
def activations_at(
    model: Model, site: str, layer: int | None, tokens: Int64[Tensor, "sequences time"], batch: int = 8
) -> Float[Tensor, "sequences time width"]:
    """Activations of whole sequences at a site, in the model's units and dtype; for a few sequences.

    Raises:
        KeyError: the model has no such site.
    """
    found: list[Tensor] = []

    def watch(activations: Tensor) -> Tensor:
        found.append(activations)
        return activations

    with replaced(model.module(site, layer), watch):
        for start in range(0, tokens.shape[0], batch):
            model.run(tokens[start : start + batch], logits=False)
    return torch.cat(found)


@dataclass(frozen=True)
class SpliceLosses:
    """Mean cross-entropy of the next token, in nats, over the predictions made at position 1 and later.

    Attributes:
        clean: of the model as it is.
        spliced: with the reconstruction at the site.
        mean_ablated: with the mean activation of the spliced tokens at each of them.
        zero_ablated: with 0 at each of them.
        predictions: number of predictions.
        share: of the positions from 1 on that were spliced; below 1 the increase is too small.
        explained: ``1 - sum ||a - ahat||^2 / sum ||a - mean a||^2`` over the spliced tokens, with the
            activations that this model has: far below 0 if the rows are of another checkpoint or scale. None
            where the activations do not vary.
    """

    clean: float
    spliced: float
    mean_ablated: float
    zero_ablated: float
    predictions: int
    share: float
    explained: float | None

    @property
    def increase(self) -> float:
        """``spliced - clean``, in nats per token."""
        return self.spliced - self.clean

    def recovered(self, least: float = 0.01) -> float | None:
        """Fraction of the loss recovered, ``(mean_ablated - spliced) / (mean_ablated - clean)``.

        None where mean ablation costs less than ``least`` nats: an untrained model does not need the site,
        and the ratio says nothing.
        """
        cost = self.mean_ablated - self.clean
        return None if not cost >= least else (self.mean_ablated - self.spliced) / cost


class _Moments:
    """Of the clean activations at the spliced places, in float64."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.square = 0.0
        self.error = 0.0

    def add(self, activations: Float[Tensor, "n width"], given: Float[Tensor, "n width"]) -> None:
        wide = activations.double().cpu()
        self.n += len(wide)
        self.total += wide.sum(dim=0)
        self.square += float(wide.square().sum())
        self.error += float((wide - given.double().cpu()).square().sum())

    @property
    def mean(self) -> Float[Tensor, "width"]:
        return self.total / self.n

    def explained(self) -> float | None:
        spread = self.square - float(self.total.square().sum()) / self.n
        return None if not spread > 1e-12 * self.square else 1 - self.error / spread


@torch.no_grad()
def splice_losses(
    model: Model,
    site: str,
    layer: int | None,
    tokens: Int64[Tensor, "sequences time"],
    places: Int64[Tensor, "n 2"],
    reconstruction: Float[Tensor, "n width"],
    batch: int = 8,
) -> SpliceLosses:
    """Loss of one checkpoint on whole sequences: as it is, spliced, and ablated. Four forward passes.

    Args:
        model: the checkpoint of the snapshot that was decoded.
        site: where the rows were harvested.
        layer: block of the site.
        tokens: whole sequences.
        places: (row of ``tokens``, position) of every row of the reconstruction, position 1 or later. Places
            that are not named keep the model's own activations.
        reconstruction: in the model's units, from :func:`analyzers.crosscoder.active.reconstructed`. Rows
            of a baseline serve as well.
        batch: sequences at a time.

    Raises:
        ValueError: places and reconstruction do not fit each other or the tokens; there are none; sequences
            are shorter than three tokens, so that no prediction could change.
        KeyError: the model has no such site.
    """
    if len(places) != len(reconstruction) or not len(places):
        raise ValueError(f"{len(places)} places for {len(reconstruction)} rows of a reconstruction")
    if tokens.shape[1] < 3:
        raise ValueError(f"sequences have {tokens.shape[1]} tokens, at least 3 are needed")
    rows = row_of(places, (tokens.shape[0], tokens.shape[1]))
    moments = _Moments(reconstruction.shape[1])

    def watch(at: Tensor, activations: Tensor) -> Tensor:
        there = at >= 0
        given = reconstruction[at[there].to(reconstruction.device)]
        moments.add(activations[there.to(activations.device)], given)
        return activations

    def put(values: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def change(at: Tensor, activations: Tensor) -> Tensor:
            there = (at >= 0).to(activations.device)[..., None]
            return torch.where(there, placed(values, at, activations), activations)

        return change

    def loss(change: Callable[[Tensor, Tensor], Tensor]) -> float:
        total = 0.0
        for start in range(0, tokens.shape[0], batch):
            part = slice(start, start + batch)
            total += _summed_loss(model, model.module(site, layer), tokens[part], partial(change, rows[part]))
        return total / predictions

    predictions = tokens.shape[0] * (tokens.shape[1] - 2)
    clean = loss(watch)
    return SpliceLosses(
        clean,
        loss(put(reconstruction)),
        loss(put(moments.mean.expand(len(places), -1))),
        loss(put(torch.zeros_like(reconstruction))),
        predictions,
        len(places) / (tokens.shape[0] * (tokens.shape[1] - 1)),
        moments.explained(),
    )


def _summed_loss(
    model: Model, module: nn.Module, tokens: Int64[Tensor, "batch time"], change: Change
) -> float:
    """Sum of the losses of the predictions made at positions 1, 2, .."""
    found: list[Tensor] = []

    def take(_module: nn.Module, _inputs: object, output: Any) -> None:
        logits = (output[0] if isinstance(output, tuple) else output)[:, 1:-1]
        target = tokens[:, 2:].to(logits.device)
        found.append(cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum"))

    handle = model.module("logits").register_forward_hook(take)
    try:
        with replaced(module, change):
            model.run(tokens.to(next(model.model.parameters()).device), logits=True)
    finally:
        handle.remove()
    return float(found[0].double())
