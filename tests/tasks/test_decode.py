"""Online decoding out of a real store: only what is new is decoded, and nothing looks ahead."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analyzers.latent import StateSettings, filter_runs, fit_states, from_long
from storage import Store
from storage.errors import UsageError
from tasks.decode import DecodeJob, decode_series, load_model
from tasks.states import StatesJob, fit_series

STEPS = tuple(range(0, 400, 10))
FIT = StateSettings(k_max=2, restarts=4, folds=0, bootstraps=0)
TRANSFORMS = {"norm": "log", "drift": "difference"}


def rows_of(run: int, step: int, loss: float | None = None) -> list[dict[str, Any]]:
    """Two states that change at step 200; ``drift`` grows by 1 per checkpoint, then by 3."""
    rng = np.random.default_rng([run, step])
    late = float(step >= 200)
    drift = step / 10 + 2 * max(0, (step - 200) / 10) + 0.1 * rng.normal()
    values = {
        "loss": 5 - 3 * late + 0.1 * rng.normal() if loss is None else loss,
        "norm": 10 * np.exp(2 * late + 0.1 * rng.normal()),
        "drift": drift,
    }
    common = {"step": step, "tokens": step * 100, "n": 1, "analyzer": "loss", "protocol": "loss"}
    return [{**common, "metric": name, "value": value} for name, value in values.items()]


def put(store: Store, run: int, steps: Any, series: str = "s", **changes: Any) -> None:
    for step in steps:
        rows = rows_of(run, step, **changes)
        store.write("metrics", rows, series=series, run=f"seed{run}", name=f"step{step}")


def states_job(store: Store, **changes: Any) -> StatesJob:
    given: dict[str, Any] = {
        "trajectories": ("loss", "norm", "drift"),
        "transforms": TRANSFORMS,
        "grid": "union",
        "min_share": 0.1,
        "fit": FIT,
    }
    return StatesJob(root=store.root, series="s", **{**given, **changes})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Six runs with a fit; run 3 lacks every third checkpoint."""
    store = Store(tmp_path)
    for run in range(6):
        put(store, run, [step for step in STEPS if run != 3 or step % 30])
    fit_series(states_job(store))
    return store


def online(store: Store, run: str, series: str = "s") -> pd.DataFrame:
    return store.table("online_states", series, run).to_pandas().sort_values("step", ignore_index=True)


def test_the_stored_model_is_the_batch_filter_of_the_fit(store: Store) -> None:
    long = [
        {"run": row["run"], "step": row["step"], "name": row["metric"], "value": row["value"]}
        for row in store.table("metrics", "s").to_pylist()
    ]
    fit = fit_states(from_long(long, TRANSFORMS, order=("loss", "norm", "drift")), FIT)
    summary = decode_series(DecodeJob(root=store.root, series="s"))
    assert summary["k"] == fit.k == 2
    assert summary["decoded"] == sum(run.seen.sum() for run in fit.runs)
    # After a gap a difference is that of two checkpoints, which no run of the fit shows (seed3 is held out).
    assert {each["run"] for each in summary["flagged"]} == {"seed3"}
    scaled = fit.scaled()
    for run in fit.runs:
        batch = filter_runs(fit.parameters, [scaled[run.run]])[0]
        rows = online(store, run.run)
        assert rows["step"].tolist() == run.steps[run.seen].tolist()
        np.testing.assert_allclose(rows["surprise"], batch.surprise[run.seen], rtol=1e-9, atol=1e-9)
        posterior = np.exp(np.stack(rows["log_posterior"]))
        np.testing.assert_allclose(posterior, batch.posterior[run.seen], atol=1e-12)
        assert (rows["state"] == (rows["step"] >= 200)).all()
        assert (rows["tokens"] == 100 * rows["step"]).all()
        assert (rows["fitted"] == (run.run in fit.train_runs)).all()
    frames = store.table("training_frames", "s").to_pandas()
    assert set(frames["run"]) == set(fit.train_runs)


def test_only_what_is_new_is_decoded_and_no_earlier_row_changes(store: Store) -> None:
    put(store, 9, STEPS[:15])
    job = DecodeJob(root=store.root, series="s", run="seed9")
    assert decode_series(job)["decoded"] == 15
    before = online(store, "seed9")
    assert decode_series(job)["decoded"] == 0
    put(store, 9, STEPS[15:30])
    summary = decode_series(job)
    assert summary["decoded"] == 15
    assert [row["run"] for row in summary["runs"]] == ["seed9"]
    assert summary["runs"][0]["step"] == STEPS[29]
    after = online(store, "seed9")
    pd.testing.assert_frame_equal(after[:15], before)
    assert not after["fitted"].any()
    # In one go or in parts: the same to the last bit.
    whole = Store(Path(store.root) / "whole")
    for run in range(6):
        put(whole, run, [step for step in STEPS if run != 3 or step % 30])
    put(whole, 9, STEPS[:30], series="other")
    fit_series(states_job(whole))
    decode_series(DecodeJob(root=whole.root, series="other", run="seed9", of="s"))
    left, right = (
        each.drop(columns=["recorded_at", "series"]) for each in (after, online(whole, "seed9", "other"))
    )
    pd.testing.assert_frame_equal(left, right)


