"""Tiny checkpoints, a mirror that serves them, and the Hub's unmodified client in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
