"""The fit of a series out of a real store: several analyzers, gaps, patterns, and what is stored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyzers.latent import StateSettings
from storage import Store
from storage.errors import UsageError
from tasks.states import StatesJob, fit_series

STEPS = tuple(range(0, 300, 10))
FIT = StateSettings(k_max=3, restarts=4, folds=2, fold_restarts=2, bootstraps=2)


def _rows(run: int, step: int) -> list[dict[str, Any]]:
    """Two states that change at step 150: measured loss and layers, and an imported score every 20 steps."""
    rng = np.random.default_rng([run, step])
    level = float(step >= 150)
    common = {"step": step, "tokens": step * 100, "n": 1}
    rows = [{**common, "analyzer": "loss", "metric": "loss", "value": 5 - 3 * level + 0.1 * rng.normal()}]
    for layer in range(2):
        value = 10 * np.exp(2 * level + 0.1 * rng.normal())
        rows.append(
            {
                **common,
                "analyzer": "spectra",
                "metric": "rankme_cov",
                "site": "resid_post",
                "layer": layer,
                "value": value,
            }
        )
    if step % 20 == 0:
        rows.append(
            {**common, "analyzer": "import", "metric": "eval/acc", "value": level + 0.1 * rng.normal()}
        )
    return [{**row, "protocol": row["analyzer"]} for row in rows]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three runs; run 2 lacks every third checkpoint."""
    store = Store(tmp_path)
    for run in range(3):
        for step in STEPS:
            if run < 2 or step % 30:
                store.write("metrics", _rows(run, step), series="s", run=f"seed{run}", name=f"step{step}")
    return store


def _job(store: Store, **changes: Any) -> StatesJob:
    given = {
        "trajectories": ("loss", "rankme*[*.mean]", "eval/*"),
        "transforms": {"rankme*": "log"},
        "grid": "union",
        "min_share": 0.1,
        "fit": FIT,
    }
    return StatesJob(root=store.root, series="s", **{**given, **changes})


def test_a_mixture_with_gaps_is_fitted_and_its_numbers_are_stored(store: Store) -> None:
    done = fit_series(_job(store))
    assert done["computed"]
    assert not fit_series(_job(store))["computed"]
    models = sorted(store.table("state_models", "s").to_pylist(), key=lambda row: row["k"])
    assert [row["chosen"] for row in models] == [False, True, False]
    chosen = models[1]
    assert chosen["metrics"] == ["loss", "rankme_cov[resid_post.mean]", "eval/acc"]
    assert chosen["rule"] == "agreement"
    for name in ("bic", "aic", "icl", "heldout", "heldout_loglik", "ari", "bootstrap_ari"):
        assert np.isfinite(chosen[name])
    saved = json.loads(chosen["parameters"])
    assert saved["transforms"] == {"rankme_cov[resid_post.mean]": "log"}
    notes = " ".join(saved["notes"])
    assert "metric eval/acc: 40 of 80 values are missing, in 3 runs; they are marginalised out" in notes
    assert "9 of 89 frames have no value" in notes
    states = store.table("states", "s").to_pandas()
    # No row where there is no checkpoint, and the planted change everywhere else.
    assert len(states) == 80
    assert (states["state"] == (states["step"] >= 150)).all()
    assert (states["tokens"] == 100 * states["step"]).all()


def test_boundaries_have_the_interval_of_the_refits(store: Store) -> None:
    """The planted change is sharp: every refit to resampled runs puts it at one checkpoint."""
    fit_series(_job(store))
    rows = store.table("boundaries", "s").to_pylist()
    assert len(rows) == 3
    for row in rows:
        assert (row["step"], row["bootstrap_low"], row["bootstrap_high"]) == (row["step"],) * 3
        assert row["bootstrap_refits"] == FIT.bootstraps
    alone = Store(Path(store.root) / "alone")
    for step in STEPS:
        alone.write("metrics", _rows(0, step), series="s", run="seed0", name=f"step{step}")
    fit_series(_job(alone))
    (row,) = alone.table("boundaries", "s").to_pylist()
    assert row["step"] == 150
    assert [row[f"bootstrap_{name}"] for name in ("low", "high", "refits")] == [None] * 3
    model = next(each for each in alone.table("state_models", "s").to_pylist() if each["chosen"])
    assert "no boundary has a bootstrap interval" in " ".join(json.loads(model["parameters"])["notes"])


def test_the_settings_of_the_job_are_part_of_its_identity(store: Store) -> None:
    first = fit_series(_job(store))["model"]
    for change in ({"grid": "own"}, {"min_share": 0.9}, {"fit": FIT.model_copy(update={"rule": "paper"})}):
        assert fit_series(_job(store, **change))["model"] != first


def test_what_cannot_be_fitted_is_one_sentence(store: Store) -> None:
    with pytest.raises(UsageError, match="metric 'nothing' is not in the store"):
        fit_series(_job(store, trajectories=("nothing",)))
    with pytest.raises(UsageError, match="measure it first"):
        fit_series(StatesJob(**{**_job(store).model_dump(), "series": "other"}))
