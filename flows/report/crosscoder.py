"""Crosscoders: quality by snapshot, lives of features, and a page for each of those that are drawn."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from flows.report.data import ReportData, Row
from flows.report.text import join, number, plural
from storage import Store

# Of all features so many are drawn, evenly over their order: more would be rows below a pixel.
MOST_FEATURES = 300
_CONTEXTS = 4
_LABELLED = ("label", "argument", "auc", "purity", "note")
_BESIDE = ("unigram_kl", "bigram_kl")


@dataclass(frozen=True)
class CrosscoderPart:
    """The newest crosscoder of one run."""

    run: str
    sentences: list[str]
    quality: list[Row]
    effects: list[Row]
    task: str | None
    payload: dict[str, Any]


def parts(store: Store, data: ReportData) -> list[CrosscoderPart]:
    """Runs that have a crosscoder, by name; none where there is no table of them."""
    quality = store.table("crosscoders", data.series).to_pandas()
    if quality.empty:
        return []
    features = store.table("features", data.series).to_pandas()
    contexts = store.table("feature_contexts", data.series).to_pandas()
    effects = store.table("effects", data.series).to_pylist()
    return [
        _part(
            data,
            str(run),
            mine.sort_values("step"),
            features[features["run"] == run].sort_values(["feature", "step"]),
            contexts[contexts["run"] == run],
            [row for row in effects if row["run"] == run and row["feature"] is None],
        )
        for run, mine in quality[quality["first"]].groupby("run", sort=True)
    ]


def _part(
    data: ReportData,
    run: str,
    quality: pd.DataFrame,
    features: pd.DataFrame,
    contexts: pd.DataFrame,
    effects: list[Row],
) -> CrosscoderPart:
    about = quality.iloc[0]
    steps = [int(step) for step in quality["step"]]
    one = features.drop_duplicates("feature").set_index("feature")
    order = one.assign(life=one["death"].fillna(np.inf)).sort_values(["birth", "peak", "life"], kind="stable")
    at = np.unique(np.linspace(0, max(len(order) - 1, 0), min(MOST_FEATURES, len(order))).round().astype(int))
    shown = [int(feature) for feature in order.index[at]]
    classes = Counter(one["class"].dropna())
    rows = [_row(row) for row in quality.to_dict("records")]
    beside = {
        t.metric: t.values[[r.name for r in data.runs].index(run)]
        for t in data.trajectories
        if t.metric in _BESIDE and any(r.name == run for r in data.runs)
    }
    place = str(about["site"]) if pd.isna(about["layer"]) else f"{about['site']}, block {int(about['layer'])}"
    sentences = [
        f"{plural(int(about['latents']), 'latent')} over {plural(len(steps), 'snapshot')} at {place}, "
        f"trained for {plural(int(about['train_steps']), 'step')} on {plural(int(about['rows']), 'row')}; "
        f"{about['dead']:.1%} of them are active at no row.",
        f"{plural(len(one), 'feature')}: "
        + (join([f"{number(n)} {name}" for name, n in classes.most_common()]) or "none with a life")
        + ".",
    ]
    if pd.notna(about["shared"]):
        sentences.append(f"{about['shared']:.0%} of the features are found again in the other seeds.")
    else:
        sentences.append("One seed: how many of its features another would find again is not known.")
    if len(shown) < len(one):
        sentences.append(
            f"{number(len(shown))} of the {number(len(one))} features are drawn, evenly over their order."
        )
    return CrosscoderPart(
        run,
        sentences,
        rows,
        sorted(effects, key=lambda row: row["step"]),
        effects[0]["task"] if effects else None,
        {
            "run": run,
            "steps": steps,
            "tokens": [None if pd.isna(count) else int(count) for count in quality["tokens"]],
            "births": [int((one["birth"] == step).sum()) for step in steps],
            "explained": _values(quality["explained_variance"]),
            "heldOut": _values(quality["explained_held_out"]),
            "increase": _values(quality["loss_increase"]),
            "dimensions": _dimensions(features, steps, int(about["width"])),
            "kl": beside,
            "klSteps": next((r.steps for r in data.runs if r.name == run), []) if beside else [],
            "features": _features(features, contexts, shown),
        },
    )


def _row(row: dict[Any, Any]) -> Row:
    return {str(k): None if not isinstance(v, str) and pd.isna(v) else v for k, v in row.items()}


def _values(column: "pd.Series[Any]", digits: int = 4) -> list[float | None]:
    return [None if pd.isna(v) else float(f"{v:.{digits}g}") for v in column]


def _dimensions(features: pd.DataFrame, steps: list[int], width: int) -> list[float | None]:
    """Total dimensionality over the width, as the metric ``feature_dimensionality``."""
    total = features.groupby("step")["dimensionality"].sum(min_count=1) / width
    return _values(total.reindex(steps))


def _features(features: pd.DataFrame, contexts: pd.DataFrame, shown: list[int]) -> list[dict[str, Any]]:
    by_feature = dict(iter(features[features["feature"].isin(shown)].groupby("feature")))
    texts = contexts[contexts["feature"].isin(shown) & (contexts["rank"] < _CONTEXTS)]
    windows = dict(iter(texts.sort_values("rank").groupby("feature")))
    found = []
    for i in shown:
        mine = by_feature[i]
        whole = _row(mine.iloc[0].to_dict())
        these = windows.get(i)
        label = {} if these is None else _row(these.iloc[0][list(_LABELLED)].to_dict())
        found.append(
            {
                "id": i,
                **{k: whole[k] for k in ("class", "birth", "death", "peak", "turning_step")},
                **{k: None if whole[k] is None else round(whole[k], 4) for k in ("density", "stability")},
                "strength": _values(mine["strength_share"], 3),
                "beta": _values(mine["beta"], 3),
                "cosine": _values(mine["final_cosine"], 3),
                "label": label,
                "contexts": []
                if these is None
                else [
                    [c["before"], c["token"], c["after"], float(f"{c['value']:.3g}")]
                    for c in these.to_dict("records")
                ],
            }
        )
    return found


def payload_text(found: list[CrosscoderPart]) -> str:
    """JSON of all runs that cannot end the script element it stands in."""
    plain = json.dumps([part.payload for part in found], separators=(",", ":"), allow_nan=False)
    return plain.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
