"""`ontogeny predict`: scores of several models, the curves of a given one, and a sentence if too few."""

from pathlib import Path

import numpy as np
from flow_support import Cli

from analyzers.growth import GrowthSettings, growth
from storage import Store
from tasks.growth import GrowthJob, fit_growth_curves

STEPS = [0, *(2**k for k in range(10)), *range(1000, 143_001, 8000)]


def model(store: Store, series: str, layers: int, width: int) -> None:
    t = np.array(STEPS, dtype=float)
    rows = []
    for layer in range(layers):
        values = growth(t, np.array([300 + 100 * layer, 0.12, 8e-4, 1.5, 20]))
        place = {"analyzer": "massive", "metric": "top1_over_median", "site": "resid_post", "layer": layer}
        rows += [{"step": s, "value": float(v), **place} for s, v in zip(STEPS, values, strict=True)]
    sizes = {"model_layers": layers, "model_width": width, "model_heads": 2, "model_d_ff": 4 * width}
    rows += [{"step": 0, "analyzer": "architecture", "metric": m, "value": v} for m, v in sizes.items()]
    store.write("metrics", rows, series=series, run="a", name="x")
    rule = GrowthSettings(draws=100)
    wanted = ("top1_over_median[resid_post.*]",)
    fit_growth_curves(GrowthJob(root=store.root, series=series, trajectories=wanted, rule=rule))


def test_predict(cli: Cli, tmp_path: Path) -> None:
    store = Store(tmp_path)
    model(store, "one", 1, 32)
    model(store, "two", 2, 64)
    few = cli("predict", "one", "two", "--root", str(tmp_path))
    assert few.returncode == 2
    assert "needs 3 models of different architecture with usable curves; there are 2" in few.stderr
    assert len(few.stderr.strip().splitlines()) == 1
    model(store, "three", 3, 96)
    done = cli("predict", "one", "two", "three", "--root", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for text in ("lambda", "RandomForest", "skill", "3 models; curves used: one 1, two 2, three 3."):
        assert text in done.stdout


def test_the_curve_of_a_given_architecture(cli: Cli, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name, layers in (("one", 1), ("two", 2), ("three", 3)):
        model(store, name, layers, 32 * layers)
    root = ("--root", str(tmp_path))
    sizes = "layers=2,width=64,heads=2,d_ff=256"
    few = cli("predict", "one", "two", *root, "--architecture", sizes)
    assert (few.returncode, len(few.stderr.strip().splitlines())) == (2, 1)
    page, values = tmp_path / "x.html", tmp_path / "x.csv"
    out = ("--out", str(page), "--out", str(values))
    done = cli("predict", "one", "two", "three", *root, "--architecture", sizes, *out)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "each model left out in turn: median relative error of a curve" in shown
    assert "Mind: a model of these sizes is among those that the prediction learned from." in shown
    lines = values.read_text().splitlines()
    assert lines[0] == "step,layer,value"
    last = STEPS[-1]
    assert {line.split(",")[1] for line in lines[1:]} == {"0", "1"}
    assert lines[-1].startswith(f"{last},1,")
    assert float(lines[-1].split(",")[2]) > 0
    assert "Plotly.newPlot" in page.read_text(encoding="utf-8")
    config = tmp_path / "config.json"
    config.write_text('{"n_layer": 9, "n_embd": 64, "n_head": 2, "n_inner": null}')
    done = cli("predict", "one", "two", "three", *root, "--architecture", str(config))
    assert done.returncode == 0, done.stderr
    assert "layers 9 lies outside the models' 1 to 3" in " ".join(done.stdout.split())
    for bad, sentence in (
        ("layers=2", "width is None"),
        ("layers=2,depth=3", "'depth' is none of layers, width, heads, d_ff"),
        (str(tmp_path / "none.json"), "is neither sizes nor a config.json"),
    ):
        refused = cli("predict", "one", "two", "three", *root, "--architecture", bad)
        assert (refused.returncode, sentence in refused.stderr) == (2, True), refused.stderr
