"""Passes over one checkpoint: one over the probe, one per set of an analyzer's own tokens, and their keys."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from analyzers.induction import InductionAnalyzer
from analyzers.logits import LogitsAnalyzer
from flows.config import from_toml
from flows.measure import job_of
from storage.store import Store
from tasks.catalogue import catalogue
from tasks.measure import measure, plan, protocol_of

CONFIG = """
name = "mine"
[source]
kind = "dir"
path = "{folder}"
[probe]
length = 16
sequences = 6
[measure]
analyzers = {analyzers}
batch = 4
{parameters}
"""
INDUCTION = "[measure.parameters.induction]\nlength = 10\nsequences = 6\n"


@pytest.fixture
def folder(
    tmp_path: Path,
    tiny_neox: Callable[..., Any],
    tiny_tokenizer: Any,
    save_checkpoint: Callable[..., Path],
) -> Path:
    save_checkpoint(tmp_path / "runs" / "seed0" / "step1", tiny_neox(), tiny_tokenizer)
    return tmp_path


@pytest.fixture
def forward() -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the batches that any whole model runs over."""
    seen: list[tuple[int, ...]] = []

    def count(module: Any, inputs: Any) -> None:
        if isinstance(module, GPTNeoXForCausalLM):
            seen.append(tuple(inputs[0].shape))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    yield seen
    handle.remove()


def prepared(folder: Path, *analyzers: str, parameters: str = INDUCTION) -> tuple[Any, Store, Any]:
    text = CONFIG.format(folder=folder / "runs", analyzers=list(analyzers), parameters=parameters)
    config = from_toml(text, "mine.toml")
    root = str(folder / "root")
    (checkpoint,) = catalogue(Store(root), config.name, config.source, None).sound
    return job_of(config, root), Store(root), checkpoint


def test_own_tokens_cost_one_more_pass(folder: Path, forward: list[tuple[int, ...]]) -> None:
    job, store, checkpoint = prepared(folder, "loss", "logits", "induction")
    todo = plan(job, store, checkpoint)
    assert todo.tokens == 6 * 16 + 6 * 20
    counts = measure(job, checkpoint, Path(checkpoint.location))
    assert counts == {"keys_computed": 3, "forward_passes": 2, "failures": 0, "snapshots": 0}
    assert forward == [(4, 16), (2, 16), (4, 20), (2, 20)]
    assert plan(job, store, checkpoint).tokens == 0
    rows = store.table("metrics").to_pandas()
    protocols = {name: json.loads(group["protocol"].iloc[0]) for name, group in rows.groupby("analyzer")}
    assert protocols["induction"]["probe"] is None
    assert protocols["induction"]["parameters"]["seed"] == 0
    assert protocols["loss"]["probe"]["length"] == 16


def test_alone_it_needs_neither_probe_nor_tokenizer(folder: Path, forward: list[tuple[int, ...]]) -> None:
    for file in (folder / "runs" / "seed0" / "step1").glob("tokenizer*"):
        file.unlink()
    job, store, checkpoint = prepared(folder, "induction")
    assert plan(job, store, checkpoint).probe is None
    counts = measure(job, checkpoint, Path(checkpoint.location))
    assert counts == {"keys_computed": 1, "forward_passes": 1, "failures": 0, "snapshots": 0}
    assert forward == [(4, 20), (2, 20)]


def test_what_the_vocabulary_does_not_allow_fails_alone(folder: Path) -> None:
    job, store, checkpoint = prepared(
        folder, "loss", "induction", parameters="[measure.parameters.induction]\nlength = 300\n"
    )
    counts = measure(job, checkpoint, Path(checkpoint.location))
    assert counts == {"keys_computed": 1, "forward_passes": 1, "failures": 1, "snapshots": 0}
    (failure,) = store.table("failures").to_pylist()
    assert failure["analyzer"] == "induction"
    assert failure["error"] == "ValueError: the vocabulary has 255 tokens, fewer than the 300 different ones"


def test_the_key_follows_the_seed_and_not_the_probe(folder: Path) -> None:
    job, store, checkpoint = prepared(folder, "logits")
    probe = plan(job, store, checkpoint).probe
    assert probe is not None
    one, other = InductionAnalyzer(), InductionAnalyzer({"seed": 1})
    assert protocol_of(one, probe, "float32") == protocol_of(one, None, "float32")
    assert protocol_of(one, probe, "float32") != protocol_of(other, probe, "float32")
    assert protocol_of(LogitsAnalyzer(), probe, "float32")["probe"]["digest"] == probe.digest
