"""The harvest: a pool of activations is filled while a series is measured (docs/harvest.md).

A snapshot shares the pass over the probe; a probe of the pool's own costs a pass of its own; rows of W_U or
W_E cost none. The pool says what is done: a snapshot that is there is not harvested again.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from analyzers.base import ModelShape, TokenSource
from analyzers.harvest import Harvest, HarvestSpec, Sink, TokenChoice, choose
from storage.errors import OntogenyError, UsageError
from storage.pool import POOL_SCHEMA, PoolInfo, has_snapshot, held_bytes, pools_folder, snapshot_name
from storage.pool_writer import SnapshotWriter, create_pool
from storage.probe import Probe
from storage.series import Checkpoint, StepSelection
from storage.shelf import DiskBudget
from storage.sources import tokenizer_folder
from tasks.job import SITES_OF_BLOCKS, SNAPSHOTS, HarvestJob, MeasureJob
from tasks.models import probe_of, sizes_of, vocabulary_rows
from tasks.others import by_run
from tasks.passes import Passes

_FLOAT16 = 2
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class ProbeTokens:
    """The sequences of a probe as tokens of the harvest's own; equal where their digests are."""

    digest: str
    probe: Probe = field(compare=False, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """Number of sequences and their length."""
        return self.probe.tokens.shape[0], self.probe.tokens.shape[1]

    def draw(self, shape: ModelShape) -> Int64[Tensor, "sequences length"]:
        """The tokens, whatever the model."""
        return torch.from_numpy(self.probe.tokens)


@dataclass(frozen=True)
class PlannedSnapshot:
    """A snapshot that the pool lacks.

    ``probe`` are the sequences that rows are tokens of; None where they are vocabulary items. ``source`` is
    None where those are the probe of measuring: the harvest then shares its pass. ``width`` is None where
    only the loaded model knows it.
    """

    info: PoolInfo
    choice: TokenChoice
    site: str
    layer: int | None
    width: int | None
    probe: Probe | None
    vocabulary: int = 0
    source: TokenSource | None = None

    @property
    def bytes(self) -> int | None:
        """Bytes of its shards."""
        return None if self.width is None else self.info.rows * self.width * _FLOAT16

    @property
    def reads_pass(self) -> bool:
        """Whether it reads a forward pass."""
        return self.probe is not None

    @cached_property
    def tokens(self) -> Int64[Tensor, "rows 3"]:
        """(sequence, position, token id) of every row; -1, -1, id of vocabulary items."""
        if self.probe is not None:
            return self.choice.tokens(torch.from_numpy(self.probe.tokens))
        (ids,) = self.choice.mask(torch.zeros(1, dtype=torch.int64), self.vocabulary)[0].nonzero(
            as_tuple=True
        )
        return torch.stack([torch.full_like(ids, -1), torch.full_like(ids, -1), ids], dim=1)


def even_choice(steps: Iterable[int], at_most: int = SNAPSHOTS) -> list[int]:
    """At most ``at_most`` of ``steps``, evenly over ``log(step + 1)``: the first and the last, and then again
    and again the one that is farthest from all those chosen (the earlier of two).
    """
    left = sorted(set(steps))
    if len(left) <= at_most:
        return left
    tau = np.log1p(np.array(left, dtype=np.float64))
    distance = np.abs(tau - tau[0])
    chosen = {0}
    while len(chosen) < at_most:
        farthest = int(np.argmax(distance))
        chosen.add(farthest)
        distance = np.minimum(distance, np.abs(tau - tau[farthest]))
    return [left[i] for i in sorted(chosen)]


def chosen_snapshots(
    listed: Sequence[Checkpoint], steps: str | None, runs: Sequence[str] | None
) -> frozenset[str]:
    """Labels of the checkpoints that a pool holds, of all that the source lists.

    So that measuring a series in parts chooses the same. ``steps`` None: an even choice in every run.

    Raises:
        UsageError: ``steps`` names a step, or ``runs`` a run, that the series lacks.
    """
    there = {c.run for c in listed}
    for run in runs or ():
        if run not in there:
            raise UsageError(
                f"crosscoder.runs: there is no run {run!r}; there are {', '.join(sorted(there))}"
            )
    members = [c for c in listed if runs is None or c.run in runs]
    if steps is not None:
        return frozenset(c.label for c in StepSelection.parse(steps).select(members))
    labels = set()
    for checkpoints in by_run(members).values():
        kept = set(even_choice(c.step for c in checkpoints))
        labels |= {c.label for c in checkpoints if c.step in kept}
    return frozenset(labels)


def plan_snapshot(job: MeasureJob, checkpoint: Checkpoint, probe: Probe | None) -> PlannedSnapshot | None:
    """The checkpoint's snapshot if the job asks for it and the pool lacks it.

    ``probe`` is the probe of measuring, if any analyzer reads it.

    Raises:
        UsageError: the configuration cannot be met, as more tokens than the probe has.
        DamagedCheckpointError, UnknownFamilyError: the sizes of the model are not to be found out.
    """
    harvest = job.harvest
    if harvest is None or checkpoint.label not in harvest.chosen or checkpoint.weights_sha256 is None:
        return None
    planned = snapshot_of(job, harvest, checkpoint, probe)
    name = snapshot_name(checkpoint.revision, checkpoint.weights_sha256)
    return None if has_snapshot(job.root, planned.info.key, name) else planned


def snapshot_of(
    job: MeasureJob, harvest: HarvestJob, checkpoint: Checkpoint, probe: Probe | None = None
) -> PlannedSnapshot:
    """The checkpoint's snapshot, whether the pool has it or not; raises as :func:`plan_snapshot`."""
    folder = tokenizer_folder(checkpoint, job.scratch)
    if harvest.mode != "activations":
        return _of_vocabulary(job, harvest, checkpoint, folder)
    return _of_probe(job, harvest, checkpoint, folder, probe)


def _of_vocabulary(
    job: MeasureJob, harvest: HarvestJob, checkpoint: Checkpoint, folder: Path
) -> PlannedSnapshot:
    if job.loader is not None:
        raise UsageError(
            f"crosscoder.mode {harvest.mode!r} reads the files of models of transformers; "
            "with source.loader there are activations only"
        )
    sizes = sizes_of(folder)
    choice = _choice(harvest, 1, sizes.vocabulary, first=0)
    info = PoolInfo(
        series=checkpoint.series,
        run=checkpoint.run,
        protocol={
            "mode": harvest.mode,
            "vocabulary": sizes.vocabulary,
            "tokens": harvest.tokens,
            "seed": harvest.seed,
            "dtype": "stored",
            "schema": POOL_SCHEMA,
        },
        rows=harvest.tokens or sizes.vocabulary,
    )
    return PlannedSnapshot(info, choice, harvest.mode, None, sizes.width, None, sizes.vocabulary)


def _of_probe(
    job: MeasureJob, harvest: HarvestJob, checkpoint: Checkpoint, folder: Path, measured: Probe | None
) -> PlannedSnapshot:
    layer, width = harvest.layer, None
    blocks = harvest.site in SITES_OF_BLOCKS
    if job.loader is None:
        sizes = sizes_of(folder)
        width = sizes.width
        if blocks and layer is None:
            layer = sizes.layers // 2
        if layer is not None and layer >= sizes.layers:
            raise UsageError(f"crosscoder.layer is {layer}, and {checkpoint.label} has {sizes.layers} blocks")
    elif blocks and layer is None:
        raise UsageError("crosscoder.layer must be given with source.loader: its files do not say how many")
    probe = probe_of(folder, harvest.probe or job.probe, job.root)
    source = None
    if measured is None or probe.digest != measured.digest:
        source = ProbeTokens(probe.digest, probe)
    choice = _choice(harvest, probe.tokens.shape[0], probe.tokens.shape[1], first=1)
    info = PoolInfo(
        series=checkpoint.series,
        run=checkpoint.run,
        protocol={
            "mode": harvest.mode,
            "site": harvest.site,
            "layer": layer,
            "probe": probe.describe(),
            "tokens": harvest.tokens,
            "seed": harvest.seed,
            "first": choice.first,
            "dtype": job.dtype,
            "schema": POOL_SCHEMA,
            **({} if job.loader is None else {"loader": job.loader}),
        },
        rows=harvest.tokens or math.prod(probe.tokens.shape) - len(probe.tokens),
    )
    return PlannedSnapshot(info, choice, harvest.site, layer, width, probe, source=source)


def _choice(harvest: HarvestJob, sequences: int, length: int, first: int) -> TokenChoice:
    try:
        return choose(sequences, length, harvest.tokens, harvest.seed, first)
    except ValueError as error:
        raise UsageError(f"crosscoder.tokens: {error}") from None


def check_room(root: str, series: str, planned: Sequence[PlannedSnapshot], budget: int | None) -> int:
    """Bytes of the series' pools, those there and those planned.

    Raises:
        UsageError: they are more than the budget, or what is new is more than the disk has free.
    """
    new, held = sum(item.bytes or 0 for item in planned), held_bytes(root, series)
    if planned:
        label = f"the harvest of {len(planned)} snapshots"
        try:
            DiskBudget(budget, pools_folder(root).parent, "the pools of the series", held).reserve(new, label)
        except OntogenyError as error:
            raise UsageError(
                f"{error}; take fewer crosscoder.tokens or crosscoder.steps, or more measure.disk_gb"
            ) from None
    return new + held


class Harvesting:
    """The harvest of one checkpoint: :attr:`reader` joins the passes, :meth:`store` completes the snapshot.

    Raises:
        OntogenyError: it does not fit into the disk budget.
    """

    def __init__(self, job: MeasureJob, checkpoint: Checkpoint, planned: PlannedSnapshot) -> None:
        assert job.harvest is not None
        self._planned, self._checkpoint = planned, checkpoint
        self._budget = DiskBudget(
            job.harvest.budget,
            pools_folder(job.root).parent,
            "the pools of the series",
            held_bytes(job.root, checkpoint.series),
        )
        self._reserved = planned.width is not None
        if planned.bytes is not None:
            self._reserve(planned.bytes)
        sequences = None if planned.probe is None else planned.probe.tokens
        create_pool(job.root, planned.info, planned.tokens.numpy(), sequences)
        self._writer = SnapshotWriter(job.root, planned.info, checkpoint)
        self.reader: Harvest | None = None
        if planned.reads_pass:
            spec = HarvestSpec(planned.site, planned.layer, planned.choice, self._sink)
            self.reader = Harvest(spec, planned.source)

    def store(self, folder: Path, passes: Passes) -> None:
        """Complete the snapshot from the pass, or from the files of ``folder``.

        Raises:
            OntogenyError: the model lacks the site, a value does not fit into float16, or the disk is full.
        """
        try:
            if self.reader is not None:
                found = passes.of(self.reader, self._checkpoint, folder)
                found.check(self.reader)
                if self.reader.beyond(found.shape):
                    raise OntogenyError(f"the model has no block {self._planned.layer}")
                state = found.states[self.reader.spec]
                state.finish()  # type: ignore[attr-defined]
            else:
                self._read(folder)
            self._writer.finish(self._planned.site, self._planned.layer)
        finally:
            self._writer.discard()

    def discard(self) -> None:
        """Delete what was written of a snapshot that will not be completed."""
        self._writer.discard()

    def _reserve(self, size: int) -> None:
        self._budget.reserve(size, f"the pool's snapshot of {self._checkpoint.label}")

    @property
    def _sink(self) -> Sink:
        def sink(values: np.ndarray, tokens: np.ndarray) -> None:
            if not self._reserved:  # a model of one's own: its width is known now, before the first row
                self._reserve(self._planned.info.rows * values.shape[1] * _FLOAT16)
                self._reserved = True
            self._writer.write(values, tokens)

        return sink

    def _read(self, folder: Path) -> None:
        tokens, first = self._planned.tokens, 0
        for rows in vocabulary_rows(folder, self._planned.site == "unembedding", _CHUNK_ROWS):
            here = tokens[(tokens[:, 2] >= first) & (tokens[:, 2] < first + len(rows))]
            self._writer.write(rows[here[:, 2] - first].float().numpy(), here.numpy())
            first += len(rows)
        if first != self._planned.vocabulary:
            raise OntogenyError(
                f"{folder.name}: the matrix has {first} rows, the configuration {self._planned.vocabulary}"
            )
