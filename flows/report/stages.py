"""The states as the phases that a reader asks for: when each begins, and what changes then."""

from dataclasses import dataclass
from statistics import median

from analyzers.latent.training_map import Stay
from flows.report.data import ReportData, Row
from flows.report.drivers import TOP
from flows.report.text import number, tokens
from flows.report.words import in_words


@dataclass(frozen=True)
class Change:
    """What one metric does on entry: its name in plain words (None: there are none), and its move."""

    metric: str
    plain: str | None
    move: str
    origin: int | None


@dataclass(frozen=True)
class Stage:
    """One state: when runs first enter it, which do of how many, and what changes on entry.

    ``step`` is the median over runs. A change names the state left where runs come from several.
    """

    state: int
    step: int
    entered: str
    runs: list[str]
    total: int
    changes: list[Change]


def stages(data: ReportData, walks: dict[str, list[Stay]]) -> list[Stage]:
    """One row per state that a run visits, in order."""
    means = {(row["state"], row["metric"]): row["mean"] for row in data.state_means}
    found = []
    for state in sorted({stay.state for walk in walks.values() for stay in walk}):
        first = {
            run: stay.first for run, walk in walks.items() for stay in reversed(walk) if stay.state == state
        }
        here = [row for row in data.drivers if row["to"] == state and row["run"] is None]
        origins = sorted({row["from"] for row in here})
        changes = [
            Change(
                row["metric"],
                in_words(row["metric"]),
                _move(row, means),
                origin if len(origins) > 1 else None,
            )
            for origin in origins
            for row in _farthest([row for row in here if row["from"] == origin])
        ]
        step = round(median(first.values()))
        found.append(Stage(state, step, _entered(data, first), sorted(first), len(walks), changes))
    return found


def _entered(data: ReportData, first: dict[str, int]) -> str:
    steps = sorted(first.values())
    if steps[0] == steps[-1]:
        text = f"step {number(steps[0])}"
    else:
        text = f"step {number(round(median(steps)))} ({number(steps[0])} to {number(steps[-1])})"
    counts = [run.tokens[run.steps.index(first[run.name])] for run in data.runs if run.name in first]
    known = [count for count in counts if count]
    return f"{text}, {tokens(round(median(known)))} tokens" if len(known) == len(counts) else text


def _farthest(rows: list[Row]) -> list[Row]:
    """The metrics whose means move most; scores do not say that, where the model is sure they are all 0."""
    return sorted(rows, key=lambda row: -abs(row["shift_scaled"] or 0))[:TOP]


def _move(row: Row, means: dict[tuple[int, str], float | None]) -> str:
    """``falls from 7.2 to 6.45``: the mean of the state left, and that of the state entered."""
    before, after = means.get((row["from"], row["metric"])), means.get((row["to"], row["metric"]))
    shift, unit = row["shift"], ""
    if shift is None:
        shift, unit = row["shift_scaled"], " standard deviations"
    if not shift:
        return "stays"
    verb = "rises" if shift > 0 else "falls"
    if before is not None and after is not None:
        return f"{verb} from {before:.3g} to {after:.3g}"
    return f"{verb} by {abs(shift):.3g}{unit}"
