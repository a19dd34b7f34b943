"""Measure one checkpoint: which keys are missing, the one pass, the rows. One task run per checkpoint."""

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from analyzers.base import (
    ActivationAnalyzer,
    ActivationComparison,
    Analyzer,
    PassAnalyzer,
    Reference,
    Result,
    WeightAnalyzer,
    WeightComparison,
)
from analyzers.families import UnknownFamilyError
from storage.errors import DamagedCheckpointError, OntogenyError, first_line
from storage.keys import canonical_json, compared_sha256, result_key
from storage.probe import Probe
from storage.series import Checkpoint
from storage.sources import tokenizer_folder
from storage.store import Store, now
from storage.tables import SCHEMA_VERSION
from tasks.gpu import gpu_slot
from tasks.harvest import Harvesting, PlannedSnapshot, plan_snapshot
from tasks.job import MeasureJob
from tasks.models import choose_device, open_weights, probe_of
from tasks.passes import Passes


@dataclass(frozen=True)
class Pending:
    """One analyzer's result on a checkpoint, by its key, whether the store has it or not."""

    analyzer: Analyzer
    protocol: dict[str, Any]
    key: str

    @property
    def file(self) -> str:
        """Name of the result's file."""
        return f"{self.analyzer.name}-{self.key}"


def reads_the_probe(analyzer: Analyzer) -> bool:
    """Whether it reads a forward pass over the probe."""
    return isinstance(analyzer, PassAnalyzer) and analyzer.tokens is None


def protocol_of(
    analyzer: Analyzer, probe: Probe | None, dtype: str, loader: str | None = None
) -> dict[str, Any]:
    """What determines an analyzer's numbers besides the weights; part of the key, stored with every row.

    Weight analyzers read weights as stored: neither probe nor dtype enters. Analyzers with tokens of their
    own do not read the probe: their parameters say which tokens. A person's own loader enters, because it
    says which model the weights make.
    """
    runs_model = isinstance(analyzer, PassAnalyzer)
    reads_probe = reads_the_probe(analyzer)
    return {
        "analyzer": analyzer.name,
        "version": analyzer.version,
        "parameters": analyzer.parameters.model_dump(mode="json"),
        "probe": probe.describe() if reads_probe and probe is not None else None,
        "dtype": dtype if runs_model else "stored",
        "schema": SCHEMA_VERSION,
        **({"loader": loader} if loader is not None else {}),
    }


@dataclass(frozen=True)
class Plan:
    """All results that a checkpoint should have, those that the store lacks, and the probe they name.

    ``harvest`` is its snapshot where the pool lacks it, or one sentence why there can be none.
    """

    wanted: list[Pending]
    missing: list[Pending]
    probe: Probe | None
    harvest: PlannedSnapshot | str | None = None

    @property
    def names(self) -> list[str]:
        """What is missing, by name; empty where all is there."""
        return [item.analyzer.name for item in self.missing] + ([] if self.harvest is None else ["harvest"])

    @property
    def harvest_passes(self) -> int:
        """Forward passes that the snapshot costs: none where it shares one, or reads weights."""
        if not isinstance(self.harvest, PlannedSnapshot) or not self.harvest.reads_pass:
            return 0
        shared = any(reads_the_probe(item.analyzer) for item in self.missing)
        return 0 if self.harvest.source is None and shared else 1

    @property
    def tokens(self) -> int:
        """Tokens that the model has to run over for what is missing."""
        readers = [item.analyzer for item in self.missing if isinstance(item.analyzer, PassAnalyzer)]
        sources = {reader.tokens for reader in readers}
        if isinstance(self.harvest, PlannedSnapshot) and self.harvest.reads_pass:
            sources.add(self.harvest.source)
        probe = self.probe.tokens.size if self.probe is not None and None in sources else 0
        return probe + sum(math.prod(source.size) for source in sources if source is not None)


