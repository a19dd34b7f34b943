"""A trainer's gradients against autograd, its schedule, its reports, and going on from a state."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from crosscoder_support import NAMES, dense_gradients
from pydantic import ValidationError
from torch import Tensor

from analyzers.crosscoder.compiled import Compiled
from analyzers.crosscoder.gates import batch_top
from analyzers.crosscoder.kernels import Bags, Dense, Kernels
from analyzers.crosscoder.settings import TrainSettings
from analyzers.crosscoder.shards import Shards
from analyzers.crosscoder.training import Trainer

SNAPSHOTS, WIDTH, LATENTS, BATCH = 3, 8, 20, 17


def rows(seed: int, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, SNAPSHOTS * WIDTH, generator=torch.Generator().manual_seed(seed))


def trainer_of(**changes: Any) -> Trainer:
    settings = {"latents": LATENTS, "steps": 30, "learning_rate": 1e-2, **changes}
    if settings.get("activation", "batch-topk") == "batch-topk":
        settings.setdefault("k", 4)
    return Trainer(TrainSettings(**settings), SNAPSHOTS, WIDTH, torch.ones(SNAPSHOTS))


def disturbed(**changes: Any) -> Trainer:
    """A trainer after a step, whose snapshots are then made unlike, with dead latents."""
    trainer = trainer_of(**changes)
    trainer.step(rows(0))
    generator = torch.Generator().manual_seed(5)
    for name, tensor in trainer.parameters.named():
        size = 0.5 if name == "log_threshold" else 0.1
        tensor += size * torch.randn(tensor.shape, generator=generator)
    trainer.parameters.decoder[3] = 0
    trainer.idle[::4] = 10**9
    return trainer


def gradient_of_last_step(trainer: Trainer, name: str, before: Mapping[str, Tensor]) -> Tensor:
    """What the step moved Adam's first mean by: ``m = 0.9 m + 0.1 g``."""
    mean = trainer.state().tensors[f"adam.{name}.exp_avg"]
    return (mean - 0.9 * before.get(f"adam.{name}.exp_avg", torch.zeros_like(mean))) / 0.1


@pytest.mark.parametrize("gate", ["shared", "per-snapshot"])
@pytest.mark.parametrize("activation", ["batch-topk", "jumprelu", "relu"])
@pytest.mark.parametrize("kernels", [Dense(), Bags(), Compiled()], ids=["dense", "bags", "compiled"])
def test_gradients_are_those_of_the_dense_formula(kernels: Kernels, activation: str, gate: str) -> None:
    changes = {} if activation == "batch-topk" else {"penalty": 0.7, "penalty_warm_up": 0, "bandwidth": 0.3}
    trainer = disturbed(activation=activation, gate=gate, **changes)
    trainer.kernels = trainer.optimiser.kernels = kernels
    before = {name: tensor.clone() for name, tensor in trainer.parameters.named()}
    dead = trainer.idle >= trainer.settings.dead_after
    means = trainer.state().tensors
    report = trainer.step(rows(1))
    loss, gradients = dense_gradients(before, rows(1), trainer.settings, SNAPSHOTS, dead)
    assert report.loss == pytest.approx(loss, rel=1e-5)
    assert report.dead == 0.25
    for name in NAMES if activation == "jumprelu" else NAMES[:-1]:
        found = gradient_of_last_step(trainer, name, means)
        scale = float(gradients[name].abs().max())
        assert scale > 0
        torch.testing.assert_close(found / scale, gradients[name] / scale, rtol=1e-5, atol=1e-5)


def test_all_latents_active_is_a_plain_autoencoder() -> None:
    trainer = disturbed(k=LATENTS)
    trainer.parameters.decoder[3] = 0.1  # a latent with no strength at all is never active
    before = {name: tensor.clone() for name, tensor in trainer.parameters.named()}
    dead = trainer.idle >= trainer.settings.dead_after
    means = trainer.state().tensors
    trainer.step(rows(1))
    relu = TrainSettings(latents=LATENTS, steps=30, activation="relu", penalty=0)
    _, gradients = dense_gradients(before, rows(1), relu, SNAPSHOTS, dead)
    # The auxiliary loss reaches only latents that are dead.
    found, expected = gradient_of_last_step(trainer, "decoder", means), gradients["decoder"]
    torch.testing.assert_close(found[~dead], expected[~dead], rtol=1e-5, atol=1e-5)


