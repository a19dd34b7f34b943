"""Writing a pool: its rows once, then one snapshot after another, each seen whole or not at all."""

import hashlib
import io
import os
import shutil
import uuid
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float, Int

from storage.errors import OntogenyError
from storage.pool import (
    POOL_FILE,
    ROWS_FILE,
    SEQUENCES_FILE,
    SNAPSHOT_FILE,
    PoolInfo,
    Snapshot,
    has_snapshot,
    pools_folder,
    shard_counts,
    shard_path,
    snapshot_name,
)
from storage.series import Checkpoint
from storage.store import now

LARGEST = float(np.finfo(np.float16).max)
# Rounding changes a normal float16 number by 2^-11 of it at most; more means that they were too small for it.
_ROUNDING = 2.0**-10


def create_pool(
    root: str,
    info: PoolInfo,
    tokens: Int[np.ndarray, "rows 3"],
    sequences: Int[np.ndarray, "sequences length"] | None = None,
) -> Path:
    """Make the folder of a pool and say what its rows are; harmless if it is there.

    ``tokens`` are (sequence, position, token id) of every row, ``sequences`` the token ids of the probe.
    ``pool.json`` is written last.
    """
    folder = pools_folder(root) / info.key
    if not (folder / POOL_FILE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in ((ROWS_FILE, tokens), (SEQUENCES_FILE, sequences)):
            if array is not None:
                stream = io.BytesIO()
                np.save(stream, array.astype(np.int32))
                _put(folder / name, stream.getvalue())
        _put(folder / POOL_FILE, info.model_dump_json(indent=1).encode())
    return folder


def _put(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    os.replace(temporary, path)  # noqa: PTH105


class SnapshotWriter:
    """Takes the rows of one snapshot in their order and writes them as float16.

    Everything goes to a folder with a dot before its name, which readers pass over; what a killed process
    left in it is deleted. :meth:`finish` writes ``snapshot.json`` and gives the folder its name. The caller
    holds the claim of the checkpoint (:mod:`storage.claims`): one process writes a snapshot at a time.
    """

    def __init__(self, root: str, info: PoolInfo, checkpoint: Checkpoint) -> None:
        if checkpoint.weights_sha256 is None:
            raise ValueError(f"{checkpoint.label} is not described: it has no weights digest")
        self._root, self._info, self._checkpoint = root, info, checkpoint
        self._weights = checkpoint.weights_sha256
        self._name = snapshot_name(checkpoint.revision, self._weights)
        self._pool = pools_folder(root) / info.key
        self._partial = self._pool / f".{self._name}"
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._tokens = np.load(self._pool / ROWS_FILE, mmap_mode="r")
        self._norms = np.empty(info.rows)
        self._squares = self._changed = 0.0
        self._count = self._shard = 0
        self._width: int | None = None
        self._stream: BinaryIO | None = None

    def write(self, values: Float[np.ndarray, "n width"], tokens: Int[np.ndarray, "n 3"]) -> None:
        """Append rows; ``tokens`` say what they are.

        Raises:
            OntogenyError: a value is not finite, or larger than float16 holds. Nothing is clipped.
            ValueError: these are not the rows that come next in the pool, or of another width.
        """
        if not np.array_equal(self._tokens[self._count : self._count + len(values)], tokens):
            raise ValueError(f"{self._label}: these are not rows {self._count} and following of the pool")
        if self._width not in (None, values.shape[1]):
            raise ValueError(f"{self._label}: rows of width {values.shape[1]} after {self._width}")
        self._width = values.shape[1]
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise OntogenyError(self._refusal(values, half, tokens))
        wide = half.astype(np.float64)
        self._norms[self._count : self._count + len(half)] = np.sqrt(np.square(wide).sum(axis=1))
        exact = values.astype(np.float64)
        self._squares += float(np.square(exact).sum())
        self._changed += float(np.square(exact - wide).sum())
        self._append(half)

    def finish(self, site: str, layer: int | None) -> Snapshot:
        """Complete the snapshot: from now on readers see it.

        Raises:
            OntogenyError: all values are zero, or too small for float16.
            ValueError: rows are missing.
        """
        if self._count != self._info.rows:
            raise ValueError(f"{self._label}: {self._count} rows arrived of {self._info.rows}")
        mean_norm = float(self._norms.mean())
        if mean_norm == 0:
            raise OntogenyError(f"{self._label}: all activations are zero in float16; they have no scale")
        rounding = float(np.sqrt(self._changed / self._squares))
        if rounding > _ROUNDING:
            raise OntogenyError(
                f"{self._label}: activations are too small for float16, which would change {rounding:.2g} "
                "of them"
            )
        assert self._width is not None
        snapshot = Snapshot(
            name=self._name,
            revision=self._checkpoint.revision,
            step=self._checkpoint.step,
            stage=self._checkpoint.stage,
            tokens=self._checkpoint.tokens,
            weights_sha256=self._weights,
            site=site,
            layer=layer,
            tokens_sha256=hashlib.sha256(np.ascontiguousarray(self._tokens).tobytes()).hexdigest(),
            count=self._count,
            width=self._width,
            mean_norm=mean_norm,
            rounding=rounding,
            recorded_at=now(),
        )
        _put(self._partial / SNAPSHOT_FILE, snapshot.model_dump_json(indent=1).encode())
        if has_snapshot(self._root, self._info.key, self._name):
            self.discard()  # equal by its key
        else:
            shutil.rmtree(self._pool / self._name, ignore_errors=True)  # it has no snapshot.json
            self._partial.rename(self._pool / self._name)
        return snapshot

    def discard(self) -> None:
        """Delete what was written; harmless after :meth:`finish`."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def _label(self) -> str:
        return f"{self._checkpoint.label}, harvest"

    def _append(self, half: np.ndarray) -> None:
        counts = shard_counts(self._info.rows)
        ends = np.cumsum(counts)
        while len(half):
            if self._stream is None:
                self._stream = shard_path(self._partial, self._shard).open("wb")
                shape = (counts[self._shard], half.shape[1])
                header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(self._stream, header)
            part = half[: ends[self._shard] - self._count]
            self._stream.write(np.ascontiguousarray(part, dtype="<f2").data)
            self._count += len(part)
            half = half[len(part) :]
            if self._count == ends[self._shard]:
                self._stream.close()
                self._stream = None
                self._shard += 1

    def _refusal(self, values: np.ndarray, half: np.ndarray, tokens: np.ndarray) -> str:
        row, channel = np.argwhere(~np.isfinite(half))[0]
        value, (sequence, position, token) = values[row, channel], tokens[row]
        where = f"token {token}" if sequence < 0 else f"position {position} of sequence {sequence}"
        if not np.isfinite(value):
            return f"{self._label}: channel {channel} at {where} is {value}"
        return (
            f"{self._label}: channel {channel} at {where} is {value:.6g}, beyond the largest float16, "
            f"{LARGEST:g}; the snapshot is not stored"
        )
