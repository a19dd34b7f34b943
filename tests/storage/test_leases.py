"""Leases on a real S3-compatible server of this machine."""

import threading
import time
from collections.abc import Iterator

import pytest
from s3_support import Bucket

from storage import leases
from storage.claims import Claim
from storage.leases import Lease
from storage.store import Store


@pytest.fixture
def store(bucket: Bucket) -> Store:
    return Store(f"{bucket.url}/leases")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(leases, "LEASE", 3.0)
    monkeypatch.setattr(leases, "BEAT", 0.1)
    monkeypatch.setattr(leases, "_LOOK", 0.1)
    return


def lease(store: Store, name: str) -> Lease:
    return Lease(store.fs, f"{store.path}/locks/{name}")


def test_one_of_many_gets_the_claim(store: Store) -> None:
    claims = [Claim(store, "tiny", "seed0", "step1") for _ in range(8)]
    got: list[bool] = []
    threads = [threading.Thread(target=lambda c=c: got.append(c.take(wait=False))) for c in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]
    for claim in claims:
        claim.drop()  # harmless for those that do not have it
    assert claims[0].take(wait=False)
    claims[0].drop()
    assert not store.fs.find(f"{store.path}/locks")


def test_signs_of_life_keep_it(store: Store, quick: None) -> None:
    mine, other = lease(store, "alive"), lease(store, "alive")
    assert mine.take(wait=False)
    until = time.monotonic() + 4.0
    while time.monotonic() < until:
        assert not other.take(wait=False)
    mine.drop()
    assert other.take(wait=False)
    other.drop()


def test_a_silent_holders_is_taken_over_once(store: Store, quick: None) -> None:
    dead = lease(store, "dead")
    assert dead.take(wait=False)
    dead._stop.set()  # as if its process had been killed
    waiting = [lease(store, "dead") for _ in range(2)]
    assert not waiting[0].take(wait=False)
    assert waiting[0].take(wait=True)
    assert not waiting[1].take(wait=False)
    dead.drop()  # it is not the dead one's any more
    assert not waiting[1].take(wait=False)
    waiting[0].drop()


def test_who_waits_gets_it_when_it_is_given_back(store: Store, quick: None) -> None:
    mine, other = lease(store, "back"), lease(store, "back")
    assert mine.take(wait=False)
    waiter = threading.Thread(target=other.take, args=(True,))
    waiter.start()
    mine.drop()
    waiter.join(20)
    assert not waiter.is_alive()
    assert not mine.take(wait=False)
    other.drop()
