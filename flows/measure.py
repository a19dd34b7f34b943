"""Flow: audit a series and measure what its store lacks. One task run per checkpoint."""

from collections.abc import Mapping

from prefect import flow
from pydantic import BaseModel

from analyzers.base import Reference
from flows.artifacts import show_findings, show_tables
from flows.config import SeriesConfig, default_root
from flows.progress import bars
from flows.spread import measure_items, workers_of
from storage.series import Checkpoint
from storage.store import Store
from tasks.catalogue import Catalogue, catalogue
from tasks.estimate import forward_flops, matmul_speed
from tasks.gpu import check_limit
from tasks.harvest import PlannedSnapshot, check_room, chosen_snapshots
from tasks.job import HarvestJob, MeasureJob
from tasks.loader import find_loader
from tasks.measure import (
    Plan,
    plan,
    record_failure,
    show_newest,
)
from tasks.models import choose_device
from tasks.others import Others, others_of, wanted
from tasks.provenance import invocation
from tasks.training_log import record_training_logs
from tasks.walk import Item


class MeasureSummary(BaseModel):
    """What a measuring did, for the person and for flows around it."""

    checkpoints: int = 0
    measured: int = 0
    already_there: int = 0
    keys_computed: int = 0
    forward_passes: int = 0
    failed: list[str] = []
    snapshots: int = 0
    not_asked: int = 0
    findings: dict[str, int] = {}


class PlannedCheckpoint(BaseModel):
    """One line of ``measure --dry-run``: ``seconds`` is an estimate of the forward pass on this machine.

    ``compared`` are the labels of checkpoints that it is compared with; one that is read for that alone is
    not ``wanted``. ``harvested``: the pool lacks its snapshot, of ``pool_bytes`` (None: known once the model
    is loaded), which costs ``pool_passes`` beyond those of the analyzers.
    """

    label: str
    step: int
    bytes: int | None
    download: bool
    missing: list[str]
    seconds: float | None
    compared: list[str] = []
    wanted: bool = True
    harvested: bool = False
    pool_bytes: int | None = None
    pool_passes: int = 0


def job_of(config: SeriesConfig, root: str, found: Catalogue | None = None) -> MeasureJob:
    """The measuring job of a configuration; with ``found``, also the harvest if there is one.

    Raises:
        UsageError: the harvest names steps or runs that the series lacks.
    """
    wanted, harvest = config.crosscoder, None
    if wanted.harvest and found is not None:
        harvest = HarvestJob(
            mode=wanted.mode,
            site=wanted.site,
            layer=wanted.layer,
            tokens=wanted.tokens,
            seed=wanted.seed,
            probe=wanted.probe,
            chosen=chosen_snapshots(found.listed, wanted.steps, wanted.runs),
            budget=_budget(config),
        )
    return MeasureJob(
        root=root,
        probe=config.probe,
        analyzers=config.measure.analyzers,
        parameters=config.measure.parameters,
        dtype=config.measure.dtype,
        device=config.measure.device,
        devices=config.measure.devices,
        batch=config.measure.batch,
        loader=config.source.loader,
        harvest=harvest,
    )


def _budget(config: SeriesConfig) -> int | None:
    return None if config.measure.disk_gb is None else int(config.measure.disk_gb * 1e9)


def list_catalogue(config: SeriesConfig, root: str) -> Catalogue:
    """The audited catalogue of the configured steps, with a progress bar."""
    with bars() as progress:
        bar = progress.add_task("catalogue", total=None, note=config.name)
        return catalogue(
            Store(root),
            config.name,
            config.source,
            config.measure.steps,
            lambda done, total: progress.update(bar, completed=done, total=total),
            config.audit,
        )


def plan_series(config: SeriesConfig, root: str) -> list[PlannedCheckpoint]:
    """What ``measure`` would do now: per checkpoint its size and the analyzers whose results are missing."""
    found = list_catalogue(config, root)
    job = job_of(config, root, found)
    plans, others = _plans(config, job, found)
    _check_room(config, job, plans)
    speed = matmul_speed(choose_device(job.on[0]), config.measure.dtype)
    planned, compared = [], dict[str, Checkpoint]()
    for checkpoint, todo in plans:
        names = todo.names
        read = _compared(todo, others[checkpoint.label])
        compared |= {other.label: other for other in read}
        flops = forward_flops(checkpoint, todo.tokens) if names else 0.0
        planned.append(
            PlannedCheckpoint(
                label=checkpoint.label,
                step=checkpoint.step,
                bytes=checkpoint.bytes,
                download=checkpoint.commit is not None,
                missing=names,
                seconds=None if flops is None else flops / speed,
                compared=[other.label for other in read],
                harvested=isinstance(todo.harvest, PlannedSnapshot),
                pool_bytes=todo.harvest.bytes if isinstance(todo.harvest, PlannedSnapshot) else None,
                pool_passes=todo.harvest_passes,
            )
        )
    there = {item.label for item in planned}
    planned += [
        PlannedCheckpoint(
            label=other.label,
            step=other.step,
            bytes=other.bytes,
            download=other.commit is not None,
            missing=[],
            seconds=None,
            wanted=False,
        )
        for other in compared.values()
        if other.label not in there
    ]
    return planned


