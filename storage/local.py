"""Checkpoints in folders: listing, weight files, digests. Headers are read, tensors are not."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from storage.errors import DamagedCheckpointError, UsageError
from storage.keys import check_name, digest, file_sha256, hub_digest, text_digests
from storage.series import Checkpoint, DirSource, WeightFile, parse_name

SINGLE_RUN = "run-0"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
LFS_POINTER = b"version https://git-lfs"
# The longest header that safetensors itself accepts.
HEADER_LIMIT = 100_000_000
_WILDCARDS = re.compile(r"\*|\?|\[!?[\w-]+\]")
_WILD = {"*": ".*", "?": "."}


def list_folder(series: str, source: DirSource, root: str) -> tuple[list[Checkpoint], list[str]]:
    """Checkpoints under ``source.path`` in order of run and step, and folder names that did not parse.

    Raises:
        UsageError: the folder is missing or holds no checkpoint, or wildcards do not name runs.
    """
    base = Path(source.path.replace("{root}", root)).expanduser()
    runs = {SINGLE_RUN: base}
    if not base.is_dir():
        if not _WILDCARDS.search(source.path):
            made = source.made_by and f": make it first with {source.made_by.replace('{root}', root)}"
            raise UsageError(f"folder {str(base)!r} of series {series!r} does not exist{made or ''}")
        runs = _matched_runs(source.path, root)
    elif not any(parse_name(folder.name, source) for folder in _subfolders(base)):
        runs = {folder.name: folder for folder in _subfolders(base)}
    found: list[Checkpoint] = []
    unparsed: list[str] = []
    for run, folder in runs.items():
        here = []
        names = []
        for child in _subfolders(folder):
            parsed = parse_name(child.name, source)
            if parsed is None:
                names.append(child.name)
                continue
            here.append(
                Checkpoint(
                    series=series,
                    run=check_name("run", parsed.run_of(run)),
                    step=parsed.step,
                    stage=parsed.stage,
                    tokens=parsed.tokens,
                    revision=child.name,
                    location=str(child),
                )
            )
        if here:
            found += sorted(here, key=lambda c: (c.run, c.stage or 0, c.step))
            unparsed += [f"{run}/{name}" for name in names]
    if not found:
        raise UsageError(f"folder {str(base)!r} holds no checkpoint (subfolders such as step1000)")
    return found, unparsed


def _matched_runs(pattern: str, root: str) -> dict[str, Path]:
    """Folders that a path with wildcards matches, by what its wildcards matched, joined by ``-``."""
    runs: dict[str, Path] = {}
    for folder, taken in _walk(Path(), list(Path(pattern).parts), root):
        run = "-".join(taken)
        if not all(taken):
            raise UsageError(f"path {pattern!r}: {str(folder)!r} leaves the run without a name")
        if run in runs:
            raise UsageError(
                f"path {pattern!r}: {str(runs[run])!r} and {str(folder)!r} would both be run {run!r}"
            )
        runs[run] = folder
    if not runs:
        raise UsageError(f"path {pattern!r} matches no folder")
    return runs


def _walk(folder: Path, parts: list[str], root: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Folders below ``folder`` that the parts match, with what each group of wildcards matched."""
    if not parts:
        yield folder, ()
        return
    part, *rest = parts
    if "**" in part:
        raise UsageError(f"path part {part!r}: a wildcard stands for one folder; write */* for two")
    if not _WILDCARDS.search(part):
        inner = (folder / part.replace("{root}", root)).expanduser()
        if inner.is_dir():
            yield from _walk(inner, rest, root)
        return
    for child in _subfolders(folder):
        match = re.fullmatch(_regex(part), child.name)
        if match is not None:
            for found, taken in _walk(child, rest, root):
                yield found, (*match.groups(), *taken)


def _regex(part: str) -> str:
    """Regular expression of a path part; wildcards that stand side by side are one group."""
    pieces = re.split(rf"((?:{_WILDCARDS.pattern})+)", part)
    translated = [re.escape(piece) for piece in pieces]
    for number in range(1, len(pieces), 2):
        inner = _WILDCARDS.sub(lambda wild: _WILD.get(wild[0], wild[0].replace("[!", "[^")), pieces[number])
        translated[number] = f"({inner})"
    return "".join(translated)