def plan(
    job: MeasureJob,
    store: Store,
    checkpoint: Checkpoint,
    done: set[str] | None = None,
    others: Mapping[Reference, Checkpoint] | None = None,
) -> Plan:
    """Find the keys that the store lacks, and the snapshot that the pool lacks.

    ``done`` are its results of the run, where they are known; ``others`` are the checkpoints that this one
    may be compared with.

    Raises:
        UsageError: the probe cannot be built, or the configuration of the harvest cannot be met.
        HubError: the tokenizer could not be fetched.
    """
    built = job.build()
    probe = None
    if any(reads_the_probe(analyzer) for analyzer in built) or _harvests_the_probe(job):
        probe = probe_of(tokenizer_folder(checkpoint, job.scratch), job.probe, job.root)
    if done is None:
        done = store.names("metrics", checkpoint.series, checkpoint.run)
    digests = {name: _weights_digest(other) for name, other in (others or {}).items()}
    wanted = []
    for analyzer in built:
        protocol = protocol_of(analyzer, probe, job.dtype, job.loader)
        # Which checkpoints they are is no part of the protocol: along a run it would never be the same.
        compared = {name: digests[name] for name in analyzer.against if name in digests}
        weights = compared_sha256(_weights_digest(checkpoint), compared)
        wanted.append(Pending(analyzer, protocol, result_key(weights, protocol)))
    try:
        harvest: PlannedSnapshot | str | None = plan_snapshot(job, checkpoint, probe)
    except (DamagedCheckpointError, UnknownFamilyError) as error:
        harvest = sentence(error)
    return Plan(wanted, [item for item in wanted if item.file not in done], probe, harvest)


def _harvests_the_probe(job: MeasureJob) -> bool:
    return job.harvest is not None and job.harvest.mode == "activations" and job.harvest.probe is None


def _weights_digest(checkpoint: Checkpoint) -> str:
    if checkpoint.weights_sha256 is None:
        raise ValueError(f"{checkpoint.label} is not described: it has no weights digest")
    return checkpoint.weights_sha256


def show_newest(store: Store, plans: list[tuple[Checkpoint, Plan]]) -> None:
    """Make the protocols of ``plans`` the newest of their runs, where none of their results was missing.

    Readers show the protocol written last. Going back to an earlier one computes nothing, so without this
    they would go on showing the other.
    """
    computed = {(c.run, item.analyzer.name) for c, plan in plans for item in plan.missing}
    last = {c.run: (c, plan) for c, plan in plans}
    for run, (checkpoint, plan) in last.items():
        shown = set(store.table("metrics", checkpoint.series, run).arrow["protocol"].to_pylist())
        for item in plan.wanted:
            if (run, item.analyzer.name) in computed or canonical_json(item.protocol) in shown:
                continue
            for table in ("spectra", "sequence_values", "metrics"):
                if item.file in store.names(table, checkpoint.series, run):
                    store.renew(table, checkpoint.series, run, item.file)


def _metric_rows(result: Result) -> list[dict[str, Any]]:
    rows = []
    for row in result.rows:
        value, note = row.value, row.note
        if value is not None and not math.isfinite(value):
            value, note = None, note or f"value is {value}"
        rows.append(
            {
                "metric": row.metric,
                "value": value,
                "n": row.n,
                "site": row.site,
                "layer": row.layer,
                "head": row.head,
                "note": note,
            }
        )
    return rows


