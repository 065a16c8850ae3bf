"""Adapters as bytes: safetensors with a codec named in the metadata.

An int8 tensor ``x`` travels as ``x`` (int8) and ``x.scale`` (float32), one
scale per rank row: per row of lora_A and of the head, per column of lora_B.
An int4 matrix travels likewise as uint8, two numbers a byte along the axis of
its scales; vectors and matrices of odd length along that axis travel as int8.
Both are deflated behind a first line that says so: whole numbers repeat.
Valid on Python 3.8; imports NumPy only.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, Dict, Mapping, Optional, Tuple

import numpy as np
from numpy.typing import NDArray

from wire_protocol.errors import ProtocolError, one_line
from wire_protocol.lora import Codec
from wire_protocol.safetensors_bytes import tensor_bytes, tensor_views

Adapter = Mapping[str, "NDArray[np.float32]"]
"""LoRA and head tensors by our names (see ``model_family``), float32."""


class FiniteAdapter(Dict[str, "NDArray[np.float32]"]):
    """An adapter whose values were all found to be numbers, and cannot change any more.

    Raises:
        ProtocolError: a value is not finite.
    """

    def __init__(self, adapter: Adapter) -> None:
        bad = not_finite(adapter)
        if bad is not None:
            raise ProtocolError(f"tensor {bad[:80]!r} holds values that are not finite")
        super().__init__(adapter)
        for tensor in self.values():
            tensor.flags.writeable = False

    def __setitem__(self, name: str, tensor: "NDArray[np.float32]") -> None:
        raise TypeError(f"{name} cannot be set: make a new adapter")


MAX_ADAPTER_BYTES = 64 * 1024 * 1024
_SCALE = ".scale"
_QUANTISED = (np.dtype(np.int8), np.dtype(np.uint8))
_DEFLATED = b"legend.deflate/1\n"


def encode(adapter: Adapter, codec: Codec) -> bytes:
    """Write an adapter as safetensors.

    Raises:
        ProtocolError: a value is not finite, or exceeds the range of fp16.
    """
    tensors: Dict[str, NDArray[np.generic]] = {}
    for name in sorted(adapter):
        tensor = np.ascontiguousarray(adapter[name], dtype=np.float32)
        _require_finite(name, tensor)
        if codec is Codec.INT4 and _can_be_packed(name, tensor):
            tensors[name], tensors[name + _SCALE] = _pack(name, tensor)
        elif codec in (Codec.INT8, Codec.INT4):
            tensors[name], tensors[name + _SCALE] = _quantise(name, tensor, 127)
        elif codec is Codec.FP16:
            with np.errstate(over="ignore"):
                tensors[name] = tensor.astype(np.float16)
            _require_finite(name, tensors[name])
        else:
            tensors[name] = tensor
    data = tensor_bytes(tensors, {"codec": codec.value})
    return _DEFLATED + zlib.compress(data, 9) if codec in (Codec.INT8, Codec.INT4) else data


def decode(data: bytes) -> FiniteAdapter:
    """Read an adapter written by any codec; the inverse of ``encode``.

    Returns:
        Read-only tensors, which may be views of ``data``.

    Raises:
        ProtocolError: not safetensors, too large, a dtype outside the codecs,
            a scale without its tensor, or a value that is not finite.
    """
    if len(data) > MAX_ADAPTER_BYTES:
        raise ProtocolError(f"adapter of {len(data)} bytes exceeds {MAX_ADAPTER_BYTES}")
    tensors = tensor_views(_inflate(data))
    adapter = _plain(tensors)
    if adapter is None:
        adapter = _unpacked(tensors)
    return FiniteAdapter(adapter)


def _plain(tensors: Mapping[str, "NDArray[Any]"]) -> Optional[Dict[str, NDArray[np.float32]]]:
    """The same tensors where there is nothing to unpack, else None."""
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32 or name.endswith(_SCALE):
            return None
    return dict(tensors)


def _unpacked(tensors: Mapping[str, "NDArray[Any]"]) -> Dict[str, NDArray[np.float32]]:
    # Before anything is unpacked: a few deflated bytes could become gigabytes of numbers.
    if _unpacked_bytes(tensors) > MAX_ADAPTER_BYTES:
        raise ProtocolError(f"adapter exceeds {MAX_ADAPTER_BYTES} bytes once it is unpacked")
    adapter: Dict[str, NDArray[np.float32]] = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALE):
            if name[: -len(_SCALE)] not in tensors:
                raise ProtocolError(f"scale {name[:80]!r} has no tensor")
            continue
        values = _dequantise(name, tensors) if tensor.dtype in _QUANTISED else tensor
        adapter[name] = np.ascontiguousarray(values, dtype=np.float32)
    return adapter


def not_finite(adapter: Adapter) -> Optional[str]:
    """Name of the first tensor with a value that is no number, in one pass that writes nothing.

    Squares cannot cancel: their sum is finite only if every value is. It also overflows
    where values are huge, hence the second look.
    """
    if isinstance(adapter, FiniteAdapter):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        for name, tensor in adapter.items():
            vector = tensor.ravel()
            if not math.isfinite(vector.dot(vector)) and not np.isfinite(tensor).all():
                return name
    return None


def check_shapes(adapter: Adapter, expected: Mapping[str, Tuple[int, ...]]) -> None:
    """Compare names and shapes with what was assigned.

    Raises:
        ProtocolError: a tensor is missing, unexpected or of another shape.
    """
    missing = sorted(expected.keys() - adapter.keys())
    extra = sorted(adapter.keys() - expected.keys())
    if missing or extra:
        raise ProtocolError(one_line(f"adapter lacks {missing[:3]} and has unexpected {extra[:3]}"))
    for name, shape in expected.items():
        if adapter[name].shape != shape:
            raise ProtocolError(f"tensor {name} has shape {adapter[name].shape}, expected {shape}")


def _scale_axis(name: str) -> int:
    return 0 if name.endswith("lora_B") else 1


def _inflate(data: bytes) -> bytes:
    if not data.startswith(_DEFLATED):
        return data
    reader = zlib.decompressobj()
    try:
        plain = reader.decompress(data[len(_DEFLATED) :], MAX_ADAPTER_BYTES)
    except zlib.error as error:
        raise ProtocolError(f"adapter is not deflated: {error}") from error
    if not reader.eof or reader.unused_data:
        raise ProtocolError(f"adapter is cut off, or inflates beyond {MAX_ADAPTER_BYTES} bytes")
    return plain


def _unpacked_bytes(tensors: Mapping[str, "NDArray[np.generic]"]) -> int:
    """What the values take as float32; scales are not among them."""
    return sum(
        4 * tensor.size * (2 if tensor.dtype == np.uint8 else 1)
        for name, tensor in tensors.items()
        if not name.endswith(_SCALE)
    )


def _can_be_packed(name: str, tensor: NDArray[np.float32]) -> bool:
    return tensor.ndim == 2 and tensor.shape[_scale_axis(name)] % 2 == 0


def _pack(name: str, tensor: NDArray[np.float32]) -> Tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Numbers of -7..7, neighbours along the scales' axis in one byte."""
    numbers, scale = _quantise(name, tensor, 7)
    # Offset by 8, so that a nibble is 1..15 and needs no sign.
    nibbles = (numbers + 8).astype(np.uint8)
    even, odd = (
        (nibbles[0::2], nibbles[1::2])
        if _scale_axis(name) == 0
        else (nibbles[:, 0::2], nibbles[:, 1::2])
    )
    return np.ascontiguousarray(even | (odd << 4)), scale


