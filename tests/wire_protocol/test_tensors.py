"""Adapters as bytes: what goes in comes out, and noise never gets through."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save

from wire_protocol.errors import ProtocolError
from wire_protocol.lora import Codec
from wire_protocol.model_family import adapter_shapes, model_shape
from wire_protocol.tensors import check_shapes, decode, encode, not_finite

CONFIG = {"model_type": "bert", "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
SHAPES = adapter_shapes(model_shape(CONFIG), (0, 2, 4), 3)


def an_adapter(seed: int = 0, scale: float = 1.0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * scale).astype(np.float32) for name, shape in SHAPES.items()
    }


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e3]))
def test_fp32_is_exact(seed: int, scale: float) -> None:
    adapter = an_adapter(seed, scale)
    read = decode(encode(adapter, Codec.FP32))
    check_shapes(read, SHAPES)
    assert all(np.array_equal(read[name], adapter[name]) for name in adapter)


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e3]))
def test_int4_is_within_half_a_step_of_its_rank_row(seed: int, scale: float) -> None:
    adapter = an_adapter(seed, scale)
    read = decode(encode(adapter, Codec.INT4))
    check_shapes(read, SHAPES)
    for name, tensor in adapter.items():
        axis = 0 if name.endswith("lora_B") or tensor.ndim == 1 else 1
        step = np.abs(tensor).max(axis=axis, keepdims=True) / 7
        assert (np.abs(read[name] - tensor) <= step * 0.5001 + 1e-12).all()


def test_a_matrix_of_odd_length_travels_as_int8_among_int4() -> None:
    odd = {"head.weight": np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3)}
    read = decode(encode(odd, Codec.INT4))
    assert np.abs(read["head.weight"] - odd["head.weight"]).max() <= 0.5 / 127


@pytest.mark.parametrize(("dtype", "codec"), [(np.uint8, "int4"), (np.int8, "int8")])
def test_a_few_bytes_do_not_become_more_numbers_than_an_adapter_may_have(
    dtype: type, codec: str
) -> None:
    tensors = {"x": np.zeros((2, 9_000_000), dtype), "x.scale": np.zeros((2, 1), np.float32)}
    plain = bytes(save(tensors, metadata={"codec": codec}))
    update = b"legend.deflate/1\n" + zlib.compress(plain, 9)
    assert len(update) < 100_000
    with pytest.raises(ProtocolError, match="once it is unpacked"):
        decode(update)


def test_deflated_bytes_that_would_fill_the_memory_are_refused() -> None:
    bomb = b"legend.deflate/1\n" + zlib.compress(bytes(65 * 1024 * 1024))
    with pytest.raises(ProtocolError, match="inflates beyond"):
        decode(bomb)


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e3]))
def test_int8_is_within_half_a_step_of_its_rank_row(seed: int, scale: float) -> None:
    adapter = an_adapter(seed, scale)
    read = decode(encode(adapter, Codec.INT8))
    for name, tensor in adapter.items():
        axis = 0 if name.endswith("lora_B") or tensor.ndim == 1 else 1
        step = np.abs(tensor).max(axis=axis, keepdims=True) / 127
        assert (np.abs(read[name] - tensor) <= step * 0.5001 + 1e-12).all()


def test_a_row_of_zeros_stays_zero_in_int8() -> None:
    adapter = an_adapter()
    adapter["layers.1.attention.self.query.lora_B"][:] = 0
    read = decode(encode(adapter, Codec.INT8))
    assert not read["layers.1.attention.self.query.lora_B"].any()


def test_quantised_bytes_at_the_shapes_of_a_real_model() -> None:
    config = {**CONFIG, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    shapes = adapter_shapes(model_shape(config), (8,) * 6, 2)
    rng = np.random.default_rng(0)
    adapter = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    whole = len(encode(adapter, Codec.FP32))
    assert len(encode(adapter, Codec.INT8)) < 0.27 * whole
    assert len(encode(adapter, Codec.INT4)) < 0.15 * whole


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_never_written(codec: Codec, bad: float) -> None:
    adapter = an_adapter()
    adapter["head.bias"][0] = bad
    with pytest.raises(ProtocolError, match=r"head\.bias"):
        encode(adapter, codec)


def test_a_value_that_overflows_fp16_is_an_error_and_not_infinity() -> None:
    with pytest.raises(ProtocolError, match="finite"):
        encode({"head.bias": np.array([1e30], np.float32)}, Codec.FP16)


@given(st.sampled_from(list(Codec)), st.data())
def test_every_truncation_is_a_protocol_error(codec: Codec, data: st.DataObject) -> None:
    whole = encode(an_adapter(), codec)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ProtocolError):
        decode(whole[:cut])


@given(st.binary(max_size=300))
def test_noise_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@given(st.sampled_from(list(Codec)), st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_adapter_is_finite_or_refused(codec: Codec, place: int, value: int) -> None:
    data = bytearray(encode(an_adapter(), codec))
    data[place % len(data)] = value
    try:
        read = decode(bytes(data))
    except ProtocolError:
        return
    assert all(np.isfinite(tensor).all() for tensor in read.values())


def test_a_value_that_is_not_finite_is_never_read() -> None:
    data = save({"head.bias": np.array([np.nan], np.float32)})
    with pytest.raises(ProtocolError, match="finite"):
        decode(data)


@given(st.integers(0, 10**6), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_value_that_is_not_finite_is_found_wherever_it_is(place: int, bad: float) -> None:
    adapter = an_adapter(scale=1e25)  # squares overflow: the sum alone cannot tell
    assert not_finite(adapter) is None
    name = sorted(adapter)[place % len(adapter)]
    adapter[name].flat[place % adapter[name].size] = bad
    assert not_finite(adapter) == name


def test_what_was_decoded_cannot_lose_its_finite_values() -> None:
    for codec in Codec:
        read = decode(encode(an_adapter(), codec))
        with pytest.raises(ValueError, match="read-only"):
            read["head.bias"][0] = np.nan
        with pytest.raises(TypeError, match="make a new adapter"):
            read["head.bias"] = np.array([np.nan], np.float32)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ProtocolError, match="F64"):
        decode(save({"head.bias": np.zeros(3)}))


def test_int8_without_its_scale_is_refused() -> None:
    with pytest.raises(ProtocolError, match="scales"):
        decode(save({"head.bias": np.zeros(3, np.int8)}))


def test_names_and_shapes_are_compared_with_what_was_assigned() -> None:
    adapter = an_adapter()
    with pytest.raises(ProtocolError, match="lacks"):
        check_shapes({name: t for name, t in adapter.items() if name != "head.bias"}, SHAPES)
    with pytest.raises(ProtocolError, match="unexpected"):
        check_shapes({**adapter, "layers.0.evil.lora_A": adapter["head.bias"]}, SHAPES)
    with pytest.raises(ProtocolError, match="shape"):
        check_shapes({**adapter, "head.bias": np.zeros(9, np.float32)}, SHAPES)
