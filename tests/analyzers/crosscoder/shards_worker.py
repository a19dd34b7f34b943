"""One of several processes that train a crosscoder together; started by test_crosscoder_shards.py."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from analyzers.crosscoder.kernels import Dense
from analyzers.crosscoder.settings import TrainSettings
from analyzers.crosscoder.shards import GroupShards, Shards
from analyzers.crosscoder.training import Trainer

SNAPSHOTS, WIDTH, BATCH, STEPS = 3, 8, 16, 8
CASES: dict[str, dict[str, Any]] = {
    "batch-topk": {"k": 4, "dead_after": 20, "auxiliary_k": 3},
    "per-snapshot": {"k": 2, "gate": "per-snapshot", "dead_after": 20, "micro_batch": 7},
    "jumprelu": {"activation": "jumprelu", "threshold": 0.5},
    "relu": {"activation": "relu"},
}


def train(case: str, shards: Shards) -> dict[str, Any]:
    """Train, resume in the middle, train on; the whole crosscoder and the last report."""
    settings = TrainSettings(latents=24, steps=STEPS, learning_rate=1e-2, **CASES[case])
    trainer = Trainer(settings, SNAPSHOTS, WIDTH, torch.ones(SNAPSHOTS), shards=shards)
    trainer.kernels = Dense()  # nothing to compile
    generator = torch.Generator().manual_seed(7)
    for step in range(STEPS):
        rows = torch.randn(BATCH, SNAPSHOTS * WIDTH, generator=generator)
        if shards.rank:
            rows.zero_()  # only the first process has data
        if step == STEPS // 2:
            trainer = Trainer.resume(trainer.state(), shards=shards)
            trainer.kernels = Dense()
        if step == 0:
            # Latents that are never active, in both halves, so that the auxiliary loss has work.
            for parameter in (trainer.parameters.encoder, trainer.parameters.decoder):
                parameter[::6] *= 0.05
        report = trainer.step(rows)
    crosscoder = trainer.crosscoder()
    return {"report": report, **vars(crosscoder)}


def main() -> None:
    """``shards_worker.py RANK PROCESSES FOLDER``; the last process writes what it found."""
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=processes)
    found = {case: train(case, GroupShards()) for case in CASES}
    if rank == processes - 1:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
