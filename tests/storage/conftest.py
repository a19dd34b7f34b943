"""Tiny checkpoints, a mirror that serves them, and the Hub's unmodified client in a process of its own."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub as hf
import numpy as np
import pytest
from faults import LARGE, Fault, FaultyMirror, Serve
from safetensors.numpy import save_file
from storage_support import AskHub, WriteCheckpoint


def _write(folder: Path, seed: int = 0, shards: int = 1, dtype: str = "float32") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "gpt_neox"}')
    (folder / "tokenizer.json").write_text('{"model": {}}')
    rng = np.random.default_rng(seed)
    tensors = {f"layer.{k}.weight": rng.standard_normal((4, 8)).astype(dtype) for k in range(3)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: value for k, (key, value) in enumerate(tensors.items()) if k % shards == number}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="session")
def write_checkpoint() -> WriteCheckpoint:
    """Write an HF-format folder with three random float matrices: (folder, seed, shards, dtype)."""
    return _write


@pytest.fixture(scope="session")
def ask_hub(tmp_path_factory: pytest.TempPathFactory) -> AskHub:
    """Run Python code against a hub and return what it prints as JSON: (url, code, *arguments).

    In a process of its own, because the client reads HF_ENDPOINT when it is imported.
    """
    home = tmp_path_factory.mktemp("hub-home")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}

    def ask(url: str, code: str, *arguments: str) -> Any:
        environment = kept | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return ask


@pytest.fixture(scope="session")
def faulty_folder(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: WriteCheckpoint) -> Path:
    """One run: step0 of 3 MB in one file, step1 in two shards, step2 small."""
    base = tmp_path_factory.mktemp("served")
    large = write_checkpoint(base / "seed0" / "step0")
    (large / "model.safetensors").write_bytes(random.Random(0).randbytes(LARGE))
    write_checkpoint(base / "seed0" / "step1", seed=1, shards=2)
    write_checkpoint(base / "seed0" / "step2", seed=2, dtype="float16")
    return base


@pytest.fixture
def serve(faulty_folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Serve:
    """``serve(*faults)``: a mirror of the run that is this process's Hub, which is asked without patience."""
    for name in [n for n in os.environ if "proxy" in n.lower()]:
        monkeypatch.delenv(name)
    for name, value in (("TRIES", "3"), ("WAIT", "0.01"), ("LONGEST", "0.1"), ("TIMEOUT", "10")):
        monkeypatch.setenv(f"ONTOGENY_HUB_{name}", value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hf.close_session()

    def start(*faults: Fault, at: Path = faulty_folder, **options: Any) -> FaultyMirror:
        mirror = FaultyMirror({"specimen/seed0": at / "seed0"}, *faults, **options)
        mirror.__enter__()
        request.addfinalizer(mirror.__exit__)
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        return mirror

    return start
