import gzip
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer

from storage.errors import UsageError
from storage.probe import Document, ProbeConfig, _windows, build_probe, read_documents


class Letters:
    """Every character is a token: its code point."""

    bos_token_id: int | None = 7

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        assert not add_special_tokens
        assert not verbose
        return [ord(character) for character in text]


class NoBos(Letters):
    bos_token_id = None


class Bpe:
    """A real byte-level BPE, with the interface that the probe needs."""

    bos_token_id = None

    def __init__(self, texts: list[str]) -> None:
        self._bpe = ByteLevelBPETokenizer()
        self._bpe.train_from_iterator(texts, vocab_size=400, min_frequency=2, show_progress=False)

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        return list(self._bpe.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._bpe.decode(ids))


def lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def texts(rows: Any) -> list[str]:
    return ["".join(chr(token) for token in row) for row in rows]


# --- cutting ---


def test_documents_of_one_domain_are_joined_by_a_blank_line_and_cut(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", {"text": "abcde"}, {"text": "fghijklmnopq"})
    probe = build_probe(ProbeConfig(text=path, length=8), Letters())
    assert texts(probe.tokens) == ["abcde\n\nf", "ghijklmn"]
    assert probe.domains == (None, None)
    assert probe.tokens.dtype == np.int64


def test_a_window_never_spans_two_domains(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "p.jsonl",
        {"text": "abcdefghij", "domain": "a"},
        {"text": "ABCDEFGHIJ", "domain": "b"},
        {"text": "klmnopqr", "domain": "a"},
    )
    probe = build_probe(ProbeConfig(text=path, length=8), Letters())
    assert texts(probe.tokens) == ["abcdefgh", "ABCDEFGH", "klmnopqr"]
    assert probe.domains == ("a", "b", "a")


def test_bos_stands_before_every_window_and_counts(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", {"text": "abcdefghijklmn"})
    probe = build_probe(ProbeConfig(text=path, length=8, bos="first"), Letters())
    assert texts(probe.tokens) == ["\x07abcdefg", "\x07hijklmn"]
    assert probe.describe() == {"digest": probe.digest, "sequences": 2, "length": 8, "bos": "first"}


def test_bos_needs_a_tokenizer_that_has_one() -> None:
    with pytest.raises(UsageError, match=r"probe.bos is 'first', but the tokenizer has no BOS token"):
        build_probe(ProbeConfig(bos="first"), NoBos())


def test_reading_stops_once_there_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "abcdefgh"}\n{"text": "abcdefgh"}\nnot JSON\n')
    assert len(build_probe(ProbeConfig(text=str(path), length=8, sequences=2), Letters()).tokens) == 2


@pytest.mark.parametrize(
    ("sequences", "message"),
    [(3, "yields 2 sequences of 8 tokens, fewer than the 3 asked for"), (None, None)],
)
def test_too_little_text_is_refused(tmp_path: Path, sequences: int | None, message: str | None) -> None:
    path = lines(tmp_path / "p.jsonl", {"text": "abcdefghijklmnopqrs"})
    config = ProbeConfig(text=path, length=8, sequences=sequences)
    if message is None:
        assert len(build_probe(config, Letters()).tokens) == 2
    else:
        with pytest.raises(UsageError, match=message):
            build_probe(config, Letters())
    short = lines(tmp_path / "short.jsonl", {"text": "abc"})
    with pytest.raises(UsageError, match="yields 0 sequences of 8 tokens, fewer than the 1 asked for"):
        build_probe(ProbeConfig(text=short, length=8), Letters())


@given(st.lists(st.text(max_size=40), max_size=6), st.integers(1, 12))
def test_windows_are_the_joined_text_without_its_rest(documents: list[str], size: int) -> None:
    joined = "\n\n".join(documents)
    found = texts(_windows([Document(text) for text in documents], Letters(), size))
    assert "".join(found) == joined[: len(joined) // size * size]
    assert {len(window) for window in found} <= {size}


# --- digest ---


def probe_digest(tmp_path: Path, *records: Any, **options: Any) -> str:
    config = ProbeConfig(text=lines(tmp_path / "p.jsonl", *records), **({"length": 8} | options))
    return build_probe(config, Letters()).digest


def test_the_digest_depends_on_tokens_and_domains_only(tmp_path: Path) -> None:
    base = probe_digest(tmp_path, {"text": "abcdefghijklmnop", "domain": "a"})
    assert probe_digest(tmp_path, {"domain": "a", "text": "abcdefghijklmnop-rest", "id": 1}) == base
    other = [
        probe_digest(tmp_path, {"text": "abcdefghijklmnoP", "domain": "a"}),
        probe_digest(tmp_path, {"text": "abcdefghijklmnop", "domain": "b"}),
        probe_digest(tmp_path, {"text": "abcdefghijklmnop"}),
        probe_digest(tmp_path, {"text": "abcdefghijklmnop", "domain": "a"}, length=16),
        probe_digest(tmp_path, {"text": "abcdefghijklmnop", "domain": "a"}, bos="first"),
        probe_digest(tmp_path, {"text": "abcdefghijklmnop", "domain": "a"}, sequences=1),
    ]
    assert len({base, *other}) == 7


def test_the_digest_is_that_of_shape_tokens_and_domains(tmp_path: Path) -> None:
    hashed = b"(1, 8)" + struct.pack("<8q", *b"abcdefgh") + b'["a"]'
    expected = hashlib.sha256(hashed).hexdigest()[:32]
    assert probe_digest(tmp_path, {"text": "abcdefgh", "domain": "a"}) == expected


# --- kinds of text ---


def test_all_kinds_of_files_give_the_same_probe(tmp_path: Path) -> None:
    text = "one text\u2028with a separator that is no line end, é and all"
    (tmp_path / "p.txt").write_text(text, encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    with gzip.open(tmp_path / "p.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(json.dumps({"text": text}) + "\n\n")
    pq.write_table(pa.table({"text": [text], "id": [1]}), tmp_path / "p.parquet")
    digests = {
        build_probe(ProbeConfig(text=f"{{root}}/{name}", length=8), Letters(), str(tmp_path)).digest
        for name in ("p.txt", "p.jsonl", "p.jsonl.gz", "p.parquet")
    }
    assert len(digests) == 1


def test_parquet_carries_domains_and_another_column(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"body": ["abcdefgh", "ABCDEFGH"], "domain": ["x", None]}), path)
    probe = build_probe(ProbeConfig(text=str(path), field="body", length=8), Letters())
    assert texts(probe.tokens) == ["abcdefgh", "ABCDEFGH"]
    assert probe.domains == ("x", None)
    with pytest.raises(UsageError, match=r"has no column 'text'; it has \['body', 'domain'\]"):
        build_probe(ProbeConfig(text=str(path)), Letters())


@pytest.mark.parametrize("bad", ["{", "[1]", '"text"', "5", '{"body": "x"}', '{"text": 5}', '{"text": null}'])
def test_a_bad_line_is_numbered(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"text": "x"}}\n\n{bad}\n')
    with pytest.raises(UsageError) as raised:
        list(read_documents(ProbeConfig(text=str(path))))
    assert str(raised.value) == f"probe text {str(path)!r}: line 3 is no JSON object with a text in 'text'"


def test_a_row_without_text_is_numbered(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "p.parquet")
    with pytest.raises(UsageError, match=r"p.parquet': row 2 has no text in 'text'"):
        list(read_documents(ProbeConfig(text=str(tmp_path / "p.parquet"))))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"text", "is neither .txt, .jsonl nor .parquet"),
        ("p.txt", b"\xff\xfe", "cannot be read: 'utf-8' codec"),
        ("p.jsonl", b"\xff\xfe", "cannot be read: 'utf-8' codec"),
        ("p.parquet", b"not Parquet at all", "cannot be read: "),
        ("p.txt", None, "does not exist"),
        ("p.parquet", None, "does not exist"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        list(read_documents(ProbeConfig(text=str(path))))
    assert str(raised.value).startswith(f"probe text {str(path)!r} {message}")


# --- the embedded text ---


def test_the_embedded_text_with_a_real_tokenizer() -> None:
    documents = list(read_documents(ProbeConfig()))
    assert len(documents) == 40
    assert all(document.domain for document in documents)
    bpe = Bpe([document.text for document in documents])
    probe = build_probe(ProbeConfig(length=32), bpe)
    assert probe.tokens.shape[1] == 32
    assert len(probe.tokens) == len(probe.domains) > 100
    assert documents[0].text.startswith(bpe.decode(probe.tokens[0].tolist()))
    assert set(probe.domains) == {document.domain for document in documents}
    again = build_probe(ProbeConfig(length=32), Bpe([document.text for document in documents]))
    assert again.digest == probe.digest
