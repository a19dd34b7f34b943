"""What drives the transitions of a training map, in words."""

from typing import Any

from flows.report.text import number

# Metrics named per transition.
TOP = 3
# Nats per standard deviation: a lower score is rounding beside a log probability that no one metric moves.
LEAST = 1e-3
NONE = f"0 (below {LEAST})"


def driver_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Per transition, the metrics with the highest scores and their shifts; ``rows`` of the table drivers."""
    edges: dict[tuple[int, int], list[str]] = {}
    for row in strongest(rows):
        edges.setdefault((row["from"], row["to"]), []).append(
            f"{row['metric']} {shift(row)} (score {row['score']:.2g})"
            if told(row)
            else f"{row['metric']} {shift(row)} (score {NONE})"
        )
    return [f"{left} -> {entered}: {', '.join(words)}" for (left, entered), words in edges.items()]


def strongest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows over all runs with the highest scores of each transition, in order of transition and score.

    Where scores cannot be told from 0, their order is that of the shifts.
    """
    ranked = [row for row in rows if row["run"] is None and row["rank"] is not None]
    ranked.sort(key=lambda row: (row["from"], row["to"], not told(row), _weight(row), row["rank"]))
    found: list[dict[str, Any]] = []
    for row in ranked:
        edge = (row["from"], row["to"])
        if sum((each["from"], each["to"]) == edge for each in found) < TOP:
            found.append(row)
    return found


def told(row: dict[str, Any]) -> bool:
    """Whether the score can be told from 0."""
    return row["score"] is not None and row["score"] >= LEAST


def _weight(row: dict[str, Any]) -> float:
    return -float(row["score"]) if told(row) else -abs(row["shift_scaled"] or 0.0)


def score(row: dict[str, Any]) -> str:
    """The score of a row for reading."""
    return number(row["score"]) if told(row) else NONE


def shift(row: dict[str, Any]) -> str:
    """The signed change of a state's mean, in the metric's unit or, without one, in standard deviations."""
    if row["shift"] is None:
        return f"{row['shift_scaled']:+.3g} sd"
    return f"{row['shift']:+.4g}"
