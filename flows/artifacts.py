"""What a run shows on Prefect's page besides its logs: progress, tables, links.

They are decoration: outside of a run nothing is made, and a server that does not answer costs the page a
picture and not the run its results.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import FlowRunContext
from prefect.logging import get_logger

from storage.audit import Finding
from storage.store import Store
from storage.tables import TABLES

ROWS = 500
"""Rows of a table that are shown; the tables in the store have all."""
SECONDS = 2.0
"""Between two steps of a bar: each is a request to the server."""


def key(kind: str, name: str) -> str:
    """Key of an artifact: Prefect allows small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{kind}-{name}".lower()).strip("-")


@contextmanager
def _decoration() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the server or the network does, the results are what counts
        get_logger("ontogeny").warning("An artifact was not made: %s", error)


def _shown() -> bool:
    return FlowRunContext.get() is not None


def show_table(kind: str, series: str, rows: Sequence[Mapping[str, Any]], about: str) -> None:
    """A table of at most ``ROWS`` rows; what is left out is said."""
    if not _shown():
        return
    if len(rows) > ROWS:
        about = f"{about} The first {ROWS} of {len(rows)} rows."
    with _decoration():
        create_table_artifact(
            key=key(kind, series), table=[dict(row) for row in rows[:ROWS]], description=about
        )


def show_findings(series: str, findings: Sequence[Finding]) -> None:
    """What the audit found, errors first."""
    ranks = {"error": 0, "warning": 1, "note": 2}
    rows = [
        {"severity": f.severity, "run": f.run, "step": f.step, "kind": f.kind, "detail": f.detail}
        for f in sorted(findings, key=lambda f: ranks[f.severity])
    ]
    about = "docs/audit.md says what the kinds mean." if rows else "The audit found nothing."
    show_table("findings", series, rows, f"Audit of {series}. {about}")


def show_link(kind: str, series: str, url: str, text: str) -> None:
    """A link, or the path where the root is a folder: a page may not open files of the machine."""
    if not _shown():
        return
    with _decoration():
        link = url if "://" in url else f"file://{url}"
        create_link_artifact(key=key(kind, series), link=link, link_text=text, description=f"`{url}`")


def show_text(kind: str, series: str, markdown: str) -> None:
    """A text."""
    if not _shown():
        return
    with _decoration():
        create_markdown_artifact(key=key(kind, series), markdown=markdown)


def show_tables(store: Store, series: str) -> None:
    """Which tables of the series the store has, and in how many files."""
    if not _shown():
        return
    counted = [(name, len(store.files(name, series))) for name in TABLES]
    rows = [
        {"table": name, "files": files, "folder": f"{store.root}/tables/{name}/{series}"}
        for name, files in counted
        if files
    ]
    show_table("tables", series, rows, f"Tables of {series}; docs/schema.md says what is in them.")


def progress(kind: str, series: str, total: int) -> Callable[[int], None]:
    """A bar from 0 to ``total``; the function returned moves it."""
    made: UUID | None = None
    if _shown() and total:
        with _decoration():
            made = create_progress_artifact(  # type: ignore[assignment]
                progress=0.0, key=key(kind, series), description=f"{kind} {series}: {total} checkpoints"
            )

    told = time.monotonic()

    def move(done: int) -> None:
        nonlocal told
        if made is None or (done < total and time.monotonic() < told + SECONDS):
            return
        told = time.monotonic()
        with _decoration():
            update_progress_artifact(made, progress=100.0 * done / total)

    return move
