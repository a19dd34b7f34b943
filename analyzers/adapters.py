"""Where things are in a model: residual stream, branches, norms and weight matrices, per family.

One :class:`Family` per architecture of transformers. A family is data: paths of modules, and patterns of
parameter names, which serve models in memory and safetensors files alike.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

LayerConfig = Mapping[str, Any]


class UnknownFamilyError(LookupError):
    """No adapter knows this architecture."""


def split_interleaved_qkv(
    fused: Float[Tensor, "three_width *input"], config: LayerConfig
) -> dict[str, Tensor]:
    """GPT-NeoX's fused projection into query, key and value: rows lie head by head as (q, k, v)."""
    heads = int(config["num_attention_heads"])
    parts = fused.reshape(heads, 3, -1, *fused.shape[1:])
    names = ("attention.query", "attention.key", "attention.value")
    return {name: parts[:, i].flatten(0, 1) for i, name in enumerate(names)}


@dataclass(frozen=True)
class Family:
    """One architecture.

    ``attn_out`` and ``mlp_out`` are the modules of a block whose outputs are added to the residual stream.
    ``matrices`` maps a parameter's name inside its block, without ``.weight``, to a site.
    ``fused`` names the parameter that holds Q, K and V together and the function that parts it.
    """

    model_type: str
    trunk: str
    blocks: str
    final_norm: str
    attn_out: str
    mlp_out: str
    matrices: Mapping[str, str]
    fused: tuple[str, Callable[[Tensor, LayerConfig], dict[str, Tensor]]] | None = None

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
        """(site, layer, matrix) of a weight parameter; nothing for parameters that are not measured."""
        place = self.place(parameter)
        if place is None or place[2] != "weight":
            return
        layer, inner, _ = place
        if self.fused is not None and inner == self.fused[0]:
            for site, part in self.fused[1](tensor, config).items():
                yield site, layer, part
        else:
            yield self.matrices[inner], layer, tensor


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
    model_type: str, attn_out: str = "self_attn.o_proj", mlp_out: str = "mlp.down_proj"
) -> Family:
    return Family(
        model_type=model_type,
        trunk="model",
        blocks="layers",
        final_norm="norm",
        attn_out=attn_out,
        mlp_out=mlp_out,
        matrices=_LLAMA_MATRICES,
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="gpt_neox",
            trunk="gpt_neox",
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
        ),
        _llama_like("llama"),
        _llama_like("olmo"),
        # OLMo 2 normalises a branch before it is added.
        _llama_like("olmo2", "post_attention_layernorm", "post_feedforward_layernorm"),
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
            "add a Family to analyzers/adapters.py"
        )
    return FAMILIES[model_type]


class Adapter:
    """A model together with its family: sites by name."""

    def __init__(self, model: Any) -> None:
        self.model = model
        config = self.model.config
        self.family = family_of(config.model_type)
        self.trunk: nn.Module = model.get_submodule(self.family.trunk)
        self.layers = int(config.num_hidden_layers)
        self.width = int(config.hidden_size)

    def module(self, site: str, layer: int | None = None) -> nn.Module:
        """The module whose output is the site.

        Raises:
            KeyError: there is no such site.
        """
        if layer is None:
            if site == "final_norm":
                return self.trunk.get_submodule(self.family.final_norm)
            ends = {"embedding": self.model.get_input_embeddings, "logits": self.model.get_output_embeddings}
            end: nn.Module = ends[site]()
            return end
        inside = {"resid_post": "", "attn_out": self.family.attn_out, "mlp_out": self.family.mlp_out}
        block = self.trunk.get_submodule(f"{self.family.blocks}.{layer}")
        return block.get_submodule(inside[site])
