"""Measure what a series lacks: here, one checkpoint after another, or spread over workers."""

import multiprocessing
import os
import uuid
from collections.abc import Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import torch

from flows.artifacts import progress as shown_progress
from flows.config import MeasureConfig
from flows.progress import bars
from storage.errors import first_line
from storage.store import Store
from tasks.job import MeasureJob
from tasks.measure import plan, record_failure
from tasks.runners import Workers, dealt
from tasks.walk import Item, Share, Walked, call_off, parts, still_missing, walk, walk_share

# How often the progress of workers is looked up in the store, in seconds.
_LOOK = 5.0


def workers_of(config: MeasureConfig) -> Workers:
    """The workers that a configuration asks for.

    Raises:
        UsageError: they cannot be had.
    """
    gpus = config.gpus
    if gpus is None:
        here = config.device == "auto" and torch.cuda.is_available()
        gpus = 1 if here or config.device.startswith("cuda") else 0
    found = Workers(config.runner, config.workers, config.address, gpus)
    found.check()
    return found


def measure_items(
    config: MeasureConfig, job: MeasureJob, items: Sequence[Item], budget: int | None
) -> Walked:
    """Measure all of ``items``; downloads of all workers together hold at most ``budget`` bytes."""
    if not items:
        return Walked()
    workers = workers_of(config)
    if workers.kind == "threads" and workers.count == 1:
        share = Share(items=tuple(items), prefetch=config.prefetch, budget=budget, keep=config.keep)
        show_done = shown_progress("measure", items[0].checkpoint.series, len(items))
        with bars() as progress:
            bar = progress.add_task("measure", total=len(items), note="")

            def advance() -> None:
                progress.advance(bar)
                show_done(int(progress.tasks[bar].completed))

            return walk(job, share, lambda label: progress.update(bar, note=label), advance)
    if not workers.remote and "://" not in job.root:
        job = job.model_copy(update={"root": os.path.abspath(job.root)})  # noqa: PTH100  (the string)
    own = workers.kind != "threads" and not workers.remote and "OMP_NUM_THREADS" not in os.environ
    each, walks = parts(items, workers.count), uuid.uuid4().hex
    shares = [
        Share(
            items=part,
            prefetch=config.prefetch,
            budget=None if budget is None else budget // len(each),
            keep=config.keep,
            walks=walks,
            parent=os.getpid() if workers.kind == "processes" else None,
            threads=max(1, (os.cpu_count() or 1) // len(each)) if own else None,
        )
        for part in each
    ]
    return _spread(workers, job, shares)


def _spread(workers: Workers, job: MeasureJob, shares: list[Share]) -> Walked:
    done = Walked()
    before = set(multiprocessing.active_children())
    with workers.open() as runner, bars() as progress:
        total = sum(len(share.items) for share in shares)
        bar = progress.add_task("measure", total=total, note=f"{len(shares)} {workers.kind}")
        ended: SimpleQueue[Any] = SimpleQueue()
        futures = {}
        try:
            for number, share in enumerate(shares):
                own = job.model_copy(
                    update={
                        "device": workers.device(number, job.device),
                        "devices": dealt(job.devices, number, len(shares)),
                    }
                )
                future = runner.submit(walk_share, {"job": own, "share": share})
                futures[id(future)] = share
                future.add_done_callback(ended.put)
            files = None if progress.disable else _files(job, shares)
            for _ in shares:
                while (future := _next(ended)) is None:
                    if files is not None:
                        progress.update(bar, completed=_stored(job, files))
                _add(done, _result(future, job, futures[id(future)]))
        except BaseException:
            # An interrupt or a cancellation; the runner would wait for walks that may take days.
            call_off(shares[0].walks)
            if workers.kind == "processes":
                for child in set(multiprocessing.active_children()) - before:
                    child.terminate()
            raise
    return done


def _next(ended: "SimpleQueue[Any]") -> Any:
    try:
        return ended.get(timeout=_LOOK)
    except Empty:
        return None


def _result(future: Any, job: MeasureJob, share: Share) -> Walked:
    """What a walk did; if its worker died, what is missing of its share is recorded as failed."""
    try:
        found = future.result(raise_on_failure=False)
    except Exception as error:  # whatever a runner raises of a dead worker
        found = error
    if isinstance(found, Walked):
        return found
    why = first_line(found) if isinstance(found, BaseException) else "its task did not end"
    lost = Walked()
    for checkpoint in still_missing(job, share):
        record_failure(Store(job.root), checkpoint, None, f"its worker died: {why}")
        lost.failed.append(checkpoint.label)
    # What it measured before is in the store; how many passes that took is not known.
    lost.measured = len(share.items) - len(lost.failed)
    return lost


def _add(total: Walked, part: Walked) -> None:
    for name, value in part:
        setattr(total, name, getattr(total, name) + value)


def _files(job: MeasureJob, shares: Iterable[Share]) -> list[tuple[str, str, set[str]]]:
    """Series, run and missing files of every checkpoint, by which its progress is known."""
    store = Store(job.root)
    found = []
    for item in (item for share in shares for item in share.items):
        missing = {m.file for m in plan(job, store, item.checkpoint, others=item.others).missing}
        found.append((item.checkpoint.series, item.checkpoint.run, missing))
    return found


def _stored(job: MeasureJob, files: list[tuple[str, str, set[str]]]) -> int:
    """How many of the checkpoints have all their files; those that only a pool waits for count as done."""
    store = Store(job.root)
    there = {(series, run): store.names("metrics", series, run) for series, run, _ in files}
    return sum(missing <= there[series, run] for series, run, missing in files)
