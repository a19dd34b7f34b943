"""A model class of one's own: the manual's example, and loaders that are wrong."""

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pandas.testing import assert_frame_equal

from analyzers.adapters import Model
from analyzers.weights import WeightsAnalyzer
from flows.config import from_toml
from flows.measure import job_of
from storage.errors import LoaderError, UsageError
from storage.keys import file_sha256
from storage.mirror import Mirror
from storage.series import HubSource
from storage.store import Store
from storage.window import Window
from tasks.catalogue import catalogue
from tasks.loader import OwnWeights, find_loader, load_own
from tasks.measure import measure, plan
from tasks.models import load_model

MANUAL = Path(__file__).parents[2] / "docs" / "own_models.md"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, and no module of it left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("my_model", "mine", "broken") or name.startswith("pack"):
            del sys.modules[name]


@pytest.fixture
def example(here: Path) -> dict[str, str]:
    """The manual's files by kind, written and its training run."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", MANUAL.read_text(encoding="utf-8"), re.DOTALL)
    (model, train), (toml,) = [[t for k, t in blocks if k == kind] for kind in ("python", "toml")]
    (here / "my_model.py").write_text(model)
    (here / "train.py").write_text(train)
    sys.path.insert(0, str(here))
    runpy.run_path("train.py")
    return {"model": model, "toml": toml}


def test_the_example_of_the_manual_is_measured(example: dict[str, str], here: Path) -> None:
    config = from_toml(example["toml"], "mine.toml")
    root = str(here / "root")
    store = Store(root)
    found = catalogue(store, config.name, config.source, None)
    assert [(c.run, c.step) for c in found.sound] == [("seed0", 0), ("seed0", 1)]
    assert found.findings == []
    weights = here / "my_runs" / "seed0" / "step1" / "weights.pt"
    assert found.sound[1].weights_sha256 == file_sha256(weights)
    job = job_of(config, root)
    for checkpoint in found.sound:
        assert measure(job, checkpoint, Path(checkpoint.location)) == {
            "keys_computed": len(config.measure.analyzers),
            "forward_passes": 1,
            "failures": 0,
            "snapshots": 0,
        }
        assert measure(job, checkpoint, Path(checkpoint.location))["keys_computed"] == 0
    rows = store.table("metrics").to_pandas()
    # Nothing to compare with was handed over.
    alone = set(config.measure.analyzers) - {"massive_channels", "similarity", "weight_change"}
    assert set(rows["analyzer"]) == alone
    assert not {"attention", "sinks"} & alone
    assert rows["protocol"].str.contains('"loader":"my_model:load"').all()

    # Known answers, by the model's own way.
    module = find_loader("my_model:load").__globals__["MyModel"]()
    module.load_state_dict(torch.load(weights, weights_only=True))
    probe = plan(job, store, found.sound[1]).probe
    assert probe is not None
    tokens = torch.from_numpy(probe.tokens)
    with torch.no_grad():
        logits = module(tokens)
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    last = rows[rows["step"] == 1].set_index(["metric", "site", "layer"])["value"]
    assert last["loss"].item() == pytest.approx(float(expected), rel=1e-5)
    key = module.blocks[1].attention.qkv.weight[32:64].detach()
    assert last["l2", "attention.key", 1] == pytest.approx(float(key.norm()), rel=1e-6)
    bias = torch.cat(
        [
            linear.bias.detach()
            for b in module.blocks
            for linear in (b.attention.qkv, b.attention.out, b.up, b.down)
        ]
    )
    assert last["bias_mean"].item() == pytest.approx(float(bias.double().mean()), rel=1e-6)


def test_a_hub_gives_the_rows_of_the_folder(
    example: dict[str, str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files behind ``source.kind = "hub"``: the mirror serves weights.pt, the loader reads them."""
    config = from_toml(example["toml"], "mine.toml")
    served = config.source.model_dump() | {"kind": "hub", "repos": {"seed0": "me/my-model"}}
    del served["path"], served["made_by"]
    there = config.model_copy(update={"source": HubSource.model_validate(served)})
    rows = {}
    with Mirror({"me/my-model": here / "my_runs" / "seed0"}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        for kind, series in (("dir", config), ("hub", there)):
            store = Store(here / kind)
            found = catalogue(store, series.name, series.source, None)
            assert (len(found.sound), found.findings) == (2, [])
            job = job_of(series, store.root)
            window = Window(store, job.scratch)
            for arrival in window.walk(found.sound, lambda _: True):
                assert arrival.folder is not None, arrival.error
                counts = measure(job, arrival.checkpoint, arrival.folder)
                assert (counts["keys_computed"], counts["failures"]) == (len(job.analyzers), 0)
            frame = store.table("metrics").to_pandas().drop(columns="recorded_at")
            rows[kind] = frame.sort_values(["key", "metric", "site", "layer"]).reset_index(drop=True)
    assert_frame_equal(rows["hub"], rows["dir"], check_exact=True)
    assert {path.name for path in mirror.bytes_served} == {"weights.pt"}
    assert not list((here / "hub").rglob("*.pt"))


def test_heads_of_the_manuals_model(example: dict[str, str], here: Path) -> None:
    weights = OwnWeights("my_model:load", here / "my_runs" / "seed0" / "step0")
    assert set(weights.heads().values()) == {4}
    rows = WeightsAnalyzer({"heads": True}).measure_weights(weights).rows
    query = next(
        matrix for site, layer, matrix in weights.matrices() if (site, layer) == ("attention.query", 1)
    )
    (found,) = [
        row.value
        for row in rows
        if (row.metric, row.site, row.layer, row.head) == ("l2", "attention.query", 1, 3)
    ]
    assert found == pytest.approx(float(query[24:32].norm()), rel=1e-6)


def test_another_loader_is_another_protocol(example: dict[str, str], here: Path) -> None:
    config = from_toml(example["toml"], "mine.toml")
    store = Store(here / "root")
    checkpoint = catalogue(store, config.name, config.source, "0").sound[0]
    job = job_of(config, store.root)
    keys = {
        item.key
        for loader in ("my_model:load", "my_model:load_2", None)
        for item in plan(job.model_copy(update={"loader": loader}), store, checkpoint).wanted
    }
    assert len(keys) == 3 * len(job.analyzers)
    without = plan(job.model_copy(update={"loader": None}), store, checkpoint).wanted
    assert all("loader" not in item.protocol for item in without)


def test_the_model_runs_in_the_dtype_asked_for_without_gradients(example: dict[str, str]) -> None:
    model = load_model(Path("my_runs/seed0/step0"), "float64", "cpu", "my_model:load")
    assert {p.dtype for p in model.model.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in model.model.parameters())
    assert not model.model.training
    assert (model.layers, model.width) == (2, 32)


def test_a_loader_in_a_package(here: Path) -> None:
    (here / "pack").mkdir()
    (here / "pack" / "__init__.py").write_text("")
    (here / "pack" / "inner.py").write_text("def load(folder):\n    return folder\n")
    assert find_loader("pack.inner:load")(here) == here


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere_to_be_found:load",
            "loader 'nowhere_to_be_found:load': module 'nowhere_to_be_found' cannot be imported: "
            "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        ("mine:load", "loader 'mine:load': module 'mine' has no function 'load'"),
        ("mine:number", "loader 'mine:number': module 'mine' has no function 'number'"),
        ("broken:load", "loader 'broken:load': module 'broken' cannot be imported: ValueError: planted"),
    ],
)
def test_a_name_that_is_wrong_is_one_sentence(here: Path, name: str, message: str) -> None:
    (here / "mine.py").write_text("number = 1\n")
    (here / "broken.py").write_text("raise ValueError('planted\\nsecond line')\n")
    with pytest.raises(UsageError) as caught:
        find_loader(name)
    assert str(caught.value) == message


