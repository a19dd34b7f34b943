"""`ontogeny import`, and states, curves and the report of a series that is only in the store."""

import json
import re
from pathlib import Path

import pytest
from flow_support import Cli

from storage import open_root


@pytest.fixture(scope="module")
def evals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("evals") / "evals.csv"
    lines = ["model,shots,step,task,metric,value"]
    for run in range(3):
        for index in range(24):
            value = 0.25 * (index // 8) + 0.01 * ((5 * index + run) % 7) + 0.1
            lines += [f"size {run},zero,{index},t,acc,{value}", f"size {run},five,{index},t,acc,{value / 2}"]
            lines += [f"size {run},zero,{index},u-v,ppl,{100 - 90 * value}"]
    file.write_text("\n".join(lines))
    return file


def words(text: str) -> str:
    return " ".join(text.split())


def test_from_a_file_to_a_map(evals: Path, cli: Cli, tmp_path: Path) -> None:
    root = ("--root", str(tmp_path))
    command = ("import", str(evals), "--series", "evals", "--where", "shots=zero", *root)
    tried = cli(*command, "--dry-run")
    assert tried.returncode == 0, tried.stderr
    assert (
        "run = model, step = step, metric = task + metric, value = value, where shots is zero" in tried.stdout
    )
    assert "Nothing was written." in tried.stdout
    assert not (tmp_path / "tables").exists()

    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert "runs renamed: 'size 0' is size-0" in words(done.stdout)
    assert "Imported 144 values as series evals." in done.stdout
    assert "nothing changed" in cli(*command).stdout
    invocations = [r for r in open_root(tmp_path).table("provenance").to_pylist() if r["command"] == "import"]
    assert sorted(json.loads(row["counts"])["values_written"] for row in invocations) == [0, 144]

    states = cli("states", "evals", *root, "--set", "states.fit.k_max=3", "--set", "states.fit.restarts=3")
    assert states.returncode == 0, states.stderr
    assert "all 2 imported metrics are taken" in words(states.stdout)
    assert "3 states (fitted)." in states.stdout
    refits = r"(?: \[[^]]*\])?"
    assert re.search(rf"size-1: 0 -> 1 at step 8{refits}, 1 -> 2 at step 16", states.stdout)

    curves = cli("curves", "evals", *root)
    assert curves.returncode == 0, curves.stderr
    assert "all 2 imported metrics are taken" in words(curves.stdout)
    assert "u_v_ppl" in curves.stdout

    report = cli("report", "evals", *root)
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "reports" / "evals.html").read_text(encoding="utf-8")
    assert "u_v_ppl" in page
    assert "evals.csv" in page


def test_one_sentence_and_exit_code_2(evals: Path, cli: Cli, tmp_path: Path) -> None:
    for extra, sentence in (
        ((), "no use is made of shots yet"),
        (("--where", "shots"), "--where 'shots' is not LEFT=RIGHT"),
        (("--duplicates", "median"), "duplicates: Input should be"),
        (("--run-name", "a b"), "run name 'a b' is not usable"),
    ):
        done = cli("import", str(evals), "--series", "evals", "--root", str(tmp_path), *extra)
        assert done.returncode == 2, done.stdout
        assert sentence in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_series_that_is_nowhere(cli: Cli, tmp_path: Path) -> None:
    done = cli("states", "nowhere", "--root", str(tmp_path))
    assert done.returncode == 2
    assert "there is no series 'nowhere'" in done.stderr
    (tmp_path / "x.csv").write_text("step,a\n0,1\n1,2\n")
    cli("import", str(tmp_path / "x.csv"), "--series", "x", "--root", str(tmp_path))
    done = cli("states", "x", "--root", str(tmp_path), "--set", "measure.batch=2")
    assert done.returncode == 2
    assert "unknown setting 'measure'" in done.stderr
