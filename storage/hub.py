"""Checkpoints on the Hugging Face Hub or a mirror of it: list, pin, describe, download, evict.

``HF_TOKEN`` gives access to gated and private repositories, ``HF_ENDPOINT`` names a mirror; how long a
request is tried, see :class:`storage.transfer.Patience`.
"""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any
from urllib.parse import quote, urlencode

from filelock import FileLock
from huggingface_hub.errors import RepositoryNotFoundError

from storage.claims import FolderClaim
from storage.errors import DamagedCheckpointError, HubError, UsageError
from storage.keys import digest, text_digests, weights_sha256
from storage.local import HEADER_LIMIT, usual_dtype
from storage.series import PLACE, Checkpoint, HubSource, WeightFile, parse_name
from storage.transfer import RemoteFile, endpoint, fetch, first_bytes, get_pages, part_of

# transformers would otherwise ask a conversion service about every .bin repository.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

_TEXT_FILES = ("*.json", "*.txt", "*.model")
_WEIGHTS = (("model", "safetensors"), ("pytorch_model", "bin"))
_CONNECTIONS = 4
# In every folder that a download made: nothing else is ever evicted.
_OURS = ".ontogeny-download"
_HEADER_GUESS = 1 << 16


def list_hub(series: str, source: HubSource) -> tuple[list[Checkpoint], list[str]]:
    """Checkpoints of all repositories in order of run and step, and the names that did not parse.

    Every branch, or every repository where each checkpoint has one, comes with the commit it points to: one
    request per run, and one more for each further page. Ingredients of a later stage are runs of their own
    (``RUN-stage2-ingredient1``), because their steps count anew.

    Raises:
        UsageError: a repository does not exist or has no checkpoint branch, or none is of the form given.
        HubError: the Hub did not answer.
    """
    found: list[Checkpoint] = []
    unparsed: list[str] = []
    for run, repo in source.repos.items():
        each = PLACE in repo
        here = []
        for name, commit, location in _repositories(repo) if each else _branches(repo):
            parsed = parse_name(name, source)
            if parsed is None:
                unparsed.append(f"{run}/{name}")
                continue
            here.append(
                Checkpoint(
                    series=series,
                    run=parsed.run_of(run),
                    step=parsed.step,
                    stage=parsed.stage,
                    tokens=parsed.tokens,
                    revision=name,
                    commit=commit,
                    location=location,
                )
            )
        if not here:
            what = "there is no repository" if each else "repository"
            lacks = f"whose {PLACE} is" if each else "has no branch"
            raise UsageError(f"{what} {repo!r} {lacks} of the form {source.pattern!r}")
        found += sorted(here, key=lambda c: (c.run, c.stage or 0, c.step))
    return found, unparsed


def _branches(repo: str) -> list[tuple[str, str, str]]:
    """Name, commit and repository of every branch."""
    what = f"{repo}: the Hub did not list branches"
    try:
        pages = get_pages(f"api/models/{repo}/refs", what)
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            # A gated one is of this type too; the sentence says which it is.
            reason = str(error).partition(": the Hub did not list branches: ")[2]
            raise UsageError(f"repository {repo!r} cannot be listed: {reason}") from None
        raise
    try:
        return [(b["name"], b["targetCommit"], repo) for page in pages for b in page["branches"]]
    except (KeyError, TypeError):
        raise HubError(f"{what}: the answer is not of the Hub's form") from None


