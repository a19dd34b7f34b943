"""Pools on disk: what goes in comes out, in whole snapshots, shuffled and resumable."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage import pool, pool_order, pool_writer
from storage.errors import DamagedCheckpointError, OntogenyError, UsageError
from storage.pool import Pool, PoolInfo, held_bytes, list_pools
from storage.pool_writer import SnapshotWriter, create_pool
from storage.series import Checkpoint

ROWS, WIDTH = 1000, 6
INFO = PoolInfo(series="mine", run="seed0", protocol={"site": "resid_post"}, rows=ROWS)
TOKENS = np.stack([np.arange(ROWS) // 50, np.arange(ROWS) % 50 + 1, np.arange(ROWS) % 7], axis=1)


def checkpoint(step: int, weights: str | None = None) -> Checkpoint:
    digest = weights or f"{step:064x}"
    return Checkpoint(
        series="mine", run="seed0", step=step, revision=f"step{step}", location="x", weights_sha256=digest
    )


def values_of(step: int) -> np.ndarray:
    """Numbers that float16 holds exactly and that name their row and step."""
    values = np.random.default_rng(step).integers(-8, 9, (ROWS, WIDTH)).astype(np.float32)
    values[:, 0] = np.arange(ROWS)
    values[:, 1] = step
    return values


def fill(root: Path, step: int, parts: int = 3, values: np.ndarray | None = None) -> pool.Snapshot:
    create_pool(str(root), INFO, TOKENS)
    writer = SnapshotWriter(str(root), INFO, checkpoint(step))
    try:
        for part in np.array_split(np.arange(ROWS), parts):
            writer.write((values_of(step) if values is None else values)[part], TOKENS[part])
        return writer.finish("resid_post", 1)
    finally:
        writer.discard()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards, blocks and buffers so small that a thousand rows have many of each."""
    monkeypatch.setattr(pool, "SHARD_ROWS", 150)
    monkeypatch.setattr(pool_order, "BLOCK_ROWS", 8)
    monkeypatch.setattr(pool, "BUFFER_BYTES", 2 * 2 * WIDTH * 100)


@pytest.fixture
def filled(tmp_path: Path, small: None) -> Pool:
    for step in (100, 3):
        fill(tmp_path, step)
    return Pool.open(str(tmp_path), INFO.key)


def test_rows_come_back_scaled_to_a_mean_norm_of_root_width(filled: Pool) -> None:
    assert [s.step for s in filled.snapshots] == [3, 100]
    assert np.array_equal(filled.tokens, TOKENS)
    rows = np.array([999, 0, 149, 150, 151, 700])
    expected = np.concatenate(
        [values_of(s.step)[rows] * np.float32(s.scale) for s in filled.snapshots], axis=1
    )
    assert np.array_equal(filled.read(rows), expected)
    whole = filled.read(np.arange(ROWS)).reshape(ROWS, 2, WIDTH).astype(np.float64)
    norms = np.linalg.norm(whole, axis=2).mean(axis=0)
    np.testing.assert_allclose(norms, np.sqrt(WIDTH), rtol=1e-6)
    exact = [
        np.sqrt(WIDTH) / np.linalg.norm(values_of(step).astype(float), axis=1).mean() for step in (3, 100)
    ]
    np.testing.assert_allclose(filled.scales, exact, rtol=1e-14)


def test_every_row_comes_once_in_an_epoch_whatever_the_batch(filled: Pool) -> None:
    for size in (1, 7, 64, 150, 1000):
        seen = [batch.rows for batch in filled.stored(size, seed=1, epochs=1)]
        assert len(seen) == filled.batches_per_epoch(size) == ROWS // size
        assert {len(rows) for rows in seen} == {size}
        flat = np.concatenate(seen)
        assert len(np.unique(flat)) == len(flat) == ROWS // size * size


