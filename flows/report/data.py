"""Everything the page shows, collected from the tables of one series."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from analyzers.head_births import HEADS_FORM
from flows.report.crowding import thinned
from storage import Store, UsageError
from storage.store import column_name
from tasks.training_log import ANALYZER
from tasks.trajectories import select_trajectories

Row = dict[str, Any]
_PLACE = ["analyzer", "metric", "site", "layer", "head"]
_TEXTS = ("analyzer", "metric", "site", "run", "note", "protocol")
_COLUMNS = [*_PLACE, "run", "step", "tokens", "value", "n", "note", "protocol", "recorded_at"]
_SEVERITIES = ("error", "warning", "note")
# Names of reduced trajectories: ``metric[site.mean]``, ``metric[site.2.max]``.
_OVER = re.compile(
    r"(?P<metric>[^\[]+)\[(?P<site>[\w.]+?)\.(?P<over>(?:(?:\d+|last)\.)?(?:mean|min|max)(?:\.(?:mean|min|max))?)\]"
)
# Values of single heads that a page still shows, about 2 MB: it is to stay small enough to mail.
_MOST_HEAD_VALUES = 200_000


@dataclass(frozen=True)
class Run:
    """One run on its own grid of steps; ``states`` is None where no state was decoded."""

    name: str
    steps: list[int]
    tokens: list[int | None]
    states: list[int | None]
    posteriors: list[float | None]


@dataclass(frozen=True)
class Trajectory:
    """One metric at one place; ``values`` holds one list per run, None where the run lacks it entirely.

    ``over`` is how a state model reduced layers or heads (``mean``), None at a single place.
    """

    analyzer: str
    metric: str
    site: str | None
    layer: int | None
    head: int | None
    n: tuple[int, int] | None
    values: list[list[float | None] | None]
    over: str | None = None

    @property
    def name(self) -> str:
        """Name as in state models: ``rankme_cov[resid_post.3]``."""
        if self.over is not None:
            return f"{self.metric}[{self.site}.{self.over}]"
        return column_name(self.metric, self.site, self.layer, self.head)


@dataclass(frozen=True)
class Protocol:
    """How an analyzer measured some of the runs."""

    analyzer: str
    runs: list[str]
    fields: dict[str, Any]


@dataclass(frozen=True)
class ReportData:
    """The tables of one series in the shape the page needs."""

    series: str
    runs: list[Run]
    trajectories: list[Trajectory]
    reduced: list[Trajectory]
    heads_left_out: bool
    layers_left_out: bool
    measured: set[tuple[str, int, str]]
    protocols: list[Protocol]
    noted: list[Row]
    rows: int
    checkpoints: list[Row]
    audited: bool
    findings: list[Row]
    failures: list[Row]
    curves: list[Row]
    models: list[Row]
    transitions: list[Row]
    boundaries: list[Row]
    state_means: list[Row]
    drivers: list[Row]
    outcomes: list[Row]
    nulls: list[Row]
    baselines: list[Row]
    provenance: list[Row]
    as_of: datetime | None

    @property
    def shown(self) -> list[Trajectory]:
        """What the page plots: single places, then means over layers that states were fitted to."""
        return [*self.trajectories, *self.reduced]

    @property
    def chosen(self) -> Row | None:
        """The state model whose states are shown, None before the first fit."""
        return next((row for row in self.models if row["chosen"]), None)

    @property
    def refits(self) -> int:
        """Refits of the chosen model to resampled runs that kept all states; 0 where there is none."""
        return int((self.chosen or {}).get("bootstrap_refits") or 0)

    @property
    def measured_checkpoints(self) -> set[tuple[str, int]]:
        """Run and step of every checkpoint that at least one analyzer measured."""
        return {(run, step) for run, step, _ in self.measured}


def collect(store: Store, series: str) -> ReportData:
    """Read the tables of ``series``.

    Raises:
        UsageError: the store holds no table of ``series``.
    """
    known = store.series()
    if series not in known:
        holds = f"it holds {', '.join(known)}" if known else "it holds no series yet"
        raise UsageError(f"series {series!r} is not in the store at {store.root}; {holds}")

    def rows(table: str) -> list[Row]:
        return store.table(table, series).to_pylist()

    def of_model(table: str) -> list[Row]:
        return [row for row in rows(table) if row["model"] == model]

    models = sorted(rows("state_models"), key=lambda row: row["k"])
    model = next((row["model"] for row in models if row["chosen"]), None)
    findings = sorted(rows("findings"), key=_finding_order)
    failures = sorted(rows("failures"), key=lambda row: (row["run"] or "", _or_minus(row["step"]), row["at"]))
    states = of_model("states")
    checkpoints = rows("checkpoints")
    metrics = read_metrics(store, series)
    measured = metrics[metrics["analyzer"] != ANALYZER]
    metrics = _at_measured_steps(metrics, measured)
    runs = _runs(
        metrics, states, checkpoints, [*failures, *(f for f in findings if f["severity"] == "error")]
    )
    done = measured[["run", "step", "analyzer"]].drop_duplicates()
    curves = [_curve(row) for row in rows("curves")]
    crowded = int(metrics["head"].notna().sum()) > _MOST_HEAD_VALUES
    shown = metrics[_worth(metrics, curves)] if crowded else metrics
    kept = thinned(shown, curves, models)
    return ReportData(
        series=series,
        runs=runs,
        trajectories=_trajectories(_plain(shown[kept]), runs),
        reduced=_reduced(metrics, models, runs),
        heads_left_out=crowded,
        layers_left_out=not kept.all(),
        measured={(str(run), int(step), str(a)) for run, step, a in done.itertuples(index=False)},
        protocols=_protocols(measured),
        noted=_noted(metrics),
        rows=len(metrics),
        checkpoints=checkpoints,
        # An audit without findings leaves a file without rows.
        audited=bool(store.files("findings", series)),
        findings=findings,
        failures=failures,
        curves=curves,
        models=models,
        transitions=sorted(of_model("transitions"), key=lambda row: (row["from"], row["to"])),
        boundaries=sorted(of_model("boundaries"), key=lambda row: (row["run"], row["step"])),
        state_means=of_model("state_means"),
        drivers=sorted(
            of_model("drivers"), key=lambda row: (row["from"], row["to"], row["run"] or "", row["rank"] or 0)
        ),
        outcomes=sorted(of_model("outcomes"), key=lambda row: str(row["outcome"])),
        nulls=of_model("nulls"),
        baselines=of_model("baselines"),
        provenance=sorted(rows("provenance"), key=lambda row: str(row["started"]), reverse=True),
        as_of=metrics["recorded_at"].max().to_pydatetime() if len(metrics) else None,
    )


def read_metrics(store: Store, series: str) -> pd.DataFrame:
    """The columns of the table ``metrics`` that the page needs, of rows with a run and a step.

    Texts are categories and runs are read one by one: a series of nine runs has 22 million rows.
    """
    folders = {PurePosixPath(path).parent for path in store.files("metrics", series)}
    # Rows that were stored without a folder of their run may be of any run.
    loose = any(folder.parent.name == "metrics" for folder in folders)
    runs = [None] if loose else sorted(folder.name for folder in folders)
    tables = []
    for run in runs:
        table = store.table("metrics", series, run).to_arrow().select(_COLUMNS)
        for name in _TEXTS:
            at = table.schema.get_field_index(name)
            table = table.set_column(at, name, table[name].dictionary_encode())
        tables.append(table)
    if not tables:
        tables.append(store.table("metrics", series).to_arrow().select(_COLUMNS))
    metrics: pd.DataFrame = pa.concat_tables(tables).unify_dictionaries().to_pandas()
    kept: pd.DataFrame = metrics[metrics["step"].notna() & metrics["run"].notna()]
    return kept.reset_index(drop=True)


def _plain(metrics: pd.DataFrame) -> pd.DataFrame:
    """With texts as they are: groups of categories would be in the order of the categories."""
    return metrics.astype(dict.fromkeys(_TEXTS, object))


def _worth(metrics: pd.DataFrame, curves: Sequence[Row]) -> "pd.Series[bool]":
    """What a crowded page keeps: all that is not about a head, and the scores of heads that were born."""
    born = {
        (row["metric"], row["layer"], row["head"])
        for row in curves
        if row["form"] == HEADS_FORM and row["head"] is not None and row["peak_step"] is not None
    }
    kept = metrics["head"].isna()
    near = metrics.loc[~kept & metrics["metric"].isin({metric for metric, _, _ in born})]
    places = zip(near["metric"], near["layer"], near["head"], strict=True)
    kept[near.index[[place in born for place in places]]] = True
    return kept


def _at_measured_steps(metrics: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """Without what a training logged between checkpoints: all other lines would break at those steps."""
    logged = metrics[metrics["analyzer"] == ANALYZER]
    places = pd.MultiIndex.from_frame(measured[["run", "step"]].drop_duplicates())
    between = ~pd.MultiIndex.from_frame(logged[["run", "step"]]).isin(places)
    return metrics.drop(index=logged.index[between])


def read_json(text: str | None) -> dict[str, Any]:
    """The object in ``text``; empty when it is null, broken or no object, so that the page still opens."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _curve(row: Row) -> Row:
    """A row of ``curves`` with its maps as dictionaries."""
    return {**row, "parameters": dict(row["parameters"] or []), "intervals": dict(row["intervals"] or [])}


