"""``ontogeny crosscoder`` end to end on a tiny series: its tables, its export, a kill, and bad usage."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from flow_support import TINY, Cli, lines_in, stepping, wait_for, watched
from safetensors.numpy import load_file

from analyzers.adapters import Model
from analyzers.crosscoder.population import METRICS
from flows.config import resolve
from flows.crosscoder import crosscoder_series
from flows.study import study_series
from storage import open_root
from storage.errors import OntogenyError
from storage.pool import Pool, list_pools
from tasks import crosscoder_models
from tasks.crosscoder import held_out_rows
from tasks.crosscoder_files import load_crosscoder
from tasks.models import load_model

STEPS = [0, 1, 2, 4, 6, 8]
SIZE = ("--latents", "48", "--k", "4", "--train-steps", "24", "--run", "seed0")
TRAINING = (
    *SIZE,
    *TINY,
    "--set",
    "crosscoder.train.batch=128",
    "--set",
    "crosscoder.train.learning_rate=1e-3",
    "--set",
    "crosscoder.train.held_out=6",
)
ROWS, WIDTH = 24 * 31, 32


def frame(root: Path, table: str) -> pd.DataFrame:
    return open_root(root).table(table, "tiny", "seed0").to_pandas()


def the_pool(root: Path) -> Pool:
    (info,) = list_pools(str(root), "tiny")
    return Pool.open(str(root), info.key)


def folders(root: Path) -> list[Path]:
    return sorted(root.glob("crosscoders/tiny/seed0/*"))


@pytest.fixture(scope="module")
def root(tiny_series: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root on which two seeds were trained and read, with effects on pairs of a file."""
    root = tmp_path_factory.mktemp("root")
    pairs = tmp_path_factory.mktemp("pairs") / "letters.jsonl"
    items = [{"prefix": f"{a}{b}", "right": "Z", "wrong": "X"} for a in "QJK" for b in "789"]
    pairs.write_text("\n".join(json.dumps(item) for item in items))
    effects = ("--effects", "--set", f"crosscoder.pairs={pairs}")
    source = (f"dir:{tiny_series}", "--root", str(root))
    done = cli("crosscoder", *source, *TRAINING, "--seeds", "2", *effects)
    assert done.returncode == 0, done.stderr
    assert "Harvested 6 snapshots into the pool." in done.stdout
    assert "seed0: trained 2; 48 latents on 744 rows" in done.stdout
    return root


@pytest.fixture(scope="module")
def dense(root: Path) -> dict[str, np.ndarray]:
    """The first seed's crosscoder on the whole pool, by the dense formulas on its exported files."""
    rows = frame(root, "crosscoders")
    key = rows[rows["first"]]["crosscoder"].iloc[0]
    folder = root / "crosscoders" / "tiny" / "seed0" / key
    w = {
        name: tensor.astype(np.float64) for name, tensor in load_file(folder / "weights.safetensors").items()
    }
    assert w["W_enc"].shape == (6, WIDTH, 48)
    assert w["W_dec"].shape == (6, 48, WIDTH)
    config = json.loads((folder / "config.json").read_text())
    assert config["steps"] == STEPS
    shards = sorted(
        root.glob("pools/*/step*/shard-0000.npy"), key=lambda p: int(p.parent.name.split("-")[0][4:])
    )
    stored = np.stack([np.load(path).astype(np.float64) for path in shards])  # [S, n, d]
    x = stored * np.array(config["scale"])[:, None, None]
    before = np.maximum(np.einsum("snd,sdm->nm", x, w["W_enc"]) + w["b_enc"], 0)
    norms = np.linalg.norm(w["W_dec"], axis=2)  # [S, m]
    f = before * (before * norms.sum(axis=0) > w["threshold"])
    xhat = np.einsum("nm,smd->snd", f, w["W_dec"]) + w["b_dec"][:, None]
    return {
        "x": x,
        "f": f,
        "xhat": xhat,
        "norms": norms,
        "decoder": w["W_dec"],
        "scale": np.array(config["scale"]),
    }