BROKEN: dict[str, tuple[str, str]] = {
    "raises": ("raise KeyError('embed')", "loader 'mine:load' failed on 'step7': KeyError: 'embed'"),
    "other": (
        "return torch.nn.Linear(2, 2)",
        "loader 'mine:load' returned 'Linear', not an analyzers.adapters.Model of a torch module",
    ),
    "no module": (
        "m = net(); return Model(m, [Block(torch.nn.Linear(2, 2))], m[0], m[1], m[2], 2)",
        "loader 'mine:load' failed on 'step7': ValueError: output of block 0 is no module of the model, "
        "so its output cannot be seen",
    ),
    "no blocks": (
        "m = net(); return Model(m, [], m[0], m[1], m[2], 2)",
        "loader 'mine:load' failed on 'step7': ValueError: the model has no blocks",
    ),
}
PRELUDE = """
import torch
from analyzers.adapters import Block, Model

def net():
    return torch.nn.Sequential(torch.nn.Embedding(5, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 5))

def load(folder):
    """


@pytest.mark.parametrize("case", BROKEN)
def test_a_loader_that_fails_is_one_sentence(here: Path, case: str) -> None:
    body, message = BROKEN[case]
    (here / "mine.py").write_text(PRELUDE + body)
    with pytest.raises(LoaderError) as caught:
        load_own("mine:load", Path("runs/step7"))
    assert str(caught.value) == message


