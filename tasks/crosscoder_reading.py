"""Read trained crosscoders: one pass each over the pool, and the rows of the tables."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from analyzers.base import Row
from analyzers.crosscoder.effects import relative_effects
from analyzers.crosscoder.evaluation import Evaluation, evaluate
from analyzers.crosscoder.population import METRICS, Evolution, evolve, population
from analyzers.crosscoder.stability import Stability, stability
from analyzers.crosscoder.weights import Crosscoder
from storage.errors import UsageError
from storage.keys import canonical_json
from storage.pool import Pool
from storage.store import Store
from storage.tables import SCHEMA_VERSION
from tasks.crosscoder import held_out_rows
from tasks.crosscoder_contexts import context_rows
from tasks.crosscoder_files import read_config
from tasks.crosscoder_job import READ_VERSION, ReadJob, read_json, rows_in_order, write_json
from tasks.crosscoder_models import effects_of, missing, splice_part
from tasks.models import choose_device

ANALYZER = "crosscoder"
TABLES = ("features", "feature_contexts", "effects", "metrics", "crosscoders")
"""Tables of a reading; the last is written last: its file says that the reading is complete."""

__all__ = ["ANALYZER", "METRICS", "is_read", "read_crosscoders", "show_reading"]


def file_of(table: str, identity: str) -> str:
    """Name of a reading's file in a table."""
    return f"{ANALYZER}-{identity}" if table == "metrics" else identity


def has_tables(job: ReadJob) -> bool:
    """Whether the tables of the reading were written, with or without gaps."""
    return job.identity in Store(job.root).names("crosscoders", job.series, job.run)


def is_read(job: ReadJob) -> bool:
    """Whether the tables of the reading are there with nothing missing: only gaps leave a list of them."""
    return has_tables(job) and not _gaps(job).is_file()


def _gaps(job: ReadJob) -> Path:
    return job.parts / "missing.json"


def show_reading(job: ReadJob) -> None:
    """Make a complete reading the newest of its run, so that readers show it."""
    store = Store(job.root)
    newest = store.table("crosscoders", job.series, job.run).to_pylist()
    if newest and newest[0]["reading"] != job.identity:
        for table in TABLES:
            name = file_of(table, job.identity)
            if name in store.names(table, job.series, job.run):
                store.renew(table, job.series, job.run, name)


def read_crosscoders(job: ReadJob) -> dict[str, Any]:
    """Evaluate every seed, follow the features of the first, and write the tables; nothing where it is done.

    What the models say comes from :mod:`tasks.crosscoder_models`. Where a model failed its columns are null,
    and what the others said is kept: the next call asks the missing ones again. Returns a summary: computed,
    reading.

    Raises:
        UsageError: the steps of the snapshots do not ascend, as where a run has several stages.
    """
    pool, device = job.open_pool(), choose_device(job.device)
    gaps = missing(job, len(pool.snapshots)) if not is_read(job) else []
    if is_read(job) or (has_tables(job) and gaps == read_json(_gaps(job))):
        show_reading(job)
        return {"reading": job.identity, "computed": False}
    every = np.arange(pool.rows)
    out = np.flatnonzero(held_out_rows(pool, job.held_out))
    crosscoders = [job.crosscoder(device, key) for key in job.trained]
    evaluations = [evaluate(each, _values(pool, every)) for each in crosscoders]
    held_out = [evaluate(each, _values(pool, out)) if len(out) else None for each in crosscoders]
    first, evaluation = crosscoders[0], evaluations[0]
    try:
        evolution = evolve(first, [s.step for s in pool.snapshots], evaluation, job.lifecycle)
    except ValueError as error:
        raise UsageError(f"snapshots of run {job.run!r}: {error}") from None
    found = None
    if len(crosscoders) > 1:
        masks = [~each.dead for each in evaluations]
        found = stability(first, crosscoders[1:], kept=masks[0], others_kept=masks[1:])
    rows = {
        "features": list(_feature_rows(job, pool, first, evaluation, evolution, found)),
        "feature_contexts": context_rows(job, pool, first),
        "effects": list(_effect_rows(job, pool, first.latents)),
        "metrics": _metric_rows(job, pool, first, evaluation, evolution),
        "crosscoders": list(_crosscoder_rows(job, pool, evaluations, held_out, found)),
    }
    store = Store(job.root)
    for table in TABLES:
        name = file_of(table, job.identity)
        common = {} if table == "metrics" else {"reading": job.identity}
        mine = [common | row for row in rows[table]]
        store.write(table, mine, series=job.series, run=job.run, name=name)
    if gaps:
        write_json(_gaps(job), gaps)
    else:
        _gaps(job).unlink(
            missing_ok=True
        )  # first, so that a kill in between leaves no list without its parts
        _drop_parts(job)
    return {"reading": job.identity, "computed": True}


