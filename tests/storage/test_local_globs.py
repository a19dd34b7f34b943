"""Folders with wildcards, links, and weight files of other names."""

import re
from pathlib import Path

import pytest
from storage_support import WriteCheckpoint

from flows.config import resolve
from storage.errors import DamagedCheckpointError, UsageError
from storage.keys import file_sha256
from storage.local import describe_folder, list_folder, weight_names
from storage.series import Checkpoint, DirSource


def make(base: Path, *paths: str) -> None:
    for path in paths:
        (base / path).mkdir(parents=True)


def listed(path: Path | str, root: str = "") -> list[tuple[str, int]]:
    found, _ = list_folder("tiny", DirSource(path=str(path)), root)
    return [(c.run, c.step) for c in found]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("runs/*/ckpts", [("a", 1), ("b", 2)]),
        ("runs/?/ckpts", [("a", 1), ("b", 2)]),
        ("runs/[ac]/ckpts", [("a", 1)]),
        ("runs/[!a]/ckpts", [("b", 2)]),
        ("seeds/seed*", [("1", 5), ("12", 7)]),
        ("seeds/seed[0-9][0-9]", [("12", 7)]),
        ("sweep/lr*-wd*/*/checkpoints", [("1-2-s0", 3), ("1-2-s1", 4)]),
        ("sweep/*/s[0-9]/checkpoints", [("lr1-wd2-0", 3), ("lr1-wd2-1", 4)]),
    ],
)
def test_runs_are_named_by_what_the_wildcards_matched(
    tmp_path: Path, pattern: str, expected: list[tuple[str, int]]
) -> None:
    make(
        tmp_path,
        "runs/a/ckpts/step1",
        "runs/b/ckpts/checkpoint-2",
        "runs/c/other/step9",
        "runs/.d/ckpts/step3",
    )
    make(tmp_path, "seeds/seed1/step5", "seeds/seed12/step7", "seeds/seed2/nothing")
    make(tmp_path, "sweep/lr1-wd2/s0/checkpoints/step3", "sweep/lr1-wd2/s1/checkpoints/step4")
    (tmp_path / "runs" / "file").write_text("no folder")
    assert listed(tmp_path / pattern) == expected


def test_relative_paths_stay_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "runs/a/step1")
    monkeypatch.chdir(tmp_path)
    found, _ = list_folder("tiny", DirSource(path="runs/*"), "")
    assert [c.location for c in found] == ["runs/a/step1"]
    (plain,), _ = list_folder("tiny", DirSource(path="runs/a"), "")
    assert (plain.run, plain.location) == ("run-0", "runs/a/step1")


def test_the_root_may_hold_characters_of_wildcards(tmp_path: Path) -> None:
    make(tmp_path, "odd[1]*/runs/a/step1")
    assert listed("{root}/runs/*", str(tmp_path / "odd[1]*")) == [("a", 1)]
    # A folder of that very name is no pattern.
    assert listed(tmp_path / "odd[1]*" / "runs") == [("a", 1)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing/*", "matches no folder"),
        ("seeds/x*", "matches no folder"),
        ("seeds/seed*", "'{base}/seeds/seed' leaves the run without a name"),
        ("*/*/ckpts", "'{base}/x/y-z/ckpts' and '{base}/x-y/z/ckpts' would both be run 'x-y-z'"),
        ("**/ckpts", "path part '**': a wildcard stands for one folder; write */* for two"),
        ("odd/*", "run name 'my run' is not usable"),
    ],
)
def test_patterns_that_do_not_name_runs_are_refused(tmp_path: Path, pattern: str, message: str) -> None:
    make(tmp_path, "seeds/seed/step1", "x-y/z/ckpts/step1", "x/y-z/ckpts/step1", "odd/my run/step1")
    with pytest.raises(UsageError, match=re.escape(message.format(base=tmp_path))):
        listed(tmp_path / pattern)


def test_links_to_folders_are_followed(tmp_path: Path, write_checkpoint: WriteCheckpoint) -> None:
    real = write_checkpoint(tmp_path / "elsewhere" / "weights-at-ten")
    make(tmp_path, "runs/a")
    (tmp_path / "runs" / "a" / "step10").symlink_to(real, target_is_directory=True)
    (tmp_path / "runs" / "b").symlink_to(tmp_path / "runs" / "a", target_is_directory=True)
    (tmp_path / "runs" / "a" / "step11").symlink_to(tmp_path / "nowhere")
    (tmp_path / "runs" / "a" / "step12").symlink_to(tmp_path / "runs" / "a" / "step12")
    assert listed(tmp_path / "runs") == listed(tmp_path / "runs" / "*") == [("a", 10), ("b", 10)]
    found, _ = list_folder("tiny", DirSource(path=str(tmp_path / "runs")), "")
    digests = {describe_folder(c).weights_sha256 for c in found}
    assert digests == {file_sha256(real / "model.safetensors")}


@pytest.mark.parametrize(
    ("path", "name"),
    [("/data/runs/*/ckpts", "runs"), ("/data/runs/seed*", "runs"), ("/data/my-run", "my-run")],
)
def test_a_series_of_wildcards_is_called_as_the_folder_before_them(path: str, name: str) -> None:
    config = resolve(f"dir:{path}")
    assert config.name == name
    assert isinstance(config.source, DirSource)
    assert config.source.path == path


# --- weight files of other names ---


def at(folder: Path) -> Checkpoint:
    return Checkpoint(series="tiny", run="a", step=1, revision=folder.name, location=str(folder))


def test_weight_files_by_pattern(tmp_path: Path) -> None:
    make(tmp_path, "step1/rank1")
    folder = tmp_path / "step1"
    for name in ("b.pt", "a.pt", "rank1/c.pt", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    assert weight_names(folder, "*.pt") == ["a.pt", "b.pt"]
    assert weight_names(folder, "rank?/*.pt") == ["rank1/c.pt"]
    one = describe_folder(at(folder), weights="a.*")
    assert (one.weights_sha256, one.bytes, one.dtype) == (file_sha256(folder / "a.pt"), 4, None)
    again = describe_folder(at(folder), one, "a.*")
    assert again.fingerprint == one.fingerprint
    assert describe_folder(at(folder), one, "*.pt").weights_sha256 != one.weights_sha256


def test_missing_files_and_pointers_are_damage(tmp_path: Path) -> None:
    make(tmp_path, "step1")
    folder = tmp_path / "step1"
    with pytest.raises(DamagedCheckpointError, match=r"^step1: no weights \(\*\.pt\)$"):
        weight_names(folder, "*.pt")
    (folder / "a.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DamagedCheckpointError, match=r"'a.pt' is a Git LFS pointer, not weights"):
        weight_names(folder, "*.pt")
