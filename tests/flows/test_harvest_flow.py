"""The pool is filled while a series is measured: from the command line, after a kill, beside damage."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from flow_support import TINY, Cli, counting, lines_in, wait_for, watched

from storage import open_root
from storage.mirror import Mirror, repositories
from storage.pool import Pool, PoolInfo, list_pools

LOSS = ("--analyzer", "loss", "--harvest", *TINY)
BATCHES_PER_PASS = 3  # 24 sequences in batches of 8
ROWS, WIDTH = 24 * 31, 32


def pools(root: Path) -> dict[str, Pool]:
    return {info.run: Pool.open(str(root), info.key) for info in list_pools(str(root), "tiny")}


@pytest.fixture(scope="module")
def undisturbed(tiny_series: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    done = cli("measure", f"dir:{tiny_series}", "--root", str(root), *LOSS)
    assert done.returncode == 0, done.stderr
    assert "Measured 12 checkpoints (12 results, 12 forward passes)" in done.stdout
    assert "Harvested 12 snapshots into the pool." in done.stdout
    return root


def test_every_run_has_a_pool_of_its_own(undisturbed: Path) -> None:
    found = pools(undisturbed)
    assert sorted(found) == ["seed0", "seed1"]
    for pool in found.values():
        assert [s.step for s in pool.snapshots] == [0, 1, 2, 4, 6, 8]
        assert (pool.rows, pool.width) == (ROWS, WIDTH)
        (batch,) = pool.batches(ROWS, seed=0, epochs=1)
        norms = np.linalg.norm(batch.reshape(ROWS, 6, WIDTH).astype(float), axis=2)
        np.testing.assert_allclose(norms.mean(axis=0), np.sqrt(WIDTH), rtol=1e-6)
    assert np.array_equal(found["seed0"].tokens, found["seed1"].tokens)


def test_several_devices_write_the_same_pool(
    undisturbed: Path, tiny_series: Path, cli: Cli, tmp_path: Path
) -> None:
    own = ("--steps", "8", "--set", "crosscoder.steps='8'", "--set", "measure.devices=['cpu', 'cpu']")
    done = cli("measure", f"dir:{tiny_series}", "--root", str(tmp_path), *LOSS, *own)
    assert done.returncode == 0, done.stderr
    found, expected = pools(tmp_path), pools(undisturbed)
    assert sorted(found) == ["seed0", "seed1"]
    for run, pool in found.items():
        (mine,), last = pool.snapshots, expected[run].snapshots[-1]
        assert mine == last.model_copy(update={"recorded_at": mine.recorded_at})


def test_a_second_call_and_its_dry_run_find_all_done(undisturbed: Path, tiny_series: Path, cli: Cli) -> None:
    again = cli("measure", f"dir:{tiny_series}", "--root", str(undisturbed), *LOSS)
    assert "nothing was measured anew" in again.stdout
    dry = cli("measure", f"dir:{tiny_series}", "--root", str(undisturbed), "--dry-run", *LOSS)
    assert "0 of 12 checkpoints to measure" in dry.stdout
    assert "Pool:" not in dry.stdout


def test_dry_run_says_size_and_passes_of_the_pool(tiny_series: Path, cli: Cli, tmp_path: Path) -> None:
    own = ("--set", "crosscoder.probe.length=32", "--set", "crosscoder.probe.sequences=100")
    source = (f"dir:{tiny_series}", "--root", str(tmp_path), "--dry-run")
    dry = cli("measure", *source, *LOSS, *own, "--set", "crosscoder.steps=0..4")
    said = " ".join(dry.stdout.split())
    assert "Pool: 8 snapshots to harvest, 0.00 GB that stay on disk, 8 forward passes beyond those" in said
    shared = cli("measure", *source, *LOSS, "--set", 'crosscoder.runs=["seed1"]')
    assert "6 snapshots to harvest, 0.00 GB that stay on disk, 0 forward passes" in " ".join(
        shared.stdout.split()
    )
    assert not (tmp_path / "pools").exists()


def test_a_pool_over_the_budget_is_refused_before_anything_runs(
    tiny_series: Path, cli: Cli, tmp_path: Path
) -> None:
    source = (f"dir:{tiny_series}", "--root", str(tmp_path))
    done = cli("measure", *source, *LOSS, "--set", "measure.disk_gb=0.0005")
    assert done.returncode == 2
    assert re.search(
        r"ontogeny: the harvest of 12 snapshots needs 571,392 bytes, more than the disk budget of 500,000; "
        r"take fewer crosscoder.tokens or crosscoder.steps, or more measure.disk_gb$",
        done.stderr.strip(),
    )
    assert len(open_root(tmp_path).table("metrics").to_pandas().query("analyzer == 'loss'")) == 0


def test_exclusive_options_are_refused(tiny_series: Path, cli: Cli, tmp_path: Path) -> None:
    done = cli("measure", f"dir:{tiny_series}", "--root", str(tmp_path), "--harvest", "--from-spectra")
    assert done.returncode == 2
    assert "exclude each other" in done.stderr


def test_a_damaged_checkpoint_leaves_the_other_snapshots(series: Path, cli: Cli, tmp_path: Path) -> None:
    weights = series / "seed1" / "step4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    done = cli("measure", f"dir:{series}", "--root", str(tmp_path / "root"), *LOSS)
    assert done.returncode == 1
    assert "failed: seed1/step4" in done.stdout
    found = pools(tmp_path / "root")
    assert [s.step for s in found["seed1"].snapshots] == [0, 1, 2, 6, 8]
    assert len(found["seed0"].snapshots) == 6


def stored(root: Path) -> dict[str, tuple[PoolInfo, list[bytes]]]:
    return {
        run: (pool.info, [b.values.tobytes() for b in pool.stored(ROWS, 0, 1)])
        for run, pool in pools(root).items()
    }


def test_kill_then_again_equals_undisturbed(
    undisturbed: Path, tiny_series: Path, environment: dict[str, str], cli: Cli, tmp_path: Path
) -> None:
    log, root = tmp_path / "passes", tmp_path / "root"
    arguments = ["measure", f"dir:{tiny_series}", "--root", str(root), *LOSS]
    first = subprocess.Popen(watched(counting, log, arguments), env=environment, stderr=subprocess.DEVNULL)
    # Two batches into the third checkpoint: some of its rows are written.
    wait_for(lambda: lines_in(log) >= 2 * BATCHES_PER_PASS + 2, first)
    first.kill()
    first.wait()
    complete = len(list(root.glob("pools/*/[!.]*/snapshot.json")))
    assert complete >= 2
    before = lines_in(log)
    with counting(log):
        again = cli(*arguments)
    assert again.returncode == 0, again.stderr
    assert stored(root) == stored(undisturbed)
    after = lines_in(log) - before
    assert after <= (12 - complete + 1) * BATCHES_PER_PASS
    assert not list(root.glob("pools/*/.*"))


def test_two_processes_share_the_work(
    undisturbed: Path, tiny_series: Path, environment: dict[str, str], cli: Cli, tmp_path: Path
) -> None:
    root, log, ours = tmp_path / "root", tmp_path / "one", tmp_path / "two"
    arguments = ["measure", f"dir:{tiny_series}", "--root", str(root), *LOSS]
    other = subprocess.Popen(watched(counting, log, arguments), env=environment)
    wait_for(log.exists, other)
    with counting(ours):
        mine = cli(*arguments)
    assert mine.returncode == 0, mine.stderr
    assert other.wait(timeout=300) == 0
    assert stored(root) == stored(undisturbed)
    assert lines_in(log) + lines_in(ours) == 12 * BATCHES_PER_PASS


def test_downloads_have_what_the_pools_leave_of_the_budget(
    undisturbed: Path, tiny_series: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = sum(path.stat().st_size for path in (tiny_series / "seed0" / "step0").iterdir())
    pool = 3 * ROWS * WIDTH * 2
    with Mirror(repositories(tiny_series, "specimen")) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)

        def measured(root: str, limit: int) -> subprocess.CompletedProcess[str]:
            source = ("hub:specimen/seed0", "--root", str(tmp_path / root), "--set", "name=tiny")
            budget = ("--set", f"measure.disk_gb={limit / 1e9:.9f}", "--set", "measure.prefetch=0")
            return cli(
                "measure", *source, *LOSS, "--steps", "0,4,8", "--set", "crosscoder.steps=0,4,8", *budget
            )

        done = measured("enough", pool + checkpoint + 1000)
        assert done.returncode == 0, done.stderr
        refused = measured("tight", pool + checkpoint // 2)
    assert refused.returncode == 1
    failures = open_root(tmp_path / "tight").table("failures").to_pandas()["error"]
    assert len(failures) == 3
    assert failures.str.endswith(f"more than the disk budget of {checkpoint // 2:,}").all()
    (served,) = pools(tmp_path / "enough").values()
    folder = pools(undisturbed)["seed0"]
    assert [s.step for s in served.snapshots] == [0, 4, 8]
    theirs = {s.step: s.mean_norm for s in folder.snapshots}
    assert {s.step: s.mean_norm for s in served.snapshots} == {step: theirs[step] for step in (0, 4, 8)}
