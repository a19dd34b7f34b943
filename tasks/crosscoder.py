"""Train a crosscoder on a pool: its key, the rows it learns from, and one task run per seed."""

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from analyzers.crosscoder.settings import TrainSettings
from analyzers.crosscoder.training import StepReport, Trainer
from storage.claims import Claim
from storage.errors import OntogenyError, UsageError
from storage.keys import digest
from storage.pool import Pool
from storage.store import Store
from tasks.crosscoder_files import crosscoder_folder, drop_state, export, is_trained, load_state, save_state
from tasks.models import choose_device

TRAIN_VERSION = 2
"""Raise it whenever the same settings on the same pool give other weights."""

Progress = Callable[[StepReport], None]


class TrainJob(BaseModel):
    """One crosscoder to train: of which pool and snapshots, with which settings; small and serialisable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str
    series: str
    run: str
    pool: str
    steps: tuple[int, ...]
    settings: TrainSettings
    batch: int
    held_out: int
    save_minutes: float
    device: str

    def open_pool(self) -> Pool:
        """The pool with the snapshots of this job."""
        return Pool.open(self.root, self.pool, self.steps)

    def identity(self, pool: Pool) -> dict[str, Any]:
        """All that the weights depend on."""
        return {
            "pool": self.pool,
            "snapshots": [[s.step, s.name, s.weights_sha256, s.mean_norm] for s in pool.snapshots],
            "settings": self.settings.model_dump(mode="json"),
            "batch": self.batch,
            "held_out": self.held_out,
            "version": TRAIN_VERSION,
        }

    def key(self, pool: Pool) -> str:
        """Key of the crosscoder: digest of its :meth:`identity`."""
        return digest(self.identity(pool))


def held_out_rows(pool: Pool, every: int) -> Bool[np.ndarray, "rows"]:
    """Rows that training never sees: those of every ``every``-th sequence, or vocabulary item; 0: none."""
    tokens = np.asarray(pool.tokens)
    group = np.where(tokens[:, 0] >= 0, tokens[:, 0], tokens[:, 2])
    return group % every == every - 1 if every else np.zeros(len(group), dtype=bool)


def train_crosscoder(job: TrainJob, progress: Progress = lambda report: None) -> dict[str, Any]:
    """Train the crosscoder unless it is there; go on from the last state that a killed training left.

    Returns a summary: key, computed, and the number of steps done before this call.

    Raises:
        UsageError: the pool has fewer than two snapshots, or fewer rows than a batch.
        OntogenyError: the loss is not finite.
    """
    pool = job.open_pool()
    if len(pool.snapshots) < 2:
        raise UsageError(f"pool {job.pool!r} has one snapshot; a crosscoder needs two or more")
    key = job.key(pool)
    folder = crosscoder_folder(job.root, job.series, job.run, key)
    claim = Claim(Store(job.root), job.series, job.run, f"crosscoder-{key}")
    claim.take(wait=True)
    try:
        if is_trained(folder):
            return {"key": key, "computed": False, "resumed": 0}
        trainer, resumed = _trainer(job, pool, folder)
        report = _train(job, pool, trainer, folder, progress)
        about = {
            "series": job.series,
            "run": job.run,
            "key": key,
            "pool": pool.info.model_dump(mode="json"),
            "steps": [s.step for s in pool.snapshots],
            "revisions": [s.revision for s in pool.snapshots],
            "identity": job.identity(pool),
            "last_batch": None if report is None else json.loads(json.dumps(report.__dict__)),
        }
        export(folder, trainer.crosscoder(), about)
        drop_state(folder)
    finally:
        claim.drop()
    return {"key": key, "computed": True, "resumed": resumed}


def _trainer(job: TrainJob, pool: Pool, folder: Any) -> tuple[Trainer, int]:
    device = choose_device(job.device)
    state = load_state(folder)
    if state is not None and state.settings == job.settings:
        trainer = Trainer.resume(state, device=device)
        return trainer, trainer.steps_done
    scale = torch.from_numpy(pool.scales).float()
    return Trainer(job.settings, len(pool.snapshots), pool.width, scale, device=device), 0


def _train(job: TrainJob, pool: Pool, trainer: Trainer, folder: Any, progress: Progress) -> StepReport | None:
    report, saved = None, time.monotonic()
    for rows in _batches(job, pool, trainer.steps_done):
        try:
            report = trainer.step(rows)
        except FloatingPointError as error:
            raise OntogenyError(f"{error}; try a smaller crosscoder.train.learning_rate") from None
        progress(report)
        if time.monotonic() - saved >= 60 * job.save_minutes and report.step < job.settings.steps:
            save_state(folder, trainer.state())
            saved = time.monotonic()
    return report


def _batches(job: TrainJob, pool: Pool, start: int) -> Iterator[Tensor]:
    """The scaled rows of each step from ``start`` on, without those held out; the seed gives their order."""
    left_out = held_out_rows(pool, job.held_out)
    per_epoch = pool.batches_per_epoch(job.batch)
    epochs = math.ceil(job.settings.steps / per_epoch) if per_epoch else 1
    for batch in pool.stored(job.batch, job.settings.seed, epochs, start):
        if batch.number >= job.settings.steps:
            return
        kept = ~left_out[batch.rows]
        if not kept.any():
            raise UsageError(
                f"all rows of batch {batch.number} are held out: take a larger crosscoder.train.batch"
            )
        yield torch.from_numpy(pool.scaled(batch.values[kept]))


@task(
    name="train-crosscoder", cache_policy=NO_CACHE, task_run_name="train {job.run} seed {job.settings.seed}"
)
def train_one(job: TrainJob, progress: Progress = lambda report: None) -> dict[str, Any]:
    """Task: :func:`train_crosscoder`."""
    return train_crosscoder(job, progress)