def _repositories(form: str) -> list[tuple[str, str, str]]:
    """Of every repository of the form: what stands for the checkpoint, the commit of main, and its name.

    The Hub is asked for the owner's models whose names contain the longer fixed part, and answers in pages.
    """
    owner, _, name = form.partition("/")
    before, _, after = name.partition(PLACE)
    asked = {"author": owner, "search": max(before, after, key=len), "expand": "sha"}
    what = f"{form}: the Hub did not list repositories"
    pages = get_pages(f"api/models?{urlencode({k: v for k, v in asked.items() if v})}", what)
    pattern = re.compile(f"{re.escape(f'{owner}/{before}')}(.+){re.escape(after)}")
    try:
        models = [(str(model["id"]), model.get("sha")) for page in pages for model in page]
    except (KeyError, TypeError, AttributeError):
        raise HubError(f"{what}: the answer is not of the Hub's form") from None
    found = []
    for repo, commit in sorted(models):
        match = pattern.fullmatch(repo)
        if match is None:
            continue
        if not isinstance(commit, str):
            raise HubError(f"{what}: it did not say the commit of {repo!r}")
        found.append((match[1], commit, repo))
    return found


def describe_hub(
    checkpoint: Checkpoint,
    known: Checkpoint | None = None,
    dtype: bool = False,
    weights: str | None = None,
) -> Checkpoint:
    """Add weight files with sizes and LFS digests, from the Hub's metadata at the pinned commit.

    A checkpoint already recorded keeps the commit it was pinned to, whatever its branch says now. With
    ``dtype``, the header of its first safetensors file is read too, by one or two small ranged requests.
    ``weights`` are the files' names where they are not those of Hugging Face.

    Raises:
        HubError: the Hub did not answer.
        DamagedCheckpointError: there are no weights at that commit, or not all of them.
    """
    if known is not None and known.weights_sha256 and known.location == checkpoint.location:
        checkpoint = checkpoint.model_copy(update={"commit": known.commit})
        # Without files it was recorded before their digests were: described anew, at the same commit.
        complete = known.files and known.fingerprint == _fingerprint(checkpoint, weights)
        if complete and (known.dtype is not None or not dtype):
            return checkpoint.described_as(known)
    entries = tree(checkpoint, deep=weights is not None and "/" in weights)
    chosen = _weights(checkpoint, entries) if weights is None else _like(checkpoint, entries, weights)
    files = tuple(WeightFile(name=file.name, bytes=file.bytes, sha256=file.sha256) for file in chosen)
    update: dict[str, Any] = dict(
        text_digests(lambda name: entries[name].digest if name in entries else None)
    )
    update["text_bytes"] = sum(file.bytes for file in _texts(entries, chosen))
    if dtype:
        update["dtype"] = _stored_dtype(checkpoint, files[0].name)
    described = checkpoint.described(files, _fingerprint(checkpoint, weights))
    return described.model_copy(update=update)


def _fingerprint(checkpoint: Checkpoint, weights: str | None) -> str | None:
    """The commit, with the names of weight files where they are a person's own."""
    return checkpoint.commit if weights is None else digest([checkpoint.commit, weights])


def tree(checkpoint: Checkpoint, deep: bool = False) -> dict[str, RemoteFile]:
    """Files at the pinned commit, by name, with sizes and digests: one request, and one per further page.

    Those at the top, or those in folders too if ``deep``.

    Raises:
        HubError: the Hub did not answer.
    """
    what = f"{checkpoint.label}: the Hub did not list files"
    path = f"api/models/{checkpoint.location}/tree/{checkpoint.commit}"
    pages = get_pages(f"{path}?recursive=true" if deep else path, what)
    try:
        found = [_remote(entry) for page in pages for entry in page if entry["type"] == "file"]
    except (KeyError, TypeError, ValueError):
        raise HubError(f"{what}: the answer is not of the Hub's form") from None
    return {file.name: file for file in found if _is_plain(file.name, deep)}


def _is_plain(name: str, deep: bool) -> bool:
    """A name is joined to a folder's path: it must not lead elsewhere, nor hide."""
    parts = name.split("/")
    return (deep or len(parts) == 1) and not any(part == "" or part.startswith(".") for part in parts)


def _remote(entry: dict[str, Any]) -> RemoteFile:
    lfs = entry.get("lfs")
    sha256 = str(lfs["oid"]).removeprefix("sha256:") if lfs else None
    size = int(lfs["size"] if lfs else entry["size"])
    return RemoteFile(str(entry["path"]), size, sha256, str(entry["oid"]))


