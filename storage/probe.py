"""The probe: the fixed token sequences that every checkpoint of a series is measured on."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from typing import Annotated, Any, Literal, Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64
from pydantic import BaseModel, ConfigDict, Field

from storage.errors import UsageError


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the probe needs."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        """Token ids of a text; not ``verbose``: silent about texts longer than the model's context."""
        ...


class ProbeConfig(BaseModel):
    """Which text, how it is cut, and how much of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Annotated[
        str,
        Field(description="'embedded', or a .txt, .jsonl or .parquet file (path or URL); {root} is ROOT"),
    ] = "embedded"
    field: Annotated[str, Field(description="field or column that holds the text")] = "text"
    sequences: Annotated[
        int | None, Field(description="number of sequences; absent: all that the text yields", gt=0)
    ] = None
    length: Annotated[int, Field(description="tokens per sequence", ge=8, le=1 << 20)] = 128
    tokenizer: Annotated[
        str | None, Field(description="folder of a tokenizer; absent: each checkpoint's own")
    ] = None
    bos: Annotated[
        Literal["none", "first"],
        Field(description="'first' puts the tokenizer's BOS before every sequence; 'none' adds nothing"),
    ] = "none"


@dataclass(frozen=True)
class Document:
    """One text of the probe, with the domain it is labelled with."""

    text: str
    domain: str | None = None


@dataclass(frozen=True)
class Probe:
    """Token sequences of equal length without padding, their domains, and the digest of both."""

    tokens: Int64[np.ndarray, "sequences length"]
    domains: tuple[str | None, ...]
    digest: str
    bos: str

    def describe(self) -> dict[str, Any]:
        """What a protocol says of the probe: digest, sequences, length, BOS policy."""
        sequences, length = self.tokens.shape
        return {"digest": self.digest, "sequences": sequences, "length": length, "bos": self.bos}


def build_probe(config: ProbeConfig, tokenizer: Tokenizer, root: str = "") -> Probe:
    """Cut the text into windows of ``length`` tokens.

    Documents of one domain that follow one another are joined by a blank line (each is tokenised with the
    blank line before it, without special tokens) and cut into consecutive windows; a rest shorter than a
    window is left out. (Sun et al. 2024, arXiv 2402.17762, cut their text this way.) Reading stops once
    there are enough windows.

    Raises:
        UsageError: the text cannot be read, yields fewer windows than asked for, or the BOS policy needs a
            token that the tokenizer lacks.
    """
    head: list[int] = []
    if config.bos == "first":
        if tokenizer.bos_token_id is None:
            raise UsageError("probe.bos is 'first', but the tokenizer has no BOS token")
        head = [tokenizer.bos_token_id]
    body = config.length - len(head)
    windows: list[list[int]] = []
    domains: list[str | None] = []
    wanted = config.sequences
    for domain, members in groupby(read_documents(config, root), key=lambda d: d.domain):
        for window in _windows(members, tokenizer, body):
            windows.append(head + window)
            domains.append(domain)
            if len(windows) == wanted:
                break
        if len(windows) == wanted:
            break
    if not windows or (wanted is not None and len(windows) < wanted):
        raise UsageError(
            f"probe text {config.text!r} yields {len(windows)} sequences of {config.length} tokens, "
            f"fewer than the {wanted or 1} asked for"
        )
    tokens = np.asarray(windows, dtype=np.int64)
    labels = tuple(domains)
    fingerprint = hashlib.sha256(repr(tokens.shape).encode() + tokens.astype("<i8").tobytes())
    fingerprint.update(json.dumps(labels).encode())
    return Probe(tokens, labels, fingerprint.hexdigest()[:32], config.bos)


def _windows(documents: Iterable[Document], tokenizer: Tokenizer, size: int) -> Iterator[list[int]]:
    """Consecutive windows over documents joined by a blank line, tokenised document by document."""
    pending: list[int] = []
    for index, document in enumerate(documents):
        text = document.text if index == 0 else f"\n\n{document.text}"
        pending += tokenizer.encode(text, add_special_tokens=False, verbose=False)
        whole = len(pending) // size * size
        for start in range(0, whole, size):
            yield pending[start : start + size]
        pending = pending[whole:]


def read_documents(config: ProbeConfig, root: str = "") -> Iterator[Document]:
    """Documents of the probe's text, in the order of the file.

    Raises:
        UsageError: the file is missing, of an unknown kind, or lacks the field.
    """
    if config.text == "embedded":
        embedded = resources.files("storage") / "data" / "probe.jsonl"
        yield from _json_lines(embedded.read_text(encoding="utf-8").splitlines(), config)
        return
    path = config.text.replace("{root}", root)
    try:
        if path.endswith(".parquet"):
            yield from _parquet(path, config)
        elif path.endswith((".jsonl", ".jsonl.gz", ".txt")):
            with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as stream:
                if path.endswith(".txt"):
                    yield Document(stream.read())
                else:
                    yield from _json_lines(stream, config)
        else:
            raise UsageError(f"probe text {path!r} is neither .txt, .jsonl nor .parquet")
    except FileNotFoundError:
        raise UsageError(f"probe text {path!r} does not exist") from None
    except (UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise UsageError(f"probe text {path!r} cannot be read: {error}") from None


def _json_lines(lines: Iterable[str], config: ProbeConfig) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text, domain = record[config.field], record.get("domain")
        except (ValueError, KeyError, TypeError):
            text, domain = None, None
        if not isinstance(text, str):
            raise UsageError(
                f"probe text {config.text!r}: line {number} is no JSON object with a text in {config.field!r}"
            )
        yield Document(text, domain)


def _parquet(path: str, config: ProbeConfig) -> Iterator[Document]:
    with fsspec.open(path, "rb") as stream:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        if config.field not in names:
            raise UsageError(f"probe text {path!r} has no column {config.field!r}; it has {names}")
        columns = [config.field, *(["domain"] if "domain" in names else [])]
        rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            if not isinstance(row[config.field], str):
                raise UsageError(f"probe text {path!r}: row {number} has no text in {config.field!r}")
            yield Document(row[config.field], row.get("domain"))
