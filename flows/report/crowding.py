"""What a page leaves out of a series so large that it could not be mailed: layers of most metrics."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

# Values of a page, about 5 MB: one run of 154 checkpoints and 24 layers has a million.
MOST_VALUES = 1_800_000


def thinned(metrics: pd.DataFrame, curves: Sequence[dict[str, Any]], models: Sequence[dict[str, Any]]) -> Any:
    """Rows of ``metrics`` that a page shows, as a boolean mask: all where they are few enough.

    Else every metric keeps evenly spaced layers, first and last among them, as many as there is room for.
    Metrics that curves or states were fitted to keep all layers.
    """
    if len(metrics) <= MOST_VALUES:
        return np.ones(len(metrics), dtype=bool)
    named = {str(row["metric"]) for row in curves}
    named |= {str(name).partition("[")[0] for row in models for name in row["metrics"] or []}
    always = (metrics["layer"].isna() | metrics["metric"].isin(named)).to_numpy()
    layers = np.sort(metrics.loc[~always, "layer"].unique())
    room = (MOST_VALUES - always.sum()) / max((~always).sum(), 1)
    count = min(max(int(room * len(layers)), 2), len(layers))
    kept = layers[np.unique(np.linspace(0, len(layers) - 1, count).round().astype(int))]
    return always | metrics["layer"].isin(kept).to_numpy()
