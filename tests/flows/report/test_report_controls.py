"""The switches of the report, its size, its summary of phases, and its plots as pictures."""

import json
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from report_pages import Elements, download, open_report, unpacked, until

from analyzers.crosscoder.population import METRICS as CROSSCODER_METRICS
from analyzers.latent.training_map import Stay
from analyzers.registry import load_all
from flows.report import render_report
from flows.report.crowding import thinned
from flows.report.data import Run, Trajectory, collect
from flows.report.drivers import driver_lines, score, strongest
from flows.report.figures import draw_figures
from flows.report.growth import GrowthRow
from flows.report.pack import pack_values
from flows.report.phases import places
from flows.report.stages import stages
from flows.report.states import cautions, describe_choice, paths, remarks
from flows.report.summary import in_short, summarize
from flows.report.text import ABSENT
from flows.report.words import PLAIN, in_words
from storage import Store, UsageError
from tasks.training_log import KNOWN

STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(600, 1500, 100))


def _range(page: Any, plot: str) -> list[float]:
    found: list[float] = page.evaluate(f"document.getElementById('{plot}').layout.xaxis.range")
    return found


def _x(page: Any) -> list[float]:
    found: list[float] = page.evaluate("[...document.getElementById('line-plot').data[0].x]")
    return found


def test_zooming_one_plot_zooms_the_others(opened: Any) -> None:
    whole = _range(opened, "heat-plot")
    zoom = "Plotly.relayout('line-plot', {'xaxis.range[0]': 1, 'xaxis.range[1]': 2})"
    opened.evaluate(zoom)
    for plot in ("heat-plot", "phase-plot", "band-plot"):
        until(opened, f"Math.abs(document.getElementById('{plot}').layout.xaxis.range[0] - 1) < 1e-9")
        assert _range(opened, plot) == [1, 2]
    # A redraw keeps the zoom; a reset takes it from all.
    opened.get_by_role("button", name="Dark theme").click()
    assert _range(opened, "phase-plot") == [1, 2]
    opened.evaluate("Plotly.relayout('phase-plot', {'xaxis.autorange': true})")
    until(opened, "document.getElementById('heat-plot').layout.xaxis.range[0] < 0.9")
    assert _range(opened, "heat-plot") == pytest.approx(whole)
    opened.get_by_label("Zoom all together").uncheck()
    opened.evaluate(zoom)
    opened.wait_for_timeout(200)
    assert _range(opened, "heat-plot") == pytest.approx(whole)


def test_the_axis_counts_steps_or_tokens(opened: Any) -> None:
    steps = np.array(STEPS, dtype=float)
    assert _x(opened) == pytest.approx(np.log10(1 + steps))
    opened.get_by_label("Axis", exact=True).select_option("token")
    # 2048 tokens a step: the same curve, with other names at its ticks.
    assert _x(opened) == pytest.approx(np.log10(1 + steps))
    ticks = opened.evaluate(
        "(({tickvals, ticktext}) => [tickvals, ticktext])(document.getElementById('heat-plot').layout.xaxis)"
    )
    assert ticks[0][ticks[1].index("1M")] == pytest.approx(np.log10(1 + 1e6 / 2048))
    opened.get_by_label("Scale").select_option("linear")
    assert _x(opened) == pytest.approx(2048 * steps)
    band = opened.evaluate("(([s]) => [s.x0, s.x1])(document.getElementById('phase-plot').layout.shapes)")
    assert band == pytest.approx([2048 * 256, 2048 * 600])


def test_a_logarithm_leaves_step_0_out(opened: Any) -> None:
    opened.get_by_label("Scale").select_option("log")
    assert _x(opened)[0] is None
    assert _x(opened)[1:] == pytest.approx(np.log10(STEPS[1:]))
    edges = opened.evaluate("[...document.getElementById('heat-plot').data[0].x]")
    assert edges[0] == edges[1] == pytest.approx(-np.log10(2) / 2)
    assert len(edges) == len(STEPS) + 1


