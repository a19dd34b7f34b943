"""Secrets are hidden in tables and sentences, and names cannot leave the root."""

import json
from pathlib import Path

import pytest

from storage import Store, UsageError
from storage.errors import HubError
from storage.keys import check_name
from storage.secrets import redact

TOKEN = "hf_abcdefghijklmnopQRSTUV"
AWS = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"Authorization: Bearer {TOKEN}", "Authorization: Bearer ***"),
        (f"token {TOKEN} was refused", "token *** was refused"),
        ("s3://me:pa55@host/bucket is gone", "s3://***@host/bucket is gone"),
        ("https://host/file?X-Amz-Signature=abc123&part=2", "https://host/file?***&part=2"),
        ("key AKIAIOSFODNN7EXAMPLE", "key ***"),
        ("https://host/a@b and https://host", "https://host/a@b and https://host"),
        ("step 512: loss 3.2, tokens 1048576", "step 512: loss 3.2, tokens 1048576"),
    ],
)
def test_forms_of_secrets(text: str, left: str) -> None:
    assert redact(text, {}) == left


def test_secrets_of_the_environment() -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": AWS, "MY_PASSWORD": "correct horse", "HOME": "/home/somebody"}
    text = f"no access with {AWS}, correct horse, /home/somebody"
    assert redact(text, environment) == "no access with ***, ***, /home/somebody"
    assert redact("short", {"API_TOKEN": "short"}) == "short"


def test_sentences_of_errors_hide_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS)
    assert str(HubError(f"GET https://u:p@host failed with {AWS}")) == "GET https://***@host failed with ***"


def test_tables_hide_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-any-form")
    store = Store(tmp_path)
    row = {"step": 1, "error": "401 for a-token-of-any-form at https://u:p@hub", "attempt": 1}
    store.write("failures", [row], series="s", run="r", name="f")
    config = json.dumps({"source": {"path": "https://u:p@host/x", "note": "a-token-of-any-form"}})
    store.write("provenance", [{"invocation": "i", "config": config}], series="s", name="p")
    found = b"".join(path.read_bytes() for path in tmp_path.rglob("*.parquet"))
    assert b"a-token-of-any-form" not in found
    assert store.table("failures").to_pylist()[0]["error"] == "401 for *** at https://***@hub"
    stored = json.loads(store.table("provenance").to_pylist()[0]["config"])
    assert stored == {"source": {"path": "https://***@host/x", "note": "***"}}


def test_a_root_with_a_login_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the root 's3://\*\*\*@host/bucket' holds a login") as caught:
        Store("s3://me:pa55word@host/bucket")
    assert "pa55word" not in str(caught.value)


OUTSIDE = (
    "..",
    "../x",
    "/etc",
    "a/b",
    "a\\b",
    ".hidden",
    "",
    "a\n",
    "a\0b",
    "C:",
    "~",
    "a" * 200,
    "ü",
    "$(x)",
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_cannot_leave_the_root(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    store = Store(root)
    with pytest.raises(UsageError, match="is not usable"):
        check_name("series", name)
    with pytest.raises(UsageError, match="is not usable"):
        store.write("failures", [], series=name, run="r", name="f")
    with pytest.raises(UsageError, match="is not usable"):
        store.write("failures", [], series="s", run=name, name="f")
    with pytest.raises(UsageError, match="is not usable"):
        store.write("failures", [], series="s", run="r", name=name)
    with pytest.raises(UsageError, match="is not usable"):
        store.table("failures", name)
    assert list(tmp_path.iterdir()) == []