def _values(pool: Pool, rows: np.ndarray) -> Iterator[Tensor]:
    return (values for _, values in rows_in_order(pool, rows))


def _number(value: Any) -> float | None:
    """A float, None where it is absent."""
    return None if value is None or not math.isfinite(value) else float(value)


def _crosscoder_rows(
    job: ReadJob,
    pool: Pool,
    evaluations: list[Evaluation],
    held_out: list[Evaluation | None],
    found: Stability | None,
) -> Iterator[dict[str, Any]]:
    protocol = pool.info.protocol
    for number, (key, seed, evaluation, out) in enumerate(
        zip(job.trained, job.seeds, evaluations, held_out, strict=True)
    ):
        config = read_config(job.folder_of(key))
        settings = {
            **config["identity"],
            "lifecycle": job.lifecycle.model_dump(),
            "splice_sequences": job.splice,
            "read_version": READ_VERSION,
            "pool_protocol": protocol,
        }
        for s, snapshot in enumerate(pool.snapshots):
            spliced = read_json(splice_part(job, s)) if job.splice and not number else None
            note = job.splice_note or "it failed, see the table failures"
            if number:
                note = "only the first seed's reconstruction is spliced"
            yield {
                "crosscoder": key,
                "seed": seed,
                "first": number == 0,
                "step": snapshot.step,
                "tokens": snapshot.tokens,
                "pool": job.pool,
                "mode": protocol["mode"],
                "site": snapshot.site,
                "layer": snapshot.layer,
                "rows": pool.rows,
                "width": pool.width,
                "latents": config["latents"],
                "train_steps": config["identity"]["settings"]["steps"],
                "scale": snapshot.scale,
                "explained_variance": _number(evaluation.explained_variance[s]),
                "explained_held_out": None if out is None else _number(out.explained_variance[s]),
                "held_out_rows": 0 if out is None else out.tokens,
                "l0": _number(evaluation.l0_each[s]),
                "dead": float(evaluation.dead.mean()),
                "shared": None if found is None or number else _number(found.shared),
                "settings": canonical_json(settings),
                **(spliced or {"splice_note": note}),
            }


def _feature_rows(
    job: ReadJob,
    pool: Pool,
    crosscoder: Crosscoder,
    evaluation: Evaluation,
    evolution: Evolution,
    found: Stability | None,
) -> Iterator[dict[str, Any]]:
    steps = [s.step for s in pool.snapshots]
    strengths = crosscoder.strengths().double().cpu().numpy()
    lives, turning, scaling = evolution.lives, evolution.turning, evaluation.scaling
    last = len(steps) - 1
    for i in np.flatnonzero(evolution.counted).tolist():
        turns = lives.classes[i] is not None and turning.cosine[i] < job.lifecycle.turned
        whole = {
            "feature": i,
            "density": float(evaluation.density[i]),
            "class": lives.classes[i],
            "birth": steps[lives.birth[i]] if lives.birth[i] >= 0 else None,
            "death": steps[lives.death[i]] if 0 <= lives.death[i] < last else None,
            "peak": steps[lives.peak[i]] if lives.peak[i] >= 0 else None,
            "spans": int(lives.spans[i]),
            "stability": None if found is None else _number(found.stability[i]),
            "turning_step": steps[turning.after[i]] if turns else None,
            "turning_cosine": _number(turning.cosine[i]),
        }
        for s, step in enumerate(steps):
            yield {
                **whole,
                "step": step,
                "strength": float(strengths[i, s]),
                "strength_unscaled": float(strengths[i, s] / pool.scales[s]),
                "strength_share": _number(lives.strength[i, s]),
                "beta": _number(scaling.beta[i, s]),
                "beta_activation": _number(scaling.beta_activation[i, s]),
                "final_cosine": _number(evolution.final_cosine[i, s]),
                "previous_cosine": _number(evolution.previous_cosine[i, s - 1]) if s else None,
                "dimensionality": _number(evolution.dimensionality[i, s]),
            }


