"""Trajectories by name out of the metrics table: ``loss``, ``alpha_req[resid_post.last]``, ``l*[*.mean]``."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import pandas as pd

from storage.errors import UsageError
from storage.store import Store, column_name

# A metric may be an imported one, so its name is anything but a bracket.
_NAME = re.compile(
    r"(?P<metric>[^\[\]]+)"
    r"(?:\[(?P<site>[\w.*?]*?)"
    r"(?:\.(?P<layer>\d+|last|mean|min|max|\*))?(?:\.(?P<head>\d+|last|mean|min|max|\*))?\])?"
)
_PATTERN = set("*?")
# Metrics that an error names; an imported series may have hundreds.
KNOWN = 20
PLACE = ["metric", "site", "layer", "head"]
_REDUCED = ("mean", "min", "max")


@dataclass(frozen=True)
class Name:
    """A name of trajectories in its parts; metric and site may be patterns."""

    metric: str
    site: str | None
    layer: str | None
    head: str | None


def stored_metrics(store: Store, series: str) -> pd.DataFrame:
    """The metrics table of a series.

    Raises:
        UsageError: it has no rows.
    """
    view = store.table("metrics", series)
    if not len(view):
        raise UsageError(f"there are no metrics of series {series!r} under {store.root!r}; measure it first")
    return view.to_pandas()


def select_trajectories(metrics: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Rows (run, step, name, value) of the trajectories asked for, in the order of ``names``, each once.

    ``metric`` alone means the value of the whole model; ``metric[site]`` that of a site outside the blocks;
    ``metric[site.3]`` that of a layer, ``.last`` of the last one, ``.mean``, ``.min`` and ``.max`` over all
    layers, ``.*`` each layer as a trajectory of its own. A second such part is about heads:
    ``entropy[attention.2.max]`` is the largest of layer 2, ``entropy[attention.mean.mean]`` the mean over the
    heads of a layer and then over layers. In metric and site, ``*`` and ``?`` are patterns: one trajectory
    per metric and site that has a value there. A mean, min or max is absent where one of its layers or heads
    is.

    Raises:
        UsageError: a name is not of that form, nothing in the table answers to it, or two analyzers do.
    """
    parts: dict[str, pd.DataFrame] = {}
    for name in names:
        for label, rows in _trajectories(metrics, name):
            parts.setdefault(label, rows.assign(name=label)[["run", "step", "name", "value"]])
    return pd.concat(parts.values(), ignore_index=True)


