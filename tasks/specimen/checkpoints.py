"""Checkpoints of a run on disk, in the layout of transformers."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers import GPTNeoXForCausalLM

from storage.errors import OntogenyError
from storage.local import safetensors_header


def checkpoint_path(run: Path, step: int) -> Path:
    """Folder of one checkpoint: ``RUN/stepN``."""
    return run / f"step{step}"


def write_checkpoint(run: Path, step: int, model: GPTNeoXForCausalLM, tokenizer: Path) -> None:
    """Write ``RUN/stepN`` with config.json, model.safetensors and the tokenizer's files.

    The folder appears at once, complete; an earlier one of the same name gives way to it.
    """
    final = checkpoint_path(run, step)
    temporary, old = (run / f".{final.name}.{suffix}" for suffix in ("tmp", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(temporary)
    shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)
    if final.exists():
        final.replace(old)
    temporary.replace(final)
    shutil.rmtree(old, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint's files are there and its weights are as long as their header says."""
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json", "model.safetensors")):
        return False
    try:
        return bool(safetensors_header(folder / "model.safetensors"))
    except OntogenyError:
        return False


def all_complete(run: Path, steps: Iterable[int]) -> bool:
    """Whether the checkpoints at all these steps are complete."""
    return all(is_complete(checkpoint_path(run, step)) for step in steps)
