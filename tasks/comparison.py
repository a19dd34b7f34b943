"""Hold a stored map beside its null and its baselines: tables ``nulls`` and ``baselines``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from analyzers.growth import GROWTH_FORM
from analyzers.latent import StateSettings, Trajectories
from analyzers.latent import baselines as cut
from analyzers.latent.baselines import Labels
from analyzers.latent.null import FEWEST_SURROGATES, SPREADS, MapShape, Null, compare
from analyzers.latent.trajectories import Scaler
from storage.keys import digest
from storage.store import Store, column_name
from tasks.curves import PHASES_FORM

# Settings that change what stands beside a fit, and not the fit.
BESIDE = frozenset({"surrogates", "surrogate_restarts", "surrogate_selections"})
# Raised when what this module computes changes, so that stored comparisons are made anew.
VERSION = 1


@dataclass(frozen=True)
class Map:
    """A stored map: per run, steps, scaled frames and states of the checkpoints that have a state."""

    k: int
    train: tuple[str, ...]
    heldout: tuple[str, ...]
    steps: Mapping[str, Int[np.ndarray, "_frames"]]
    frames: Mapping[str, Float[np.ndarray, "_frames metrics"]]
    states: Mapping[str, Int[np.ndarray, "_frames"]]
    whole_steps: Mapping[str, Int[np.ndarray, "_all"]]
    whole_frames: Mapping[str, Float[np.ndarray, "_all metrics"]]


def store_comparison(
    store: Store, series: str, model: str, trajectories: Trajectories, settings: StateSettings
) -> bool:
    """Write ``nulls`` and ``baselines`` of the newest map unless they are there; say whether one was written.

    Both are computed from what the store says of the fit, so that an older fit gets them too, and baselines
    follow the phases and growth curves that are in the store now. With ``surrogates = 0`` no null is made.
    """
    found: Map | None = None
    null = digest({"model": model, "version": VERSION, **settings.model_dump(include=set(BESIDE))})
    if settings.surrogates and not _is_newest(store, "nulls", series, null):
        found = _stored_map(store, series, trajectories)
        try:
            result = compare(
                found.whole_frames, found.whole_steps, found.train, found.heldout, found.k, settings
            )
            row = null_row(result, len(found.frames), settings)
        except RuntimeError as error:
            # A null that cannot be computed takes no map away.
            row = {
                "k": found.k,
                "surrogates": 0,
                "sentence": f"No surrogate was fitted: {error}.",
                "notes": [],
            }
        store.write("nulls", [{**row, "model": model, "comparison": null}], series=series, name=null)
    curves = [
        row
        for row in store.table("curves", series).to_pylist()
        if row["run"] is not None and row["form"] in (PHASES_FORM, GROWTH_FORM)
    ]
    beside = digest(
        {"model": model, "version": VERSION, "curves": sorted({(r["form"], r["curve"]) for r in curves})}
    )
    if _is_newest(store, "baselines", series, beside):
        return found is not None
    found = found or _stored_map(store, series, trajectories)
    rows = [
        {**row, "model": model, "comparison": beside} for row in baseline_rows(found, curves, settings.seed)
    ]
    store.write("baselines", rows, series=series, name=beside)
    return True


def _is_newest(store: Store, table: str, series: str, identity: str) -> bool:
    rows = store.table(table, series).to_pylist()
    return bool(rows) and rows[0]["comparison"] == identity


def _stored_map(store: Store, series: str, trajectories: Trajectories) -> Map:
    """The newest map, with the frames of ``trajectories`` scaled and chosen as its fit did."""
    chosen = next(row for row in store.table("state_models", series).to_pylist() if row["chosen"])
    scaler = Scaler.from_dict(json.loads(chosen["parameters"])["scaler"])
    trajectories = trajectories.select(scaler.metrics)
    scaled = dict(zip(trajectories.runs, map(scaler.apply, trajectories.values), strict=True))
    grid = dict(zip(trajectories.runs, trajectories.steps, strict=True))
    steps, frames, states = {}, {}, {}
    for run, rows in store.table("states", series).to_pandas().sort_values("step").groupby("run"):
        name = str(run)
        there = np.isin(grid[name], rows["step"])
        steps[name], frames[name] = grid[name][there], scaled[name][there]
        states[name] = rows["state"].to_numpy(dtype=np.int64)
    return Map(
        k=chosen["k"],
        train=tuple(chosen["train_runs"]),
        heldout=tuple(chosen["heldout_runs"]),
        steps=steps,
        frames=frames,
        states=states,
        whole_steps=grid,
        whole_frames=scaled,
    )


def null_row(null: Null, runs: int, settings: StateSettings) -> dict[str, Any]:
    """The row of the table nulls, without series, model and comparison."""
    return {
        "k": null.k,
        "surrogates": len(null.surrogates),
        "restarts": settings.surrogate_restarts,
        "heldout": null.heldout,
        "loglik": null.loglik,
        "surrogate_logliks": list(null.surrogates),
        "gap": null.gap,
        "spread": null.spread,
        "explained": null.explained,
        "rule_k": null.rule_k,
        "surrogate_rule_ks": list(null.rule_ks),
        "runs": runs,
        "map": _shape(null.shape),
        "surrogate_maps": [_shape(shape) for shape in null.shapes],
        "same_map": null.same_map,
        "sentence": null_sentence(null),
        "notes": [*_maps(null, runs), *null.notes],
    }


def _shape(shape: MapShape) -> dict[str, Any]:
    return {
        "edges": len(shape.edges),
        "forks": shape.forks,
        "returning": shape.returning,
        "usual": shape.usual,
        "linear": shape.linear,
    }


def null_sentence(null: Null) -> str:
    """Whether a smooth surrogate explains the trajectories as well, with the gap."""
    if null.gap is None:
        return "No surrogate could be fitted: nothing says whether smooth curves would do as well."
    where = "on held-out runs" if null.heldout else "on the fitted run itself"
    count = len(null.surrogates)
    spread = "" if null.spread is None else f", standard deviation {null.spread:.2g}"
    gap = f"gap {null.gap:+.3g} nats per checkpoint {where}, {count} surrogates{spread}"
    if null.explained is None and count < FEWEST_SURROGATES:
        return f"Too few surrogates to say whether smooth curves explain these trajectories as well ({gap})."
    if null.explained is None:
        return (
            "Whether a smooth surrogate explains these trajectories as well is open: they lead every "
            f"surrogate, but by no more than {SPREADS:g} standard deviations ({gap})."
        )
    if null.explained:
        return (
            "A smooth surrogate explains these trajectories as well: by itself the map is no "
            f"evidence of phases ({gap})."
        )
    return f"A smooth surrogate does not explain these trajectories as well ({gap})."


def _maps(null: Null, runs: int) -> list[str]:
    """Sentences on the maps of the surrogates and on the rule for K."""
    if not null.shapes:
        return []
    count = len(null.shapes)
    middle = {name: median(getattr(s, name) for s in null.shapes) for name in ("forks", "returning", "usual")}
    linear = sum(shape.linear for shape in null.shapes)
    notes = [
        f"fitted from as few random starts as the surrogates, the runs show {null.shape.forks} forks, "
        f"{null.shape.returning} of {runs} runs return to a state they left, and {null.shape.usual} take "
        f"the commonest way; surrogates (median): {middle['forks']:g}, {middle['returning']:g} and "
        f"{middle['usual']:g}; {null.same_map} of {count} surrogates show the same transitions, and "
        f"{linear} are one line of states"
    ]
    if null.rule_k is not None and null.rule_ks:
        numbers = ", ".join(map(str, null.rule_ks))
        notes.append(
            f"fitted so, the rule chooses {null.rule_k} states for the runs, and {numbers} for surrogates"
        )
    return notes


def baseline_rows(found: Map, curves: Sequence[Mapping[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the table baselines: per baseline and trajectory one of all runs (run null), then each run."""
    labels = cut.matched(cut.kmeans(found.frames, found.train, found.k, seed), found.states)
    yield from _rows(found, cut.KMEANS, None, dict(labels), {}, shared=True)
    points = {
        run: cut.change_points(frames, len(cut.pieces(found.steps[run], found.states[run]).boundaries))
        for run, frames in found.frames.items()
    }
    yield from _rows(found, cut.CHANGE_POINTS, None, dict(points), {}, shared=False)
    places: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in curves:
        trajectory = column_name(row["metric"], row["site"], row["layer"], row["head"])
        places.setdefault((row["form"], trajectory), []).append(row)
    for (form, trajectory), rows in sorted(places.items()):
        cuts: dict[str, Labels | None] = {}
        notes: dict[str, str] = {}
        for row in rows:
            run = row["run"]
            if run not in found.steps:
                continue
            numbers = dict(row["parameters"] or [])
            if form == PHASES_FORM:
                ends = (numbers.get(f"{phase}_end_step") for phase in ("collapse", "expansion"))
                cuts[run] = cut.phase_labels(found.steps[run], *ends)
                notes[run] = "no end of a phase was found"
            else:
                cuts[run] = cut.peak_labels(found.steps[run], row["peak_step"])
                notes[run] = f"no peak: the class is {row['class'] or 'not judged'}"
        if cuts:
            yield from _rows(found, form, trajectory, cuts, notes, shared=True)


