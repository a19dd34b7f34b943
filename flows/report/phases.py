"""What the phase finder says: where collapse and expansion end, and whether compression is seen."""

import math
from dataclasses import dataclass

from flows.report.data import ReportData, Row
from flows.report.text import ABSENT, join, number, plural, tokens
from storage.store import column_name
from tasks.curves import PHASES_FORM

ALL_RUNS = "all runs"
_BOUNDED = ("collapse", "expansion")
_PHASES = (*_BOUNDED, "compression")


@dataclass(frozen=True)
class End:
    """Where a phase ends: step, interval and tokens (None where unknown)."""

    step: int
    low: int
    high: int
    tokens: int | None


@dataclass(frozen=True)
class PhaseRow:
    """One run, or all runs, at one place. ``changes`` are of ln(value): (seen, change, low, high)."""

    run: str
    pooled: bool
    shape: str
    ends: dict[str, End]
    changes: dict[str, tuple[bool, float, float, float]]
    seen_by: dict[str, int]
    judged: int
    noise: float | None
    threshold: float | None
    note: str | None

    def seen(self, phase: str) -> bool:
        """Whether the phase is seen."""
        return phase in self.changes and self.changes[phase][0]

    def end_text(self, phase: str) -> str:
        """Step and interval of the end of a phase, or why there is none."""
        if phase in self.ends:
            end = self.ends[phase]
            return f"{number(end.step)} ({number(end.low)} to {number(end.high)})"
        return "no end" if self.seen(phase) else "not seen"

    def change_text(self, phase: str) -> str:
        """Change of a phase in per cent with its interval, or that it is not seen.

        Of a phase that is not seen the interval says how large it could be; over runs without any trace of it
        that interval would be empty, which says nothing.
        """
        if phase not in self.changes:
            return ABSENT
        seen, *changes = self.changes[phase]
        change, low, high = (_per_cent(x) if x < 5 else f"x{math.exp(x):.0f}" for x in changes)
        if seen:
            return f"{change} ({low} to {high})"
        return "not seen" if low == high else f"not seen (within {low} to {high})"


@dataclass(frozen=True)
class PhasePlace:
    """One trajectory in which phases were looked for; ``rows`` are its runs, and all runs last."""

    name: str
    metric: str
    site: str | None
    layer: int | None
    head: int | None
    rows: list[PhaseRow]

    @property
    def noted(self) -> bool:
        """Whether a row carries a note."""
        return any(row.note for row in self.rows)

    @property
    def pooled(self) -> PhaseRow | None:
        """The row of all runs."""
        return next((row for row in self.rows if row.pooled), None)


def places(data: ReportData) -> list[PhasePlace]:
    """The places in which phases were looked for: sites outside the blocks last, layers in order."""
    found: dict[tuple[str, str | None, int | None, int | None], list[Row]] = {}
    for row in data.curves:
        if row["form"] == PHASES_FORM:
            place = (row["metric"], row["site"], row["layer"], row["head"])
            found.setdefault(place, []).append(row)
    order = sorted(found, key=lambda p: (p[0], p[2] is None, p[1] or "", p[2] or 0))
    return [
        PhasePlace(
            column_name(*place),
            *place,
            [_row(row) for row in sorted(found[place], key=lambda r: (r["run"] is None, r["run"] or ""))],
        )
        for place in order
    ]


def _row(row: Row) -> PhaseRow:
    numbers, intervals = row["parameters"], row["intervals"]
    ends, changes = {}, {}
    for phase in _PHASES:
        if f"{phase}_change" in numbers:
            span = intervals[f"{phase}_change"]
            seen = bool(numbers[f"{phase}_seen"])
            changes[phase] = (seen, numbers[f"{phase}_change"], span["low"], span["high"])
        if f"{phase}_end_step" in numbers:
            span = intervals[f"{phase}_end_step"]
            count = numbers.get(f"{phase}_end_tokens")
            steps = (int(numbers[f"{phase}_end_step"]), int(span["low"]), int(span["high"]))
            ends[phase] = End(*steps, None if count is None else int(count))
    return PhaseRow(
        run=ALL_RUNS if row["run"] is None else row["run"],
        pooled=row["run"] is None,
        shape=row["class"] or "not judged",
        ends=ends,
        changes=changes,
        seen_by={phase: int(numbers.get(f"{phase}_runs", 0)) for phase in _PHASES},
        judged=int(numbers.get("runs_judged", 0)),
        noise=numbers.get("noise"),
        threshold=numbers.get("threshold"),
        note=row["note"],
    )


def _per_cent(change: float) -> str:
    """A change of ln(value) in per cent; one that rounds to 0 has no sign."""
    share = f"{math.expm1(change):+.0%}"
    return "0%" if share in ("+0%", "-0%") else share


def describe(place: PhasePlace) -> list[str]:
    """Sentences on what all runs together show at one place."""
    pooled = place.pooled
    if pooled is None or not pooled.judged:
        return [f"{place.name}: too few checkpoints to look for phases."]
    sentences = []
    for phase in _PHASES:
        who = f"{pooled.seen_by[phase]} of {plural(pooled.judged, 'run')}"
        if not pooled.seen(phase):
            sentences.append(f"{phase.capitalize()} is not seen ({who}).")
            continue
        change = _per_cent(pooled.changes[phase][1])
        said = f"{phase.capitalize()} is seen in {who} ({change})"
        if phase in pooled.ends:
            end = pooled.ends[phase]
            after = "" if end.tokens is None else f"; {tokens(end.tokens)} tokens"
            span = f"between {number(end.low)} and {number(end.high)}"
            said += f" and ends at step {number(end.step)} ({span}{after})"
        elif phase in _BOUNDED:
            said += ", and its end is not"
        sentences.append(f"{said}.")
    return sentences


def headline(place: PhasePlace) -> str:
    """The phases that all runs together show, in a few words."""
    pooled = place.pooled
    seen = [] if pooled is None else [phase for phase in _PHASES if pooled.seen(phase)]
    return join(seen).capitalize() if seen else "None seen"


def payload(data: ReportData, found: list[PhasePlace]) -> list[dict[str, object]]:
    """What the script draws: per place the index of its trajectory and the ends with their intervals.

    The index is None where the store no longer shows the trajectory.
    """
    index = {(t.metric, t.site, t.layer, t.head): i for i, t in enumerate(data.trajectories)}
    return [
        {
            "trajectory": index.get((place.metric, place.site, place.layer, place.head)),
            "rows": [
                {
                    "run": row.run,
                    "pooled": row.pooled,
                    "ends": {name: [end.step, end.low, end.high] for name, end in row.ends.items()},
                }
                for row in place.rows
            ],
        }
        for place in found
    ]
