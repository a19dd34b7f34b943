"""What stands beside the training map, in words and as bands: its null, and simpler ways to cut the runs."""

from statistics import median
from typing import Any

from analyzers.growth import GROWTH_FORM
from analyzers.latent.baselines import CHANGE_POINTS, KMEANS
from analyzers.latent.training_map import Stay
from flows.report.text import number, plural, sentence
from tasks.curves import PHASES_FORM

# Trajectories of one form with a line of their own; more are a range.
_LINES = 4
NAMES = {
    KMEANS: "k-means",
    CHANGE_POINTS: "change points",
    PHASES_FORM: "geometric phases",
    GROWTH_FORM: "growth-curve peak",
}


def null_lines(nulls: list[dict[str, Any]]) -> list[str]:
    """The sentence of the null, then its notes; empty before one was made."""
    return [line for row in nulls for line in [row["sentence"], *map(sentence, row["notes"] or [])]]


def baseline_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Per baseline, its agreement with the states over all runs, as sentences."""
    whole = [row for row in rows if row["run"] is None]
    lines = []
    for baseline, name in NAMES.items():
        mine = [row for row in whole if row["baseline"] == baseline]
        known = sorted(row["ari"] for row in mine if row["ari"] is not None)
        if mine and not known:
            lines.append(f"{name}: no boundary in {plural(len(mine), 'trajectory')}")
        elif len(mine) > _LINES:
            span = f"{known[0]:.2f} to {known[-1]:.2f}, median {median(known):.2f}"
            lines.append(
                f"{name}: {span} ({len(known)} of {plural(len(mine), 'trajectory')} with a boundary)"
            )
        else:
            for row in mine:
                where = f" of {row['trajectory']}" if row["trajectory"] else ""
                ari = "no boundary" if row["ari"] is None else f"{row['ari']:.2f}"
                lines.append(f"{name}{where}: {ari} ({plural(row['runs'], 'run')})")
    return lines


def title(row: dict[str, Any]) -> str:
    """A baseline by name, with its trajectory."""
    name = NAMES.get(row["baseline"], row["baseline"])
    return f"{name}, {row['trajectory']}" if row["trajectory"] else name


def whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows over all runs with their title, those of every run with states first."""
    order = list(NAMES)
    found = [{**row, "title": title(row)} for row in rows if row["run"] is None]
    return sorted(found, key=lambda row: (order.index(row["baseline"]), row["trajectory"] or ""))


def payload(rows: list[dict[str, Any]], walks: dict[str, list[Stay]]) -> list[dict[str, Any]]:
    """Per run the bands that the script draws: the path, then every baseline with a boundary in the run.

    A band is ``[label, step]`` per piece: its label and its first step. A label is a state where ``states``
    is true, and else the number of a piece.
    """
    found = []
    for run, walk in walks.items():
        bands = [{"name": "states", "states": True, "pieces": [[stay.state, stay.first] for stay in walk]}]
        mine = [row for row in rows if row["run"] == run and row["labels"]]
        for row in sorted(
            mine, key=lambda row: (list(NAMES).index(row["baseline"]), row["trajectory"] or "")
        ):
            begin = [walk[0].first, *(row["boundaries"] or [])]
            name = title(row) + (f" ({number(round(row['ari'], 2))})" if row["ari"] is not None else "")
            bands.append(
                {
                    "name": name,
                    "states": row["baseline"] == KMEANS,
                    "pieces": [list(pair) for pair in zip(row["labels"], begin, strict=True)],
                }
            )
        if len(bands) > 1:
            found.append({"run": run, "bands": bands})
    return found
