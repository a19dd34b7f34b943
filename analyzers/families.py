"""Architectures of transformers: one :class:`Family` each.

A family is data: paths of modules, and patterns of parameter names, which serve models in memory and
safetensors files alike. :mod:`analyzers.adapters` puts a family and a model together.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

LayerConfig = Mapping[str, Any]

_QKV = ("attention.query", "attention.key", "attention.value")


class UnknownFamilyError(LookupError):
    """No adapter knows this architecture."""


def split_interleaved_qkv(
    fused: Float[Tensor, "three_width *input"], config: LayerConfig
) -> dict[str, Tensor]:
    """GPT-NeoX's fused projection into query, key and value: rows lie head by head as (q, k, v)."""
    heads = int(config["num_attention_heads"])
    parts = fused.reshape(heads, 3, -1, *fused.shape[1:])
    return {name: parts[:, i].flatten(0, 1) for i, name in enumerate(_QKV)}


def split_stacked_qkv(fused: Float[Tensor, "three_width *input"], config: LayerConfig) -> dict[str, Tensor]:
    """GPT-2's fused projection into query, key and value: all rows of q, then of k, then of v."""
    return dict(zip(_QKV, fused.chunk(3), strict=True))


def head_counts(config: Any) -> dict[str, int]:
    """Number of heads by attention site, from a model's configuration object.

    Keys and values have ``num_key_value_heads`` where they are grouped.
    """
    heads = int(config.num_attention_heads)
    grouped = int(getattr(config, "num_key_value_heads", None) or heads)
    return dict(zip((*_QKV, "attention.output"), (heads, grouped, grouped, heads), strict=True))


@dataclass(frozen=True)
class Family:
    """One architecture.

    ``trunk`` is the part of the model that ends with the final norm; ``embedding``, ``blocks`` and
    ``final_norm`` are paths inside it. The output of ``embedding`` is what enters the first block.
    ``attn_out`` and ``mlp_out`` are the modules of a block whose outputs are added to the residual stream.
    ``attn_norm`` is the norm that the attention reads through, if there is one.
    ``token_embedding``, inside the trunk, and ``unembedding`` are the modules that hold W_E and W_U.
    ``matrices`` maps a parameter's name inside its block, without ``.weight``, to a site.
    ``fused`` names the parameter that holds Q, K and V together and the function that parts it.
    ``transposed`` says that matrices are stored as ``[in, out]`` (transformers' Conv1D).
    """

    model_type: str
    trunk: str
    embedding: str
    blocks: str
    final_norm: str
    attn_out: str
    mlp_out: str
    matrices: Mapping[str, str]
    fused: tuple[str, Callable[[Tensor, LayerConfig], dict[str, Tensor]]] | None = None
    transposed: bool = False
    attn_norm: str | None = "input_layernorm"
    token_embedding: str = "embed_tokens"
    unembedding: str = "lm_head"

    @property
    def output_projection(self) -> str:
        """Path, inside a block, of the module that holds W_O; the module around it is the attention."""
        (path,) = (name for name, site in self.matrices.items() if site == "attention.output")
        return path

    def place(self, parameter: str) -> tuple[int, str, str] | None:
        """(layer, name inside the block, ``weight`` or ``bias``) of a block's parameter; else None.

        The trunk's own prefix is optional: files of headless models lack it.
        """
        trunk, blocks = re.escape(self.trunk), re.escape(self.blocks)
        match = re.fullmatch(rf"(?:{trunk}\.)?{blocks}\.(\d+)\.(.+)\.(weight|bias)", parameter)
        if match is None:
            return None
        layer, inner, kind = match.groups()
        if inner not in self.matrices and (self.fused is None or inner != self.fused[0]):
            return None
        return int(layer), inner, kind

    def parts(self, parameter: str, tensor: Tensor, config: LayerConfig) -> Iterator[tuple[str, int, Tensor]]:
        """(site, layer, matrix ``[out, in]``) of a weight; nothing for parameters that are not measured."""
        place = self.place(parameter)
        if place is None or place[2] != "weight":
            return
        layer, inner, _ = place
        if self.transposed:
            tensor = tensor.T
        if self.fused is not None and inner == self.fused[0]:
            for site, part in self.fused[1](tensor, config).items():
                yield site, layer, part
        else:
            yield self.matrices[inner], layer, tensor

    def vocabulary_matrix(self, parameter: str, unembedding: bool) -> bool:
        """Whether it is W_E ``[vocabulary, width]``, or W_U of that shape if ``unembedding``."""
        if unembedding:
            return parameter == f"{self.unembedding}.weight"
        return parameter in (f"{self.trunk}.{self.token_embedding}.weight", f"{self.token_embedding}.weight")

    def bias(self, parameter: str) -> bool:
        """Whether it is the bias vector of a measured matrix."""
        place = self.place(parameter)
        return place is not None and place[2] == "bias"


_LLAMA_MATRICES = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}


def _llama_like(
    model_type: str,
    attn_out: str = "self_attn.o_proj",
    mlp_out: str = "mlp.down_proj",
    attn_norm: str | None = "input_layernorm",
) -> Family:
    return Family(
        model_type=model_type,
        trunk="model",
        embedding="embed_tokens",
        blocks="layers",
        final_norm="norm",
        attn_out=attn_out,
        mlp_out=mlp_out,
        matrices=_LLAMA_MATRICES,
        attn_norm=attn_norm,
    )


# OLMo 2 and 3 normalise a branch before it is added, and not what it reads.
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm", None)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        # With parallel and with sequential residual: what is added comes from the same modules.
        Family(
            model_type="gpt_neox",
            trunk="gpt_neox",
            embedding="embed_in",
            blocks="layers",
            final_norm="final_layer_norm",
            attn_out="attention.dense",
            mlp_out="mlp.dense_4h_to_h",
            matrices={
                "attention.dense": "attention.output",
                "mlp.dense_h_to_4h": "mlp.up",
                "mlp.dense_4h_to_h": "mlp.down",
            },
            fused=("attention.query_key_value", split_interleaved_qkv),
            token_embedding="embed_in",
            unembedding="embed_out",
        ),
        Family(
            model_type="gpt2",
            trunk="transformer",
            embedding="drop",  # of the sum of token and position embeddings
            blocks="h",
            final_norm="ln_f",
            attn_out="attn.c_proj",
            mlp_out="mlp.c_proj",
            matrices={
                "attn.c_proj": "attention.output",
                "mlp.c_fc": "mlp.up",
                "mlp.c_proj": "mlp.down",
            },
            fused=("attn.c_attn", split_stacked_qkv),
            transposed=True,
            attn_norm="ln_1",
            token_embedding="wte",
        ),
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("olmo"),
        _llama_like("olmo2", *_POST_NORMS),
        _llama_like("olmo3", *_POST_NORMS),
        _llama_like("qwen2"),
        _llama_like("qwen3"),
    )
}


def family_of(model_type: str) -> Family:
    """The family of a configuration's ``model_type``.

    Raises:
        UnknownFamilyError: none is known; the sentence names those that are, and what to write.
    """
    if model_type not in FAMILIES:
        raise UnknownFamilyError(
            f"model type {model_type!r} has no adapter (known: {', '.join(FAMILIES)}); "
            "add a Family to analyzers/families.py, or load it with source.loader (docs/own_models.md)"
        )
    return FAMILIES[model_type]
