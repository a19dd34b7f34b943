"""Turning points and dimensionality of planted directions, and the metrics of the population."""

import math

import numpy as np
import pytest
import torch
from evaluation_support import generator, orthonormal_crosscoder, random_crosscoder, sparse_features

from analyzers.base import Row
from analyzers.crosscoder import directions
from analyzers.crosscoder.directions import (
    consecutive_cosines,
    decoder_by_snapshot,
    dimensionalities,
    final_cosines,
    turning_points,
)
from analyzers.crosscoder.evaluation import evaluate
from analyzers.crosscoder.lifecycle import LifecycleSettings
from analyzers.crosscoder.population import METRICS, evolve, population
from analyzers.crosscoder.weights import Crosscoder

STEPS = [0, 10, 30, 130]


def along(*angles: float) -> list[list[float]]:
    """Directions in a plane, at these degrees; a length of its own each."""
    radians = [math.radians(angle) for angle in angles]
    return [
        [(1 + i) * math.cos(angle), (1 + i) * math.sin(angle)] if not math.isnan(angle) else [0.0, 0.0]
        for i, angle in enumerate(radians)
    ]


def test_cosines_of_known_angles() -> None:
    decoder = torch.tensor([along(0, 60, 90, 90), along(10, math.nan, 10, 190)], dtype=torch.float64)
    np.testing.assert_allclose(
        consecutive_cosines(decoder), [[0.5, math.sqrt(0.75), 1], [np.nan, np.nan, -1]], atol=1e-12
    )
    np.testing.assert_allclose(
        final_cosines(decoder), [[0, math.sqrt(0.75), 1, 1], [-1, np.nan, -1, 1]], atol=1e-12
    )


def test_the_turning_point_is_where_the_direction_turned() -> None:
    decoder = torch.tensor(
        [
            along(0, 0, 90, 90),
            along(0, 80, 90, 100),  # turns most after the first
            along(5, -5, 5, 120),
            along(30, 30, 30, 30),
            along(0, 0, 90, 90),
            along(0, 90, 90, 90),
            along(0, math.nan, math.nan, 45),
            along(0, 180, 0, 180),
        ],
        dtype=torch.float64,
    )
    alive = np.ones((8, 4), dtype=bool)
    alive[4, 2] = False  # the first snapshot after the turn does not count
    alive[5, 1:] = False  # alive once: nothing to compare
    found = turning_points(decoder, alive)
    assert found.before.tolist() == [1, 0, 2, 0, 1, -1, 0, 0]
    assert found.after.tolist() == [2, 1, 3, 1, 3, -1, 3, 1]
    middle = (1 + math.cos(math.radians(10)) * 2) / 3  # length of the mean of 80, 90, 100 degrees
    assert 0 < middle < 1
    expected = [0, 0, math.cos(math.radians(120 - 5 / 3)), 1, 0, np.nan, math.sqrt(0.5)]
    np.testing.assert_allclose(
        found.cosine[[0, 1, 3, 4, 5, 6]], np.array(expected)[[0, 1, 3, 4, 5, 6]], atol=1e-9
    )
    mean = torch.tensor(along(5, -5, 5), dtype=torch.float64)
    mean = (mean / mean.norm(dim=1, keepdim=True)).sum(0)
    last = torch.tensor(along(120)[0], dtype=torch.float64)
    assert found.cosine[2] == pytest.approx(float(mean @ last / mean.norm() / last.norm()))


def test_a_split_found_by_brute_force() -> None:
    decoder = torch.randn(40, 6, 5, generator=generator(0), dtype=torch.float64)
    alive = torch.rand(40, 6, generator=generator(1)).numpy() < 0.7
    found = turning_points(decoder, alive)
    for i in range(40):
        places = np.flatnonzero(alive[i])
        if len(places) < 2:
            assert found.before[i] == -1
            continue
        units = (decoder[i] / decoder[i].norm(dim=1, keepdim=True)).numpy()[places]

        def left(split: int, units: np.ndarray = units) -> float:
            parts = units[:split], units[split:]
            return float(sum(np.square(part - part.mean(axis=0)).sum() for part in parts))

        best = min(range(1, len(places)), key=left)
        assert (found.before[i], found.after[i]) == (places[best - 1], places[best])


def test_blocks_of_latents_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = torch.randn(30, 4, 6, generator=generator(2))
    alive = np.ones((30, 4), dtype=bool)
    whole = turning_points(decoder, alive), consecutive_cosines(decoder), dimensionalities(decoder[:, 0])
    monkeypatch.setattr(directions, "_ELEMENTS", 50)
    parts = turning_points(decoder, alive), consecutive_cosines(decoder), dimensionalities(decoder[:, 0])
    np.testing.assert_array_equal(parts[0].before, whole[0].before)
    np.testing.assert_allclose(parts[1], whole[1])
    np.testing.assert_allclose(parts[2], whole[2])


def test_dimensionality_of_known_arrangements() -> None:
    orthonormal = torch.linalg.qr(torch.randn(6, 6, generator=generator(3)))[0]
    sizes = torch.tensor([1.0, 2, 0.1, 5, 1, 1])[:, None]
    np.testing.assert_allclose(dimensionalities(orthonormal * sizes), 1, rtol=1e-5)
    pair = torch.tensor([[1.0, 1, 0], [-1, -1, 0], [0, 0, 3]])
    np.testing.assert_allclose(dimensionalities(pair), [0.5, 0.5, 1], rtol=1e-12)
    angles = torch.arange(5) * 2 * math.pi / 5
    pentagon = torch.stack([angles.cos(), angles.sin()], dim=1)
    np.testing.assert_allclose(dimensionalities(pentagon), 2 / 5, rtol=1e-5)  # Elhage et al.
    zero = torch.cat([pair, torch.zeros(1, 3)])
    np.testing.assert_allclose(dimensionalities(zero), [0.5, 0.5, 1, np.nan])
    np.testing.assert_allclose(
        dimensionalities(pair, np.array([True, False, True])), [1, np.nan, 1], rtol=1e-12
    )


