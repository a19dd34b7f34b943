"""The states as the phases that a reader asks for: when each is entered, and what changes then."""

from dataclasses import dataclass
from statistics import median

from analyzers.latent.training_map import Stay
from flows.report.data import ReportData, Row
from flows.report.drivers import strongest
from flows.report.text import join, number, tokens


@dataclass(frozen=True)
class Stage:
    """One state: when runs first enter it, which do of how many, and what changes on entry."""

    state: int
    entered: str
    runs: list[str]
    total: int
    changes: list[str]


def stages(data: ReportData, walks: dict[str, list[Stay]]) -> list[Stage]:
    """One row per state that a run visits, in order."""
    found = []
    for state in sorted({stay.state for walk in walks.values() for stay in walk}):
        first = {
            run: stay.first for run, walk in walks.items() for stay in reversed(walk) if stay.state == state
        }
        here = [row for row in strongest(data.drivers) if row["to"] == state]
        origins = sorted({row["from"] for row in here})
        changes = []
        for origin in origins:
            words = join([_change(row) for row in here if row["from"] == origin])
            changes.append(f"coming from {origin}: {words}" if len(origins) > 1 else words)
        found.append(Stage(state, _entered(data, first), sorted(first), len(walks), changes))
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


def _change(row: Row) -> str:
    """``loss falls by 0.75``: the mean of the state entered against that of the state left."""
    shift, unit = row["shift"], ""
    if shift is None:
        shift, unit = row["shift_scaled"], " sd"
    if not shift:
        return f"{row['metric']} stays"
    return f"{row['metric']} {'rises' if shift > 0 else 'falls'} by {abs(shift):.3g}{unit}"
