"""Flow: harvest what the pool lacks, train crosscoders on it, and read what their features do."""

from collections.abc import Callable
from typing import Any

from prefect import flow
from pydantic import BaseModel

from analyzers.crosscoder.settings import TrainSettings
from analyzers.crosscoder.training import StepReport
from flows.config import SeriesConfig, default_root
from flows.measure import MeasureSummary, job_of, list_catalogue, measure_series
from flows.progress import bars, console
from storage.errors import UsageError
from storage.pool import Pool
from storage.series import Checkpoint
from storage.sources import tokenizer_folder
from storage.store import Store
from storage.window import Window
from tasks.catalogue import Catalogue
from tasks.crosscoder import TrainJob, train_one
from tasks.crosscoder_job import ReadJob
from tasks.crosscoder_models import (
    contrast_tokens,
    effects_at_snapshot,
    lacks_contrast,
    lacks_effects,
    needs,
    visit_snapshot,
)
from tasks.crosscoder_reading import is_read, read_all
from tasks.harvest import snapshot_of
from tasks.job import MeasureJob
from tasks.measure import sentence
from tasks.provenance import invocation

_LATENTS_PER_CHANNEL = 16


class SnapshotQuality(BaseModel):
    """How good the first seed's reconstruction is at one snapshot."""

    step: int
    explained_variance: float | None
    explained_held_out: float | None
    l0: float
    loss_increase: float | None
    loss_recovered: float | None


class CrosscoderRun(BaseModel):
    """What was done for one run, and what came out of it."""

    run: str
    folder: str
    trained: int
    computed: bool
    latents: int
    rows: int
    dead: float
    features: int
    classes: dict[str, int]
    shared: float | None
    quality: list[SnapshotQuality]
    failed: list[str]
    notes: list[str]


class CrosscoderSummary(BaseModel):
    """What the flow did, run by run."""

    harvested: int
    failed: list[str]
    runs: list[CrosscoderRun]

    @property
    def anything_new(self) -> bool:
        """Whether anything was trained or read."""
        return any(run.computed or run.trained for run in self.runs)


@flow(name="crosscoder", flow_run_name="crosscoder {config.name}")
def crosscoder_series(
    config: SeriesConfig, root: str = default_root(), harvested: MeasureSummary | None = None
) -> CrosscoderSummary:
    """Train and read a crosscoder of every run of the series, harvesting first what the pool lacks.

    ``harvested`` is the summary of a measuring that filled the pool just now. Nothing that is there is
    computed again.
    """
    wanted = config.crosscoder.model_copy(update={"harvest": True})
    config = config.model_copy(update={"crosscoder": wanted})
    if harvested is None:
        # No analyzer: only what the pool lacks is fetched and run.
        alone = config.measure.model_copy(update={"analyzers": ()})
        harvested = measure_series(config.model_copy(update={"measure": alone}), root)
    store = Store(root)
    with invocation(store, config.name, "crosscoder", config.model_dump(mode="json")) as counts:
        found = list_catalogue(config, root)
        job = job_of(config, root, found)
        pools = _pools(job, found)
        if not pools:
            raise UsageError(
                f"no checkpoint of {config.name!r} can be harvested: measure --harvest says why, one by one"
            )
        runs = [_run(config, job, run, chosen) for run, chosen in pools.items()]
        counts.update(
            crosscoders_trained=sum(run.trained for run in runs),
            readings=sum(run.computed for run in runs),
            failures=sum(len(run.failed) for run in runs),
        )
    failed = [*harvested.failed, *(label for run in runs for label in run.failed)]
    return CrosscoderSummary(harvested=harvested.snapshots, failed=failed, runs=runs)


