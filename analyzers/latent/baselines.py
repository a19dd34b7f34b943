"""Simpler ways to cut runs into pieces, to hold beside the states: k-means, change points, published phases.

All work on the frames with a value of one run or of all, in order of time, and give one label per frame.
docs/training_map.md says how to read their agreement with the path of the HMM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from ruptures import KernelCPD
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

Frames = Float[np.ndarray, "_frames metrics"]
Labels = Int[np.ndarray, "_frames"]

KMEANS, CHANGE_POINTS = "k-means", "change points"
# Starts of k-means, and rounds after which its filled values count as settled.
STARTS, ROUNDS = 10, 100


@dataclass(frozen=True)
class Pieces:
    """A run cut into pieces: ``boundaries`` are the first steps of all pieces but the first."""

    boundaries: tuple[int, ...]
    labels: tuple[int, ...]


def pieces(steps: Int[np.ndarray, "frames"], labels: Int[np.ndarray, "frames"]) -> Pieces:
    """Consecutive frames of one label as pieces.

    >>> pieces(np.array([0, 1, 2, 4]), np.array([0, 0, 3, 0]))
    Pieces(boundaries=(2, 4), labels=(0, 3, 0))
    """
    first = np.flatnonzero(np.diff(labels, prepend=labels[0] - 1))
    return Pieces(tuple(steps[first[1:]].tolist()), tuple(labels[first].tolist()))


def agreement(one: Sequence[Labels], other: Sequence[Labels]) -> float:
    """Adjusted Rand index of two labellings of the same frames (Hubert and Arabie 1985), in [-0.5, 1].

    1: the same groups; 0: what labels drawn at random give on average. Runs are put together, so a label must
    mean the same in all of them.
    """
    return float(adjusted_rand_score(np.concatenate(one), np.concatenate(other)))


def kmeans(runs: Mapping[str, Frames], train: Sequence[str], k: int, seed: int) -> dict[str, Labels]:
    """Labels of every frame by k-means with ``k`` centres, fitted to the training runs.

    k-means knows no order of time and no missing value. Gaps by k-POD (Chi, Chi and Baraniuk 2016): a missing
    value is first the mean of its metric, then that of the centre its frame belongs to, until no frame
    changes its centre (100 rounds at most). Then every frame, of held-out runs too, gets the centre that is
    nearest in the metrics it has. With fewer distinct frames than ``k`` there are as many centres as those.
    """
    frames = np.concatenate([runs[name] for name in sorted(train)])
    gaps = np.isnan(frames)
    filled = np.where(gaps, np.nanmean(frames, axis=0), frames)
    k = min(k, len(np.unique(filled, axis=0)))
    with threadpool_limits(1):
        found = KMeans(k, n_init=STARTS, random_state=seed).fit(filled)
        for _ in range(ROUNDS if gaps.any() else 0):
            before = found.labels_
            filled = np.where(gaps, found.cluster_centers_[before], frames)
            found = KMeans(k, init=found.cluster_centers_, n_init=1).fit(filled)
            if (found.labels_ == before).all():
                break
    return {name: _nearest(run, found.cluster_centers_) for name, run in runs.items()}


def _nearest(run: Frames, centers: Float[np.ndarray, "k metrics"]) -> Labels:
    return np.asarray(np.nansum((run[:, None] - centers) ** 2, axis=2).argmin(axis=1))


def matched(labels: Mapping[str, Labels], states: Mapping[str, Labels]) -> dict[str, Labels]:
    """The labels renumbered so that as many frames as possible have the number of their state (Hungarian)."""
    mine, theirs = (np.concatenate([each[name] for name in labels]) for each in (labels, states))
    size = 1 + max(int(mine.max()), int(theirs.max()))
    together = np.zeros((size, size), dtype=np.int64)
    np.add.at(together, (mine, theirs), 1)
    number = linear_sum_assignment(-together)[1]
    return {name: np.asarray(number[each]) for name, each in labels.items()}


def change_points(run: Frames, changes: int) -> Labels:
    """Number of the segment of every frame, with ``changes`` change points of the mean.

    ruptures' KernelCPD with the linear kernel: of all ways to cut the run that often, the one with least sum
    of squares around the means of the segments (Arlot, Celisse and Harchaoui 2019; Truong, Oudre and Vayatis
    2020). A missing value is interpolated between the frames around it, by their number, and at the ends it
    is that of the nearest; a metric without any value in the run is left out.
    """
    if not changes:
        return np.zeros(len(run), dtype=np.int64)
    place = np.arange(len(run))
    columns = [
        np.interp(place, place[seen], column[seen])
        for column, seen in zip(run.T, ~np.isnan(run).T, strict=True)
        if seen.any()
    ]
    detector = KernelCPD(kernel="linear", min_size=1).fit(np.column_stack(columns))
    return np.searchsorted(np.array(detector.predict(n_bkps=changes)), place, side="right")


def phase_labels(
    steps: Int[np.ndarray, "frames"], collapse_end: float | None, expansion_end: float | None
) -> Labels | None:
    """Geometric phase of every frame: 0 collapse, 1 expansion, 2 what follows; None without any end.

    A phase holds its last checkpoint. Without the end of a phase, its frames are those of the next one.
    """
    if collapse_end is None and expansion_end is None:
        return None
    before = np.zeros(len(steps), dtype=bool) if collapse_end is None else steps <= collapse_end
    after = np.zeros(len(steps), dtype=bool) if expansion_end is None else steps > expansion_end
    return np.where(before, 0, np.where(after, 2, 1))


def peak_labels(steps: Int[np.ndarray, "frames"], peak: int | None) -> Labels | None:
    """0 up to the peak of a growth curve, 1 after it; None without a peak."""
    return None if peak is None else np.asarray((steps > peak).astype(np.int64))
