"""Latents shared out over two processes: the same crosscoder as in one."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from shards_worker import CASES, train

from analyzers.crosscoder.settings import TrainSettings
from analyzers.crosscoder.shards import Shards
from analyzers.crosscoder.training import Trainer


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("shards")
    worker = Path(__file__).with_name("shards_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), "2", str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    found: Mapping[str, Any] = torch.load(folder / "found.pt", weights_only=False)
    return found


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_train_the_same_crosscoder(case: str, of_two: Mapping[str, Any]) -> None:
    alone, together = train(case, Shards()), of_two[case]
    for name in ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold"):
        torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=1e-5)
    one, two = asdict(alone["report"]), asdict(together["report"])
    assert one.pop("explained") == pytest.approx(two.pop("explained"), rel=1e-4)
    assert one == pytest.approx(two, rel=1e-4)
    if "dead_after" in CASES[case]:
        assert one["dead"] > 0
        assert one["auxiliary"] > 0


def test_latents_must_divide_and_states_keep_their_process() -> None:
    second = Shards()
    second.rank, second.count = 1, 2
    with pytest.raises(ValueError, match="25 latents"):
        Trainer(TrainSettings(latents=25, steps=1, k=2), 2, 4, torch.ones(2), shards=second)
    state = Trainer(TrainSettings(latents=24, steps=1, k=2), 2, 4, torch.ones(2), shards=second).state()
    assert state.tensors["decoder"].shape == (12, 8)
    with pytest.raises(ValueError, match="process 1 of 2"):
        Trainer.resume(state)
