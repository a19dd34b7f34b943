"""The one pass: a model runs over the probe once and feeds every reduction that any analyzer needs."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from analyzers.adapters import ATTENTION, ATTENTION_SITES, VALUE_NORM, Model
from analyzers.attention_blocks import QueryBlock, Watch, observed
from analyzers.reductions import Batch, Spec, State

LOGITS = "logits"


def batches(
    tokens: Int64[Tensor, "sequences time"], size: int, domains: Sequence[str | None] | None = None
) -> Iterator[Batch]:
    """The probe in batches of ``size`` sequences, in order; ``domains`` are the labels of its sequences."""
    probe = Batch(tokens, torch.arange(tokens.shape[0]), domains=None if domains is None else tuple(domains))
    for start in range(0, tokens.shape[0], size):
        yield dataclasses.replace(probe.part(slice(start, start + size)), probe=probe)


def missing_site(model: Model, specs: Iterable[Spec]) -> str | None:
    """One sentence about the first spec whose site the model lacks; None if it has all.

    A pass serves many analyzers: those that ask for what is not there are to be left out before it.
    """
    for spec in specs:
        try:
            model.module(spec.site, spec.layer)
        except KeyError as error:
            return str(error.args[0])
    return None


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
    models are taken in float32. If no spec reads the logits, the unembedding is not computed. If a spec names
    ``attention`` or ``value_norm``, the layer's attention is computed by blocks of queries, which the states
    see; the model's output is the same, up to rounding.

    Raises:
        KeyError: the model has no such site.
        ValueError: a site's module did not run exactly once per batch, or its output is not of the batch's
            shape. What a person's own loader says of a model may be wrong, and must not become numbers. Or a
            batch has padding, and a state does not know of it.
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
            narrow = values.dtype in (torch.float16, torch.bfloat16)
            if narrow and not all(getattr(state, "widens", False) for state in by_place[place]):
                values = values.float()
            for state in by_place[place]:
                state.update(values, current[0])

        return take

    def block_taker(place: tuple[str, int | None]) -> Callable[[QueryBlock, slice], None]:
        def take(block: QueryBlock, sequences: slice) -> None:
            part = current[0].part(sequences)
            runs[place] += part.tokens.shape[0] * block.probabilities.shape[2]
            for state in by_place[place]:
                state.update(block, part)

        return take

    watches: dict[int, Watch] = {}
    for site, layer in by_place:
        model.module(site, layer)
        if layer is not None and site in ATTENTION_SITES:
            rows, values = (ATTENTION, layer), (VALUE_NORM, layer)
            watches[layer] = Watch(
                block_taker(rows) if rows in by_place else None,
                taker(values) if values in by_place else None,
            )

    with ExitStack() as hooks:
        for place in by_place:
            if place[0] not in ATTENTION_SITES:
                hooks.enter_context(_hooked(model.module(*place), taker(place)))
        if watches:
            hooks.enter_context(observed(model, watches))
        for batch in stream:
            _refuse_padding(batch, states)
            current[:] = [batch]
            runs.clear()
            model.run(
                batch.tokens.to(device),
                logits=logits,
                mask=None if batch.mask is None else batch.mask.to(device),
            )
            for place in by_place:
                # Blocks of attention count the queries that they hold.
                ran = runs[place] / batch.tokens.numel() if place[0] == ATTENTION else runs[place]
                if ran != 1:
                    raise ValueError(f"{_named(place)}: its module ran {ran:g} times, not once")
    return states


def merged(parts: Iterable[Mapping[Spec, State]]) -> dict[Spec, State]:
    """The states of a pass from those of passes over parts of its sequences, given in order of sequences.

    Each part is ``batch.part(...)`` of one batch that numbers all sequences, so that a state knows which of
    them it has seen. Sums of floating-point numbers are those of the whole pass up to rounding: the parts
    are added in another order. The states of the first part are used up.

    Raises:
        ValueError: there is no part, or parts differ in their specs.
    """
    whole: dict[Spec, State] | None = None
    for states in parts:
        if whole is None:
            whole = dict(states)
            continue
        if whole.keys() != states.keys():
            raise ValueError("the parts of a pass have gathered different statistics")
        for spec, state in states.items():
            whole[spec].merge(state)
    if whole is None:
        raise ValueError("a pass has at least one part")
    return whole


def run_replicas(
    models: Sequence[Model], stream: Iterable[Batch], specs: Iterable[Spec]
) -> dict[Spec, State]:
    """The pass of :func:`run_pass`, its batches split over replicas of the model, each in its own thread.

    Every replica takes contiguous batches, cut as without it, so that activations are the same; the states
    are merged in that order, and sums are those of one model up to rounding.

    Raises:
        KeyError, ValueError: as :func:`run_pass`.
    """
    whole, asked = list(stream), list(specs)
    size, rest = divmod(len(whole), len(models))
    ends = [number * size + min(number, rest) for number in range(len(models) + 1)]
    parts = [whole[start:end] for start, end in pairwise(ends)]
    used = [(model, part) for model, part in zip(models, parts, strict=True) if part]
    if len(used) < 2:
        return run_pass(models[0], whole, asked)
    with ThreadPoolExecutor(len(used)) as threads:
        return merged(threads.map(lambda each: run_pass(each[0], each[1], asked), used))


def _refuse_padding(batch: Batch, states: Mapping[Spec, State]) -> None:
    if batch.mask is None or bool(batch.mask.all()):
        return
    for spec, state in states.items():
        if not getattr(state, "knows_padding", False):
            raise ValueError(f"a batch has padding, which {type(spec).__name__} would count as tokens")


def _named(place: tuple[str, int | None]) -> str:
    site, layer = place
    return site if layer is None else f"{site} of block {layer}"
