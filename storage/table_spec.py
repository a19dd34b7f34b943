"""What a table is, and the columns and types that tables share."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

I32, I64, F64, STR = pa.int32(), pa.int64(), pa.float64(), pa.string()
AT = pa.timestamp("us", tz="UTC")
STEP = ("step", I64, "optimizer steps taken when the checkpoint was saved")
TOKENS = ("tokens", I64, "training tokens seen; null where unknown")
RECORDED = ("recorded_at", AT, "when the row was written (UTC)")


@dataclass(frozen=True)
class TableSpec:
    """One table: its schema and how a reader finds the newest of several rows about the same thing.

    ``newest_by`` says what a later row replaces: rows that agree on these columns are versions of one
    another. ``newest_of`` names a column whose latest value alone is shown (per ``newest_within``), so that
    a trajectory never mixes two protocols. Both empty: all rows count. ``history=True`` turns both off.
    """

    name: str
    what: str
    schema: pa.Schema
    newest_by: tuple[str, ...] = ()
    newest_of: str | None = None
    newest_within: tuple[str, ...] = ("series",)
    per: Literal["run", "series"] = "run"


def schema(*fields: tuple[str, pa.DataType, str]) -> pa.Schema:
    """Columns (name, type, meaning), series and run before them."""
    head = [
        ("series", STR, "name of the series"),
        ("run", STR, "name of the run; null in tables about a whole series"),
    ]
    return pa.schema([pa.field(name, kind, metadata={"doc": doc}) for name, kind, doc in [*head, *fields]])