def _plans(
    config: SeriesConfig, job: MeasureJob, found: Catalogue
) -> tuple[list[tuple[Checkpoint, Plan]], Others]:
    store = Store(job.root)
    others = others_of(store, found, config.source, wanted(job.build()))
    done = {run: store.names("metrics", config.name, run) for run in {c.run for c in found.sound}}
    return [(c, plan(job, store, c, done[c.run], others[c.label])) for c in found.sound], others


def _check_room(config: SeriesConfig, job: MeasureJob, plans: list[tuple[Checkpoint, Plan]]) -> int:
    """Bytes of the pools of the series, with those planned; 0 without a harvest."""
    if job.harvest is None:
        return 0
    planned = [todo.harvest for _, todo in plans if isinstance(todo.harvest, PlannedSnapshot)]
    return check_room(job.root, config.name, planned, job.harvest.budget)


@flow(name="measure", flow_run_name="measure {config.name}")
def measure_series(config: SeriesConfig, root: str = default_root()) -> MeasureSummary:
    """Audit the series, then measure every sound checkpoint that lacks a result.

    A checkpoint that fails is recorded in ``failures`` and named in the summary; the others go on.
    """
    store = Store(root)
    if not workers_of(config.measure).remote:
        for device in job_of(config, root).on:
            check_limit(choose_device(device))
    if config.source.loader is not None:
        find_loader(config.source.loader)  # a name that is wrong is said once, before anything is listed
    summary = MeasureSummary()
    with invocation(store, config.name, "measure", config.model_dump(mode="json")) as counts:
        found = list_catalogue(config, root)
        show_findings(config.name, found.findings)
        counts["training_log_rows"] = record_training_logs(store, config.name, found.listed)
        summary.checkpoints = len(found.checkpoints)
        summary.not_asked = len(found.not_asked)
        for finding in found.findings:
            summary.findings[finding.severity] = summary.findings.get(finding.severity, 0) + 1
        excluded = found.reasons
        for checkpoint in found.checkpoints:
            reason = excluded.get(checkpoint.label)
            if reason is not None:
                record_failure(store, checkpoint, None, f"excluded by the audit: {reason}")
                summary.failed.append(checkpoint.label)
        job = job_of(config, root, found)
        plans, others = _plans(config, job, found)
        pools = _check_room(config, job, plans)
        todo = [_item(c, p, others[c.label]) for c, p in plans if p.names]
        budget = _budget(config)
        walked = measure_items(config.measure, job, todo, None if budget is None else max(0, budget - pools))
        summary.already_there = len(found.sound) - len(todo) + walked.already_there
        summary.measured, summary.snapshots = walked.measured, walked.snapshots
        summary.keys_computed, summary.forward_passes = walked.keys_computed, walked.forward_passes
        summary.failed += walked.failed
        show_newest(store, plans)
        show_tables(store, config.name)
        counts.update(
            checkpoints=summary.checkpoints,
            checkpoints_measured=summary.measured,
            checkpoints_already_there=summary.already_there,
            keys_computed=summary.keys_computed,
            forward_passes=summary.forward_passes,
            snapshots=summary.snapshots,
            failures=len(summary.failed),
        )
    return summary


def _compared(plan: Plan, others: Mapping[Reference, Checkpoint]) -> list[Checkpoint]:
    """Those of the others that a missing result needs."""
    names = wanted(item.analyzer for item in plan.missing)
    return [other for name, other in others.items() if name in names]


def _item(checkpoint: Checkpoint, plan: Plan, others: Mapping[Reference, Checkpoint]) -> Item:
    names = wanted(item.analyzer for item in plan.missing)
    return Item(
        checkpoint=checkpoint, others=others, compared=tuple(name for name in others if name in names)
    )