def explained(x: np.ndarray, xhat: np.ndarray) -> np.ndarray:
    spread = ((x - x.mean(axis=1, keepdims=True)) ** 2).sum(axis=(1, 2))
    return np.asarray(1 - ((x - xhat) ** 2).sum(axis=(1, 2)) / spread)


def test_quality_is_that_of_the_dense_formula(root: Path, dense: dict[str, np.ndarray]) -> None:
    rows = frame(root, "crosscoders")
    assert sorted(rows["seed"]) == [0] * 6 + [1] * 6
    mine = rows[rows["first"]].sort_values("step")
    np.testing.assert_allclose(mine["explained_variance"], explained(dense["x"], dense["xhat"]), atol=1e-5)
    out = the_pool(root).tokens[:, 0] % 6 == 5
    assert (mine["held_out_rows"] == 4 * 31).all()
    held = explained(dense["x"][:, out], dense["xhat"][:, out])
    np.testing.assert_allclose(mine["explained_held_out"], held, atol=1e-5)
    np.testing.assert_allclose(mine["l0"], (dense["f"] > 0).sum() / ROWS, rtol=1e-9)
    np.testing.assert_allclose(mine["dead"], ((dense["f"] > 0).sum(axis=0) == 0).mean())
    assert (mine["spliced_share"] == 1).all()
    assert mine["spliced_explained"].notna().all()
    np.testing.assert_allclose(mine["loss_increase"], mine["spliced_loss"] - mine["clean_loss"])
    assert mine["shared"].between(0, 1).all()
    assert rows[~rows["first"]]["splice_note"].str.startswith("only the first seed").all()


def test_features_are_those_of_the_weights(root: Path, dense: dict[str, np.ndarray]) -> None:
    rows = frame(root, "features").sort_values(["feature", "step"])
    live = np.flatnonzero((dense["f"] > 0).any(axis=0))
    assert rows["feature"].unique().tolist() == live.tolist()
    assert rows["step"].tolist() == STEPS * len(live)
    strength = dense["norms"].T[live]
    np.testing.assert_allclose(rows["strength"], strength.ravel(), rtol=1e-5)
    np.testing.assert_allclose(rows["strength_unscaled"], (strength / dense["scale"]).ravel(), rtol=1e-5)
    share = strength / strength.max(axis=1, keepdims=True)
    birth = np.array(STEPS)[(share >= 0.5).argmax(axis=1)]
    assert rows[rows["step"] == 0]["birth"].tolist() == birth.tolist()
    assert rows["stability"].notna().any()
    # Latent scaling of one feature by its definition.
    i = int(dense["f"].sum(axis=0).argmax())
    reference = int(dense["norms"][:, i].argmax())
    d, f = dense["decoder"][reference, i], dense["f"][:, i]
    left = dense["x"] - dense["xhat"] + f[:, None] * dense["decoder"][:, i][:, None]
    beta = np.einsum("snd,n,d->s", left, f, d) / ((f @ f) * (d @ d))
    np.testing.assert_allclose(rows[rows["feature"] == i]["beta"], beta, atol=1e-4)


def test_contexts_are_the_strongest_activations(root: Path, dense: dict[str, np.ndarray]) -> None:
    rows = frame(root, "feature_contexts")
    pool = the_pool(root)
    i = int(dense["f"].sum(axis=0).argmax())
    mine = rows[rows["feature"] == i].sort_values("rank")
    order = np.argsort(-dense["f"][:, i])[: len(mine)]
    np.testing.assert_allclose(mine["value"], dense["f"][order, i], rtol=1e-4)
    first = pool.tokens[order[0]]
    assert (mine["sequence"].iloc[0], mine["position"].iloc[0]) == (first[0], first[1])
    assert mine["token"].iloc[0]
    assert (mine["label"].notna() | mine["note"].notna()).all()