def transforms_of(names: Sequence[str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Transform of each trajectory: that of its name, else of its metric, else of a pattern (the first)."""
    found = {}
    for name in names:
        metric = name.partition("[")[0]
        patterns = [key for key in wanted if fnmatchcase(name, key) or fnmatchcase(metric, key)]
        key = next((key for key in (name, metric, *patterns) if key in wanted), None)
        if key is not None:
            found[name] = wanted[key]
    return found


def rows_at(metrics: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows of the metrics table, with all its columns, that a trajectory is made of.

    Rows about heads are left out unless the name asks for heads.

    Raises:
        UsageError: as :func:`select_trajectories`.
    """
    parts = _parts(name)
    here = metrics[_fits(metrics["metric"], parts.metric)]
    if here.empty:
        known = sorted(set(metrics["metric"]))
        more = f" and {len(known) - KNOWN} more" if len(known) > KNOWN else ""
        raise UsageError(
            f"trajectory {name!r}: metric {parts.metric!r} is not in the store "
            f"(it holds {', '.join(known[:KNOWN])}{more})"
        )
    here = here[here["site"].isna() if parts.site is None else _fits(here["site"], parts.site)]
    for column, part in (("layer", parts.layer), ("head", parts.head)):
        here = here[here[column].isna() if part is None else here[column].notna()]
        if part is not None and part.isdigit():
            here = here[here[column] == int(part)]
        elif part == "last" and len(here):
            last = here.groupby(["metric", here["site"].fillna("")])[column].transform("max")
            here = here[here[column] == last]
    if here.empty:
        raise UsageError(f"trajectory {name!r}: {parts.metric!r} has no value at that place")
    return here


def chosen_rows(
    metrics: pd.DataFrame, names: Sequence[str], absent: Literal["refuse", "skip"]
) -> tuple[pd.DataFrame, list[str]]:
    """Rows of all trajectories named, in a fixed order, and sentences on those that are not in the store.

    Raises:
        UsageError: a name stands for a mean over layers, which has no place, or is not in the store and
            ``absent`` is ``refuse``.
    """
    metrics = metrics[metrics["run"].notna() & metrics["step"].notna()]
    parts, skipped = [metrics.iloc[:0]], []
    for name in names:
        parted = _parts(name)
        if {parted.layer, parted.head} & set(_REDUCED):
            raise UsageError(f"trajectory {name!r}: a mean over layers has no place of its own")
        try:
            parts.append(rows_at(metrics, name))
        except UsageError as error:
            if absent == "refuse":
                raise
            skipped.append(str(error))
    rows = pd.concat(parts).drop_duplicates([*PLACE, "run", "step", "analyzer"])
    return rows.sort_values([*PLACE, "run", "step"]).reset_index(drop=True), skipped


def place_of(group: Any) -> tuple[str, str | None, int | None, int | None]:
    """Metric, site, layer and head of a group of rows, None where absent."""
    metric, site, layer, head = group
    return (
        str(metric),
        None if pd.isna(site) else str(site),
        None if pd.isna(layer) else int(layer),
        None if pd.isna(head) else int(head),
    )


def _parts(name: str) -> Name:
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(
            f"trajectory {name!r} is not metric, metric[site], metric[site.layer] or with a head"
        )
    return Name(match["metric"], match["site"], match["layer"], match["head"])


def _fits(column: pd.Series, pattern: str) -> pd.Series:
    if not _PATTERN & set(pattern):
        return column == pattern
    return column.map(lambda value: isinstance(value, str) and fnmatchcase(value, pattern))


def _trajectories(metrics: pd.DataFrame, name: str) -> list[tuple[str, pd.DataFrame]]:
    """(name, rows) of every trajectory that a name stands for: by layer and head, else by metric and site."""
    parts, here = _parts(name), rows_at(metrics, name)
    _one_analyzer(here, name)
    found = []
    for metric in sorted(set(here["metric"])):
        of_metric = here[here["metric"] == metric]
        for site in [None] if parts.site is None else sorted(set(of_metric["site"])):
            rows = of_metric if site is None else of_metric[of_metric["site"] == site]
            for label, part in _by_place(rows, parts, site):
                found.append((column_name(metric, ".".join(label) or None, None, None), part))
    return found


def _by_place(rows: pd.DataFrame, parts: Name, site: str | None) -> list[tuple[list[str], pd.DataFrame]]:
    """The rows of one metric and site by layer and head, reduced as asked, with the parts of their names."""
    layers = _split(rows, "layer", parts.layer)
    found = []
    for layer, of_layer in layers:
        for head, part in _split(of_layer, "head", parts.head):
            label = [each for each in (site, layer, head) if each is not None]
            # Heads are reduced within their layer first: the mean over layers is one of heads' means.
            found.append((label, _reduced(_reduced(part, "head", parts.head), "layer", parts.layer)))
    return found


def _split(rows: pd.DataFrame, column: str, part: str | None) -> list[tuple[str | None, pd.DataFrame]]:
    if part != "*":
        return [(part, rows)]
    return [(str(int(value)), rows[rows[column] == value]) for value in sorted(set(rows[column]))]


def _reduced(rows: pd.DataFrame, column: str, how: str | None) -> pd.DataFrame:
    """Mean, min or max over a column of places; absent where a place is absent, or has no row."""
    if how not in _REDUCED:
        return rows
    keys = ["run", "step", "layer"] if column == "head" else ["run", "step"]
    groups = rows.groupby(keys, dropna=False)["value"]
    values = groups.agg(how, skipna=False).where(groups.size() == rows[column].nunique())
    return values.reset_index()


def _one_analyzer(rows: pd.DataFrame, name: str) -> None:
    """Two analyzers at one place (measured and imported, say) are two different numbers."""
    if "analyzer" not in rows.columns:
        return
    for metric in sorted(set(rows["metric"])):
        mine = rows[rows["metric"] == metric]
        analyzers = sorted(set(mine["analyzer"]))
        places = mine.drop_duplicates(["analyzer", "site", "layer", "head"])
        if places.duplicated(["site", "layer", "head"]).any():
            raise UsageError(
                f"trajectory {name!r}: {' and '.join(analyzers)} both have a metric {metric!r} at that "
                "place; import it under another name"
            )
