"""Flow: measure what is new of a series, decode it, and say what is unlike anything before."""

import json
from datetime import datetime
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

from prefect import flow
from prefect.events import emit_event
from pydantic import BaseModel

from flows.artifacts import show_text
from flows.config import SeriesConfig, default_root, shipped, validated
from flows.decode import decode_of
from flows.measure import MeasureSummary, measure_series
from storage.errors import UsageError
from storage.store import Store
from tasks.provenance import invocation

Kind = Literal["anomaly", "new-phase"]
ANOMALY, NEW_PHASE = "ontogeny.anomaly", "ontogeny.new-phase"
"""Names of the events; deploy/automations/webhook.yaml reacts to both."""


class Alert(BaseModel):
    """A checkpoint that someone may want to look at, in one sentence and in numbers."""

    kind: Kind
    series: str
    run: str
    step: int
    state: int
    surprise: float
    percentile: float | None
    flags: list[str]
    metrics: list[str]
    sentence: str


class WatchSummary(BaseModel):
    """What one look at a series found."""

    series: str
    measure: MeasureSummary
    decoded: int = 0
    alerts: list[Alert] = []
    notes: list[str] = []


def as_measured(store: Store, series: str) -> SeriesConfig | None:
    """The configuration with which a series of the store was measured last; None if it never was.

    Raises:
        UsageError: this version cannot read that configuration.
    """
    rows = [row for row in store.table("provenance", series).to_pylist() if row["command"] == "measure"]
    if not rows:
        return None
    newest = max(rows, key=lambda row: (row["started"], row["invocation"]))
    return validated(SeriesConfig, json.loads(newest["config"]), f"the last measuring of {series}")


def watched(store: Store, series: str | None) -> list[SeriesConfig]:
    """The configurations to look at: of one series of the store, or of all that were measured.

    Raises:
        UsageError: the store has no such series, or none that was measured.
    """
    names = store.series() if series is None else [series]
    found = [config for name in names if (config := as_measured(store, name)) is not None]
    if not found:
        which = "no series" if series is None else f"series {series!r} not"
        known = f"; shipped series: {', '.join(shipped())}" if series is not None else ""
        raise UsageError(f"{store.root!r} has {which} measured yet: measure it first{known}")
    return found


@flow(name="watch", flow_run_name="watch {config.name}")
def watch_series(
    config: SeriesConfig, root: str = default_root(), of: str | None = None, model: str | None = None
) -> WatchSummary:
    """List the series, measure what is new, decode it, and emit an event for every alert.

    An alert is a checkpoint with a flag of docs/decode.md (event ``ontogeny.anomaly``), or the first one of
    its run in a state (``ontogeny.new-phase``; a run's first checkpoint is none). Checkpoints that the model
    was fitted to are no alerts. Those decoded since the last complete watch ended are told, so that one that
    was killed between decoding and telling loses none; an event told twice has the same id, and the server
    keeps one.

    Args:
        config: the series, as it is measured
        root: folder or URL of the store
        of: series of the store whose state model decodes; absent: the series' own
        model: first digits of the model's identity; absent: the newest
    """
    store = Store(root)
    since = _last_complete(store, config.name)
    with invocation(store, config.name, "watch", config.model_dump(mode="json")) as counts:
        summary = WatchSummary(series=config.name, measure=measure_series(config, root))
        counts["keys_computed"] = summary.measure.keys_computed
        teacher = of or config.name
        if not store.names("state_models", teacher):
            summary.notes.append(
                f"nothing is decoded: no states of series {teacher!r} are fitted (ontogeny states {teacher})"
            )
        else:
            decoded: dict[str, Any] = decode_of(config.name, root, model=model, of=of)
            summary.decoded = decoded["decoded"]
            summary.notes += decoded["notes"]
            summary.alerts = alerts(store, config.name, decoded["model"], since)
        for alert in summary.alerts:
            _emit(alert)
        show_text("watch", config.name, describe(summary))
        counts.update(decoded=summary.decoded, alerts=len(summary.alerts), complete=1)
    return summary


def _last_complete(store: Store, series: str) -> datetime | None:
    rows = store.table("provenance", series).to_pylist()
    watches = [r for r in rows if r["command"] == "watch" and json.loads(r["counts"]).get("complete")]
    return max((row["finished"] for row in watches), default=None)


def alerts(store: Store, series: str, model: str, since: datetime | None) -> list[Alert]:
    """Alerts among the checkpoints that ``model`` decoded since then, in order of run and step."""
    rows = [row for row in store.table("online_states", series).to_pylist() if row["model"] == model]
    rows.sort(key=lambda row: (row["run"], row["step"]))
    seen: dict[str, set[int]] = {}
    found = []
    for row in rows:
        before = seen.setdefault(row["run"], set())
        fresh = not row["fitted"] and (since is None or row["recorded_at"] >= since)
        if fresh and row["flags"]:
            found.append(_alert("anomaly", series, row))
        if fresh and before and row["state"] not in before:
            found.append(_alert("new-phase", series, row))
        before.add(row["state"])
    return found


def _alert(kind: Kind, series: str, row: dict[str, Any]) -> Alert:
    metrics = [part["metric"] for part in row["parts"]]
    where = f"{series}/{row['run']}, step {row['step']:,}"
    if kind == "anomaly":
        above = (
            "" if row["percentile"] is None else f", above {row['percentile']:.1f} % of the training frames"
        )
        sentence = (
            f"{where}: {' and '.join(row['flags'])}; surprise {row['surprise']:.2f} nats{above}; "
            f"farthest metrics: {', '.join(metrics)}"
        )
    else:
        sentence = f"{where}: the run is in state {row['state']} for the first time"
    return Alert(
        kind=kind,
        series=series,
        run=row["run"],
        step=row["step"],
        state=row["state"],
        surprise=row["surprise"],
        percentile=row["percentile"],
        flags=row["flags"],
        metrics=metrics,
        sentence=sentence,
    )


def _emit(alert: Alert) -> None:
    told = alert.model_dump(mode="json")
    emit_event(
        event=ANOMALY if alert.kind == "anomaly" else NEW_PHASE,
        resource={
            "prefect.resource.id": f"ontogeny.run.{alert.series}.{alert.run}",
            "prefect.resource.name": f"{alert.series}/{alert.run}",
            "ontogeny.series": alert.series,
            "ontogeny.run": alert.run,
        },
        payload=told,
        id=uuid5(NAMESPACE_URL, f"ontogeny:{json.dumps(told, sort_keys=True)}"),
    )


def describe(summary: WatchSummary) -> str:
    """The summary as Markdown: alerts first."""
    lines = [f"# {summary.series}", ""]
    lines += [f"- **{alert.kind}** {alert.sentence}" for alert in summary.alerts]
    if not summary.alerts:
        lines.append("No anomaly and no new phase.")
    measured = summary.measure
    lines += [
        "",
        f"{measured.measured} checkpoints measured, {measured.already_there} were there, "
        f"{len(measured.failed)} failed; {summary.decoded} decoded.",
        *(f"- {note}" for note in summary.notes),
    ]
    return "\n".join(lines)
