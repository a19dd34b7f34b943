"""Every shipped series file loads, round-trips, and plans against repositories of the very names it has."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedTokenizerFast,
)

from flows.config import SERIES_FOLDER, from_toml, resolve, shipped
from flows.measure import plan_series
from storage import open_root
from storage.mirror import Mirror, MirrorRequest
from storage.series import HubSource

LOCAL = ("backcopy", "specimen")
PROBE_TEXT = Path(__file__).parents[2] / "storage" / "data" / "probe.jsonl"
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
# Branches as the repositories spell them, of which each first group is planned and the second passed over.
BRANCHES = {
    "pythia": (["step0", "step512", "step143000"], ["main"]),
    "olmo-1b": (["step1000-tokens4B", "step10000-tokens41B", "step738020-tokens3094B"], ["main"]),
    "olmo-2-1b": (
        ["stage1-step0-tokens0B", "stage1-step10000-tokens21B", "stage1-step1907359-tokens4001B"],
        ["main", "stage2-ingredient3-step23852-tokens51B"],
    ),
}
# Tokens at the last checkpoint: steps times 1024 x 2048; the name's; steps times 512 x 4096.
LAST_TOKENS = {
    "pythia": 143_000 * 2_097_152,
    "olmo-1b": 3_094 * 10**9,
    "olmo-2-1b": 1_907_359 * 2_097_152,
}


class Watched(Mirror):
    """Remembers which weights were asked for."""

    def __init__(self, repos: dict[str, Path]) -> None:
        self.weights: list[str] = []
        super().__init__(repos)

    def intercept(self, request: MirrorRequest, method: str, path: str) -> bool:
        if method == "GET" and path.endswith((".safetensors", ".bin")):
            self.weights.append(path)
        return False


def _kind(name: str) -> str:
    return "pythia" if name.startswith("pythia") else name


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=300, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)


def _save(model_class: Any, config: Any, folder: Path, seed: int, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(seed)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plans of all shipped series, made against tiny models."""
    base = tmp_path_factory.mktemp("series-files")
    texts = [json.loads(line)["text"] for line in PROBE_TEXT.read_text(encoding="utf-8").splitlines()]
    tokenizer = _tokenizer(texts)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(0)
    models = {
        "pythia": (GPTNeoXForCausalLM, GPTNeoXConfig(**SHAPE)),
        "olmo-1b": (OlmoForCausalLM, OlmoConfig(**SHAPE, pad_token_id=1, eos_token_id=2)),
        "olmo-2-1b": (Olmo2ForCausalLM, Olmo2Config(**SHAPE, pad_token_id=1, eos_token_id=2)),
    }
    sizes = {}
    for kind, (taken, passed) in BRANCHES.items():
        for seed, branch in enumerate([*taken, *passed]):
            _save(*models[kind], base / kind / branch, seed, tokenizer)
        sizes[kind] = (base / kind / taken[0] / "model.safetensors").stat().st_size
    root = base / "root"
    for run in ("seed0", "seed1"):
        shutil.copytree(base / "pythia", root / "specimen" / run, ignore=shutil.ignore_patterns("main"))
    shutil.copy(PROBE_TEXT, root / "specimen" / "probe.jsonl")
    shutil.copytree(root / "specimen", root / "backcopy")

    repos = {}
    for name in shipped():
        source = resolve(name).source
        if isinstance(source, HubSource):
            repos |= dict.fromkeys(source.repos.values(), base / _kind(name))
    plans: dict[str, Any] = {}
    with Watched(repos) as mirror, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", mirror.url)
        for name in shipped():
            lines = [line.model_dump() for line in plan_series(resolve(name), str(root))]
            recorded = open_root(root).table("checkpoints", name).to_pylist()
            tokens = {f"{row['run']}/{row['revision']}": row["tokens"] for row in recorded}
            plans[name] = {"lines": lines, "tokens": tokens}
        assert mirror.weights == []
    return plans | {"sizes": sizes | {"specimen": sizes["pythia"]}}


def test_the_promised_series_are_shipped() -> None:
    promised = {"specimen", "pythia-14m", "pythia-70m", "pythia-160m", "pythia-410m", "olmo-2-1b", "olmo-1b"}
    assert promised <= set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_a_series_file_round_trips(name: str) -> None:
    config = resolve(name)
    assert config.name == name
    assert config.title
    assert from_toml(config.to_toml(), name) == config
    assert resolve(str(SERIES_FOLDER / f"{name}.toml")) == config


@pytest.mark.parametrize("size", ["14m", "70m", "160m", "410m"])
def test_pythia_has_ten_seeds_in_repositories_of_their_own(size: str) -> None:
    source = resolve(f"pythia-{size}").source
    assert isinstance(source, HubSource)
    expected = {f"seed{k}": f"EleutherAI/pythia-{size}-seed{k}" for k in range(1, 10)}
    assert source.repos == {"seed0": f"EleutherAI/pythia-{size}"} | expected


@pytest.mark.parametrize("name", [name for name in shipped() if name not in LOCAL])
def test_a_hub_series_plans_every_checkpoint_without_downloading_weights(
    plans: dict[str, Any], name: str
) -> None:
    config = resolve(name)
    assert isinstance(config.source, HubSource)
    branches = BRANCHES[_kind(name)][0]
    expected = [f"{run}/{branch}" for run in config.source.repos for branch in branches]
    lines = plans[name]["lines"]
    assert [line["label"] for line in lines] == expected
    for line in lines:
        assert line["bytes"] == plans["sizes"][_kind(name)]
        assert line["missing"] == list(config.measure.analyzers)
        step = re.search(r"step(\d+)", line["label"])
        assert step is not None
        assert line["step"] == int(step[1])
    assert plans[name]["tokens"][expected[-1]] == LAST_TOKENS[_kind(name)]


@pytest.mark.parametrize("name", LOCAL)
def test_a_specimen_plans_its_folder(plans: dict[str, Any], name: str) -> None:
    lines = plans[name]["lines"]
    assert [(line["label"], line["bytes"]) for line in lines] == [
        (f"{run}/{branch}", plans["sizes"]["specimen"])
        for run in ("seed0", "seed1")
        for branch in BRANCHES["pythia"][0]
    ]
    assert {tuple(line["missing"]) for line in lines} == {resolve(name).measure.analyzers}
    per_step = resolve(name).source.tokens_per_step
    assert per_step is not None
    assert plans[name]["tokens"]["seed0/step512"] == 512 * per_step
