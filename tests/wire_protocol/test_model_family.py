"""Seven families, one table."""

from __future__ import annotations

import pytest

from wire_protocol.errors import ConfigError
from wire_protocol.model_family import (
    FAMILIES,
    adapter_shapes,
    layer_of,
    model_shape,
    peft_key,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
}


def test_grouped_queries_give_a_narrower_value_projection() -> None:
    shapes = adapter_shapes(model_shape(LLAMA), (0,) * 15 + (4,), 0)
    assert shapes["layers.15.self_attn.q_proj.lora_B"] == (2048, 4)
    assert shapes["layers.15.self_attn.v_proj.lora_B"] == (512, 4)
    assert len(shapes) == 4


def test_the_weights_of_a_layer_are_those_of_the_published_model() -> None:
    # Llama 3.2 1B: q and o 2048 x 2048, k and v 2048 x 512, three 2048 x 8192.
    assert model_shape(LLAMA).weights_per_layer == 2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192


def test_gpt2_adapts_its_fused_projection() -> None:
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": None}
    shapes = adapter_shapes(model_shape(config), (2,), 0)
    assert shapes == {"layers.0.attn.c_attn.lora_A": (2, 8), "layers.0.attn.c_attn.lora_B": (24, 2)}


def test_distilbert_calls_its_sizes_by_other_names() -> None:
    config = {"model_type": "distilbert", "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    shape = model_shape(config)
    assert (shape.layer_count, shape.hidden_size) == (2, 8)
    assert adapter_shapes(shape, (1, 1), 5)["head.weight"] == (5, 8)


def test_a_model_without_supported_layers_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"t5.*bert.*llama"):
        model_shape({"model_type": "t5"})


def test_a_config_that_lacks_a_size_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="hidden_size"):
        model_shape({"model_type": "bert"})


def test_one_rank_per_layer_is_required() -> None:
    with pytest.raises(ConfigError, match="2 ranks"):
        adapter_shapes(model_shape(LLAMA), (1, 1), 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_a_key_in_peft_and_knows_its_layer(family: str) -> None:
    layout = FAMILIES[family]
    name = f"layers.3.{layout.modules[0]}.lora_A"
    assert peft_key(family, name) == (
        f"base_model.model.{layout.layers_path}.3.{layout.modules[0]}.lora_A.weight"
    )
    assert layer_of(name) == 3
    assert layer_of("head.weight") is None
    if layout.head_path:
        assert peft_key(family, "head.bias") == f"base_model.model.{layout.head_path}.bias"
