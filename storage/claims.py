"""Claims: of several processes that measure one series on one root, one at a time has a checkpoint."""

from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from storage.keys import check_name
from storage.store import Store

# How often a waiting process looks again, in seconds.
_LOOK = 0.2


class Claim:
    """The right to measure a checkpoint: a lock under ROOT/locks.

    The system lets it go when its process ends, however it ends. On object stores nothing can be locked:
    everybody has the claim, work may be done twice, and the results, named by their keys, are the same.
    """

    def __init__(self, store: Store, series: str, run: str, revision: str) -> None:
        self._lock: BaseFileLock | None = None
        if store.is_local:
            folder = Path(store.path) / "locks" / check_name("series", series) / check_name("run", run)
            folder.mkdir(parents=True, exist_ok=True)
            # Taken by the downloading thread, let go by the reader's.
            self._lock = FileLock(folder / f"{check_name('revision', revision)}.lock", thread_local=False)

    def take(self, wait: bool) -> bool:
        """Take the claim, waiting for whoever has it if ``wait``; False if another process has it."""
        if self._lock is None:
            return True
        try:
            self._lock.acquire(timeout=-1 if wait else 0, poll_interval=_LOOK)
        except Timeout:
            return False
        return True

    def drop(self) -> None:
        """Let the claim go; harmless if it was not taken."""
        if self._lock is not None:
            self._lock.release()
