"""A small store with known answers: three runs of 20 checkpoints, four layers, the third run odd."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from report_pages import chromium, open_report

from storage import Store

RUNS = ("seed1", "seed2", "seed3")
STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(600, 1500, 100))
LAYERS = 4
FAILED = ("seed2", 128)
GAP = ("seed1", 8)
MODEL = "fit0123456789abcdef"
AT = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def rankme(run: str, step: int, layer: int) -> float:
    """Value of rankme_cov: falls by 10 and rises again, one unit higher per run and layer."""
    place = STEPS.index(step)
    return 30 + abs(place - 10) + layer + RUNS.index(run) + 0.125


def state(run: str, step: int) -> int:
    """seed1 and seed2 go 0 -> 1 (at 32 and 64); seed3 goes 0 -> 1 -> 2 -> 1."""
    if run == "seed3":
        return 0 if step < 32 else 2 if 512 <= step < 800 else 1
    return int(step >= (32 if run == "seed1" else 64))


def _protocol(analyzer: str) -> str:
    return json.dumps(
        {
            "analyzer": analyzer,
            "version": 2,
            "parameters": {"site": "resid_post"},
            "probe": "9f86d081884c7d65",
            "dtype": "float32",
            "schema_version": 1,
        }
    )


def _metrics(run: str, step: int) -> list[dict[str, object]]:
    common = {"step": step, "tokens": step * 2048, "n": 4096, "recorded_at": AT}
    spectra = {**common, "analyzer": "spectra", "protocol": _protocol("spectra"), "metric": "rankme_cov"}
    rows: list[dict[str, object]] = []
    for layer in range(LAYERS):
        value: float | None = rankme(run, step, layer)
        note = None
        if (run, step, layer) == (*GAP, LAYERS - 1):
            value, note = None, "the covariance has no rank <b>here</b>"
        rows.append({**spectra, "site": "resid_post", "layer": layer, "value": value, "note": note})
    rows.append({**spectra, "site": "final_norm", "value": 12.5})
    rows.append(
        {
            **common,
            "analyzer": "loss",
            "protocol": _protocol("loss"),
            "metric": "loss",
            "value": 7 - step / 1000,
        }
    )
    return rows


def _phases(run: str | None) -> dict[str, object]:
    """Phases of rankme_cov at the last block: a collapse to step 512 in all runs, seen by seed3 at 600."""
    step = 600 if run == "seed3" else 512
    parameters = {
        "runs_judged": 3 if run is None else 1,
        "noise": 0.01,
        "threshold": 0.1,
        "collapse_seen": 1,
        "collapse_runs": 3 if run is None else 1,
        "collapse_change": -0.28768207,  # ln(3/4)
        "collapse_end_step": step,
        "collapse_end_value": 33.125,
        "collapse_end_tokens": step * 2048,
        "expansion_seen": 1,
        "expansion_runs": 3 if run is None else 1,
        "expansion_change": 0.22314355,  # ln(5/4)
        "compression_seen": 0,
        "compression_runs": 0,
        "compression_change": 0.0,
    }
    intervals = {
        "collapse_change": {"low": -0.4, "high": -0.2},
        "collapse_end_step": {"low": 256, "high": step + 88},
        "expansion_change": {"low": 0.1, "high": 0.3},
        "compression_change": {"low": -0.1, "high": 0.1},
    }
    return {
        "curve": "c1",
        "metric": "rankme_cov",
        "site": "resid_post",
        "layer": LAYERS - 1,
        "form": "geometric-phases",
        "class": "collapse-expansion",
        "n": 19,
        "runs": list(RUNS) if run is None else [run],
        "parameters": list(parameters.items()),
        "intervals": list(intervals.items()),
        "note": "one <b>note</b>" if run == "seed3" else None,
    }


def _fill_map(store: Store, series: str) -> None:
    """A boundary that is open on one side, the drivers of one edge, and an outcome with a detour."""
    boundaries = [
        {"run": "seed1", "from": 0, "to": 1, "before": 16, "step": 32, "low": 8, "high": None},
        {"run": "seed2", "from": 0, "to": 1, "before": 32, "step": 64, "low": 32, "high": 64},
    ]
    drivers = [
        {"run": None, "metric": "loss", "score": 2.5, "rank": 1, "runs": 3, "shift": -0.75},
        {"run": None, "metric": "l2", "score": 0.5, "rank": 2, "runs": 3, "shift": None},
        {"run": "seed1", "metric": "loss", "score": 7.75, "rank": 1, "runs": 1, "shift": -0.75},
    ]
    state = {
        "state": 2,
        "coefficient": 812.5,
        "error": 40.0,
        "p": 0.01,
        "with_state": ["seed3"],
        "without_state": ["seed1", "seed2"],
        "mean_with": 900.0,
        "mean_without": 600.0,
        "p_later": 0.03,
        "detour": True,
    }
    outcome = {
        "outcome": "first step with loss below 6.5",
        "values": [{"run": run, "value": 600.0} for run in RUNS],
        "r2": 0.8,
        "r2_adjusted": 0.7,
        "f": 9.0,
        "p": 0.02,
        "p_permutation": 0.04,
        "permutations": 9999,
        "states": [state],
        "dissimilarity": 0.25,
        "notes": ["a <b>note</b>"],
    }
    null = {"sentence": "Smooth <b>curves</b> do as well (gap +0.1).", "notes": ["a note on the null"]}
    whole = {"run": None, "ari": 0.75, "n": 59, "runs": 3}
    alone = {"run": "seed1", "n": 20, "runs": 1}
    beside = [
        {**whole, "baseline": "change points"},
        {**whole, "baseline": "k-means", "ari": 0.5},
        {**alone, "baseline": "k-means", "ari": 0.25, "boundaries": [16, 512], "labels": [0, 1, 2]},
        {**alone, "baseline": "change points", "ari": 1.0, "boundaries": [32], "labels": [0, 1]},
        {**alone, "baseline": "geometric-phases", "trajectory": "loss", "note": "no end"},
    ]
    tables = {
        "nulls": [null, {**null, "sentence": "Of an older null.", "model": "older"}],
        "baselines": beside,
        "boundaries": boundaries,
        "drivers": [{"from": 0, "to": 1, "shift_scaled": 1.5, **row} for row in drivers],
        "outcomes": [outcome, {**outcome, "outcome": "of an older fit", "model": "older"}],
    }
    for table, rows in tables.items():
        store.write(table, [{"model": MODEL, **row} for row in rows], series=series, name=MODEL)


def fill(store: Store, series: str) -> None:
    """Write every table the report reads."""
    for run in RUNS:
        listed = [
            {"step": s, "tokens": s * 2048, "stage": None, "revision": f"step{s}", "recorded_at": AT}
            for s in STEPS
        ]
        store.write("checkpoints", listed, series=series, run=run, name="catalogue")
        for step in STEPS:
            if (run, step) != FAILED:
                store.write("metrics", _metrics(run, step), series=series, run=run, name=f"step{step}")
        decoded = [
            {"model": MODEL, "step": s, "tokens": None, "state": state(run, s), "posterior": 0.9}
            for s in STEPS
            if (run, s) != FAILED
        ]
        store.write("states", decoded, series=series, run=run, name=MODEL)
    models = [
        {
            "model": MODEL,
            "k": k,
            "chosen": k == 3,
            "bic": 1000.0 - k,
            "heldout": float(abs(k - 3)),
            "loglik": -500.0 + k,
            "ari": 0.95,
            "failed_restarts": 0,
            "metrics": ["rankme_cov[resid_post.3]", "loss"],
            "train_runs": ["seed1", "seed2"],
            "heldout_runs": ["seed3"],
            "parameters": json.dumps({"notes": ["two metrics are few"]}),
        }
        for k in range(1, 6)
    ]
    store.write("state_models", models, series=series, name=MODEL)
    edges = [
        {"from": 0, "to": 1, "count": 3, "runs": list(RUNS), "probability": 0.1},
        {"from": 1, "to": 2, "count": 1, "runs": ["seed3"], "probability": 0.02},
        {"from": 2, "to": 1, "count": 1, "runs": ["seed3"], "probability": 0.3},
    ]
    edges[0] |= {"dwell_checkpoints": 5.5, "dwell_steps": 32.0, "dwell_tokens": 65536.0}
    edges = [{"model": MODEL, **edge} for edge in edges]
    store.write("transitions", edges, series=series, name=MODEL)
    _fill_map(store, series)
    for run in (*RUNS, None):
        store.write("curves", [_phases(run)], series=series, run=run, name="phases")
    findings = [
        {"step": None, "kind": "naming", "severity": "note", "detail": "branches are named stepN"},
        {"step": 256, "kind": "duplicate", "severity": "warning", "detail": "same weights as step 128"},
        {"step": 64, "kind": "odd", "severity": "error", "detail": "<script>alert(1)</script> & more"},
    ]
    store.write("findings", findings, series=series, run="seed3", name="audit")
    failures = [
        {
            "step": FAILED[1],
            "analyzer": None,
            "error": "truncated </script><img src=x>",
            "attempt": 1,
            "at": AT,
        },
        {"step": 256, "analyzer": "loss", "error": "out of memory", "attempt": 1, "at": AT},
    ]
    store.write("failures", failures, series=series, run=FAILED[0], name="attempts")
    invocation = {
        "invocation": "a1",
        "command": "measure",
        "config": json.dumps({"series": series}),
        "versions": json.dumps({"ontogeny": "0.1.0"}),
        "machine": json.dumps({"cores": 2}),
        "started": AT - timedelta(minutes=3),
        "finished": AT,
        "counts": json.dumps({"checkpoints": 60}),
    }
    store.write("provenance", [invocation], series=series, name="a1")


@pytest.fixture(scope="session")
def report_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store with the series ``toy``, and ``bare`` that was only catalogued."""
    root: Path = tmp_path_factory.mktemp("report-store")
    store = Store(root)
    fill(store, "toy")
    store.write("checkpoints", [{"step": 0}], series="bare", run="seed1", name="catalogue")
    return store


@pytest.fixture(scope="session")
def report_page(report_store: Store) -> str:
    """The report of the series ``toy``."""
    from flows.report import render_report

    return render_report(report_store, "toy")


@pytest.fixture(scope="module")
def browser() -> Any:
    installed = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Any, report_page: str, tmp_path: Path) -> Any:
    """The page in a browser, watched for errors and requests; both are checked when the test ends."""
    path = tmp_path / "report.html"
    path.write_text(report_page, encoding="utf-8")
    context = browser.new_context(color_scheme="light", viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(20_000)
    troubles: list[str] = []
    requests: list[str] = []
    page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: (troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    open_report(page, path)
    yield page
    context.close()
    assert troubles == []
    outside = [url for url in requests if not url.startswith(("data:", "blob:"))]
    assert outside == [path.as_uri()]