def _weights(checkpoint: Checkpoint, entries: dict[str, RemoteFile]) -> list[RemoteFile]:
    """Weight files, safetensors preferred.

    Raises:
        DamagedCheckpointError: there are none, a shard is absent, or a file is not kept in LFS (which is how
            a pointer committed in place of weights looks).
    """
    for stem, suffix in _WEIGHTS:
        shards = [re.fullmatch(rf"{stem}-(\d+)-of-(\d+)\.{suffix}", name) for name in sorted(entries)]
        found = [shard for shard in shards if shard is not None]
        for shard in found:
            if len(found) != int(shard[2]):
                text = f"{checkpoint.label}: {len(found)} of {int(shard[2])} shards are there"
                raise DamagedCheckpointError(text, "missing-shard")
        single = f"{stem}.{suffix}"
        names = [shard[0] for shard in found] or ([single] if single in entries else [])
        if names:
            return _sound(checkpoint, [entries[name] for name in names])
    raise DamagedCheckpointError(f"{checkpoint.label}: no weights at commit {checkpoint.commit}")


def _like(checkpoint: Checkpoint, entries: dict[str, RemoteFile], pattern: str) -> list[RemoteFile]:
    """Weight files by a pattern in which each ``/`` is one folder, as in a folder here.

    Raises:
        DamagedCheckpointError: there are none, or one is not kept in LFS.
    """
    parts = PurePosixPath(pattern).parts

    def fits(name: str) -> bool:
        given = name.split("/")
        return len(given) == len(parts) and all(map(fnmatchcase, given, parts))

    found = [entries[name] for name in sorted(entries) if fits(name)]
    if not found:
        text = f"{checkpoint.label}: no weights ({pattern}) at commit {checkpoint.commit}"
        raise DamagedCheckpointError(text)
    return _sound(checkpoint, found)


def _sound(checkpoint: Checkpoint, files: list[RemoteFile]) -> list[RemoteFile]:
    for file in files:
        if file.sha256 is None:
            text = f"{checkpoint.label}: {file.name!r} is not kept in LFS, so it is no weights file"
            raise DamagedCheckpointError(text, "lfs-pointer")
        if file.bytes == 0:
            raise DamagedCheckpointError(f"{checkpoint.label}: {file.name!r} is empty")
    return files


def _texts(entries: dict[str, RemoteFile], weights: list[RemoteFile]) -> list[RemoteFile]:
    """Configuration and tokenizer: files at the top that are no weights."""
    names = {file.name for file in weights}
    texts = (file for file in entries.values() if "/" not in file.name and file.name not in names)
    return [file for file in texts if any(fnmatch(file.name, p) for p in _TEXT_FILES)]


def _needed(checkpoint: Checkpoint) -> tuple[list[RemoteFile], list[RemoteFile]]:
    """Weights and texts of a checkpoint: the weights that it is described with, else those of HF names.

    Raises:
        HubError: the Hub did not answer.
        DamagedCheckpointError: there are no weights at that commit, or not all of them.
    """
    names = [file.name for file in checkpoint.files]
    entries = tree(checkpoint, deep=any("/" in name for name in names))
    for name in names:
        if name not in entries:
            text = f"{checkpoint.label}: {name!r} is not at commit {checkpoint.commit} any more"
            raise DamagedCheckpointError(text)
    weights = [entries[name] for name in names] or _weights(checkpoint, entries)
    return weights, _texts(entries, weights)


def _address(checkpoint: Checkpoint, name: str) -> str:
    return f"{endpoint()}/{checkpoint.location}/resolve/{checkpoint.commit}/{quote(name)}"