def test_values_on_symlog_and_log(opened: Any) -> None:
    opened.get_by_label("Value axis").select_option("log")
    assert opened.evaluate("document.getElementById('line-plot').layout.yaxis.type") == "log"
    opened.get_by_label("Value axis").select_option("symlog")
    drawn = opened.evaluate("document.getElementById('line-plot').data[0].y[0]")
    assert 10 * (10**drawn - 1) == pytest.approx(43.125)  # linear up to 10: all values are of that size
    opened.evaluate("Plotly.Fx.hover('line-plot', [{curveNumber: 0, pointNumber: 0}])")
    assert "rankme_cov 43.125" in opened.locator("#line-plot .hoverlayer").text_content()


def test_units_and_meaning_stand_at_the_plot(opened: Any) -> None:
    loss = next(metric for metric in load_all()["loss"].metrics if metric.name == "loss")
    opened.locator("#line-metric").select_option(label="loss")
    title = opened.evaluate("document.getElementById('line-plot').layout.yaxis.title.text")
    assert title.startswith(f"loss ({loss.unit})")
    caption = opened.locator("#line-caption").inner_text()
    assert loss.formula in caption
    assert "Protocol: loss 2; probe 9f86d081884c7d65" in caption


def test_every_plot_has_a_download_of_the_data_behind_it(opened: Any) -> None:
    plots = opened.evaluate("[...document.querySelectorAll('div.plot')].map((plot) => plot.id)")
    assert plots == ["line-plot", "heat-plot", "phase-plot", "band-plot"]
    for plot in plots:
        assert len(download(opened, f"button[data-plot={plot}]")) > 2
    phases = download(opened, "#phase-csv")
    assert len(phases) == 61
    assert phases[1].startswith("toy,seed1,0,0,rankme_cov,resid_post,3,,43.125")
    assert download(opened, "#band-csv")[:3] == [
        "series,run,method,label,first_step",
        "toy,seed1,states,0,0",
        "toy,seed1,states,1,32",
    ]


def test_a_mean_over_layers_that_states_were_fitted_to_can_be_shown(
    browser: Any, report_store: Store, tmp_path: Path
) -> None:
    shutil.copytree(report_store.root, tmp_path / "copy")
    store = Store(tmp_path / "copy")
    chosen = collect(store, "toy").chosen
    assert chosen is not None
    fitted = {**chosen, "metrics": ["rankme_cov[resid_post.mean]", "loss"]}
    store.write("state_models", [fitted], series="toy", name=chosen["model"])
    data = collect(store, "toy")
    (mean,) = data.reduced
    assert mean.name == "rankme_cov[resid_post.mean]"
    # Layers lie 1 apart: their mean is 1.5 above layer 0; absent where one of them is.
    assert mean.values[0] is not None
    assert mean.values[0][:5] == [41.625, 40.625, 39.625, 38.625, None]
    (tmp_path / "page.html").write_text(render_report(store, "toy"), encoding="utf-8")
    page = browser.new_page()
    open_report(page, tmp_path / "page.html")
    page.locator("#line-layer").select_option(label="mean over layers")
    assert page.evaluate("document.getElementById('line-plot').data[0].y[0]") == 41.625
    assert "resid_post, mean over layers" in page.locator("#line-caption").inner_text()
    assert download(page, "#line-csv")[1].startswith("toy,seed1,0,0,rankme_cov,resid_post,mean,,41.625")
    page.close()


def test_focus_is_visible(opened: Any) -> None:
    for name in ("step-unit", "step-axis", "link-axes", "line-metric", "theme"):
        opened.locator(f"#{name}").focus()
        opened.keyboard.press("Shift+Tab")
        opened.keyboard.press("Tab")
        assert opened.evaluate("document.activeElement.id") == name
        assert opened.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


# ---- without a browser


