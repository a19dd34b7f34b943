"""Fit of the training map: split by run, choice of K, states of every run, transitions between them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from hmmlearn.hmm import GaussianHMM
from jaxtyping import Bool, Float, Int

from analyzers.latent.bootstrap import matched_paths
from analyzers.latent.hmm import decode, decode_runs
from analyzers.latent.parameters import Parameters, relabelled_by_time
from analyzers.latent.selection import AGREEMENT, Candidate, candidate, choose, seen_frames
from analyzers.latent.settings import StateSettings
from analyzers.latent.trajectories import ScaleMode, Scaler, Trajectories, varies


@dataclass(frozen=True)
class RunStates:
    """States of one run: Viterbi path and smoothed posterior of every state, per frame.

    ``seen`` is False for a frame without any value, whose state is what the transitions make of its
    neighbours: it has a place in time, and no place in the tables.
    """

    run: str
    steps: Int[np.ndarray, "frames"]
    state: Int[np.ndarray, "frames"]
    posterior: Float[np.ndarray, "frames k"]
    seen: Bool[np.ndarray, "frames"]

    def boundaries(self) -> list[tuple[int, int, int]]:
        """(step, from, to) per change of state from one seen frame to the next; step is that of the later."""
        steps, state = self.steps[self.seen], self.state[self.seen]
        arrivals = np.flatnonzero(np.diff(state)) + 1
        return [(int(steps[t]), int(state[t - 1]), int(state[t])) for t in arrivals]


@dataclass(frozen=True)
class Edge:
    """A change of state seen in a decoded path; ``probability`` is the fitted one, per checkpoint."""

    from_state: int
    to_state: int
    count: int
    runs: tuple[str, ...]
    probability: float


@dataclass(frozen=True)
class StateFit:
    """A fitted training map: the numbers of states tried, and states and transitions of the chosen one.

    Attributes:
        settings: what the fit was asked for.
        trajectories: the frames that entered, sorted by run; its metrics order the columns of the parameters.
        scaler: how frames are scaled before the model sees them.
        train_runs: runs the parameters were fitted on.
        heldout_runs: runs the parameters never saw; empty with a single run.
        candidates: one per K, ascending.
        k: the chosen number of states.
        parameters: the model of the chosen K, fitted on the training runs, relabelled.
        runs: states of every run, training and held-out.
        transitions: the edges of the map, sorted.
        refit_paths: per refit to resampled training runs that kept all states, the path of every run, with
            the states named as in ``parameters``.
        notes: sentences a reader of the map must know, the dropped data among them.
    """

    settings: StateSettings
    trajectories: Trajectories
    scaler: Scaler
    train_runs: tuple[str, ...]
    heldout_runs: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    k: int
    parameters: Parameters
    runs: tuple[RunStates, ...]
    transitions: tuple[Edge, ...]
    refit_paths: tuple[tuple[Int[np.ndarray, "_frames"], ...], ...]
    notes: tuple[str, ...]

    def boundaries(self) -> dict[str, list[tuple[int, int, int]]]:
        """Per run, (step, from, to) for each change of state; step is the first one in the new state."""
        return {run.run: run.boundaries() for run in self.runs}

    def scaled(self) -> dict[str, Float[np.ndarray, "_frames metrics"]]:
        """Per run, the frames as the model sees them."""
        return dict(
            zip(self.trajectories.runs, map(self.scaler.apply, self.trajectories.values), strict=True)
        )

    def to_hmmlearn(self) -> GaussianHMM:
        """The chosen model as hmmlearn's ``GaussianHMM``; it scores and decodes the values of ``scaled``."""
        return self.parameters.to_hmmlearn()

    def state_model_rows(self, model: str) -> Iterator[dict[str, Any]]:
        """Rows of the table state_models, one per K, without series, run and recorded_at.

        ``model`` is the identity of the fit.
        """
        for each in self.candidates:
            yield {
                "model": model,
                "k": each.k,
                "chosen": each.k == self.k,
                "bic": each.bic,
                "heldout": each.heldout,
                "loglik": each.loglik,
                "ari": each.ari,
                "aic": each.aic,
                "icl": each.icl,
                "heldout_loglik": each.heldout_loglik,
                "bootstrap_ari": each.bootstrap_ari,
                "bootstrap_refits": each.bootstrap_refits,
                "rule": self.settings.rule,
                "failed_restarts": len(each.failures),
                "metrics": list(self.trajectories.metrics),
                "train_runs": list(self.train_runs),
                "heldout_runs": list(self.heldout_runs),
                "parameters": json.dumps(self._saved(each), allow_nan=False),
            }

    def state_rows(self, model: str) -> Iterator[dict[str, Any]]:
        """Rows of the table states, one per run and seen frame, without series and recorded_at.

        ``tokens`` is None, for the caller to fill in; ``posterior`` is that of the state in the row.
        """
        for run in self.runs:
            for step, state, posterior, seen in zip(
                run.steps, run.state, run.posterior, run.seen, strict=True
            ):
                if not seen:
                    continue
                yield {
                    "run": run.run,
                    "model": model,
                    "step": int(step),
                    "tokens": None,
                    "state": int(state),
                    "posterior": float(posterior[state]),
                }

    def transition_rows(self, model: str) -> Iterator[dict[str, Any]]:
        """Rows of the table transitions, one per edge, without series, run and recorded_at."""
        for edge in self.transitions:
            yield {
                "model": model,
                "from": edge.from_state,
                "to": edge.to_state,
                "count": edge.count,
                "runs": list(edge.runs),
                "probability": edge.probability,
            }

    def _saved(self, each: Candidate) -> dict[str, Any]:
        fitted = {} if each.parameters is None else each.parameters.to_dict()
        return {
            **fitted,
            "converged": each.converged,
            "scaler": self.scaler.to_dict(),
            "transforms": dict(self.trajectories.transforms),
            "settings": self.settings.model_dump(),
            "engine": f"batched EM, numpy {version('numpy')}",
            "failures": list(each.failures),
            "notes": list(self.notes),
        }