def store_result(store: Store, checkpoint: Checkpoint, item: Pending, result: Result) -> None:
    """Write an analyzer's rows. Metrics come last: their file says that the result is complete."""
    protocol = canonical_json(item.protocol)
    common = {
        "step": checkpoint.step,
        "analyzer": item.analyzer.name,
        "key": item.key,
        "protocol": protocol,
    }
    where = {"series": checkpoint.series, "run": checkpoint.run, "name": item.file}
    about = {"key": item.key, "protocol": item.protocol, "weights_sha256": checkpoint.weights_sha256}
    if result.spectra:
        spectra = [
            {
                **common,
                "site": s.site,
                "layer": s.layer,
                "half": s.half,
                "centered": s.centered,
                "n": s.n,
                "eigenvalues": s.eigenvalues,
            }
            for s in result.spectra
        ]
        store.write("spectra", spectra, metadata=about, **where)
    if result.sequence_values:
        values = [
            {
                **common,
                "metric": s.metric,
                "site": s.site,
                "layer": s.layer,
                "head": s.head,
                "sequences": s.sequences.tolist(),
                "values": [value if math.isfinite(value) else None for value in s.values.tolist()],
            }
            for s in result.sequence_values
        ]
        store.write("sequence_values", values, metadata=about, **where)
    rows = [{**common, "tokens": checkpoint.tokens, **row} for row in _metric_rows(result)]
    store.write("metrics", rows, metadata=about, **where)


def record_failure(store: Store, checkpoint: Checkpoint, analyzer: str | None, error: str) -> None:
    """Write a row of ``failures``; the attempt counts earlier rows about the same thing."""
    rows = store.table("failures", checkpoint.series, checkpoint.run).to_pylist()
    before = sum(row["step"] == checkpoint.step and row["analyzer"] == analyzer for row in rows)
    row = {
        "step": checkpoint.step,
        "analyzer": analyzer,
        "error": error,
        "attempt": before + 1,
        "at": now(),
    }
    name = f"step{checkpoint.step}-{uuid.uuid4().hex[:12]}"
    store.write("failures", [row], series=checkpoint.series, run=checkpoint.run, name=name)


@dataclass(frozen=True)
class Other:
    """A checkpoint that another is compared with, and where it lies, or why it did not arrive."""

    checkpoint: Checkpoint
    folder: Path | None = None
    error: str | None = None


def measure(
    job: MeasureJob,
    checkpoint: Checkpoint,
    folder: Path | None,
    error: str | None = None,
    others: Mapping[Reference, Other] | None = None,
) -> dict[str, int]:
    """Compute and store what is missing of one checkpoint; return counts of keys, passes and failures.

    ``folder`` is where it lies; None, with ``error``, if it did not arrive. ``others`` are the checkpoints
    that it is compared with.

    One analyzer's failure is recorded and leaves the others alone; a checkpoint that cannot be loaded is
    recorded once.
    """
    store = Store(job.root)
    counts = {"keys_computed": 0, "forward_passes": 0, "failures": 0, "snapshots": 0}
    others = others or {}
    try:
        if folder is None:
            raise OntogenyError(error or f"{checkpoint.label} did not arrive")
        todo = plan(job, store, checkpoint, others={name: o.checkpoint for name, o in others.items()})
        if todo.names:
            _measure_folder(job, store, checkpoint, folder, todo, others, counts)
    except Exception as error:  # whatever a broken checkpoint raises is recorded, and the series goes on
        record_failure(store, checkpoint, None, sentence(error))
        counts["failures"] += 1
    return counts


def _measure_folder(
    job: MeasureJob,
    store: Store,
    checkpoint: Checkpoint,
    folder: Path,
    todo: Plan,
    others: Mapping[Reference, Other],
    counts: dict[str, int],
) -> None:
    readers = [item.analyzer for item in todo.missing if isinstance(item.analyzer, PassAnalyzer)]
    wanted = [item.analyzer for item in todo.wanted if isinstance(item.analyzer, PassAnalyzer)]
    harvesting = _begin_harvest(job, store, checkpoint, todo, counts)
    if harvesting is not None and harvesting.reader is not None:
        readers.append(harvesting.reader)
    passes = Passes(job, todo.probe, readers, wanted)
    try:
        if readers:
            passes.over(checkpoint, folder)
        if harvesting is not None:
            _end_harvest(store, checkpoint, folder, harvesting, passes, counts)
    finally:
        if harvesting is not None:
            harvesting.discard()
    for item in todo.missing:
        try:
            result = _result(job, item.analyzer, checkpoint, folder, others, passes)
        except Exception as error:  # one analyzer's fault must not lose the others' results
            record_failure(store, checkpoint, item.analyzer.name, sentence(error))
            counts["failures"] += 1
            continue
        store_result(store, checkpoint, item, result)
        counts["keys_computed"] += 1
    counts["forward_passes"] += passes.run
    if isinstance(todo.harvest, str) and not counts["failures"]:  # else the others have said it
        record_failure(store, checkpoint, "harvest", todo.harvest)
        counts["failures"] += 1