def test_batches_hold_the_rows_they_name(filled: Pool) -> None:
    plain = filled.batches(90, seed=2, epochs=2)
    for number, batch in enumerate(filled.stored(90, seed=2, epochs=2)):
        assert batch.number == number
        expected = filled.read(batch.rows)
        assert np.array_equal(filled.scaled(batch.values), expected)
        assert np.array_equal(next(plain), expected)
    assert number == 21
    assert next(plain, None) is None


@pytest.mark.parametrize("start", [0, 1, 5, 10, 11, 17, 21])
def test_a_later_start_gives_the_same_batches(filled: Pool, start: int) -> None:
    whole = list(filled.stored(90, seed=2, epochs=2))
    later = list(filled.stored(90, seed=2, epochs=2, start=start))
    assert [b.number for b in later] == [b.number for b in whole[start:]]
    for a, b in zip(later, whole[start:], strict=True):
        assert np.array_equal(a.rows, b.rows)
        assert np.array_equal(a.values, b.values)


def test_the_order_depends_on_seed_and_epoch_and_mixes_the_pool(filled: Pool) -> None:
    def order(seed: int, epoch: int) -> np.ndarray:
        return np.concatenate([b.rows for b in filled.stored(50, seed, epoch + 1, start=epoch * 20)])

    assert np.array_equal(order(0, 1), order(0, 1))
    assert not np.array_equal(order(0, 0), order(0, 1))
    assert not np.array_equal(order(0, 0), order(1, 0))
    # 50 rows of a buffer of twelve blocks of eight: neighbours are rare, and all of the pool is in reach.
    first = order(0, 0)[:50]
    assert np.ptp(first) > ROWS / 2
    assert (np.abs(np.diff(first)) == 1).mean() < 0.1


def test_how_rows_arrive_does_not_change_a_snapshot(tmp_path: Path, small: None) -> None:
    one, many = (fill(tmp_path / str(parts), 5, parts) for parts in (1, 77))
    assert one.model_dump(exclude={"recorded_at"}) == many.model_dump(exclude={"recorded_at"})
    for number in range(7):
        left, right = (
            pool.shard_path(tmp_path / p / "pools" / INFO.key / one.name, number) for p in ("1", "77")
        )
        assert left.read_bytes() == right.read_bytes()


def test_a_snapshot_without_its_last_file_is_not_there(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    writer = SnapshotWriter(str(tmp_path), INFO, checkpoint(7))
    writer.write(values_of(7)[:400], TOKENS[:400])  # and the process is killed here
    assert [s.step for s in Pool.open(str(tmp_path), INFO.key).snapshots] == [3]
    with pytest.raises(UsageError, match="no snapshot of step 7"):
        Pool.open(str(tmp_path), INFO.key, steps=[3, 7])
    fill(tmp_path, 7)
    assert [s.step for s in Pool.open(str(tmp_path), INFO.key, steps=[7]).snapshots] == [7]
    assert not list((tmp_path / "pools" / INFO.key).glob(".*"))


def test_missing_rows_are_no_snapshot(tmp_path: Path) -> None:
    create_pool(str(tmp_path), INFO, TOKENS)
    writer = SnapshotWriter(str(tmp_path), INFO, checkpoint(7))
    writer.write(values_of(7)[:999], TOKENS[:999])
    with pytest.raises(ValueError, match="999 rows arrived of 1000"):
        writer.finish("resid_post", 1)
    with pytest.raises(ValueError, match="not rows 999 and following"):
        writer.write(values_of(7)[:1], TOKENS[:1])


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            70000.0,
            "seed0/step7, harvest: channel 2 at position 21 of sequence 12 is 70000, beyond the largest",
        ),
        (-1e9, "beyond the largest float16, 65504"),
        (np.nan, "is nan"),
        (np.inf, "channel 2 at position 21 of sequence 12 is inf"),
    ],
)
def test_what_float16_cannot_hold_is_refused(tmp_path: Path, value: float, sentence: str) -> None:
    values = values_of(7)
    values[620, 2] = value
    with pytest.raises(OntogenyError, match=sentence):
        fill(tmp_path, 7, values=values)
    with pytest.raises(UsageError, match="has no snapshot"):
        Pool.open(str(tmp_path), INFO.key)


