"""A run that is going on is watched: what is new is measured and decoded, what is odd reaches a webhook."""

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flow_support import Cli, in_a_process
from prefect.settings import PREFECT_API_URL, temporary_settings
from safetensors.torch import load_file, save_file

from flows.config import resolve
from flows.serving import bootstrap
from flows.watch import alerts, watched
from storage import Store, open_root
from storage.errors import UsageError
from tasks.provenance import invocation

SMALL = (
    "probe.length=32",
    "probe.sequences=24",
    "measure.batch=8",
    "states.fit.k_max=2",
    "states.fit.restarts=4",
    "states.fit.surrogates=0",
    'states.trajectories=["loss", "l2"]',
)
SETTINGS = tuple(word for each in SMALL for word in ("--set", each))
OF_STATES = tuple(word for each in SMALL if each.startswith("states.") for word in ("--set", each))


def put(store: Store, rows: list[tuple[str, int, int, list[str], bool]], at: datetime) -> None:
    """Rows of online_states: run, step, state, flags, fitted."""
    for run in {row[0] for row in rows}:
        made = [
            {
                "model": "m",
                "model_series": "s",
                "step": step,
                "fitted": fitted,
                "state": state,
                "posterior": 1.0,
                "surprise": 1.5,
                "misfit": 1.0,
                "percentile": 100.0,
                "compared": 30,
                "flags": flags,
                "parts": [{"metric": "loss", "z": 4.0, "value": 9.0, "mean": 5.0}],
                "missing": [],
                "log_posterior": [0.0],
                "inputs": "x",
                "recorded_at": at,
            }
            for name, step, state, flags, fitted in rows
            if name == run
        ]
        store.write("online_states", made, series="s", run=run, name=f"m-{at:%H%M%S}")


def test_alerts_are_flags_and_first_visits_of_states(tmp_path: Path) -> None:
    store, then = Store(tmp_path), datetime(2026, 1, 1, tzinfo=UTC)
    put(
        store,
        [
            ("a", 0, 0, [], False),  # a run's first state is no new one
            ("a", 1, 0, ["unexpected"], False),
            ("a", 2, 1, ["new"], False),  # both at once
            ("a", 3, 0, [], False),  # was there before
            ("b", 0, 0, ["new"], True),  # the model knows it: no alert
            ("b", 1, 1, [], True),
        ],
        then,
    )
    first = [(a.kind, a.run, a.step) for a in alerts(store, "s", "m", None)]
    assert first == [("anomaly", "a", 1), ("anomaly", "a", 2), ("new-phase", "a", 2)]
    later = then + timedelta(hours=1)
    put(store, [("b", 2, 1, [], False), ("b", 3, 2, [], False)], later)
    # Only what was decoded since; the states before it still count.
    found = alerts(store, "s", "m", later - timedelta(minutes=1))
    assert [(a.kind, a.run, a.step, a.state) for a in found] == [("new-phase", "b", 3, 2)]
    assert found[0].sentence == "s/b, step 3: the run is in state 2 for the first time"
    assert alerts(store, "s", "other model", None) == []


def test_a_series_is_watched_as_it_was_measured_last(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(UsageError, match="no series measured yet"):
        watched(store, None)
    for steps in ("0..2", "0..8"):
        config = resolve("specimen", {"measure.steps": steps})
        with invocation(store, "specimen", "measure", config.model_dump(mode="json")):
            pass
    with invocation(store, "imported", "states", {}):
        pass
    assert watched(store, None) == [config] == watched(store, "specimen")
    with pytest.raises(UsageError, match="'imported' not measured yet"):
        watched(store, "imported")


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[Any]]]:
    """URL of a loopback server, and what was posted to it."""
    posted: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", posted
    server.shutdown()
    server.server_close()


def test_a_new_checkpoint_that_is_odd_reaches_the_webhook(
    prefect_server: str,
    cli: Cli,
    environment: dict[str, str],
    series: Path,
    tmp_path: Path,
    receiver: tuple[str, list[Any]],
) -> None:
    url, posted = receiver
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        bootstrap(webhook=url)
    root = tmp_path / "root"
    # The newest checkpoint of a run is not there yet when the model is fitted.
    held = tmp_path / "step8"
    (series / "seed1" / "step8").rename(held)
    measured = ("--analyzer", "loss", "--analyzer", "weights", *SETTINGS)
    done = cli("measure", f"dir:{series}", "--root", str(root), *measured)
    assert done.returncode == 0, done.stderr
    early = cli("watch", "tiny", "--once", "--root", str(root))
    assert early.returncode == 0, early.stderr
    assert "Nothing is decoded: no states of series 'tiny'" in early.stdout
    # Twenty more frames of the same kind: with fewer, surprise is not judged.
    store = open_root(root)
    kept = ("step", "metric", "site", "layer", "head", "n", "analyzer", "protocol")
    known = [r for r in store.table("metrics", "tiny", "seed0").to_pylist() if r["metric"] in ("loss", "l2")]
    for run in range(2, 8):
        rng = np.random.default_rng(run)
        rows = [
            {**{name: row[name] for name in kept}, "value": row["value"] * (1 + 1e-3 * rng.normal())}
            for row in known
        ]
        store.write("metrics", rows, series="tiny", run=f"seed{run}", name="planted")
    fitted = cli("states", "tiny", "--root", str(root), *OF_STATES)
    assert fitted.returncode == 0, fitted.stderr
    quiet = cli("watch", "tiny", "--once", "--root", str(root))
    assert quiet.returncode == 0, quiet.stderr
    assert "0 checkpoints measured" in quiet.stdout
    assert "anomaly" not in quiet.stdout
    # Then it comes, and it is another model's: ten times the weights.

    weights = held / "model.safetensors"
    save_file({k: 10 * v for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    held.rename(series / "seed1" / "step8")
    found = in_a_process(environment, "watch", "tiny", "--once", "--root", str(root))
    assert found.returncode == 0, found.stderr
    assert "1 checkpoints measured" in found.stdout
    assert "anomaly: tiny/seed1, step 8: new" in found.stdout
    deadline = time.monotonic() + 60
    while not any(each["event"] == "ontogeny.anomaly" for each in posted):
        assert time.monotonic() < deadline, posted
        time.sleep(0.2)
    (told,) = [each for each in posted if each["event"] == "ontogeny.anomaly"]
    assert told["text"].startswith("tiny/seed1, step 8: new")
    assert (told["alert"]["run"], told["alert"]["step"]) == ("seed1", 8)
    # Nothing new, nothing told again.
    again = cli("watch", "tiny", "--once", "--root", str(root))
    assert "0 decoded" in again.stdout
    assert "anomaly" not in again.stdout