def test_phases_with_steps_and_what_changes(report_store: Store) -> None:
    data = collect(report_store, "toy")
    first, second, third = stages(data, paths(data))
    assert (first.entered, first.runs, first.changes) == ("step 0", ["seed1", "seed2", "seed3"], [])
    assert second.entered == "step 32 (32 to 64), 65.5 k tokens"
    assert [(change.plain, change.move, change.origin) for change in second.changes] == [
        ("loss", "falls by 0.75", None),
        ("norm of a weight matrix (mean over the matrices)", "rises by 1.5 standard deviations", None),
    ]
    assert (third.entered, third.runs, third.total) == ("step 512, 1.05 M tokens", ["seed3"], 3)


def test_the_first_paragraph_answers_a_person_in_a_hurry(report_store: Store) -> None:
    points = summarize(collect(report_store, "toy"))
    assert in_short(points) == (
        "Training falls into 3 phases, which begin at steps 0, 32 and 512. Whether they are more than smooth "
        "drift is open. seed3 is odd. Take the data with care: 1 error, 1 warning and 1 failure."
    )
    assert points[0].more_title == "How was this number chosen? 1 caution."
    assert points[0].more == (
        "Phase k is state k of a hidden Markov model: checkpoints that look alike in 2 metrics.",
        "3 phases were chosen among 1 to 5: they give the lowest BIC on held-out seed3.",
        "Caution: Two metrics are few.",
    )


def test_what_moves_most_comes_first(report_store: Store, tmp_path: Path) -> None:
    """A score is 0 where the model is sure; means of both states make ``from`` and ``to``."""
    shutil.copytree(report_store.root, tmp_path / "copy")
    store = Store(tmp_path / "copy")
    chosen = collect(store, "toy").chosen
    assert chosen is not None
    edge = {"model": chosen["model"], "from": 0, "to": 1, "run": None, "runs": 3}
    moves = {"loss": (1e-22, 0.3, -0.5), "l2": (0.0, -2.0, 1.25), "x": (1e-20, -0.1, 0.0)}
    rows = [
        {**edge, "metric": name, "score": score, "rank": rank, "shift_scaled": scaled, "shift": shift}
        for rank, (name, (score, scaled, shift)) in enumerate(moves.items(), 1)
    ]
    store.write("drivers", rows, series="toy", name=chosen["model"])
    means = [{"model": chosen["model"], "metric": "l2", "state": s, "mean": 2.0 + 1.25 * s} for s in (0, 1)]
    store.write("state_means", means, series="toy", name="means")
    data = collect(store, "toy")
    moved = [(change.metric, change.move) for change in stages(data, paths(data))[1].changes]
    assert moved == [("l2", "rises from 2 to 3.25"), ("loss", "falls by 0.5"), ("x", "stays")]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss", "loss"),
        ("rankme_cov[resid_post.3]", "effective rank of the activations after block 3"),
        ("rankme_cov[resid_post.last]", "effective rank of the activations after the last block"),
        ("rankme_cov[final_norm]", "effective rank of the activations after the final norm"),
        (
            "top1_over_median[resid_post.mean]",
            "largest activation over the median one (mean over the blocks)",
        ),
        ("l2", "norm of a weight matrix (mean over the matrices)"),
        ("l2[attention.query.2]", "norm of a weight matrix at attention.query of block 2"),
        ("weight_var", "variance of the weights"),
        ("nobody_knows[resid_post.1]", None),
    ],
)
def test_names_in_plain_words(name: str, words: str | None) -> None:
    assert in_words(name) == words


def test_every_documented_metric_has_plain_words() -> None:
    measured = {metric.name for cls in load_all().values() for metric in cls.metrics}
    assert set(PLAIN) == measured | {metric.name for metric in CROSSCODER_METRICS} | set(KNOWN)


def test_a_state_entered_twice_counts_once(report_store: Store) -> None:
    data = collect(report_store, "toy")
    walks = {"seed1": [Stay(0, 0, 2, 3), Stay(1, 4, 8, 2), Stay(0, 16, 32, 2)]}
    assert [stage.entered for stage in stages(data, walks)] == ["step 0", "step 4, 8.19 k tokens"]


