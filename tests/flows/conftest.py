"""A real Prefect server, a real tiny series, and the command line as a person calls it."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
from flow_support import Cli, free_port
from prefect.context import refresh_global_settings_context
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

from flows.cli import main
from tasks.specimen.config import SpecimenConfig
from tasks.specimen.data import prepare
from tasks.specimen.train import train_run


@pytest.fixture(scope="module", autouse=True)
def shapes_are_checked_elsewhere() -> Iterator[None]:
    """No checks of shapes within commands: analyzers have them in their own tests, here they take a third."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the API of a server of its own, with an empty database."""
    home = tmp_path_factory.mktemp("prefect")
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(240):
                assert server.poll() is None, (home / "server.log").read_text()
                try:
                    with urllib.request.urlopen(f"{url}/health", timeout=2):
                        break
                except OSError:
                    time.sleep(0.5)
            else:
                pytest.fail((home / "server.log").read_text())
            yield url
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture(scope="session")
def environment(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a subprocess that talks to that server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "ONTOGENY_"))}
    return kept | {
        "PREFECT_API_URL": prefect_server,
        "PREFECT_HOME": str(tmp_path_factory.mktemp("home")),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def connected(prefect_server: str) -> Iterator[None]:
    """All threads of this process and the processes that it starts talk to that server.

    Settings of Prefect's own context would reach this thread alone: others would start servers of their own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", prefect_server)
        refresh_global_settings_context()
        yield
        # While there is a server to take them: at exit, each of them would wait for one in vain.
        EventsWorker.drain_all(timeout=20)
        APILogWorker.drain_all(timeout=20)
    refresh_global_settings_context()


@pytest.fixture(scope="session")
def cli(connected: None) -> Cli:
    """Call ``ontogeny`` as its console script does, but in this process: starting one takes long."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        code: object = 0
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr("sys.argv", ["ontogeny", *arguments])
            try:
                main()
            except SystemExit as stopped:
                code = stopped.code or 0
        assert isinstance(code, int)
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def tiny_series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two trained runs with checkpoints at 0, 1, 2, 4, 6, 8; read only."""
    folder = tmp_path_factory.mktemp("series") / "tiny"
    config = SpecimenConfig(
        out=folder,
        seeds=2,
        steps=8,
        log_until=4,
        every=2,
        width=32,
        layers=2,
        heads=2,
        vocabulary=300,
        length=32,
        batch=2,
        warmup=2,
    )
    prepare(config)
    for seed in range(config.seeds):
        train_run(config, seed)  # in this process: training takes a second, a process to train in many
    return folder


@pytest.fixture
def series(tiny_series: Path, tmp_path: Path) -> Path:
    """A copy of the tiny series that a test may damage."""
    return Path(shutil.copytree(tiny_series, tmp_path / "tiny"))