def _pools(job: MeasureJob, found: Catalogue) -> dict[str, list[Checkpoint]]:
    """By run, the sound checkpoints that its pool is to hold, in order of stage and step."""
    assert job.harvest is not None
    chosen: dict[str, list[Checkpoint]] = {}
    for checkpoint in sorted(found.sound, key=lambda c: (c.run, c.stage or 0, c.step)):
        if checkpoint.label in job.harvest.chosen and checkpoint.weights_sha256 is not None:
            chosen.setdefault(checkpoint.run, []).append(checkpoint)
    return chosen


def _run(config: SeriesConfig, job: MeasureJob, run: str, chosen: list[Checkpoint]) -> CrosscoderRun:
    assert job.harvest is not None
    key = snapshot_of(job, job.harvest, chosen[0]).info.key
    whole = Pool.open(job.root, key)
    there = {(s.step, s.revision) for s in whole.snapshots}
    checkpoints = [c for c in chosen if (c.step, c.revision) in there]
    notes = [f"{c.label} is not in the pool, see the table failures" for c in chosen if c not in checkpoints]
    if len(checkpoints) < 2:
        raise UsageError(f"the pool of run {run!r} has {len(checkpoints)} snapshots; two or more are needed")
    training, wanted = config.crosscoder.train, config.crosscoder
    tokenizer = _tokenizer(config, job, checkpoints[0])
    effects = wanted.effects and wanted.mode == "activations"
    if effects:
        contrast_tokens(wanted.pairs, tokenizer, whole)  # what is wrong with them is said before the training
    options = training.model_dump(exclude={"latents", "seed", "batch", "seeds", "held_out", "save_minutes"})
    latents = training.latents or _LATENTS_PER_CHANNEL * whole.width
    jobs = [
        TrainJob(
            root=job.root,
            series=config.name,
            run=run,
            pool=key,
            steps=tuple(c.step for c in checkpoints),
            settings=_settings({**options, "latents": latents, "seed": seed}),
            batch=min(training.batch, whole.rows),
            held_out=training.held_out,
            save_minutes=training.save_minutes,
            device=job.device,
        )
        for seed in range(training.seed, training.seed + training.seeds)
    ]
    trained = [_train(each) for each in jobs]
    splice, note = _splice(config, checkpoints)
    reading = ReadJob(
        root=job.root,
        series=config.name,
        run=run,
        pool=key,
        steps=jobs[0].steps,
        trained=tuple(done["key"] for done in trained),
        seeds=tuple(each.settings.seed for each in jobs),
        held_out=training.held_out,
        lifecycle=wanted.lifecycle,
        contexts=wanted.contexts,
        splice=splice,
        splice_note=note,
        effects=effects,
        pairs=wanted.pairs,
        tokenizer=tokenizer,
        device=job.device,
        dtype=job.dtype,
        loader=job.loader,
    )
    failed = [] if is_read(reading) else _visit(config, job, reading, checkpoints)
    with console.status(f"reading the crosscoder of {run}: evaluation, lives, contexts, labels"):
        read: dict[str, Any] = read_all(reading)
    if note:
        notes.append(note)
    return _summary(reading, sum(done["computed"] for done in trained), read["computed"], failed, notes)


def _settings(values: dict[str, Any]) -> TrainSettings:
    try:
        return TrainSettings.model_validate(values)
    except ValueError as error:
        raise UsageError(f"crosscoder.train: {str(error).splitlines()[2].strip()}") from None


def _train(job: TrainJob) -> dict[str, Any]:
    with bars() as progress:
        name = f"train {job.run} seed {job.settings.seed}"
        bar = progress.add_task(name, total=job.settings.steps, note="")
        done: dict[str, Any] = train_one(job, _shown(lambda **what: progress.update(bar, **what)))
    return done


def _shown(update: Callable[..., None]) -> Callable[[StepReport], None]:
    def show(report: StepReport) -> None:
        explained = sum(report.explained) / len(report.explained)
        note = (
            f"loss {report.loss:.3g}, explained {explained:.3f} (least {min(report.explained):.3f}), "
            f"L0 {report.l0:.1f}, dead {report.dead:.1%}"
        )
        update(completed=report.step, note=note)

    return show


