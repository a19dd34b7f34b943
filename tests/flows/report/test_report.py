"""The report on a store with known answers: its sentences, its data, and the page in a real Chromium."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_pages import Elements, download, open_report, unpacked

from analyzers.growth import GrowthSettings, growth, reparametrised
from analyzers.head_births import HeadSettings
from analyzers.latent.training_map import Stay
from flows.report import render_report
from flows.report.data import collect
from flows.report.selection import panels
from flows.report.states import describe_choice, describe_oddities, oddities
from flows.report.summary import summarize
from flows.report.text import ABSENT
from storage import Store, UsageError
from tasks.growth import GrowthJob, fit_growth_curves
from tasks.heads import HeadsJob, find_head_births


@pytest.fixture(scope="module")
def elements(report_page: str) -> Elements:
    return Elements(report_page)


def _sentences(store: Store, series: str) -> dict[str, list[str]]:
    return {point.title: point.sentences for point in summarize(collect(store, series))}


def test_page_refers_to_nothing_outside(elements: Elements, report_page: str) -> None:
    for tag, attributes in elements.tags:
        for name in ("src", "href", "action", "data", "srcset", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith("#") or target == "data:,", (tag, name, target)
    styles = "".join(re.findall(r"<style>(.*?)</style>", report_page, re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles
    policy = [a["content"] for t, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0] is not None
    assert policy[0].startswith("default-src 'none'")


def test_text_from_tables_is_escaped(elements: Elements, report_page: str) -> None:
    assert [tag for tag, _ in elements.tags].count("script") == 4  # plotly, values, data, ours
    assert "img" not in [tag for tag, _ in elements.tags]
    assert "<script>alert(1)" not in report_page
    text = "".join(elements.text)
    assert "<script>alert(1)</script> & more" in text
    assert "truncated </script><img src=x>" in text
    assert "the covariance has no rank <b>here</b>" in text
    assert "one <b>note</b>" in text


def test_markup_in_names_cannot_leave_the_embedded_data(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = "</script><script>alert(1)</script>"
    rows = [{"step": 0, "analyzer": name, "metric": name, "site": name, "value": 1.0}]
    store.write("metrics", rows, series="s", run="r", name="x")
    elements = Elements(render_report(store, "s"))
    assert [tag for tag, _ in elements.tags].count("script") == 4
    assert json.loads(elements.json)["trajectories"][0]["metric"] == name


def test_summary_says_what_is_known(report_store: Store) -> None:
    assert _sentences(report_store, "toy") == {
        "What was measured": [
            "59 checkpoints of 3 runs (seed1, seed2 and seed3) measured, "
            "from step 0 to 1,400 (2.87 M tokens).",
            "1 checkpoint of the catalogue not measured.",
            "2 metrics, in all 6 trajectories over 4 layers (one metric at one place of the network each).",
        ],
        "How many phases, and when?": [
            "Phase 0 gives way to 1 at steps 32 to 64 (median 32) in all 3 runs.",
            "Phase 1 gives way to 2 at step 512 in seed3.",
            "Phase 2 gives way to 1 at step 800 in seed3.",
        ],
        "Are the phases more than smooth drift?": [
            "The test against made-up runs that follow smooth curves, without phases, does not decide.",
            "Smooth <b>curves</b> do as well (gap +0.1).",
        ],
        "Does the representation collapse and expand?": [
            "In the trajectory of effective rank of the activations after block 3 "
            "(rankme_cov[resid_post.3]):",
            "Collapse is seen in 3 of 3 runs (-25%) and ends at step 512 "
            "(between 256 and 600; 1.05 M tokens).",
            "Expansion is seen in 3 of 3 runs (+25%), and its end is not.",
            "Compression is not seen (0 of 3 runs).",
        ],
        "Which run is odd?": [
            "seed3 is odd: it visits phase 2, which no other run visits; it re-enters phase 1 at step 800."
        ],
        "Can I trust the data?": [
            "The audit found 1 error, 1 warning and 1 note.",
            "Error in seed3 step 64: <script>alert(1)</script> & more.",
            "1 checkpoint failed and remains unmeasured, in part or whole.",
            "Failed: seed2 step 128; last reason: truncated </script><img src=x>.",
            "1 failed attempt succeeded on another try.",
            "1 of 354 values could not be computed and is left blank. Most often rankme_cov: "
            "the covariance has no rank <b>here</b>.",
        ],
    }


def _walk(*states: int) -> list[Stay]:
    return [Stay(state, 10 * i, 10 * i + 5, 2) for i, state in enumerate(states)]


def test_odd_runs() -> None:
    alike = {"a": _walk(0, 1, 2), "b": _walk(0, 1, 2), "c": _walk(0, 1, 2)}
    assert oddities(alike) == {}
    assert describe_oddities(alike) == [
        "No run stands out: all visit the same phases, and none returns to a phase it left."
    ]
    assert oddities({**alike, "d": _walk(0, 2)}) == {"d": ["never visits phase 1, which all others visit"]}
    assert oddities({**alike, "d": _walk(0, 2, 1)}) == {
        "d": ["meets the phases in another order (0 → 2 → 1)"]
    }
    assert oddities({**alike, "d": _walk(0, 1, 0, 2)}) == {"d": ["re-enters phase 0 at step 20"]}


def test_what_a_majority_does_is_not_odd() -> None:
    returning = {"a": _walk(0, 1, 0), "b": _walk(0, 1, 0), "c": _walk(0, 1)}
    assert describe_oddities(returning) == ["No run stands out.", "a and b re-enter phase 0."]


def test_two_runs_cannot_tell_which_is_odd() -> None:
    assert describe_oddities({"a": _walk(0, 1), "b": _walk(0)}) == [
        "Only two runs have phases, so no run can be called odd.",
        "Only a visits phase 1.",
    ]


def test_gaps_stay_null(elements: Elements) -> None:
    data = json.loads(elements.json)
    start = data["trajectories"][data["start"]]
    assert (start["metric"], start["site"], start["layer"]) == ("rankme_cov", "resid_post", 3)
    seed1, seed2 = data["runs"][0], data["runs"][1]
    values = unpacked(elements)[data["start"]]
    assert np.isnan(values[0][seed1["steps"].index(8)])
    assert values[0][seed1["steps"].index(16)] == 38.125
    failed = seed2["steps"].index(128)
    assert np.isnan(values[1][failed])
    assert seed2["states"][failed] is None
    assert start["n"] == [4096, 4096]
    assert "spectra 2; probe 9f86d081884c7d65; dtype float32" in data["protocols"]["spectra"]


def test_means_of_states_are_those_of_their_checkpoints(elements: Elements) -> None:
    text = " ".join(elements.text)
    # State 2: seed3 at steps 512, 600 and 700, layer 3: 30.125 + 3 + 2 + (0, 1, 2).
    assert "36.125" in text


def _cells(page: str, table: str) -> list[list[str]]:
    """Cells of the body of a table."""
    body = page.partition(f'<table id="{table}">')[2].partition("<tbody>")[2].partition("</tbody>")[0]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("</tr>") if "<td" in row]


def test_the_map_shows_drivers_boundaries_and_outcomes(elements: Elements, report_page: str) -> None:
    # Over all runs only, the strongest first; a shift without a unit is absent.
    assert _cells(report_page, "table-drivers") == [
        ["0", "1", "loss", "2.5", "3", "-0.75", "1.5"],
        ["0", "1", "l2", "0.5", "3", ABSENT, "1.5"],
    ]
    assert _cells(report_page, "table-boundaries") == [
        ["seed1", "0", "1", "16", "32", "8", ABSENT],
        ["seed2", "0", "1", "32", "64", "32", "64"],
    ]
    text = " ".join("".join(elements.text).split())
    assert "State 2 is a detour: seed1 and seed2 did without it (mean 600), seed3 went through it" in text
    assert "A <b>note</b>." in text
    assert "of an older fit" not in text


def test_null_and_baselines_stand_beside_the_map(elements: Elements, report_page: str) -> None:
    text = " ".join("".join(elements.text).split())
    assert "Smooth <b>curves</b> do as well (gap +0.1)." in text
    assert "A note on the null." in text
    assert "Of an older null" not in text
    assert _cells(report_page, "table-baselines") == [
        ["k-means", "0.5", "3", "59", ABSENT],
        ["change points", "0.75", "3", "59", ABSENT],
    ]
    # The path first; what has no boundary has no band, and runs without any baseline no picture.
    assert json.loads(elements.json)["bands"] == [
        {
            "run": "seed1",
            "bands": [
                {"name": "states", "states": True, "pieces": [[0, 0], [1, 32]]},
                {"name": "k-means (0.25)", "states": True, "pieces": [[0, 0], [1, 16], [2, 512]]},
                {"name": "change points (1)", "states": False, "pieces": [[0, 0], [1, 32]]},
            ],
        }
    ]


def test_runs_that_part_are_named() -> None:
    walks = {"a": _walk(0, 1), "b": _walk(0, 2), "c": _walk(0, 1), "d": _walk(0, 2)}
    assert "Runs part after phase 0: a and c to phase 1 and b and d to phase 2." in describe_oddities(walks)


def test_steps_that_nobody_measured_break_no_line(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("checkpoints", [{"step": s} for s in range(5)], series="s", run="r", name="catalogue")
    rows = [{"step": s, "analyzer": "a", "metric": "m", "value": 1.0} for s in (0, 2, 4)]
    store.write("metrics", rows, series="s", run="r", name="x")
    assert collect(store, "s").runs[0].steps == [0, 2, 4]


def test_a_training_log_breaks_no_line_and_measures_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = [{"step": s, "analyzer": "a", "metric": "m", "value": 1.0, "n": 9} for s in (0, 2, 4)]
    store.write("metrics", rows, series="s", run="r", name="x")
    logs = [
        {"step": s, "analyzer": "training_log", "metric": "train_loss", "value": 5.0 - s} for s in range(6)
    ]
    for run in ("r", "unmeasured"):
        logs = [row | {"protocol": json.dumps({"analyzer": "training_log", "log": run})} for row in logs]
        store.write("metrics", logs, series="s", run=run, name="log")
    data = collect(store, "s")
    assert [(run.name, run.steps) for run in data.runs] == [("r", [0, 2, 4])]
    assert [t.values for t in data.trajectories] == [[[1.0, 1.0, 1.0]], [[5.0, 3.0, 1.0]]]
    assert data.measured_checkpoints == {("r", 0), ("r", 2), ("r", 4)}
    assert "protocol" not in " ".join(_sentences(store, "s")["Can I trust the data?"])
    assert "train_loss" in render_report(store, "s")


def test_values_that_are_not_finite_are_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    values = [1 / 3, float("inf"), float("nan"), None]
    rows = [{"step": s, "analyzer": "a", "metric": "m", "value": v} for s, v in enumerate(values)]
    store.write("metrics", rows, series="s", run="r", name="x")
    assert collect(store, "s").trajectories[0].values == [[0.333333, None, None, None]]


def test_single_heads_are_left_out_where_they_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    rows = [
        {
            "step": step,
            "analyzer": "a",
            "metric": "m",
            "site": "attention",
            "layer": 0,
            "head": head,
            "value": 1.0,
        }
        for step in range(3)
        for head in (None, 0, 1)
    ]
    store.write("metrics", rows, series="s", run="r", name="x")
    assert {t.head for t in collect(store, "s").trajectories} == {None, 0, 1}
    assert "Single heads are too many" not in render_report(store, "s")
    monkeypatch.setattr("flows.report.data._MOST_HEAD_VALUES", 5)
    assert {t.head for t in collect(store, "s").trajectories} == {None}
    assert "Single heads are too many for this page" in render_report(store, "s")


def test_runs_may_differ_in_protocol(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for run, version in (("r1", 1), ("r2", 2)):
        row = {"step": 0, "analyzer": "a", "metric": "m", "value": 1.0}
        row["protocol"] = json.dumps({"analyzer": "a", "version": version})
        store.write("metrics", [row], series="s", run=run, name="x")
    assert (
        "Runs were measured under different protocols by a."
        in _sentences(store, "s")["Can I trust the data?"]
    )
    captions = json.loads(Elements(render_report(store, "s")).json)["protocols"]
    assert captions == {"a": "r1: a 1 / r2: a 2"}


def test_a_series_that_was_only_catalogued(report_store: Store) -> None:
    text = " ".join(Elements(render_report(report_store, "bare")).text)
    for sentence in (
        "No checkpoint has been measured yet.",
        "No metrics have been measured yet, so there is nothing to plot.",
        "No metric has been measured by layer, so there is no heat map.",
        "No phases have been looked for yet.",
        "Collapse and expansion have not been looked for yet.",
        "No growth curves have been fitted yet.",
        "No states have been fitted yet, so there is no training map.",
        "The series has not been audited.",
        "No checkpoint failed.",
        "Nothing has been measured, so there is no protocol.",
        "The store has no record of an invocation for this series.",
    ):
        assert sentence in text


def test_an_audit_without_findings(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("findings", [], series="s", run="r", name="audit")
    assert "The audit found nothing to report." in _sentences(store, "s")["Can I trust the data?"]


def test_a_model_with_broken_parameters_and_without_states(tmp_path: Path) -> None:
    store = Store(tmp_path)
    row = {"model": "m", "k": 1, "chosen": True, "parameters": "{not json"}
    store.write("state_models", [row], series="s", name="m")
    text = " ".join(Elements(render_report(store, "s")).text)
    assert "A state model was fitted, but the decoded states are not in the store." in text


def test_unknown_series(report_store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'nope' is not in the store.*it holds bare, toy"):
        render_report(report_store, "nope")
    with pytest.raises(UsageError, match="it holds no series yet"):
        render_report(Store(tmp_path), "toy")


# ---- in Chromium


def _lines(page: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = page.evaluate(
        "document.getElementById('line-plot').data.filter((t) => t.type === 'scatter')"
        ".map((t) => ({name: t.name, x: [...t.x], y: [...t.y]}))"
    )
    return found


def test_first_view(opened: Any, tmp_path: Path) -> None:
    lines = _lines(opened)
    assert [line["name"] for line in lines] == ["seed1", "seed2", "seed3"]
    assert lines[0]["x"][:2] == pytest.approx([0, 0.30103])  # symlog: step 0 has a place
    assert lines[0]["y"][4] is None
    ribbons = opened.evaluate(
        "document.getElementById('line-plot').data.filter((t) => t.type === 'bar')"
        ".map((t) => [t.name, [...t.y]])"
    )
    assert ribbons == [
        ["state 0", ["seed1", "seed2", "seed3"]],
        ["state 1", ["seed1", "seed2", "seed2", "seed3", "seed3"]],  # seed2 is cut by its failed step
        ["state 2", ["seed3"]],
    ]
    heat = opened.evaluate("document.getElementById('heat-plot').data[0].z.map((row) => [...row])")
    assert [len(row) for row in heat] == [20] * 4
    assert heat[3][4] is None
    opened.screenshot(path=tmp_path / "report.png", full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_pieces_of_a_run_are_drawn_as_bands(opened: Any) -> None:
    drawn = opened.evaluate(
        "(() => { const t = document.getElementById('band-plot').data[0];"
        " return t.y.map((y, i) => [y, t.text[i], t.base[i], t.base[i] + t.x[i]]); })()"
    )
    assert [(name, label) for name, label, _, _ in drawn] == [
        ("states", "0"),
        ("states", "1"),
        ("k-means (0.25)", "0"),
        ("k-means (0.25)", "1"),
        ("k-means (0.25)", "2"),
        ("change points (1)", "0"),
        ("change points (1)", "1"),
    ]
    # A change lies halfway between its two checkpoints on the axis as drawn: log10 of 1 + 16 and 1 + 32.
    change = (np.log10(17) + np.log10(33)) / 2
    assert drawn[0][3] == drawn[1][2] == pytest.approx(change)
    assert drawn[1][3] == drawn[4][3] == drawn[6][3]
    opened.locator("#theme").click()
    assert opened.locator("#band-plot .bars path").count() == 7


def test_pickers_change_the_plots(opened: Any) -> None:
    at_last_layer = _lines(opened)[0]["y"][0]
    opened.get_by_label("Layer", exact=True).select_option("0")
    assert _lines(opened)[0]["y"][0] == at_last_layer - 3
    assert "layer 0" in opened.locator("#line-caption").inner_text()
    opened.locator("#line-metric").select_option(label="loss")
    assert _lines(opened)[0]["y"][0] == 7
    assert opened.locator("#line-layer").is_disabled()
    opened.get_by_label("Scale").select_option("linear")
    assert _lines(opened)[0]["x"][-1] == 1400
    opened.get_by_label("Run", exact=True).select_option("seed3")
    assert opened.evaluate("document.getElementById('heat-plot').data[0].z[0][0]") == 42.125
    opened.get_by_label("Colours").select_option("log")
    shown = opened.evaluate("document.getElementById('heat-plot').data[0].z[0][0]")
    assert 10**shown == pytest.approx(42.125)


def test_hover_shows_value_state_and_step(opened: Any) -> None:
    opened.evaluate("Plotly.Fx.hover('line-plot', [{curveNumber: 2, pointNumber: 0}])")
    shown = opened.locator("#line-plot .hoverlayer").text_content()
    for part in ("seed3", "step 0", "rankme_cov 45.125", "state 0", "posterior 0.9"):
        assert part in shown


def test_phases_show_bands_of_all_runs_and_bars_of_each(opened: Any) -> None:
    plot = "document.getElementById('phase-plot')"
    bands = opened.evaluate(f"{plot}.layout.shapes.map((s) => [s.type, 10 ** s.x0 - 1, 10 ** s.x1 - 1])")
    assert bands == [["rect", pytest.approx(256), pytest.approx(600)]]
    drawn = opened.evaluate(
        f"{plot}.data.map((t) => [t.type, t.name, t.yaxis ?? '', [...t.x], [...(t.base ?? [])], [...t.y]])"
    )
    assert [name for kind, name, axis, *_ in drawn if axis == ""] == ["seed1", "seed2", "seed3"]
    (bar,) = [t for t in drawn if t[0] == "bar"]
    (mark,) = [t for t in drawn if t[0] == "scatter" and t[2] == "y2"]
    assert bar[5] == mark[5] == ["seed1", "seed2", "seed3", "all runs"]
    low, high = bar[4][2], bar[4][2] + bar[3][2]
    assert (10**low - 1, 10 ** mark[3][2] - 1, 10**high - 1) == pytest.approx((256, 600, 688))
    opened.evaluate("Plotly.Fx.hover('phase-plot', [{curveNumber: 4, pointNumber: 3}], ['xy2'])")
    shown = opened.locator("#phase-plot .hoverlayer").text_content()
    assert "end of collapse: step 512 (256 to 600)" in shown


def test_phases_without_their_trajectory(browser: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    row = {
        "curve": "c",
        "metric": "m",
        "site": "s",
        "form": "geometric-phases",
        "parameters": [],
        "intervals": [],
    }
    store.write("curves", [row], series="s", run="r", name="c")
    (tmp_path / "page.html").write_text(render_report(store, "s"), encoding="utf-8")
    page = browser.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    open_report(page, tmp_path / "page.html")
    assert "no longer shows the trajectory" in page.locator("#phase-caption").inner_text()
    page.close()
    assert troubles == []


@pytest.fixture(scope="module")
def growth_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two layers of one run: an early peak at step 4511.5, and a logarithm."""
    store = Store(tmp_path_factory.mktemp("growth-store"))
    steps = [0, *(2**k for k in range(10)), *range(1000, 143_001, 4000)]
    t = np.array(steps, dtype=float)
    curves = [growth(t, np.array([300, 0.12, 8e-4, 1.5, 20])), 50 * np.log(t + 3000) - 300]
    rows = [
        {"step": step, "analyzer": "a", "metric": "m", "site": "s", "layer": layer, "value": float(value)}
        for layer, values in enumerate(curves)
        for step, value in zip(steps, values, strict=True)
    ]
    store.write("metrics", rows, series="s", run="r", name="x")
    rule = GrowthSettings(draws=100)
    fit_growth_curves(GrowthJob(root=store.root, series="s", trajectories=("m[s.*]",), rule=rule))
    return store


