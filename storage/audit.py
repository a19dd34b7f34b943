"""Audit of a catalogue: findings from names, sizes and digests, before any weights are downloaded."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from storage.series import Checkpoint

Severity = Literal["error", "warning", "note"]

# kind -> what it means; docs/audit.md lists the same, and a test compares the two.
KINDS: dict[str, str] = {
    "damaged": "weights are missing, cut short, a shard is absent, or a file is a Git LFS pointer",
    "duplicate-weights": "two steps of a run have the same weights (allowed: steps 0 and 1)",
    "grid-gap": "a step is missing from the regular part of the grid",
    "unparsed-name": "a branch or folder whose name is no checkpoint's",
    "dtype-change": "the stored dtype differs from that of the run's other checkpoints",
    "changed-weights": "the weights under a recorded name are not those recorded earlier",
}


@dataclass(frozen=True)
class Finding:
    """One finding of an audit; ``step`` is None where it is about the run."""

    run: str
    step: int | None
    kind: str
    severity: Severity
    detail: str

    def row(self) -> dict[str, Any]:
        """The finding as a row of the table ``findings``."""
        return {"step": self.step, "kind": self.kind, "severity": self.severity, "detail": self.detail}


def audit(
    checkpoints: Sequence[Checkpoint],
    unparsed: Sequence[str] = (),
    listed: Sequence[Checkpoint] | None = None,
) -> list[Finding]:
    """Findings about a catalogue, in order of run and step.

    ``listed`` are all checkpoints that the source has, where ``checkpoints`` are a choice among them: a step
    that was not chosen is no gap.

    Same weights under steps 0 and 1 are a note: where the first update has learning rate 0 (Pythia) they
    are rightly equal.
    """
    found: list[Finding] = []
    runs: dict[str, list[Checkpoint]] = defaultdict(list)
    for checkpoint in checkpoints:
        runs[checkpoint.run].append(checkpoint)
    steps: dict[str, set[int]] = defaultdict(set)
    for checkpoint in checkpoints if listed is None else listed:
        steps[checkpoint.run].add(checkpoint.step)
    for run, members in runs.items():
        found += _duplicates(run, members)
        found += _gaps(run, sorted(steps[run]))
        found += _dtypes(run, members)
    for label in unparsed:
        run, _, name = label.partition("/")
        found.append(Finding(run, None, "unparsed-name", "note", f"{name!r} was passed over"))
    return sorted(found, key=lambda f: (f.run, -1 if f.step is None else f.step, f.kind))


def _duplicates(run: str, members: Sequence[Checkpoint]) -> list[Finding]:
    by_digest: dict[str, list[Checkpoint]] = defaultdict(list)
    for checkpoint in members:
        if checkpoint.weights_sha256 is not None:
            by_digest[checkpoint.weights_sha256].append(checkpoint)
    found = []
    for same in by_digest.values():
        for first, later in pairwise(sorted(same, key=lambda c: c.step)):
            allowed = (first.step, later.step) == (0, 1)
            severity: Severity = "note" if allowed else "error"
            why = ", as where the first update has learning rate 0" if allowed else ""
            detail = f"weights of step {later.step} are those of step {first.step}{why}"
            found.append(Finding(run, later.step, "duplicate-weights", severity, detail))
    return found


def _gaps(run: str, steps: Sequence[int]) -> list[Finding]:
    """Missing powers of two below the linear part, missing multiples of the usual stride within it."""
    if len(steps) < 4:
        return []
    differences = [b - a for a, b in pairwise(steps)]
    stride, count = Counter(differences).most_common(1)[0]
    missing: list[int] = []
    if count >= 3:
        # The linear part need not lie on multiples of its stride: 1000, 11000, 21000, ...
        offset = next(a for a, b in pairwise(steps) if b - a == stride) % stride
        linear = [step for step in steps if step % stride == offset and step > 0]
        missing += sorted(set(range(linear[0], linear[-1], stride)) - set(steps))
        head = [step for step in steps if 0 < step < linear[0]]
    else:
        head = [step for step in steps if step > 0]
    if len(head) >= 3 and all(step & (step - 1) == 0 for step in head):
        powers = {2**k for k in range(head[0].bit_length() - 1, head[-1].bit_length())}
        missing += sorted(powers - set(steps))
    return [
        Finding(run, step, "grid-gap", "warning", f"no checkpoint at step {step}, where the grid has one")
        for step in sorted(set(missing))
    ]


def _dtypes(run: str, members: Sequence[Checkpoint]) -> list[Finding]:
    kinds = Counter(c.dtype for c in members if c.dtype is not None)
    if len(kinds) < 2:
        return []
    usual = kinds.most_common(1)[0][0]
    return [
        Finding(run, c.step, "dtype-change", "warning", f"stored as {c.dtype}, the run's others as {usual}")
        for c in members
        if c.dtype not in (None, usual)
    ]


def changed(now: Checkpoint, known: Checkpoint | None) -> list[Finding]:
    """A finding if the weights under a recorded name are not the ones recorded."""
    if known is None or None in (known.weights_sha256, now.weights_sha256):
        return []
    if known.weights_sha256 == now.weights_sha256:
        return []
    detail = f"weights were {str(known.weights_sha256)[:12]}, are now {str(now.weights_sha256)[:12]}"
    return [Finding(now.run, now.step, "changed-weights", "warning", detail)]
