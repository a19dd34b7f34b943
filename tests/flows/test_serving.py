"""One machine as a person starts it: deploy/server.sh, and runs through the API."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from flow_support import free_port, measured_rows
from prefect.settings import PREFECT_API_URL, temporary_settings

from benchmarks.servers import postgresql, postgresql_programs
from flows.serving import bootstrap, read_deployments
from storage import open_root

# A server, a worker and six processes start: half a minute alone, many on a machine that does other things.
pytestmark = pytest.mark.timeout(1500)
REPOSITORY = Path(__file__).parents[2]
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
TINY = ["probe.length=32", "probe.sequences=24", "measure.batch=8"]
# A second or so per checkpoint: time to interrupt.
SLOW = ["probe.length=32", "probe.sequences=200", "measure.batch=4"]


@dataclass
class Machine:
    """A running ``deploy/server.sh``."""

    url: str
    root: Path
    home: Path
    process: subprocess.Popen[bytes]

    def call(self, path: str, body: Any = None, method: str = "POST") -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            method=method,
        )
        for pause in (1, 2, 4, 8):  # as Prefect's client: SQLite may be busy
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
                time.sleep(pause)
        raise AssertionError(self.logs())

    def start(self, deployment: str, form: dict[str, Any]) -> str:
        found = self.call(f"/deployments/name/{deployment}", method="GET")
        run = self.call(f"/deployments/{found['id']}/create_flow_run", {"parameters": {"form": form}})
        return str(run["id"])

    def state(self, run: str) -> str:
        return str(self.call(f"/flow_runs/{run}", method="GET")["state"]["type"])

    def ended(self, run: str, seconds: float = 180) -> str:
        deadline = time.monotonic() + seconds
        while (state := self.state(run)) not in ENDED:
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.3)
        return state

    def stored(self, root: Path) -> list[Path]:
        return list(root.glob("tables/metrics/**/loss-*.parquet"))

    def first_result(self, run: str, root: Path) -> None:
        deadline = time.monotonic() + 120
        while not self.stored(root):
            assert time.monotonic() < deadline, self.logs()
            assert self.state(run) not in ENDED, self.logs()
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join((self.home / f"{name}.log").read_text()[-4000:] for name in ("server", "worker"))

    def worker(self) -> psutil.Process:
        for process in psutil.Process(self.process.pid).children():
            if "worker" in process.cmdline():
                return process
        raise AssertionError(self.logs())


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with started(tmp_path_factory.mktemp("machine")) as made:
        yield made


@contextmanager
def started(home: Path, **more: str) -> Iterator[Machine]:
    port = free_port()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "ONTOGENY_"))}
    environment = kept | {
        "PYTHON_BIN": sys.executable,
        "PORT": str(port),
        "PREFECT_HOME": str(home),
        "ONTOGENY_ROOT": str(home / "root"),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }
    with (home / "said.log").open("wb") as said:
        process = subprocess.Popen(
            [REPOSITORY / "deploy" / "server.sh"], env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        made = Machine(f"http://127.0.0.1:{port}/api", home / "root", home, process)
        try:
            deadline = time.monotonic() + 600
            while b"Prefect's page" not in (home / "said.log").read_bytes():
                assert process.poll() is None, (home / "said.log").read_text()
                assert time.monotonic() < deadline, (home / "said.log").read_text()
                time.sleep(0.2)
            yield made
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    # Not killed after half a minute: it had time to tell the server what becomes of its runs.
    assert "stopped!" in (home / "worker.log").read_text()


def test_a_run_through_the_api_fills_the_tables(machine: Machine, tiny_series: Path) -> None:
    found = machine.call("/deployments/filter", {})
    assert {each["name"] for each in found} == {each["name"] for each in read_deployments()}
    active = {each["name"] for each in found if any(s["active"] for s in each["schedules"])}
    assert active == {"watch"}
    form = {"series": f"dir:{tiny_series}", "analyzers": ["loss", "weights"], "settings": TINY}
    run = machine.start("measure-series/measure", form)
    assert machine.ended(run) == "COMPLETED", machine.logs()
    metrics = open_root(machine.root).table("metrics")
    assert len(metrics.wide(["loss"])) == 12
    assert set(metrics.to_pandas()["analyzer"]) == {"loss", "weights", "training_log"}
    shown = {each["key"]: each for each in machine.call("/artifacts/filter", {})}
    assert shown["measure-tiny"]["data"] == 100
    assert json.loads(shown["findings-tiny"]["data"]) == []
    tables = {row["table"]: row["files"] for row in json.loads(shown["tables-tiny"]["data"])}
    assert tables["checkpoints"] == 12


def test_a_form_that_is_wrong_is_refused_before_anything_runs(machine: Machine) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        machine.start("measure-series/measure", {"series": "specimen", "analyzers": ["losss"]})
    assert refused.value.code in (409, 422)
    assert "losss" in refused.value.read().decode()


@pytest.mark.parametrize(
    "field",
    [
        {"root": "s3://somebody:pa55word@host/bucket"},
        {"settings": ["measure.batch=8", "probe.text=https://somebody:pa55word@host/text.jsonl"]},
    ],
)
def test_a_login_in_a_form_is_refused_and_not_stored(machine: Machine, field: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        machine.start("measure-series/measure", {"series": "specimen", **field})
    assert refused.value.code in (409, 422)
    assert not any(b"pa55word" in file.read_bytes() for file in machine.home.glob("prefect.db*"))


def test_cancelling_stops_in_mid_run_and_leaves_whole_files(
    machine: Machine, tiny_series: Path, tmp_path: Path
) -> None:
    form = {"series": f"dir:{tiny_series}", "root": str(tmp_path), "settings": SLOW}
    run = machine.start("measure-series/measure", form)
    machine.first_result(run, tmp_path)
    machine.call(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert machine.ended(run) == "CANCELLED"
    done = len(machine.stored(tmp_path))
    assert 1 <= done < 12
    store = open_root(tmp_path)
    for table in ("checkpoints", "metrics", "provenance"):
        assert len(store.table(table))  # every file that counts is whole
    # Spectra come after the loss that was waited for: there may be none yet, but none that cannot be read.
    store.table("spectra").to_pandas()
    assert len(store.table("metrics").wide(["loss"])) == done
    time.sleep(2)
    assert len(machine.stored(tmp_path)) == done


@pytest.mark.long
def test_a_killed_worker_is_replaced_and_its_run_found_and_recovered(
    machine: Machine, tiny_series: Path, tmp_path: Path
) -> None:
    with temporary_settings({PREFECT_API_URL: machine.url}):
        bootstrap(silence=45)  # more than the 30 s between two signs of life
    form = {"series": f"dir:{tiny_series}", "root": str(tmp_path), "settings": SLOW}
    run = machine.start("measure-series/measure", form)
    machine.first_result(run, tmp_path)
    worker = machine.worker()
    for process in (worker, *worker.children(recursive=True)):
        process.kill()
    done = len(machine.stored(tmp_path))
    assert done < 12
    assert machine.state(run) == "RUNNING"  # nobody was left to say what became of it
    assert machine.ended(run) == "CRASHED"
    with temporary_settings({PREFECT_API_URL: machine.url}):
        bootstrap()
    again = machine.start("measure-series/measure", form)
    assert machine.ended(again) == "COMPLETED", machine.logs()
    assert len(measured_rows(tmp_path, "metrics").query("metric == 'loss'")) == 12
    counts = json.loads(open_root(tmp_path).table("provenance").to_pylist()[-1]["counts"])
    # The one in hand may have had its loss stored and not yet the rest.
    assert counts["checkpoints_measured"] <= 12 - done + 1


PROGRAMS = postgresql_programs()


@pytest.mark.long
@pytest.mark.skipif(PROGRAMS is None, reason="PostgreSQL is not installed")
def test_a_machine_on_postgresql_measures_and_starts_again(tiny_series: Path, tmp_path: Path) -> None:
    assert PROGRAMS is not None
    form = {"series": f"dir:{tiny_series}", "analyzers": ["loss"], "settings": TINY}
    with postgresql(PROGRAMS) as database:
        for start in (1, 2):  # the second time on the tables of the first
            home = tmp_path / f"home{start}"
            home.mkdir()
            with started(home, DATABASE_URL=database.url, ONTOGENY_ROOT=str(tmp_path / "root")) as machine:
                run = machine.start("measure-series/measure", form)
                assert machine.ended(run) == "COMPLETED", machine.logs()
                assert not list(home.glob("prefect.db*"))
            # By name: the hourly watch may have come in between.
            mine = "state_type = 'COMPLETED' and name like 'measure dir:%'"
            assert database.ask(f"select count(*) from flow_run where {mine}") == str(start)
    assert len(measured_rows(tmp_path / "root", "metrics").query("metric == 'loss'")) == 12
