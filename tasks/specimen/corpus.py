"""Text that every Python install carries: the standard library's sources and its documentation topics."""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from storage import OntogenyError
from storage.keys import digest

Domain = Literal["code", "documentation"]

# Test suites, bundled copies of other projects, generated tables, and what installers put beside the library.
SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
# Generated at build time: they hold this machine's paths and compiler flags, not prose or code.
SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-")

# Documentation is a twentieth of the text: the larger share keeps it visible in the probe.
HELD_OUT_SHARE: dict[Domain, float] = {"code": 0.05, "documentation": 0.25}

PASSAGE_CHARACTERS = 1000
# A line this long (characters) that stands in two documents is a quotation, not an idiom.
LONG_LINE = 40
LARGEST_OVERLAP = 0.25
PASSAGES: dict[Domain, int] = {"code": 384, "documentation": 128}


class Document(NamedTuple):
    """One file of the standard library, or one documentation topic."""

    name: str
    domain: Domain
    text: str


def _sources(root: Path) -> Iterable[Document]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts) or any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few modules declare another encoding
        if text.strip():
            yield Document("/".join(parts), "code", text)


def _topics() -> Iterable[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return  # some distributions package it apart; the sources alone still train a model
    for name in sorted(topics):
        yield Document(f"topic:{name}", "documentation", topics[name])


def read_documents() -> list[Document]:
    """All documents of this Python install, in an order that depends on their names only.

    Raises :class:`OntogenyError` where the install carries no source files (a zipped or stripped library).
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = [*_sources(root), *_topics()]
    if len(documents) < 100:
        raise OntogenyError(
            f"the specimen's text is missing: only {len(documents)} source files under {root}"
        )
    return documents


def held_out(document: Document) -> bool:
    """Whether a document is kept from training: a hash of its name decides, so that it never moves."""
    number = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big")
    return number < HELD_OUT_SHARE[document.domain] * 2**64


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, each in the given order."""
    train: list[Document] = []
    rest: list[Document] = []
    for document in documents:
        (rest if held_out(document) else train).append(document)
    return train, rest


def corpus_digest(documents: Iterable[Document]) -> str:
    """Digest of the names and texts, in order."""
    return digest([[d.name, hashlib.sha256(d.text.encode()).hexdigest()] for d in documents])


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= LONG_LINE}


def passages(rest: Iterable[Document], train: Iterable[Document]) -> list[dict[str, str]]:
    """Probe rows ``{"text", "domain"}``: passages of 1000 characters, cut from the held-out documents.

    Documentation topics quote one another and modules share boilerplate, so a passage is left out where
    more than a quarter of its long lines stand in a training document as well. Short passages let a probe
    of a few hundred sequences see many documents. At most 384 of code and 128 of documentation, picked
    and mixed by a hash of their place, so that any leading part holds both domains.
    """
    trained = set().union(*(_long_lines(document.text) for document in train))
    keyed: list[tuple[str, Domain, str]] = []
    for document in rest:
        for start in range(0, len(document.text) - PASSAGE_CHARACTERS + 1, PASSAGE_CHARACTERS):
            text = document.text[start : start + PASSAGE_CHARACTERS]
            lines = _long_lines(text)
            if len(lines & trained) <= LARGEST_OVERLAP * len(lines):
                place = hashlib.sha256(f"{document.name}:{start}".encode()).hexdigest()
                keyed.append((place, document.domain, text))
    keyed.sort()
    room = dict(PASSAGES)
    rows: list[dict[str, str]] = []
    for _, domain, text in keyed:
        if room[domain]:
            room[domain] -= 1
            rows.append({"text": text, "domain": domain})
    return rows
