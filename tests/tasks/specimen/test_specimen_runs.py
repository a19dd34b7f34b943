import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import OntogenyError
from tasks.specimen.config import SpecimenConfig
from tasks.specimen.runs import train_all
from tasks.specimen.train import is_done, train_run

Make = Callable[..., SpecimenConfig]


def weights(config: SpecimenConfig) -> dict[str, bytes]:
    files = config.out.glob("seed*/step*/model.safetensors")
    return {str(path.relative_to(config.out)): path.read_bytes() for path in sorted(files)}


def test_parallel_processes_give_the_bits_of_this_one(tiny: Make) -> None:
    config = tiny("many", workers=2)
    seen: dict[int, list[int]] = {0: [], 1: []}
    runs = train_all(config, lambda seed, step, steps, loss: seen[seed].append(step))
    assert runs == [config.run_path(0), config.run_path(1)]
    assert seen == {0: list(range(1, 11)), 1: list(range(1, 11))}

    alone = tiny("alone")
    for seed in (0, 1):
        train_run(alone, seed)
    assert weights(config) == weights(alone)

    seen = {0: [], 1: []}
    started = time.perf_counter()
    train_all(config, lambda seed, step, steps, loss: seen[seed].append(step))
    assert seen == {0: [], 1: []}
    assert time.perf_counter() - started < 1.0  # no process was started


def test_a_failing_run_is_named_and_disturbs_no_other(tiny: Make) -> None:
    config = tiny()
    config.run_path(0).write_text("a file where the run's folder should be")
    with pytest.raises(OntogenyError, match=r"1 of 2 runs failed: seed0: .*FileExistsError"):
        train_all(config)
    assert is_done(config, 1)


PARENT = """
import sys
from tasks.specimen.config import SpecimenConfig
from tasks.specimen.runs import train_all
train_all(SpecimenConfig.model_validate_json(sys.argv[1]), lambda *event: print(*event, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_no_process_outlives_its_parent(tiny: Make, number: signal.Signals) -> None:
    config = tiny(steps=1_000_000, seeds=1, every=100_000)
    command = [sys.executable, "-c", PARENT, config.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline()
        children = Path(f"/proc/{parent.pid}/task").glob("*/children")
        pids = [int(pid) for path in children for pid in path.read_text().split()]
        assert len(pids) == 1
        os.kill(parent.pid, number)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pids[0]}").exists() and _running(pids[0]):
        assert time.monotonic() < deadline, "the worker goes on without its parent"
        time.sleep(0.05)
    shutil.rmtree(config.out)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
