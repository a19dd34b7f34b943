"""From planted metrics to the map, its drivers and a detour, by the command line."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from flow_support import Cli
from scipy import stats

from storage import Store, open_root

# Means of the states in the metrics' own units; 3 is the detour, between 0 and 1 in the runs that take it.
MEANS = {"loss": (9.0, 6.0, 2.0, 8.0), "l2": (10.0, 20.0, 80.0, 5.0)}
RUNS = 16
STEPS = [0, *range(10, 600, 10)]


def planted_path(run: int) -> np.ndarray:
    rng = np.random.default_rng(run)
    parts = [(0, rng.integers(8, 14)), (1, rng.integers(8, 14)), (2, 60)]
    if run % 2:
        parts.insert(1, (3, rng.integers(6, 10)))
    return np.concatenate([np.full(length, state) for state, length in parts])[: len(STEPS)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Root with the metrics, and the series file."""
    root = tmp_path_factory.mktemp("planted")
    store = Store(root)
    rng = np.random.default_rng(0)
    for run in range(RUNS):
        path = planted_path(run)
        rows = [
            {
                "step": step,
                "tokens": 1000 * step,
                "analyzer": metric,
                "metric": metric,
                "value": float(np.exp(np.log(means[state]) + 0.02 * rng.normal())),
                "n": 1,
                "protocol": json.dumps({"analyzer": metric}),
            }
            for step, state in zip(STEPS, path, strict=True)
            for metric, means in MEANS.items()
        ]
        store.write("metrics", rows, series="planted", run=f"seed{run:02}", name="all")
    file = root / "planted.toml"
    file.write_text(
        'name = "planted"\n[source]\nkind = "dir"\npath = "nowhere"\n'
        '[states]\ntrajectories = ["loss", "l2"]\ntransforms = {l2 = "log"}\n'
        "[states.fit]\nk_max = 4\nrestarts = 6\n"
    )
    return root, file


@pytest.fixture(scope="module")
def fitted(planted: tuple[Path, Path], cli: Cli) -> tuple[Path, str]:
    root, file = planted
    done = cli("states", str(file), "--root", str(root))
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def number_of(root: Path) -> dict[int, int]:
    """Planted state -> number of the fitted one, by the mean loss."""
    means = open_root(root).table("state_means", "planted").to_pandas()
    losses = means[means["metric"] == "loss"].set_index("state")["mean"]
    assert len(losses) == 4
    return {planted: int((losses - loss).abs().idxmin()) for planted, loss in enumerate(MEANS["loss"])}


def test_what_stands_beside_the_map_is_printed(fitted: tuple[Path, str]) -> None:
    root, said = fitted
    (row,) = open_root(root).table("nulls", "planted").to_pylist()
    assert row["explained"] is False
    assert row["sentence"] in said
    assert f"does not explain these trajectories as well (gap {row['gap']:+.3g} nats" in said
    assert "Agreement with the states (adjusted Rand index, 1: the same, 0: chance):" in said
    assert "  k-means: 1.00 (16 runs)" in said
    assert "  change points: 1.00 (16 runs)" in said


def test_states_have_their_means_in_the_metrics_own_units(fitted: tuple[Path, str]) -> None:
    root, _ = fitted
    number = number_of(root)
    assert sorted(number.values()) == [0, 1, 2, 3]
    rows = open_root(root).table("state_means", "planted").to_pandas().set_index(["state", "metric"])
    for metric, means in MEANS.items():
        for state, mean in enumerate(means):
            row = rows.loc[(number[state], metric)]
            assert row["mean"] == pytest.approx(mean, rel=0.02)
            assert row["low"] < row["mean"] < row["high"]


def test_the_report_shows_the_models_mean_beside_the_observed_one(fitted: tuple[Path, str], cli: Cli) -> None:
    root, _ = fitted
    done = cli("report", "planted", "--root", str(root))
    assert done.returncode == 0, done.stderr
    page = (root / "reports" / "planted.html").read_text(encoding="utf-8")
    store = open_root(root)
    states = store.table("states", "planted").to_pandas()
    means = store.table("state_means", "planted").to_pandas().set_index(["state", "metric"])["mean"]
    values = store.table("metrics", "planted").wide(metrics=["loss"]).merge(states, on=["run", "step"])
    for state, part in values.groupby("state"):
        shown = (part["loss"].mean(), len(part), means[state, "loss"])
        numbers = "".join(f'<td class="num">{value:.5g}</td>' for value in shown)
        assert numbers in page