def test_parts_of_a_step_add_up_to_the_whole() -> None:
    whole, parts = disturbed(activation="relu"), disturbed(activation="relu")
    parts.settings = parts.settings.model_copy(update={"micro_batch": 5})
    means = whole.state().tensors
    first, second = whole.step(rows(1)), parts.step(rows(1))
    assert second.loss == pytest.approx(first.loss, rel=1e-5)
    for name in NAMES[:-1]:
        one, other = (gradient_of_last_step(each, name, means) for each in (whole, parts))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("gate", ["shared", "per-snapshot"])
@pytest.mark.parametrize("activation", ["batch-topk", "jumprelu", "relu"])
def test_resuming_gives_the_same_bits(activation: str, gate: str) -> None:
    undisturbed = trainer_of(activation=activation, gate=gate, dead_after=40, micro_batch=7)
    for seed in range(4):
        undisturbed.step(rows(seed))
    resumed = Trainer.resume(undisturbed.state())
    for seed in range(4, 9):
        assert resumed.step(rows(seed)) == undisturbed.step(rows(seed))
    left, right = resumed.state(), undisturbed.state()
    assert left.numbers == right.numbers
    assert left.tensors.keys() == right.tensors.keys()
    assert all(torch.equal(left.tensors[name], right.tensors[name]) for name in left.tensors)
    assert torch.equal(resumed.crosscoder().threshold, undisturbed.crosscoder().threshold)


def test_a_state_from_before_the_first_step_is_the_start() -> None:
    fresh, resumed = trainer_of(), Trainer.resume(trainer_of().state())
    assert resumed.step(rows(0)) == fresh.step(rows(0))


def test_a_state_is_a_copy() -> None:
    trainer = trainer_of()
    state = trainer.state()
    kept = state.tensors["decoder"].clone()
    trainer.step(rows(0))
    assert torch.equal(state.tensors["decoder"], kept)


def test_seeds_decide_the_start() -> None:
    one, like, other = (trainer_of(seed=seed).parameters.decoder for seed in (1, 1, 2))
    assert torch.equal(one, like)
    assert not torch.equal(one, other)
    parts = one.view(LATENTS, SNAPSHOTS, WIDTH)
    torch.testing.assert_close(parts.norm(dim=2), torch.ones(LATENTS, SNAPSHOTS))
    assert torch.equal(parts, parts[:, :1].expand_as(parts))


@pytest.mark.parametrize("activation", ["batch-topk", "jumprelu", "relu"])
def test_the_norm_at_the_start_is_the_best_of_the_grid(activation: str) -> None:
    def error(norm: float) -> float:
        trainer = trainer_of(activation=activation)
        trainer._choose_norm = lambda rows: None  # type: ignore[method-assign]
        trainer.parameters.encoder.mul_(norm)
        trainer.parameters.decoder.mul_(norm)
        return trainer.step(rows(0)).error

    chosen = trainer_of(activation=activation)
    chosen._choose_norm(rows(0))
    norm = float(chosen._strengths().mean())
    assert 0.01 < norm < 10
    best = error(norm)
    assert best < min(error(norm * 10**0.1), error(norm / 10**0.1))
    assert torch.equal(chosen.parameters.encoder, chosen.parameters.decoder)


def test_the_schedule_rises_stays_and_falls() -> None:
    settings = TrainSettings(latents=LATENTS, steps=100, k=4)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert set(rates[10:81]) == {1.0}
    assert rates[80:] == pytest.approx([0.05 * (100 - step) for step in range(80, 100)])


def test_the_trained_threshold_is_the_mean_of_the_smallest_kept_values() -> None:
    trainer = trainer_of(threshold_decay=0.5, learning_rate=1e-12)
    cuts = []
    for seed in range(3):
        trainer.step(rows(seed))
        crosscoder = trainer.crosscoder()
        compared = crosscoder.before_gate(rows(seed)) * crosscoder.strengths().sum(dim=1)
        cuts.append(float(compared.flatten().topk(4 * BATCH).values.min()))
    expected = (cuts[0] * 0.25 + cuts[1] * 0.5 + cuts[2]) / 1.75
    assert crosscoder.threshold.tolist() == pytest.approx([expected] * LATENTS, rel=1e-5)


