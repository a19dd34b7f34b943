"""The one pass: a model runs over the probe once and feeds every reduction that any analyzer needs."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from analyzers.adapters import Adapter
from analyzers.reductions import Batch, Spec, State

LOGITS = "logits"


def batches(tokens: Int64[Tensor, "sequences time"], size: int) -> Iterator[Batch]:
    """The probe in batches of ``size`` sequences, in order."""
    for start in range(0, tokens.shape[0], size):
        part = tokens[start : start + size]
        yield Batch(part, torch.arange(start, start + part.shape[0]))


@contextmanager
def _hooked(module: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_module: nn.Module, _inputs: object, output: object) -> None:
        # A block returns a tensor in transformers 5, a tuple in 4.
        take(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()  # not inference_mode: states are merged and finished in place after the pass
def run_pass(adapter: Adapter, stream: Iterable[Batch], specs: Iterable[Spec]) -> dict[Spec, State]:
    """Run the model over all batches once; return the finished state of every spec.

    Activations are reduced inside the hook, so none outlives its layer. Statistics of float16 and bfloat16
    models are taken in float32. If no spec reads the logits, the unembedding is not computed.
    """
    states: dict[Spec, State] = {spec: spec.create() for spec in specs}
    by_place: dict[tuple[str, int | None], list[State]] = defaultdict(list)
    for spec, state in states.items():
        by_place[spec.site, spec.layer].append(state)
    model = adapter.model if any(site == LOGITS for site, _ in by_place) else adapter.trunk
    device = next(model.parameters()).device
    current: list[Batch] = []

    def taker(members: list[State]) -> Callable[[Tensor], None]:
        def take(values: Tensor) -> None:
            if values.dtype in (torch.float16, torch.bfloat16):
                values = values.float()
            for state in members:
                state.update(values, current[0])

        return take

    with ExitStack() as hooks:
        for (site, layer), members in by_place.items():
            hooks.enter_context(_hooked(adapter.module(site, layer), taker(members)))
        for batch in stream:
            current[:] = [batch]
            model(input_ids=batch.tokens.to(device), use_cache=False)
    return states
