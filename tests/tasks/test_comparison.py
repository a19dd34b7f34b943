"""What stands beside a stored map: the null's answer, baselines, and when they are made anew."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from analyzers.latent import StateSettings, from_long
from flows.report import render_report
from flows.report.baselines import baseline_lines, null_lines
from flows.report.data import collect
from flows.report.summary import summarize
from storage import Store
from tasks.comparison import store_comparison
from tasks.states import StatesJob, fit_series
from tasks.trajectories import select_trajectories, stored_metrics

FIT = StateSettings(
    k_max=5, restarts=6, folds=0, bootstraps=0, surrogates=5, surrogate_restarts=3, surrogate_selections=0
)
AS_WELL = "A smooth surrogate explains these trajectories as well: by itself the map is no evidence of phases"
NOT = "A smooth surrogate does not explain these trajectories as well"
STEPS = np.arange(0, 600, 10)
METRICS = 5


def curves(run: int) -> np.ndarray:
    """Saturation without phases, at a rate of each metric's own."""
    rng = np.random.default_rng([1, run])
    tau = 600 * np.array([0.06, 0.12, 0.2, 0.35, 0.5]) * np.exp(0.1 * rng.normal(size=METRICS))
    size = np.array([3.0, -2, 1, 4, -1]) * rng.normal(1, 0.05, METRICS)
    return size * -np.expm1(-STEPS[:, None] / tau) + 0.2 * rng.normal(size=(len(STEPS), METRICS))


def planted_states(run: int) -> np.ndarray:
    """Three states, at boundaries of each run's own."""
    first, second = np.random.default_rng([2, run]).integers([12, 34], [24, 46])
    return np.searchsorted([first, second], np.arange(len(STEPS)), side="right")


def planted(run: int) -> np.ndarray:
    means = np.array([[0, 0, 0, 0, 0], [2, -1, 1, 0, 1], [1, 2, 2, -2, 0]])
    return means[planted_states(run)] + 0.3 * np.random.default_rng([3, run]).normal(
        size=(len(STEPS), METRICS)
    )


def filled(root: Path, runs: dict[str, np.ndarray]) -> Store:
    store = Store(root)
    for run, values in runs.items():
        rows = [
            {
                "step": int(step),
                "analyzer": "a",
                "protocol": "a",
                "metric": f"m{column}",
                "value": float(value),
            }
            for step, frame in zip(STEPS, values, strict=False)
            for column, value in enumerate(frame)
        ]
        store.write("metrics", rows, series="s", run=run, name="all")
    return store


def job(store: Store, **changes: Any) -> StatesJob:
    given = {
        "trajectories": ("m*",),
        "transforms": {},
        "grid": "union",
        "min_share": 0.1,
        "fit": FIT.model_copy(update=changes),
    }
    return StatesJob(root=store.root, series="s", **given)


def said(store: Store) -> list[str]:
    return null_lines(store.table("nulls", "s").to_pylist())


@pytest.fixture(scope="module")
def planted_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = filled(tmp_path_factory.mktemp("planted"), {f"seed{r}": planted(r) for r in range(8)})
    fit_series(job(store))
    return store


def test_the_report_of_forty_phase_free_curves_says_that_a_smooth_surrogate_explains_them(
    tmp_path: Path,
) -> None:
    store = filled(tmp_path, {f"seed{run:02}": curves(run) for run in range(40)})
    done = fit_series(job(store))
    assert done["computed"]
    assert done["compared"]
    (row,) = store.table("nulls", "s").to_pylist()
    assert (row["model"], row["explained"], row["heldout"]) == (done["model"], True, True)
    assert row["surrogates"] == len(row["surrogate_logliks"]) == len(row["surrogate_maps"]) == 5
    assert row["gap"] == pytest.approx(row["loglik"] - np.mean(row["surrogate_logliks"]))
    assert said(store)[0].startswith(AS_WELL)
    assert f"gap {row['gap']:+.3g} nats per checkpoint on held-out runs" in said(store)[0]
    page = render_report(store, "s")
    assert AS_WELL in page
    assert NOT not in page
    assert any(said(store)[0] in point.sentences for point in summarize(collect(store, "s")))


def test_the_report_of_planted_states_says_that_it_does_not(planted_store: Store) -> None:
    (row,) = planted_store.table("nulls", "s").to_pylist()
    assert row["explained"] is False
    assert row["k"] == 3
    assert row["gap"] > 0.5
    page = render_report(planted_store, "s")
    assert NOT in page
    assert AS_WELL not in page


def test_the_order_in_which_runs_were_written_changes_nothing(planted_store: Store, tmp_path: Path) -> None:
    turned = filled(tmp_path, {f"seed{r}": planted(r) for r in reversed(range(8))})
    fit_series(job(turned))
    for table in ("nulls", "baselines"):
        one, other = (
            [
                # Identities are of rows in the order in which they were written.
                {k: v for k, v in row.items() if k not in ("recorded_at", "model", "comparison")}
                for row in store.table(table, "s").to_pylist()
            ]
            for store in (planted_store, turned)
        )
        assert one == other