def describe_folder(
    checkpoint: Checkpoint, known: Checkpoint | None = None, weights: str | None = None
) -> Checkpoint:
    """Add weight files, their digest and the dtype; all is taken from ``known`` if nothing changed since.

    Unchanged means: same names, sizes and modification times. ``weights`` are the files' names where they
    are not those of Hugging Face.

    Raises:
        DamagedCheckpointError: weights or a shard are missing, or a file is a Git LFS pointer.
    """
    folder = Path(checkpoint.location)
    names = weight_names(folder, weights)
    stats = {name: (folder / name).stat() for name in names}
    fingerprint = digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()])
    # Read always: they are small, and may change while the weights do not.
    texts = text_digests(lambda name: hub_digest(folder / name) if (folder / name).is_file() else None)
    if known is not None and known.fingerprint == fingerprint and known.location == checkpoint.location:
        return checkpoint.described_as(known).model_copy(update=texts)
    files = tuple(
        WeightFile(name=name, bytes=stat.st_size, sha256=file_sha256(folder / name))
        for name, stat in stats.items()
    )
    described = checkpoint.described(files, fingerprint)
    return described.model_copy(update={"dtype": stored_dtype(folder, names), **texts})


def weight_names(folder: Path, pattern: str | None = None) -> list[str]:
    """Names of a folder's weight files: those of an HF-format folder, safetensors preferred, or a pattern's.

    Raises:
        DamagedCheckpointError: none is there, a shard of the index is missing, or one is an LFS pointer.
    """
    names = _hf_names(folder) if pattern is None else _names_like(folder, pattern)
    for name in names:
        with (folder / name).open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise DamagedCheckpointError(
                    f"{folder.name}: {name!r} is a Git LFS pointer, not weights", "lfs-pointer"
                )
    return names


def _names_like(folder: Path, pattern: str) -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file())
    if not names:
        raise DamagedCheckpointError(f"{folder.name}: no weights ({pattern})")
    return names


def _hf_names(folder: Path) -> list[str]:
    for index, single in zip(_INDEXES, _SINGLES, strict=True):
        if (folder / index).is_file():
            try:
                listed = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
                names = sorted({str(name) for name in listed.values()})
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DamagedCheckpointError(f"{folder.name}: {index!r} is no index of shards") from None
            for name in names:
                if Path(name).name != name:
                    raise DamagedCheckpointError(f"{folder.name}: shard name {name!r} leaves its folder")
                if not (folder / name).is_file():
                    raise DamagedCheckpointError(
                        f"{folder.name}: shard {name!r} of the index is missing", "missing-shard"
                    )
            return names
        if (folder / single).is_file():
            return [single]
    raise DamagedCheckpointError(f"{folder.name}: no weights ({' or '.join(_SINGLES)})")


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} from a safetensors file, without reading tensors.

    Raises:
        DamagedCheckpointError: the file is shorter than its header says, or has no valid header.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, HEADER_LIMIT):
            raise DamagedCheckpointError(f"{path.parent.name}: {path.name!r} is no safetensors file")
        try:
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise DamagedCheckpointError(
                f"{path.parent.name}: header of {path.name!r} does not describe tensors"
            ) from None
    if size < 8 + length + end:
        raise DamagedCheckpointError(
            f"{path.parent.name}: {path.name!r} is truncated: {size} of {8 + length + end} bytes"
        )
    return header


def stored_dtype(folder: Path, names: list[str]) -> str | None:
    """The dtype that most tensors are stored in (``F32``, ``F16``, ``BF16``); None for .bin files."""
    headers = [safetensors_header(folder / name) for name in names if name.endswith(".safetensors")]
    return usual_dtype(entry for header in headers for entry in header.values())


def usual_dtype(tensors: Iterable[Mapping[str, Any]]) -> str | None:
    """The dtype of most tensors of safetensors headers; None where there is no tensor."""
    kinds = Counter(str(tensor["dtype"]) for tensor in tensors)
    return kinds.most_common(1)[0][0] if kinds else None


def _subfolders(folder: Path) -> list[Path]:
    """Folders and links to folders, but not hidden ones, in order of name."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
