"""Sites and matrices of every family, on tiny random models of transformers' own classes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from analyzers.adapters import Adapter
from analyzers.families import FAMILIES, UnknownFamilyError, family_of, split_interleaved_qkv

WIDTH, INNER, HEADS, LAYERS = 32, 48, 4, 3
COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Two key-value heads for four query heads where the architecture has that.
GROUPED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2}
GPT2: dict[str, Any] = {
    "vocab_size": 61,
    "n_embd": WIDTH,
    "n_inner": INNER,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 32,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "gpt_neox-sequential": GPTNeoXConfig(use_parallel_residual=False, **COMMON),
    "gpt2": GPT2Config(**GPT2),  # its embeddings are tied
    "llama": LlamaConfig(**GROUPED),
    "llama-tied-biased": LlamaConfig(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, **GROUPED),
    "mistral": MistralConfig(**GROUPED),
    "olmo": OlmoConfig(**GROUPED),
    "olmo-clipped": OlmoConfig(clip_qkv=0.4, **GROUPED),
    "olmo2": Olmo2Config(**GROUPED),
    "olmo3": Olmo3Config(sliding_window=4, **GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    # Heads wider than width / heads, as Qwen3's are.
    "qwen3": Qwen3Config(head_dim=16, **GROUPED),
}
POST_NORMED = {"olmo2", "olmo3"}


def build(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def parts_of(adapter: Adapter) -> tuple[str, str]:
    """Paths of the attention and the MLP inside a block."""
    return {"gpt_neox": ("attention", "mlp"), "gpt2": ("attn", "mlp")}.get(
        adapter.family.model_type, ("self_attn", "mlp")
    )


@pytest.fixture(scope="module", params=CONFIGS)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return Adapter(build(request.param))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))


@contextmanager
def recorded(
    adapter: Adapter, *places: tuple[str, int | None]
) -> Iterator[dict[tuple[str, int | None], Tensor]]:
    found: dict[tuple[str, int | None], Tensor] = {}

    def hook(place: tuple[str, int | None]) -> Callable[..., None]:
        def take(_module: object, _inputs: object, output: Any) -> None:
            found[place] = output[0] if isinstance(output, tuple) else output

        return take

    handles = [adapter.module(*place).register_forward_hook(hook(place)) for place in places]
    yield found
    for handle in handles:
        handle.remove()


def test_every_family_is_tested() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


def test_residual_stream_is_that_of_transformers(adapter: Adapter, tokens: Tensor) -> None:
    blocks = [("resid_post", layer) for layer in range(LAYERS)]
    outside = [("embedding", None), ("final_norm", None), ("logits", None)]
    with recorded(adapter, *blocks, *outside) as found, torch.no_grad():
        output = adapter.model(tokens, output_hidden_states=True)
        normed = adapter.module("final_norm")(found["resid_post", LAYERS - 1])
    assert len(output.hidden_states) == LAYERS + 1
    assert torch.equal(found["embedding", None], output.hidden_states[0])
    for layer in range(LAYERS - 1):
        assert torch.equal(found["resid_post", layer], output.hidden_states[layer + 1])
    assert torch.equal(normed, output.hidden_states[-1])
    assert torch.equal(found["final_norm", None], output.hidden_states[-1])
    assert torch.equal(found["logits", None], output.logits)
    assert not torch.allclose(found["resid_post", LAYERS - 1], output.hidden_states[-1])


def test_branches_add_up_to_the_residual_stream(adapter: Adapter, tokens: Tensor) -> None:
    places = [(site, layer) for site in ("resid_post", "attn_out", "mlp_out") for layer in range(LAYERS)]
    with recorded(adapter, ("embedding", None), *places) as found, torch.no_grad():
        adapter.model(tokens)
    before = found["embedding", None]
    for layer in range(LAYERS):
        after = before + found["attn_out", layer] + found["mlp_out", layer]
        torch.testing.assert_close(after, found["resid_post", layer], rtol=1e-12, atol=1e-12)
        before = found["resid_post", layer]


def test_shape_of_the_model(adapter: Adapter) -> None:
    assert (adapter.layers, adapter.width) == (LAYERS, WIDTH)


def expected_shapes(name: str) -> dict[str, tuple[int, int]]:
    wide = 2 * WIDTH if name == "qwen3" else WIDTH
    narrow = wide if name in ("gpt_neox", "gpt2") else wide // 2
    shapes = {
        "attention.query": (wide, WIDTH),
        "attention.key": (narrow, WIDTH),
        "attention.value": (narrow, WIDTH),
        "attention.output": (WIDTH, wide),
        "mlp.up": (INNER, WIDTH),
        "mlp.down": (WIDTH, INNER),
    }
    return shapes if name in ("gpt_neox", "gpt2") else {**shapes, "mlp.gate": (INNER, WIDTH)}


def weights_of(adapter: Adapter) -> dict[tuple[str, int], Tensor]:
    found: dict[tuple[str, int], Tensor] = {}
    for site, layer, matrix in adapter.matrices():
        assert (site, layer) not in found
        found[site, layer] = matrix
    return found


def test_matrices_of_every_layer(adapter: Adapter) -> None:
    found = {place: tuple(matrix.shape) for place, matrix in weights_of(adapter).items()}
    shapes = expected_shapes(adapter.family.model_type)
    assert found == {(site, layer): shape for layer in range(LAYERS) for site, shape in shapes.items()}


def test_names_of_headless_files_are_known(adapter: Adapter) -> None:
    family, config = adapter.family, adapter.model.config.to_dict()
    found = {
        (site, layer): matrix
        for name, tensor in adapter.trunk.state_dict().items()
        for site, layer, matrix in family.parts(name, tensor, config)
    }
    whole = weights_of(adapter)
    assert set(found) == set(whole)
    assert all(torch.equal(matrix, whole[place]) for place, matrix in found.items())


def test_parameters_outside_the_measured_matrices_have_no_place(adapter: Adapter) -> None:
    family = adapter.family
    placed = [name for name in adapter.model.state_dict() if family.place(name) is not None]
    assert not [
        n for n in placed if "norm" in n or "ln_" in n or "embed" in n or "lm_head" in n or "wte" in n
    ]
    linear = [m for m in adapter.blocks[0].output.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    biased = [m for m in linear if m.bias is not None]
    assert len(placed) == (len(linear) + len(biased)) * LAYERS
    assert len(list(adapter.biases())) == len(biased) * LAYERS


@contextmanager
def inputs_of(modules: dict[str, torch.nn.Module]) -> Iterator[dict[str, Tensor]]:
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def take(_module: object, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            found[name] = arguments[0] if arguments else named["hidden_states"]

        return take

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    yield found
    for handle in handles:
        handle.remove()


def bias_of(block: torch.nn.Module, site: str) -> Tensor | float:
    """The bias that belongs to a matrix, found without the family's help."""
    names = {
        "attention.query": "q_proj",
        "attention.key": "k_proj",
        "attention.value": "v_proj",
        "attention.output": ("o_proj", "attn.c_proj", "attention.dense"),
        "mlp.gate": "gate_proj",
        "mlp.up": ("up_proj", "c_fc", "dense_h_to_4h"),
        "mlp.down": ("down_proj", "mlp.c_proj", "dense_4h_to_h"),
    }
    for path, parameter in block.named_parameters():
        if path.endswith("c_attn.bias") and site in (order := list(names)[:3]):
            return parameter.chunk(3)[order.index(site)]
        if path.endswith("query_key_value.bias") and site in (order := list(names)[:3]):
            return parameter.view(HEADS, 3, -1)[:, order.index(site)].flatten()
        suffixes = (names[site],) if isinstance(names[site], str) else names[site]
        if path.endswith(tuple(f"{suffix}.bias" for suffix in suffixes)):
            return parameter
    return 0.0


