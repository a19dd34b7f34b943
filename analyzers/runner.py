"""The one pass: a model runs over the probe once and feeds every reduction that any analyzer needs."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from analyzers.adapters import Model
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
def run_pass(model: Model, stream: Iterable[Batch], specs: Iterable[Spec]) -> dict[Spec, State]:
    """Run the model over all batches once; return the finished state of every spec.

    Activations are reduced inside the hook, so none outlives its layer. Statistics of float16 and bfloat16
    models are taken in float32. If no spec reads the logits, the unembedding is not computed.

    Raises:
        KeyError: the model has no such site.
        ValueError: a site's module did not run exactly once per batch, or its output is not of the batch's
            shape. What a person's own loader says of a model may be wrong, and must not become numbers.
    """
    states: dict[Spec, State] = {spec: spec.create() for spec in specs}
    by_place: dict[tuple[str, int | None], list[State]] = defaultdict(list)
    for spec, state in states.items():
        by_place[spec.site, spec.layer].append(state)
    logits = any(site == LOGITS for site, _ in by_place)
    device = next(model.model.parameters()).device
    current: list[Batch] = []
    runs: Counter[tuple[str, int | None]] = Counter()

    def taker(place: tuple[str, int | None]) -> Callable[[Tensor], None]:
        def take(values: Tensor) -> None:
            runs[place] += 1
            shape, wanted = tuple(values.shape), tuple(current[0].tokens.shape)
            if len(shape) != 3 or shape[:2] != wanted:
                raise ValueError(f"{_named(place)} is of shape {shape}, not {wanted} x channels")
            if values.dtype in (torch.float16, torch.bfloat16):
                values = values.float()
            for state in by_place[place]:
                state.update(values, current[0])

        return take

    with ExitStack() as hooks:
        for place in by_place:
            hooks.enter_context(_hooked(model.module(*place), taker(place)))
        for batch in stream:
            current[:] = [batch]
            runs.clear()
            model.run(batch.tokens.to(device), logits=logits)
            for place in by_place:
                if runs[place] != 1:
                    raise ValueError(f"{_named(place)}: its module ran {runs[place]} times, not once")
    return states


def _named(place: tuple[str, int | None]) -> str:
    site, layer = place
    return site if layer is None else f"{site} of block {layer}"
