"""The harvest of real models: its rows, its passes, and what keeps a snapshot away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXForCausalLM

from flows.config import SeriesConfig, from_toml
from flows.measure import job_of, plan_series
from storage.errors import DamagedCheckpointError, UsageError
from storage.pool import Pool, list_pools
from storage.series import Checkpoint
from storage.store import Store
from tasks.catalogue import catalogue
from tasks.harvest import PlannedSnapshot, chosen_snapshots, even_choice
from tasks.measure import measure, plan
from tasks.models import probe_of, vocabulary_rows

CONFIG = """
name = "mine"
[source]
kind = "dir"
path = "{folder}"
[probe]
length = 16
sequences = 6
[measure]
analyzers = ["loss"]
batch = 4
[crosscoder]
harvest = true
"""
STEPS = (0, 10, 200)
ALL = 6 * 15


@pytest.fixture
def run(
    tmp_path: Path, tiny_neox: Callable[..., Any], tiny_tokenizer: Any, save_checkpoint: Callable[..., Path]
) -> Path:
    """A run of three checkpoints, whose weights differ."""
    for step in STEPS:
        model = GPTNeoXForCausalLM(tiny_neox().config)
        with torch.no_grad():
            for own, other in zip(model.parameters(), tiny_neox().parameters(), strict=True):
                own.copy_(other * (1 + step / 100))
        save_checkpoint(tmp_path / "runs" / "seed0" / f"step{step}", model, tiny_tokenizer)
    return tmp_path


def configured(folder: Path, **settings: Any) -> SeriesConfig:
    named = {f"crosscoder.{name}": value for name, value in settings.items()}
    return from_toml(CONFIG.format(folder=folder / "runs"), "mine.toml", named)


def harvested(folder: Path, config: SeriesConfig, root: str = "root") -> list[dict[str, int]]:
    """Counts of measuring every checkpoint of the run."""
    store = Store(str(folder / root))
    found = catalogue(store, config.name, config.source, None)
    job = job_of(config, store.root, found)
    return [measure(job, c, Path(c.location)) for c in found.sound]


def only_pool(folder: Path, root: str = "root") -> Pool:
    (info,) = list_pools(str(folder / root))
    return Pool.open(str(folder / root), info.key)


def counted(computed: int, passes: int, snapshots: int, failures: int = 0) -> dict[str, int]:
    return {
        "keys_computed": computed,
        "forward_passes": passes,
        "failures": failures,
        "snapshots": snapshots,
    }


def hidden(folder: Path, step: int, tokens: np.ndarray) -> np.ndarray:
    """What transformers gives after each block: ``[layers + 1, sequences, time, width]``."""
    model = GPTNeoXForCausalLM.from_pretrained(folder / "runs" / "seed0" / f"step{step}").eval()
    with torch.no_grad():
        states = model(torch.from_numpy(tokens), output_hidden_states=True).hidden_states
    return torch.stack(states).numpy()


@pytest.mark.parametrize("settings", [{}, {"tokens": 37, "layer": 0, "seed": 4}, {"site": "final_norm"}])
def test_rows_are_the_hidden_states_of_transformers(run: Path, settings: dict[str, Any]) -> None:
    assert harvested(run, configured(run, **settings)) == [counted(1, 1, 1)] * 3
    pool = only_pool(run)
    assert pool.rows == settings.get("tokens", ALL)
    assert [s.step for s in pool.snapshots] == list(STEPS)
    config = configured(run)
    probe = probe_of(run / "runs" / "seed0" / "step0", config.probe, "")
    assert pool.sequences is not None
    assert np.array_equal(pool.sequences, probe.tokens)
    sequence, position, token = pool.tokens.T
    assert np.array_equal(token, probe.tokens[sequence, position])
    assert position.min() >= 1
    assert len(np.unique(sequence * 16 + position)) == pool.rows
    # Hidden state number i + 1 is after block i, and the last one after the final norm.
    place = 3 if "site" in settings else settings.get("layer", 1) + 1
    rows = pool.read(np.arange(pool.rows)).reshape(pool.rows, 3, 128)
    for number, step in enumerate(STEPS):
        expected = hidden(run, step, probe.tokens)[place, sequence, position]
        stored = rows[:, number] / pool.scales[number]
        np.testing.assert_allclose(stored, expected, rtol=2**-10, atol=2e-5)
        norm = np.linalg.norm(expected, axis=1).mean()
        assert pool.snapshots[number].mean_norm == pytest.approx(norm, rel=1e-4)
        assert pool.scales[number] == pytest.approx(np.sqrt(128) / norm, rel=1e-4)


def test_a_second_call_harvests_nothing_and_another_site_is_another_pool(run: Path) -> None:
    config = configured(run)
    harvested(run, config)
    assert harvested(run, config) == [counted(0, 0, 0)] * 3
    # The middle block by its number is the same pool. For another, the loss is there: the pass is its own.
    assert harvested(run, configured(run, layer=1)) == [counted(0, 0, 0)] * 3
    assert harvested(run, configured(run, layer=2)) == [counted(0, 1, 1)] * 3
    assert len(list_pools(str(run / "root"), "mine")) == 2


def test_splits_into_batches_change_rounding_at_most(run: Path) -> None:
    for batch in (1, 6):
        config = configured(run, tokens=20)
        config = config.model_copy(update={"measure": config.measure.model_copy(update={"batch": batch})})
        harvested(run, config, f"root{batch}")
    one, six = (only_pool(run, f"root{batch}") for batch in (1, 6))
    assert np.array_equal(one.tokens, six.tokens)
    np.testing.assert_allclose(one.read(np.arange(20)), six.read(np.arange(20)), rtol=2**-9, atol=1e-5)


def test_a_probe_of_its_own_costs_a_pass_of_its_own(run: Path) -> None:
    config = configured(run, probe={"length": 24, "sequences": 11}, steps="0,200")
    plans = plan_series(config, str(run / "root"))
    assert [(p.harvested, p.pool_passes, p.pool_bytes) for p in plans] == [
        (True, 1, 11 * 23 * 128 * 2),
        (False, 0, None),
        (True, 1, 11 * 23 * 128 * 2),
    ]
    assert harvested(run, config) == [counted(1, 2, 1), counted(1, 1, 0), counted(1, 2, 1)]
    assert only_pool(run).rows == 11 * 23
    # The same text by its own name is the probe: nothing is added.
    (same, *_) = harvested(run, configured(run, probe={"length": 16, "sequences": 6}), "other")
    assert same == counted(1, 1, 1)


def test_rows_of_the_vocabulary_cost_no_pass(run: Path) -> None:
    harvested(run, configured(run, harvest=False))
    for mode, name in (("unembedding", "embed_out.weight"), ("embedding", "gpt_neox.embed_in.weight")):
        for tokens in (None, 40):
            settings = {} if tokens is None else {"tokens": tokens}
            root = f"{mode}{tokens}"
            counts = harvested(run, configured(run, mode=mode, **settings), root)
            assert counts == [counted(1, 1, 1)] * 3  # the pass is that of the loss
            pool = only_pool(run, root)
            assert pool.sequences is None
            assert (pool.tokens[:, :2] == -1).all()
            ids = pool.tokens[:, 2]
            assert len(np.unique(ids)) == pool.rows == (tokens or 257)
            for number, step in enumerate(STEPS):
                matrix = load_file(run / "runs" / "seed0" / f"step{step}" / "model.safetensors")[name]
                stored = next(iter(pool.stored(pool.rows, 0, 1)))
                columns = slice(number * 128, (number + 1) * 128)
                assert np.array_equal(
                    stored.values[:, columns], matrix.numpy()[ids[stored.rows]].astype("f2")
                )
    assert harvested(run, configured(run, mode="unembedding"), "root") == [counted(0, 0, 1)] * 3


def test_tied_matrices_are_one(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    for serialization in (True, False):
        folder = tmp_path / str(serialization)
        model.save_pretrained(folder)
        if not serialization:
            (folder / "model.safetensors").unlink()
            torch.save(model.transformer.state_dict(), folder / "pytorch_model.bin")
        for unembedding in (True, False):
            rows = torch.cat(list(vocabulary_rows(folder, unembedding, 7)))
            assert torch.equal(rows, model.get_output_embeddings().weight)


def test_a_matrix_that_is_not_in_the_files_is_damage(run: Path) -> None:
    folder = run / "runs" / "seed0" / "step0"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({k: v for k, v in weights.items() if "embed" not in k}, folder / "pytorch_model.bin")
    for unembedding, name in ((True, "W_U, and W_E is not tied"), (False, "W_E")):
        with pytest.raises(DamagedCheckpointError, match=f"no weight file holds {name}"):
            list(vocabulary_rows(folder, unembedding, 7))


def test_an_overflow_fails_the_snapshot_and_nothing_else(run: Path) -> None:
    folder = run / "runs" / "seed0" / "step10"
    model = GPTNeoXForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.bias[7] = 1e5
    model.save_pretrained(folder)
    assert harvested(run, configured(run)) == [counted(1, 1, 1), counted(1, 1, 0, 1), counted(1, 1, 1)]
    (failure,) = Store(str(run / "root")).table("failures").to_pylist()
    assert (failure["step"], failure["analyzer"]) == (10, "harvest")
    assert "seed0/step10, harvest: channel 7 at position 1 of sequence 0 is 100000" in failure["error"]
    assert [s.step for s in only_pool(run).snapshots] == [0, 200]
    assert not list((run / "root" / "pools").glob("*/.*"))


def test_a_broken_configuration_fails_one_checkpoint(run: Path) -> None:
    (run / "runs" / "seed0" / "step10" / "config.json").write_text('{"model_type": "none"}')
    counts = harvested(run, configured(run))
    assert [c["failures"] for c in counts] == [0, 1, 0]
    assert [s.step for s in only_pool(run).snapshots] == [0, 200]


def test_the_disk_budget_is_kept(run: Path) -> None:
    config, root = configured(run), str(run / "root")
    size = ALL * 128 * 2

    def limited(snapshots: float) -> SeriesConfig:
        gigabytes = size * snapshots / 1e9
        return config.model_copy(update={"measure": config.measure.model_copy(update={"disk_gb": gigabytes})})

    with pytest.raises(UsageError, match=rf"the harvest of 3 snapshots needs {3 * size:,} bytes, more than"):
        plan_series(limited(2.9), root)
    assert len(plan_series(limited(3), root)) == 3
    # Where another process filled the disk meanwhile, the snapshot is refused before its pass.
    assert [c["snapshots"] for c in harvested(run, limited(2.5))] == [1, 1, 0]
    (failure,) = Store(root).table("failures").to_pylist()
    assert (
        "the pool's snapshot of seed0/step200 needs 23,040 bytes, and the pools of the series hold"
        in (failure["error"])
    )
    with pytest.raises(UsageError, match=r"and the pools of the series hold 46,\d+ of the disk budget"):
        plan_series(limited(2.9), root)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tokens": ALL + 1}, "crosscoder.tokens: 91 tokens are asked for, and there are 90"),
        ({"layer": 3}, "crosscoder.layer is 3, and seed0/step0 has 3 blocks"),
        ({"steps": "0,3"}, "there is no checkpoint at step 3"),
        ({"runs": ["seed1"]}, "crosscoder.runs: there is no run 'seed1'; there are seed0"),
        ({"mode": "embedding", "tokens": 258}, "258 tokens are asked for, and there are 257"),
    ],
)
def test_what_cannot_be_is_one_sentence(run: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        plan_series(configured(run, **settings), str(run / "root"))
    assert not (run / "root" / "pools").exists()


def test_a_pool_on_an_object_store_is_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="a pool is mapped into memory and needs a local disk"):
        plan_series(configured(run), "memory://harvest")


def test_a_layer_outside_the_blocks_is_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="layer 1 is given, and site 'embedding' is in no block"):
        configured(run, site="embedding", layer=1)


def test_steps_are_chosen_evenly_over_their_logarithm() -> None:
    pythia = [0, *(2**i for i in range(10)), *range(1000, 144000, 1000)]
    chosen = even_choice(pythia)
    assert len(chosen) == 32
    assert chosen == sorted(set(chosen))
    assert {0, *(2**i for i in range(10)), 143000} <= set(chosen)
    # Farthest first: steps that are left out are no farther from a chosen one than two chosen ones are apart.
    tau, kept = np.log1p(pythia), np.log1p(chosen)
    assert np.abs(tau[:, None] - kept).min(axis=1).max() <= np.diff(kept).min()
    assert even_choice([5, 1, 1, 3]) == [1, 3, 5]
    assert even_choice(range(100), 2) == [0, 99]
    assert even_choice([7], 1) == [7]


def test_every_run_has_its_own_choice() -> None:
    def listed(run: str, steps: range) -> list[Checkpoint]:
        return [Checkpoint(series="s", run=run, step=s, revision=f"step{s}", location="x") for s in steps]

    both = [*listed("a", range(100)), *listed("b", range(5))]
    labels = chosen_snapshots(both, None, None)
    assert sum(label.startswith("a/") for label in labels) == 32
    assert {"b/step0", "b/step4"} < labels
    assert chosen_snapshots(both, "3,90", ["a"]) == {"a/step3", "a/step90"}


def test_a_model_of_ones_own_says_its_width_when_loaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "harvested_model.py").write_text(
        "from tasks.models import load_adapter\n"
        "def load(folder):\n"
        "    return load_adapter(folder, 'float32', 'cpu')\n"
    )
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(str(run))
    text = CONFIG.format(folder=run / "runs").replace(
        'kind = "dir"', 'kind = "dir"\nloader = "harvested_model:load"'
    )
    with pytest.raises(UsageError, match=r"crosscoder\.layer must be given with source\.loader"):
        plan_series(from_toml(text, "mine.toml"), str(run / "root"))
    with pytest.raises(UsageError, match=r"crosscoder\.mode 'embedding' reads the files of models of transf"):
        plan_series(from_toml(text, "mine.toml", {"crosscoder.mode": "embedding"}), str(run / "root"))
    own = from_toml(text, "mine.toml", {"crosscoder.layer": 1})
    assert [(p.harvested, p.pool_bytes) for p in plan_series(own, str(run / "root"))] == [(True, None)] * 3
    assert harvested(run, own) == [counted(1, 1, 1)] * 3
    harvested(run, configured(run), "other")
    mine, theirs = only_pool(run), only_pool(run, "other")
    assert np.array_equal(mine.read(np.arange(ALL)), theirs.read(np.arange(ALL)))
    tight = own.model_copy(update={"measure": own.measure.model_copy(update={"disk_gb": 1e-5})})
    assert harvested(run, tight, "tight") == [counted(1, 1, 0, 1)] * 3
    beyond = from_toml(text, "mine.toml", {"crosscoder.layer": 7})
    assert harvested(run, beyond, "beyond") == [counted(1, 1, 0, 1)] * 3
    failures = Store(str(run / "beyond")).table("failures").to_pylist()
    assert {row["error"] for row in failures} == {"the model has no block 7"}


def test_the_plan_names_the_harvest(run: Path) -> None:
    store = Store(str(run / "root"))
    config = configured(run)
    found = catalogue(store, config.name, config.source, None)
    todo = plan(job_of(config, store.root, found), store, found.sound[0])
    assert todo.names == ["loss", "harvest"]
    assert isinstance(todo.harvest, PlannedSnapshot)
    assert (todo.harvest.source, todo.harvest.bytes, todo.tokens) == (None, ALL * 256, 6 * 16)
