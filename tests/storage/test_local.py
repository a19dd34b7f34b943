import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from storage_support import WriteCheckpoint

from storage import local
from storage.errors import DamagedCheckpointError, UsageError
from storage.keys import weights_sha256
from storage.local import describe_folder, list_folder, weight_names
from storage.series import Checkpoint, DirSource


def at(folder: Path, **more: object) -> Checkpoint:
    base = {"series": "tiny", "run": "run-0", "step": 1, "revision": folder.name, "location": str(folder)}
    return Checkpoint.model_validate(base | more)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- listing ---


def test_one_run(tmp_path: Path) -> None:
    for name in ("step10", "step2", "step0", "logs", ".cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "step99").write_text("a file is no checkpoint")
    found, unparsed = list_folder("tiny", DirSource(path=str(tmp_path), tokens_per_step=8), "")
    assert [(c.run, c.step, c.tokens, c.revision) for c in found] == [
        ("run-0", 0, 0, "step0"),
        ("run-0", 2, 16, "step2"),
        ("run-0", 10, 80, "step10"),
    ]
    assert [c.location for c in found] == [str(tmp_path / c.revision) for c in found]
    assert {c.commit for c in found} == {None}
    assert unparsed == ["run-0/logs"]


def test_several_runs(tmp_path: Path) -> None:
    for run, name in (("seed1", "step2"), ("seed1", "main"), ("seed0", "checkpoint-500"), ("empty", "x")):
        (tmp_path / "root" / "series" / run / name).mkdir(parents=True)
    found, unparsed = list_folder("tiny", DirSource(path="{root}/series"), str(tmp_path / "root"))
    assert [(c.run, c.step) for c in found] == [("seed0", 500), ("seed1", 2)]
    assert unparsed == ["seed1/main"]


def test_ingredients_are_runs_of_their_own(tmp_path: Path) -> None:
    for name in ("stage2-ingredient2-step5", "stage2-ingredient1-step5", "stage1-step9", "stage2-step3"):
        (tmp_path / name).mkdir()
    found, _ = list_folder("tiny", DirSource(path=str(tmp_path)), "")
    assert [(c.run, c.stage, c.step) for c in found] == [
        ("run-0", 1, 9),
        ("run-0", 2, 3),
        ("run-0-stage2-ingredient1", 2, 5),
        ("run-0-stage2-ingredient2", 2, 5),
    ]


def test_a_run_with_an_unusable_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my run" / "step1").mkdir(parents=True)
    with pytest.raises(UsageError, match="run name 'my run' is not usable"):
        list_folder("tiny", DirSource(path=str(tmp_path)), "")


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere' of series 'tiny' does not exist"):
        list_folder("tiny", DirSource(path=str(tmp_path / "nowhere")), "")
    made = DirSource(path="{root}/mine", made_by="ontogeny specimen --out {root}/mine")
    with pytest.raises(UsageError, match=r"not exist: make it first with ontogeny specimen --out R/mine$"):
        list_folder("tiny", made, "R")
    with pytest.raises(UsageError, match=r"holds no checkpoint \(subfolders such as step1000\)"):
        list_folder("tiny", DirSource(path=str(tmp_path)), "")


# --- describing ---


def test_a_single_file(tmp_path: Path, write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint(tmp_path / "step1", dtype="float16")
    described = describe_folder(at(folder))
    file = folder / "model.safetensors"
    assert (described.bytes, described.dtype) == (file.stat().st_size, "F16")
    assert described.weights_sha256 == sha(file)


def test_shards(tmp_path: Path, write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint(tmp_path / "step1", shards=2)
    described = describe_folder(at(folder))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [file.name for file in described.files] == names
    assert described.bytes == sum((folder / name).stat().st_size for name in names)
    assert described.weights_sha256 == weights_sha256([(name, sha(folder / name)) for name in names])


def test_bin_files_are_taken_where_there_is_nothing_better(
    tmp_path: Path, write_checkpoint: WriteCheckpoint
) -> None:
    folder = write_checkpoint(tmp_path / "step1")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    assert weight_names(folder) == ["model.safetensors"]
    (folder / "model.safetensors").unlink()
    described = describe_folder(at(folder))
    assert (described.bytes, described.dtype) == (7, None)


def test_unchanged_weights_are_not_read_again(
    tmp_path: Path, write_checkpoint: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "step1", shards=3)
    known = describe_folder(at(folder))
    monkeypatch.setattr(local, "file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert describe_folder(at(folder), known) == known
    # What listing says now counts, not what it said then.
    assert describe_folder(at(folder, tokens=5), known).tokens == 5


def test_changed_weights_are_read_again(tmp_path: Path, write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint(tmp_path / "step1")
    known = describe_folder(at(folder))
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    # Same size, another time: the clock of a file system may be coarser than this test is quick.
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10))
    again = describe_folder(at(folder), known)
    assert again.weights_sha256 == sha(file) != known.weights_sha256
    assert again.fingerprint != known.fingerprint


def test_a_moved_folder_is_read_again(tmp_path: Path, write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint(tmp_path / "step1")
    known = describe_folder(at(folder))
    folder.rename(tmp_path / "step2")
    described = describe_folder(at(tmp_path / "step2"), known)
    assert described.location == str(tmp_path / "step2")
    assert described.weights_sha256 == known.weights_sha256


# --- damage ---


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def _missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def _pointer(folder: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4970582888\n"
    (folder / "model-00002-of-00002.safetensors").write_text(text)


def _truncated(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _no_header(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"\xff" * 200)


def _empty_file(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")


def _header(text: bytes, folder: Path) -> None:
    data = len(text).to_bytes(8, "little") + text
    (folder / "model-00002-of-00002.safetensors").write_bytes(data)


def _index(value: object, folder: Path) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_weights, "step1: no weights (model.safetensors or pytorch_model.bin)"),
        (_missing_shard, "step1: shard 'model-00002-of-00002.safetensors' of the index is missing"),
        (_pointer, "step1: 'model-00002-of-00002.safetensors' is a Git LFS pointer, not weights"),
        (_truncated, "step1: 'model-00002-of-00002.safetensors' is truncated: {short} of {size} bytes"),
        (_no_header, "step1: 'model-00002-of-00002.safetensors' is no safetensors file"),
        (_empty_file, "step1: 'model-00002-of-00002.safetensors' is no safetensors file"),
        (
            lambda folder: _header(b"{nonsense}", folder),
            "step1: header of 'model-00002-of-00002.safetensors' does not describe tensors",
        ),
        (
            lambda folder: _header(b'{"a": {"dtype": "F32"}}', folder),
            "step1: header of 'model-00002-of-00002.safetensors' does not describe tensors",
        ),
        (
            lambda folder: _header(b"[1, 2]", folder),
            "step1: header of 'model-00002-of-00002.safetensors' does not describe tensors",
        ),
        (
            lambda folder: _index({"weight_map": {"a": "../step2/model.safetensors"}}, folder),
            "step1: shard name '../step2/model.safetensors' leaves its folder",
        ),
        (
            lambda folder: _index('{"weight_map": {"a": ', folder),
            "step1: 'model.safetensors.index.json' is no index of shards",
        ),
        (lambda folder: _index({}, folder), "step1: 'model.safetensors.index.json' is no index of shards"),
        (lambda folder: _index([], folder), "step1: 'model.safetensors.index.json' is no index of shards"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, write_checkpoint: WriteCheckpoint, damage: object, message: str
) -> None:
    folder = write_checkpoint(tmp_path / "step1", shards=2)
    size = (folder / "model-00002-of-00002.safetensors").stat().st_size
    assert callable(damage)
    damage(folder)
    with pytest.raises(DamagedCheckpointError) as raised:
        describe_folder(at(folder))
    assert str(raised.value) == message.format(short=size - 1, size=size)


# --- configuration and tokenizer ---


def test_configuration_and_tokenizer_have_the_digests_of_the_hub(
    tmp_path: Path, write_checkpoint: WriteCheckpoint
) -> None:
    folder = write_checkpoint(tmp_path / "step1")
    before = describe_folder(at(folder))
    # As `git hash-object` says of these contents.
    assert before.config_digest == hashlib.sha1(b'blob 26\0{"model_type": "gpt_neox"}').hexdigest()
    assert before.tokenizer_digest == hashlib.sha1(b'blob 13\0{"model": {}}').hexdigest()

    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "tokenizer.json").unlink()
    without = describe_folder(at(folder), before)
    assert without.weights_sha256 == before.weights_sha256
    assert without.config_digest != before.config_digest
    assert without.tokenizer_digest is None
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("a b")
    merges, vocab = (hashlib.sha1(b).hexdigest() for b in (b"blob 3\0a b", b"blob 2\0{}"))
    expected = hashlib.sha1(f"merges.txt {merges}\nvocab.json {vocab}\n".encode()).hexdigest()
    assert describe_folder(at(folder), without).tokenizer_digest == expected


@pytest.mark.parametrize(
    ("damage", "kind"),
    [(_no_weights, "damaged"), (_missing_shard, "missing-shard"), (_pointer, "lfs-pointer")],
)
def test_damage_has_a_kind_of_finding(
    tmp_path: Path, write_checkpoint: WriteCheckpoint, damage: Callable[[Path], None], kind: str
) -> None:
    folder = write_checkpoint(tmp_path / "step1", shards=2)
    damage(folder)
    with pytest.raises(DamagedCheckpointError) as raised:
        describe_folder(at(folder))
    assert raised.value.kind == kind
