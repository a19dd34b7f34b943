"""Measuring a hub series end to end: the same rows as from folders, faults, budget, two processes, kills."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from flow_support import ALONE, TINY, Cli, counting, lines_in, measured_rows, wait_for, watched
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file

from storage import open_root
from storage.mirror import Mirror, MirrorRequest, repositories

PER_PASS = 3  # 24 sequences in batches of 8


@pytest.fixture(scope="module")
def from_folder(tiny_series: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root in which the first run's folders are measured; their log is no part of what a hub serves."""
    root = tmp_path_factory.mktemp("from-folder")
    folder = shutil.copytree(
        tiny_series / "seed0", root / "series", ignore=shutil.ignore_patterns("training_log.jsonl")
    )
    done = cli("measure", f"dir:{folder}", "--root", str(root), "--set", "name=tiny", *TINY)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def hub(tiny_series: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    with Mirror(repositories(tiny_series, "specimen")) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        yield mirror


def hub_arguments(root: Path, *more: str) -> list[str]:
    return ["measure", "hub:specimen/seed0", "--root", str(root), "--set", "name=tiny", *TINY, *more]


def scratch_bytes(root: Path, folder: str = "") -> int:
    """Bytes under ROOT/scratch now; what is evicted while we look counts nothing."""
    total = 0
    for parent, _, names in os.walk(root / "scratch" / folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total


def test_hub_and_folder_give_the_same_rows(hub: Mirror, from_folder: Path, cli: Cli, tmp_path: Path) -> None:
    done = cli(*hub_arguments(tmp_path))
    assert done.returncode == 0, done.stderr
    for table in ("metrics", "spectra"):
        ours = measured_rows(tmp_path, table).drop(columns=["run"])
        assert_frame_equal(ours, measured_rows(from_folder, table).drop(columns=["run"]), check_exact=True)
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))
    again = cli(*hub_arguments(tmp_path))
    assert "All 6 checkpoints were already there; nothing was measured anew." in again.stdout


def test_dry_run_says_what_would_be_downloaded(hub: Mirror, cli: Cli, tmp_path: Path) -> None:
    done = cli(*hub_arguments(tmp_path, "--steps", "0,1", "--dry-run"))
    assert done.returncode == 0, done.stderr
    assert "2 of 2 checkpoints to measure" in done.stdout
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))
    assert not any(path.suffix == ".safetensors" for path in hub.bytes_served)


def test_a_specimen_is_served_as_a_hub(
    tiny_series: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    recipe = json.loads((tiny_series / "specimen.json").read_text())["recipe"]
    settings = [f"{key}={value}" for key, value in recipe.items() if key != "threads"]
    options = [word for setting in settings for word in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "specimen",
        "--out",
        str(tiny_series),
        "--seeds",
        "2",
        "--serve",
    ]
    with subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            lines = [served.stdout.readline() for _ in range(2)]
            while "HF_ENDPOINT=" not in lines[-1]:
                assert lines[-1], lines
                lines.append(served.stdout.readline())
            url = lines[-1].split()[0].partition("=")[2]
            with urllib.request.urlopen(f"{url}/api/models/specimen/seed1/refs", timeout=10) as answer:
                branches = {branch["name"] for branch in json.load(answer)["branches"]}
        finally:
            served.send_signal(signal.SIGINT)
    assert branches == {"step0", "step1", "step2", "step4", "step6", "step8"}
    assert served.returncode == 0


def test_a_checkpoint_is_compared_with_the_first_whether_that_is_chosen_or_not(
    hub: Mirror, cli: Cli, tiny_series: Path, tmp_path: Path
) -> None:
    chosen = ("--steps", "6,8", "--analyzer", "weight_change", "--analyzer", "similarity")
    # A sample of its own: those of earlier tests in this process may still be in memory.
    chosen += ("--set", "measure.parameters.similarity.seed=7")
    plan = cli(*hub_arguments(tmp_path, *chosen, "--dry-run"))
    assert "1 more are read because others are compared with them" in plan.stdout
    done = cli(*hub_arguments(tmp_path, *chosen))
    assert done.returncode == 0, done.stderr
    # The first checkpoint is run once, to be compared with both.
    assert "Measured 2 checkpoints (4 results, 3 forward passes)" in done.stdout
    wide = open_root(tmp_path).table("metrics").wide()
    assert list(wide["step"]) == [6, 8]
    assert wide["cka_previous[final_norm]"].notna().tolist() == [False, True]
    matrices = [load_file(tiny_series / "seed0" / f"step{step}" / "model.safetensors") for step in (0, 8)]
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    distance = float((matrices[1][name].double() - matrices[0][name].double()).norm())
    assert wide["weight_distance_first[mlp.up.1]"][1] == pytest.approx(distance, rel=1e-12)
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))


