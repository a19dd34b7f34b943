"""What the reading of trained crosscoders is told, and what its parts share."""

import dataclasses
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import AutoTokenizer

from analyzers.crosscoder.lifecycle import LifecycleSettings
from analyzers.crosscoder.weights import Crosscoder
from storage.errors import UsageError
from storage.keys import digest, file_sha256
from storage.pool import Pool
from tasks.crosscoder_files import crosscoder_folder, load_crosscoder

READ_VERSION = 1
"""Raise it whenever the same crosscoders give other tables."""
ROWS_AT_ONCE = 4096


class ReadJob(BaseModel):
    """How trained crosscoders of one run are read; small and serialisable.

    ``trained`` are the keys of the seeds, the first being the one whose features are stored; ``splice`` is
    the number of sequences, 0 for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str
    series: str
    run: str
    pool: str
    steps: tuple[int, ...]
    trained: tuple[str, ...]
    seeds: tuple[int, ...]
    held_out: int
    lifecycle: LifecycleSettings
    contexts: int
    splice: int
    splice_note: str | None
    effects: bool
    pairs: str | None
    tokenizer: str
    device: str
    dtype: str
    loader: str | None

    @cached_property
    def identity(self) -> str:
        """The reading's identity: digest of the crosscoders' keys and of all that the tables depend on."""
        return digest(
            {
                "version": READ_VERSION,
                "keys": self.trained,
                "lifecycle": self.lifecycle.model_dump(),
                "contexts": self.contexts,
                "splice": self.splice,
                "effects": self.effects,
                "pairs": file_sha256(Path(self.pairs)) if self.effects and self.pairs else None,
                "dtype": self.dtype if self.splice or self.effects else None,
            }
        )

    @property
    def folder(self) -> Path:
        """Folder of the first crosscoder."""
        return self.folder_of(self.trained[0])

    @property
    def parts(self) -> Path:
        """Folder of what the checkpoints gave, until the tables are written."""
        return self.folder / f"reading-{self.identity}"

    def folder_of(self, key: str) -> Path:
        """Folder of one of the crosscoders."""
        return crosscoder_folder(self.root, self.series, self.run, key)

    def open_pool(self) -> Pool:
        """The pool with the snapshots of the crosscoders."""
        return Pool.open(self.root, self.pool, self.steps)

    def crosscoder(self, device: torch.device | str = "cpu", key: str | None = None) -> Crosscoder:
        """The first crosscoder, or that of ``key``, on a device."""
        found = load_crosscoder(self.folder_of(key or self.trained[0]))
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(found)
            if isinstance(value := getattr(found, field.name), Tensor)
        }
        return dataclasses.replace(found, **moved)


def rows_in_order(
    pool: Pool, rows: Int64[np.ndarray, "n"]
) -> Iterator[tuple[Int64[np.ndarray, "_part"], Tensor]]:
    """Scaled values of ``rows``, some at a time, each with its numbers."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        yield part, torch.from_numpy(pool.read(part))


def open_tokenizer(folder: str) -> Any:
    """The tokenizer of a folder.

    Raises:
        UsageError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of missing or broken files
        raise UsageError(f"{folder!r} has no readable tokenizer: {type(error).__name__}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)  # noqa: PTH105


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote; None where there is nothing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
