"""Against a real Prefect server, and without one."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from flow_support import TINY, Cli, in_a_process

from flows.config import resolve
from storage import open_root

REPOSITORY = Path(__file__).parents[2]

SERVE = """
from flows.config import resolve
from flows.measure import measure_series
config = resolve({series!r}, {{"probe.length": 32, "probe.sequences": 24}}).model_dump(mode="json")
measure_series.serve(name="tiny", interval=5, parameters={{"config": config, "root": {root!r}}}, limit=1)
"""


def flow_runs(url: str, **filters: Any) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{url}/flow_runs/filter",
        data=json.dumps({"flow_runs": filters, "limit": 50}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        runs: list[dict[str, Any]] = json.load(answer)
    return runs


def test_scheduled_run_measures(
    prefect_server: str, environment: dict[str, str], tiny_series: Path, tmp_path: Path
) -> None:
    """The pinned versions schedule: with others the server looks healthy and never schedules anything."""
    script = SERVE.format(series=f"dir:{tiny_series}", root=str(tmp_path / "root"))
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment,
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 240
            done: list[dict[str, Any]] = []
            while not done:
                assert time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
                assert server.poll() is None, (tmp_path / "serve.log").read_text()
                time.sleep(1)
                ended = {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}
                # Of deployments only: the server has more runs of other tests than it hands out at once.
                runs = flow_runs(prefect_server, state=ended, deployment_id={"is_null_": False})
                done = [run for run in runs if run["auto_scheduled"]]
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)
    assert done[0]["state"]["type"] == "COMPLETED", (tmp_path / "serve.log").read_text()
    loss = open_root(tmp_path / "root").table("metrics").wide(["loss"])
    assert len(loss) == 12


def test_task_runs_are_one_per_checkpoint(
    prefect_server: str, environment: dict[str, str], tiny_series: Path, tmp_path: Path
) -> None:
    own = ("--set", "name=counted", "--steps", "0..2")
    arguments = ("measure", f"dir:{tiny_series}", "--root", str(tmp_path), *own, *TINY)
    done = in_a_process(environment, *arguments)
    assert done.returncode == 0, done.stderr
    (run,) = flow_runs(prefect_server, name={"any_": ["measure counted"]})
    request = urllib.request.Request(
        f"{prefect_server}/task_runs/filter",
        data=json.dumps(
            {"flow_runs": {"id": {"any_": [run["id"]]}}, "sort": "EXPECTED_START_TIME_DESC"}
        ).encode(),
        headers={"Content-Type": "application/json"},
    )
    expected = {f"{run}/step{step}" for run in ("seed0", "seed1") for step in (0, 1, 2)}
    deadline = time.monotonic() + 30
    names: set[str] = set()
    while names != expected and time.monotonic() < deadline:  # task runs arrive as events, a little later
        time.sleep(0.5)
        with urllib.request.urlopen(request, timeout=10) as answer:
            names = {task["name"] for task in json.load(answer)}
    assert names == expected


@pytest.mark.long
def test_study_without_a_server(tiny_series: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """No API is configured: Prefect runs its own for the time of the call."""
    small = ("--set", "states.fit.k_max=2", "--set", "states.trajectories=['loss', 'l2']")
    root = str(tmp_path / "root")
    alone = environment | {"PREFECT_API_URL": "", "PREFECT_HOME": str(tmp_path / "home")}

    def call() -> str:
        done = in_a_process(alone, "study", f"dir:{tiny_series}", "--root", root, *TINY, *small)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call()
    page = tmp_path / "root" / "reports" / "tiny.html"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    written = page.stat().st_mtime_ns
    assert "Nothing was computed anew." in call()
    assert page.stat().st_mtime_ns == written


def test_a_root_with_a_login_is_refused_before_a_run_is_made(
    prefect_server: str, cli: Cli, tiny_series: Path
) -> None:
    own = ("--set", "name=login")
    done = cli("measure", f"dir:{tiny_series}", "--root", "s3://somebody:pa55word@host/bucket", *own, *TINY)
    assert done.returncode == 2
    assert "holds a login" in done.stderr
    assert flow_runs(prefect_server, name={"any_": ["measure login"]}) == []


def test_configuration_crosses_the_api_as_json(tiny_series: Path) -> None:
    config = resolve(f"dir:{tiny_series}")
    assert type(config).model_validate(json.loads(config.model_dump_json())) == config
