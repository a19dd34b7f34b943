"""`ontogeny curves` and its place in a study."""

import json
from pathlib import Path

import pytest
from flow_support import TINY, Cli

from flows.curves import CurveRow, CurvesSummary
from flows.printing import print_curves
from storage import Store, open_root


@pytest.fixture(scope="module")
def measured(tiny_series: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("curves")
    done = cli("measure", f"dir:{tiny_series}", "--root", str(root), "--analyzer", "spectra", *TINY)
    assert done.returncode == 0, done.stderr
    return root


def test_curves_prints_every_run_and_stores_its_rows(measured: Path, tiny_series: Path, cli: Cli) -> None:
    def call() -> str:
        done = cli("curves", f"dir:{tiny_series}", "--root", str(measured))
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = call()
    for text in ("rankme_cov[resid_post.1]", "rankme_cov[final_norm]", "seed0", "seed1", "all runs"):
        assert text in printed
    view = open_root(measured).table("curves").to_pandas()
    assert len(view) == 2 * 3
    assert set(view["n"]) == {6, 12}
    # Halves are in the spectra of the same keys, so no row says that they are missing.
    assert view["note"].isna().all()
    assert "are of the same data and settings" in call()
    last = open_root(measured).table("provenance").to_pylist()[-1]
    assert (last["command"], json.loads(last["counts"])) == ("curves", {"curves_computed": 0})


def test_what_is_printed_can_be_chosen(measured: Path, tiny_series: Path, cli: Cli) -> None:
    def call(pattern: str) -> str:
        done = cli("curves", f"dir:{tiny_series}", "--root", str(measured), "--metric", pattern)
        assert done.returncode == 0, done.stderr
        return done.stdout

    one = call("rankme_cov[final_norm]")
    assert "rankme_cov[final_norm]" in one
    assert "resid_post.1" not in one
    both = call("rankme_*")
    assert "rankme_cov[final_norm]" in both
    assert "rankme_cov[resid_post.1]" in both
    assert "No stored curve is of loss*." in call("loss*")


def test_of_many_trajectories_the_first_ten_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        CurveRow(trajectory=f"metric{i:02}", run=None, shape=None, parameters={}, intervals={}, note=None)
        for i in range(13)
    ]
    skipped = [f"reason {i:02}" for i in range(11)]
    summary = CurvesSummary(
        computed=True, rows=rows, growth=rows, skipped=skipped, growth_skipped=[], heads=[], heads_skipped=[]
    )
    print_curves(summary)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("metric09") == 2
    assert "metric10" not in printed
    assert "And 3 more trajectories: table curves, or --metric PATTERN." in printed
    assert "And 3 more metrics with growth curves" in printed
    assert "And 1 more without phases" in printed
    print_curves(summary, ("metric*",))
    assert "metric12" in capsys.readouterr().out


def test_bad_settings_are_one_sentence(measured: Path, tiny_series: Path, cli: Cli) -> None:
    for setting, sentence in (
        ("curves.phases.rule.alpha=2", "curves.phases.rule.alpha: Input should be less than 0.5 (value 2)"),
        ("curves.phases.trajectories=['rank']", "metric 'rank' is not in the store"),
    ):
        done = cli("curves", f"dir:{tiny_series}", "--root", str(measured), "--set", setting)
        assert done.returncode == 2
        assert sentence in done.stderr


def test_study_finds_phases_where_it_can(tiny_series: Path, cli: Cli, tmp_path: Path) -> None:
    small = ("--set", "states.fit.k_max=2", "--set", "states.trajectories=['loss']")
    arguments = ("study", f"dir:{tiny_series}", "--root", str(tmp_path), *TINY, *small)
    without = cli(*arguments, "--analyzer", "loss")
    assert without.returncode == 0, without.stderr
    assert "No phases: trajectory 'rankme_cov[resid_post.last]'" in " ".join(without.stdout.split())
    found = cli(*arguments, "--analyzer", "loss", "--analyzer", "spectra")
    assert "rankme_cov[final_norm]" in found.stdout
    page = (tmp_path / "reports" / "tiny.html").read_text(encoding="utf-8")
    assert 'id="phase-plot"' in page
    again = cli(*arguments, "--analyzer", "loss", "--analyzer", "spectra")
    assert "Nothing was computed anew." in again.stdout


def test_births_of_heads_are_printed(cli: Cli, tmp_path: Path) -> None:
    store = Store(tmp_path)
    protocol = json.dumps({"parameters": {"induction_threshold": 0.3, "previous_threshold": 0.5}})
    rows = [
        {
            "step": step,
            "analyzer": "induction",
            "metric": metric,
            "site": "attention",
            "layer": 0,
            "head": head,
        }
        | {"value": 0.9 if metric == "prefix_matching" and step >= born else 0.0, "protocol": protocol}
        for metric in ("prefix_matching", "repeat_previous_token")
        for head, born in enumerate((512, 1000))
        for step in (0, 256, 512, 1000, 2000)
    ]
    store.write("metrics", rows, series="planted", run="seed0", name="x")
    done = cli("curves", "planted", "--root", str(tmp_path))
    assert done.returncode == 0, done.stderr
    line = "seed0: induction heads: 2, first at step 512 (after 256); previous-token heads: not seen."
    assert line in done.stdout
    # A summary row per kind for the run and for all runs, and one row for each of the two heads.
    assert len(open_root(tmp_path).table("curves").to_pandas()) == 2 * (2 + 2)


def test_values_of_sequences_are_stored_beside_their_mean(
    tiny_series: Path, cli: Cli, tmp_path: Path
) -> None:
    done = cli("measure", f"dir:{tiny_series}", "--root", str(tmp_path), "--analyzer", "massive", *TINY)
    assert done.returncode == 0, done.stderr
    store = open_root(tmp_path)
    places = ["run", "step", "key", "metric", "site", "layer"]
    metrics = store.table("metrics").to_pandas().set_index(places)["value"]
    kept = store.table("sequence_values").to_pandas().set_index(places)["values"]
    assert set(kept.index.get_level_values("metric")) == {"top1", "median", "top1_over_median"}
    for place, values in kept.items():
        assert values.mean() == pytest.approx(metrics[place], rel=1e-12)