def test_metrics_of_the_population_stand_beside_the_others(root: Path) -> None:
    rows = frame(root, "metrics").query("analyzer == 'crosscoder'")
    assert set(rows["metric"]) == {m.name for m in METRICS}
    quality = frame(root, "crosscoders").query("first").sort_values("step")
    mine = rows[rows["metric"] == "crosscoder_explained_variance"].sort_values("step")
    assert mine["value"].tolist() == quality["explained_variance"].tolist()
    assert mine["step"].tolist() == STEPS
    births = rows[rows["metric"] == "feature_births"]["value"].sum()
    assert births == frame(root, "features")["feature"].nunique()
    assert rows["protocol"].nunique() == 1
    assert {"latents": 48, "k": 4}.items() <= json.loads(rows["protocol"].iloc[0])["parameters"].items()


def test_effects_have_their_control(root: Path) -> None:
    rows = frame(root, "effects")
    assert set(rows["task"]) == {"letters.jsonl"}
    whole = rows[rows["feature"].isna()].sort_values("step")
    assert whole["step"].tolist() == STEPS
    single = rows[rows["feature"].notna()]
    total = single.groupby("step")["ie"].sum()
    np.testing.assert_allclose(
        total, whole["metric"] - whole["all_ablated"] + whole["gap"].to_numpy(), atol=1e-6
    )
    relative = single.groupby("feature")["relie"].sum()
    np.testing.assert_allclose(relative[relative > 0], 1, rtol=1e-9)
    kept = whole[whole["note"].isna()]
    assert (kept["random_changes"].map(len) == 20).all()


def test_the_export_reloads_to_equal_outputs(root: Path, dense: dict[str, np.ndarray]) -> None:
    key = frame(root, "crosscoders").query("first")["crosscoder"].iloc[0]
    crosscoder = load_crosscoder(root / "crosscoders" / "tiny" / "seed0" / key)
    rows = torch.from_numpy(the_pool(root).read(np.arange(ROWS)))
    xhat = crosscoder.reconstruct(rows).view(ROWS, 6, WIDTH).permute(1, 0, 2)
    np.testing.assert_allclose(xhat.numpy(), dense["xhat"], atol=1e-4)
    assert not list(root.glob("crosscoders/**/state*"))
    assert not list(root.glob("crosscoders/**/reading-*"))


def test_a_second_call_computes_nothing_and_more_seeds_only_what_is_new(
    root: Path, tiny_series: Path, cli: Cli
) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.glob("crosscoders/**/*.safetensors")}
    source = (f"dir:{tiny_series}", "--root", str(root))
    one = cli("crosscoder", *source, *TRAINING, "--no-splice")
    assert one.returncode == 0, one.stderr
    assert "nothing was trained anew" in one.stdout
    assert "crosscoder.splice is false" in one.stdout
    assert frame(root, "crosscoders")["seed"].tolist() == [0] * 6  # the newest reading
    assert frame(root, "crosscoders")["clean_loss"].isna().all()
    count = len(list(root.glob("tables/features/**/*.parquet")))
    again = cli("crosscoder", *source, *TRAINING, "--no-splice")
    assert "nothing was trained anew" in again.stdout
    assert len(list(root.glob("tables/features/**/*.parquet"))) == count
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Back to the reading before: it is shown again, and nothing is computed.
    pairs = json.loads(
        open_root(root)
        .table("provenance", "tiny")
        .to_pandas()
        .sort_values("started")
        .query("command == 'crosscoder'")["config"]
        .iloc[0]
    )["crosscoder"]["pairs"]
    back = cli(
        "crosscoder", *source, *TRAINING, "--seeds", "2", "--effects", "--set", f"crosscoder.pairs={pairs}"
    )
    assert "nothing was trained anew" in back.stdout
    assert sorted(frame(root, "crosscoders")["seed"]) == [0] * 6 + [1] * 6
    assert len(list(root.glob("tables/features/**/*.parquet"))) == count