def _splice(config: SeriesConfig, checkpoints: list[Checkpoint]) -> tuple[int, str | None]:
    """Number of sequences to splice, and why if there are none."""
    wanted = config.crosscoder
    if wanted.mode != "activations":
        return 0, f"rows of the pool are {wanted.mode} rows, which have no place in a forward pass"
    if wanted.splice is False:
        return 0, "crosscoder.splice is false"
    if wanted.splice is None and any(c.commit is not None for c in checkpoints):
        return 0, "the splice was left out: each checkpoint would be downloaded again; crosscoder.splice=true"
    return wanted.splice_sequences, None


def _tokenizer(config: SeriesConfig, job: MeasureJob, checkpoint: Checkpoint) -> str:
    probe = config.crosscoder.probe or config.probe
    if probe.tokenizer is not None:
        return probe.tokenizer.replace("{root}", job.root)
    return str(tokenizer_folder(checkpoint, job.scratch))


def _visit(
    config: SeriesConfig, job: MeasureJob, reading: ReadJob, checkpoints: list[Checkpoint]
) -> list[str]:
    """Let each snapshot's model say what it is asked; then, where effects are wanted, once more.

    Returns the labels of those that failed; ``failures`` says why. A crosscoder reads all snapshots at once:
    if one lacks its activations on the task, there are no effects at any.
    """
    number = {checkpoint.label: s for s, checkpoint in enumerate(checkpoints)}
    turns: list[tuple[str, Callable[[ReadJob, int], bool], Any]] = []
    if reading.splice or reading.effects:
        turns.append(("splice", needs, visit_snapshot))
    if reading.effects:
        turns.append(("effects", lacks_effects, effects_at_snapshot))
    failed: dict[str, None] = {}
    for name, lacks, work in turns:
        if work is effects_at_snapshot and any(lacks_contrast(reading, s) for s in number.values()):
            break
        keep = config.measure.keep
        budget = None if config.measure.disk_gb is None else int(config.measure.disk_gb * 1e9)
        folder = job.kept if keep else job.scratch
        window = Window(Store(job.root), folder, config.measure.prefetch, budget, keep)
        with bars() as progress:
            bar = progress.add_task(f"{name} {reading.run}", total=len(checkpoints), note="")
            todo = [c for c in checkpoints if lacks(reading, number[c.label])]
            progress.update(bar, total=len(todo))
            for arrival in window.walk(todo, lambda _: True):
                label = arrival.checkpoint.label
                progress.update(bar, note=label)
                error = None if arrival.error is None else sentence(arrival.error)
                state: Any = work(
                    reading, number[label], arrival.checkpoint, arrival.folder, error, return_state=True
                )
                if not state.is_completed():
                    failed[label] = None
                progress.advance(bar)
    return list(failed)


def _summary(
    reading: ReadJob, trained: int, computed: bool, failed: list[str], notes: list[str]
) -> CrosscoderRun:
    store = Store(reading.root)
    rows = [
        row
        for row in store.table("crosscoders", reading.series, reading.run).to_pylist()
        if row["reading"] == reading.identity and row["first"]
    ]
    features = store.table("features", reading.series, reading.run).to_arrow()
    features = features.select(["feature", "class"]).to_pandas().drop_duplicates("feature")
    return CrosscoderRun(
        run=reading.run,
        folder=str(reading.folder),
        trained=trained,
        computed=computed,
        latents=rows[0]["latents"],
        rows=rows[0]["rows"],
        dead=rows[0]["dead"],
        features=len(features),
        classes={str(name): int(n) for name, n in features["class"].value_counts().items()},
        shared=rows[0]["shared"],
        quality=[
            SnapshotQuality(**{name: row[name] for name in SnapshotQuality.model_fields})
            for row in sorted(rows, key=lambda row: row["step"])
        ],
        failed=failed,
        notes=notes,
    )
