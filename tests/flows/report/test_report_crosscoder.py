"""The section on crosscoders: sentences and data from tables with known answers, and in a real Chromium."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_pages import download, until

from flows.report import render_report
from flows.report.crosscoder import MOST_FEATURES
from storage import Store

STEPS = (0, 4, 16)
# Birth, death and strengths of three kinds of features.
KINDS = {
    "persistent": (0, None, (1.0, 0.8, 0.9)),
    "emergent": (16, None, (0.1, 0.2, 1.0)),
    "decayed": (0, 4, (1.0, 0.6, 0.1)),
}
NASTY = "<img src=x onerror=alert(1)></script>"


def fill(store: Store, features: int) -> None:
    """Crosscoder of ``features`` features, which take turns in being of the three kinds."""
    common = {"reading": "r1"}
    quality = [
        {
            "crosscoder": "c1",
            "seed": seed,
            "first": seed == 0,
            "step": step,
            "mode": "activations",
            "site": "resid_post",
            "layer": 2,
            "rows": 1000,
            "width": 8,
            "latents": features + 1,
            "train_steps": 50,
            "explained_variance": 0.9 - 0.1 * s,
            "explained_held_out": 0.8 - 0.1 * s,
            "l0": 4.0,
            "dead": 1 / (features + 1),
            "clean_loss": 3.0,
            "loss_increase": 0.25 if seed == 0 else None,
            "shared": 0.4 if seed == 0 else None,
            "splice_note": None if seed == 0 else "not this seed",
        }
        for seed in (0, 1)
        for s, step in enumerate(STEPS)
    ]
    rows, contexts = [], []
    for i in range(features):
        kind = list(KINDS)[i % 3]
        birth, death, strengths = KINDS[kind]
        for s, step in enumerate(STEPS):
            rows.append(
                {
                    "feature": i,
                    "step": step,
                    "strength_share": strengths[s],
                    "beta": strengths[s],
                    "density": 0.01,
                    "class": kind,
                    "birth": birth,
                    "death": death,
                    "peak": STEPS[strengths.index(1.0)],
                    "final_cosine": 1.0,
                    "dimensionality": 0.5,
                }
            )
        contexts += [
            {
                "feature": i,
                "rank": rank,
                "value": 3.0 - rank,
                "before": f"before {i} ",
                "token": NASTY,
                "after": " after",
            }
            for rank in range(6)
        ]
    effects = [
        {
            "task": "agreement",
            "step": 16,
            "items": 10,
            "metric": -1.5,
            "correct": 0.9,
            "ablated": [1, 2],
            "ablated_change": 0.5,
            "random_changes": [0.1, 0.3],
            "p": 0.25,
        },
        {"task": "agreement", "step": 16, "feature": 1, "ie": -0.5, "relie": 1.0},
    ]
    metrics = [
        {
            "step": step,
            "tokens": 512 * step,
            "analyzer": "ngram_kl",
            "metric": "unigram_kl",
            "value": 2.0 + s,
            "n": 10,
            "protocol": "{}",
        }
        for s, step in enumerate((0, 2, 4, 16))
    ]
    for table, mine in (
        ("crosscoders", quality),
        ("features", rows),
        ("feature_contexts", contexts),
        ("effects", effects),
    ):
        store.write(table, [common | row for row in mine], series="s", run="r", name="r1")
    store.write("metrics", metrics, series="s", run="r", name="m")


def embedded(page: str) -> list[dict[str, Any]]:
    found = re.search(r'id="crosscoder-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    parts: list[dict[str, Any]] = json.loads(found.group(1))
    return parts


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = Store(tmp_path_factory.mktemp("crosscoder"))
    fill(store, 6)
    return render_report(store, "s")


def test_the_section_says_what_the_tables_hold(page: str) -> None:
    text = " ".join(re.sub(r"<[^>]+>", " ", page[page.index('<section id="crosscoders"') :]).split())
    assert "r: 7 latents over 3 snapshots at resid_post, block 2, trained for 50 steps on 1,000 rows" in text
    assert "r: 6 features: 2 persistent, 2 emergent and 2 decayed." in text
    assert "r: 40% of the features are found again in the other seeds." in text
    assert "are drawn, evenly" not in text
    assert "16 10 -1.5 0.9 2 0.5 0.2 0.25" in text  # the ablation beside the mean of its control
    (part,) = embedded(page)
    assert part["steps"] == [0, 4, 16]
    assert part["births"] == [4, 0, 2]
    assert part["explained"] == [0.9, 0.8, 0.7]
    assert part["dimensions"] == [0.375] * 3  # 6 features of 0.5 in 8 channels
    assert part["kl"] == {"unigram_kl": [2, 3, 4, 5]}
    assert part["klSteps"] == [0, 2, 4, 16]
    # By birth, then peak, then death.
    assert [f["class"] for f in part["features"]] == ["decayed"] * 2 + ["persistent"] * 2 + ["emergent"] * 2
    assert part["features"][0]["strength"] == [1.0, 0.6, 0.1]
    assert [c[3] for c in part["features"][0]["contexts"]] == [3, 2, 1, 0]


def test_of_many_features_some_are_drawn_and_the_page_stays_small(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, 700)
    page = render_report(store, "s")
    (part,) = embedded(page)
    assert len(part["features"]) == MOST_FEATURES
    assert sum(part["births"]) == 700
    kinds = [f["class"] for f in part["features"]]
    assert all(95 <= kinds.count(kind) <= 105 for kind in KINDS)
    assert "300 of the 700 features are drawn, evenly over their order." in page
    assert len(json.dumps(part)) < 400_000


def test_without_a_crosscoder_there_is_no_section(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("checkpoints", [{"step": 0}], series="bare", run="r", name="catalogue")
    assert "crosscoder" not in render_report(store, "bare")


@pytest.fixture(scope="module")
def opened(page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page in Chromium; errors, dialogs and requests are checked when the tests end."""
    installed = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if installed is None:
        pytest.skip("no Chromium found: install one, or name it in the environment variable CHROMIUM")
    from playwright.sync_api import sync_playwright

    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page, encoding="utf-8")
    troubles: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(30_000)
        tab.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("dialog", lambda dialog: (troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector("html[data-ready]", state="attached")
        yield tab
        browser.close()
    assert troubles == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]


def drawn(page: Any, plot: str, key: str) -> Any:
    return page.evaluate(
        f"JSON.parse(JSON.stringify(document.getElementById('{plot}').data.map((t) => t.{key})))"
    )


def test_plots_show_the_data(opened: Any) -> None:
    (strengths,) = drawn(opened, "crosscoder-heat", "z")
    assert strengths[0] == [1.0, 0.6, 0.1]
    assert strengths[-1] == [0.1, 0.2, 1.0]
    assert drawn(opened, "crosscoder-births", "y") == [[4, 0, 2]]
    assert drawn(opened, "crosscoder-quality", "name") == [
        "explained variance",
        "explained variance, held-out text",
        "loss increase",
    ]
    assert drawn(opened, "crosscoder-phases", "name") == ["dimensionality", "unigram_kl"]


def test_a_feature_has_a_page_with_its_contexts_as_text(opened: Any) -> None:
    opened.locator("#crosscoder-feature").select_option(index=5)
    assert opened.locator("#crosscoder-title").inner_text() == "Feature #4 of r"
    about = opened.locator("#crosscoder-about").inner_text()
    assert "emergent; born at step 16, peak at 16, alive at the last snapshot" in about
    items = opened.locator("#crosscoder-contexts li")
    assert items.count() == 4
    assert items.first.text_content() == f"before 4 {NASTY} after"
    assert opened.locator("#crosscoder-contexts mark").first.text_content() == NASTY
    assert opened.locator("#crosscoder-contexts img").count() == 0
    assert drawn(opened, "crosscoder-curve", "y")[0] == [0.1, 0.2, 1]


def test_what_every_plot_shows_can_be_downloaded(opened: Any) -> None:
    features = download(opened, "#crosscoder-heat-csv")
    assert features[0] == "run,feature,class,birth,peak,death,step,strength,beta,cosine"
    assert len(features) == 1 + 6 * 3
    assert ",0,1," in features[1]
    opened.locator("#crosscoder-feature").select_option(index=0)
    assert download(opened, "#crosscoder-curve-csv") == features[:4]
    assert download(opened, "#crosscoder-births-csv") == ["run,step,births", "r,0,4", "r,4,0", "r,16,2"]
    quality = download(opened, "#crosscoder-quality-csv")
    assert quality[:2] == [
        "run,step,explained_variance,explained_held_out,loss_increase",
        "r,0,0.9,0.8,0.25",
    ]
    room = download(opened, "#crosscoder-phases-csv")
    assert room[0] == "run,step,quantity,value"
    assert room[1:] == [f"r,{step},dimensionality,0.375" for step in STEPS] + [
        f"r,{step},unigram_kl,{value}" for step, value in ((0, 2), (2, 3), (4, 4), (16, 5))
    ]


def _ends(page: Any, plot: str) -> list[float]:
    found: list[float] = page.evaluate(f"document.getElementById('{plot}').layout.xaxis.range")
    return found


PLOTS = [f"crosscoder-{name}" for name in ("heat", "curve", "births", "quality", "phases")]


def test_the_plots_follow_the_axis_and_the_zoom_of_all(opened: Any) -> None:
    opened.get_by_label("Axis", exact=True).select_option("token")
    assert drawn(opened, "crosscoder-quality", "x")[0] == pytest.approx([0.0, np.log10(5), np.log10(17)])
    opened.get_by_label("Scale").select_option("linear")
    tokens = [0, 4 * 512, 16 * 512]
    assert drawn(opened, "crosscoder-quality", "x")[0] == tokens
    assert drawn(opened, "crosscoder-phases", "x") == [tokens, [0, 2 * 512, 4 * 512, 16 * 512]]
    opened.get_by_label("Axis", exact=True).select_option("step")
    assert drawn(opened, "crosscoder-curve", "x")[0] == [0, 4, 16]
    assert drawn(opened, "crosscoder-heat", "x")[0] == [-2, 2, 10, 22]
    opened.get_by_label("Scale").select_option("log")
    assert drawn(opened, "crosscoder-curve", "x")[0] == [
        None,
        pytest.approx(np.log10(4)),
        pytest.approx(np.log10(16)),
    ]
    opened.evaluate("Plotly.relayout('line-plot', {'xaxis.range[0]': 1, 'xaxis.range[1]': 2})")
    for plot in PLOTS:
        until(opened, f"document.getElementById('{plot}').layout.xaxis.range[0] === 1")
        assert _ends(opened, plot) == [1, 2]
    opened.evaluate("Plotly.relayout('crosscoder-births', {'xaxis.range[0]': 0, 'xaxis.range[1]': 3})")
    for plot in ("line-plot", "crosscoder-heat"):
        until(opened, f"document.getElementById('{plot}').layout.xaxis.range[0] === 0")
    opened.get_by_label("Scale").select_option("symlog")
    assert _ends(opened, "crosscoder-births") != [0, 3]


def test_the_theme_is_followed(opened: Any) -> None:
    before = opened.evaluate("document.getElementById('crosscoder-heat').layout.font.color")
    opened.locator("#theme").click()
    assert opened.evaluate("document.getElementById('crosscoder-heat').layout.font.color") != before