def test_kill_in_training_then_again_equals_undisturbed(
    root: Path, tiny_series: Path, environment: dict[str, str], cli: Cli, tmp_path: Path
) -> None:
    log, other = tmp_path / "steps", tmp_path / "root"
    arguments = ["crosscoder", f"dir:{tiny_series}", "--root", str(other), *TRAINING, "--no-splice"]
    arguments += ["--set", "crosscoder.train.save_minutes=0"]
    first = subprocess.Popen(watched(stepping, log, arguments), env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: lines_in(log) >= 5, first)
    first.kill()
    first.wait()
    done = lines_in(log)
    (folder,) = folders(other)
    assert (folder / "state.safetensors").is_file()
    assert not (folder / "config.json").exists()
    with stepping(log):
        again = cli(*arguments)
    assert again.returncode == 0, again.stderr
    later = [int(line) for line in log.read_text().splitlines()][done:]
    assert later[0] > 3
    assert later[-1] == 24
    undisturbed = frame(root, "crosscoders").query("first")["crosscoder"].iloc[0]
    assert folder.name == undisturbed
    theirs = root / "crosscoders" / "tiny" / "seed0" / undisturbed / "weights.safetensors"
    assert (folder / "weights.safetensors").read_bytes() == theirs.read_bytes()
    assert not list(folder.glob("state*"))


def test_vocabulary_rows_have_items_instead_of_contexts(tiny_series: Path, cli: Cli, tmp_path: Path) -> None:
    config = resolve(
        f"dir:{tiny_series}",
        {
            "crosscoder.mode": "unembedding",
            "crosscoder.runs": ["seed1"],
            "crosscoder.steps": "0,4,8",
            "crosscoder.train.latents": 40,
            "crosscoder.train.k": 2,
            "crosscoder.train.steps": 5,
        },
    )
    (run,) = crosscoder_series(config, str(tmp_path)).runs
    assert [q.step for q in run.quality] == [0, 4, 8]
    assert all(q.loss_increase is None for q in run.quality)
    assert "have no place in a forward pass" in run.notes[0]
    rows = open_root(tmp_path).table("feature_contexts", "tiny").to_pandas()
    assert rows["sequence"].isna().all()
    assert (rows["before"] == "").all()
    assert set(rows["note"]) == {"vocabulary items stand in no sequence"}
    assert open_root(tmp_path).table("crosscoders", "tiny").to_pandas()["rows"].unique().tolist() == [300]


