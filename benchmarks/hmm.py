"""What EM and the choice of K cost: restarts in one batch against hmmlearn's log implementation."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hmmlearn.hmm import GaussianHMM
from threadpoolctl import threadpool_limits

from analyzers.latent import (
    Covariance,
    Outcome,
    Parameters,
    Prior,
    StateSettings,
    Trajectories,
    baum_welch,
    draw_start,
    fit_restarts,
    fit_states,
)
from analyzers.latent.bootstrap import prior_of
from benchmarks.timing import Line, Seconds, alternate, machine, now

# Neither side has a prior or a floor: both compute the same likelihoods.
PLAIN = Prior(floor=0.0, probability_floor=0.0)


@dataclass(frozen=True)
class Shape:
    """Size of the data, planted with ``states`` states and noise that lets them overlap."""

    runs: int = 40
    frames: int = 100
    metrics: int = 14
    states: int = 6
    restarts: int = 32
    iterations: int = 10


def data(shape: Shape) -> list[np.ndarray]:
    """Runs that pass through the states in order, with cuts of their own."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(shape.states, shape.metrics))
    runs = []
    for _ in range(shape.runs):
        cuts = np.sort(rng.integers(1, shape.frames, shape.states - 1))
        path = np.searchsorted(cuts, np.arange(shape.frames), side="right")
        runs.append(centers[path] + 0.8 * rng.normal(size=(shape.frames, shape.metrics)))
    return runs


def flops(shape: Shape, k: int, covariance: Covariance) -> float:
    """FLOPs of one iteration of one restart: two per product and sum.

    Densities and statistics: 2 n k f each with f features (2 d + 1, or d (d + 3) / 2 + 1); forward, backward
    and transitions: 2 n k^2 each.
    """
    n, d = shape.runs * shape.frames, shape.metrics
    features = 2 * d + 1 if covariance == "diag" else d * (d + 3) / 2 + 1
    return n * k * (4 * features + 6 * k)


def run(shape: Shape | None = None, repeats: int = 5, k_max: int = 12) -> Iterator[Line]:
    """Diagonal and full covariance, for few and many states; then the whole choice of K."""
    shape = shape or Shape()
    runs = data(shape)
    for covariance, ks, bar in (("diag", (2, 4, 6, 8, 12), 1 / 12), ("full", (2, 6, 12), 1 / 5)):
        for k in ks:
            yield _line(shape, runs, k, covariance, bar, repeats)
    yield from selection(shape, runs, k_max)


def selection(shape: Shape, runs: Sequence[np.ndarray], k_max: int) -> Iterator[Line]:
    """All restarts of K = 1 .. ``k_max`` until they converge; then the whole choice of K.

    hmmlearn would take long for it. Its seconds per iteration and frame are measured for every K, on the
    first restart of that K, and multiplied by the iterations and frames that ours took: both run the same EM
    (the lines above compare their likelihoods), so both would need as many.
    """
    settings = StateSettings(k_max=k_max, restarts=shape.restarts)
    per_frame = {k: _seconds_of_hmmlearn(shape, runs, k) for k in range(1, k_max + 1)}

    def restarts() -> None:
        for k in per_frame:
            prior = prior_of(settings)
            fit_restarts(runs, k, restarts=shape.restarts, seed=settings.seed, prior=prior)

    def whole() -> None:
        fit_states(_trajectories(runs), settings)

    for name, side, what in (
        ("hmm.selection", restarts, "all restarts of every K"),
        ("hmm.selection.whole", whole, "restarts, folds, refits to resampled runs, choice, decoding"),
    ):
        with _counted() as frames:
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        against = sum(per_frame[k] * count for k, count in frames.items())
        work = sum(count * flops(shape, k, "diag") for k, count in frames.items()) / (
            shape.runs * shape.frames
        )
        yield Line(
            name=name,
            ratio=wall / against,
            against="hmmlearn GaussianHMM, implementation='log': the same fits on one core, scaled up",
            # A minute against ten.
            bar=0.1,
            limit={"kind": "FLOP", "fits": work, "flop_per_second": work / wall},
            seconds={"ours": Seconds.of([wall]), "against": Seconds.of([against])},
            repeats=1,
            shapes={**asdict(shape), "k": f"1..{k_max}", "covariance": "diag"},
            machine=machine(torch.device("cpu")),
            date=now(),
            notes={
                "ours": f"wall-clock seconds on one thread: {what}",
                "ours_cpu_seconds": cpu,
                "against": "seconds per iteration and frame, measured at every K, times iterations of ours",
                "share_of_against_measured": k_max
                * shape.iterations
                * shape.runs
                * shape.frames
                / sum(frames.values()),
                "under_a_minute": wall < 60,
                "against_over_ten_minutes": against > 600,
            },
        )


