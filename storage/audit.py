"""Audit of a catalogue: findings from names, sizes and digests, before any weights are downloaded."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from storage.series import Checkpoint

K = TypeVar("K")
Severity = Literal["error", "warning", "note"]

# kind -> what it means; docs/audit.md lists the same, and a test compares the two.
KINDS: dict[str, str] = {
    "damaged": "weights are missing or cut short, or the commit is not there",
    "missing-shard": "weights are in several files, and not all of them are there",
    "lfs-pointer": "a Git LFS pointer stands in place of weights",
    "unreachable": "the Hub did not give the metadata, so nothing is known of the checkpoint; try again",
    "duplicate-weights": "steps of a run have the same weights: at least one is wrong, and metadata do "
    "not say which, so all are errors (notes where `audit.allow_equal` has them: by default steps 0 and 1, "
    "rightly equal where the first update has learning rate 0)",
    "duplicate-shard": "steps of a run share one of several weight files: the same for a part of the weights",
    "grid-gap": "a step is missing from the regular part of the grid",
    "unparsed-name": "a branch or folder whose name is no checkpoint's",
    "disordered-name": "two names mean the same step of the same run; the later one is left out",
    "disordered-tokens": "tokens do not grow with steps",
    "dtype-change": "the stored dtype differs from that of the run's other checkpoints",
    "config-change": "config.json differs from that of the run's other checkpoints",
    "vocabulary-change": "the tokenizer differs from that of the run's other checkpoints: numbers on the "
    "probe are not comparable",
    "changed-weights": "the weights under a recorded name are not those recorded earlier",
}
# Errors that one may decide to live with: the checkpoint can be loaded.
IGNORABLE = ("duplicate-weights", "duplicate-shard")

# Names such as tokens21B are rounded to this, so neighbours may rightly be equal.
_ROUNDED = 10**9
_SHOWN = 5


class AuditConfig(BaseModel):
    """What an audit lets pass."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allow_equal: Annotated[
        tuple[tuple[int, ...], ...], Field(description="groups of steps whose weights are rightly the same")
    ] = ((0, 1),)
    trusted: Annotated[
        tuple[int, ...], Field(description="steps known to be right where others have their weights")
    ] = ()
    ignore: Annotated[
        tuple[str, ...], Field(description=f"errors that exclude nothing: {', '.join(IGNORABLE)}")
    ] = ()
    hub_dtype: Annotated[
        bool, Field(description="read dtypes on the Hub too: one or two small requests per checkpoint")
    ] = False

    @field_validator("ignore")
    @classmethod
    def _ignorable(cls, ignore: tuple[str, ...]) -> tuple[str, ...]:
        for kind in ignore:
            if kind not in IGNORABLE:
                raise ValueError(f"{kind!r} cannot be ignored; what can is {', '.join(IGNORABLE)}")
        return ignore


@dataclass(frozen=True)
class Finding:
    """One finding of an audit; ``step`` and ``revision`` are None where it is about the run."""

    run: str
    step: int | None
    kind: str
    severity: Severity
    detail: str
    revision: str | None = None

    def row(self) -> dict[str, Any]:
        """The finding as a row of the table ``findings``."""
        return {
            "step": self.step,
            "kind": self.kind,
            "severity": self.severity,
            "detail": self.detail,
            "revision": self.revision,
        }


def _about(checkpoint: Checkpoint, kind: str, severity: Severity, detail: str) -> Finding:
    return Finding(checkpoint.run, checkpoint.step, kind, severity, detail, checkpoint.revision)


def undescribed(checkpoint: Checkpoint, kind: str, sentence: str) -> Finding:
    """The finding about a checkpoint that could not be described."""
    return _about(checkpoint, kind, "error", sentence)


def audit(
    checkpoints: Sequence[Checkpoint],
    unparsed: Sequence[str] = (),
    listed: Sequence[Checkpoint] | None = None,
    config: AuditConfig | None = None,
    others: Sequence[Checkpoint] = (),
) -> list[Finding]:
    """Findings about a catalogue, in order of run and step.

    ``listed`` are all checkpoints that the source has, where ``checkpoints`` are a choice among them: a step
    that was not chosen is no gap. ``others`` are described earlier and not chosen now: weights are compared
    with theirs too, and nothing is said about them.
    """
    config = config or AuditConfig()
    every = checkpoints if listed is None else listed
    found: list[Finding] = []
    chosen = {(c.run, c.revision) for c in checkpoints}
    beside = [c for c in others if (c.run, c.revision) not in chosen]
    for run in dict.fromkeys(c.run for c in checkpoints):
        members = [c for c in checkpoints if c.run == run]
        compared = [*members, *(c for c in beside if c.run == run)]
        same = _duplicates(compared, config) + _shards(compared, config)
        found += [f for f in same if (f.run, f.revision) in chosen]
        found += _gaps(run, sorted({c.step for c in every if c.run == run}))
        found += _names(members)
        found += _tokens(members)
        found += _unusual(members, "dtype-change", lambda c: c.dtype, "stored as {}, the run's others as {}")
        found += _unusual(
            members,
            "config-change",
            lambda c: _short(c.config_digest),
            "config.json is {}, that of the run's others {}",
        )
        found += _unusual(
            members,
            "vocabulary-change",
            lambda c: _short(c.tokenizer_digest),
            "tokenizer is {}, that of the run's others {}: numbers on the probe are not comparable",
        )
    for label in unparsed:
        run, _, name = label.partition("/")
        found.append(Finding(run, None, "unparsed-name", "note", f"{name!r} was passed over"))
    return sorted(found, key=lambda f: (f.run, -1 if f.step is None else f.step, f.kind))


