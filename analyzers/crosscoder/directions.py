"""Directions of features over the snapshots: how they turn, and how many dimensions they share.

All work on the decoder, ``[latents, snapshots, width]``, in float64 and for some latents at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from analyzers.crosscoder.weights import Crosscoder

_ELEMENTS = 1 << 22


def decoder_by_snapshot(crosscoder: Crosscoder) -> Float[Tensor, "latents snapshots width"]:
    """The decoder with its snapshots apart; no copy."""
    return crosscoder.decoder.view(crosscoder.latents, crosscoder.snapshots, crosscoder.width)


def consecutive_cosines(
    decoder: Float[Tensor, "latents snapshots width"],
) -> Float64[np.ndarray, "latents pairs"]:
    """Cosine of each feature's direction at a snapshot with that at the next; NaN where one is zero."""
    return np.concatenate([_numpy((u[:, 1:] * u[:, :-1]).sum(dim=2)) for u in _units(decoder)])


def final_cosines(
    decoder: Float[Tensor, "latents snapshots width"],
) -> Float64[np.ndarray, "latents snapshots"]:
    """Cosine of each feature's direction at a snapshot with that at the last; NaN where one is zero."""
    return np.concatenate([_numpy((u * u[:, -1:]).sum(dim=2)) for u in _units(decoder)])


@dataclass(frozen=True)
class Turning:
    """Where each feature's direction turns most.

    Attributes:
        before: last snapshot alive before the turning point; -1: alive at fewer than two snapshots.
        after: first snapshot alive after it; -1 likewise.
        cosine: of the mean directions before and after: 1 no turn, 0 a right angle. NaN if there is no
            turning point, or a mean direction is zero.
    """

    before: Int64[np.ndarray, "latents"]
    after: Int64[np.ndarray, "latents"]
    cosine: Float64[np.ndarray, "latents"]


def turning_points(
    decoder: Float[Tensor, "latents snapshots width"], alive: Bool[np.ndarray, "latents snapshots"]
) -> Turning:
    """The split of the snapshots into an earlier and a later part that the directions fit best.

    Over the snapshots at which the feature is alive (elsewhere its decoder is what noise left), with unit
    directions ``u_s``: the split that maximises
    ``||sum_before u||^2 / n_before + ||sum_after u||^2 / n_after``, that is, leaves the least squared
    distance to the two means (the change point of a mean by least squares). The first of equals. A feature
    that does not turn has a split too, with a cosine near 1.
    """
    parts = []
    start = 0
    for units in _units(decoder):
        kept = torch.from_numpy(alive[start : start + len(units)]).to(units.device)
        kept = kept & units.isfinite().all(dim=2)
        start += len(units)
        parts.append(_turn(torch.where(kept[:, :, None], units, 0.0), kept))
    before, after, cosine = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Turning(before, after, cosine)


def _turn(
    units: Float64[Tensor, "n snapshots width"], kept: Bool[Tensor, "n snapshots"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    early, count = units.cumsum(dim=1), kept.cumsum(dim=1)
    late, rest = early[:, -1:] - early, count[:, -1:] - count
    possible = kept & (rest > 0)  # a split lies right after a snapshot that counts
    score = early.square().sum(dim=2) / count + late.square().sum(dim=2) / rest
    score = torch.where(possible, score, -torch.inf)
    # Equal scores differ by rounding; the first of them is meant.
    best = (score >= score.amax(dim=1, keepdim=True) - 1e-9).to(torch.int8).argmax(dim=1)
    there = possible.any(dim=1)
    places = torch.arange(len(units), device=units.device)
    a, b = early[places, best], late[places, best]
    size = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    cosine = torch.where(there & (size > 1e-9), (a * b).sum(dim=1) / size, torch.nan)
    following = kept & (torch.arange(kept.shape[1], device=units.device) > best[:, None])
    after = following.to(torch.int8).argmax(dim=1)
    none = torch.full_like(best, -1)
    return (
        _numpy(torch.where(there, best, none)),
        _numpy(torch.where(there, after, none)),
        _numpy(cosine),
    )


def dimensionalities(
    directions: Float[Tensor, "latents width"], kept: Bool[np.ndarray, "latents"] | None = None
) -> Float64[np.ndarray, "latents"]:
    """Dimensionality of each feature: ``||W_i||^2 / sum_j (What_i . W_j)^2``, between 0 and 1.

    1 for a feature orthogonal to all others, 1/2 for each of an antipodal pair. The sum over features is at
    most the rank of W, so divided by the width it is the share of the space that the features fill. The sum
    over j is ``What_i' (W' W) What_i``: no matrix of latents x latents arises. NaN for a zero row, and for
    those not ``kept``, which also do not count for others.

    Source: Elhage et al. 2022, Toy Models of Superposition, arXiv 2209.10652.

    >>> dimensionalities(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])).tolist()
    [1.0, 0.5, 0.5]
    """
    if kept is not None:
        mask = torch.from_numpy(kept).to(directions.device)
        directions = torch.where(mask[:, None], directions, 0.0)
    width = directions.shape[1]
    parts = torch.split(directions, max(1, _ELEMENTS // width))
    moment = torch.zeros(width, width, dtype=torch.float64, device=directions.device)
    for part in parts:
        wide = part.double()
        moment += wide.T @ wide
    found = []
    for part in parts:
        wide = part.double()
        squares = wide.square().sum(dim=1)
        shared = ((wide @ moment) * wide).sum(dim=1)
        found.append(_numpy(torch.where(squares > 0, squares.square() / shared, torch.nan)))
    return np.concatenate(found)


def _units(
    decoder: Float[Tensor, "latents snapshots width"],
) -> Iterator[Float64[Tensor, "n snapshots width"]]:
    """Unit directions of some latents at a time; NaN where the decoder is zero."""
    for part in torch.split(decoder, max(1, _ELEMENTS // (decoder.shape[1] * decoder.shape[2]))):
        wide = part.double()
        yield wide / torch.linalg.vector_norm(wide, dim=2, keepdim=True)


def _numpy(values: Tensor) -> np.ndarray:
    found: np.ndarray = values.cpu().numpy()
    return found
