"""One way to reach checkpoints, wherever they lie."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from storage import hub, local
from storage.series import Checkpoint, DirSource, HubSource
from storage.store import Store


@dataclass(frozen=True)
class Listing:
    """What a source offers: checkpoints by run and step, and the names that are no checkpoint's."""

    checkpoints: list[Checkpoint]
    unparsed: list[str]


def list_source(series: str, source: HubSource | DirSource, root: str) -> Listing:
    """List a series' checkpoints; nothing is downloaded.

    Raises:
        UsageError: the source does not exist or holds no checkpoint.
        HubError: the Hub did not answer.
    """
    if isinstance(source, HubSource):
        return Listing(*hub.list_hub(series, source))
    return Listing(*local.list_folder(series, source, root))


def describe(
    checkpoint: Checkpoint, known: Checkpoint | None = None, weights: str | None = None
) -> Checkpoint:
    """Add weight files, sizes and digests, without downloading weights.

    ``known`` is what the store has recorded of it; its digests and pinned commit are reused. ``weights`` are
    the names of weight files in a folder, where they are not those of Hugging Face.

    Raises:
        HubError, DamagedCheckpointError: it cannot be described; the sentence says why.
    """
    if checkpoint.commit is not None:
        return hub.describe_hub(checkpoint, known)
    return local.describe_folder(checkpoint, known, weights)


@contextmanager
def fetched(checkpoint: Checkpoint, scratch: Path) -> Iterator[Path]:
    """The folder of a checkpoint: its own, or a download that is deleted afterwards.

    Raises:
        HubError: the download failed.
    """
    if checkpoint.commit is None:
        yield Path(checkpoint.location)
        return
    with hub.fetched_hub(checkpoint, scratch) as folder:
        yield folder


def tokenizer_folder(checkpoint: Checkpoint, scratch: Path) -> Path:
    """A folder with the checkpoint's tokenizer and configuration; no weights are downloaded for it."""
    return Path(checkpoint.location) if checkpoint.commit is None else hub.fetch_texts(checkpoint, scratch)


def recorded(store: Store, series: str) -> dict[tuple[str, str], Checkpoint]:
    """Checkpoints as the store's catalogue has them, by run and revision."""
    fields = set(Checkpoint.model_fields)
    rows = store.table("checkpoints", series).to_pylist()
    return {
        (row["run"], row["revision"]): Checkpoint(**{k: v for k, v in row.items() if k in fields})
        for row in rows
    }


def record(store: Store, checkpoint: Checkpoint) -> None:
    """Write a checkpoint's row of the catalogue."""
    row = checkpoint.model_dump(exclude={"files"})
    store.write("checkpoints", [row], series=checkpoint.series, run=checkpoint.run, name=checkpoint.revision)