def _or_minus(step: int | None) -> int:
    return -1 if step is None else step


def _finding_order(row: Row) -> tuple[int, str, int]:
    rank = _SEVERITIES.index(row["severity"]) if row["severity"] in _SEVERITIES else len(_SEVERITIES)
    return rank, row["run"] or "", _or_minus(row["step"])


def _runs(metrics: pd.DataFrame, states: list[Row], checkpoints: list[Row], gaps: list[Row]) -> list[Run]:
    """Runs in order of name.

    A step that failed or that the audit excluded belongs to the grid, so that lines break there; a step that
    nobody asked to measure does not.
    """
    tokens: dict[tuple[str, int], int | None] = {}
    seen = metrics[["run", "step", "tokens"]].drop_duplicates(["run", "step"])
    for run, step, count in seen.itertuples(index=False):
        tokens[str(run), int(step)] = None if pd.isna(count) else int(count)
    for row in [*states, *gaps]:
        if row["run"] is not None and row["step"] is not None:
            tokens.setdefault((row["run"], row["step"]), row.get("tokens"))
    for row in checkpoints:
        place = (row["run"], row["step"])
        if place in tokens and tokens[place] is None:
            tokens[place] = row["tokens"]
    decoded = {(row["run"], row["step"]): row for row in states}
    runs = []
    for name in sorted({run for run, _ in tokens}):
        steps = sorted(step for run, step in tokens if run == name)
        found = [decoded.get((name, step), {}) for step in steps]
        runs.append(
            Run(
                name,
                steps,
                [tokens[name, step] for step in steps],
                [row.get("state") for row in found],
                [_finite(row.get("posterior")) for row in found],
            )
        )
    return runs