def _unpack(name: str, packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    even, odd = (packed & 15).astype(np.float32) - 8, (packed >> 4).astype(np.float32) - 8
    axis = _scale_axis(name)
    return np.stack([even, odd], axis=axis + 1).reshape(
        [2 * n if i == axis else n for i, n in enumerate(packed.shape)]
    )


def _quantise(
    name: str, tensor: NDArray[np.float32], largest: int
) -> Tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric absmax quantisation; an all-zero row has scale 0."""
    axis = _scale_axis(name) if tensor.ndim == 2 else 0
    scale = np.abs(tensor).max(axis=axis, keepdims=True) / np.float32(largest)
    safe = np.where(scale > 0, scale, np.float32(1))
    return np.rint(tensor / safe).astype(np.int8), scale.astype(np.float32)


def _dequantise(name: str, tensors: Mapping[str, NDArray[np.generic]]) -> NDArray[np.float32]:
    tensor, scale = tensors[name], tensors.get(name + _SCALE)
    if tensor.dtype == np.uint8:
        if tensor.ndim != 2:
            raise ProtocolError(f"int4 tensor {name[:80]!r} is not a matrix")
        tensor = _unpack(name, tensor.astype(np.uint8))
    axis = _scale_axis(name) if tensor.ndim == 2 else 0
    expected = tuple(1 if i == axis else n for i, n in enumerate(tensor.shape))
    if scale is None or scale.dtype != np.float32 or scale.shape != expected:
        raise ProtocolError(f"tensor {name[:80]!r} needs float32 scales of shape {expected}")
    with np.errstate(over="ignore", invalid="ignore"):
        return tensor.astype(np.float32) * scale.astype(np.float32)


def _require_finite(name: str, tensor: NDArray[np.generic]) -> None:
    if not np.isfinite(tensor).all():
        raise ProtocolError(f"tensor {name[:80]!r} holds values that are not finite")
