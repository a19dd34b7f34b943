"""What fits of single trajectories share: job, what they rest on, and the way to table ``curves``."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict

from storage.keys import digest
from storage.store import Store
from tasks.trajectories import PLACE

# By run; None is the row of all runs.
Rows = Mapping[str | None, Sequence[dict[str, Any]]]


class TrajectoriesJob(BaseModel):
    """Which trajectories of a series are meant; small and serialisable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str
    series: str
    trajectories: tuple[str, ...]
    absent: Literal["refuse", "skip"] = "refuse"


def identity_of(settings: Mapping[str, Any], chosen: pd.DataFrame, more: Sequence[str] = ()) -> str:
    """Digest of the settings and of the rows that a fit rests on; ``more`` are columns that it reads too."""
    columns = ["run", "step", *more, *PLACE, "value", "key", "protocol"]
    data = chosen[columns].astype(object).where(chosen[columns].notna(), None)
    return digest({"settings": dict(settings), "data": [[*row] for row in data.to_numpy()]})


def is_stored(store: Store, series: str, form: str, identity: str) -> bool:
    """Whether the fit is the newest of its form and complete."""
    rows = store.table("curves", series).to_pylist()
    return any(r["curve"] == identity and r["form"] == form and r["run"] is None for r in rows)


def describe_settings(settings: Mapping[str, Any], rows: pd.DataFrame) -> tuple[str, list[str]]:
    """JSON of the settings with the protocols of the rows, and a note where there are several."""
    protocols = sorted({p for p in rows["protocol"] if isinstance(p, str)})
    about = json.dumps({**settings, "protocols": [json.loads(p) for p in protocols]}, sort_keys=True)
    return about, ["runs were measured under different protocols"] if len(protocols) > 1 else []


def write_rows(store: Store, series: str, identity: str, found: Rows) -> None:
    """Write a fit's rows. The file of all runs comes last: it says that the fit is complete."""
    for run in sorted(name for name in found if name is not None):
        store.write("curves", found[run], series=series, run=run, name=identity)
    store.write("curves", found[None], series=series, name=identity)