def _trajectories(metrics: pd.DataFrame, runs: Sequence[Run]) -> list[Trajectory]:
    """All trajectories in order of analyzer, metric, site, layer and head."""
    if metrics.empty:
        return []
    starts = np.cumsum([0, *(len(run.steps) for run in runs)])
    column = {
        (run.name, step): int(start) + i
        for run, start in zip(runs, starts, strict=False)
        for i, step in enumerate(run.steps)
    }
    groups = metrics.groupby(_PLACE, dropna=False, sort=True)
    place = groups.ngroup().to_numpy()
    at = np.array([column[key] for key in zip(metrics["run"], metrics["step"], strict=True)])
    grid = np.full((groups.ngroups, int(starts[-1])), np.nan)
    grid[place, at] = metrics["value"].to_numpy(dtype=float)
    about = groups["n"].agg(["min", "max"]).reset_index()
    trajectories = []
    for row, values in zip(about.itertuples(index=False), grid, strict=True):
        analyzer, metric, site, layer, head, fewest, most = row
        per_run = [_values(values[a:b]) for a, b in pairwise(starts)]
        trajectories.append(
            Trajectory(
                analyzer=str(analyzer),
                metric=str(metric),
                site=None if pd.isna(site) else str(site),
                layer=_integer(layer),
                head=_integer(head),
                n=None if pd.isna(fewest) else (int(fewest), int(most)),
                values=per_run,
            )
        )
    return trajectories


def _reduced(metrics: pd.DataFrame, models: list[Row], runs: Sequence[Run]) -> list[Trajectory]:
    """Means, minima and maxima over layers or heads that the chosen states were fitted to."""
    chosen = next((row["metrics"] or [] for row in models if row["chosen"]), [])
    found = []
    for name in chosen:
        match = _OVER.fullmatch(name)
        mine = _plain(metrics[metrics["metric"] == match["metric"]]) if match else metrics.iloc[:0]
        if match is None or mine.empty:
            continue
        try:
            rows = select_trajectories(mine, [name])
        except UsageError:  # The store no longer holds what the states were fitted to.
            continue
        at = {(row.run, row.step): row.value for row in rows.itertuples(index=False)}
        per_run = [
            _values(np.array([at.get((r.name, s), np.nan) for s in r.steps], dtype=float)) for r in runs
        ]
        analyzer, over = str(mine["analyzer"].iloc[0]), match["over"]
        found.append(Trajectory(analyzer, match["metric"], match["site"], None, None, None, per_run, over))
    return found


def _values(values: np.ndarray[Any, Any]) -> list[float | None] | None:
    """Values at 6 significant digits, None where absent or not finite; None when there is no value at all."""
    if not np.isfinite(values).any():
        return None
    return [_finite(value) for value in values.tolist()]


def _finite(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _integer(value: Any) -> int | None:
    return None if pd.isna(value) else int(value)


def _protocols(metrics: pd.DataFrame) -> list[Protocol]:
    seen = metrics[["analyzer", "protocol", "run"]].drop_duplicates()
    runs: dict[tuple[str, str], list[str]] = {}
    for analyzer, text, run in seen.itertuples(index=False):
        runs.setdefault((str(analyzer), "" if pd.isna(text) else str(text)), []).append(str(run))
    return [
        Protocol(analyzer, sorted(names), read_json(text)) for (analyzer, text), names in sorted(runs.items())
    ]


def _noted(metrics: pd.DataFrame) -> list[Row]:
    """Values that carry a note, or are absent, counted by metric and note."""
    odd = _plain(metrics[metrics["note"].notna() | metrics["value"].isna()])
    if odd.empty:
        return []
    odd = odd.assign(note=odd["note"].fillna("no value, and no reason given"), absent=odd["value"].isna())
    counted = odd.groupby(["metric", "note"], sort=True).agg(
        values=("absent", "size"), absent=("absent", "sum"), runs=("run", lambda names: sorted(set(names)))
    )
    return [
        {str(name): item for name, item in row.items()} for row in counted.reset_index().to_dict("records")
    ]
