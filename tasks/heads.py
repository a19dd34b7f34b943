"""Find the births of heads in the stored scores of ``induction``, and store them in the table ``curves``."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from analyzers.head_births import (
    HEAD_KINDS,
    HEADS_FORM,
    HEADS_VERSION,
    NOT_SEEN,
    Birth,
    HeadSettings,
    find_births,
)
from analyzers.phases import middle
from storage.errors import UsageError
from storage.store import Store
from tasks.curve_rows import describe_settings, identity_of, is_stored, write_rows
from tasks.trajectories import PLACE, stored_metrics

_ANALYZER = "induction"


class HeadsJob(BaseModel):
    """All that the births of heads of a series need; small and serialisable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str
    series: str
    rule: HeadSettings


def find_head_births(job: HeadsJob) -> dict[str, Any]:
    """Find the births unless the newest rows stored are of the same scores and settings.

    Per run one row for each head and kind, and one (head null) for all heads of the kind; over all runs (run
    null) one per kind.

    Returns a summary: curve, computed, skipped (a sentence, where no scores are in the store).

    Raises:
        UsageError: there are no metrics, or the scores do not say their threshold.
    """
    store = Store(job.root)
    scores = head_scores(stored_metrics(store, job.series))
    if scores.empty:
        return {"curve": None, "computed": False, "skipped": [f"the analyzer {_ANALYZER!r} was not measured"]}
    settings = {"form": HEADS_FORM, "version": HEADS_VERSION, **job.rule.model_dump(mode="json")}
    identity = identity_of(settings, scores)
    if is_stored(store, job.series, HEADS_FORM, identity):
        return {"curve": identity, "computed": False, "skipped": []}
    found: dict[str | None, list[dict[str, Any]]] = {None: []}
    for (metric, site), rows in scores.groupby(["metric", "site"], sort=True):
        about, mixed = describe_settings(settings, rows)
        common = {"curve": identity, "metric": metric, "site": site, "form": HEADS_FORM, "settings": about}
        totals = {}
        for run, mine in rows.groupby("run", sort=True):
            run_rows, totals[str(run)] = _run(str(run), str(metric), mine, job.rule)
            found.setdefault(str(run), []).extend(common | row for row in run_rows)
        every = _all_runs(str(metric), totals)
        found[None].append(common | every | {"note": "; ".join([*mixed]) or every["note"]})
    write_rows(store, job.series, identity, found)
    return {"curve": identity, "computed": True, "skipped": []}


def head_scores(metrics: pd.DataFrame) -> pd.DataFrame:
    """Rows of single heads that births are read from, in a fixed order."""
    here = metrics[
        (metrics["analyzer"] == _ANALYZER)
        & metrics["metric"].isin(list(HEAD_KINDS))
        & metrics[["head", "run", "step"]].notna().all(axis=1)
    ]
    return here.sort_values([*PLACE, "run", "step"]).reset_index(drop=True)


def _threshold(metric: str, protocols: pd.Series) -> float:
    """The threshold that the head classes of these rows were measured with.

    Raises:
        UsageError: the protocol does not say it, or there are several.
    """
    name = HEAD_KINDS[metric][1]
    found = set()
    for text in set(protocols.dropna()):
        found.add(json.loads(text).get("parameters", {}).get(name))
    if len(found) != 1 or None in found:
        raise UsageError(
            f"births of heads: the rows of {metric} do not say one {name}; measure {_ANALYZER} again"
        )
    return float(found.pop())


def _run(
    run: str, metric: str, rows: pd.DataFrame, rule: HeadSettings
) -> tuple[list[dict[str, Any]], list[Birth]]:
    threshold = _threshold(metric, rows["protocol"])
    kind = HEAD_KINDS[metric][0]
    table = rows.pivot(index="step", columns=["layer", "head"], values="value").sort_index()
    values = table.to_numpy(dtype=np.float64, na_value=np.nan)
    found = find_births(table.index.to_numpy(dtype=np.int64), values, threshold, rule.hold)
    given = {"threshold": threshold, "hold": float(rule.hold)}
    result = []
    places: Any = table.columns.to_list()
    for (layer, head), birth in zip(places, found, strict=True):
        result.append({"layer": int(layer), "head": int(head), **_head_row(run, kind, birth, given)})
    born = [birth for birth in found if birth.step is not None]
    result.append({"layer": None, "head": None, **_total_row([run], kind, born, given, len(table))})
    return result, born


def _head_row(run: str, kind: str, birth: Birth, given: dict[str, float]) -> dict[str, Any]:
    numbers = given | {
        name: number
        for name, number in (("highest", birth.highest), ("last", birth.last), ("birth_step", birth.step))
        if number is not None
    }
    return {
        "class": kind if birth.step is not None else NOT_SEEN if birth.n else None,
        "n": birth.n,
        "runs": [run],
        "parameters": [(name, float(number)) for name, number in numbers.items()],
        "intervals": _interval(birth),
        "peak_step": birth.step,
        "note": None if birth.n else "no checkpoint has a score of this head",
    }


def _interval(birth: Birth) -> list[tuple[str, dict[str, float | None]]]:
    """The birth lies above ``low`` and not above ``high``; low is null where no checkpoint is before it."""
    if birth.step is None:
        return []
    low = None if birth.before is None else float(birth.before)
    return [("birth_step", {"low": low, "high": float(birth.step)})]


def _first(born: Sequence[Birth]) -> Birth | None:
    return min(born, key=lambda birth: (birth.step or 0, birth.before or 0), default=None)


def _total_row(
    runs: list[str], kind: str, born: Sequence[Birth], given: dict[str, float], n: int
) -> dict[str, Any]:
    """All heads of a kind in one run: how many, and the first of them."""
    first = _first(born)
    numbers = given | {"heads": float(len(born))}
    if first is not None and first.step is not None:
        numbers |= {"birth_step": float(first.step)}
    return {
        "class": kind if born else NOT_SEEN,
        "n": n,
        "runs": runs,
        "parameters": list(numbers.items()),
        "intervals": [] if first is None else _interval(first),
        "peak_step": None if first is None else first.step,
        "note": None,
    }


def _all_runs(metric: str, totals: dict[str, list[Birth]]) -> dict[str, Any]:
    """Over runs: the median of their first births, with the lowest and the highest as its interval.

    Heads of different runs have nothing to do with one another, so there is no row of a head.
    """
    firsts = [first.step for born in totals.values() if (first := _first(born)) and first.step is not None]
    counts = [len(born) for born in totals.values()]
    numbers = {
        "runs_judged": float(len(totals)),
        "runs_with_heads": float(len(firsts)),
        "heads_lowest": float(min(counts)),
        "heads_highest": float(max(counts)),
    }
    step = middle(firsts) if firsts else None
    span = [("birth_step", {"low": float(min(firsts)), "high": float(max(firsts))})] if firsts else []
    return {
        "layer": None,
        "head": None,
        "class": HEAD_KINDS[metric][0]
        if 2 * len(firsts) > len(totals)
        else NOT_SEEN
        if not firsts
        else "mixed",
        "n": len(totals),
        "runs": list(totals),
        "parameters": list((numbers | ({} if step is None else {"birth_step": float(step)})).items()),
        "intervals": span,
        "peak_step": step,
        "note": None,
    }


@task(name="find-head-births", cache_policy=NO_CACHE)
def find_series_head_births(job: HeadsJob) -> dict[str, Any]:
    """Task: :func:`find_head_births`."""
    return find_head_births(job)
