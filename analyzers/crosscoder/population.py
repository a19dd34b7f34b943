"""The population of features at every snapshot, as metrics that stand beside those of the analyzers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from analyzers.base import Metric, Row
from analyzers.crosscoder.directions import (
    Turning,
    consecutive_cosines,
    decoder_by_snapshot,
    dimensionalities,
    final_cosines,
    turning_points,
)
from analyzers.crosscoder.evaluation import Evaluation
from analyzers.crosscoder.lifecycle import Lifecycles, LifecycleSettings, lifecycles
from analyzers.crosscoder.weights import Crosscoder

_METHOD = "crosscoders over snapshots: arXiv 2509.17196"
_OURS = "ours (docs/crosscoder_evolution.md)"
_COUNTED = "over features that are active at some token of the pool"

METRICS: tuple[Metric, ...] = (
    Metric(
        "crosscoder_explained_variance",
        "1 - sum ||a - ahat||^2 / sum ||a - mean a||^2 over the tokens of the pool, scaled activations",
        "1",
        "<= 1; 0: as the mean",
        "definition",
    ),
    Metric(
        "crosscoder_l0",
        "mean number of latents active at a token, at this snapshot",
        "latents",
        ">= 0",
        "definition",
    ),
    Metric(
        "feature_strength",
        f"mean of ||d_i^s|| / max_s ||d_i^s|| {_COUNTED}",
        "1",
        "0 to 1",
        _METHOD,
    ),
    Metric(
        "feature_scaling",
        f"mean of beta_i^s {_COUNTED}; target: the residual with the feature's own part put back",
        "1",
        "real; 1: as at the feature's strongest snapshot",
        "latent scaling: arXiv 2504.02922",
    ),
    Metric("feature_alive_share", f"share alive (strength >= `alive`) {_COUNTED}", "1", "0 to 1", _OURS),
    Metric(
        "feature_births",
        f"number whose first snapshot alive is this one, {_COUNTED}",
        "features",
        ">= 0",
        _OURS,
    ),
    Metric(
        "feature_births_per_step",
        "feature_births / steps since the snapshot before",
        "features per step",
        ">= 0",
        _OURS,
    ),
    Metric(
        "feature_deaths",
        f"number whose last snapshot alive is the one before, {_COUNTED}",
        "features",
        ">= 0",
        _OURS,
    ),
    Metric(
        "feature_turns",
        "number whose turning point lies between the snapshot before and this one, with a cosine below "
        "`turned`; a gap counts at its end",
        "features",
        ">= 0",
        _OURS,
    ),
    Metric(
        "feature_previous_cosine",
        "mean cosine of d_i^s with the snapshot before, over features alive at both",
        "1",
        "-1 to 1",
        _METHOD,
    ),
    Metric(
        "feature_final_cosine",
        "mean cosine of d_i^s with the last snapshot, over features alive at both",
        "1",
        "-1 to 1",
        _METHOD,
    ),
    Metric(
        "feature_dimensionality",
        f"1/d sum_i ||W_i||^2 / sum_j (What_i . W_j)^2, W: decoder rows at this snapshot, {_COUNTED}",
        "1",
        "0 to 1",
        "Elhage et al. 2022, arXiv 2209.10652",
    ),
)


@dataclass(frozen=True)
class Evolution:
    """What became of every feature of a crosscoder.

    Attributes:
        steps: of the snapshots.
        counted: features active at some token of the pool; the population is theirs.
        lives: by the norm of the decoder.
        lives_by_scaling: by beta; a dead feature has none.
        turning: turning points, over the snapshots alive by the norm.
        previous_cosine: of the direction with the snapshot before; column 0 is between snapshots 0 and 1.
        final_cosine: of the direction with the last snapshot.
        dimensionality: of each counted feature at each snapshot; NaN for the others and where it is zero.
    """

    steps: Int64[np.ndarray, "snapshots"]
    counted: Bool[np.ndarray, "latents"]
    lives: Lifecycles
    lives_by_scaling: Lifecycles
    turning: Turning
    previous_cosine: Float64[np.ndarray, "latents pairs"]
    final_cosine: Float64[np.ndarray, "latents snapshots"]
    dimensionality: Float64[np.ndarray, "latents snapshots"]


def evolve(
    crosscoder: Crosscoder,
    steps: Sequence[int],
    evaluation: Evaluation,
    settings: LifecycleSettings | None = None,
) -> Evolution:
    """The lives, turns and dimensions of all features.

    Raises:
        ValueError: steps do not ascend, or are not as many as snapshots.
    """
    at = np.asarray(steps, dtype=np.int64)
    counted = ~evaluation.dead
    lives = lifecycles(crosscoder.strengths().double().cpu().numpy(), at, settings)
    decoder = decoder_by_snapshot(crosscoder)
    return Evolution(
        at,
        counted,
        lives,
        lifecycles(evaluation.scaling.beta, at, settings),
        turning_points(decoder, lives.alive),
        consecutive_cosines(decoder),
        final_cosines(decoder),
        np.stack([dimensionalities(decoder[:, s], counted) for s in range(len(at))], axis=1),
    )


def population(
    evolution: Evolution,
    evaluation: Evaluation,
    width: int,
    settings: LifecycleSettings | None = None,
    site: str | None = None,
    layer: int | None = None,
) -> list[list[Row]]:
    """Rows of :data:`METRICS`, one list for each snapshot; ``n`` is tokens or features.

    ``settings`` are those of :func:`evolve`, ``width`` the channels of one snapshot.
    """
    settings = settings or LifecycleSettings()
    counted, lives, steps = evolution.counted, evolution.lives, evolution.steps
    n = int(counted.sum())
    alive = lives.alive & counted[:, None]
    turned = counted & (evolution.turning.cosine < settings.turned)
    none = "no feature is active at any token"
    first = "there is no snapshot before"

    def row(metric: str, value: float | None, count: int, note: str) -> Row:
        absent = value is None or not np.isfinite(value)
        return Row(metric, None if absent else value, count, site, layer, note=note if absent else None)

    def mean(metric: str, values: np.ndarray, chosen: np.ndarray, note: str) -> Row:
        chosen = chosen & np.isfinite(values)
        return row(metric, float(values[chosen].mean()) if chosen.any() else None, int(chosen.sum()), note)

    found = []
    for s in range(len(steps)):
        births = float((lives.birth == s)[counted].sum())
        gap = steps[s] - steps[s - 1] if s else None
        rows = [
            row(
                "crosscoder_explained_variance",
                float(evaluation.explained_variance[s]),
                evaluation.tokens,
                "the activations do not vary",
            ),
            row("crosscoder_l0", float(evaluation.l0_each[s]), evaluation.tokens, ""),
            mean("feature_strength", lives.strength[:, s], counted, none),
            mean("feature_scaling", evaluation.scaling.beta[:, s], counted, none),
            row("feature_alive_share", float(alive[:, s].sum() / n) if n else None, n, none),
            row("feature_births", births if n else None, n, none),
            row(
                "feature_births_per_step",
                births / float(gap) if n and gap else None,
                n,
                none if s else first,
            ),
        ]
        if s:
            deaths = float((lives.death == s - 1)[counted].sum())
            turns = float((evolution.turning.after == s)[turned].sum())
            both = alive[:, s] & alive[:, s - 1]
            rows += [
                row("feature_deaths", deaths if n else None, n, none),
                row("feature_turns", turns if n else None, n, none),
                mean(
                    "feature_previous_cosine",
                    evolution.previous_cosine[:, s - 1],
                    both,
                    "no feature is alive at both snapshots",
                ),
            ]
        else:
            rows += [
                row(metric, None, n, first)
                for metric in ("feature_deaths", "feature_turns", "feature_previous_cosine")
            ]
        dimensions = evolution.dimensionality[:, s]
        rows += [
            mean(
                "feature_final_cosine",
                evolution.final_cosine[:, s],
                alive[:, s] & alive[:, -1],
                "no feature is alive here and at the last snapshot",
            ),
            row(
                "feature_dimensionality",
                float(np.nansum(dimensions)) / width if np.isfinite(dimensions).any() else None,
                n,
                "no feature has a direction",
            ),
        ]
        found.append(rows)
    return found