def test_boundaries_are_printed_with_their_bootstrap(fitted: tuple[Path, str]) -> None:
    root, printed = fitted
    row = open_root(root).table("boundaries", "planted").to_pylist()[0]
    assert row["bootstrap_low"] == row["bootstrap_high"] == row["step"]
    assert f"{row['from']} -> {row['to']} at step {row['step']:,} [{row['step']:,}" in printed
    assert "refits to resampled runs" in " ".join(printed.split())


def test_transitions_and_boundaries_are_the_planted_ones(fitted: tuple[Path, str]) -> None:
    root, _ = fitted
    number = number_of(root)
    old = {new: planted for planted, new in number.items()}
    found = open_root(root).table("boundaries", "planted").to_pandas()
    for run in range(RUNS):
        path = planted_path(run)
        arrivals = np.flatnonzero(np.diff(path)) + 1
        rows = found[found["run"] == f"seed{run:02}"].sort_values("step")
        assert rows["step"].tolist() == [STEPS[t] for t in arrivals]
        assert [old[state] for state in rows["to"]] == path[arrivals].tolist()
        # Far apart states: the posterior passes between two neighbouring checkpoints.
        assert rows["low"].tolist() == rows["before"].tolist() == [STEPS[t - 1] for t in arrivals]
        assert rows["high"].tolist() == rows["step"].tolist()
        assert rows["dwell_checkpoints"].tolist() == np.diff([0, *arrivals]).tolist()
        assert rows["dwell_steps"].tolist() == np.diff([0, *rows["step"]]).tolist()
        assert (rows["dwell_tokens"] == 1000 * rows["dwell_steps"]).all()
    edges = open_root(root).table("transitions", "planted").to_pandas().set_index(["from", "to"])
    detour = edges.loc[(number[3], number[1])]
    assert (detour["count"], len(detour["runs"])) == (8, 8)
    stays = [int((planted_path(run) == 3).sum()) for run in range(1, RUNS, 2)]
    assert detour["dwell_checkpoints"] == np.median(stays)
    assert detour["dwell_tokens"] == 10_000 * np.median(stays)


def test_drivers_are_stored_and_printed_with_signed_shifts(fitted: tuple[Path, str]) -> None:
    root, printed = fitted
    number = number_of(root)
    rows = open_root(root).table("drivers", "planted").to_pandas()
    edge = rows[(rows["from"] == number[0]) & (rows["to"] == number[3])]
    whole = edge[edge["run"].isna()].set_index("metric")
    assert sorted(whole["rank"]) == [1, 2]
    assert set(whole["runs"]) == {8}
    assert whole.loc["loss", "shift"] == pytest.approx(-1, abs=0.2)
    assert whole.loc["l2", "shift"] == pytest.approx(-5, abs=0.3)
    for metric in MEANS:
        each = edge[edge["run"].notna() & (edge["metric"] == metric)]
        assert len(each) == 8
        assert each["score"].mean() == pytest.approx(whole.loc[metric, "score"])
    assert f"  {number[0]} -> {number[3]}: " in printed


def test_the_detour_is_named(fitted: tuple[Path, str], cli: Cli) -> None:
    root, _ = fitted
    number = number_of(root)
    done = cli("outcomes", "planted", "--root", str(root), "--metric", "loss", "--below", "4.0")
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    assert printed.startswith("First step with loss below 4: 16 runs,")
    assert f"State {number[3]} is a detour: 8 runs did without it" in printed
    assert "The fit of the states used loss: " in printed
    (row,) = open_root(root).table("outcomes", "planted").to_pylist()
    values = {each["run"]: each["value"] for each in row["values"]}
    assert values == {f"seed{run:02}": STEPS[int((planted_path(run) != 2).sum())] for run in range(RUNS)}
    assert [each["state"] for each in row["states"] if each["detour"]] == [number[3]]
    # The same least squares with an intercept and one state dropped, by hand.
    shares = np.stack([np.bincount(planted_path(run), minlength=4) / len(STEPS) for run in range(RUNS)])
    design = np.column_stack([np.ones(RUNS), shares[:, 1:]])
    y = np.array([values[f"seed{run:02}"] for run in range(RUNS)])
    residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert row["r2"] == pytest.approx(1 - residual @ residual / ((y - y.mean()) ** 2).sum())
    pairs = [np.abs(shares[i] - shares[j]).sum() / 2 for i in range(RUNS) for j in range(i)]
    assert row["dissimilarity"] == pytest.approx(np.mean(pairs))