def test_weights_that_are_no_matrices_are_named(here: Path) -> None:
    listed = "matrices=lambda: iter([('mlp.up', 0, m[1].bias)]), biases=lambda: iter([m.nothing])"
    (here / "mine.py").write_text(
        f"{PRELUDE}m = net(); return Model(m, [Block(m[1])], m[0], m[1], m[2], 2, {listed})"
    )
    weights = OwnWeights("mine:load", here)
    with pytest.raises(LoaderError, match=r"^loader 'mine:load': mlp.up of block 0 is no matrix but \(2,\)$"):
        list(weights.matrices())
    with pytest.raises(LoaderError, match=r"^loader 'mine:load' failed to list weights: AttributeError: "):
        list(weights.biases())


def test_a_failing_loader_is_a_failure_of_the_checkpoint(example: dict[str, str], here: Path) -> None:
    config = from_toml(example["toml"], "mine.toml")
    store = Store(here / "root")
    first, second = catalogue(store, config.name, config.source, None).sound
    (here / "my_runs" / "seed0" / "step0" / "weights.pt").write_bytes(b"cut short")
    job = job_of(config, store.root)
    assert measure(job, first, Path(first.location))["failures"] == 1
    assert measure(job, second, Path(second.location))["failures"] == 0
    (failure,) = store.table("failures").to_pylist()
    assert failure["step"] == 0
    assert failure["error"].startswith("loader 'my_model:load' failed on 'step0': UnpicklingError")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"loader": "my_model"}, "loader 'my_model' is not module:function"),
        ({"loader": "my model:load"}, "loader 'my model:load' is not module:function"),
        ({"loader": "a:b:c"}, "loader 'a:b:c' is not module:function"),
        ({"weights": "*.pt"}, "weights '*.pt' need a loader that reads them"),
        ({"weights": "../*.pt", "loader": "a:b"}, "are no file names inside a checkpoint's folder"),
        ({"weights": "/x.pt", "loader": "a:b"}, "are no file names inside a checkpoint's folder"),
    ],
)
def test_settings_that_are_wrong_are_named(source: dict[str, str], message: str) -> None:
    lines = "".join(f'{key} = "{value}"\n' for key, value in source.items())
    with pytest.raises(UsageError, match=re.escape(message)):
        from_toml(f'name = "x"\n[source]\nkind = "dir"\npath = "runs"\n{lines}', "x.toml")


def test_only_a_loader_runs_code(
    here: Path, tiny_neox: Callable[..., Any], save_checkpoint: Callable[..., Path]
) -> None:
    """Neither a repository's own class nor a pickle that calls something."""
    folder = save_checkpoint(here / "step1", tiny_neox(), None)
    config = (folder / "config.json").read_text()
    mapped = config.replace(
        '"model_type"', '"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type"'
    )
    (folder / "config.json").write_text(mapped)
    (folder / "evil.py").write_text("open('ran', 'w')\n")
    assert isinstance(load_model(folder, "float32", "cpu"), Model)
    assert not (here / "ran").exists()