def test_simpler_methods_agree_with_planted_states(planted_store: Store) -> None:
    rows = planted_store.table("baselines", "s").to_pylist()
    assert {row["baseline"] for row in rows} == {"k-means", "change points"}
    for baseline in ("k-means", "change points"):
        whole, *runs = [row for row in rows if row["baseline"] == baseline]
        assert (whole["run"], whole["runs"], whole["n"]) == (None, 8, 8 * len(STEPS))
        assert whole["ari"] > 0.95
        assert [row["run"] for row in runs] == [f"seed{r}" for r in range(8)]
    for row in rows:
        if row["baseline"] == "change points" and row["run"] is not None:
            changes = np.flatnonzero(np.diff(planted_states(int(row["run"][-1])))) + 1
            assert row["boundaries"] == STEPS[changes].tolist()
            assert row["labels"] == [0, 1, 2]
    # k-means has the numbers of the states.
    states = planted_store.table("states", "s").to_pandas()
    first = states[states["run"] == "seed0"].sort_values("step")["state"].iloc[0]
    assert next(r for r in rows if (r["baseline"], r["run"]) == ("k-means", "seed0"))["labels"][0] == first


def test_published_phases_and_peaks_follow_the_table_curves(tmp_path: Path) -> None:
    store = filled(tmp_path, {f"seed{r}": planted(r) for r in range(3)})
    fit_series(job(store, surrogates=0))
    assert not fit_series(job(store, surrogates=0))["compared"]
    place = {"metric": "rankme_cov", "site": "resid_post", "layer": 3}
    for run in range(3):
        ends = {"collapse_end_step": 150, "expansion_end_step": 400} if run < 2 else {}
        phases = {**place, "form": "geometric-phases", "curve": "c", "parameters": list(ends.items())}
        growth = {**place, "form": "massive-growth", "curve": "g", "parameters": []}
        growth |= {"peak_step": 200, "class": "early-peak"} if run == 0 else {"class": "log-rise"}
        store.write("curves", [phases, growth], series="s", run=f"seed{run}", name="c")
    again = fit_series(job(store, surrogates=0))
    assert (again["computed"], again["compared"]) == (False, True)
    rows = {(row["baseline"], row["run"]): row for row in store.table("baselines", "s").to_pylist()}
    states = store.table("states", "s").to_pandas().sort_values(["run", "step"])
    two = states[states["run"] != "seed2"]
    phase = np.searchsorted([150, 400], two["step"], side="left")
    whole = rows["geometric-phases", None]
    assert whole["ari"] == pytest.approx(adjusted_rand_score(phase, two["state"]))
    assert (whole["trajectory"], whole["runs"]) == ("rankme_cov[resid_post.3]", 2)
    assert whole["note"] == "1 of 3 runs have no boundary and are left out"
    assert rows["geometric-phases", "seed0"]["boundaries"] == [160, 410]
    absent = rows["geometric-phases", "seed2"]
    assert (absent["ari"], absent["note"]) == (None, "no end of a phase was found")
    assert rows["massive-growth", "seed0"]["boundaries"] == [210]
    assert rows["massive-growth", "seed1"]["note"] == "no peak: the class is log-rise"
    lines = baseline_lines(list(rows.values()))
    assert f"geometric phases of rankme_cov[resid_post.3]: {whole['ari']:.2f} (2 runs)" in lines


def test_surrogates_are_no_part_of_the_fit_and_a_stored_fit_gets_its_null(tmp_path: Path) -> None:
    store = filled(tmp_path, {f"seed{r}": planted(r) for r in range(3)})
    first = fit_series(job(store, surrogates=0))
    assert not len(store.table("nulls", "s"))
    assert "No smooth surrogates were fitted" in render_report(store, "s")
    later = fit_series(job(store))
    assert later == {"model": first["model"], "computed": False, "compared": True}
    assert len(store.table("nulls", "s")) == 1
    assert not fit_series(job(store))["compared"]
    assert fit_series(job(store, surrogates=4))["compared"]
    (row,) = store.table("nulls", "s").to_pylist()
    assert row["surrogates"] == 4
    assert fit_series(job(store, seed=1))["model"] != first["model"]


def test_one_run_of_twenty_checkpoints_and_up_to_twelve_states(tmp_path: Path) -> None:
    run = np.cumsum(np.random.default_rng(0).normal(size=(20, METRICS)), axis=0)
    store = filled(tmp_path, {"only": run})
    fit_series(job(store, k_max=12, restarts=8, surrogate_selections=1))
    (row,) = store.table("nulls", "s").to_pylist()
    assert not row["heldout"]
    text = " ".join(said(store))
    assert "on the fitted run itself" in text
    assert "The gap is on the run that was fitted, and one run cannot say" in text
    assert row["k"] <= 2 or "fewer than 10 each" in text
    assert "The gap is on the run that was fitted" in render_report(store, "s")


def test_a_null_that_cannot_be_fitted_takes_no_map_away(tmp_path: Path) -> None:
    store = filled(tmp_path, {"only": planted(0)[:20]})
    fit_series(job(store, surrogates=0))
    (chosen,) = [row for row in store.table("state_models", "s").to_pylist() if row["chosen"]]
    # More states than the run has checkpoints: no start can be drawn.
    row = {**chosen, "model": "other", "k": 25}
    del row["recorded_at"]
    store.write("state_models", [row], series="s", name="other")
    chosen_rows = select_trajectories(stored_metrics(store, "s"), ("m*",))
    assert store_comparison(store, "s", "other", from_long(chosen_rows), FIT)
    (null,) = store.table("nulls", "s").to_pylist()
    assert (
        null["sentence"] == "No surrogate was fitted: no restart with K = 25 succeeded on the observed runs."
    )
    assert null["explained"] is None
    assert null["gap"] is None
