"""What measuring costs: the one pass over the bare forward pass, and beside the way of keeping all maps."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from analyzers.adapters import Adapter
from analyzers.attention import AttentionAnalyzer
from analyzers.attention_sinks import SinkAnalyzer
from analyzers.base import ActivationAnalyzer
from analyzers.logit_reductions import LogitsSpec
from analyzers.logits import LogitsAnalyzer
from analyzers.loss import LossAnalyzer
from analyzers.massive import MassiveAnalyzer
from analyzers.reductions import Spec
from analyzers.runner import batches, run_pass
from analyzers.spectra import SpectraAnalyzer
from benchmarks.memory import peak, peaks
from benchmarks.timing import Line, Seconds, alternate, machine, now

ANALYZERS: Mapping[str, Callable[[], ActivationAnalyzer]] = {
    "spectra": SpectraAnalyzer,
    "massive": MassiveAnalyzer,
    "attention": AttentionAnalyzer,
    "sinks": SinkAnalyzer,
    "loss": LossAnalyzer,
    "logits": LogitsAnalyzer,
}
# Issue 5: all of them together at width 512, length 512 and the vocabulary of Pythia, on the CPU.
_BAR = 1.5


@dataclass(frozen=True)
class Shape:
    """Size of the random GPT-NeoX and of the probe."""

    width: int = 512
    layers: int = 6
    vocabulary: int = 50304
    length: int = 512
    sequences: int = 8
    batch: int = 4
    dtype: str = "float32"


def forward_flops(shape: Shape, *, logits: bool) -> float:
    """FLOPs per token: 24 d^2 of the block's matrices, 4 d T of attention, and 2 d V of the unembedding."""
    block = 24 * shape.width**2 + 4 * shape.width * shape.length
    return shape.layers * block + (2 * shape.width * shape.vocabulary if logits else 0)


def gram_flops(shape: Shape) -> float:
    """FLOPs per token of the Gram matrices: d (d + 1) each, for the entries that differ.

    They stand at the embedding, after every block and after the final norm.
    """
    return (shape.layers + 2) * shape.width * (shape.width + 1)