def _metric_rows(
    job: ReadJob, pool: Pool, crosscoder: Crosscoder, evaluation: Evaluation, evolution: Evolution
) -> list[dict[str, Any]]:
    """Metrics of the population, as rows of ``metrics``; the reading is their key."""
    config = read_config(job.folder)
    protocol = canonical_json(
        {
            "analyzer": ANALYZER,
            "version": READ_VERSION,
            "parameters": {
                **config["identity"]["settings"],
                "batch": config["identity"]["batch"],
                "held_out": job.held_out,
                "lifecycle": job.lifecycle.model_dump(),
                "snapshots": [s.step for s in pool.snapshots],
            },
            "probe": pool.info.protocol.get("probe"),
            "pool": job.pool,
            "dtype": pool.info.protocol["dtype"],
            "schema": SCHEMA_VERSION,
        }
    )
    about = pool.snapshots[0]
    each = population(evolution, evaluation, crosscoder.width, job.lifecycle, about.site, about.layer)

    def row(snapshot: Any, found: Row) -> dict[str, Any]:
        return {
            "step": snapshot.step,
            "tokens": snapshot.tokens,
            "analyzer": ANALYZER,
            "metric": found.metric,
            "value": found.value,
            "n": found.n,
            "site": found.site,
            "layer": found.layer,
            "head": found.head,
            "note": found.note,
            "key": job.identity,
            "protocol": protocol,
        }

    return [row(s, found) for s, rows in zip(pool.snapshots, each, strict=True) for found in rows]


def _effect_rows(job: ReadJob, pool: Pool, latents: int) -> Iterator[dict[str, Any]]:
    parts = effects_of(job, len(pool.snapshots))
    effects = np.zeros((len(parts), latents))
    for s, part in enumerate(parts):
        if part is None:
            effects[s] = np.nan  # a share of all snapshots is not known where one is missing
        else:
            effects[s, part["features"]] = part["effects"]
    relative = relative_effects(effects)
    name = "subject-verb-agreement" if job.pairs is None else job.pairs.rpartition("/")[2]
    for s, (snapshot, part) in enumerate(zip(pool.snapshots, parts, strict=True)):
        if part is None:
            continue
        where = {"task": name, "step": snapshot.step}
        whole = {k: part[k] for k in ("items", "metric", "correct", "all_ablated", "gap")}
        ablation = ("ablated", "ablated_change", "ablated_correct", "random_changes", "p", "note")
        yield where | whole | {k: part.get(k) for k in ablation}
        for i in np.flatnonzero(effects[s]).tolist():
            yield where | {"feature": i, "ie": float(effects[s, i]), "relie": _number(relative[s, i])}


def _drop_parts(job: ReadJob) -> None:
    if job.parts.is_dir():
        for path in job.parts.iterdir():
            path.unlink()
        job.parts.rmdir()


@task(name="read-crosscoders", cache_policy=NO_CACHE)
def read_all(job: ReadJob) -> dict[str, Any]:
    """Task: :func:`read_crosscoders`."""
    return read_crosscoders(job)
