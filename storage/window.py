"""Checkpoints one after another, the next ones downloading meanwhile, within a disk budget.

One thread claims and downloads in order while the reader measures; a download is deleted once its last reader
is done with it. Wall time approaches the larger of downloading and measuring, not their sum.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from storage.claims import Claim
from storage.series import Checkpoint
from storage.shelf import Shelf
from storage.store import Store


@dataclass(frozen=True)
class Arrival:
    """One checkpoint in its turn: its folder, or the error that kept it away.

    Neither means that it is not needed any more: another process has measured it. ``others`` has, by label,
    the folders of the checkpoints that it is compared with, or the error that kept one away.
    """

    checkpoint: Checkpoint
    folder: Path | None = None
    error: Exception | None = None
    others: Mapping[str, Path | Exception] = field(default_factory=dict)


class _Busy(Exception):  # noqa: N818  (a turn of events, not an error)
    """Another process has the checkpoint."""


@dataclass
class _Order:
    checkpoint: Checkpoint
    compared: Sequence[Checkpoint]
    claim: Claim
    wait: bool
    arrived: Future[Path | None]
    others: dict[str, Path | Exception] = field(default_factory=dict)


class Window:
    """Walk over checkpoints with at most ``ahead`` of them downloaded or downloading beyond the current one.

    Args:
        store: where claims are kept.
        scratch: folder that receives downloads, as SERIES/RUN/REVISION.
        ahead: checkpoints prefetched.
        budget: bytes that downloads may hold on disk together; None: as many as the window needs.
        keep: leave downloads on disk; they go on counting.
        compared: the other checkpoints that one is compared with; their folders are held for it.
    """

    def __init__(
        self,
        store: Store,
        scratch: Path,
        ahead: int = 2,
        budget: int | None = None,
        keep: bool = False,
        compared: Callable[[Checkpoint], Sequence[Checkpoint]] = lambda checkpoint: (),
    ) -> None:
        self._store = store
        self._ahead = ahead
        self._compared = compared
        self._shelf = Shelf(scratch, budget, keep)

    def walk(
        self, checkpoints: Sequence[Checkpoint], needed: Callable[[Checkpoint], bool]
    ) -> Iterator[Arrival]:
        """Yield every checkpoint with its folder, or what became of it.

        Its download is deleted when the next one is asked for, unless a later one is compared with it.
        ``needed`` is asked once a checkpoint is claimed, before it is downloaded. Those that another process
        has come last, when it is done with them.
        """
        self._shelf.evict_leftovers(checkpoints, self._ahead + 1)
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
        waiting = deque(self._order(checkpoint, wait) for checkpoint in checkpoints)
        coming: deque[_Order] = deque()
        orders: SimpleQueue[_Order | None] = SimpleQueue()
        # A daemon: an interrupt need not wait for a transfer to end.
        Thread(target=self._serve, args=(orders, needed), daemon=True, name="download").start()
        try:
            while waiting or coming:
                while waiting and len(coming) <= self._ahead:
                    coming.append(waiting.popleft())
                    orders.put(coming[-1])
                order = coming[0]
                try:
                    folder = order.arrived.result()
                    arrival = Arrival(order.checkpoint, folder, others=order.others)
                except Exception as error:  # whatever kept it away is the reader's to record
                    arrival = Arrival(order.checkpoint, error=error)
                yield arrival
                self._finish(coming.popleft())
        finally:
            if coming:
                self._shelf.close()
                for order in (*(order for order in coming if order.arrived.done()), *waiting):
                    self._finish(order)
            orders.put(None)

    def _order(self, checkpoint: Checkpoint, wait: bool) -> _Order:
        compared = self._compared(checkpoint)
        for needed in (checkpoint, *compared):
            self._shelf.expect(needed)
        claim = Claim(self._store, checkpoint.series, checkpoint.run, checkpoint.revision)
        return _Order(checkpoint, compared, claim, wait, Future())

    def _serve(self, orders: "SimpleQueue[_Order | None]", needed: Callable[[Checkpoint], bool]) -> None:
        while (order := orders.get()) is not None:
            try:
                order.arrived.set_result(self._bring(order, needed))
            except BaseException as error:  # the reader waits for this: it must hear of everything
                order.arrived.set_exception(error)

    def _bring(self, order: _Order, needed: Callable[[Checkpoint], bool]) -> Path | None:
        if not order.claim.take(order.wait):
            raise _Busy
        if not needed(order.checkpoint):
            return None
        self._shelf.check([order.checkpoint, *order.compared])
        for other in order.compared:
            try:
                order.others[other.label] = self._shelf.open(other)
            except Exception as error:  # it keeps the comparison away, not the checkpoint
                order.others[other.label] = error
        return self._shelf.open(order.checkpoint)

    def _finish(self, order: _Order) -> None:
        for held in (order.checkpoint, *order.compared):
            self._shelf.done(held)
        order.claim.drop()
