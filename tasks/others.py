"""What each checkpoint is compared with: the run's first and last as listed, the previous one measured."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from analyzers.base import Analyzer, Reference
from storage.errors import OntogenyError
from storage.series import Checkpoint, DirSource, HubSource
from storage.sources import describe, record, recorded
from storage.store import Store
from tasks.catalogue import Catalogue

Others = Mapping[str, Mapping[Reference, Checkpoint]]


def wanted(analyzers: Iterable[Analyzer]) -> set[Reference]:
    """All that any of them compares with."""
    return {name for analyzer in analyzers for name in analyzer.against}


def others_of(
    store: Store, found: Catalogue, source: HubSource | DirSource, names: set[Reference]
) -> dict[str, dict[Reference, Checkpoint]]:
    """By label of each sound checkpoint, those of ``names`` that there are.

    The run's first and last are those of the whole listing, chosen or not, so that a distance from
    initialisation is one; where the audit excludes one, or it cannot be described, nothing is compared with
    it. The first checkpoint measured has no previous one.
    """
    result: dict[str, dict[Reference, Checkpoint]] = {c.label: {} for c in found.sound}
    if not names:
        return result
    listed = by_run(found.listed)
    for run, chosen in by_run(found.sound).items():
        ends: dict[Reference, Checkpoint | None] = {}
        for name, end in (("first", listed[run][0]), ("last", listed[run][-1])):
            if name in names:
                ends[name] = _described(store, found, source, end)
        for checkpoint in chosen:
            result[checkpoint.label] |= {name: end for name, end in ends.items() if end is not None}
        if "previous" in names:
            for before, after in pairwise(chosen):
                result[after.label]["previous"] = before
    return result


def by_run(checkpoints: Sequence[Checkpoint]) -> dict[str, list[Checkpoint]]:
    """Checkpoints of each run in order of stage and step."""
    runs: dict[str, list[Checkpoint]] = {}
    for checkpoint in sorted(checkpoints, key=lambda c: (c.stage or 0, c.step)):
        runs.setdefault(checkpoint.run, []).append(checkpoint)
    return runs


def _described(
    store: Store, found: Catalogue, source: HubSource | DirSource, checkpoint: Checkpoint
) -> Checkpoint | None:
    for known in found.checkpoints:
        if known.label == checkpoint.label:
            return None if known.label in found.reasons else known
    before = recorded(store, checkpoint.series).get((checkpoint.run, checkpoint.revision))
    try:
        described = describe(checkpoint, before, weights=source.weights)
    except OntogenyError:
        return None
    if described != before:
        record(store, described)
    return described if described.weights_sha256 is not None else None