def test_the_summary_says_whether_smooth_curves_do_as_well(report_store: Store, tmp_path: Path) -> None:
    def point(store: Store) -> tuple[str, bool]:
        found = {point.title: point for point in summarize(collect(store, "toy"))}
        answer = found["Are the phases more than smooth drift?"]
        return answer.headline, answer.alarming

    assert point(report_store) == ("Open", True)
    shutil.copytree(report_store.root, tmp_path / "copy")
    store = Store(tmp_path / "copy")
    chosen = collect(store, "toy").chosen
    assert chosen is not None
    model = chosen["model"]
    for explained, told in (
        (True, ("No: smooth curves do as well", True)),
        (False, ("Yes, by the fit", False)),
    ):
        row = {"model": model, "sentence": "s", "explained": explained, "notes": []}
        store.write("nulls", [row], series="toy", name=model)
        assert point(store) == told
    alike = {"surrogate_rule_ks": [3, 4], "surrogates": 10, "same_map": 9}
    store.write("nulls", [{**row, **alike}], series="toy", name=model)
    (answer,) = [each for each in summarize(collect(store, "toy")) if "drift" in each.title]
    assert answer.sentences[-2:] == [
        "By the same rule the made-up runs are cut into 3 to 4 phases too.",
        "9 of 10 of them show the same transitions: the order of the phases alone is no evidence.",
    ]
    store.write("nulls", [], series="toy", name=model)
    assert point(store) == ("Not tested", True)


def test_what_was_done_to_the_data_is_no_caution() -> None:
    notes = ["metric l2 dropped: it is constant", "cap reached: K = 8", "metric x: 2 values are missing"]
    chosen = {"parameters": json.dumps({"notes": notes})}
    assert cautions(chosen) == ["Cap reached: K = 8."]
    assert remarks(chosen) == ["Metric l2 dropped: it is constant.", "Metric x: 2 values are missing."]


def test_scores_that_cannot_be_told_from_0_are_0_and_in_order_of_the_shifts() -> None:
    moves = [("a", 4e-22, 0.1), ("b", 3e-22, -2.5), ("c", 0.0, 0.5), ("d", 1e-24, 1.0)]
    edge = {"from": 0, "to": 1, "run": None, "shift": None}
    rows = [
        {**edge, "metric": name, "score": value, "rank": rank, "shift_scaled": scaled}
        for rank, (name, value, scaled) in enumerate(moves, 1)
    ]
    assert [(row["metric"], score(row)) for row in strongest(rows)] == [
        (name, "0 (below 0.001)") for name in "bdc"
    ]
    rows[0] |= {"score": 0.25}
    assert next((row["metric"], score(row)) for row in strongest(rows)) == ("a", "0.25")
    assert driver_lines(rows) == [
        "0 -> 1: a +0.1 sd (score 0.25), b -2.5 sd (score 0 (below 0.001)), d +1 sd (score 0 (below 0.001))"
    ]


def test_a_phase_that_no_run_shows_has_no_per_cent(report_store: Store) -> None:
    (place,) = places(collect(report_store, "toy"))
    row = place.rows[0]
    assert row.change_text("collapse") == "-25% (-33% to -18%)"
    assert row.change_text("compression") == "not seen (within -10% to +11%)"
    nowhere = replace(row, changes={"compression": (False, 0.0, -1e-17, 1e-17)})
    assert nowhere.change_text("compression") == "not seen"


@pytest.mark.parametrize(
    ("shape", "preferred", "verdict"),
    [
        ("early-peak", "massive-growth", "early-peak"),
        ("none", "step", "none: a step fits better"),
        ("none", ABSENT, "none: most runs have neither an early peak nor a rise"),
        ("mixed", ABSENT, "mixed: no class in most runs"),
    ],
)
def test_a_class_of_growth_says_why(shape: str, preferred: str, verdict: str) -> None:
    row = GrowthRow("m", "r", False, shape, preferred, ABSENT, None, None, ABSENT, None, None)
    assert row.verdict == verdict


