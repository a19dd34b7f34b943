"""Stability of features across seeds: which latents of one crosscoder another seed finds again.

Only 30 to 42 % of the latents of sparse autoencoders are shared across seeds (arXiv 2501.16615), so a feature
of one training alone is not yet a fact about the model. Latents are matched one to one by Hungarian
assignment of the cosines of their decoder rows, all snapshots of a row side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from analyzers.crosscoder.weights import Crosscoder


@dataclass(frozen=True)
class Matching:
    """Latents of one crosscoder and their partners in another.

    Attributes:
        partner: latent of the other; -1: none (no direction, left out, or too few there).
        cosine: of the two decoder rows; NaN without a partner.
        cosine_each: of their parts at every snapshot; NaN where a part is zero.
    """

    partner: Int64[np.ndarray, "latents"]
    cosine: Float64[np.ndarray, "latents"]
    cosine_each: Float64[np.ndarray, "latents snapshots"]


@dataclass(frozen=True)
class Stability:
    """How far other seeds find the latents of one crosscoder again.

    Attributes:
        matchings: one for each other seed.
        stability: mean over the other seeds of the cosine to the partner; NaN if a seed has none for it.
        stability_each: the same at every snapshot, between the same partners.
        threshold: cosine from which a latent counts as shared.
        shared_by_seed: share of the latents with a direction whose cosine in that seed reaches the threshold.
        shared: share of them whose stability reaches it. A latent without a partner is not shared. NaN if no
            latent has a direction.
    """

    matchings: tuple[Matching, ...]
    stability: Float64[np.ndarray, "latents"]
    stability_each: Float64[np.ndarray, "latents snapshots"]
    threshold: float
    shared_by_seed: Float64[np.ndarray, "seeds"]
    shared: float


def match(
    one: Crosscoder,
    other: Crosscoder,
    kept: Bool[np.ndarray, "latents"] | None = None,
    other_kept: Bool[np.ndarray, "others"] | None = None,
) -> Matching:
    """The one-to-one matching of latents with the greatest sum of cosines.

    Latents whose decoder is zero take no part, nor those that are not ``kept`` (dead ones: their rows are
    what training left of the start). The cosine has a sign, as features are not negative. Time grows with
    the cube of the number of latents at worst, memory as 12 bytes for each pair.

    Raises:
        ValueError: the crosscoders are not over as many snapshots of one width.
    """
    if (one.snapshots, one.width) != (other.snapshots, other.width):
        raise ValueError(
            f"{one.snapshots} snapshots of width {one.width} and {other.snapshots} of {other.width} "
            "cannot be matched"
        )
    mine, theirs = _candidates(one, kept), _candidates(other, other_kept)
    cosines = _unit(one.decoder[mine]).float() @ _unit(other.decoder[theirs]).float().T
    rows, columns = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    left, right = mine[rows], theirs[columns]
    partner = np.full(one.latents, -1, dtype=np.int64)
    partner[left] = right
    cosine = np.full(one.latents, np.nan)
    each = np.full((one.latents, one.snapshots), np.nan)
    a, b = one.decoder[left].double(), other.decoder[right].double()
    cosine[left] = _cosine(a, b)
    shape = (len(left), one.snapshots, one.width)
    each[left] = _cosine(a.view(shape), b.view(shape))
    return Matching(partner, cosine, each)


def stability(
    crosscoder: Crosscoder,
    others: Sequence[Crosscoder],
    *,
    threshold: float = 0.7,
    kept: Bool[np.ndarray, "latents"] | None = None,
    others_kept: Sequence[Bool[np.ndarray, "others"]] | None = None,
) -> Stability:
    """Stability of every latent over the other seeds of the same training; more than one is better.

    Raises:
        ValueError: there is no other seed, or they do not fit.
    """
    if not others:
        raise ValueError("stability needs another seed, there is none")
    masks = [None] * len(others) if others_kept is None else list(others_kept)
    matchings = tuple(match(crosscoder, each, kept, mask) for each, mask in zip(others, masks, strict=True))
    mean = np.mean([each.cosine for each in matchings], axis=0)
    counted = len(_candidates(crosscoder, kept))
    # A comparison with NaN is False: without a partner, a latent is not shared.
    reached = np.array([(each.cosine >= threshold).sum() for each in matchings], dtype=np.float64)
    return Stability(
        matchings,
        mean,
        np.mean([each.cosine_each for each in matchings], axis=0),
        threshold,
        reached / counted if counted else np.full(len(others), np.nan),
        float((mean >= threshold).sum() / counted) if counted else float("nan"),
    )


def _candidates(crosscoder: Crosscoder, kept: Bool[np.ndarray, "latents"] | None) -> Int64[np.ndarray, "n"]:
    there = (crosscoder.decoder != 0).any(dim=1).cpu().numpy()
    return np.flatnonzero(there if kept is None else there & kept)


def _unit(rows: Float[Tensor, "n inputs"]) -> Float[Tensor, "n inputs"]:
    unit: Tensor = torch.nn.functional.normalize(rows.double(), dim=1, eps=0.0)
    return unit


def _cosine(a: Float[Tensor, "*n width"], b: Float[Tensor, "*n width"]) -> Float64[np.ndarray, "*n"]:
    size = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    product = (a * b).sum(dim=-1)
    found: Float64[np.ndarray, "*n"] = torch.where(size > 0, product / size, torch.nan).cpu().numpy()
    return found