def _stored_dtype(checkpoint: Checkpoint, name: str) -> str | None:
    """The dtype of most tensors of a safetensors file on the Hub; None for another format."""
    if not name.endswith(".safetensors"):
        return None
    url, what = _address(checkpoint, name), f"{checkpoint.label}: the header of {name!r} was not read"
    data = first_bytes(url, _HEADER_GUESS, what)
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= HEADER_LIMIT:
        raise DamagedCheckpointError(f"{checkpoint.label}: {name!r} is no safetensors file")
    if len(data) < 8 + length:
        data = first_bytes(url, 8 + length, what)
    try:
        header = json.loads(data[8 : 8 + length])
        return usual_dtype(entry for key, entry in header.items() if key != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpointError(f"{checkpoint.label}: {name!r} is no safetensors file") from None


def download_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that :func:`download` takes on disk: weights, configuration and tokenizer.

    No request for a described checkpoint, one for another.

    Raises:
        HubError: the Hub did not answer.
        DamagedCheckpointError: there are no weights at that commit, or not all of them.
    """
    if checkpoint.bytes is not None and checkpoint.text_bytes is not None:
        return checkpoint.bytes + checkpoint.text_bytes
    weights, texts = _needed(checkpoint)
    return sum(file.bytes for file in [*weights, *texts])


def download(checkpoint: Checkpoint, folder: Path, stop: Event | None = None) -> None:
    """Download a checkpoint into ``folder``: on return it is complete, and every file's digest is right.

    A file has its name only once it is verified, so whatever a kill leaves behind is never taken for whole.
    The next call goes on where a failed or killed one stopped. Two processes take turns. ``stop``, once
    set, ends it with a HubError.

    Raises:
        HubError: the Hub did not answer; what has come is kept for the next call.
        DamagedCheckpointError: what the Hub serves is not what its metadata say, or not what was recorded;
            the wrong file is deleted.
    """
    weights, texts = _needed(checkpoint)
    found = weights_sha256((file.name, file.digest) for file in weights)
    if checkpoint.weights_sha256 not in (None, found):
        text = f"{checkpoint.label}: weights were announced as {checkpoint.weights_sha256}, now as {found}"
        raise DamagedCheckpointError(text)
    _fetch_all(checkpoint, [*weights, *texts], folder, stop)


def _fetch_all(checkpoint: Checkpoint, files: list[RemoteFile], folder: Path, stop: Event | None) -> None:
    given_up = Event()

    def stopped() -> bool:
        return given_up.is_set() or (stop is not None and stop.is_set())

    folder.mkdir(parents=True, exist_ok=True)
    (folder / _OURS).touch()
    with FileLock(folder / ".lock"):
        current = {part_of(folder, file) for file in files}
        for stale in set(folder.rglob(".*.part")) - current:
            stale.unlink()
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            what = f"{checkpoint.label}: download failed"
            jobs = [
                pool.submit(fetch, _address(checkpoint, f.name), f, folder, f"{what}: {f.name!r}", stopped)
                for f in files
            ]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                # Otherwise the pool would finish gigabytes before an error or Ctrl-C came through.
                given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def evict(folder: Path) -> None:
    """Delete a downloaded checkpoint; a folder that :func:`download` did not make is left alone."""
    if (folder / _OURS).is_file():
        shutil.rmtree(folder, ignore_errors=True)


def folder_of(checkpoint: Checkpoint, scratch: Path) -> Path:
    """Where a checkpoint is downloaded to."""
    return scratch / checkpoint.series / checkpoint.run / checkpoint.revision


def fetch_texts(checkpoint: Checkpoint, scratch: Path) -> Path:
    """Download configuration and tokenizer only (no weights), once per run; return the folder.

    Raises:
        HubError: the download did not succeed.
        DamagedCheckpointError: what the Hub serves is not what its metadata say.
    """
    folder = scratch / "tokenizers" / checkpoint.series / checkpoint.run
    complete = folder / ".complete"
    if not complete.exists():
        claim = FolderClaim(folder.with_name(f"{folder.name}.lock"))
        claim.take(wait=True)  # several workers of a machine begin at the same time
        try:
            if not complete.exists():
                _fetch_all(checkpoint, _texts(tree(checkpoint), []), folder, None)
                complete.touch()
        finally:
            claim.drop()
    return folder
