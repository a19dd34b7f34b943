"""Downloads on disk: each stays until its last reader is done with it, all together within a budget."""

import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event

from storage.claims import FolderClaim
from storage.errors import NoAnswerError, OntogenyError
from storage.series import Checkpoint
from storage.sources import download, download_bytes, evict, folder_of

# Left free on the disk, whatever the budget says: tables, logs and other programs need some.
_RESERVE = 500_000_000
# Downloads in a row that got no answer after all their tries; what comes after them is not asked for.
_SILENT = 3


class DiskBudget:
    """Bytes that downloads, or pools, may hold on disk together.

    :meth:`reserve` waits until enough are given back; where nothing ever is (``lasting``: what stays on disk,
    in words), it raises instead. ``used`` are held from the beginning.
    """

    def __init__(self, limit: int | None, folder: Path, lasting: str | None = None, used: int = 0) -> None:
        self.limit = limit
        self._lasting = lasting
        self.used = used
        self._folder = folder
        self._changed = Condition()
        self._closed = False

    def check(self, size: int, label: str) -> None:
        """Refuse what would not fit even alone.

        Raises:
            OntogenyError: ``size`` is over the budget.
        """
        if self.limit is not None and size > self.limit:
            raise OntogenyError(f"{label} needs {size:,} bytes, more than the disk budget of {self.limit:,}")

    def reserve(self, size: int, label: str) -> None:
        """Take ``size`` bytes, waiting for evictions.

        Raises:
            OntogenyError: one checkpoint alone is over the budget, the disk is full, or the walk was ended.
        """
        self.check(size, label)
        with self._changed:
            if self._lasting and not self._fits(size):
                raise OntogenyError(
                    f"{label} needs {size:,} bytes, and {self._lasting} hold {self.used:,} of the disk "
                    f"budget of {self.limit:,}"
                )
            self._changed.wait_for(lambda: self._closed or self._fits(size))
            if self._closed:
                raise OntogenyError(f"{label}: the download was called off")
            free = shutil.disk_usage(self._folder).free
            if free < size + _RESERVE:
                raise OntogenyError(f"{label} needs {size:,} bytes, and the disk has {free:,} free")
            self.used += size

    def _fits(self, size: int) -> bool:
        return self.limit is None or self.used + size <= self.limit

    def release(self, size: int) -> None:
        """Give bytes back."""
        with self._changed:
            self.used -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass
class _Held:
    checkpoint: Checkpoint
    readers: int = 0
    folder: Path | None = None
    size: int = 0
    claim: FolderClaim | None = None


class Shelf:
    """The folders that a walk reads from.

    Readers are announced first (:meth:`expect`), so that a folder which a later checkpoint is compared with
    is still there. One thread opens; any may say that it is done.
    """

    def __init__(self, scratch: Path, budget: int | None, keep: bool) -> None:
        self._scratch = scratch
        self._keep = keep
        scratch.mkdir(parents=True, exist_ok=True)
        self.budget = DiskBudget(budget, scratch, "the downloads kept" if keep else None)
        self._held: dict[str, _Held] = {}
        self._stop = Event()
        self._silent = 0

    def expect(self, checkpoint: Checkpoint) -> None:
        """Announce one more reader of a checkpoint."""
        held = self._held.setdefault(checkpoint.label, _Held(checkpoint))
        held.readers += 1

    def check(self, checkpoints: list[Checkpoint]) -> None:
        """Refuse checkpoints that are needed together and do not fit into the budget together.

        Raises:
            OntogenyError: they do not fit; waiting would never end.
            HubError, DamagedCheckpointError: the size of one could not be found out.
        """
        together = {c.label: c for c in checkpoints}.values()
        label = checkpoints[0].label
        if len(together) > 1:
            label += f" with the {len(together) - 1} it is compared with"
        self.budget.check(sum(download_bytes(c) for c in together), label)

    def open(self, checkpoint: Checkpoint) -> Path:
        """The folder of an expected checkpoint, downloaded unless it is there; waits for the budget.

        Raises:
            OntogenyError: over the budget, the disk is full, or the shelf was closed.
            HubError, DamagedCheckpointError: the download failed.
            NoAnswerError: it failed so, or the Hub has been silent for a while and was not asked.
        """
        if checkpoint.commit is None:
            return Path(checkpoint.location)
        held = self._held[checkpoint.label]
        if held.folder is None:
            if self._silent >= _SILENT:
                raise NoAnswerError(
                    f"{checkpoint.label} was not asked for: the Hub gave no answer {_SILENT} times in a row"
                )
            size = download_bytes(checkpoint)
            self.budget.reserve(size, checkpoint.label)
            held.size = size
            held.folder = folder = self._place(held)
            try:
                download(checkpoint, folder, self._stop)
            except BaseException as error:
                self._silent = self._silent + 1 if isinstance(error, NoAnswerError) else 0
                self._away(held, delete=not self._stop.is_set())
                raise
            self._silent = 0
        return held.folder

    def _place(self, held: _Held) -> Path:
        """The checkpoint's folder, or one of our own where another process reads the checkpoint's."""
        folder = folder_of(held.checkpoint, self._scratch)
        if self._keep:
            return folder
        name = f"{folder.name}-{os.getpid()}"
        # The last one is for the second walk of a process.
        for place in (folder, folder.with_name(name), folder.with_name(f"{name}-{uuid.uuid4().hex[:8]}")):
            claim = self._claim(place)
            if claim.take(wait=False):
                held.claim = claim
                return place
        raise OntogenyError(f"{held.checkpoint.label}: {str(folder)!r} is in use twice by this process")

    def _claim(self, folder: Path) -> FolderClaim:
        """A lock beside the scratch folder, on this machine's disk wherever the tables are."""
        series, run, name = folder.parts[-3:]
        return FolderClaim(self._scratch.with_name("locks") / series / run / f"{name}.folder.lock")

    def done(self, checkpoint: Checkpoint) -> None:
        """One reader of a checkpoint less; the last one's leaving deletes the download."""
        held = self._held[checkpoint.label]
        held.readers -= 1
        if held.readers > 0:
            return
        del self._held[checkpoint.label]
        if not self._keep:
            self._away(held, delete=True)

    def _away(self, held: _Held, delete: bool) -> None:
        if held.folder is None:
            return
        if delete:
            evict(held.folder)
        self.budget.release(held.size)
        held.folder, held.size = None, 0
        if held.claim is not None:
            held.claim.drop()
            held.claim = None

    def close(self) -> None:
        """End transfers and waiting; a download that is cut off stays for the next call to go on with."""
        self._stop.set()
        self.budget.close()

    def evict_leftovers(self, checkpoints: Sequence[Checkpoint], soon: int) -> None:
        """Delete what killed runs left, but for the first ``soon``, whose downloads go on from it."""
        if self._keep:
            return
        spared = {folder_of(c, self._scratch) for c in checkpoints[:soon]}
        for series in {c.series for c in checkpoints}:
            for folder in self._scratch.glob(f"{series}/*/*"):
                if folder not in spared:
                    claim = self._claim(folder)
                    if claim.take(wait=False):
                        evict(folder)
                        claim.drop()
