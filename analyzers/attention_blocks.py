"""Attention by blocks of queries: the rows of the maps pass by inside the model's own forward pass.

The model computes its attention with a function registered at transformers. Rows of a block are complete, so
no online softmax is needed, and no map of all queries, keys and heads ever exists.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from analyzers.adapters import Attention, Model
from analyzers.softmax import RowStatistics, softmax_

IMPLEMENTATION = "ontogeny_blocks"

# Numbers in a block: few calls matter more than that it stays in a processor's cache (2^19 took twice as
# long as 2^21 beyond the bare forward pass: the rows themselves are reduced in the cache, one after another).
_NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 26}
_QUERIES = 256


@dataclass(frozen=True, eq=False)
class QueryBlock:
    """Complete rows of the attention maps of some sequences of a batch, in float32 or wider.

    ``query`` and ``key`` are the positions of the first row and the first column, ``last`` says that no later
    query of these sequences follows. Blocks of a sequence come in order of queries. Where ``mask`` is False,
    the probability is exactly 0. Rows of padding hold no meaning.
    """

    probabilities: Float[Tensor, "batch heads queries keys"]
    logits: RowStatistics
    """Of the logits, scaled and capped as the model does it: ``[batch, heads, queries]`` each."""
    mask: Bool[Tensor, "any queries keys"]
    query: int
    key: int
    last: bool

    @property
    def maximum(self) -> Float[Tensor, "batch heads queries"]:
        """The largest logit of every row."""
        return self.logits.maximum

    @property
    def entropy(self) -> Float[Tensor, "batch heads queries"]:
        """``-sum_j A_ij ln A_ij`` in nats."""
        return self.logits.entropy

    @property
    def log_sum_exp(self) -> Float[Tensor, "batch heads queries"]:
        """``ln sum_j exp z_ij`` of the logits."""
        return self.logits.maximum + self.logits.log_sum

    @cached_property
    def visible(self) -> Tensor:
        """Number of keys that each query may attend to: ``[batch or 1, queries]``, int64."""
        return self.mask.sum(-1)


@dataclass(frozen=True, eq=False)
class Watch:
    """Who is told what passes in one layer: query blocks with the sequences they are of, and value norms."""

    blocks: Callable[[QueryBlock, slice], None] | None = None
    values: Callable[[Float[Tensor, "batch time heads"]], None] | None = None


def blockwise_attention(
    query: Float[Tensor, "batch heads time head_width"],
    key: Float[Tensor, "batch groups time head_width"],
    value: Float[Tensor, "batch groups time value_width"],
    take: Callable[[QueryBlock, slice], None],
    *,
    scaling: float,
    mask: Bool[Tensor, "batch one time time"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    numbers: int | None = None,
) -> Float[Tensor, "batch time heads value_width"]:
    """Causal attention, ``softmax(scaling q k^T) v``, by blocks of queries that ``take`` sees.

    Logits and softmax are float32 (float64 for such a model), the output is of the dtype of ``value``.
    ``groups`` of heads share keys and values. Without a ``mask`` the function imposes causality, and with
    ``window`` that a query sees itself and the ``window - 1`` tokens before it; a mask says both and padding.
    ``numbers`` bounds how many logits exist at a time. How queries are cut does not depend on the batch.
    """
    batch, heads, time, _ = query.shape
    groups = key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    numbers = numbers or _NUMBERS.get(query.device.type, _NUMBERS["cpu"])
    rows = max(1, min(_QUERIES, numbers // (heads * time), time))
    together = max(1, numbers // (heads * rows * time))
    output = value.new_empty(batch, time, heads, value.shape[-1])
    lowest = torch.finfo(dtype).min  # not -inf: rows of padding see no key, and must not become NaN
    position = torch.arange(time, device=query.device)
    for start in range(0, batch, together):
        part = slice(start, min(start + together, batch))
        k, v = key[part].to(dtype), value[part].to(dtype)
        for first in range(0, time, rows):
            end = min(first + rows, time)
            low = 0 if window is None else max(0, first - window + 1)
            if mask is None:
                distance = position[first:end, None] - position[None, low:end]
                seen = distance >= 0
                if window is not None:
                    seen &= distance < window
                seen = seen[None]
            else:
                seen = mask[part, 0, first:end, low:end]
            q = query[part, :, first:end].to(dtype) * scaling
            # Heads of a group side by side as rows: keys need not be repeated.
            q = q.reshape(q.shape[0], groups, -1, q.shape[-1])
            z = (q @ k[:, :, low:end].transpose(-1, -2)).view(-1, heads, end - first, end - low)
            if softcap is not None:
                z = z.div_(softcap).tanh_().mul_(softcap)
            if mask is None and window is None:  # only the square on the diagonal has hidden keys
                z[..., first - low :].masked_fill_(~seen[:, None, :, first - low :], lowest)
            else:
                z.masked_fill_(~seen[:, None], lowest)
            statistics = softmax_(z)
            mixed = z.view(z.shape[0], groups, -1, end - low) @ v[:, :, low:end]
            output[part, first:end] = mixed.view(z.shape[0], heads, end - first, -1).transpose(1, 2)
            take(QueryBlock(z, statistics, seen, first, low, end == time), part)
            del z, mixed  # or the next block would be made beside it
    return output


def output_factors(
    matrix: Float[Tensor, "width inner"], heads: int
) -> Float[Tensor, "heads head_width head_width"]:
    """``R_h`` with ``|R_h v| = |W_O^h v|`` for every value ``v``, where ``W_O^h`` is the head's slice of W_O.

    The triangular factor of the slice: a matrix of the head's width instead of the model's, and no digits
    are lost, as they would be with ``v^T (W^T W) v``.
    """
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    slices = wide.reshape(len(wide), heads, -1).movedim(1, 0)
    width, inner = slices.shape[1:]
    if width < inner:  # a head wider than the model: rows of zeros change no norm
        slices = torch.nn.functional.pad(slices, (0, 0, 0, inner - width))
    factors: Tensor = torch.linalg.qr(slices, mode="r").R
    return factors


def value_norms(
    value: Float[Tensor, "batch groups time value_width"],
    factors: Float[Tensor, "heads value_width value_width"],
) -> Float[Tensor, "batch time heads"]:
    """``|W_O^h v|`` of every token and head."""
    groups = value.shape[1]
    value = value.to(factors.dtype)
    each = factors.reshape(groups, -1, *factors.shape[1:])
    norms = [(value @ each[:, i].transpose(-1, -2)).norm(dim=-1) for i in range(each.shape[1])]
    return torch.stack(norms, dim=2).flatten(1, 2).transpose(1, 2)


# --- the function that transformers calls -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Watched:
    attention: Attention
    watch: Watch

    @cached_property
    def factors(self) -> Tensor:
        matrix = self.attention.matrix()
        config = self.attention.module.config
        return output_factors(matrix, int(config.num_attention_heads))  # type: ignore[arg-type, union-attr]


_watched: "WeakKeyDictionary[nn.Module, _Watched]" = WeakKeyDictionary()
# Arguments that change attention in a way that is not known here: they must not be passed over.
_UNKNOWN = ("s_aux", "position_bias")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    found = _watched.get(module)
    if found is not None and found.watch.values is not None:
        found.watch.values(value_norms(value, found.factors))
    if found is None or found.watch.blocks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        given = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, **others}
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **given
        )
        return output
    for name in _UNKNOWN:
        if others.get(name) is not None:
            raise ValueError(f"attention of {type(module).__name__} has {name!r}, which is not known here")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise ValueError(f"attention of {type(module).__name__} is not causal")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask >= 0
    mixed = blockwise_attention(
        query,
        key,
        value,
        found.watch.blocks,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=attention_mask,
        window=sliding_window,
        softcap=softcap,
    )
    return mixed, None


@contextmanager
def observed(model: Model, watches: Mapping[int, Watch]) -> Iterator[None]:
    """Let the attention of some layers be seen while the model runs; afterwards it is as before.

    Layers that nobody watches go on with torch's own attention.

    Raises:
        KeyError: the model's attention cannot be seen there.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    attentions = {layer: model.attention(layer) for layer in watches}
    AttentionInterface.register(IMPLEMENTATION, _attend)
    # Without a mask function of its own name, transformers passes no mask even where there is padding.
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    before = model.model.config._attn_implementation
    try:
        for layer, attention in attentions.items():
            _watched[attention.module] = _Watched(attention, watches[layer])
        model.model.set_attn_implementation(IMPLEMENTATION)
        yield
    finally:
        model.model.set_attn_implementation(before)
        for attention in attentions.values():
            _watched.pop(attention.module, None)
