"""What all runs of a specimen share: tokenizer, training tokens, probe, and the record of the recipe."""

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray

from storage import OntogenyError, UsageError
from storage.keys import file_sha256
from tasks.specimen.config import SpecimenConfig
from tasks.specimen.corpus import Document, corpus_digest, passages, read_documents, split
from tasks.specimen.tokenizer import END_OF_TEXT, train_tokenizer

# Dot folders and plain files are no runs: whoever lists the series skips them.
PREPARED = ".prepared"
RECORD = "specimen.json"
PROBE = "probe.jsonl"


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def tokenizer_path(config: SpecimenConfig) -> Path:
    """Folder with the tokenizer in the layout of transformers."""
    return config.out / PREPARED / "tokenizer"


def training_tokens(config: SpecimenConfig) -> NDArray[np.uint16]:
    """The training documents as one stream of token ids, ``<|endoftext|>`` after each; mapped, not read."""
    tokens: NDArray[np.uint16] = np.load(config.out / PREPARED / "tokens.npy", mmap_mode="r")
    return tokens


def check_recipe(config: SpecimenConfig) -> bool:
    """Whether ``OUT`` is prepared for this recipe.

    Raises :class:`UsageError` where it holds another one, naming the values that differ.
    """
    record = config.out / RECORD
    if not record.exists():
        if any(config.out.glob("seed*/step*")):
            raise UsageError(
                f"{config.out} holds runs but no {RECORD}: their recipe is unknown, use another folder"
            )
        return False
    recorded: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))["recipe"]
    wanted = config.recipe
    changes = [
        f"{name} was {recorded.get(name)!r} and is now {wanted.get(name)!r}"
        for name in sorted(recorded.keys() | wanted.keys())
        if recorded.get(name) != wanted.get(name)
    ]
    if changes:
        raise UsageError(
            f"{config.out} was trained with another recipe ({'; '.join(changes)}): use another folder"
        )
    return True


def _encode(tokenizer: Any, documents: list[Document]) -> NDArray[np.uint16]:
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encodings = tokenizer.backend_tokenizer.encode_batch_fast([document.text for document in documents])
    return np.concatenate([np.asarray([*encoding.ids, end], dtype=np.uint16) for encoding in encodings])


def prepare(config: SpecimenConfig) -> None:
    """Write tokenizer, training tokens, probe and record to ``OUT``; nothing is done where they exist.

    Takes seconds. The record comes last, so an interrupted preparation starts again.
    Raises :class:`UsageError` for an ``OUT`` of another recipe or one that is a file, and
    :class:`OntogenyError` where the text gives fewer sequences than one batch.
    """
    if config.out.exists() and not config.out.is_dir():
        raise UsageError(f"out {str(config.out)!r} is not a folder")
    if check_recipe(config):
        return
    documents = read_documents()
    train, rest = split(documents)
    tokenizer = train_tokenizer(train, config.vocabulary, config.length)
    tokens = _encode(tokenizer, train)
    if len(tokens) < config.batch * config.length:
        raise OntogenyError(
            f"the text has {len(tokens)} tokens, fewer than one batch of {config.batch} x {config.length}"
        )

    temporary = config.out / f"{PREPARED}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tokenizer.save_pretrained(temporary / "tokenizer")
    np.save(temporary / "tokens.npy", tokens)
    shutil.rmtree(config.out / PREPARED, ignore_errors=True)
    temporary.replace(config.out / PREPARED)

    replace_text(config.out / PROBE, "".join(json.dumps(row) + "\n" for row in passages(rest, train)))
    record = {
        "recipe": config.recipe,
        "corpus": {
            "digest": corpus_digest(documents),
            "documents": len(documents),
            "held_out": [document.name for document in rest],
            "training_tokens": len(tokens),
        },
        "tokenizer_sha256": file_sha256(tokenizer_path(config) / "tokenizer.json"),
        "probe_sha256": file_sha256(config.out / PROBE),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    replace_text(config.out / RECORD, json.dumps(record, indent=1) + "\n")
