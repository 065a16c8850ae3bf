from __future__ import annotations

import numpy as np
import pytest

from wire_protocol.errors import ConfigError
from wire_protocol.initial_adapter import initial_adapter
from wire_protocol.model_family import ModelShape, adapter_shapes
from wire_protocol.tensors import check_shapes

BERT = ModelShape("bert", 3, 32, 32, 1000)
GPT2 = ModelShape("gpt2", 3, 32, 32, 1000)
FIRST_A = "layers.2.attention.self.query.lora_A"


def test_names_and_shapes_are_those_of_the_contract() -> None:
    adapter = initial_adapter(BERT, (0, 4, 8), label_count=3, seed=1)
    check_shapes(adapter, adapter_shapes(BERT, (0, 4, 8), 3))
    assert {tensor.dtype for tensor in adapter.values()} == {np.dtype(np.float32)}


def test_the_first_round_begins_at_the_base_model() -> None:
    adapter = initial_adapter(GPT2, (8, 8, 8), label_count=0, seed=1)
    products = [
        adapter[name] @ adapter[name.replace("lora_B", "lora_A")]
        for name in adapter
        if name.endswith("lora_B")
    ]
    assert len(products) == 3
    assert not any(product.any() for product in products)


def test_lora_a_fills_the_bounds_of_kaiming_uniform() -> None:
    drawn = initial_adapter(BERT, (0, 0, 256), label_count=2, seed=1)[FIRST_A]
    bound = 1 / np.sqrt(32)
    assert bound * 0.99 < np.abs(drawn).max() <= bound
    assert drawn.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)


def test_the_head_is_small_and_unbiased() -> None:
    adapter = initial_adapter(BERT, (0, 0, 4), label_count=200, seed=1)
    assert adapter["head.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert not adapter["head.bias"].any()


def test_a_layer_is_drawn_the_same_whatever_the_ranks_of_others() -> None:
    one = initial_adapter(BERT, (0, 0, 4), label_count=2, seed=5)
    other = initial_adapter(BERT, (16, 8, 4), label_count=3, seed=5)
    assert np.array_equal(one[FIRST_A], other[FIRST_A])


def test_a_lower_rank_holds_the_first_rows_of_a_higher_one() -> None:
    low = initial_adapter(BERT, (0, 0, 4), label_count=2, seed=5)[FIRST_A]
    high = initial_adapter(BERT, (0, 0, 16), label_count=2, seed=5)[FIRST_A]
    assert np.array_equal(low, high[:4])


def test_layers_and_seeds_draw_different_values() -> None:
    adapter = initial_adapter(BERT, (4, 4, 4), label_count=2, seed=5)
    again = initial_adapter(BERT, (4, 4, 4), label_count=2, seed=6)
    assert not np.array_equal(adapter[FIRST_A], adapter[FIRST_A.replace("2", "1", 1)])
    assert not np.array_equal(adapter[FIRST_A], again[FIRST_A])


def test_ranks_for_another_number_of_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 ranks for a model of 3 layers"):
        initial_adapter(BERT, (4, 4), label_count=2, seed=5)
