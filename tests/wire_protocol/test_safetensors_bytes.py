"""Our reader and writer of safetensors against the format's own library."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from wire_protocol.errors import ProtocolError
from wire_protocol.safetensors_bytes import MAX_HEADER_BYTES, tensor_bytes, tensor_views

DTYPES = [np.float32, np.float16, np.int8, np.uint8]
NAMES = st.text(st.characters(codec="utf-8"), max_size=6).filter(
    lambda name: name != "__metadata__"
)
TENSORS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
    max_size=5,
)


def filled(described: dict[str, tuple[type, list[int]]]) -> dict[str, NDArray[Any]]:
    return {
        name: (np.arange(int(np.prod(shape, dtype=int))) % 100).astype(dtype).reshape(shape)
        for name, (dtype, shape) in described.items()
    }


def a_file(header: object, values: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def described(**changes: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@given(TENSORS)
def test_the_bytes_are_those_of_the_library(description: dict[str, tuple[type, list[int]]]) -> None:
    tensors = filled(description)
    assert tensor_bytes(tensors, {"codec": "fp32"}) == save(tensors, metadata={"codec": "fp32"})


@given(TENSORS)
def test_what_the_library_wrote_is_read_in_place(
    description: dict[str, tuple[type, list[int]]],
) -> None:
    tensors = filled(description)
    read = tensor_views(save(tensors))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor, strict=True)
        assert not read[name].flags.owndata
        assert not read[name].flags.writeable


@given(TENSORS, st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(
    description: dict[str, tuple[type, list[int]]], place: int, value: int
) -> None:
    data = bytearray(save(filled(description), metadata={"codec": "fp32"}))
    data[place % len(data)] = value
    try:
        read = tensor_views(bytes(data))
    except ProtocolError:
        return
    theirs = load(bytes(data))
    assert read.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(read[name], tensor, strict=True)


def test_tensors_at_odd_places_are_read() -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    values = np.array([1.5, -2.0], np.float32)
    read = tensor_views(a_file(header, b"\x07" + values.tobytes()))
    assert read["b"].tolist() == [1.5, -2.0]
    assert float(read["b"].dot(read["b"])) == pytest.approx(6.25)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b" {}",
        b"{",
        b"\xff{}",
        b'{"x":' + b"[" * 100_000,
        {"__metadata__": {"codec": 3}},
        {"__metadata__": []},
        {"x": None},
        {"x": {}},
        described(dtype="F64"),
        described(dtype=["F32"]),
        described(shape=[True, 2]),
        described(shape=[2.0]),
        described(shape=[-2]),
        described(shape=[-1, -2]),
        described(shape="ab"),
        described(shape={"2": 2}),
        described(shape=[3]),
        described(shape=[2**70, 0]),
        described(shape=[1] * 100 + [2]),
        described(data_offsets=[0, 8, 8]),
        described(data_offsets=[0, 4]),
        described(data_offsets=[8, 0]),
        described(data_offsets=[-8, 0]),
        described(data_offsets=[4, 12]),
        described(data_offsets=[0, 10**30]),
        {**described(), "y": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {**described(), "y": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}},
    ],
)
def test_a_header_that_does_not_describe_the_bytes_is_refused(header: object) -> None:
    with pytest.raises(ProtocolError):
        tensor_views(a_file(header, bytes(8)))


@pytest.mark.parametrize("behind", [b"", bytes(7), bytes(9)])
def test_bytes_too_few_or_too_many_are_refused(behind: bytes) -> None:
    with pytest.raises(ProtocolError, match="end at byte"):
        tensor_views(a_file(described(), behind))


def test_a_header_longer_than_any_adapter_needs_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ProtocolError, match="too long"):
        tensor_views(a_file(b"{" + b" " * MAX_HEADER_BYTES + b"}"))
