"""Births of heads from a store with planted scores: rows of heads, of runs, of all runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from analyzers.head_births import HeadSettings
from storage import Store, UsageError
from tasks.heads import HeadsJob, find_head_births

STEPS = (0, 8, 64, 512, 1000, 2000)
# Step from which a head's score is 0.9; None: never. By metric: one tuple over layers of heads.
BORN: dict[str, tuple[tuple[int | None, ...], ...]] = {
    "prefix_matching": ((None, None), (512, 1000)),
    "repeat_previous_token": ((0, None), (None, None)),
}


def fill(store: Store, run: str, parameters: dict[str, float] | None = None, shift: int = 0) -> None:
    given = {"induction_threshold": 0.3, "previous_threshold": 0.5} if parameters is None else parameters
    protocol = json.dumps({"analyzer": "induction", "parameters": given})
    rows = []
    for metric, layers in BORN.items():
        for layer, heads in enumerate(layers):
            for head, born in enumerate(heads):
                later = None if born is None else STEPS[min(STEPS.index(born) + shift, len(STEPS) - 1)]
                for step in STEPS:
                    place = {"metric": metric, "site": "attention", "layer": layer, "head": head}
                    value = 0.9 if later is not None and step >= later else 0.1
                    about = {"analyzer": "induction", "key": f"{run}{step}", "protocol": protocol}
                    rows.append({"step": step, "value": value, "n": 800, **place, **about})
    store.write("metrics", rows, series="s", run=run, name="x")


def find(store: Store, hold: int = 2) -> dict[str, Any]:
    return find_head_births(HeadsJob(root=store.root, series="s", rule=HeadSettings(hold=hold)))


def rows(store: Store) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {
        (row["run"], row["metric"], row["layer"], row["head"]): row
        | {"parameters": dict(row["parameters"]), "intervals": dict(row["intervals"])}
        for row in store.table("curves", "s").to_pylist()
    }


def test_every_head_has_a_row(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "a")
    assert find(store)["computed"]
    found = rows(store)
    assert {row["form"] for row in found.values()} == {"head-birth"}
    heads = [key for key in found if key[3] is not None]
    assert len(heads) == 8
    first = found["a", "prefix_matching", 1, 0]
    assert (first["class"], first["peak_step"], first["n"]) == ("induction", 512, 6)
    assert first["intervals"]["birth_step"] == {"low": 64, "high": 512}
    assert (first["parameters"]["threshold"], first["parameters"]["last"]) == (0.3, 0.9)
    never = found["a", "prefix_matching", 0, 1]
    assert (never["class"], never["peak_step"], never["intervals"]) == ("not-seen", None, {})
    always = found["a", "repeat_previous_token", 0, 0]
    assert (always["class"], always["peak_step"]) == ("previous-token", 0)
    assert always["intervals"]["birth_step"] == {"low": None, "high": 0}
    total = found["a", "prefix_matching", None, None]
    assert (total["parameters"]["heads"], total["peak_step"]) == (2, 512)
    assert json.loads(first["settings"])["hold"] == 2


def test_all_runs_have_the_median_of_their_first_births(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for shift, run in enumerate("abc"):
        fill(store, run, shift=shift)
    find(store)
    every = rows(store)[None, "prefix_matching", None, None]
    # The first births are 512, 1000 and none: that of c is at the last checkpoint alone.
    assert every["parameters"]["runs_with_heads"] == 2
    assert every["intervals"]["birth_step"] == {"low": 512, "high": 1000}
    assert every["peak_step"] == 716  # sqrt(513 x 1001) - 1
    assert (every["parameters"]["heads_lowest"], every["parameters"]["heads_highest"]) == (0, 2)
    assert every["class"] == "induction"


def test_same_scores_are_not_looked_at_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "a")
    first = find(store)
    assert find(store) == {**first, "computed": False}
    assert find(store, hold=1)["computed"]
    assert rows(store)["a", "prefix_matching", 1, 0]["parameters"]["hold"] == 1


def test_what_cannot_be_judged_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("metrics", [{"step": 0, "metric": "loss", "analyzer": "loss"}], series="s", run="a", name="l")
    assert find(store)["skipped"] == ["the analyzer 'induction' was not measured"]
    fill(store, "a", parameters={})
    with pytest.raises(UsageError, match="do not say one induction_threshold"):
        find(store)
