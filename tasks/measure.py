"""Measure one checkpoint: which keys are missing, the one pass, the rows. One task run per checkpoint."""

import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict

from analyzers.adapters import Model
from analyzers.base import ActivationAnalyzer, Analyzer, Result, WeightAnalyzer
from analyzers.reductions import Spec
from analyzers.reductions import State as ReductionState
from analyzers.registry import find
from analyzers.runner import batches, run_pass
from storage.errors import OntogenyError, first_line
from storage.keys import canonical_json, result_key
from storage.probe import Probe, ProbeConfig
from storage.series import Checkpoint
from storage.sources import tokenizer_folder
from storage.store import Store, now
from storage.tables import SCHEMA_VERSION
from tasks.models import load_model, open_weights, probe_of


class MeasureJob(BaseModel):
    """All that a worker needs to measure checkpoints of a series; small and serialisable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str
    probe: ProbeConfig
    analyzers: tuple[str, ...]
    parameters: dict[str, dict[str, Any]]
    dtype: str
    device: str
    batch: int
    loader: str | None = None

    @property
    def scratch(self) -> Path:
        """Folder for downloads: beside the tables, or the current folder's if ROOT is a URL."""
        return Path("ontogeny-scratch") if "://" in self.root else Path(self.root) / "scratch"

    @property
    def kept(self) -> Path:
        """Folder for downloads that stay."""
        return self.scratch.with_name("downloads")

    def build(self) -> list[Analyzer]:
        """The analyzers with their parameters."""
        return [find(name)(self.parameters.get(name, {})) for name in self.analyzers]


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


def protocol_of(
    analyzer: Analyzer, probe: Probe | None, dtype: str, loader: str | None = None
) -> dict[str, Any]:
    """What determines an analyzer's numbers besides the weights; part of the key, stored with every row.

    Weight analyzers read weights as stored: neither probe nor dtype enters. A person's own loader does,
    because it says which model the weights make.
    """
    runs_model = isinstance(analyzer, ActivationAnalyzer)
    return {
        "analyzer": analyzer.name,
        "version": analyzer.version,
        "parameters": analyzer.parameters.model_dump(mode="json"),
        "probe": probe.describe() if runs_model and probe is not None else None,
        "dtype": dtype if runs_model else "stored",
        "schema": SCHEMA_VERSION,
        **({"loader": loader} if loader is not None else {}),
    }


@dataclass(frozen=True)
class Plan:
    """All results that a checkpoint should have, those that the store lacks, and the probe they name."""

    wanted: list[Pending]
    missing: list[Pending]
    probe: Probe | None


def plan(job: MeasureJob, store: Store, checkpoint: Checkpoint, done: set[str] | None = None) -> Plan:
    """Find the keys that the store lacks; ``done`` are its results of the run, where they are known.

    Raises:
        UsageError: the probe cannot be built.
        HubError: the tokenizer could not be fetched.
    """
    built = job.build()
    probe = None
    if any(isinstance(analyzer, ActivationAnalyzer) for analyzer in built):
        probe = probe_of(tokenizer_folder(checkpoint, job.scratch), job.probe, job.root)
    if done is None:
        done = store.names("metrics", checkpoint.series, checkpoint.run)
    if checkpoint.weights_sha256 is None:
        raise ValueError(f"{checkpoint.label} is not described: it has no weights digest")
    wanted = []
    for analyzer in built:
        protocol = protocol_of(analyzer, probe, job.dtype, job.loader)
        wanted.append(Pending(analyzer, protocol, result_key(checkpoint.weights_sha256, protocol)))
    return Plan(wanted, [item for item in wanted if item.file not in done], probe)


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
            for table in ("spectra", "metrics"):
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


def measure(
    job: MeasureJob, checkpoint: Checkpoint, folder: Path | None, error: str | None = None
) -> dict[str, int]:
    """Compute and store what is missing of one checkpoint; return counts of keys, passes and failures.

    ``folder`` is where it lies; None, with ``error``, if it did not arrive.

    One analyzer's failure is recorded and leaves the others alone; a checkpoint that cannot be loaded is
    recorded once.
    """
    store = Store(job.root)
    counts = {"keys_computed": 0, "forward_passes": 0, "failures": 0}
    try:
        if folder is None:
            raise OntogenyError(error or f"{checkpoint.label} did not arrive")
        todo = plan(job, store, checkpoint)
        if todo.missing:
            _measure_folder(job, store, checkpoint, folder, todo, counts)
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
    counts: dict[str, int],
) -> None:
    readers = [item.analyzer for item in todo.missing if isinstance(item.analyzer, ActivationAnalyzer)]
    run = one_pass(job, folder, readers, todo.probe) if readers and todo.probe is not None else None
    counts["forward_passes"] += run is not None
    for item in todo.missing:
        try:
            if isinstance(item.analyzer, ActivationAnalyzer):
                assert run is not None
                result = item.analyzer.measure(run.states, run.model)
            elif isinstance(item.analyzer, WeightAnalyzer):
                result = item.analyzer.measure_weights(open_weights(folder, job.loader))
            else:
                raise TypeError(f"analyzer {item.analyzer.name!r} reads neither activations nor weights")
        except Exception as error:  # one analyzer's fault must not lose the others' results
            record_failure(store, checkpoint, item.analyzer.name, sentence(error))
            counts["failures"] += 1
            continue
        store_result(store, checkpoint, item, result)
        counts["keys_computed"] += 1


@dataclass(frozen=True)
class OnePass:
    """What the one pass over a checkpoint left behind."""

    model: Model
    states: dict[Spec, ReductionState]


def one_pass(job: MeasureJob, folder: Path, readers: list[ActivationAnalyzer], probe: Probe) -> OnePass:
    """Load the model once and run it over the probe once, for all ``readers`` together."""
    model = load_model(folder, job.dtype, job.device, job.loader)
    specs = dict.fromkeys(spec for reader in readers for spec in reader.needs(model))
    return OnePass(model, run_pass(model, batches(torch.from_numpy(probe.tokens), job.batch), specs))


def sentence(error: Exception) -> str:
    """An error in one line; the type's name goes before errors that are not ours."""
    text = first_line(error)
    return text if type(error).__module__.startswith("storage") else f"{type(error).__name__}: {text}"


@task(
    name="measure-checkpoint", task_run_name="{checkpoint.run}/{checkpoint.revision}", cache_policy=NO_CACHE
)
def measure_checkpoint(
    job: MeasureJob, checkpoint: Checkpoint, folder: Path | None, error: str | None = None
) -> State[dict[str, int]]:
    """Task: measure one checkpoint. A failure is a Failed state whose data are the counts."""
    counts = measure(job, checkpoint, folder, error)
    if counts["failures"]:
        return Failed(message=f"{checkpoint.label}: see table failures", data=counts)
    return Completed(data=counts)