def test_a_value_that_changed_or_came_late_is_decoded_anew_with_all_after_it(store: Store) -> None:
    put(store, 9, [step for step in STEPS if step != 100])
    job = DecodeJob(root=store.root, series="s", run="seed9")
    decode_series(job)
    before = online(store, "seed9")
    put(store, 9, [100])
    assert decode_series(job)["decoded"] == len([step for step in STEPS if step >= 100])
    after = online(store, "seed9")
    assert after["step"].tolist() == list(STEPS)
    pd.testing.assert_frame_equal(after[:10], before[:10])


def test_an_anomaly_is_flagged_and_named(store: Store) -> None:
    put(store, 9, STEPS[:15])
    put(store, 9, STEPS[15:16], loss=9.0)
    summary = decode_series(DecodeJob(root=store.root, series="s", run="seed9"))
    assert summary["flagged"] == [{"run": "seed9", "step": 150, "flags": ["new"]}]
    (newest,) = summary["runs"]
    assert newest["percentile"] == 100
    assert newest["parts"][0]["metric"] == "loss"
    assert newest["parts"][0]["value"] == pytest.approx(9.0)
    assert newest["parts"][0]["mean"] == pytest.approx(5.0, abs=0.1)
    assert newest["parts"][0]["z"] > 8


def test_the_model_of_another_series_and_missing_metrics(store: Store) -> None:
    """Another series has a loss only: the other metrics are marginalised out."""
    for step in STEPS:
        rows = [row for row in rows_of(7, step) if row["metric"] == "loss"]
        store.write("metrics", rows, series="other", run="main", name=f"step{step}")
    summary = decode_series(DecodeJob(root=store.root, series="other", of="s"))
    assert summary["absent"] == ["norm", "drift"]
    assert (summary["model_series"], summary["flagged"]) == ("s", [])
    rows = online(store, "main", "other")
    assert (rows["state"] == (rows["step"] >= 200)).all()
    assert not rows["fitted"].any()
    assert {tuple(each) for each in rows["missing"]} == {("norm", "drift")}
    store.write(
        "metrics",
        [{"step": 0, "metric": "x", "value": 1.0, "analyzer": "import", "protocol": "p"}],
        series="third",
        run="main",
        name="x",
    )
    with pytest.raises(UsageError, match=r"none of the model's metrics \(loss, norm, drift\)"):
        decode_series(DecodeJob(root=store.root, series="third", of="s"))


def test_a_model_is_chosen_by_the_first_digits_of_its_identity(store: Store) -> None:
    first = load_model(store, "s")
    fit_series(states_job(store, fit=FIT.model_copy(update={"seed": 1})))
    second = load_model(store, "s")
    assert first.identity != second.identity
    again = load_model(store, "s", first.identity[:8])
    assert again.identity == first.identity
    assert (again.online.parameters.means == first.online.parameters.means).all()
    assert again.fitted == first.fitted
    for job in (
        DecodeJob(root=store.root, series="s"),
        DecodeJob(root=store.root, series="s", model=first.identity),
    ):
        decode_series(job)
    rows = online(store, "seed0")
    assert set(rows["model"]) == {first.identity, second.identity}


def test_where_the_probabilities_do_not_belong_is_said(store: Store) -> None:
    put(store, 9, (100, 110, 500))
    notes = decode_series(DecodeJob(root=store.root, series="s", run="seed9"))["notes"]
    assert len(notes) == 2
    assert "run seed9 begins at step 100, the runs of the fit at 0" in notes[0]
    assert "run seed9 is beyond step 390" in notes[1]


def test_what_cannot_be_decoded_is_one_sentence(store: Store) -> None:
    with pytest.raises(UsageError, match="fit the states first"):
        decode_series(DecodeJob(root=store.root, series="nothing"))
    with pytest.raises(UsageError, match="no model 'zz' of series 's'"):
        decode_series(DecodeJob(root=store.root, series="s", model="zz"))
    with pytest.raises(UsageError, match=r"no run 'seed7' \(it has seed0, seed1"):
        decode_series(DecodeJob(root=store.root, series="s", run="seed7"))
    fit_series(states_job(store, fit=FIT.model_copy(update={"scale": "per-run"})))
    with pytest.raises(
        UsageError, match="scale = per-run, which scales a checkpoint with those that come after"
    ):
        decode_series(DecodeJob(root=store.root, series="s"))


def test_a_model_of_an_earlier_version_is_refused(store: Store) -> None:
    rows = store.table("state_models", "s").to_pylist()
    old = [{k: v for k, v in row.items() if k not in ("grid", "grid_steps", "recorded_at")} for row in rows]
    for row in old:
        row["model"] = "0" * 32
    store.write("state_models", old, series="s", name="0" * 32)
    with pytest.raises(UsageError, match=r"by an earlier version.*fit the states again"):
        decode_series(DecodeJob(root=store.root, series="s"))