def test_three_broken_checkpoints_are_named_and_the_others_measured(
    series: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (series / "seed0" / "step1" / "model.safetensors").unlink()
    weights = series / "seed0" / "step4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    (series / "seed0" / "step6" / "config.json").write_text('{"model_type": "unheard-of"}')
    with Mirror(repositories(series, "specimen")) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        done = cli(*hub_arguments(tmp_path, *ALONE))
    assert done.returncode == 1
    assert "Measured 3 checkpoints" in done.stdout
    for step in (1, 4, 6):
        assert f"failed: main/step{step} " in done.stdout
    assert sorted(open_root(tmp_path).table("failures").to_pandas()["step"]) == [1, 4, 6]
    assert sorted(set(open_root(tmp_path).table("metrics").to_pandas()["step"])) == [0, 2, 8]


class Broken(Mirror):
    """A hub with one fault per step: some pass when asked again, some last."""

    def __init__(self, repos: Mapping[str, Path]) -> None:
        self.struck: Counter[str] = Counter()
        super().__init__(repos)

    def intercept(self, request: MirrorRequest, method: str, path: str) -> bool:
        _, _, revision = path.partition("/seed0/")
        commit, _, name = revision.partition("/")[2].partition("/")
        branch = self.find("specimen/seed0", commit)
        if branch is None:
            return False
        place = f"{branch.name}/{name}" if name else branch.name
        self.struck[place] += 1
        weights = branch.files["model.safetensors"].path
        match place, self.struck[place]:
            case ("step0", _):
                request.missing("RevisionNotFound", "revision")
            case ("step1" | "step1/model.safetensors", 1):
                request.answer(429, headers={"Retry-After": "0"})
            case ("step2/model.safetensors", 1):
                data = weights.read_bytes()
                request.send_response(200)
                request.send_header("Content-Length", str(len(data)))
                request.end_headers()
                request.wfile.write(data[:5000])
                request.close_connection = True
            case ("step8/model.safetensors", 1) | ("step4/model.safetensors", _):
                request.answer(200, bytes(byte ^ 255 for byte in weights.read_bytes()))
            case ("step6/model.safetensors", _):
                request.answer(200, b"version https://git-lfs.github.com/spec/v1\n")
            case _:
                return False
        return True


def test_every_fault_ends_in_a_failure_or_in_the_same_rows(
    tiny_series: Path, from_folder: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONTOGENY_HUB_WAIT", "0.01")
    with Broken(repositories(tiny_series, "specimen")) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        done = cli(*hub_arguments(tmp_path, *ALONE))
    assert done.returncode == 1, done.stderr
    reasons = {row["step"]: row["error"] for row in open_root(tmp_path).table("failures").to_pylist()}
    assert set(reasons) == {0, 4, 6}
    assert reasons[0].endswith("the commit is not there (404)")
    assert "its digest is" in reasons[4]
    assert "a Git LFS pointer is served in its place" in reasons[6]
    for step in reasons:
        assert f"failed: main/step{step} " in done.stdout
    for table in ("metrics", "spectra"):
        expected = measured_rows(from_folder, table).drop(columns=["run"])
        there = expected["step"].isin([1, 2, 8]) & expected["analyzer"].isin(ALONE)
        expected = expected[there].reset_index(drop=True)
        ours = measured_rows(tmp_path, table).drop(columns=["run"])
        assert_frame_equal(ours, expected, check_exact=True)
    assert scratch_bytes(tmp_path, "tiny") == 0


def test_disk_in_use_stays_within_the_budget(hub: Mirror, cli: Cli, tmp_path: Path) -> None:
    one = sum(p.stat().st_size for p in (next(iter(hub.repos.values())) / "step0").iterdir())
    budget = int(3.5 * one)  # three of them fit, four do not
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            most[0] = max(most[0], scratch_bytes(tmp_path, "tiny"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = cli(*hub_arguments(tmp_path, "--set", f"measure.disk_gb={budget / 1e9}"))
    finally:
        stop.set()
        watcher.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert one <= most[0] <= budget


def test_a_checkpoint_over_the_budget_is_a_failure(hub: Mirror, cli: Cli, tmp_path: Path) -> None:
    done = cli(*hub_arguments(tmp_path, "--steps", "0", "--set", "measure.disk_gb=1e-6"))
    assert done.returncode == 1
    (failure,) = open_root(tmp_path).table("failures").to_pylist()
    assert "more than the disk budget of 1,000" in failure["error"]


def test_downloads_can_be_kept(hub: Mirror, cli: Cli, tmp_path: Path) -> None:
    done = cli(*hub_arguments(tmp_path, "--steps", "0,1", "--set", "measure.keep=true"))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "downloads").rglob("model.safetensors"))) == 2


def test_two_processes_share_the_work(
    tiny_series: Path, cli: Cli, environment: dict[str, str], tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    assert cli("measure", f"dir:{tiny_series}", "--root", str(alone), *ALONE, *TINY).returncode == 0
    root, log, ours = tmp_path / "root", tmp_path / "one", tmp_path / "two"
    arguments = ["measure", f"dir:{tiny_series}", "--root", str(root), *ALONE, *TINY]
    other = subprocess.Popen(
        watched(counting, log, arguments), env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for(log.exists, other)
    with counting(ours):
        mine = cli(*arguments)
    assert mine.returncode == 0, mine.stderr
    _, errors = other.communicate(timeout=200)
    assert other.returncode == 0, errors
    assert lines_in(log) + lines_in(ours) == 12 * PER_PASS
    for table in ("metrics", "spectra"):
        assert_frame_equal(measured_rows(root, table), measured_rows(alone, table))


def test_kill_in_a_download_then_again_equals_undisturbed(
    tiny_series: Path,
    from_folder: Path,
    environment: dict[str, str],
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "root"
    command = [sys.executable, "-m", "flows.cli", *hub_arguments(root)]
    with Mirror(repositories(tiny_series, "specimen"), bytes_per_second=400_000) as slow:
        first = subprocess.Popen(command, env=environment | {"HF_ENDPOINT": slow.url})
        wait_for(lambda: scratch_bytes(root, "tiny") >= 100_000, first)
        first.kill()
        first.wait()
    with Mirror(repositories(tiny_series, "specimen")) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        again = cli(*hub_arguments(root))
    assert again.returncode == 0, again.stderr
    for table in ("metrics", "spectra"):
        ours = measured_rows(root, table).drop(columns=["run"])
        assert_frame_equal(ours, measured_rows(from_folder, table).drop(columns=["run"]), check_exact=True)


# Runs the command line and dies in its Nth write: half of the bytes written, or all and not yet named.
DIES_WRITING = """
import os, signal, sys
import storage.store as store
from flows.cli import main
left, moment = int(sys.argv[1]), sys.argv[2]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
class Torn:
    def __init__(self, path, mode):
        self.stream = open(path, mode)
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.stream.close()
    def write(self, data):
        global left
        left -= 1
        if left == 0 and moment == "half":
            self.stream.write(data[: len(data) // 2])
            self.stream.flush()
            die()
        if left == 0:
            store.os.replace = die
        self.stream.write(data)
store.open = Torn
sys.argv = ["ontogeny", *sys.argv[3:]]
main()
"""


@pytest.mark.long
def test_kill_in_every_few_writes_until_done_equals_undisturbed(
    from_folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    command = ["measure", f"dir:{from_folder / 'series'}", "--root", str(root), "--set", "name=tiny", *TINY]
    ends = []
    for number, moment in zip((3, 13, 14, 1000), ("half", "whole") * 2, strict=True):
        arguments = [sys.executable, "-c", DIES_WRITING, str(number), moment, *command]
        done = subprocess.run(
            arguments, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        ends.append(done.returncode)
    assert ends == [-signal.SIGKILL] * 3 + [0], done.stderr
    torn = [path.parents[2].name for path in root.rglob("*.parquet.*")]
    assert len(torn) == 3
    assert "checkpoints" in torn
    assert {"metrics", "spectra"} & set(torn)
    assert open_root(root).table("failures").to_pylist() == []
    for table in ("metrics", "spectra"):
        assert_frame_equal(measured_rows(root, table), measured_rows(from_folder, table), check_exact=True)
    catalogues = [
        open_root(where).table("checkpoints").to_pandas().drop(columns="recorded_at")
        for where in (root, from_folder)
    ]
    assert_frame_equal(*catalogues)


@pytest.mark.long
def test_memory_does_not_grow_with_checkpoints(
    tiny_series: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "many"
    for step in range(100):
        target = folder / f"step{step}"
        shutil.copytree(tiny_series / "seed0" / "step0", target)
        # Different weights: equal ones would be found out by the audit.
        data = bytearray((target / "model.safetensors").read_bytes())
        data[-4] = step
        (target / "model.safetensors").write_bytes(data)
    script = MEMORY.format(arguments=["measure", f"dir:{folder}", "--root", str(tmp_path / "root"), *TINY])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    resident = [int(line) for line in done.stderr.split() if line.isdigit()]
    assert len(resident) == 100
    assert resident[-1] <= 1.1 * resident[9]


MEMORY = """
import sys
from pathlib import Path
import tasks.walk
from flows.cli import main
measured = tasks.walk._measure
def watched(*arguments):
    measured(*arguments)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    print(pages, file=sys.stderr)
tasks.walk._measure = watched
sys.argv = ["ontogeny", *{arguments!r}]
main()
"""