def test_the_largest_float16_is_kept_as_it_is(tmp_path: Path) -> None:
    values = values_of(7)
    values[620, 2] = pool_writer.LARGEST
    fill(tmp_path, 7, values=values)
    opened = Pool.open(str(tmp_path), INFO.key)
    assert next(opened.stored(ROWS, 0, 1)).values.max() == 65504


@pytest.mark.parametrize(("factor", "sentence"), [(0.0, "are zero"), (1e-9, "are zero"), (2e-8, "too small")])
def test_what_has_no_scale_or_vanishes_is_refused(tmp_path: Path, factor: float, sentence: str) -> None:
    values = np.random.default_rng(0).normal(size=(ROWS, WIDTH)) * factor
    with pytest.raises(OntogenyError, match=sentence):
        fill(tmp_path, 7, values=values)


def test_rounding_is_that_of_float16(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(ROWS, WIDTH))
    snapshot = fill(tmp_path, 7, values=values)
    rounded = values.astype(np.float16).astype(float)
    assert snapshot.rounding == pytest.approx(np.linalg.norm(rounded - values) / np.linalg.norm(values))
    assert snapshot.rounding < 2**-11
    assert snapshot.mean_norm == pytest.approx(np.linalg.norm(rounded, axis=1).mean(), rel=1e-14)


def test_of_two_weights_at_one_step_the_later_recorded_counts(tmp_path: Path) -> None:
    fill(tmp_path, 7)
    writer = SnapshotWriter(str(tmp_path), INFO, checkpoint(7, "f" * 64))
    writer.write(values_of(8), TOKENS)
    writer.finish("resid_post", 1)
    (snapshot,) = Pool.open(str(tmp_path), INFO.key).snapshots
    assert snapshot.weights_sha256 == "f" * 64


def test_pools_are_found_and_counted(filled: Pool, tmp_path: Path) -> None:
    assert list_pools(str(tmp_path)) == list_pools(str(tmp_path), "mine", "seed0") == [INFO]
    assert list_pools(str(tmp_path), "mine", "seed1") == []
    headers = 2 * 7 * 128  # of seven shards each
    assert held_bytes(str(tmp_path), "mine") == 2 * ROWS * WIDTH * 2 + headers
    assert held_bytes(str(tmp_path), "other") == 0


def _cut(folder: Path) -> None:
    shard = folder / "shard-0000.npy"
    shard.write_bytes(shard.read_bytes()[:5000])


def _other_rows(folder: Path) -> None:
    about = json.loads((folder / "snapshot.json").read_text())
    (folder / "snapshot.json").write_text(json.dumps(about | {"tokens_sha256": "0" * 64}))


def _unreadable(folder: Path) -> None:
    (folder / "snapshot.json").write_text("{")


@pytest.mark.parametrize("damage", [_cut, _other_rows, _unreadable])
def test_damage_is_one_sentence(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    fill(tmp_path, 3)
    damage(tmp_path / "pools" / INFO.key / fill(tmp_path, 7).name)
    with pytest.raises(DamagedCheckpointError) as caught:
        Pool.open(str(tmp_path), INFO.key)
    assert "\n" not in str(caught.value)


def test_object_stores_absent_pools_and_large_batches_are_refused(filled: Pool, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a local disk"):
        Pool.open("memory://root", INFO.key)
    with pytest.raises(UsageError, match="there is no pool 'nothing'"):
        Pool.open(str(tmp_path), "nothing")
    with pytest.raises(UsageError, match="1001 rows is larger than the pool"):
        next(filled.batches(1001, 0, 1))
