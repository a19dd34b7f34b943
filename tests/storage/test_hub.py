"""Hub sources through the mirror, with huggingface_hub's own client in processes of its own."""

import hashlib
import random
import shutil
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from storage_support import AskHub, WriteCheckpoint

from storage.keys import weights_sha256
from storage.local import describe_folder
from storage.mirror import Mirror, MirrorRequest, repositories
from storage.series import Checkpoint

COMMON = """
import json, sys
from pathlib import Path
from storage import hub
from storage.errors import OntogenyError, UsageError
from storage.keys import file_sha256
from storage.series import HubSource

SOURCE = HubSource(repos={"seed0": "specimen/seed0", "seed1": "specimen/seed1"}, tokens_per_step=8)

def sentence(call):
    try:
        call()
    except OntogenyError as error:
        return [type(error).__name__, str(error)]

def listed(source=SOURCE):
    return {c.label: c for c in hub.list_hub("tiny", source)[0]}
"""

VISIT = (
    COMMON
    + """
scratch = Path(sys.argv[1])
found, unparsed = hub.list_hub("tiny", SOURCE)
described = {}
for checkpoint in found:
    try:
        described[checkpoint.label] = hub.describe_hub(checkpoint).model_dump(mode="json")
    except OntogenyError as error:
        described[checkpoint.label] = str(error)
sharded = {c.label: c for c in found}["seed0/step2"]
with hub.fetched_hub(sharded, scratch) as folder:
    fetched = {f.name: f.read_bytes().hex() for f in folder.iterdir() if f.is_file()}
    where = str(folder)
texts = hub.fetch_texts(sharded, scratch)
known = hub.describe_hub(sharded).model_copy(update={"commit": "pinned", "tokens": None, "files": ()})
print(json.dumps({
    "found": [c.model_dump(mode="json") for c in found],
    "unparsed": unparsed,
    "described": described,
    "fetched": fetched,
    "where": where,
    "left": sorted(f.name for f in (scratch / "tiny").rglob("*") if f.is_file()),
    "texts": sorted(f.name for f in texts.iterdir() if f.is_file()),
    "again": hub.describe_hub(sharded, known).model_dump(mode="json"),
    "no repository": sentence(lambda: listed(HubSource(repos={"a": "specimen/none"}))),
    "no branch": sentence(lambda: listed(HubSource(repos={"a": "specimen/seed0"}, pattern="x(?P<step>1)"))),
}))
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: WriteCheckpoint) -> Path:
    base = tmp_path_factory.mktemp("served")
    write_checkpoint(base / "seed0" / "step10", seed=3)
    write_checkpoint(base / "seed0" / "step2", seed=1, shards=2)
    write_checkpoint(base / "seed0" / "step0")
    (write_checkpoint(base / "seed0" / "main") / "README.md").write_text("not a checkpoint")
    write_checkpoint(base / "seed1" / "stage2-ingredient1-step5-tokens3B", seed=4)
    pickled = write_checkpoint(base / "seed1" / "step3")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (write_checkpoint(base / "seed1" / "step4") / "model.safetensors").unlink()
    cut = write_checkpoint(base / "seed1" / "step6", shards=3)
    (cut / "model-00002-of-00003.safetensors").unlink()
    return base


@pytest.fixture(scope="module")
def visit(folder: Path, ask_hub: AskHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the client saw of the served folder."""
    with Mirror(repositories(folder, "specimen")) as mirror:
        result: dict[str, Any] = ask_hub(mirror.url, VISIT, str(tmp_path_factory.mktemp("scratch")))
        result["commits"] = {
            f"{repo.removeprefix('specimen/')}/{name}": branch.commit
            for repo in mirror.repos
            for name, branch in mirror.branches(repo).items()
        }
    return result


def test_branches_are_listed_in_order_with_their_commits(visit: dict[str, Any]) -> None:
    found = [(c["run"], c["step"], c["stage"], c["tokens"], c["revision"]) for c in visit["found"]]
    assert found == [
        ("seed0", 0, None, 0, "step0"),
        ("seed0", 2, None, 16, "step2"),
        ("seed0", 10, None, 80, "step10"),
        ("seed1", 3, None, 24, "step3"),
        ("seed1", 4, None, 32, "step4"),
        ("seed1", 6, None, 48, "step6"),
        ("seed1-stage2-ingredient1", 5, 2, 3 * 10**9, "stage2-ingredient1-step5-tokens3B"),
    ]
    for c in visit["found"]:
        assert c["commit"] == visit["commits"][f"{c['location'].partition('/')[2]}/{c['revision']}"]
    assert visit["unparsed"] == ["seed0/main"]


@pytest.mark.parametrize("name", ["seed0/step0", "seed0/step2", "seed0/step10", "seed1/step3"])
def test_descriptions_equal_those_of_the_folder(visit: dict[str, Any], folder: Path, name: str) -> None:
    run, _, revision = name.partition("/")
    here = Checkpoint(series="tiny", run=run, step=0, revision=revision, location=str(folder / name))
    local = describe_folder(here)
    seen = visit["described"][name]
    assert (seen["bytes"], seen["weights_sha256"]) == (local.bytes, local.weights_sha256)
    assert seen["files"] == [file.model_dump() for file in local.files]
    assert seen["fingerprint"] == seen["commit"]


def test_damage_is_named_and_excludes_nothing_else(visit: dict[str, Any]) -> None:
    assert visit["described"]["seed1/step4"] == (
        f"seed1/step4: no weights at commit {visit['commits']['seed1/step4']}"
    )
    assert visit["described"]["seed1/step6"] == "seed1/step6: 2 of 3 shards are there"


def test_a_fetched_checkpoint_is_complete_and_evicted_afterwards(visit: dict[str, Any], folder: Path) -> None:
    served = {f.name: f.read_bytes().hex() for f in (folder / "seed0" / "step2").iterdir()}
    assert visit["fetched"] == served
    assert len(served) == 5
    assert visit["left"] == []
    assert not Path(visit["where"]).exists()


def test_texts_come_without_weights(visit: dict[str, Any]) -> None:
    expected = [".complete", "config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert visit["texts"] == expected


def test_a_recorded_checkpoint_stays_pinned(visit: dict[str, Any]) -> None:
    assert visit["again"]["commit"] == "pinned"
    assert visit["again"]["tokens"] == 16
    assert visit["again"]["weights_sha256"] == visit["described"]["seed0/step2"]["weights_sha256"]


def test_unknown_repositories_and_patterns_are_usage_errors(visit: dict[str, Any]) -> None:
    expected = "repository 'specimen/none' does not exist on the Hub, or is not yours to read"
    assert visit["no repository"] == ["UsageError", expected]
    expected = "repository 'specimen/seed0' has no branch of the form 'x(?P<step>1)'"
    assert visit["no branch"] == ["UsageError", expected]


class Unreliable(Mirror):
    """Refuses, cuts connections and lies; each fault has its branch or repository."""

    def __init__(self, repos: dict[str, Path]) -> None:
        self.seen: Counter[str] = Counter()
        super().__init__(repos)

    def intercept(self, request: MirrorRequest, method: str, path: str) -> bool:
        if path == "/api/models/specimen/limited/refs":
            request.answer(429, headers={"Retry-After": "60"})
            return True
        if path.startswith("/api/models/specimen/pointer/tree/"):
            entry = {"type": "file", "path": "model.safetensors", "size": 134, "oid": "0" * 40}
            request.answer(200, [entry])
            return True
        if method == "GET" and path.startswith("/specimen/cut/resolve/") and path.endswith(".safetensors"):
            self.seen[request.headers.get("Range", "whole")] += 1
            if self.seen.total() == 1:
                return self.half(request, path)
        return False

    def half(self, request: MirrorRequest, path: str) -> bool:
        branch = self.find("specimen/cut", path.split("/")[4])
        assert branch is not None
        data = branch.files["model.safetensors"].path.read_bytes()
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[: len(data) // 2])
        request.close_connection = True
        return True


FAULTS = (
    COMMON
    + """
def source(name):
    return HubSource(repos={"seed0": f"specimen/{name}"})

def first(name):
    return listed(source(name))["seed0/step0"]

def missing():
    with hub.fetched_hub(first("gone").model_copy(update={"commit": "0" * 40}), Path(sys.argv[1])):
        raise AssertionError("there is no such commit")

with hub.fetched_hub(first("cut"), Path(sys.argv[1])) as folder:
    weights = file_sha256(folder / "model.safetensors")
print(json.dumps({
    "limited": sentence(lambda: listed(source("limited"))),
    "pointer": sentence(lambda: hub.describe_hub(first("pointer"))),
    "no commit": sentence(missing),
    "cut": weights,
}))
"""
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """More than the 10 MiB that the client writes at a time."""
    return random.Random(0).randbytes(24 << 20)


@pytest.fixture(scope="module")
def faults(
    folder: Path, large: bytes, ask_hub: AskHub, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    cut = tmp_path_factory.mktemp("large")
    (cut / "step0").mkdir()
    (cut / "step0" / "model.safetensors").write_bytes(large)
    names = ("limited", "pointer", "gone")
    with Unreliable(
        {f"specimen/{name}": folder / "seed0" for name in names} | {"specimen/cut": cut}
    ) as mirror:
        result: dict[str, Any] = ask_hub(mirror.url, FAULTS, str(tmp_path_factory.mktemp("scratch")))
        result["ranges"] = mirror.seen
    return result


def test_a_refusal_says_what_was_asked(faults: dict[str, Any]) -> None:
    kind, text = faults["limited"]
    assert kind == "HubError"
    assert text.startswith("specimen/limited: the Hub did not list branches: ")
    assert "429" in text


def test_weights_outside_lfs_are_no_weights(faults: dict[str, Any]) -> None:
    expected = "seed0/step0: 'model.safetensors' is not kept in LFS, so it is no weights file"
    assert faults["pointer"] == ["HubError", expected]


def test_a_commit_that_is_gone_is_named(faults: dict[str, Any]) -> None:
    kind, text = faults["no commit"]
    assert kind == "HubError"
    assert text.startswith("seed0/step0: the Hub did not list files: ")


def test_a_cut_download_is_resumed_where_it_broke(faults: dict[str, Any], large: bytes) -> None:
    assert faults["cut"] == hashlib.sha256(large).hexdigest()
    assert faults["ranges"] == {"whole": 1, f"bytes={10 << 20}-": 1}


def test_an_unreachable_hub_is_one_sentence(ask_hub: AskHub) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        code = COMMON + "print(json.dumps(sentence(listed)))"
        kind, text = ask_hub(url, code)
    assert kind == "HubError"
    assert text.startswith("specimen/seed0: the Hub did not list branches: ")


def test_a_changed_branch_gets_another_commit_and_the_old_one_is_gone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "seed0", tmp_path / "seed0")
    with Mirror({"specimen/seed0": tmp_path / "seed0"}) as mirror:
        before = mirror.branches("specimen/seed0")["step0"]
        (tmp_path / "seed0" / "step0" / "model.safetensors").write_bytes(b"other weights")
        after = mirror.branches("specimen/seed0")["step0"]
        assert mirror.find("specimen/seed0", before.commit) is None
    sha = hashlib.sha256(b"other weights").hexdigest()
    assert after.files["model.safetensors"].sha256 == weights_sha256([("model.safetensors", sha)]) == sha
