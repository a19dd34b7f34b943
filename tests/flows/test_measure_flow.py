"""Measuring end to end: tables, a second call, damage, and a kill at any moment."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars
import pyarrow.dataset
import pytest
from flow_support import ALONE, TINY, Cli, counting, lines_in, measured_rows, wait_for, watched
from pandas.testing import assert_frame_equal

from flows.config import DEFAULT_ANALYZERS
from storage import open_root

BATCHES_PER_PASS = 5  # 24 sequences in batches of 8, and 16 of random repeats
CHECKPOINTS = 12


@pytest.fixture(scope="module")
def undisturbed(tiny_series: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    done = cli("measure", f"dir:{tiny_series}", "--root", str(root), *TINY)
    assert done.returncode == 0, done.stderr
    results = 12 * len(DEFAULT_ANALYZERS)
    assert f"Measured 12 checkpoints ({results} results, 24 forward passes)" in done.stdout
    return root


def test_every_checkpoint_has_every_metric(undisturbed: Path) -> None:
    metrics = open_root(undisturbed).table("metrics").to_pandas()
    loss = metrics[metrics["metric"] == "loss"].pivot(index="step", columns="run", values="value")
    assert list(loss.index) == [0, 1, 2, 4, 6, 8]
    assert list(loss.columns) == ["seed0", "seed1"]
    # Untrained: uniform over 300 tokens but for the small random logits.
    assert abs(loss.loc[0] - 5.70).max() < 0.1
    assert (loss.loc[8] < loss.loc[0]).all()
    measured = metrics[metrics["analyzer"] != "training_log"]
    against_previous = measured["metric"].str.endswith("_previous")
    assert measured[~against_previous].groupby(["run", "step"]).size().nunique() == 1
    assert set(measured["step"][against_previous]) == {1, 2, 4, 6, 8}
    assert set(metrics["n"][metrics["metric"] == "loss"]) == {24 * 31}


def test_the_query_of_the_readme_runs(undisturbed: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace('"ontogeny-data"', repr(str(undisturbed))), names)
    assert list(names["wide"]["step"].unique()) == [0, 1, 2, 4, 6, 8]


def test_plain_readers_see_the_same_rows(undisturbed: Path) -> None:
    for table in ("metrics", "spectra", "checkpoints", "provenance"):
        expected = len(open_root(undisturbed).table(table, history=True))
        files = f"{undisturbed}/tables/{table}/**/*.parquet"
        assert pyarrow.dataset.dataset(f"{undisturbed}/tables/{table}").count_rows() == expected
        assert len(pd.read_parquet(undisturbed / "tables" / table)) == expected
        assert polars.scan_parquet(files).collect().height == expected
        assert duckdb.sql(f"select count(*) from '{files}'").fetchall() == [(expected,)]


def test_the_training_log_stands_beside_what_is_measured(undisturbed: Path, tiny_series: Path) -> None:
    metrics = open_root(undisturbed).table("metrics").to_pandas()
    logged = metrics[metrics["metric"] == "train_loss"].set_index(["run", "step"])["value"]
    assert sorted(logged.index) == [(run, step) for run in ("seed0", "seed1") for step in range(1, 9)]
    lines = (tiny_series / "seed1" / "training_log.jsonl").read_text().splitlines()
    assert logged["seed1"].tolist() == [json.loads(line)["loss"] for line in lines]


def test_second_call_measures_nothing(undisturbed: Path, tiny_series: Path, cli: Cli) -> None:
    before = measured_rows(undisturbed, "metrics")
    again = cli("measure", f"dir:{tiny_series}", "--root", str(undisturbed), *TINY)
    assert again.returncode == 0, again.stderr
    assert "All 12 checkpoints were already there; nothing was measured anew." in again.stdout
    assert_frame_equal(measured_rows(undisturbed, "metrics"), before)
    counts = json.loads(open_root(undisturbed).table("provenance").to_pylist()[-1]["counts"])
    assert counts["forward_passes"] == 0


def test_a_new_analyzer_measures_only_itself(tiny_series: Path, cli: Cli, tmp_path: Path) -> None:
    cli("measure", f"dir:{tiny_series}", "--root", str(tmp_path), "--analyzer", "loss", "--steps", "0", *TINY)
    more = cli("measure", f"dir:{tiny_series}", "--root", str(tmp_path), "--steps", "0", *TINY)
    results = 2 * (len(DEFAULT_ANALYZERS) - 1)
    assert f"Measured 2 checkpoints ({results} results, 4 forward passes)" in more.stdout


def test_comparing_with_all_three_takes_one_pass_more(tiny_series: Path, cli: Cli, tmp_path: Path) -> None:
    against = 'measure.parameters.similarity.against=["first","previous","last"]'
    own = ("--analyzer", "similarity", "--set", against, "--set", "measure.parameters.similarity.seed=11")
    done = cli("measure", f"dir:{tiny_series / 'seed0'}", "--root", str(tmp_path), *own, *TINY)
    # The last checkpoint is run when the first is compared with it, and in its own turn.
    assert "Measured 6 checkpoints (6 results, 7 forward passes)" in done.stdout
    cka = open_root(tmp_path).table("metrics").wide(["cka_last"])
    assert cka["cka_last[final_norm]"].tolist()[-1] == pytest.approx(1)


def test_dry_run_says_what_is_missing(undisturbed: Path, tiny_series: Path, cli: Cli) -> None:
    parameters = ("--set", "measure.parameters.spectra.tokens=last")
    done = cli("measure", f"dir:{tiny_series}", "--root", str(undisturbed), "--dry-run", *TINY, *parameters)
    assert "12 of 12 checkpoints to measure" in done.stdout
    assert "0.00 GB of them to download" in " ".join(done.stdout.split())
    assert "Forward passes: about 0:00:00 on this machine" in done.stdout
    assert "spectra" in done.stdout
    assert "weights" not in done.stdout.replace("of weights to read", "")


@pytest.mark.parametrize("number", [1, pytest.param(7, marks=pytest.mark.long)])
def test_kill_then_again_equals_undisturbed(
    number: int, undisturbed: Path, tiny_series: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "passes"
    root = tmp_path / "root"
    arguments = ["measure", f"dir:{tiny_series}", "--root", str(root), *TINY]
    command = watched(counting, log, arguments)
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: lines_in(log) >= number * BATCHES_PER_PASS, first)
    first.kill()
    first.wait()
    complete = len(list(root.glob("tables/metrics/**/loss-*.parquet")))
    before = lines_in(log)
    again = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    for table in ("metrics", "spectra"):
        assert_frame_equal(measured_rows(root, table), measured_rows(undisturbed, table))
    after = lines_in(log) - before
    # Whatever was stored is not run again, but for the two that the next one is compared with.
    assert after <= (CHECKPOINTS - complete + 2) * BATCHES_PER_PASS
    assert complete >= number - 1


def test_one_damaged_checkpoint_is_named_and_the_others_go_on(
    series: Path, cli: Cli, tmp_path: Path, undisturbed: Path
) -> None:
    weights = series / "seed1" / "step4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    root = tmp_path / "root"
    done = cli("measure", f"dir:{series}", "--root", str(root), *ALONE, *TINY)
    assert done.returncode == 1
    assert "Measured 11 checkpoints" in done.stdout
    assert "failed: seed1/step4" in done.stdout
    (failure,) = open_root(root).table("failures").to_pylist()
    assert (failure["run"], failure["step"], failure["attempt"]) == ("seed1", 4, 1)
    assert "truncated: 5000 of" in failure["error"]
    (finding,) = open_root(root).table("findings").to_pylist()
    assert (finding["kind"], finding["severity"]) == ("damaged", "error")
    expected = measured_rows(undisturbed, "metrics")
    expected = expected[expected["analyzer"].isin([*ALONE, "training_log"])]
    lost = (expected["run"] == "seed1") & (expected["step"] == 4) & (expected["analyzer"] != "training_log")
    expected = expected[~lost].reset_index(drop=True)
    assert_frame_equal(measured_rows(root, "metrics"), expected)


def test_weights_that_do_not_fill_the_model_are_a_failure(series: Path, cli: Cli, tmp_path: Path) -> None:
    for run in ("seed0", "seed1"):
        config = series / run / "step8" / "config.json"
        config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    done = cli("measure", f"dir:{series}", "--root", str(tmp_path / "root"), "--steps", "6,8", *TINY)
    assert done.returncode == 1
    failures = open_root(tmp_path / "root").table("failures").to_pandas()
    assert list(failures["step"]) == [8, 8]
    assert failures["error"].str.contains("parameters are not in the weights").all()


def test_going_back_to_an_earlier_protocol_shows_it(tiny_series: Path, cli: Cli, tmp_path: Path) -> None:
    def shown(tokens: str) -> set[int]:
        arguments = ("--steps", "0,8", "--analyzer", "spectra", *TINY)
        choice = f"measure.parameters.spectra.tokens={tokens}"
        done = cli("measure", f"dir:{tiny_series}", "--root", str(tmp_path), *arguments, "--set", choice)
        assert done.returncode == 0, done.stderr
        metrics = open_root(tmp_path).table("metrics").to_pandas()
        return {int(n) for n in metrics.loc[metrics["analyzer"] == "spectra", "n"]}

    assert shown("all") == {24 * 32}
    assert shown("last") == {24}
    # Nothing is computed now, and half of the steps cannot stand for the whole: all of them are shown.
    assert shown("all") == {24 * 32}
    assert len(open_root(tmp_path).table("metrics").wide(["rankme"])) == 4


def test_unchosen_steps_are_no_gaps(tiny_series: Path, cli: Cli, tmp_path: Path) -> None:
    cli("audit", f"dir:{tiny_series}", "--root", str(tmp_path), "--steps", "0,2,8")
    assert len(open_root(tmp_path).table("findings")) == 0
