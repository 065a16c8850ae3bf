"""An invalid LoRA config cannot be built."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire_protocol.lora import MAX_RANK, LoraConfig

RANKS = st.lists(st.integers(1, MAX_RANK), min_size=1, max_size=32)


@given(st.integers(0, 20), RANKS)
def test_zeros_below_and_ranks_up_to_the_output_are_a_config(frozen: int, ranks: list[int]) -> None:
    config = LoraConfig((0,) * frozen + tuple(ranks))
    assert config.depth == len(ranks)
    assert list(config.layers) == list(range(frozen, frozen + len(ranks)))


@given(st.lists(st.integers(-2, MAX_RANK + 2), max_size=8))
def test_a_config_that_exists_is_contiguous_to_the_output(ranks: list[int]) -> None:
    try:
        config = LoraConfig(tuple(ranks))
    except ValueError:
        return
    assert all(config.ranks[layer] > 0 for layer in config.layers)
    assert all(config.ranks[layer] == 0 for layer in range(config.layers.start))


@given(RANKS, st.data())
def test_the_top_of_a_config_keeps_its_ranks(ranks: list[int], data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, len(ranks)))
    config = LoraConfig.top(depth, tuple(ranks))
    assert config.depth == depth
    assert config.ranks[-depth:] == tuple(ranks[-depth:])


@pytest.mark.parametrize("depth", [0, 4, -1])
def test_a_depth_outside_the_model_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=r"outside 1\.\.3"):
        LoraConfig.top(depth, (4, 4, 4))
