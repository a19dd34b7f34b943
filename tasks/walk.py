"""A walk: one worker's share of a series, checkpoint after checkpoint, on the worker's own disk."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from threading import Thread
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict
from transformers.utils import logging as transformers_logging

from analyzers.base import Reference
from storage.series import Checkpoint
from storage.store import Store
from storage.window import Arrival, Window
from tasks.job import MeasureJob
from tasks.measure import Other, measure_checkpoint, plan, sentence

# How often a worker process looks whether its flow is still there, in seconds.
_LOOK = 1.0
_called_off: set[str] = set()


class Item(BaseModel):
    """A checkpoint to measure, those that it may be compared with, and which of them its results lack."""

    model_config = ConfigDict(frozen=True)

    checkpoint: Checkpoint
    others: Mapping[Reference, Checkpoint]
    compared: tuple[Reference, ...]


class Share(BaseModel):
    """What one worker walks over, and how many bytes of its disk downloads may hold.

    ``walks`` names all walks of one call, so that they can be called off together. ``parent`` is the process
    whose end ends the worker's, ``threads`` those of torch; None: whatever there is.
    """

    model_config = ConfigDict(frozen=True)

    items: tuple[Item, ...]
    prefetch: int
    budget: int | None
    keep: bool
    walks: str = ""
    parent: int | None = None
    threads: int | None = None


class Walked(BaseModel):
    """What a walk did."""

    measured: int = 0
    already_there: int = 0
    keys_computed: int = 0
    forward_passes: int = 0
    snapshots: int = 0
    failed: list[str] = []


def parts(items: Sequence[Item], count: int) -> list[tuple[Item, ...]]:
    """``count`` contiguous parts, or fewer, none empty, whose sizes differ by 1 at most.

    Neighbours stay together, so that what a checkpoint is compared with was measured just before it.
    """
    count = min(count, len(items))
    each = iter(items)
    sizes = [len(items) // count + (number < len(items) % count) for number in range(count)]
    return [tuple(islice(each, size)) for size in sizes]


def walk(
    job: MeasureJob,
    share: Share,
    on_arrival: Callable[[str], None] = lambda label: None,
    on_done: Callable[[], None] = lambda: None,
) -> Walked:
    """Fetch, measure and evict every checkpoint of a share that still lacks a result; one task run for each.

    What another worker has claimed comes last. A failure is recorded, and the walk goes on.
    """
    store = Store(job.root)
    items = {item.checkpoint.label: item for item in share.items}

    def needed(checkpoint: Checkpoint) -> bool:
        return bool(plan(job, store, checkpoint, others=items[checkpoint.label].others).names)

    def compared(checkpoint: Checkpoint) -> list[Checkpoint]:
        item = items[checkpoint.label]
        return [item.others[name] for name in item.compared]

    folder = job.kept if share.keep else job.scratch
    window = Window(store, folder, share.prefetch, share.budget, share.keep, compared)
    done = Walked()
    for arrival in window.walk([item.checkpoint for item in share.items], needed):
        on_arrival(arrival.checkpoint.label)
        _measure(job, arrival, items[arrival.checkpoint.label], done)
        on_done()
        if share.walks in _called_off:
            break  # nobody waits for the rest, and the next call measures it
    return done


def call_off(walks: str) -> None:
    """Let the walks of this process with that name end after the checkpoint in hand."""
    _called_off.add(walks)


def _measure(job: MeasureJob, arrival: Arrival, item: Item, done: Walked) -> None:
    if arrival.folder is None and arrival.error is None:
        done.already_there += 1
        return
    error = None if arrival.error is None else sentence(arrival.error)
    others = {name: _other(other, arrival) for name, other in item.others.items()}
    state: Any = measure_checkpoint(job, arrival.checkpoint, arrival.folder, error, others, return_state=True)
    counts = state.result(raise_on_failure=False)
    if isinstance(counts, dict):
        done.keys_computed += counts["keys_computed"]
        done.forward_passes += counts["forward_passes"]
        done.snapshots += counts["snapshots"]
    if state.is_completed():
        done.measured += 1
    else:
        done.failed.append(arrival.checkpoint.label)


def _other(checkpoint: Checkpoint, arrival: Arrival) -> Other:
    folder = arrival.others.get(checkpoint.label)
    if isinstance(folder, Exception):
        return Other(checkpoint, error=sentence(folder))
    return Other(checkpoint, folder)


def _end_with(parent: int) -> None:
    """End this process soon after ``parent``: an orphan of a process pool would wait for ever.

    Nothing is left half-written: results appear at once or not at all.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)

    Thread(target=watch, daemon=True, name="parent").start()


@task(name="walk", task_run_name="walk over {share.items[0].checkpoint.label} and on", cache_policy=NO_CACHE)
def walk_share(job: MeasureJob, share: Share) -> Walked:
    """Task: one worker's share. Its checkpoints are task runs of their own inside it."""
    transformers_logging.set_verbosity_error()  # a worker process has not heard of it yet
    transformers_logging.disable_progress_bar()
    if share.parent is not None:
        _end_with(share.parent)
    if share.threads is not None:
        torch.set_num_threads(share.threads)
    return walk(job, share)


def still_missing(job: MeasureJob, share: Share) -> Iterator[Checkpoint]:
    """Checkpoints of a share that lack a result now."""
    store = Store(job.root)
    for item in share.items:
        if plan(job, store, item.checkpoint, others=item.others).names:
            yield item.checkpoint
