"""What describing and auditing find on a hub, and what a download of it takes and leaves."""

from pathlib import Path

from faults import SOURCE, TREE, Fault, Serve, listed, sentence
from storage_support import WriteCheckpoint

from storage import hub, sources
from storage.series import Checkpoint, DirSource
from storage.store import open_root
from tasks.catalogue import catalogue

# --- describing ---


def test_a_pointer_that_was_committed(serve: Serve) -> None:
    serve(Fault("pointer in the tree", TREE))
    kind, text = sentence(lambda: hub.describe_hub(listed()))
    assert kind == "lfs-pointer"
    assert text == "seed0/step0: 'model.safetensors' is not kept in LFS, so it is no weights file"


def test_dtypes_are_read_by_a_small_request_where_asked_for(serve: Serve, faulty_folder: Path) -> None:
    mirror = serve()
    assert hub.describe_hub(listed(2)).dtype is None
    described = hub.describe_hub(listed(2), dtype=True)
    assert described.dtype == "F16"
    assert mirror.ranges("specimen/seed0@step2/model.safetensors") == ["bytes=0-65535"]
    assert hub.describe_hub(listed(2), described, dtype=True) == described
    kind, text = sentence(lambda: hub.describe_hub(listed(0), dtype=True))
    assert (kind, text) == ("damaged", "seed0/step0: 'model.safetensors' is no safetensors file")


def test_bytes_are_known_before_a_download(serve: Serve, faulty_folder: Path, tmp_path: Path) -> None:
    mirror = serve()
    checkpoint = listed(1)
    size = sources.download_bytes(checkpoint)
    assert size == sum(f.stat().st_size for f in (faulty_folder / "seed0" / "step1").iterdir())
    described = hub.describe_hub(checkpoint)
    asked = len(mirror.asked)
    assert sources.download_bytes(described) == size
    assert len(mirror.asked) == asked
    sources.download(described, tmp_path / "x")
    assert sum(f.stat().st_size for f in (tmp_path / "x").iterdir()) == size


def test_only_downloads_are_evicted(serve: Serve, faulty_folder: Path, tmp_path: Path) -> None:
    serve()
    target = sources.folder_of(listed(2), tmp_path)
    assert target == tmp_path / "tiny" / "seed0" / "step2"
    sources.download(listed(2), target)
    sources.evict(target)
    assert not target.exists()

    own = faulty_folder / "seed0" / "step2"
    local = Checkpoint(series="tiny", run="seed0", step=2, revision="step2", location=str(own))
    assert sources.folder_of(local, tmp_path) == own
    assert sources.download_bytes(local) == 0
    sources.download(local, own)
    sources.evict(own)
    assert sorted(f.name for f in own.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


# --- the catalogue ---


def test_every_fault_is_a_finding_and_the_others_go_on(
    serve: Serve, faulty_folder: Path, tmp_path: Path
) -> None:
    serve(Fault("unavailable", TREE), Fault("missing revision", "specimen/seed0@step1/tree"))
    store = open_root(tmp_path)
    found = catalogue(store, "tiny", SOURCE, None)
    assert [c.revision for c in found.sound] == ["step2"]
    rows = {row["revision"]: row for row in store.table("findings").to_pylist() if row["revision"]}
    assert {name: (row["kind"], row["severity"]) for name, row in rows.items()} == {
        "step0": ("unreachable", "error"),
        "step1": ("damaged", "error"),
    }
    assert found.reasons["seed0/step1"].endswith("the commit is not there (404)")
    assert set(found.reasons) == {"seed0/step0", "seed0/step1"}


def test_branches_without_weights_and_with_missing_shards(
    serve: Serve, tmp_path: Path, write_checkpoint: WriteCheckpoint
) -> None:
    """EleutherAI/pythia issue 202: three steps of the 410m seeds have branches without weights."""
    for step in (1, 2, 3, 4, 5):
        write_checkpoint(tmp_path / "seed0" / f"step{step}", seed=step, shards=3 if step == 4 else 1)
    (tmp_path / "seed0" / "step2" / "model.safetensors").unlink()
    (tmp_path / "seed0" / "step4" / "model-00002-of-00003.safetensors").unlink()
    serve(at=tmp_path)
    found = catalogue(open_root(tmp_path / "hub"), "tiny", SOURCE, None)
    assert [(f.step, f.kind, f.severity) for f in found.findings] == [
        (2, "damaged", "error"),
        (4, "missing-shard", "error"),
    ]
    assert [c.step for c in found.sound] == [1, 3, 5]
    local = catalogue(open_root(tmp_path / "dir"), "tiny", DirSource(path=str(tmp_path / "seed0")), None)
    assert [(f.step, f.kind) for f in local.findings] == [(2, "damaged"), (4, "missing-shard")]


def test_the_catalogue_of_a_hub_equals_that_of_its_folder(
    serve: Serve, faulty_folder: Path, tmp_path: Path
) -> None:
    serve()
    rows = {}
    for name, source in (("hub", SOURCE), ("dir", DirSource(path=str(faulty_folder)))):
        store = open_root(tmp_path / name)
        found = catalogue(store, "tiny", source, "1,2")
        rows[name] = store.table("checkpoints").to_pylist()
        known = sources.recorded(store, "tiny")
        assert {c.label: c for c in found.checkpoints} == {c.label: c for c in known.values()}
        again = catalogue(store, "tiny", source, "1,2")
        assert (again.checkpoints, again.findings) == (found.checkpoints, found.findings)
        assert store.table("checkpoints").to_pylist() == rows[name]
    own = {"commit", "location", "fingerprint", "dtype", "recorded_at", "text_bytes"}
    for there, here in zip(rows["hub"], rows["dir"], strict=True):
        assert {k: v for k, v in there.items() if k not in own} == {
            k: v for k, v in here.items() if k not in own
        }
    assert [file["name"] for file in rows["hub"][0]["files"]] == [
        f"model-0000{k}-of-00002.safetensors" for k in (1, 2)
    ]
