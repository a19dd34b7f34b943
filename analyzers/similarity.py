"""How far representations are from those of another checkpoint: linear CKA and the rotation of their top."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from jaxtyping import Float, Float64
from pydantic import Field
from scipy.linalg import eigh, subspace_angles
from torch import Tensor

from analyzers.base import (
    REFERENCES,
    ActivationComparison,
    ComparisonParameters,
    Metric,
    ModelShape,
    Reference,
    Result,
    Row,
    attempted,
)
from analyzers.reductions import Spec, State
from analyzers.registry import register
from analyzers.sample import SampleSpec, SampleState


def _cross(x: Float[Tensor, "n dx"], y: Float[Tensor, "n dy"]) -> float:
    """``||X^T Y||_F^2 = tr(X X^T Y Y^T)``, by the smaller of the two products."""
    if x.shape[0] < min(x.shape[1], y.shape[1]):
        return float(((x @ x.T) * (y @ y.T)).sum())
    return float((x.T @ y).square().sum())


@dataclass(frozen=True)
class Representation:
    """Rows of one checkpoint, and what every comparison with another reads of them, each computed once.

    Raises:
        ValueError: from what is read, the rows do not vary.
    """

    rows: Float[Tensor, "n width"]

    @cached_property
    def centred(self) -> Float64[Tensor, "n width"]:
        """The rows without their mean."""
        x = self.rows.double()
        size = x.abs().max()
        x = x - x.mean(0)
        # Equal rows leave no more than the rounding of their mean.
        if bool(x.abs().max() <= 16 * torch.finfo(torch.float64).eps * size):
            raise ValueError("all rows are equal")
        return x

    @cached_property
    def self_cross(self) -> float:
        """``||X^T X||_F^2``."""
        return _cross(self.centred, self.centred)

    @cached_property
    def self_unbiased(self) -> float:
        """HSIC_1 with itself, up to the factor of :func:`_unbiased`."""
        return _unbiased(self, self)

    def top(self, count: int) -> Float64[Tensor, "width count"]:
        """The first ``count`` principal directions, orthonormal."""
        if count not in self._top:
            self._top[count] = _top_directions(self.centred, count)
        return self._top[count]

    @cached_property
    def _top(self) -> dict[int, Tensor]:
        return {}


def linear_cka(x: Float[Tensor, "n dx"], y: Float[Tensor, "n dy"]) -> float:
    """Linear centred kernel alignment of two representations of the same ``n`` tokens.

    ``||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` with centred columns (Kornblith et al. 2019,
    arXiv 1905.00414, eq. 3 with linear kernels). Dimensionless, 0 to 1; biased upwards, the more the closer
    ``n`` is to the widths.

    Raises:
        ValueError: a representation does not vary.
    """
    return _linear_cka(Representation(x), Representation(y))


def _linear_cka(x: Representation, y: Representation) -> float:
    return _cross(x.centred, y.centred) / math.sqrt(x.self_cross * y.self_cross)


def debiased_cka(x: Float[Tensor, "n dx"], y: Float[Tensor, "n dy"]) -> float:
    """Linear CKA with the unbiased HSIC (Song et al. 2012; Nguyen et al. 2021, arXiv 2010.15327).

    ``HSIC_1(K, L) = [tr(KL) + 1K1 1L1 / ((n-1)(n-2)) - 2/(n-2) 1KL1] / (n (n-3))`` for Gram matrices with
    empty diagonals, here by products of width d instead of n. Dimensionless, at most 1, around 0 for
    independent representations.

    Raises:
        ValueError: a representation does not vary, or there are fewer than 4 tokens.
    """
    return _debiased_cka(Representation(x), Representation(y))


def _debiased_cka(x: Representation, y: Representation) -> float:
    if x.rows.shape[0] < 4:
        raise ValueError(f"{x.rows.shape[0]} tokens, the unbiased estimate needs 4")
    own = x.self_unbiased * y.self_unbiased
    if own <= 0:
        raise ValueError("too few tokens: the unbiased estimate of a variance is not positive")
    return _unbiased(x, y) / math.sqrt(own)


def _unbiased(one: Representation, other: Representation) -> float:
    """HSIC_1 of centred rows, up to the factor ``1 / (n (n - 3))``."""
    x, y = one.centred, other.centred
    n = x.shape[0]
    a, b = (x * x).sum(1), (y * y).sum(1)
    # Row sums of the Gram matrices without their diagonals.
    rows_x, rows_y = x @ x.sum(0) - a, y @ y.sum(0) - b
    # Of one with itself the product is there already.
    cross = one.self_cross if other is one else _cross(x, y)
    trace = cross - float(a @ b)
    sums = float(rows_x.sum() * rows_y.sum()) / ((n - 1) * (n - 2))
    return trace + sums - 2 * float(rows_x @ rows_y) / (n - 2)


def top_directions(x: Float[Tensor, "n width"], top: int) -> Float[Tensor, "width top"]:
    """The ``top`` principal directions of the rows, orthonormal; float64.

    Raises:
        ValueError: the centred rows span fewer directions.
    """
    return Representation(x).top(top)


def _top_directions(x: Tensor, top: int) -> Tensor:
    small = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    width = small.shape[0]
    if top > width:
        raise ValueError(f"{tuple(x.shape)} rows and columns span fewer than {top} directions")
    values, vectors = eigh(small.numpy(), subset_by_index=(width - top, width - 1))
    if values[0] <= width * torch.finfo(torch.float64).eps * values[-1]:
        raise ValueError(f"the rows span fewer than {top} directions")
    found = torch.from_numpy(vectors)
    # The left singular vectors of X^T, from the right ones.
    return found if x.shape[1] <= x.shape[0] else (x.T @ found) / torch.from_numpy(values).sqrt()


def rotation(one: Float[Tensor, "width top"], other: Float[Tensor, "width top"]) -> float:
    """Mean principal angle between two subspaces with orthonormal bases, in radians: 0 to pi/2.

    Computed from sines where angles are small (Knyazev and Argentati 2002), as scipy does.
    """
    return float(subspace_angles(one.numpy(), other.numpy()).mean())


class SimilarityParameters(ComparisonParameters):
    """Protocol of the comparison."""

    count: Annotated[int, Field(description="tokens compared, a fixed sample of the probe's", ge=4)] = 2048
    seed: Annotated[int, Field(description="seed of that sample", ge=0)] = 0
    top: Annotated[int, Field(description="principal directions whose rotation is measured", ge=1)] = 8


def _metrics() -> tuple[Metric, ...]:
    found = []
    for name, says in REFERENCES.items():
        found += [
            Metric(
                f"cka_{name}",
                f"||X'Y||_F^2 / (||X'X||_F ||Y'Y||_F), X, Y: centred activations, here and at {says}",
                "1",
                "0 to 1",
                "Kornblith et al. 2019, arXiv 1905.00414",
            ),
            Metric(
                f"cka_debiased_{name}",
                f"the same with unbiased HSIC, against {says}",
                "1",
                "at most 1; 0 for independent ones",
                "Song et al. 2012; Nguyen et al. 2021, arXiv 2010.15327",
            ),
            Metric(
                f"rotation_{name}",
                f"mean principal angle between the spans of the top principal directions, to {says}",
                "radian",
                "0 to pi/2",
                "Knyazev and Argentati 2002",
            ),
        ]
    return tuple(found)


@register
class SimilarityAnalyzer(ActivationComparison):
    """CKA and rotation at the embedding, after every block and after the final norm."""

    name = "similarity"
    version = 1
    summary = (
        "similarity to the first, previous or last checkpoint: linear CKA, rotation of the top directions"
    )
    parameters_type = SimilarityParameters
    metrics = _metrics()
    parameters: SimilarityParameters

    def needs(self, shape: ModelShape) -> list[Spec]:
        """One sample of tokens per place, the same tokens at all of them."""
        return list(self._specs(shape))

    def _specs(self, shape: ModelShape) -> list[SampleSpec]:
        places: list[tuple[str, int | None]] = [("embedding", None)]
        places += [("resid_post", layer) for layer in range(shape.layers)]
        places.append(("final_norm", None))
        return [
            SampleSpec(site, layer, self.parameters.count, self.parameters.seed) for site, layer in places
        ]

    def compare(
        self,
        states: Mapping[Spec, State],
        others: Mapping[Reference, Mapping[Spec, State]],
        shape: ModelShape,
    ) -> Result:
        """Rows of every place and reference."""
        result = Result()
        for spec in self._specs(shape):
            x = Representation(_values(states[spec]))
            for name, found in others.items():
                self._compare_place(spec, name, x, Representation(_values(found[spec])), result)
        return result

    def _compare_place(
        self, spec: SampleSpec, name: Reference, x: Representation, y: Representation, result: Result
    ) -> None:
        top = self.parameters.top
        measures: dict[str, Callable[[], float]] = {
            f"cka_{name}": lambda: _linear_cka(x, y),
            f"cka_debiased_{name}": lambda: _debiased_cka(x, y),
            f"rotation_{name}": lambda: rotation(x.top(top), y.top(top)),
        }
        n, finite = x.rows.shape[0], bool(torch.isfinite(x.rows).all() and torch.isfinite(y.rows).all())
        for metric, compute in measures.items():
            if finite:
                result.rows.append(attempted(metric, compute, n, spec.site, spec.layer))
            else:
                note = "activations are not finite"
                result.rows.append(Row(metric, None, n, spec.site, spec.layer, note=note))


def _values(state: State) -> Tensor:
    assert isinstance(state, SampleState)
    return state.finish()[0]
