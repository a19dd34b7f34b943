"""Checkpoints on the Hugging Face Hub, through its own client: list, pin, describe, fetch."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub as hf
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from storage.errors import OntogenyError, UsageError
from storage.series import Checkpoint, HubSource, WeightFile, parse_name

# transformers would otherwise ask a conversion service about every .bin repository.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

_TEXT_FILES = ["*.json", "*.txt", "*.model"]


class HubError(OntogenyError):
    """The Hub did not give what was asked for; the sentence says what and where."""


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
        try:
            branches = hf.HfApi().list_repo_refs(repo).branches
        except RepositoryNotFoundError:
            raise UsageError(
                f"repository {repo!r} does not exist on the Hub, or is not yours to read"
            ) from None
        except (HfHubHTTPError, OSError) as error:
            raise HubError(f"{repo}: the Hub did not list branches: {first_line(error)}") from error
        here = []
        for branch in branches:
            parsed = parse_name(branch.name, source)
            if parsed is None:
                unparsed.append(f"{run}/{branch.name}")
                continue
            ingredient = f"-stage{parsed.stage}-ingredient{parsed.ingredient}" if parsed.ingredient else ""
            here.append(
                Checkpoint(
                    series=series,
                    run=run + ingredient,
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
        return known
    return checkpoint.described(weight_files(checkpoint), checkpoint.commit)


def weight_files(checkpoint: Checkpoint) -> tuple[WeightFile, ...]:
    """Weight files at the pinned commit, safetensors preferred, with sizes and LFS digests.

    Raises:
        HubError: the Hub did not answer, or the repository has no weights at that commit.
    """
    try:
        tree = list(hf.HfApi().list_repo_tree(checkpoint.location, revision=checkpoint.commit))
    except (HfHubHTTPError, OSError) as error:
        raise HubError(f"{checkpoint.label}: the Hub did not list files: {first_line(error)}") from error
    entries = [entry for entry in tree if isinstance(entry, hf.RepoFile)]
    for suffix in (".safetensors", ".bin"):
        stems = ("model", "pytorch_model")
        chosen = [e for e in entries if e.path.endswith(suffix) and e.path.startswith(stems)]
        if chosen:
            return tuple(
                WeightFile(name=e.path, bytes=e.size, sha256=e.lfs.sha256 if e.lfs else None) for e in chosen
            )
    raise HubError(f"{checkpoint.label}: no weights at commit {checkpoint.commit}")


@contextmanager
def fetched_hub(checkpoint: Checkpoint, scratch: Path) -> Iterator[Path]:
    """Download a checkpoint into ``scratch``, yield its folder, and delete it afterwards.

    Raises:
        HubError: the download did not succeed after the client's own retries.
    """
    folder = scratch / checkpoint.series / checkpoint.run / checkpoint.revision
    names = [file.name for file in checkpoint.files or weight_files(checkpoint)]
    try:
        hf.snapshot_download(
            checkpoint.location,
            revision=checkpoint.commit,
            local_dir=folder,
            allow_patterns=[*names, *_TEXT_FILES],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise HubError(f"{checkpoint.label}: download failed: {first_line(error)}") from error
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
    try:
        hf.snapshot_download(
            checkpoint.location, revision=checkpoint.commit, local_dir=folder, allow_patterns=_TEXT_FILES
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise HubError(f"{checkpoint.label}: no tokenizer: {first_line(error)}") from error
    complete.touch()
    return folder


def first_line(error: BaseException) -> str:
    """First line of an error's text, or its type's name if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