def test_a_model_that_fails_is_recorded_and_the_flow_goes_on(
    tiny_series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the checkpoint of step 4 does not load, then its splice fails, then it is sound."""
    pairs = tmp_path / "letters.jsonl"
    items = [{"prefix": f"{a}{b}", "right": "Z", "wrong": "X"} for a in "QJK" for b in "789"]
    pairs.write_text("\n".join(json.dumps(item) for item in items))
    settings = {
        "measure.batch": 8,
        "probe.length": 32,
        "probe.sequences": 24,
        "crosscoder.runs": ["seed0"],
        "crosscoder.train.latents": 40,
        "crosscoder.train.k": 2,
        "crosscoder.train.steps": 5,
        "crosscoder.effects": True,
        "crosscoder.pairs": str(pairs),
    }
    config, root = resolve(f"dir:{tiny_series}", settings), tmp_path / "root"
    loaded: list[str] = []

    def load(folder: Path, *arguments: Any) -> Model:
        loaded.append(folder.name)
        if folder.name == "step4":
            raise OntogenyError("step4 is not what it was")
        return load_model(folder, *arguments)

    def failures() -> list[tuple[Any, ...]]:
        rows = frame(root, "failures").replace({np.nan: None}).sort_values("at")
        return list(rows[["step", "analyzer", "error", "attempt"]].itertuples(index=False, name=None))

    monkeypatch.setattr(crosscoder_models, "load_model", load)
    first = crosscoder_series(config, str(root))
    assert first.failed == first.runs[0].failed == ["seed0/step4"]
    assert failures() == [(4, None, "step4 is not what it was", 1)]
    rows = frame(root, "crosscoders").set_index("step")
    assert rows["clean_loss"].isna().tolist() == [step == 4 for step in rows.index]
    assert rows.loc[4, "splice_note"] == "it failed, see the table failures"
    assert rows["explained_variance"].notna().all()
    assert frame(root, "effects").empty  # every snapshot's activations are needed to find features
    # A second call asks that model alone again, and writes no table where nothing came.
    loaded.clear()
    second = crosscoder_series(config, str(root))
    assert (second.failed, second.runs[0].computed, loaded) == (first.failed, False, ["step4"])
    assert failures()[1:] == [(4, None, "step4 is not what it was", 2)]

    def splice(*arguments: Any) -> Any:
        raise ValueError("no place for it")

    monkeypatch.setattr(crosscoder_models, "load_model", load_model)
    monkeypatch.setattr(crosscoder_models, "splice_losses", splice)
    third = crosscoder_series(config, str(root))
    assert third.failed == first.failed
    assert failures()[2:] == [(4, "splice", "ValueError: no place for it", 1)]
    assert sorted(set(frame(root, "effects")["step"])) == STEPS
    monkeypatch.undo()
    last = crosscoder_series(config, str(root))
    assert last.failed == []
    assert frame(root, "crosscoders")["clean_loss"].notna().all()
    assert len(failures()) == 3
    assert not list(root.glob("crosscoders/**/reading-*"))


def test_a_study_trains_where_the_series_says_so(tiny_series: Path, cli: Cli, tmp_path: Path) -> None:
    settings = {
        "measure.analyzers": ["loss", "weights", "spectra"],
        "measure.batch": 8,
        "probe.length": 32,
        "probe.sequences": 24,
        "crosscoder.harvest": True,
        "crosscoder.runs": ["seed0"],
        "crosscoder.train.latents": 40,
        "crosscoder.train.k": 2,
        "crosscoder.train.steps": 5,
        "states.trajectories": ["loss", "feature_alive_share[resid_post.1]"],
        "states.fit.k_max": 2,
        "states.fit.restarts": 2,
        "states.fit.folds": 0,
        "states.fit.bootstraps": 0,
        "states.fit.surrogates": 0,
    }
    summary = study_series(resolve(f"dir:{tiny_series}", settings), str(tmp_path))
    assert summary.crosscoder is not None
    assert [run.run for run in summary.crosscoder.runs] == ["seed0"]
    assert 'id="crosscoders"' in Path(summary.report).read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--k", "60"), "k is 60, more than the 48 latents"),
        (("--train-steps", "0"), "crosscoder.train.steps"),
        (("--set", "crosscoder.train.held_out=1"), "leaves nothing to train on"),
        (("--set", "crosscoder.train.sprase=1"), "unknown setting 'crosscoder.train.sprase'"),
        (("--set", "crosscoder.lifecycle.alive=0"), "crosscoder.lifecycle.alive"),
        (("--run", "seed7"), "there is no run 'seed7'"),
        (("--steps", "3"), "3"),
        (("--steps", "4"), "two or more"),
        (("--effects", "--set", "crosscoder.pairs=nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_bad_settings_are_one_sentence(
    root: Path, tiny_series: Path, cli: Cli, options: tuple[str, ...], sentence: str
) -> None:
    done = cli("crosscoder", f"dir:{tiny_series}", "--root", str(root), *TRAINING, *options)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("ontogeny: ")
    assert sentence in done.stderr


def test_the_batches_hold_no_row_that_is_left_out(root: Path) -> None:
    pool = the_pool(root)
    out = held_out_rows(pool, 6)
    assert out.sum() == 4 * 31
    assert not held_out_rows(pool, 0).any()
