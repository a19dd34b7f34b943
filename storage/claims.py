"""Claims: of several processes that measure one series on one root, one at a time has a checkpoint."""

from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from storage.keys import check_name
from storage.leases import Lease
from storage.store import Store

# How often a waiting process looks again, in seconds.
_LOOK = 0.2


class _Right(Protocol):
    def take(self, wait: bool) -> bool: ...

    def drop(self) -> None: ...


class FolderClaim:
    """A lock on a file of this machine, or of a file system that its machines share.

    The system lets it go when its process ends, however it ends.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Taken by the downloading thread, let go by the reader's.
        self._lock = FileLock(path, thread_local=False)

    def take(self, wait: bool) -> bool:
        """Take the lock, waiting for whoever has it if ``wait``; False if another has it."""
        try:
            self._lock.acquire(timeout=-1 if wait else 0, poll_interval=_LOOK)
        except Timeout:
            return False
        return True

    def drop(self) -> None:
        """Let the lock go; harmless if it was not taken."""
        self._lock.release()


class Claim:
    """The right to measure a checkpoint: a lock under ROOT/locks, or a lease there on an S3-compatible store.

    On other object stores nothing can be locked: everybody has the claim, work may be done twice, and the
    results, named by their keys, are the same.
    """

    def __init__(self, store: Store, series: str, run: str, revision: str) -> None:
        parts = (check_name("series", series), check_name("run", run), check_name("revision", revision))
        self._right: _Right | None = None
        if store.is_local:
            self._right = FolderClaim(Path(store.path).joinpath("locks", *parts[:2], f"{parts[2]}.lock"))
        elif store.is_s3:
            self._right = Lease(store.fs, "/".join((store.path, "locks", *parts)))

    def take(self, wait: bool) -> bool:
        """Take the claim, waiting for whoever has it if ``wait``; False if another process has it."""
        return self._right is None or self._right.take(wait)

    def drop(self) -> None:
        """Let the claim go; harmless if it was not taken."""
        if self._right is not None:
            self._right.drop()
