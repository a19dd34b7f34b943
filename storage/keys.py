"""Content keys: two results share a key exactly when nothing that could change their numbers differs."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from storage.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal; for a weights file this equals the Hub's LFS digest."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
            "beginning with a letter or digit"
        )
    return name
