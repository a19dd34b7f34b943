import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import UsageError
from storage.keys import canonical_json, check_name, digest, file_sha256, result_key, weights_sha256

PROTOCOL = {"analyzer": "loss", "version": 1, "parameters": {"a": 1, "b": [2.5, None]}, "probe": None}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def _reversed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _reversed(value[key]) for key in reversed(value)}
    return [_reversed(item) for item in value] if isinstance(value, list) else value


def test_canonical_json_has_sorted_keys_and_no_blanks() -> None:
    assert canonical_json({"b": [1, 2.5], "a": {"d": None, "c": True}}) == (
        '{"a":{"c":true,"d":null},"b":[1,2.5]}'
    )


@given(json_values)
def test_order_of_keys_never_matters(value: Any) -> None:
    assert digest(value) == digest(_reversed(value))


def test_nan_has_no_key() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"value": float("nan")})


def test_digest_is_the_head_of_sha256_of_the_canonical_json() -> None:
    assert digest({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()[:32]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"parameters": {"a": 1, "b": [2.5, 0]}},
        {"probe": {"digest": "x"}},
        {"analyzer": "spectra"},
    ],
)
def test_every_part_of_the_protocol_enters_the_result_key(change: dict[str, Any]) -> None:
    assert result_key("0" * 64, PROTOCOL) != result_key("0" * 64, PROTOCOL | change)


def test_weights_enter_the_result_key() -> None:
    assert result_key("0" * 64, PROTOCOL) != result_key("1" * 64, PROTOCOL)
    assert result_key("0" * 64, PROTOCOL) == result_key("0" * 64, _reversed(PROTOCOL))


def test_one_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    sha = file_sha256(tmp_path / "model.safetensors")
    assert sha == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert weights_sha256([("model.safetensors", sha)]) == sha


def test_shards_have_the_digest_of_their_sorted_list() -> None:
    pairs = [("b", "2" * 64), ("a", "1" * 64)]
    expected = hashlib.sha256(f"a {'1' * 64}\nb {'2' * 64}\n".encode()).hexdigest()
    assert weights_sha256(pairs) == weights_sha256(pairs[::-1]) == expected


def test_no_files_have_no_digest() -> None:
    with pytest.raises(ValueError, match="without weight files"):
        weights_sha256([])


@pytest.mark.parametrize(
    "name", ["pythia-160m", "seed0", "step1", "a..b", "0", "stage2-ingredient1", "x_1.y"]
)
def test_plain_names_may_be_folders(name: str) -> None:
    assert check_name("run", name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/a", ".hidden", "a b", "ä", "-x", "a\n", "a\\b"]
)
def test_other_names_may_not(name: str) -> None:
    with pytest.raises(UsageError, match=r"run name .* is not usable: letters, digits"):
        check_name("run", name)


@given(st.text(max_size=12))
def test_no_accepted_name_leaves_its_folder(name: str) -> None:
    try:
        check_name("run", name)
    except UsageError:
        return
    assert Path("/base", name).resolve().parent == Path("/base")
    assert not name.startswith(".")
