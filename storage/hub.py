"""Checkpoints on the Hugging Face Hub, through its own client: list, pin, describe, fetch."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub as hf
from huggingface_hub.errors import RepositoryNotFoundError

from storage.errors import OntogenyError, UsageError
from storage.series import Checkpoint, HubSource, WeightFile, parse_name

# transformers would otherwise ask a conversion service about every .bin repository.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

_TEXT_FILES = ["*.json", "*.txt", "*.model"]
_WEIGHTS = (("model", "safetensors"), ("pytorch_model", "bin"))


class HubError(OntogenyError):
    """The Hub did not give what was asked for; the sentence says what and where."""


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Turn the client's errors into a :class:`HubError`: those of its HTTP library have no public base."""
    try:
        yield
    except OntogenyError:
        raise
    except Exception as error:
        raise HubError(f"{what}: {first_line(error)}") from error


def list_hub(series: str, source: HubSource) -> tuple[list[Checkpoint], list[str]]:
    """Checkpoints of all repositories in order of run and step, and branch names that did not parse.

    One request per repository; every branch comes with the commit it points to. Ingredients of a later
    stage are runs of their own (``RUN-stage2-ingredient1``), because their steps count anew.

    Raises:
        UsageError: a repository does not exist or has no checkpoint branch.
        HubError: the Hub did not answer.
    """
    found: list[Checkpoint] = []
    unparsed: list[str] = []
    for run, repo in source.repos.items():
        with _asking(f"{repo}: the Hub did not list branches"):
            try:
                branches = hf.HfApi().list_repo_refs(repo).branches
            except RepositoryNotFoundError:
                raise UsageError(
                    f"repository {repo!r} does not exist on the Hub, or is not yours to read"
                ) from None
        here = []
        for branch in branches:
            parsed = parse_name(branch.name, source)
            if parsed is None:
                unparsed.append(f"{run}/{branch.name}")
                continue
            here.append(
                Checkpoint(
                    series=series,
                    run=parsed.run_of(run),
                    step=parsed.step,
                    stage=parsed.stage,
                    tokens=parsed.tokens,
                    revision=branch.name,
                    commit=branch.target_commit,
                    location=repo,
                )
            )
        if not here:
            raise UsageError(f"repository {repo!r} has no branch of the form {source.pattern!r}")
        found += sorted(here, key=lambda c: (c.run, c.stage or 0, c.step))
    return found, unparsed


def describe_hub(checkpoint: Checkpoint, known: Checkpoint | None = None) -> Checkpoint:
    """Add weight files with sizes and LFS digests, from the Hub's metadata at the pinned commit.

    A checkpoint already recorded keeps the commit it was pinned to, whatever its branch says now.

    Raises:
        HubError: the Hub did not answer, or the repository has no weights at that commit.
    """
    if known is not None and known.weights_sha256 and known.location == checkpoint.location:
        return checkpoint.described_as(known)
    return checkpoint.described(weight_files(checkpoint), checkpoint.commit)


def weight_files(checkpoint: Checkpoint) -> tuple[WeightFile, ...]:
    """Weight files at the pinned commit, safetensors preferred, with sizes and LFS digests.

    Raises:
        HubError: the Hub did not answer, the repository has no weights at that commit, a shard is absent, or
            a file is not kept in LFS (which is how a pointer committed in place of weights looks).
    """
    with _asking(f"{checkpoint.label}: the Hub did not list files"):
        tree = list(hf.HfApi().list_repo_tree(checkpoint.location, revision=checkpoint.commit))
    entries = {entry.path: entry for entry in tree if isinstance(entry, hf.RepoFile)}
    for stem, suffix in _WEIGHTS:
        shards = [re.fullmatch(rf"{stem}-(\d+)-of-(\d+)\.{suffix}", path) for path in sorted(entries)]
        found = [shard for shard in shards if shard is not None]
        for shard in found:
            if len(found) != int(shard[2]):
                raise HubError(f"{checkpoint.label}: {len(found)} of {int(shard[2])} shards are there")
        single = f"{stem}.{suffix}"
        names = [shard[0] for shard in found] or ([single] if single in entries else [])
        for name in names:
            if entries[name].lfs is None:
                raise HubError(f"{checkpoint.label}: {name!r} is not kept in LFS, so it is no weights file")
        if names:
            return tuple(_weight_file(entries[name]) for name in names)
    raise HubError(f"{checkpoint.label}: no weights at commit {checkpoint.commit}")


def _weight_file(entry: hf.RepoFile) -> WeightFile:
    return WeightFile(name=entry.path, bytes=entry.size, sha256=entry.lfs.sha256 if entry.lfs else None)


@contextmanager
def fetched_hub(checkpoint: Checkpoint, scratch: Path) -> Iterator[Path]:
    """Download a checkpoint into ``scratch``, yield its folder, and delete it afterwards.

    Raises:
        HubError: the download did not succeed after the client's own retries.
    """
    folder = scratch / checkpoint.series / checkpoint.run / checkpoint.revision
    names = [file.name for file in checkpoint.files or weight_files(checkpoint)]
    with _asking(f"{checkpoint.label}: download failed"):
        hf.snapshot_download(
            checkpoint.location,
            revision=checkpoint.commit,
            local_dir=folder,
            allow_patterns=[*names, *_TEXT_FILES],
        )
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch_texts(checkpoint: Checkpoint, scratch: Path) -> Path:
    """Download configuration and tokenizer only (no weights), once per run; return the folder.

    Raises:
        HubError: the download did not succeed.
    """
    folder = scratch / "tokenizers" / checkpoint.series / checkpoint.run
    complete = folder / ".complete"
    if complete.exists():
        return folder
    with _asking(f"{checkpoint.label}: no tokenizer"):
        hf.snapshot_download(
            checkpoint.location, revision=checkpoint.commit, local_dir=folder, allow_patterns=_TEXT_FILES
        )
    complete.touch()
    return folder


def first_line(error: BaseException) -> str:
    """First line of an error's text, or its type's name if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