def test_dimensionality_against_its_formula_and_its_bound() -> None:
    w = torch.randn(50, 7, generator=generator(4), dtype=torch.float64)
    unit = w / w.norm(dim=1, keepdim=True)
    expected = w.square().sum(1) / (unit @ w.T).square().sum(1)
    found = dimensionalities(w)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found.sum() <= 7


def test_the_population_of_a_planted_dictionary() -> None:
    strengths = torch.tensor(
        [
            [1.0, 1.0, 1.0, 1.0],  # persistent
            [2.0, 0.2, 0.2, 0.2],  # of the initialisation
            [0.0, 3.0, 3.0, 3.0],  # born at snapshot 1
            [0.0, 1.0, 4.0, 4.0],  # born at snapshot 2, at 1 not yet half
            [0.0, 1.0, 1.0, 0.0],  # born at 1, dies after 2
            [0.0, 0.0, 0.0, 1.0],  # never active: does not count
        ]
    )
    crosscoder = orthonormal_crosscoder(strengths, width=10)
    features = sparse_features(300, 6, seed=5)
    features[:, 5] = 0
    rows = features @ crosscoder.decoder
    turned = decoder_by_snapshot(crosscoder)
    turned[2, 3, 2], turned[2, 3, 8] = 0, 3.0  # feature 2 turns between snapshots 2 and 3
    rows = features @ crosscoder.decoder
    evaluation = evaluate(crosscoder, rows.split(64))
    evolution = evolve(crosscoder, STEPS, evaluation)
    assert evolution.counted.tolist() == [True] * 5 + [False]
    assert evolution.lives.classes[:5] == (
        "persistent",
        "initialisation",
        "emergent",
        "emergent",
        "transient",
    )
    # A direction that turns away is not scaled any more, at its norm or not; a dead feature has no scaling.
    assert evolution.lives_by_scaling.classes[2:] == ("transient", "emergent", "transient", None)
    assert evolution.turning.before[2] == 2
    assert evolution.turning.cosine[2] == pytest.approx(0)
    rows_by_snapshot = population(evolution, evaluation, 10, site="resid_post", layer=3)
    found: list[dict[str, Row]] = [{row.metric: row for row in rows} for rows in rows_by_snapshot]
    assert all(list(each) == [m.name for m in METRICS] for each in found)

    def series(metric: str) -> list[float | None]:
        return [each[metric].value for each in found]

    np.testing.assert_allclose(np.array(series("crosscoder_explained_variance"), float), 1, atol=1e-9)
    assert series("crosscoder_l0") == [pytest.approx(float((features > 0).sum() / 300))] * 4
    assert series("feature_alive_share") == [2 / 5, 3 / 5, 4 / 5, 3 / 5]
    assert series("feature_births") == [2, 2, 1, 0]
    assert series("feature_births_per_step") == [None, 2 / 10, 1 / 20, 0]
    assert series("feature_deaths") == [None, 1, 0, 1]
    assert series("feature_turns") == [None, 0, 0, 1]
    assert series("feature_strength") == [
        pytest.approx(each) for each in (2 / 5, (1 + 0.1 + 1 + 0.25 + 1) / 5, 4.1 / 5, 3.1 / 5)
    ]
    assert series("feature_scaling")[0] == pytest.approx(2 / 5, abs=1e-6)
    assert series("feature_scaling")[3] == pytest.approx(2.1 / 5, abs=1e-6)
    assert series("feature_previous_cosine") == [
        None,
        pytest.approx(1),
        pytest.approx(1),
        pytest.approx(2 / 3),
    ]
    assert series("feature_final_cosine")[2] == pytest.approx(2 / 3)
    # Orthogonal features: as many dimensions as have a direction, of 10.
    assert series("feature_dimensionality") == [pytest.approx(each) for each in (0.2, 0.5, 0.5, 0.4)]
    assert found[0]["feature_births_per_step"].note == "there is no snapshot before"
    assert {(row.site, row.layer) for each in found for row in each.values()} == {("resid_post", 3)}
    assert found[1]["feature_strength"].n == 5
    assert found[1]["crosscoder_l0"].n == 300
    strict = population(evolution, evaluation, 10, LifecycleSettings(turned=-0.5))
    assert [row.value for row in strict[3] if row.metric == "feature_turns"] == [0]


def test_a_population_of_dead_features_is_absent() -> None:
    crosscoder = random_crosscoder(snapshots=2, width=3)
    dead = Crosscoder(
        crosscoder.encoder,
        torch.full((24,), -1e9),
        crosscoder.decoder,
        crosscoder.decoder_bias,
        crosscoder.threshold,
        crosscoder.scale,
    )
    evaluation = evaluate(dead, [torch.randn(20, 6, generator=generator(6))])
    rows = population(evolve(dead, [0, 5], evaluation), evaluation, 3)
    for row in (row for each in rows for row in each):
        if row.metric.startswith("feature_"):
            assert (row.value, row.n) == (None, 0)
            assert row.note
        else:
            assert row.value is not None


def test_metrics_are_documented_once() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(metric.formula and metric.unit and metric.range and metric.reference for metric in METRICS)
