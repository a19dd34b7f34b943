"""Checkpoints in folders: listing, weight files, digests. Headers are read, tensors are not."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from storage.errors import DamagedCheckpointError as DamagedCheckpointError
from storage.errors import UsageError
from storage.keys import check_name, digest, file_sha256, hub_digest, text_digests
from storage.series import Checkpoint, DirSource, WeightFile, parse_name

SINGLE_RUN = "run-0"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_LFS = b"version https://git-lfs"
# The longest header that safetensors itself accepts.
_HEADER_LIMIT = 100_000_000


def list_folder(series: str, source: DirSource, root: str) -> tuple[list[Checkpoint], list[str]]:
    """Checkpoints under ``source.path`` in order of run and step, and folder names that did not parse.

    Raises:
        UsageError: the folder is missing or holds no checkpoint.
    """
    base = Path(source.path.replace("{root}", root)).expanduser()
    if not base.is_dir():
        raise UsageError(f"folder {str(base)!r} of series {series!r} does not exist")
    direct = [f for f in _subfolders(base) if parse_name(f.name, source)]
    runs = {SINGLE_RUN: base} if direct else {f.name: f for f in _subfolders(base)}
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


def describe_folder(checkpoint: Checkpoint, known: Checkpoint | None = None) -> Checkpoint:
    """Add weight files, their digest and the dtype; all is taken from ``known`` if nothing changed since.

    Unchanged means: same names, sizes and modification times.

    Raises:
        DamagedCheckpointError: weights or a shard are missing, or a file is a Git LFS pointer.
    """
    folder = Path(checkpoint.location)
    names = weight_names(folder)
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


def weight_names(folder: Path) -> list[str]:
    """Names of the weight files of an HF-format folder, safetensors preferred.

    Raises:
        DamagedCheckpointError: none is there, a shard of the index is missing, or one is an LFS pointer.
    """
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
        elif (folder / single).is_file():
            names = [single]
        else:
            continue
        for name in names:
            if not (folder / name).is_file():
                raise DamagedCheckpointError(
                    f"{folder.name}: shard {name!r} of the index is missing", "missing-shard"
                )
            with (folder / name).open("rb") as stream:
                if stream.read(len(_LFS)) == _LFS:
                    raise DamagedCheckpointError(
                        f"{folder.name}: {name!r} is a Git LFS pointer, not weights", "lfs-pointer"
                    )
        return names
    raise DamagedCheckpointError(f"{folder.name}: no weights ({' or '.join(_SINGLES)})")


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} from a safetensors file, without reading tensors.

    Raises:
        DamagedCheckpointError: the file is shorter than its header says, or has no valid header.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, _HEADER_LIMIT):
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
    kinds: Counter[str] = Counter()
    for name in names:
        if name.endswith(".safetensors"):
            kinds.update(entry["dtype"] for entry in safetensors_header(folder / name).values())
    return kinds.most_common(1)[0][0] if kinds else None


def _subfolders(folder: Path) -> list[Path]:
    entries = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(path for path in entries if not path.name.startswith("."))
