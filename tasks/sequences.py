"""Values of single sequences out of the table ``sequence_values``, for a bootstrap over sequences."""

from typing import Any

import numpy as np
import pandas as pd

from analyzers.sequence_bootstrap import RATIOS_OF_MEANS, SequenceSample
from storage.store import Store

_COLUMNS = ["run", "step", "key", "metric", "site", "layer", "head", "sequences", "values"]
# Run, step, key, metric, site, layer, head.
_Cell = tuple[str, int, str, str, str | None, int | None, int | None]


class SequenceValues:
    """The values of a series, by checkpoint, key of the result, metric and place."""

    def __init__(self, store: Store, series: str) -> None:
        self._found: dict[_Cell, tuple[list[int], list[float | None]]] = {}
        for row in store.table("sequence_values", series).to_arrow().select(_COLUMNS).to_pylist():
            cell = tuple(row[name] for name in _COLUMNS[:7])
            self._found[cell] = (row["sequences"], row["values"])

    def of(self, rows: pd.DataFrame) -> SequenceSample | None:
        """The sample behind a trajectory: rows of ``metrics`` at one place of one run, in order of step.

        None where a checkpoint with a value has no values of its sequences under the same key, or not of the
        same sequences as the others. Checkpoints without a value are NaN.
        """
        first = rows.iloc[0]
        names = RATIOS_OF_MEANS.get(str(first["metric"]), (str(first["metric"]),))
        parts = [self._matrix(rows, name) for name in names]
        if any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        return SequenceSample(known[0], known[1] if len(known) > 1 else None)

    def _matrix(self, rows: pd.DataFrame, metric: str) -> Any:
        lines: list[list[float | None] | None] = []
        same: list[int] | None = None
        for row in rows[["run", "step", "key", "site", "layer", "head", "value"]].itertuples(index=False):
            run, step, key, site, layer, head, value = row
            if pd.isna(value):
                lines.append(None)
                continue
            place = (_text(site), _whole(layer), _whole(head))
            found = self._found.get((str(run), int(step), str(key), metric, *place))
            if found is None or (same is not None and found[0] != same):
                return None
            same = found[0]
            lines.append(found[1])
        if same is None:
            return None
        empty = [None] * len(same)
        return np.array([empty if line is None else line for line in lines], dtype=np.float64)


def _text(value: Any) -> str | None:
    return None if pd.isna(value) else str(value)


def _whole(value: Any) -> int | None:
    return None if pd.isna(value) else int(value)
