"""Secrets stay out of tables, sentences and addresses: what is written or printed passes through here."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# Columns of any table that hold sentences or settings; the others hold names and numbers.
FREE_TEXT = frozenset({"error", "detail", "note", "notes", "config", "command", "counts", "sentence"})
_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_KEY)", re.IGNORECASE)
# Shorter values would blot out common words.
_SHORTEST = 8
# The part of an address that says who asks: https://user:password@host.
LOGIN = re.compile(r"(?<=://)[^/\s@'\"]+@")
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}"
    r"|(?<=[?&])(?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|token|sig)=[^&\s'\"]+",
    re.IGNORECASE,
)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """``text`` with secrets as ``***``.

    Secrets are values of environment variables whose names say so (``HF_TOKEN``, ``AWS_SECRET_ACCESS_KEY``),
    the login of an address (``https://user:password@host``), signatures of signed addresses, and what has
    the form of a token of the Hub, of an AWS key, or of a Bearer header.
    """
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= _SHORTEST and value in text and _VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    return _SHAPES.sub(HIDDEN, LOGIN.sub(f"{HIDDEN}@", text))


def redacted(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table with its free texts redacted."""
    return {name: _clean(value) if name in FREE_TEXT else value for name, value in row.items()}


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    return [_clean(item) for item in value] if isinstance(value, list) else value