def test_growth_table_and_data(growth_store: Store) -> None:
    elements = Elements(render_report(growth_store, "s"))
    data = json.loads(elements.json)
    (row,) = data["growth"][0]["rows"]
    assert (row["run"], row["shape"]) == ("r", "early-peak")
    curve = reparametrised(np.array([0.0, 4511.5]), np.array(row["fitted"]))
    assert curve == pytest.approx(growth(np.array([0, 4511.5]), np.array([300, 0.12, 8e-4, 1.5, 20])))
    text = " ".join(" ".join(elements.text).split())
    assert "m[s.0] r early-peak massive-growth 4,512 (4,512 to 4,512) residuals 1" in text
    assert "m[s.1] r log-rise logarithm" in text
    assert "m[s.1] all runs log-rise" in text


def test_growth_curves_are_drawn_over_their_values(browser: Any, growth_store: Store, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render_report(growth_store, "s"), encoding="utf-8")
    page = browser.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    open_report(page, tmp_path / "page.html")
    script = "document.getElementById('growth-plot').data.map((t) => [t.mode, [...t.x], [...t.y]])"
    dots, line = page.evaluate(script)
    assert (dots[0], line[0]) == ("markers", "lines")
    assert np.interp(dots[1], line[1], line[2]) == pytest.approx(np.array(dots[2]), abs=2)
    page.locator("#growth-place").select_option("1")
    dots, line = page.evaluate(script)
    assert line[2][-1] == pytest.approx(dots[2][-1], abs=2)
    page.close()
    assert troubles == []


