"""Sites and matrices of every family, on tiny random models of transformers' own classes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    OlmoConfig,
    PreTrainedConfig,
)

from analyzers.adapters import FAMILIES, Adapter, UnknownFamilyError, family_of, split_interleaved_qkv

WIDTH, INNER, HEADS, LAYERS = 32, 48, 4, 3
COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
    "pad_token_id": None,
}
# Two key-value heads for four query heads where the architecture has that.
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "llama": LlamaConfig(num_key_value_heads=2, **COMMON),
    "olmo": OlmoConfig(num_key_value_heads=2, **COMMON),
    "olmo2": Olmo2Config(num_key_value_heads=2, **COMMON),
}


def build(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


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
    assert set(CONFIGS) == set(FAMILIES)


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
    with pytest.raises(KeyError):
        adapter.module("nowhere")
    with pytest.raises(KeyError):
        adapter.module("nowhere", 0)


def expected_shapes(name: str) -> dict[str, tuple[int, int]]:
    narrow = WIDTH if name == "gpt_neox" else WIDTH // 2
    shapes = {
        "attention.query": (WIDTH, WIDTH),
        "attention.key": (narrow, WIDTH),
        "attention.value": (narrow, WIDTH),
        "attention.output": (WIDTH, WIDTH),
        "mlp.up": (INNER, WIDTH),
        "mlp.down": (WIDTH, INNER),
    }
    return shapes if name == "gpt_neox" else {**shapes, "mlp.gate": (INNER, WIDTH)}


@pytest.mark.parametrize("headless", [False, True])
def test_matrices_of_every_layer(adapter: Adapter, headless: bool) -> None:
    family, config = adapter.family, adapter.model.config.to_dict()
    source = adapter.trunk if headless else adapter.model
    found: dict[tuple[str, int], tuple[int, ...]] = {}
    for name, tensor in source.state_dict().items():
        for site, layer, matrix in family.parts(name, tensor, config):
            assert (site, layer) not in found
            found[site, layer] = tuple(matrix.shape)
    shapes = expected_shapes(family.model_type)
    assert found == {(site, layer): shape for layer in range(LAYERS) for site, shape in shapes.items()}


def test_parameters_outside_the_measured_matrices_have_no_place(adapter: Adapter) -> None:
    family = adapter.family
    placed = {name for name in adapter.model.state_dict() if family.place(name) is not None}
    per_layer = 8 if family.model_type == "gpt_neox" else 7  # four weights and biases; seven weights
    assert len(placed) == per_layer * LAYERS
    assert not [name for name in placed if "norm" in name or "embed" in name or "lm_head" in name]


def test_buffers_of_old_pythia_files_are_no_biases() -> None:
    family = family_of("gpt_neox")
    block = "gpt_neox.layers.3.attention"
    for buffer in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        assert family.place(f"{block}.{buffer}") is None
    assert family.place(f"{block}.dense.bias") == (3, "attention.dense", "bias")
    assert family.place(f"{block}.query_key_value.bias") == (3, "attention.query_key_value", "bias")
    assert family.place("layers.11.mlp.dense_h_to_4h.weight") == (11, "mlp.dense_h_to_4h", "weight")


def test_the_fused_projection_is_split_as_the_model_does(tokens: Tensor) -> None:
    # At position 0 the rotation is the identity, so the attention function sees plain projections.
    from transformers import AttentionInterface

    seen: dict[str, Tensor] = {}

    def spy(_module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **_: Any) -> Any:
        seen.update({"attention.query": query, "attention.key": key, "attention.value": value})
        return value.transpose(1, 2), None

    AttentionInterface.register("ontogeny_spy", spy)
    model = build("gpt_neox")
    model.set_attn_implementation("ontogeny_spy")
    adapter = Adapter(model)
    with torch.no_grad():
        model(tokens[:, :1])
        inputs = model.gpt_neox.layers[LAYERS - 1].input_layernorm
        entering = recorded(adapter, ("resid_post", LAYERS - 2))
        with entering as found:
            model(tokens[:, :1])
        hidden = inputs(found["resid_post", LAYERS - 2])
    fused = model.gpt_neox.layers[LAYERS - 1].attention.query_key_value
    weights = split_interleaved_qkv(fused.weight, model.config.to_dict())
    biases = split_interleaved_qkv(fused.bias, model.config.to_dict())
    assert set(weights) == set(biases) == set(seen)
    for site, values in seen.items():
        assert values.shape == (2, HEADS, 1, WIDTH // HEADS)
        expected = torch.nn.functional.linear(hidden, weights[site], biases[site])
        torch.testing.assert_close(values.transpose(1, 2).flatten(2), expected, rtol=1e-12, atol=1e-12)


def test_an_unknown_family_is_named_with_what_to_write() -> None:
    with pytest.raises(UnknownFamilyError) as caught:
        family_of("mamba9")
    assert str(caught.value) == (
        "model type 'mamba9' has no adapter (known: gpt_neox, llama, olmo, olmo2); "
        "add a Family to analyzers/adapters.py"
    )
