"""Prefect servers and PostgreSQL clusters of a benchmark's or a test's own."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefect.events.worker import EventsWorker


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def server(home: Path, database: str | None = None, seconds: float = 180) -> Iterator[str]:
    """URL of a Prefect server of its own, on SQLite in ``home`` or on the ``database`` of that URL.

    Its settings are those of ``deploy/server.sh``.
    """
    port = free_port()
    home.mkdir(parents=True)
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    if database is not None:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    else:
        environment.setdefault("PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED", "false")
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/api"
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + seconds
            while not _answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((home / "server.log").read_text())
                time.sleep(0.5)
            yield url
        finally:
            # This process's events, while there is a server to take them: later ones would wait behind them.
            EventsWorker.drain_all(timeout=20)
            process.terminate()
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def postgresql_programs() -> Path | None:
    """Folder of PostgreSQL's programs: where Debian has them, or on the PATH; None: it is not installed."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    found = debian[-1] if debian else shutil.which("initdb")
    return None if found is None else Path(found).parent


@dataclass(frozen=True)
class Database:
    """An empty database: its URL for Prefect, and the command of psql that asks it."""

    url: str
    psql: tuple[str, ...]

    def ask(self, statement: str) -> str:
        """What a statement gives, as text."""
        command = [*self.psql, "-At", "-c", statement]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@contextmanager
def postgresql(programs: Path) -> Iterator[Database]:
    """A database of a PostgreSQL cluster of its own.

    PostgreSQL refuses to run as root: for root it runs as the system's user ``postgres``.
    """
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []

    def call(program: str, *arguments: str) -> str:
        command = [*as_user, *(["mktemp"] if program == "mktemp" else [str(programs / program)]), *arguments]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    folder, port = call("mktemp", "-d"), free_port()
    data, log = f"{folder}/data", f"{folder}/log"
    try:
        call("initdb", "-D", data, "-U", "prefect", "-A", "trust", "-E", "UTF8", "--locale=C")
        # pg_ctl's own pipes would stay open in the server: its output goes to the log.
        call("pg_ctl", "-D", data, "-l", log, "-w", "-o", f"-h 127.0.0.1 -p {port} -k {folder}", "start")
        try:
            call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect")
            yield Database(
                f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect",
                (str(programs / "psql"), f"postgresql://prefect@127.0.0.1:{port}/prefect"),
            )
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