def random_model(shape: Shape, device: torch.device) -> GPTNeoXForCausalLM:
    """A GPT-NeoX of that shape with random weights, and torch's generator at a fixed state."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.width // 64),
        intermediate_size=4 * shape.width,
        max_position_embeddings=shape.length,
    )
    model = GPTNeoXForCausalLM(config)
    model.set_attn_implementation("sdpa")
    return model.to(device, getattr(torch, shape.dtype)).eval()


def _prepared(shape: Shape, device: torch.device) -> tuple[Adapter, torch.Tensor]:
    adapter = Adapter(random_model(shape, device))
    return adapter, torch.randint(0, shape.vocabulary, (shape.sequences, shape.length))


def run(shape: Shape | None = None, repeats: int = 5) -> Iterator[Line]:
    """All activation analyzers together, each alone against the forward pass that it needs, and the maps."""
    shape = shape or Shape()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapter, tokens = _prepared(shape, device)
    yield _line("one_pass", list(ANALYZERS), shape, adapter, tokens, repeats)
    for name in ANALYZERS:
        yield _line(f"one_pass.{name}", [name], shape, adapter, tokens, repeats)
    yield _reference_line(shape, adapter, tokens, repeats)


def _one_pass(adapter: Adapter, tokens: torch.Tensor, batch: int, analyzers: Sequence[str]) -> None:
    specs: list[Spec] = [spec for each in analyzers for spec in ANALYZERS[each]().needs(adapter)]
    run_pass(adapter, batches(tokens, batch), specs)


@torch.inference_mode()
def _keeping_maps(adapter: Adapter, tokens: torch.Tensor, batch: int) -> None:
    """The usual way: eager attention returns all maps and hidden states, which are then reduced.

    It does less than the one pass: no logits of attention, no branches, no value norms, no places.
    """
    adapter.model.set_attn_implementation("eager")
    device = next(adapter.model.parameters()).device
    try:
        for part in tokens.split(batch):  # type: ignore[no-untyped-call]
            ids = part.to(device)
            out = adapter.model(
                ids, output_attentions=True, output_hidden_states=True, use_cache=False, labels=ids
            )
            float(out.loss)
            out.logits.float().logsumexp(-1).mean()
            for hidden in out.hidden_states:
                wide = hidden.double().flatten(0, 1)
                wide.T @ wide
                magnitude = hidden.float().abs().flatten(1)
                magnitude.topk(3).values.sum()
                magnitude.median(1).values.sum()
            for p in out.attentions:
                -torch.xlogy(p, p).sum(-1).mean((0, 2))
                p.sum(2)
                p.diagonal(-1, -2, -1).mean((0, 2))
    finally:
        adapter.model.set_attn_implementation("sdpa")


_SIDES: Mapping[str, Callable[[Adapter, torch.Tensor, int], None]] = {
    "ours": lambda adapter, tokens, batch: _one_pass(adapter, tokens, batch, list(ANALYZERS)),
    "against": _keeping_maps,
    "bare": lambda adapter, tokens, batch: _one_pass(adapter, tokens, batch, ["loss"]),
}


def print_peak(side: str, **shape: Any) -> None:
    """Print by how many bytes a side raises the peak of this process, beyond the model and a short run."""
    measured = Shape(**shape)
    adapter, tokens = _prepared(measured, torch.device("cpu"))
    _SIDES[side](adapter, tokens[:, :16], measured.batch)
    before = peak()
    _SIDES[side](adapter, tokens, measured.batch)
    print(peak() - before)


def _peaks(shape: Shape) -> dict[str, float]:
    """Megabytes of every side above the model and a short run."""
    return peaks(__name__, _SIDES, shape)


def _reference_line(shape: Shape, adapter: Adapter, tokens: torch.Tensor, repeats: int) -> Line:
    sides = {
        name: (lambda run=_SIDES[name]: run(adapter, tokens, shape.batch)) for name in ("ours", "against")
    }
    seconds, cpu = _timed(sides, repeats)
    ratio = seconds["ours"].median / seconds["against"].median
    return Line(
        name="one_pass.maps",
        ratio=ratio,
        against="eager attention with output_attentions and output_hidden_states, then reduced",
        bar=None,
        limit={"kind": "FLOP", "ratio": 1.0, "share_reached": 1.0 / ratio},
        seconds=seconds,
        repeats=repeats,
        shapes=asdict(shape),
        machine=machine(next(adapter.model.parameters()).device),
        date=now(),
        notes={"analyzers": list(ANALYZERS), "cpu_ratio": cpu, "peak_mb_above_model": _peaks(shape)},
    )


def _timed(sides: Mapping[str, Callable[[], object]], repeats: int) -> tuple[dict[str, Seconds], float]:
    """Seconds of both sides, and the ratio of their processor times, which other processes move less."""
    cpu: dict[str, list[float]] = {name: [] for name in sides}

    def counted(name: str) -> Callable[[], None]:
        def call() -> None:
            start = time.process_time()
            sides[name]()
            cpu[name].append(time.process_time() - start)

        return call

    times = alternate({name: counted(name) for name in sides}, repeats)
    medians = {name: statistics.median(each[1:]) for name, each in cpu.items()}  # the first is not counted
    return {side: Seconds.of(each) for side, each in times.items()}, medians["ours"] / medians["against"]


def _line(
    name: str, analyzers: Sequence[str], shape: Shape, adapter: Adapter, tokens: torch.Tensor, repeats: int
) -> Line:
    specs: list[Spec] = [spec for each in analyzers for spec in ANALYZERS[each]().needs(adapter)]
    logits = LogitsSpec() in specs
    bare = adapter.model if logits else adapter.trunk
    device = next(bare.parameters()).device

    @torch.inference_mode()
    def against() -> None:
        for batch in batches(tokens, shape.batch):
            bare(input_ids=batch.tokens.to(device), use_cache=False)

    def ours() -> None:
        run_pass(adapter, batches(tokens, shape.batch), specs)

    seconds, cpu = _timed({"ours": ours, "against": against}, repeats)
    ratio = seconds["ours"].median / seconds["against"].median
    extra = gram_flops(shape) if "spectra" in analyzers else 0.0
    forward = forward_flops(shape, logits=logits)
    least = 1 + extra / forward
    return Line(
        name=name,
        ratio=ratio,
        against=f"bare forward pass {'with' if logits else 'without'} logits, inference_mode, same batches",
        bar=_BAR if name == "one_pass" and device.type == "cpu" else None,
        limit={
            "kind": "FLOP",
            "extra_per_token": extra,
            "forward_per_token": forward,
            "ratio": least,
            "share_reached": least / ratio,
        },
        seconds=seconds,
        repeats=repeats,
        shapes=asdict(shape),
        machine=machine(device),
        date=now(),
        notes={"analyzers": list(analyzers), "cpu_ratio": cpu},
    )