def test_every_matrix_is_the_one_that_the_model_multiplies_with(tokens: Tensor) -> None:
    """Recompute attention and MLP of the last block from the matrices alone.

    At position 0 rotation is the identity and a token attends to itself only, so the attention function sees
    plain projections (after clipping and norms, where there are any), and its output is the value.
    """
    seen: dict[str, Tensor] = {}

    def spy(_module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **_: Any) -> Any:
        seen.update({"attention.query": query, "attention.key": key, "attention.value": value})
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None

    AttentionInterface.register("ontogeny_spy", spy)
    for name in CONFIGS:
        model = build(name)
        model.set_attn_implementation("ontogeny_spy")
        adapter = Adapter(model)
        block = adapter.blocks[LAYERS - 1].output
        attention, mlp = (block.get_submodule(path) for path in parts_of(adapter))
        last = LAYERS - 1
        weights = {site: matrix for (site, layer), matrix in weights_of(adapter).items() if layer == last}

        def project(site: str, hidden: Tensor, weights: Any = weights, block: Any = block) -> Tensor:
            return hidden @ weights[site].T + bias_of(block, site)

        places = [("attn_out", last), ("mlp_out", last)]
        with (
            torch.no_grad(),
            inputs_of({"attention": attention, "mlp": mlp}) as entering,
            recorded(adapter, *places) as leaving,
        ):
            model(tokens[:, :1])
            for site, values in seen.items():
                expected = project(site, entering["attention"])
                if (clip := getattr(model.config, "clip_qkv", None)) is not None:
                    expected = expected.clamp(-clip, clip)
                norm = {"attention.query": "q_norm", "attention.key": "k_norm"}.get(site, "")
                heads = values.shape[1]
                if norm and hasattr(attention, norm):
                    shape = (2, 1, heads, -1) if name == "qwen3" else (2, 1, -1)
                    expected = getattr(attention, norm)(expected.view(shape))
                found = values.transpose(1, 2).reshape(2, 1, -1)
                torch.testing.assert_close(
                    found, expected.reshape(2, 1, -1), rtol=1e-12, atol=1e-12, msg=name
                )
            value = seen["attention.value"]
            mixed = value.repeat_interleave(HEADS // value.shape[1], 1).transpose(1, 2).flatten(2)
            attn_out = project("attention.output", mixed)
            act = mlp.act if hasattr(mlp, "act") else mlp.act_fn
            inner = project("mlp.up", entering["mlp"])
            gated = "mlp.gate" in weights
            inner = act(project("mlp.gate", entering["mlp"])) * inner if gated else act(inner)
            mlp_out = project("mlp.down", inner)
            if name in POST_NORMED:
                attn_out = block.post_attention_layernorm(attn_out)
                mlp_out = block.post_feedforward_layernorm(mlp_out)
        assert set(seen) == {"attention.query", "attention.key", "attention.value"}
        torch.testing.assert_close(leaving["attn_out", last], attn_out, rtol=1e-12, atol=1e-12, msg=name)
        torch.testing.assert_close(leaving["mlp_out", last], mlp_out, rtol=1e-12, atol=1e-12, msg=name)


def test_tied_embeddings(tokens: Tensor) -> None:
    for name in ("gpt2", "llama-tied-biased"):
        adapter = Adapter(build(name))
        assert adapter.logits.weight is adapter.model.get_input_embeddings().weight
        # Position and token embedding together enter the first block of GPT-2.
        with recorded(adapter, ("embedding", None)) as found, torch.no_grad():
            adapter.model(tokens)
        plain = adapter.model.get_input_embeddings()(tokens)
        assert torch.equal(found["embedding", None], plain) == (name != "gpt2")


def test_the_fused_projection_of_gpt_neox_lies_head_by_head() -> None:
    # Two heads of one channel: rows q0 k0 v0 q1 k1 v1.
    rows = torch.tensor([[0.0], [10.0], [20.0], [1.0], [11.0], [21.0]])
    parts = split_interleaved_qkv(rows, {"num_attention_heads": 2})
    assert {site: part.flatten().tolist() for site, part in parts.items()} == {
        "attention.query": [0.0, 1.0],
        "attention.key": [10.0, 11.0],
        "attention.value": [20.0, 21.0],
    }


def test_buffers_of_old_files_are_no_biases() -> None:
    family = family_of("gpt_neox")
    block = "gpt_neox.layers.3.attention"
    for buffer in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        assert family.place(f"{block}.{buffer}") is None
    assert family.place(f"{block}.dense.bias") == (3, "attention.dense", "bias")
    assert family.place(f"{block}.query_key_value.bias") == (3, "attention.query_key_value", "bias")
    assert family.place("layers.11.mlp.dense_h_to_4h.weight") == (11, "mlp.dense_h_to_4h", "weight")
    for buffer in ("h.0.attn.bias", "h.0.attn.masked_bias"):
        assert family_of("gpt2").place(buffer) is None


@pytest.mark.parametrize("model_type", ["mamba9", "qwen3_moe", "olmoe"])
def test_an_unknown_family_is_named_with_what_to_write(model_type: str) -> None:
    with pytest.raises(UnknownFamilyError) as caught:
        family_of(model_type)
    assert str(caught.value) == (
        f"model type {model_type!r} has no adapter (known: gpt_neox, gpt2, llama, mistral, olmo, olmo2, "
        "olmo3, qwen2, qwen3); add a Family to analyzers/families.py, or load it with source.loader "
        "(docs/own_models.md)"
    )
