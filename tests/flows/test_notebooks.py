"""The notebooks run from top to bottom on a store made here, and are kept without outputs."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from analyzers.latent import StateSettings
from storage import Store
from tasks.states import StatesJob, fit_series

REPOSITORY = Path(__file__).parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(600, 1500, 100))


def _fill(store: Store, series: str) -> None:
    """Four runs of two metrics that jump at steps 16 and 512; seed3 goes elsewhere at steps 64 and 128."""
    rng = np.random.default_rng(len(series))
    for seed in range(4):
        rows = []
        for step in STEPS:
            level = 0 if step < 16 else 1 if step < 512 else 2
            away = 5.0 if seed == 3 and step in (64, 128) else 0.0
            shared = {"step": step, "tokens": step * 1024, "n": 100, "protocol": '{"version": 1}', "key": "k"}
            loss = 9 - 3 * level + 0.05 * rng.normal() + away
            rank = 40 - 12 * level + 0.3 * rng.normal()
            rows.append({**shared, "analyzer": "loss", "metric": "loss", "value": loss})
            place = {"site": "resid_post", "layer": 1}
            rows.append({**shared, **place, "analyzer": "spectra", "metric": "rankme_cov", "value": rank})
        store.write("metrics", rows, series=series, run=f"seed{seed}", name="all")
    names = ("loss", "rankme_cov[resid_post.1]")
    fit = StateSettings(k_max=4, restarts=4, surrogates=3, surrogate_restarts=2, surrogate_selections=0)
    job = StatesJob(
        root=store.root,
        series=series,
        trajectories=names,
        transforms={},
        grid="union",
        min_share=0.5,
        fit=fit,
    )
    fit_series(job)


@pytest.fixture(scope="module")
def notebook_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("notebook-store"))
    for series in ("first", "second"):
        _fill(store, series)
    return store


def _text(notebook: nbformat.NotebookNode) -> str:
    """All printed text and plain values of an executed notebook."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(str(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in outputs)


def _run(name: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ONTOGENY_ROOT", store.root)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("PLOTLY_RENDERER", "json")
    notebook = nbformat.read(REPOSITORY / "notebooks" / name, as_version=4)
    where = {"metadata": {"path": str(REPOSITORY / "notebooks")}}
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources=where).execute()
    return _text(notebook)


# What each must say of the planted series.
SAYS = {
    "detours.ipynb": ["seed3", "> "],
    "feature_births.ipynb": ["no features of first yet: run `ontogeny crosscoder first`"],
    "first_look.ipynb": ["0 failed attempts; 0 findings", "metrics"],
    "own_analyzer.ipynb": ["total_variance resid_post 2", "n = 384"],
    "phases.ipynb": ["256", "512"],
    "two_series.ipynb": ["['first', 'second']", "loss"],
}


def test_every_notebook_is_run() -> None:
    assert [path.name for path in NOTEBOOKS] == sorted(SAYS)


@pytest.mark.parametrize("name", sorted(SAYS))
def test_notebook(name: str, notebook_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    text = _run(name, notebook_store, monkeypatch)
    for part in SAYS[name]:
        assert part in text


@pytest.mark.parametrize("name", sorted(SAYS.keys() - {"own_analyzer.ipynb"}))
def test_an_empty_store_gets_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebook_store: Store
) -> None:
    notebook = nbformat.read(REPOSITORY / "notebooks" / name, as_version=4)
    opening = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    monkeypatch.setenv("ONTOGENY_ROOT", str(tmp_path))
    with pytest.raises(AssertionError, match="holds no series yet: run `ontogeny demo`"):
        exec(opening, {})
    monkeypatch.setenv("ONTOGENY_ROOT", notebook_store.root)
    monkeypatch.setenv("ONTOGENY_SERIES", "third")
    with pytest.raises(AssertionError, match=r"third is not in the store .* which holds first, second"):
        exec(opening, {})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_small_and_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert path.stat().st_size < 10_000
    source = "\n".join(cell.source for cell in code)
    assert path.name == "own_analyzer.ipynb" or "storage.open_root" in source
