"""How far the weights are from those of another checkpoint, tensor by tensor."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from analyzers.base import (
    REFERENCES,
    ComparisonParameters,
    Metric,
    Reference,
    Result,
    Row,
    WeightComparison,
    WeightMatrices,
)
from analyzers.registry import register

_Place = tuple[str, int]


def squares(
    matrix: Float[Tensor, "rows columns"], other: Float[Tensor, "rows columns"]
) -> Float[Tensor, "4"]:
    """``|W - V|^2, |W|^2, |V|^2, <W, V>`` (Frobenius), in float64; sums over matrices add up."""
    w, v = matrix.double(), other.double()
    return torch.stack([((w - v) ** 2).sum(), (w * w).sum(), (v * v).sum(), (w * v).sum()])


def changes(sums: Float[Tensor, "4"]) -> dict[str, float]:
    """``weight_distance`` |W - V|, that over |V|, and ``weight_cosine`` <W, V> / (|W| |V|).

    ``sums`` as of :func:`squares`, of one matrix or summed over several. A ratio whose denominator is 0 is
    NaN.
    """
    difference, own, others, product = sums.tolist()
    nan = float("nan")
    return {
        "weight_distance": difference**0.5,
        "weight_relative_distance": (difference / others) ** 0.5 if others else nan,
        "weight_cosine": product / (own * others) ** 0.5 if own and others else nan,
    }


def matched(
    weights: WeightMatrices, others: Mapping[Reference, WeightMatrices]
) -> Iterator[tuple[_Place, Tensor, dict[Reference, Tensor | None]]]:
    """(place, matrix, by name the others' matrices or None) of every matrix of ``weights``.

    All are read side by side, each once, so that one tensor of each is in memory where the files have the
    same order, and only those that wait for their partner where they do not.
    """
    finders = {name: _Finder(other) for name, other in others.items()}
    for site, layer, matrix in weights.matrices():
        place = (site, layer)
        yield place, matrix, {name: finder.find(place) for name, finder in finders.items()}


class _Finder:
    """Reads on until a place has come; what came before it waits."""

    def __init__(self, weights: WeightMatrices) -> None:
        self._coming = weights.matrices()
        self._waiting: dict[_Place, Tensor] = {}

    def find(self, place: _Place) -> Tensor | None:
        while place not in self._waiting:
            found = next(self._coming, None)
            if found is None:
                break
            self._waiting[found[0], found[1]] = found[2]
        return self._waiting.pop(place, None)


class _Change:
    """The rows about one reference, gathered matrix by matrix."""

    def __init__(self, name: Reference) -> None:
        self._name = name
        self._rows: list[Row] = []
        self._total, self._entries = torch.zeros(4, dtype=torch.float64), 0
        self._unmatched: list[str] = []

    def add(self, place: _Place, matrix: Tensor, partner: Tensor | None) -> None:
        if partner is None or partner.shape != matrix.shape:
            self._unmatched.append("{} of block {}".format(*place))
            return
        sums = squares(matrix, partner)
        self._total += sums
        self._entries += matrix.numel()
        self._put(sums, matrix.numel(), place)

    def _put(self, sums: Tensor, n: int, place: _Place | tuple[None, None]) -> None:
        self._rows += [
            Row(f"{metric}_{self._name}", value, n, *place) for metric, value in changes(sums).items()
        ]

    def finish(self) -> list[Row]:
        if self._unmatched:
            raise ValueError(
                f"the {self._name} checkpoint has no matrix like {self._unmatched[0]} "
                f"({len(self._unmatched)} such)"
            )
        if not self._entries:
            raise ValueError("the weights hold no matrix that the model's family names")
        self._put(self._total, self._entries, (None, None))
        return self._rows


def _metrics() -> tuple[Metric, ...]:
    found = []
    for name in REFERENCES:
        found += [
            Metric(
                f"weight_distance_{name}",
                f"|W - V|_F, V: the same matrix at the {name} checkpoint; without a place: all matrices",
                "weight",
                ">= 0",
                "Frobenius distance",
            ),
            Metric(
                f"weight_relative_distance_{name}", "|W - V|_F / |V|_F", "1", ">= 0", "Frobenius distance"
            ),
            Metric(f"weight_cosine_{name}", "<W, V> / (|W|_F |V|_F)", "1", "-1 to 1", "cosine similarity"),
        ]
    return tuple(found)


@register
class WeightChangeAnalyzer(WeightComparison):
    """Distance, relative distance and cosine, per matrix and over all of them as one vector."""

    name = "weight_change"
    version = 1
    summary = "distance of the weights from the first, previous or last checkpoint; no forward pass"
    parameters_type = ComparisonParameters
    metrics = _metrics()

    def compare_weights(self, weights: WeightMatrices, others: Mapping[Reference, WeightMatrices]) -> Result:
        """Rows per matrix and reference, and of all matrices together."""
        if not others:
            return Result()
        found = {name: _Change(name) for name in others}
        for place, matrix, partners in matched(weights, others):
            for name, partner in partners.items():
                found[name].add(place, matrix, partner)
        return Result([row for change in found.values() for row in change.finish()])
