"""Growth curves of several series predicted by architecture: scores, and the curves of a given model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from analyzers.growth import GROWTH_FORM, PUBLISHED
from analyzers.growth_forms import CLASSES
from analyzers.predictor import (
    FEWEST_MODELS,
    REGRESSORS,
    Architecture,
    Sample,
    curve,
    leave_one_model_out,
    predict,
    score_curves,
    usable,
)
from storage.errors import UsageError
from storage.store import Store

_SIZES = ("model_layers", "model_width", "model_heads", "model_d_ff")


# Names in config.json, by size.
_CONFIG = {
    "layers": ("num_hidden_layers", "n_layer"),
    "width": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "d_ff": ("intermediate_size", "n_inner"),
}


def read_architecture(text: str) -> Architecture:
    """Sizes out of ``layers=12,width=768,heads=12,d_ff=3072`` or the path of a config.json.

    Without d_ff the inner width is 4 x width, as in GPT-2.

    Raises:
        UsageError: a size is missing, not known or not a positive number, or the file cannot be read.
    """
    sizes: dict[str, Any] = {}
    if "=" in text:
        for part in text.split(","):
            name, _, size = part.partition("=")
            if name.strip() not in _CONFIG:
                raise UsageError(f"architecture {text!r}: {name.strip()!r} is none of {', '.join(_CONFIG)}")
            sizes[name.strip()] = int(size) if size.strip().isdigit() else size
    else:
        try:
            config = json.loads(Path(text).read_text(encoding="utf-8"))
            sizes = {
                k: next((config[n] for n in names if config.get(n)), None) for k, names in _CONFIG.items()
            }
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(f"architecture {text!r} is neither sizes nor a config.json: {error}") from None
    if sizes.get("d_ff") is None and isinstance(sizes.get("width"), int):
        sizes["d_ff"] = 4 * sizes["width"]
    for name in _CONFIG:
        if not isinstance(sizes.get(name), int) or sizes[name] < 1:
            raise UsageError(f"architecture {text!r}: {name} is {sizes.get(name)!r}, not a number from 1 on")
    return Architecture(**sizes)


def architecture_of(store: Store, series: str) -> Architecture:
    """Sizes of the models of a series, as the analyzer ``architecture`` measured them.

    Raises:
        UsageError: they are not in the store, not all known, or not the same in all runs.
    """
    metrics = store.table("metrics", series).to_pandas()
    rows = metrics[metrics["metric"].isin(_SIZES)]
    if rows.empty:
        raise UsageError(
            f"the store does not know the architecture of {series!r}; one checkpoint is enough: "
            f"ontogeny measure {series} --analyzer architecture --steps 0"
        )
    sizes = []
    for name in _SIZES:
        values = rows.loc[rows["metric"] == name, "value"]
        if values.isna().all() or values.nunique() != 1:
            found = sorted(values.dropna().unique().astype(int).tolist())
            raise UsageError(
                f"{name} of {series!r} is {'not known' if not found else f'not one number: {found}'}"
            )
        sizes.append(int(values.dropna().iloc[0]))
    return Architecture(*sizes)


def collect_samples(store: Store, series: str, metric: str, site: str) -> tuple[list[Sample], int]:
    """Fitted curves of every layer and run of a series, and how many rows could not be used.

    Used are curves of the classes ``early-peak`` and ``log-rise`` whose five parameters the transforms take.

    Raises:
        UsageError: no curve is in the store, or the architecture is not.
    """
    rows = [
        row
        for row in store.table("curves", series).to_pylist()
        if (row["form"], row["metric"], row["site"], row["head"]) == (GROWTH_FORM, metric, site, None)
        and row["run"] is not None
        and row["layer"] is not None
    ]
    if not rows:
        raise UsageError(
            f"there are no growth curves of {metric}[{site}.*] of series {series!r} in {store.root!r}; "
            f"fit them with: ontogeny curves {series}"
        )
    architecture = architecture_of(store, series)
    samples = []
    for row in rows:
        numbers = dict(row["parameters"])
        found = tuple(float(numbers[name]) for name in PUBLISHED if name in numbers)
        if row["class"] in CLASSES[:2] and usable(found):
            samples.append(Sample(architecture, row["layer"], found))
    return samples, len(rows) - len(samples)


def collect(root: str, series: list[str], metric: str, site: str) -> tuple[list[Sample], dict[str, int], int]:
    """Samples of several series, how many are of which, and how many curves were left out.

    Raises:
        UsageError: as :func:`collect_samples`; also, there are too few models of different architecture.
    """
    store = Store(root)
    unknown = [name for name in series if name not in store.series()]
    if unknown:
        raise UsageError(f"series {unknown[0]!r} is not in the store at {root!r}")
    samples: list[Sample] = []
    used: dict[str, int] = {}
    left_out = 0
    for name in dict.fromkeys(series):
        mine, lost = collect_samples(store, name, metric, site)
        samples += mine
        used[name] = len(mine)
        left_out += lost
    models = len({sample.architecture for sample in samples})
    if models < FEWEST_MODELS:
        counts = ", ".join(f"{name} {count}" for name, count in used.items())
        raise UsageError(
            f"a prediction leaves one model out and needs {FEWEST_MODELS} models of different architecture "
            f"with usable curves; there are {models} (usable curves: {counts})"
        )
    return samples, used, left_out


def score_predictor(root: str, series: list[str], metric: str, site: str, seed: int) -> dict[str, Any]:
    """Scores of every regressor on every parameter, each model left out once; with the samples behind them.

    Raises:
        UsageError: as :func:`collect`.
    """
    samples, used, left_out = collect(root, series, metric, site)
    scores = leave_one_model_out(samples, seed)
    return {
        "models": len({sample.architecture for sample in samples}),
        "used": used,
        "left_out": left_out,
        "scores": [[score.parameter, score.regressor, score.r2, score.skill] for score in scores],
    }


def last_step(root: str, series: list[str], metric: str, site: str) -> int:
    """The last step that the trajectories of all series reach: beyond it a curve would be extrapolated."""
    store = Store(root)
    ends = []
    for name in series:
        rows: pd.DataFrame = store.table("metrics", name).to_pandas()
        here = rows[(rows["metric"] == metric) & (rows["site"] == site)]
        ends.append(int(here.groupby("run")["step"].max().min()))
    return min(ends)


def step_grid(last: int) -> list[int]:
    """0, then 12 steps per octave at most, up to ``last``."""
    found = np.round(2 ** np.arange(0, np.log2(max(last, 1)) + 1e-9, 1 / 12)).astype(int)
    return sorted({0, *found.tolist(), last})


def predict_curves(
    root: str, series: list[str], metric: str, site: str, wanted: str, regressor: str, seed: int
) -> dict[str, Any]:
    """The predicted curve of every layer of a model of the sizes ``wanted``, and how good such curves are.

    A layer whose predicted parameters are no curve has None and the reason. ``remarks`` name the sizes that
    lie outside those of the models it learned from, and a model that is one of them.

    Raises:
        UsageError: as :func:`collect` and :func:`read_architecture`, or there is no such regressor.
    """
    if regressor not in REGRESSORS:
        raise UsageError(f"there is no regressor {regressor!r}: give one of {', '.join(REGRESSORS)}")
    architecture = read_architecture(wanted)
    samples, _, _ = collect(root, series, metric, site)
    steps = step_grid(last_step(root, series, metric, site))
    t = np.array(steps, dtype=np.float64)
    parameters = predict(samples, architecture, regressor, seed)
    curves = [curve(t, each) for each in parameters]
    (score,) = (s for s in score_curves(samples, t, seed) if s.regressor == regressor)
    return {
        "architecture": vars(architecture),
        "regressor": regressor,
        "steps": steps,
        "curves": [None if each is None else each.tolist() for each in curves],
        "error": score.error,
        "baseline": score.baseline,
        "broken": score.broken,
        "scored": score.n,
        "remarks": _remarks(architecture, {sample.architecture for sample in samples}),
    }


def _remarks(architecture: Architecture, models: set[Architecture]) -> list[str]:
    remarks = []
    if architecture in models:
        remarks.append("a model of these sizes is among those that the prediction learned from")
    for name, size in vars(architecture).items():
        known = sorted(getattr(model, name) for model in models)
        if not known[0] <= size <= known[-1]:
            remarks.append(f"{name} {size} lies outside the models' {known[0]} to {known[-1]}")
    return remarks


@task(name="predict-curves", cache_policy=NO_CACHE)
def predict_series_curves(
    root: str, series: list[str], metric: str, site: str, wanted: str, regressor: str, seed: int
) -> dict[str, Any]:
    """Task: :func:`predict_curves`."""
    return predict_curves(root, series, metric, site, wanted, regressor, seed)


@task(name="score-predictor", cache_policy=NO_CACHE)
def score_series_predictor(root: str, series: list[str], metric: str, site: str, seed: int) -> dict[str, Any]:
    """Task: :func:`score_predictor`."""
    return score_predictor(root, series, metric, site, seed)