def fit_states(trajectories: Trajectories, settings: StateSettings | None = None) -> StateFit:
    """Fit Gaussian HMMs with 1..k_max states and decode every run with the chosen one.

    Runs are split, never frames: scale and parameters are those of the training runs. K is chosen by the rule
    of the settings (:func:`analyzers.latent.selection.choose`). States are numbered by their mean time of
    occupancy. The result depends on the settings and the data, not on the order of the runs or on the number
    of threads. Source: arXiv 2308.09543 (there with every run scaled by itself).

    Raises:
        ValueError: every metric is constant over the training runs.
        RuntimeError: every restart of every K failed.
    """
    settings = settings or StateSettings()
    trajectories = _sorted_by_run(trajectories)
    data_notes, notes = list(trajectories.dropped), list[str]()
    train, heldout = _split(trajectories.runs, settings)
    trajectories = _drop_constant(trajectories, train, settings.scale, data_notes)
    trajectories = _drop_collinear(trajectories, train, settings, data_notes)
    scaler = Scaler.fit(trajectories.metrics, _of(trajectories, train), settings.scale)
    scaled = dict(zip(trajectories.runs, map(scaler.apply, trajectories.values), strict=True))
    if not heldout:
        notes.append(
            "one run only: no held-out run, K was chosen on the run itself, nothing says whether another "
            "run has these states, and no boundary has a bootstrap interval"
        )
    elif len(train) == 1 and settings.bootstraps:
        notes.append("one training run only: it cannot be resampled, so no boundary has a bootstrap interval")
    if settings.scale == "per-run":
        notes.append(
            "scale is per-run: each frame is scaled with frames that come after it (this looks ahead), and "
            "differences of level between runs are gone"
        )

    training = [scaled[run] for run in train]
    limit = _largest_k(int(seen_frames(training).sum()), settings.k_max, notes)
    times = times_of(trajectories.steps)
    candidates = tuple(
        _relabelled(
            candidate(k, training, [scaled[run] for run in heldout], settings), list(scaled.values()), times
        )
        for k in range(1, limit + 1)
    )
    choice = choose(candidates, settings, one_run=not heldout)
    chosen, parameters = choice.candidate, choice.parameters

    runs = tuple(
        RunStates(run, steps, *decode(parameters, scaled[run]), seen_frames([scaled[run]]))
        for run, steps in zip(trajectories.runs, trajectories.steps, strict=True)
    )
    # What bears on the choice of K comes first: the report's summary repeats the first notes alone.
    notes += [*choice.notes, *_remarks(candidates, chosen, runs, settings), *data_notes]
    return StateFit(
        settings=settings,
        trajectories=trajectories,
        scaler=scaler,
        train_runs=train,
        heldout_runs=heldout,
        candidates=candidates,
        k=chosen.k,
        parameters=parameters,
        runs=runs,
        transitions=_edges(runs, parameters),
        refit_paths=_refit_paths(chosen, list(scaled.values()), runs),
        notes=tuple(notes),
    )


