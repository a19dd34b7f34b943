"""Growth curves with a bootstrap over the sequences in the store: which values are used, and when."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyzers.growth import GrowthSettings, growth
from storage import Store
from tasks.growth import GrowthJob, fit_growth_curves
from tasks.sequences import SequenceValues
from tasks.trajectories import rows_at, stored_metrics

STEPS = [0, *(2**k for k in range(10)), *range(1000, 143_001, 4000)]
SEQUENCES = list(range(2, 14))


def fill(store: Store, run: str, left_out: int | None = None, key: str = "k") -> None:
    rng = np.random.default_rng(0)
    true = growth(np.array(STEPS, dtype=float), np.array([300, 0.12, 8e-4, 1.5, 20.0]))
    each = true[:, None] * rng.normal(1, 0.1, (len(STEPS), len(SEQUENCES)))
    half = np.full(len(SEQUENCES), 2.0)
    rows, values = [], []
    for step, line in zip(STEPS, each, strict=True):
        place = {"analyzer": "massive", "site": "resid_post", "layer": 0, "step": step, "protocol": "{}"}
        means = {"top1_over_median": line.mean(), "top1_over_median_of_means": line.mean()}
        rows += [{**place, "metric": m, "value": float(v), "key": f"k{step}"} for m, v in means.items()]
        if step != left_out:
            parts = {"top1_over_median": line, "top1": 2 * line, "median": half}
            values += [
                {**place, "metric": m, "sequences": SEQUENCES, "values": v.tolist(), "key": f"{key}{step}"}
                for m, v in parts.items()
            ]
    store.write("sequence_values", values, series="s", run=run, name="x")
    store.write("metrics", rows, series="s", run=run, name="x")


def fit(store: Store, metric: str = "top1_over_median", **rule: Any) -> dict[str | None, dict[str, Any]]:
    wanted = (f"{metric}[resid_post.*]",)
    settings = GrowthSettings(draws=100, **rule)
    fit_growth_curves(GrowthJob(root=store.root, series="s", trajectories=wanted, rule=settings))
    return {
        row["run"]: row | {"drawn": json.loads(row["settings"])["drawn"], "intervals": dict(row["intervals"])}
        for row in store.table("curves", "s").to_pylist()
        if row["form"] == "massive-growth"
    }


@pytest.mark.parametrize("metric", ["top1_over_median", "top1_over_median_of_means"])
def test_the_metric_is_that_of_its_sequences(tmp_path: Path, metric: str) -> None:
    store = Store(tmp_path)
    fill(store, "a")
    rows = rows_at(stored_metrics(store, "s"), f"{metric}[resid_post.0]").sort_values("step")
    sample = SequenceValues(store, "s").of(rows)
    assert sample is not None
    every = np.ones((1, len(SEQUENCES)), dtype=np.int64)
    assert sample.metric(every)[0] == pytest.approx(rows["value"].to_numpy(), rel=1e-12)
    assert fit(store, metric)["a"]["drawn"] == "sequences"


def test_rows_say_what_was_drawn(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "a")
    fill(store, "b", left_out=512)
    fill(store, "c", key="other")
    found = fit(store)
    # b lacks the sequences of one checkpoint, those of c are of another result.
    assert {run: row["drawn"] for run, row in found.items()} == {
        "a": "sequences",
        "b": "residuals",
        "c": "residuals",
        None: "mixed",
    }
    residuals = fit(store, intervals="residuals")
    assert {row["drawn"] for row in residuals.values()} == {"residuals"}
    assert residuals["b"]["intervals"] == found["b"]["intervals"]
    assert residuals["a"]["intervals"] != found["a"]["intervals"]


def test_absent_checkpoints_need_no_sequences(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "a", left_out=512)
    metrics = stored_metrics(store, "s")
    rows = rows_at(metrics, "top1_over_median[resid_post.0]").sort_values("step")
    rows.loc[rows["step"] == 512, "value"] = np.nan
    sample = SequenceValues(store, "s").of(rows)
    assert sample is not None
    assert np.isnan(sample.values[STEPS.index(512)]).all()
    assert np.isfinite(np.delete(sample.values, STEPS.index(512), axis=0)).all()