@pytest.fixture(scope="module")
def heads_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One run with an induction head 1.0 born at step 64 and three heads that never are one."""
    store = Store(tmp_path_factory.mktemp("heads-store"))
    protocol = json.dumps({"parameters": {"induction_threshold": 0.3, "previous_threshold": 0.5}})
    rows = [
        {"step": step, "analyzer": "induction", "metric": metric, "site": "attention", "layer": layer}
        | {"head": head, "protocol": protocol, "key": "k"}
        | {"value": 0.8 if (metric, layer, head) == ("prefix_matching", 1, 0) and step >= 64 else 0.1}
        for metric in ("prefix_matching", "repeat_previous_token")
        for layer in range(2)
        for head in range(2)
        for step in (0, 8, 64, 512)
    ]
    store.write("metrics", rows, series="s", run="r", name="x")
    find_head_births(HeadsJob(root=store.root, series="s", rule=HeadSettings()))
    return store


def test_births_of_heads_are_listed(heads_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    page = render_report(heads_store, "s")
    assert _cells(page, "table-heads") == [["induction", "r", "1", "0", "64 (after 8)", "0.8", "0.8"]]
    text = " ".join(" ".join(Elements(page).text).split())
    assert "r: induction heads: 1, first at step 64 (after 8)" in text
    nothing = "r: previous-token heads: not seen; the highest score is 0.1, and a head is born at 0.5."
    assert nothing in text
    data = json.loads(Elements(page).json)
    # Colours end at the highest score, so that weak ones can be told apart.
    assert [part["highest"] for part in data["heads"]] == [0.8, 0.1]
    assert [len(part["rows"]) for part in data["heads"]] == [4, 4]
    # Of a crowded page the heads that were born stay.
    monkeypatch.setattr("flows.report.data._MOST_HEAD_VALUES", 5)
    data = json.loads(Elements(render_report(heads_store, "s")).json)
    (kept,) = data["heads"][0]["rows"]
    trajectory = data["trajectories"][kept["trajectory"]]
    assert (trajectory["layer"], trajectory["head"], kept["birth"]) == (1, 0, 64)
    assert data["heads"][1]["rows"] == []


def test_births_are_marked_on_the_map_of_heads(browser: Any, heads_store: Store, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render_report(heads_store, "s"), encoding="utf-8")
    page = browser.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    open_report(page, tmp_path / "page.html")
    script = "document.getElementById('heads-plot').data.map((t) => [t.type, [...t.x], [...t.y]])"
    heat, marks = page.evaluate(script)
    assert (heat[0], heat[2][0], len(heat[2])) == ("heatmap", "1.0", 4)
    assert marks[1:] == [[pytest.approx(np.log10(65))], ["1.0"]]
    page.locator("#heads-map").select_option("1")
    _, marks = page.evaluate(script)
    assert marks[1] == []
    page.close()
    assert troubles == []


def test_theme(opened: Any) -> None:
    def ink() -> str:
        text: str = opened.evaluate("document.getElementById('line-plot').layout.font.color")
        return text

    background = "getComputedStyle(document.body).backgroundColor"
    light = (ink(), opened.evaluate(background))
    opened.get_by_role("button", name="Dark theme").click()
    dark = (ink(), opened.evaluate(background))
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    opened.get_by_role("button", name="Light theme").click()
    assert (ink(), opened.evaluate(background)) == light
    opened.emulate_media(color_scheme="light")


def test_keyboard_reaches_the_controls_in_order(opened: Any) -> None:
    reached = []
    for _ in range(60):
        opened.keyboard.press("Tab")
        reached.append(
            opened.evaluate("document.activeElement.id || document.activeElement.getAttribute('href') || ''")
        )
        if reached[-1] == "heat-csv":
            break
    # With the fixture's single layered metric there is nothing to pick, so those two are not stops.
    wanted = ["#summary", "theme", "#trajectories", "#protocol", "step-unit", "step-axis", "link-axes"]
    wanted += ["line-metric", "line-site", "line-layer", "value-axis", "line-csv"]
    wanted += ["heat-run", "heat-colors", "heat-csv"]
    places = [reached.index(name) for name in wanted]
    assert places == sorted(places)
    opened.locator("#line-layer").focus()
    before = _lines(opened)[0]["y"][0]
    opened.keyboard.press("ArrowUp")
    assert _lines(opened)[0]["y"][0] == before - 1


def test_every_control_has_a_name(opened: Any) -> None:
    unnamed = opened.evaluate(
        "[...document.querySelectorAll('select, button')]"
        ".filter((c) => !(c.labels && c.labels.length) && !c.textContent.trim() && !c.ariaLabel).length"
    )
    assert unnamed == 0


def test_no_control_sends_a_plot_away(opened: Any) -> None:
    offered = opened.evaluate("[...document.querySelectorAll('.modebar-btn')].map((c) => c.ariaLabel)")
    assert set(offered) == {"Download plot as a PNG", "Zoom", "Pan", "Reset axes"}


def test_downloads(opened: Any) -> None:
    lines = download(opened, "#line-csv")
    assert lines[0] == "series,run,step,tokens,metric,site,layer,head,value,state,posterior"
    assert lines[1] == "toy,seed1,0,0,rankme_cov,resid_post,3,,43.125,0,0.9"
    assert lines[5] == "toy,seed1,8,16384,rankme_cov,resid_post,3,,,0,0.9"
    assert len(lines) == 61
    assert len(download(opened, "#heat-csv")) == 1 + 4 * 20
    edges = download(opened, "button[data-table=table-transitions]")
    assert edges[1] == "0,1,3,seed1; seed2; seed3,seed1 32; seed2 64; seed3 32,0.1,5.5,32,65536"
    findings = download(opened, "button[data-table=table-findings]")
    assert findings[1] == "error,seed3,64,odd,<script>alert(1)</script> & more"


def test_narrow_windows_do_not_scroll_sideways(opened: Any) -> None:
    opened.set_viewport_size({"width": 400, "height": 800})
    opened.wait_for_timeout(300)  # Plotly redraws on resize
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_printing_is_light(opened: Any, tmp_path: Path) -> None:
    opened.get_by_role("button", name="Dark theme").click()
    opened.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert opened.evaluate("document.getElementById('line-plot').layout.width") == 680
    assert opened.evaluate("document.documentElement.dataset.theme") == "light"
    opened.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert opened.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_page_without_measurements_opens(browser: Any, report_store: Store, tmp_path: Path) -> None:
    path = tmp_path / "bare.html"
    path.write_text(render_report(report_store, "bare"), encoding="utf-8")
    page = browser.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    open_report(page, path)
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.close()
    assert troubles == []


def test_the_plots_of_the_choice_have_gaps_where_a_number_is_not_known() -> None:
    rows = [
        {
            **{"k": k, "chosen": k == 2, "bic": 100.0 - 10 * k, "aic": None if k == 2 else 50.0, "icl": None},
            **{
                "heldout": None,
                "heldout_loglik": -5.0 * k if k < 2 else None,
                "ari": 0.9,
                "bootstrap_ari": 1.0,
            },
        }
        for k in (1, 2, 3)
    ]
    criteria, agreement = panels(rows)
    # Nothing is held out: those two plots are not there.
    assert [line.name for line in criteria.lines] == ["BIC", "AIC"]
    assert criteria.lines[0].path.count("M") == 1
    assert criteria.lines[1].path.count("M") == 2
    assert [title for _, _, title in criteria.lines[0].points] == [
        *("BIC, K = 1: 90", "BIC, K = 2: 80", "BIC, K = 3: 70"),
    ]
    ys = [y for _, y, _ in criteria.lines[0].points]
    assert ys[0] < ys[1] < ys[2]  # lower values are drawn lower
    assert criteria.chosen == criteria.lines[0].points[1][0] == criteria.ks[1][0]
    assert {y for _, y, _ in agreement.lines[0].points} == {agreement.bound}


def test_the_plots_of_the_choice_are_on_the_page(report_page: str) -> None:
    assert 'aria-label="Agreement (adjusted Rand index), by number of states' in report_page
    assert 'aria-label="BIC, held-out runs (lower is better), by number of states' in report_page


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"rule": "agreement"},
            "the largest number on which fits from other random starts agree (adjusted Rand index 0.95",
        ),
        ({"rule": "paper", "heldout": 1.0, "heldout_runs": ["c"]}, "they give the lowest BIC on held-out c."),
        ({"rule": None, "heldout": 1.0, "heldout_runs": ["c"]}, "they give the lowest BIC on held-out c."),
        (
            {"rule": "paper"},
            "they give the lowest BIC on the runs they were fitted on (no run was held out).",
        ),
        ({"rule": "icl", "heldout": 2.0}, "they give the lowest ICL on the runs they were fitted on."),
        (
            {"rule": "heldout", "heldout": 2.0},
            "they give the highest log-likelihood of runs left out in turn.",
        ),
    ],
)
def test_the_choice_is_told_by_its_rule(change: dict[str, object], sentence: str) -> None:
    row = {"k": 2, "bic": 1.0, "icl": 1.0, "aic": 1.0, "ari": 0.95, "heldout": None, "heldout_loglik": -1.0}
    row |= {"rule": None, "heldout_runs": []} | change
    other = {**row, "k": 1} | dict.fromkeys(("bic", "icl", "heldout"), 9.0) | {"heldout_loglik": -9.0}
    if row["heldout"] is None:
        other["heldout"] = None
    assert describe_choice([other, row], row) == "2 phases were chosen among 1 to 2: " + sentence.replace(
        "index 0.95", "index 0.95 of 1, 0.9 is the least) and that still improves the fit (BIC)."
    )