@contextmanager
def _counted() -> Iterator[Counter[int]]:
    """Frames times iterations of all fits that are made within, by number of states."""
    frames: Counter[int] = Counter()

    def counting(runs: Sequence[np.ndarray], starts: Sequence[Parameters], **options: Any) -> list[Outcome]:
        outcomes = baum_welch(runs, starts, **options)
        # A restart that failed counts as far as it came.
        iterations = sum(len(each.objective) for each in outcomes)
        if starts:
            frames[starts[0].k] += iterations * sum(map(len, runs))
        return outcomes

    with (
        patch("analyzers.latent.restarts.baum_welch", counting),
        patch("analyzers.latent.bootstrap.baum_welch", counting),
    ):
        yield frames


def _seconds_of_hmmlearn(shape: Shape, runs: Sequence[np.ndarray], k: int) -> float:
    """Wall-clock seconds per iteration and frame on one thread."""
    start = draw_start(runs, k, "random frames", np.random.default_rng([k, 0]))
    model, frames, lengths = reference(start, shape.iterations), np.concatenate(runs), [len(r) for r in runs]
    began = time.perf_counter()
    with threadpool_limits(1, user_api="blas"):
        model.fit(frames, lengths)
    return (time.perf_counter() - began) / len(model.monitor_.history) / len(frames)


def _trajectories(runs: Sequence[np.ndarray]) -> Trajectories:
    return Trajectories(
        tuple(f"run{i:03}" for i in range(len(runs))),
        tuple(np.arange(len(run)) for run in runs),
        tuple(runs),
        tuple(f"metric{i}" for i in range(runs[0].shape[1])),
    )


def _line(
    shape: Shape, runs: Sequence[np.ndarray], k: int, covariance: Covariance, bar: float, repeats: int
) -> Line:
    starts = [
        draw_start(runs, k, "random frames", np.random.default_rng([k, i]), covariance=covariance)
        for i in range(shape.restarts)
    ]
    frames, lengths = np.concatenate(runs), [len(each) for each in runs]
    # A restart that fails leaves early: iterations are counted, not assumed.
    ours: list[float] = []
    against: list[float] = []
    seen: dict[str, list[float]] = {}

    def batched() -> None:
        start = time.process_time()
        outcomes = baum_welch(runs, starts, prior=PLAIN, iterations=shape.iterations - 1, tolerance=-np.inf)
        ours.append((time.process_time() - start) / sum(len(each.objective) for each in outcomes))
        seen["ours"] = list(outcomes[0].objective)

    def hmmlearn() -> None:
        model = reference(starts[0], shape.iterations)
        start = time.process_time()
        with threadpool_limits(1, user_api="blas"):
            model.fit(frames, lengths)
        seen["against"] = list(model.monitor_.history)
        against.append((time.process_time() - start) / len(seen["against"]))

    alternate({"ours": batched, "against": hmmlearn}, repeats)
    # The first of each is the run that does not count.
    seconds = {"ours": Seconds.of(ours[1:]), "against": Seconds.of(against[1:])}
    ratio = seconds["ours"].median / seconds["against"].median
    common = min(len(seen["ours"]), len(seen["against"]))
    gap = np.abs(np.subtract(seen["ours"][:common], seen["against"][:common])).max()
    work = flops(shape, k, covariance)
    return Line(
        name=f"hmm.{covariance}.k{k}",
        ratio=ratio,
        against="hmmlearn GaussianHMM, implementation='log'; CPU time per EM iteration, one thread",
        bar=bar,
        limit={"kind": "FLOP", "iteration": work, "flop_per_second": work / seconds["ours"].median},
        seconds=seconds,
        repeats=repeats,
        shapes={**asdict(shape), "k": k, "covariance": covariance},
        machine=machine(torch.device("cpu")),
        date=now(),
        notes={
            "times_faster": 1 / ratio,
            "largest_difference_of_loglik": float(gap),
            "iterations_compared": common,
        },
    )


def reference(start: Parameters, iterations: int) -> GaussianHMM:
    """hmmlearn's model at a start, without priors."""
    model = GaussianHMM(
        start.k,
        covariance_type=start.covariance,
        covars_prior=0.0,
        min_covar=0.0,
        n_iter=iterations,
        tol=-np.inf,
        init_params="",
        implementation="log",
    )
    model.startprob_, model.transmat_ = start.start, start.transition
    model.means_, model.covars_ = start.means, start.covariances
    return model