def _rows(
    found: Map,
    baseline: str,
    trajectory: str | None,
    labels: Mapping[str, Labels | None],
    notes: Mapping[str, str],
    *,
    shared: bool,
) -> Iterator[dict[str, Any]]:
    """``shared``: labels mean the same in all runs, so that runs are put together; else runs are averaged."""
    known = {run: each for run, each in sorted(labels.items()) if each is not None}
    each_ari = {run: cut.agreement([each], [found.states[run]]) for run, each in known.items()}
    common = {"baseline": baseline, "trajectory": trajectory}
    note = None if shared else "mean over runs: segments are numbered within each run"
    together: float | None
    if shared and known:
        together = cut.agreement(list(known.values()), [found.states[run] for run in known])
    else:
        together = float(np.mean(list(each_ari.values()))) if known else None
    if len(known) < len(labels):
        note = f"{len(labels) - len(known)} of {len(labels)} runs have no boundary and are left out"
    yield {
        **common,
        "run": None,
        "ari": together,
        "n": sum(map(len, known.values())),
        "runs": len(known),
        "note": note,
    }
    for run, mine in sorted(labels.items()):
        row = {**common, "run": run, "ari": each_ari.get(run), "n": len(found.steps[run]), "runs": 1}
        if mine is None:
            yield {**row, "note": notes.get(run)}
            continue
        parts = cut.pieces(found.steps[run], mine)
        yield {**row, "boundaries": list(parts.boundaries), "labels": list(parts.labels)}
