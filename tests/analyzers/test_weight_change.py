"""Distance of weights from those of another checkpoint."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from analyzers.weight_change import WeightChangeAnalyzer, matched


class Weights:
    """Matrices in memory that count how many of them were read."""

    def __init__(self, *matrices: tuple[str, int, Tensor]) -> None:
        self._matrices = matrices
        self.read = 0

    def matrices(self) -> Iterator[tuple[str, int, Tensor]]:
        for each in self._matrices:
            self.read += 1
            yield each

    def heads(self) -> dict[str, int]:
        return {}

    def biases(self) -> Iterator[Tensor]:
        return iter(())


def values(one: Weights, other: Weights) -> dict[tuple[str, str | None, int | None], float | None]:
    rows = WeightChangeAnalyzer().compare_weights(one, {"first": other}).rows
    return {(row.metric, row.site, row.layer): row.value for row in rows}


def test_known_distances_and_all_matrices_as_one_vector() -> None:
    here = Weights(("mlp.up", 0, torch.tensor([[3.0, 0.0]])), ("mlp.down", 1, torch.tensor([[0.0], [4.0]])))
    there = Weights(("mlp.up", 0, torch.tensor([[0.0, 4.0]])), ("mlp.down", 1, torch.tensor([[0.0], [2.0]])))
    found = values(here, there)
    assert found["weight_distance_first", "mlp.up", 0] == 5
    assert found["weight_relative_distance_first", "mlp.up", 0] == 5 / 4
    assert found["weight_cosine_first", "mlp.up", 0] == 0
    assert found["weight_cosine_first", "mlp.down", 1] == 1
    assert found["weight_distance_first", None, None] == pytest.approx(math.sqrt(25 + 4))
    assert found["weight_relative_distance_first", None, None] == pytest.approx(math.sqrt(29 / 20))
    assert found["weight_cosine_first", None, None] == pytest.approx(8 / math.sqrt(25 * 20))


def test_a_checkpoint_is_at_no_distance_from_itself() -> None:
    weights = Weights(("mlp.up", 0, torch.randn(5, 7)))
    found = values(weights, weights)
    assert found["weight_distance_first", "mlp.up", 0] == 0
    assert found["weight_cosine_first", "mlp.up", 0] == pytest.approx(1, abs=1e-15)


def test_a_ratio_without_denominator_is_no_number() -> None:
    found = values(Weights(("mlp.up", 0, torch.ones(2, 2))), Weights(("mlp.up", 0, torch.zeros(2, 2))))
    assert found["weight_distance_first", "mlp.up", 0] == 2
    ratio = found["weight_relative_distance_first", "mlp.up", 0]
    assert ratio is not None  # stored as absent, with the note "value is nan"
    assert math.isnan(ratio)


def test_files_of_another_order_are_matched_by_place() -> None:
    places = [("mlp.up", layer, torch.full((2, 2), float(layer))) for layer in range(4)]
    found = list(matched(Weights(*places), {"first": Weights(*reversed(places))}))
    assert [place for place, _, _ in found] == [("mlp.up", layer) for layer in range(4)]
    others = [other["first"] for *_, other in found]
    assert all(
        other is not None and torch.equal(mine, other)
        for (_, mine, _), other in zip(found, others, strict=True)
    )


def test_both_are_read_side_by_side() -> None:
    one = Weights(*[("mlp.up", layer, torch.ones(2, 2)) for layer in range(9)])
    other = Weights(*[("mlp.up", layer, torch.ones(2, 2)) for layer in range(9)])
    for _ in matched(one, {"first": other}):
        assert abs(one.read - other.read) <= 1


def test_several_references_read_every_file_once() -> None:
    places = [("mlp.up", layer, torch.ones(2, 2)) for layer in range(3)]
    one, first, previous = (Weights(*places) for _ in range(3))
    rows = WeightChangeAnalyzer().compare_weights(one, {"first": first, "previous": previous}).rows
    assert (one.read, first.read, previous.read) == (3, 3, 3)
    assert [row.metric.rpartition("_")[2] for row in rows] == ["first"] * 12 + ["previous"] * 12


def test_a_matrix_without_partner_is_an_error() -> None:
    here = Weights(("mlp.up", 0, torch.ones(2, 2)), ("mlp.up", 1, torch.ones(2, 2)))
    with pytest.raises(ValueError, match=r"no matrix like mlp\.up of block 1 \(1 such\)"):
        values(here, Weights(("mlp.up", 0, torch.ones(2, 2))))
    with pytest.raises(ValueError, match=r"no matrix like mlp\.up of block 0"):
        values(here, Weights(("mlp.up", 0, torch.ones(2, 3)), ("mlp.up", 1, torch.ones(2, 2))))
