"""Checkpoints one after another, the next ones downloading meanwhile, within a disk budget.

One thread claims and downloads in order while the reader measures; a download is deleted once the reader is
done with it. Wall time approaches the larger of downloading and measuring, not their sum.
"""

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Event, Thread

from storage.claims import Claim
from storage.errors import OntogenyError
from storage.series import Checkpoint
from storage.sources import download, download_bytes, evict, folder_of
from storage.store import Store

# Left free on the disk, whatever the budget says: tables, logs and other programs need some.
_RESERVE = 500_000_000


class DiskBudget:
    """Bytes that downloads may hold on disk together.

    :meth:`reserve` waits until enough are given back; where nothing ever is (``lasting``: downloads are
    kept), it raises instead.
    """

    def __init__(self, limit: int | None, folder: Path, lasting: bool = False) -> None:
        self.limit = limit
        self._lasting = lasting
        self.used = 0
        self._folder = folder
        self._changed = Condition()
        self._closed = False

    def reserve(self, size: int, label: str) -> None:
        """Take ``size`` bytes, waiting for evictions.

        Raises:
            OntogenyError: one checkpoint alone is over the budget, the disk is full, or the walk was ended.
        """
        if self.limit is not None and size > self.limit:
            raise OntogenyError(f"{label} needs {size:,} bytes, more than the disk budget of {self.limit:,}")
        with self._changed:
            if self._lasting and not self._fits(size):
                raise OntogenyError(
                    f"{label} needs {size:,} bytes, and the downloads kept hold {self.used:,} of the disk "
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


@dataclass(frozen=True)
class Arrival:
    """One checkpoint in its turn: its folder, or the error that kept it away.

    Neither means that it is not needed any more: another process has measured it.
    """

    checkpoint: Checkpoint
    folder: Path | None = None
    error: Exception | None = None


class _Busy(Exception):  # noqa: N818  (a turn of events, not an error)
    """Another process has the checkpoint."""


@dataclass
class _Order:
    checkpoint: Checkpoint
    claim: Claim
    wait: bool
    arrived: Future[Path | None]
    size: int = 0


class Window:
    """Walk over checkpoints with at most ``ahead`` of them downloaded or downloading beyond the current one.

    Args:
        store: where claims are kept.
        scratch: folder that receives downloads, as SERIES/RUN/REVISION.
        ahead: checkpoints prefetched.
        budget: bytes that downloads may hold on disk together; None: as many as the window needs.
        keep: leave downloads on disk; they go on counting.
    """

    def __init__(
        self, store: Store, scratch: Path, ahead: int = 2, budget: int | None = None, keep: bool = False
    ) -> None:
        self._store = store
        self._scratch = scratch
        self._ahead = ahead
        self._keep = keep
        scratch.mkdir(parents=True, exist_ok=True)
        self.budget = DiskBudget(budget, scratch, lasting=keep)
        self._stop = Event()

    def walk(
        self, checkpoints: Sequence[Checkpoint], needed: Callable[[Checkpoint], bool]
    ) -> Iterator[Arrival]:
        """Yield every checkpoint with its folder, or what became of it; it is evicted when the next is asked.

        ``needed`` is asked once a checkpoint is claimed, before it is downloaded. Those that another process
        has come last, when it is done with them.
        """
        if not self._keep:
            self._evict_leftovers(checkpoints)
        busy: list[Checkpoint] = []
        for wait, members in ((False, checkpoints), (True, busy)):
            for arrival in self._pass(members, needed, wait):
                if isinstance(arrival.error, _Busy):
                    busy.append(arrival.checkpoint)
                else:
                    yield arrival

    def _pass(
        self, checkpoints: Sequence[Checkpoint], needed: Callable[[Checkpoint], bool], wait: bool
    ) -> Iterator[Arrival]:
        orders: SimpleQueue[_Order | None] = SimpleQueue()
        # A daemon: an interrupt need not wait for a transfer to end.
        Thread(target=self._serve, args=(orders, needed), daemon=True, name="download").start()
        waiting, coming = deque(checkpoints), deque[_Order]()
        try:
            while waiting or coming:
                while waiting and len(coming) <= self._ahead:
                    checkpoint = waiting.popleft()
                    order = _Order(
                        checkpoint,
                        Claim(self._store, checkpoint.series, checkpoint.run, checkpoint.revision),
                        wait,
                        Future(),
                    )
                    coming.append(order)
                    orders.put(order)
                order = coming[0]
                try:
                    arrival = Arrival(order.checkpoint, folder=order.arrived.result())
                except Exception as error:  # whatever kept it away is the reader's to record
                    arrival = Arrival(order.checkpoint, error=error)
                yield arrival
                self._finish(coming.popleft())
        finally:
            if coming:
                self._stop.set()
                self.budget.close()
                for order in coming:
                    if order.arrived.done():
                        self._finish(order)
            orders.put(None)

    def _serve(self, orders: "SimpleQueue[_Order | None]", needed: Callable[[Checkpoint], bool]) -> None:
        while (order := orders.get()) is not None:
            try:
                order.arrived.set_result(self._bring(order, needed))
            except BaseException as error:  # the reader waits for this: it must hear of everything
                order.arrived.set_exception(error)

    def _bring(self, order: _Order, needed: Callable[[Checkpoint], bool]) -> Path | None:
        checkpoint = order.checkpoint
        if not order.claim.take(order.wait):
            raise _Busy
        if not needed(checkpoint):
            return None
        if checkpoint.commit is None:
            return Path(checkpoint.location)
        folder = folder_of(checkpoint, self._scratch)
        size = download_bytes(checkpoint)
        self.budget.reserve(size, checkpoint.label)
        order.size = size
        download(checkpoint, folder, self._stop)
        return folder

    def _finish(self, order: _Order) -> None:
        if order.size and not self._keep:
            evict(folder_of(order.checkpoint, self._scratch))
            self.budget.release(order.size)
        order.claim.drop()

    def _evict_leftovers(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Delete what killed runs left, but for the first few checkpoints, whose downloads go on from it."""
        soon = {folder_of(c, self._scratch) for c in checkpoints[: self._ahead + 1]}
        for series in {c.series for c in checkpoints}:
            for folder in self._scratch.glob(f"{series}/*/*"):
                claim = Claim(self._store, series, folder.parent.name, folder.name)
                if folder not in soon and claim.take(wait=False):
                    evict(folder)
                    claim.drop()
