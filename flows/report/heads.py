"""Births of heads: table of the heads seen, and what the script draws as a map of heads by steps."""

from dataclasses import dataclass

from analyzers.head_births import HEAD_KINDS, HEADS_FORM, NOT_SEEN
from flows.report.data import ReportData, Row
from flows.report.text import ABSENT, few, number

# Rows of one map: born heads first, then those of the highest scores.
_MOST_ROWS = 48


@dataclass(frozen=True)
class HeadRow:
    """One head of a run that was seen to be born."""

    kind: str
    run: str
    layer: int
    head: int
    birth: str
    highest: float | None
    last: float | None


@dataclass(frozen=True)
class HeadMap:
    """One kind of heads in one run."""

    name: str
    kind: str
    run: str
    sentence: str
    rows: list[HeadRow]
    shown: list[Row]
    threshold: float | None

    @property
    def highest(self) -> float | None:
        """The highest score that a head of the run ever has."""
        scores = [row["parameters"].get("highest") for row in self.shown]
        return max((score for score in scores if score is not None), default=None)


def maps(data: ReportData) -> list[HeadMap]:
    """Kinds in their order, within one its runs by name."""
    rows = [row for row in data.curves if row["form"] == HEADS_FORM and row["run"] is not None]
    found = []
    for metric, (kind, _) in HEAD_KINDS.items():
        for run in sorted({row["run"] for row in rows if row["metric"] == metric}):
            mine = [row for row in rows if (row["metric"], row["run"]) == (metric, run)]
            found.append(_map(kind, run, mine))
    return found


def _map(kind: str, run: str, rows: list[Row]) -> HeadMap:
    total = next((row for row in rows if row["head"] is None), None)
    heads = [row for row in rows if row["head"] is not None]
    heads.sort(key=_order)
    born = [row for row in heads if row["peak_step"] is not None]
    return HeadMap(
        name=f"{kind} heads, {run}",
        kind=kind,
        run=run,
        sentence="not judged" if total is None else describe(kind, total),
        rows=[
            HeadRow(
                kind,
                run,
                row["layer"],
                row["head"],
                _birth(row),
                row["parameters"].get("highest"),
                row["parameters"].get("last"),
            )
            for row in born
        ],
        shown=heads[:_MOST_ROWS],
        threshold=None if total is None else total["parameters"].get("threshold"),
    )


def _order(row: Row) -> tuple[bool, int, float, int, int]:
    step = row["peak_step"]
    return step is None, step or 0, -row["parameters"].get("highest", 0.0), row["layer"], row["head"]


def describe(kind: str, total: Row) -> str:
    """How many heads, and when the first was born: ``induction heads: 3, first at step 512 (after 256)``."""
    if total["class"] == NOT_SEEN:
        return f"{kind} heads: not seen"
    return f"{kind} heads: {number(total['parameters']['heads'])}, first at step {_birth(total)}"


def lines(found: list[HeadMap]) -> list[str]:
    """What was seen, run by run; runs without such heads share one sentence, with how near they came."""
    said = []
    for kind in dict.fromkeys(part.kind for part in found):
        mine = [part for part in found if part.kind == kind]
        unseen = [part for part in mine if not part.rows and part.highest is not None]
        said += [f"{part.run}: {part.sentence}." for part in mine if part not in unseen]
        if unseen:
            near = max(part.highest for part in unseen if part.highest is not None)
            said.append(
                f"{few([part.run for part in unseen])}: {kind} heads: not seen; the highest score is "
                f"{near:.2g}, and a head is born at {number(unseen[0].threshold)}."
            )
    return said


def _birth(row: Row) -> str:
    if row["peak_step"] is None:
        return ABSENT
    low = (row["intervals"].get("birth_step") or {}).get("low")
    before = "there from the first checkpoint on" if low is None else f"after {number(round(low))}"
    return f"{number(row['peak_step'])} ({before})"


def payload(data: ReportData, found: list[HeadMap]) -> list[dict[str, object]]:
    """Per map its run, and per row of it a trajectory (None: not on this page) and the step of the birth."""
    index = {(t.metric, t.layer, t.head): i for i, t in enumerate(data.trajectories) if t.head is not None}
    highest: dict[str, float] = {}
    for part in found:
        highest[part.kind] = max(highest.get(part.kind, 0.0), part.highest or 0.0)
    return [
        {
            "run": part.run,
            "kind": part.kind,
            "threshold": part.threshold,
            "highest": highest[part.kind],
            "rows": [
                {"trajectory": at, "birth": row["peak_step"]}
                for row in part.shown
                if (at := index.get((row["metric"], row["layer"], row["head"]))) is not None
            ],
        }
        for part in found
    ]