def test_what_held_out_runs_alone_would_choose_is_said() -> None:
    rows = [
        {"k": k, "rule": "agreement", "ari": 1.0, "heldout": bic, "heldout_runs": ["seed2"]}
        for k, bic in ((3, 120.0), (4, 87.1), (5, 119.8))
    ]
    assert describe_choice(rows, rows[2]).endswith("BIC on held-out seed2 alone would choose 4.")
    assert describe_choice(rows, rows[1]).endswith("still improves the fit (BIC).")


def test_packing_keeps_five_digits_and_gaps() -> None:
    rng = np.random.default_rng(0)
    values = (10.0 ** rng.uniform(-200, 200, 400) * rng.choice([-1, 1], 400)).tolist()
    values[7] = None
    run = Run("r", list(range(400)), [None] * 400, [None] * 400, [None] * 400)
    lines = [Trajectory("a", "m", None, None, None, None, [values]) for values in (values, None)]
    packed = pack_values(lines, [run])
    page = Elements("")
    page.packed = packed.text
    page.json = f'{{"digits": {packed.digits}, "runs": [{{"steps": {run.steps}}}], "trajectories": [0, 0]}}'
    first, second = unpacked(page)
    assert packed.digits == 5
    assert np.isnan(first[0][7])
    rest = [i for i in range(400) if i != 7]
    assert [first[0][i] for i in rest] == [float(f"{values[i]:.5g}") for i in rest]
    assert np.isnan(second[0]).all()


