"""Content keys: two results share a key exactly when nothing that could change their numbers differs."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from storage.errors import UsageError

# File systems allow 255 bytes for a name, of which suffixes and temporary names take some.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,179}")

# What the Hub keeps in LFS unless a repository says otherwise; of its longer list, what holds weights.
LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".pkl")
LFS_BYTES = 10_000_000

CONFIG_FILE = "config.json"
_TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_PARTS = ("added_tokens.json", "merges.txt", "tokenizer.model", "vocab.json", "vocab.txt")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``, as its first 32 hexadecimal digits (128 bits)."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def result_key(weights_sha256: str, protocol: Mapping[str, Any]) -> str:
    """Key of one analyzer's rows on one checkpoint: digest of the weights' digest and the protocol.

    The protocol holds analyzer, version, parameters, probe digest, dtype and schema version
    (:func:`tasks.measure.protocol_of` builds it).
    """
    return digest({"weights_sha256": weights_sha256, "protocol": dict(protocol)})


def compared_sha256(weights: str, others: Mapping[Any, str]) -> str:
    """Digest of a checkpoint's weights and, by name, of those it is compared with; its own if none."""
    return digest({"weights": weights, "others": dict(others)}) if others else weights


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal; for a weights file this equals the Hub's LFS digest."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_blob_sha1(path: Path) -> str:
    """Digest by which git, and so the Hub's metadata, knows a file's contents."""
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            blob.update(chunk)
    return blob.hexdigest()


def hub_digest(path: Path) -> str:
    """The digest that the Hub's metadata would show of a file: SHA-256 for what LFS keeps, else git's."""
    in_lfs = path.name.endswith(LFS_SUFFIXES) or path.stat().st_size > LFS_BYTES
    return file_sha256(path) if in_lfs else git_blob_sha1(path)


def text_digests(digest_of: Callable[[str], str | None]) -> dict[str, str | None]:
    """``config_digest`` and ``tokenizer_digest`` from the Hub's digests of files by name, None where absent.

    The tokenizer is ``tokenizer.json`` alone, or else all files of an older form together (SHA-1 over lines
    ``name digest``). So metadata and files give the same values, and nothing need be downloaded.
    """
    tokenizer = digest_of(_TOKENIZER_FILE)
    if tokenizer is None:
        parts = [(name, digest_of(name)) for name in _TOKENIZER_PARTS]
        lines = "".join(f"{name} {found}\n" for name, found in parts if found is not None)
        tokenizer = hashlib.sha1(lines.encode()).hexdigest() if lines else None
    return {"config_digest": digest_of(CONFIG_FILE), "tokenizer_digest": tokenizer}


def weights_sha256(files: Iterable[tuple[str, str]]) -> str:
    """Digest of a checkpoint's weights from ``(file name, SHA-256)`` pairs.

    One file: its own SHA-256, the number that the Hub shows. Several shards: SHA-256 over the lines
    ``name sha256`` in order of name. The Hub's metadata suffices, so nothing need be downloaded.
    """
    pairs = sorted(files)
    if not pairs:
        raise ValueError("a checkpoint without weight files has no digest")
    if len(pairs) == 1:
        return pairs[0][1]
    return hashlib.sha256("".join(f"{name} {sha}\n" for name, sha in pairs).encode()).hexdigest()


def check_name(kind: str, name: str) -> str:
    """Return ``name`` if it may be a folder name (series and runs are), else raise :class:`UsageError`."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{kind} name {name!r} is not usable: letters, digits, '.', '_' and '-' only, "
            "beginning with a letter or digit, 180 at the most"
        )
    return name