def _sorted_by_run(trajectories: Trajectories) -> Trajectories:
    order = sorted(range(len(trajectories.runs)), key=lambda index: trajectories.runs[index])
    return replace(
        trajectories,
        runs=tuple(trajectories.runs[i] for i in order),
        steps=tuple(trajectories.steps[i] for i in order),
        values=tuple(trajectories.values[i] for i in order),
    )


def _split(runs: tuple[str, ...], settings: StateSettings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and held-out runs: at least one of each, or no held-out run when there is only one."""
    if len(runs) == 1:
        return runs, ()
    count = min(max(round(settings.heldout_fraction * len(runs)), 1), len(runs) - 1)
    shuffled = np.random.default_rng(settings.seed).permutation(len(runs))
    held = {runs[i] for i in shuffled[:count]}
    return tuple(run for run in runs if run not in held), tuple(run for run in runs if run in held)


def _of(trajectories: Trajectories, runs: Sequence[str]) -> list[Float[np.ndarray, "_frames metrics"]]:
    rows = zip(trajectories.runs, trajectories.values, strict=True)
    return [values for run, values in rows if run in runs]


def _drop_constant(
    trajectories: Trajectories, train: tuple[str, ...], scale: ScaleMode, notes: list[str]
) -> Trajectories:
    """Leave out what the training runs say nothing about: a z-score would divide by zero."""
    scaler = Scaler("per-run", trajectories.metrics)
    values = [scaler.apply(v) if scale == "per-run" else v for v in _of(trajectories, train)]
    frames = np.concatenate(values)
    moving = varies(frames)
    where = "within every training run" if scale == "per-run" else "over the training runs"
    for name, moves, column in zip(trajectories.metrics, moving, frames.T, strict=True):
        if not moves:
            reason = (
                "no training run has a value of it" if np.isnan(column).all() else f"it is constant {where}"
            )
            notes.append(f"metric {name} dropped: {reason}")
    if not moving.any():
        raise ValueError(f"every metric is constant {where}: " + ", ".join(train))
    return trajectories.select(
        [name for name, moves in zip(trajectories.metrics, moving, strict=True) if moves]
    )


def _drop_collinear(
    trajectories: Trajectories, train: tuple[str, ...], settings: StateSettings, notes: list[str]
) -> Trajectories:
    """Leave out metrics that say what an earlier one of the list says: a diagonal model would count it twice.

    Pearson's r on the scaled training frames that have both. The 1 % of them (one at least) that lie farthest
    from the mean are also left out in a second look, and both must exceed the bound, or one outlier frame
    would make all metrics collinear.
    """
    scaler = Scaler.fit(trajectories.metrics, _of(trajectories, train), settings.scale)
    frames = np.concatenate([scaler.apply(values) for values in _of(trajectories, train)])
    kept: list[int] = []
    for column, name in enumerate(trajectories.metrics):
        like = next((i for i in kept if _correlation(frames[:, [i, column]]) > settings.collinear), None)
        if like is None:
            kept.append(column)
        else:
            notes.append(
                f"metric {name} dropped: on the training frames its correlation with "
                f"{trajectories.metrics[like]} is above {settings.collinear} in absolute value (the "
                "earlier in the list is kept)"
            )
    return trajectories.select([trajectories.metrics[i] for i in kept])


def _correlation(pair: Float[np.ndarray, "frames 2"]) -> float:
    """|r|, the smaller of that with and that without the farthest frames; 0 where it says nothing."""
    both = pair[~np.isnan(pair).any(axis=1)]
    far = np.argsort((both**2).sum(axis=1), kind="stable")
    inner = both[far[: len(both) - max(1, len(both) // 100)]]
    # Two points are always on a line.
    if len(inner) < 3 or not (varies(both).all() and varies(inner).all()):
        return 0.0
    return min(abs(float(np.corrcoef(part.T)[0, 1])) for part in (both, inner))


def _largest_k(frames: int, k_max: int, notes: list[str]) -> int:
    """Two training frames per state at least, on average: fewer cannot tell a mean from a variance."""
    limit = max(frames // 2, 1)
    if limit < k_max:
        notes.append(f"K was limited to {limit} instead of {k_max}: the training runs have {frames} frames")
    return min(limit, k_max)


def times_of(steps: Sequence[Int[np.ndarray, "_frames"]]) -> list[Int[np.ndarray, "_frames"]]:
    """Time of every frame: the rank of its step in the union of all steps.

    Ranks rather than steps, or one late visit outweighs all checkpoints of the logarithmic part of a grid.
    """
    union = np.unique(np.concatenate(steps))
    return [np.searchsorted(union, each) for each in steps]


def _relabelled(
    each: Candidate,
    runs: Sequence[Float[np.ndarray, "_frames metrics"]],
    times: Sequence[Int[np.ndarray, "_frames"]],
) -> Candidate:
    """Number states by the mean time of the frames decoded as them; states in no path come last."""
    if each.parameters is None:
        return each
    paths = [run.path for run in decode_runs(each.parameters, runs)]
    return replace(each, parameters=relabelled_by_time(each.parameters, paths, times)[0])


def _refit_paths(
    chosen: Candidate, scaled: Sequence[Float[np.ndarray, "_frames metrics"]], runs: Sequence[RunStates]
) -> tuple[tuple[Int[np.ndarray, "_frames"], ...], ...]:
    paths, seen = [run.state for run in runs], np.concatenate([run.seen for run in runs])
    return tuple(tuple(matched_paths(refit, scaled, paths, seen)) for refit in chosen.refits)


def _edges(runs: Sequence[RunStates], parameters: Parameters) -> tuple[Edge, ...]:
    seen: dict[tuple[int, int], list[str]] = {}
    for run in runs:
        for _, left, entered in run.boundaries():
            seen.setdefault((left, entered), []).append(run.run)
    return tuple(
        Edge(left, entered, len(by), tuple(dict.fromkeys(by)), float(parameters.transition[left, entered]))
        for (left, entered), by in sorted(seen.items())
    )


def _remarks(
    candidates: Sequence[Candidate], chosen: Candidate, runs: Sequence[RunStates], settings: StateSettings
) -> list[str]:
    remarks = [
        f"{len(each.failures)} of {settings.restarts} restarts with K = {each.k} failed"
        for each in candidates
        if each.failures
    ]
    if chosen.ari is not None and chosen.ari < AGREEMENT:
        remarks.append(
            f"the best restarts with K = {chosen.k} agree to an adjusted Rand index of {chosen.ari:.2f} "
            "only: another seed may draw other states"
        )
    if chosen.bootstrap_ari is not None and chosen.bootstrap_ari < AGREEMENT:
        remarks.append(
            f"refits to resampled runs agree to an adjusted Rand index of {chosen.bootstrap_ari:.2f} only: "
            "other runs may have other states"
        )
    if chosen.bootstrap_refits is not None and 2 * chosen.bootstrap_refits < settings.bootstraps:
        remarks.append(
            f"{settings.bootstraps - chosen.bootstrap_refits} of {settings.bootstraps} refits to resampled "
            "runs lost a state: some states rest on single runs"
        )
    if not chosen.converged:
        remarks.append(f"the best restart with K = {chosen.k} ran out of iterations before it converged")
    visited = {int(state) for run in runs for state in run.state}
    unvisited = sorted(set(range(chosen.k)) - visited)
    if unvisited:
        remarks.append(f"no decoded path visits the states {unvisited}")
    return remarks
