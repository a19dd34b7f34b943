"""Leases: claims on an S3-compatible store, which knows no locks but puts an object only under a condition.

A lease is one object. Whoever creates it (``If-None-Match: *``) has the claim and writes it anew while it has
it. One that nobody wrote anew for a while belongs to a process that ended: another replaces it, on condition
that it is still the same (``If-Match``). No clock of another machine is read.
"""

import time
import uuid
from threading import Event, Lock, Thread
from typing import Any

# Seconds without a sign of life after which a lease is taken over, and seconds between two signs.
LEASE = 60.0
BEAT = 15.0
# How often a waiting process looks again, in seconds.
_LOOK = 1.0
# What a service answers that has no conditional writes: then everybody has the claim, as without leases.
_UNCONDITIONAL = "NotImplemented"
_REFUSED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")

# By path, the version last seen of another's lease, and since when.
_seen: dict[str, tuple[str, float]] = {}


class Lease:
    """The claim that is the object ``path`` on ``fs``, a file system of s3fs.

    Should its holder be silent for :data:`LEASE` seconds and live, another may take it over: work is then
    done twice, with equal results.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        self._bucket, self._key, _ = fs.split_path(path)
        self._version: str | None = None
        self._writing = Lock()
        self._stop = Event()

    def take(self, wait: bool) -> bool:
        """Take the lease, waiting for whoever has it if ``wait``; False if another has it.

        Raises:
            OSError: the store cannot be written to.
        """
        while True:
            self._version = self._put(IfNoneMatch="*")
            if self._version is None:
                theirs = self._found()
                if theirs is None:
                    continue  # it was given back this moment
                if self._silent(theirs):
                    self._version = self._put(IfMatch=theirs)
            if self._version is not None:
                _seen.pop(self._path, None)
                self._stop = Event()
                Thread(target=self._beat, args=(self._stop,), daemon=True, name="lease").start()
                return True
            if not wait:
                return False
            time.sleep(_LOOK)

    def drop(self) -> None:
        """Give the lease back; harmless if it was not taken or was taken over."""
        self._stop.set()
        with self._writing:
            held, self._version = self._version, None
            if held is not None and held == self._found():
                self._fs.call_s3("delete_object", Bucket=self._bucket, Key=self._key)

    def _silent(self, version: str) -> bool:
        before, since = _seen.get(self._path, ("", 0.0))
        if before != version:
            _seen[self._path] = version, time.monotonic()
            return False
        return time.monotonic() - since >= LEASE

    def _beat(self, stop: Event) -> None:
        while not stop.wait(BEAT):
            with self._writing:
                if self._version is None or stop.is_set():
                    return
                try:
                    self._version = self._put(IfMatch=self._version)
                except OSError:
                    continue  # the next sign of life may arrive

    def _put(self, **condition: str) -> str | None:
        """Version of the object written; None where the condition does not hold."""
        where = {"Bucket": self._bucket, "Key": self._key, "Body": uuid.uuid4().hex.encode()}
        try:
            return str(self._fs.call_s3("put_object", **where, **condition)["ETag"])
        except FileNotFoundError:
            if "IfMatch" in condition:
                return None  # what was to be replaced is gone
            raise
        except OSError as error:
            if _code(error) == _UNCONDITIONAL:
                return str(self._fs.call_s3("put_object", **where)["ETag"])
            if _code(error) in _REFUSED:
                return None
            raise

    def _found(self) -> str | None:
        try:
            return str(self._fs.call_s3("head_object", Bucket=self._bucket, Key=self._key)["ETag"])
        except FileNotFoundError:
            return None


def _code(error: BaseException | None) -> str | None:
    """The service's own code of an error that s3fs has translated."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
        error = error.__cause__
    return None