def test_too_many_values_lose_digits_and_not_places(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("r", list(range(999)), [None] * 999, [None] * 999, [None] * 999)
    values: list[float | None] = list(np.random.default_rng(0).normal(size=999))
    line = Trajectory("a", "m", None, None, None, None, [values])
    monkeypatch.setattr("flows.report.pack.LIMIT", 2000)
    assert pack_values([line], [run]).digits == 3


def test_the_page_of_a_large_series_can_be_mailed(tmp_path: Path) -> None:
    """154 checkpoints x 24 layers of 40 metrics, with noise in every digit."""
    store = Store(tmp_path)
    rng = np.random.default_rng(1)
    steps = [0, *(2**k for k in range(10)), *range(1000, 144_000, 1000)]
    assert len(steps) == 154
    places = [(f"metric{m}", layer) for m in range(40) for layer in range(24)]
    level = np.exp(rng.normal(size=len(places)))
    rows = [
        {"analyzer": "a", "metric": metric, "site": "resid_post", "layer": layer, "value": value}
        | {"step": step, "tokens": step * 2097152, "n": 65536}
        for step in steps
        for (metric, layer), value in zip(
            places, level * (1 + 0.01 * rng.normal(size=len(places)) + np.log1p(step)), strict=True
        )
    ]
    store.write("metrics", rows, series="large", run="seed0", name="all")
    page = render_report(store, "large")
    assert len(unpacked(Elements(page))) == len(places)
    # plotly.js and what the page says take 2.1 MB; nine runs of this are 1.3 million values.
    share = len(page.encode()) - 2_100_000
    assert share > 0
    assert 2_100_000 + 9 * share <= 8_000_000


@pytest.mark.long
def test_nine_runs_of_24_layers_can_be_mailed_and_opened(browser: Any, tmp_path: Path) -> None:
    """Nine runs x 154 checkpoints x 24 layers of 60 metrics, and of 2 metrics for each of 16 heads."""
    store = Store(tmp_path)
    rng = np.random.default_rng(1)
    steps = [0, *(2**k for k in range(10)), *range(1000, 144_000, 1000)]
    places: list[dict[str, object]] = [
        {"metric": f"metric{m}", "layer": layer, "head": None} for m in range(60) for layer in range(24)
    ]
    places += [
        {"metric": m, "layer": layer, "head": h} for m in "ab" for layer in range(24) for h in range(16)
    ]
    common = {"analyzer": "a", "protocol": "{}", "site": "resid_post", "n": 65536}
    for run in range(9):
        rows = [
            {**common, **place, "step": step, "tokens": step * 2097152, "value": value}
            for step in steps
            for place, value in zip(places, rng.normal(size=len(places)), strict=True)
        ]
        store.write("metrics", rows, series="large", run=f"seed{run}", name="all")
    page = render_report(store, "large")
    assert len(page.encode()) <= 8_000_000
    assert "the page shows some layers, evenly spaced" in page
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    tab = browser.new_page()
    open_report(tab, tmp_path / "report.html")
    assert tab.evaluate("document.getElementById('line-plot').data.length") == 9
    tab.close()


# ---- pictures


def _drawn(store: Store, *arguments: Any) -> dict[str, bytes]:
    # In a thread of its own: the browser of the other tests keeps this one's event loop.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(draw_figures, store, "toy", *arguments).result()


def test_plots_as_png(report_store: Store, browser: Any) -> None:
    drawn = _drawn(report_store, "png")
    assert list(drawn) == ["trajectories", "layers", "phases", "map", "pieces"]
    for raw in drawn.values():
        assert raw.startswith(b"\x89PNG")
        width, _ = struct.unpack(">II", raw[16:24])
        assert width > 1500


def test_a_map_wider_than_the_page_is_drawn_whole(report_store: Store, browser: Any, tmp_path: Path) -> None:
    shutil.copytree(report_store.root, tmp_path / "copy")
    store = Store(tmp_path / "copy")
    chosen = collect(store, "toy").chosen
    assert chosen is not None
    more = [{"model": chosen["model"], "step": 1500 + k, "state": 3 + k, "posterior": 1.0} for k in range(2)]
    store.write("states", more, series="toy", run="seed1", name="more")
    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(draw_figures, store, "toy", "png", ["map"]).result()
    width, _ = struct.unpack(">II", drawn["map"][16:24])
    assert width >= 3 * 0.8 * (5 * 166 + 4 * 60)  # five cards and the gaps between them
    svg = ElementTree.fromstring(_drawn(store, "svg", ["map"])["map"])
    assert "State 4" in "".join(svg.itertext())


def test_plots_as_svg(report_store: Store, browser: Any) -> None:
    drawn = _drawn(report_store, "svg", ["map", "trajectories"], "loss")
    assert list(drawn) == ["map", "trajectories"]
    for raw in drawn.values():
        assert ElementTree.fromstring(raw).tag == "{http://www.w3.org/2000/svg}svg"
    assert "loss (nats per token)" in "".join(ElementTree.fromstring(drawn["trajectories"]).itertext())
    assert "State 2" in "".join(ElementTree.fromstring(drawn["map"]).itertext())


def test_pictures_that_cannot_be_drawn(report_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no plot 'x' \(known: trajectories, layers"):
        draw_figures(report_store, "toy", "png", ["x"])
    with pytest.raises(UsageError, match="no trajectory 'x'"):
        draw_figures(report_store, "toy", "png", [], "x")
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    with pytest.raises(UsageError, match="pictures need Playwright and a Chromium"):
        draw_figures(report_store, "toy", "png")


def test_a_crowded_page_keeps_some_layers_of_most_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    place = [(m, layer, step) for m in "ab" for layer in [None, *range(9)] for step in range(10)]
    metrics = pd.DataFrame(place, columns=["metric", "layer", "step"]).astype({"layer": "Int64"})
    assert thinned(metrics, [], []).all()
    monkeypatch.setattr("flows.report.crowding.MOST_VALUES", 150)
    kept = metrics[thinned(metrics, [], [{"metrics": ["b[resid_post.3]"]}])]
    assert len(kept) <= 150
    found = {m: sorted(kept[kept["metric"] == m]["layer"].dropna().unique()) for m in "ab"}
    assert found == {"a": [0, 3, 5, 8], "b": list(range(9))}
    assert kept["layer"].isna().sum() == 20