@pytest.mark.parametrize("gate", ["shared", "per-snapshot"])
def test_the_trained_crosscoder_computes_what_training_reported(gate: str) -> None:
    trainer = trainer_of(activation="jumprelu", gate=gate, penalty=0.01, learning_rate=1e-12)
    crosscoder = Trainer.resume(trainer.state())
    crosscoder._choose_norm(rows(0))
    report = trainer.step(rows(0))
    model = crosscoder.crosscoder()
    found = model.reconstruct(rows(0))
    assert float((found - rows(0)).square().sum() / BATCH) == pytest.approx(report.error, rel=1e-5)
    open_gates = (model.encode_each(rows(0)) > 0).sum() / (BATCH * SNAPSHOTS)
    assert report.l0 == pytest.approx(float(open_gates))
    spread = (rows(0) - rows(0).mean(dim=0)).view(BATCH, SNAPSHOTS, WIDTH).square().sum(dim=(0, 2))
    error = (found - rows(0)).view(BATCH, SNAPSHOTS, WIDTH).square().sum(dim=(0, 2))
    assert report.explained == pytest.approx((1 - error / spread).tolist(), rel=1e-4)


def test_batch_topk_keeps_k_per_row_on_average() -> None:
    assert trainer_of().step(rows(0)).l0 == 4
    assert trainer_of(gate="per-snapshot").step(rows(0)).l0 == 4


def test_latents_die_after_tokens_without_activity() -> None:
    trainer = trainer_of(dead_after=2 * BATCH, auxiliary=0.0)
    trainer.step(rows(0))
    trainer.parameters.encoder_bias[:5] = -1e6
    # Three more steps are counted; the report is of the state before its own step.
    dead = [trainer.step(rows(seed)).dead for seed in range(1, 5)]
    assert dead[0] == 0
    assert dead[2:] == [0.25, 0.25]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kernels", [Dense(), Compiled()], ids=["dense", "compiled"])
@pytest.mark.parametrize("shape", [(10, 100), (300, 1024)], ids=["whole", "sampled"])
def test_the_largest_of_a_batch_are_exact(shape: tuple[int, int], kernels: Kernels, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(*shape, generator=generator).relu()
    before[:, ::7] *= 100  # the sample must not miss that few latents are the largest
    factors = torch.rand(shape[1], groups, generator=generator)
    every = before[:, :, None] * factors
    for count in (1, 17, before.numel() // 6, 2 * before.numel() * groups):
        found = batch_top(before, factors, count, Shards(), kernels)
        positive = every[every > 0].sort(descending=True).values
        cut = positive[:count].min()
        assert found.cut == float(cut)
        open_ = torch.zeros(*every.shape, dtype=torch.bool)
        open_[found.pairs.row, found.pairs.latent] = found.open
        assert torch.equal(open_, every >= cut)
        assert bool(found.open.any(dim=1).all())


def test_a_batch_without_a_positive_value_has_no_active_pair() -> None:
    nothing = batch_top(torch.zeros(4, 6), torch.ones(6, 2), 3, Shards(), Compiled())
    assert (nothing.pairs.count, nothing.open.shape, nothing.cut) == (0, (0, 2), None)


def test_faults_are_said() -> None:
    trainer = trainer_of(steps=1)
    with pytest.raises(ValueError, match=r"\(17, 23\), expected \(batch, 24\)"):
        trainer.step(rows(0)[:, 1:])
    bad = rows(0)
    bad[0, 0] = float("inf")
    start = trainer.parameters.decoder.clone()
    with pytest.raises(FloatingPointError, match="step 1"):
        trainer.step(bad)
    assert trainer.steps_done == 0
    assert torch.equal(trainer.parameters.decoder, start)
    trainer.step(rows(0))
    with pytest.raises(ValueError, match="all 1 steps"):
        trainer.step(rows(0))
    with pytest.raises(ValidationError, match="more than the 4 latents"):
        TrainSettings(latents=4, steps=1, k=5)
    with pytest.raises(ValueError, match="3 snapshots"):
        Trainer(trainer.settings, SNAPSHOTS, WIDTH, torch.ones(2))