def _short(digest: str | None) -> str | None:
    return None if digest is None else digest[:12]


def _duplicates(members: Sequence[Checkpoint], config: AuditConfig) -> list[Finding]:
    groups = _groups((c.weights_sha256, c) for c in members)
    return [f for same in groups.values() for f in _equal(same, same, "duplicate-weights", "weights", config)]


def _shards(members: Sequence[Checkpoint], config: AuditConfig) -> list[Finding]:
    """Single files of several that checkpoints share whose weights as a whole are different."""
    files = [(file, c) for c in members if len(c.files) > 1 for file in c.files if file.sha256 is not None]
    found = []
    for (name, _), same in _groups(((file.name, file.sha256), c) for file, c in files).items():
        for checkpoint in same:
            different = [c for c in same if c.weights_sha256 != checkpoint.weights_sha256]
            sharing = [checkpoint, *different]
            found += _equal([checkpoint], sharing, "duplicate-shard", f"file {name!r}", config)
    return found


def _groups(pairs: Iterable[tuple[K | None, Checkpoint]]) -> dict[K, list[Checkpoint]]:
    """Checkpoints with the same value, where several steps have it."""
    groups: dict[K, list[Checkpoint]] = defaultdict(list)
    for value, checkpoint in pairs:
        if value is not None:
            groups[value].append(checkpoint)
    return {key: group for key, group in groups.items() if len({(c.stage, c.step) for c in group}) > 1}


def _equal(
    members: Sequence[Checkpoint], same: Sequence[Checkpoint], kind: str, what: str, config: AuditConfig
) -> list[Finding]:
    """Findings about those of ``members`` that others of ``same`` equal; the first allowed one has none."""
    steps = {c.step for c in same}
    allowed = any(steps <= set(group) for group in config.allow_equal)
    found = []
    for checkpoint in members:
        rest = sorted({c.step for c in same if (c.stage, c.step) != (checkpoint.stage, checkpoint.step)})
        if not rest or (allowed and checkpoint.step == min(steps)):
            continue
        severity: Severity = "error"
        why = ""
        if allowed:
            severity, why = "note", ", which is allowed"
        elif checkpoint.step in config.trusted:
            severity, why = "note", "; this step is trusted"
        elif kind in config.ignore:
            severity = "warning"
        detail = f"step {checkpoint.step} has the same {what} as {_steps(rest)}{why}"
        found.append(_about(checkpoint, kind, severity, detail))
    return found


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(str(step) for step in steps[:_SHOWN])
    more = f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else ""
    return f"step{'s' if len(steps) > 1 else ''} {shown}{more}"


def _names(members: Sequence[Checkpoint]) -> list[Finding]:
    first: dict[tuple[int | None, int], Checkpoint] = {}
    found = []
    for checkpoint in members:
        earlier = first.setdefault((checkpoint.stage, checkpoint.step), checkpoint)
        if earlier is not checkpoint:
            detail = f"{checkpoint.revision!r} means the step that {earlier.revision!r} means"
            found.append(_about(checkpoint, "disordered-name", "error", detail))
    return found


def _tokens(members: Sequence[Checkpoint]) -> list[Finding]:
    found = []
    for stage in dict.fromkeys(c.stage for c in members):
        known = [c for c in members if c.stage == stage and c.tokens is not None]
        for before, now in pairwise(sorted(known, key=lambda c: c.step)):
            assert before.tokens is not None
            assert now.tokens is not None
            rounded = before.tokens % _ROUNDED == now.tokens % _ROUNDED == 0
            if before.step == now.step or now.tokens > before.tokens:
                continue
            if now.tokens == before.tokens and rounded:
                continue
            detail = f"{now.tokens} tokens at step {now.step}, {before.tokens} at step {before.step}"
            found.append(_about(now, "disordered-tokens", "warning", detail))
    return found


def _unusual(
    members: Sequence[Checkpoint], kind: str, value_of: Callable[[Checkpoint], str | None], detail: str
) -> list[Finding]:
    """Warnings about checkpoints whose value is not the one that most of the run have."""
    values = Counter(value for c in members if (value := value_of(c)) is not None)
    if len(values) < 2:
        return []
    usual = values.most_common(1)[0][0]
    return [
        _about(c, kind, "warning", detail.format(value_of(c), usual))
        for c in members
        if value_of(c) not in (None, usual)
    ]


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


def changed(now: Checkpoint, known: Checkpoint | None) -> list[Finding]:
    """A finding if the weights under a recorded name are not the ones recorded."""
    if known is None or None in (known.weights_sha256, now.weights_sha256):
        return []
    if known.weights_sha256 == now.weights_sha256:
        return []
    detail = f"weights were {str(known.weights_sha256)[:12]}, are now {str(now.weights_sha256)[:12]}"
    return [_about(now, "changed-weights", "warning", detail)]