def _begin_harvest(
    job: MeasureJob, store: Store, checkpoint: Checkpoint, todo: Plan, counts: dict[str, int]
) -> Harvesting | None:
    """The checkpoint's harvest; None if there is nothing to harvest, or it failed already."""
    if not isinstance(todo.harvest, PlannedSnapshot):
        return None
    try:
        return Harvesting(job, checkpoint, todo.harvest)
    except Exception as error:  # the harvest's fault must not lose the analyzers' results
        record_failure(store, checkpoint, "harvest", sentence(error))
        counts["failures"] += 1
        return None


def _end_harvest(
    store: Store,
    checkpoint: Checkpoint,
    folder: Path,
    harvesting: Harvesting,
    passes: Passes,
    counts: dict[str, int],
) -> None:
    try:
        harvesting.store(folder, passes)
        counts["snapshots"] += 1
    except Exception as error:  # as above
        record_failure(store, checkpoint, "harvest", sentence(error))
        counts["failures"] += 1


def _result(
    job: MeasureJob,
    analyzer: Analyzer,
    checkpoint: Checkpoint,
    folder: Path,
    others: Mapping[Reference, Other],
    passes: Passes,
) -> Result:
    compared = {name: others[name] for name in analyzer.against if name in others}
    if isinstance(analyzer, ActivationAnalyzer):
        found = passes.of(analyzer, checkpoint, folder)
        found.check(analyzer)
        return analyzer.measure(found.states, found.shape)
    if isinstance(analyzer, ActivationComparison):
        found = passes.over(checkpoint, folder)
        found.check(analyzer)
        theirs = {name: passes.compared(o.checkpoint, _folder(o)) for name, o in compared.items()}
        return analyzer.compare(found.states, theirs, found.shape)
    if isinstance(analyzer, WeightAnalyzer):
        return analyzer.measure_weights(open_weights(folder, job.loader))
    if isinstance(analyzer, WeightComparison):
        opened = {name: open_weights(_folder(o), job.loader) for name, o in compared.items()}
        return analyzer.compare_weights(open_weights(folder, job.loader), opened)
    raise TypeError(f"analyzer {analyzer.name!r} reads neither activations nor weights")


def _folder(other: Other) -> Path:
    if other.folder is None:
        raise OntogenyError(
            f"{other.checkpoint.label}, which it is compared with, is not there: {other.error}"
        )
    return other.folder


def sentence(error: Exception) -> str:
    """An error in one line; the type's name goes before errors that are not ours."""
    text = first_line(error)
    return text if type(error).__module__.startswith("storage") else f"{type(error).__name__}: {text}"


@task(
    name="measure-checkpoint", task_run_name="{checkpoint.run}/{checkpoint.revision}", cache_policy=NO_CACHE
)
def measure_checkpoint(
    job: MeasureJob,
    checkpoint: Checkpoint,
    folder: Path | None,
    error: str | None = None,
    others: Mapping[Reference, Other] | None = None,
) -> State[dict[str, int]]:
    """Task: measure one checkpoint. A failure is a Failed state whose data are the counts."""
    with gpu_slot(choose_device(job.on[0])):
        counts = measure(job, checkpoint, folder, error, others)
    if counts["failures"]:
        return Failed(message=f"{checkpoint.label}: see table failures", data=counts)
    return Completed(data=counts)