def test_an_outcome_may_come_from_a_file(fitted: tuple[Path, str], cli: Cli, tmp_path: Path) -> None:
    root, _ = fitted
    rng = np.random.default_rng(1)
    file = tmp_path / "accuracy.csv"
    outcomes = {f"seed{run:02}": float(rng.normal()) for run in range(RUNS - 1)}
    table = pd.DataFrame({"run": [*outcomes, "other"], "outcome": [*outcomes.values(), 1.0]})
    table.to_csv(file, index=False)
    done = cli("outcomes", "planted", "--root", str(root), "--file", str(file), "--permutations", "999")
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    assert "Left out because they have no outcome: seed15." in printed
    assert "Left out because they have no states: other." in printed
    rows = open_root(root).table("outcomes", "planted").to_pandas().set_index("outcome")
    row = rows.loc["outcome of accuracy.csv"]
    assert row["permutations"] == 999
    assert row["p"] == pytest.approx(stats.f.sf(row["f"], row["rank"] - 1, RUNS - 1 - row["rank"]))
    assert {each["run"]: each["value"] for each in row["values"]} == pytest.approx(outcomes)


def test_too_few_converging_runs_are_one_sentence_without_numbers(
    fitted: tuple[Path, str], cli: Cli, tmp_path: Path
) -> None:
    root, _ = fitted
    file = tmp_path / "few.csv"
    file.write_text("run,outcome\nseed00,1\nseed01,2\nseed02,\n")
    done = cli("outcomes", "planted", "--root", str(root), "--file", str(file))
    assert done.returncode == 0, done.stderr
    assert "No regression: 2 runs have an outcome, and a regression on 4 states" in " ".join(
        done.stdout.split()
    )
    assert "R2" not in done.stdout
    rows = open_root(root).table("outcomes", "planted").to_pandas().set_index("outcome")
    assert pd.isna(rows.loc["outcome of few.csv", "r2"])
    assert rows.loc["outcome of few.csv", "states"] is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "give --metric with --below or --above, or --file"),
        (("--metric", "loss"), "give --metric with --below or --above, or --file"),
        (("--metric", "loss", "--below", "4", "--above", "5"), "exclude each other"),
        (("--metric", "rank", "--below", "4"), "metric 'rank' is not in the store"),
        (("--file", "nowhere.csv"), "nowhere.csv cannot be read as CSV"),
    ],
)
def test_bad_questions_are_one_sentence(
    fitted: tuple[Path, str], cli: Cli, arguments: tuple[str, ...], sentence: str
) -> None:
    done = cli("outcomes", "planted", "--root", str(fitted[0]), *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run,value\na,1\n", "has no column 'outcome'"),
        ("run,outcome\nseed00,1\nseed00,2\n", "run 'seed00' occurs twice"),
        ("run,outcome\nseed00,fast\n", "outcome 'fast' is no number"),
        ("run,outcome\nseed00,inf\n", "outcome 'inf' is no number"),
        ("run,outcome\n,1\n", "a row names no run"),
        ("run,outcome\nother,1\n", "no run of it has states"),
    ],
)
def test_bad_files_are_one_sentence(
    fitted: tuple[Path, str], cli: Cli, tmp_path: Path, text: str, sentence: str
) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(text)
    done = cli("outcomes", "planted", "--root", str(fitted[0]), "--file", str(file))
    assert done.returncode == 2
    assert sentence in done.stderr


def test_without_a_fit_there_is_one_sentence(planted: tuple[Path, Path], cli: Cli, tmp_path: Path) -> None:
    arguments = (str(planted[1]), "--root", str(tmp_path), "--metric", "loss", "--below", "4")
    done = cli("outcomes", *arguments)
    assert done.returncode == 2
    assert "no states of series 'planted' are fitted" in done.stderr
