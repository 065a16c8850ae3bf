"""Adapters as bytes: safetensors with a codec named in the metadata.

An int8 tensor ``x`` travels as ``x`` (int8) and ``x.scale`` (float32), one
scale per rank row: per row of lora_A and of the head, per column of lora_B.
Valid on Python 3.8; imports NumPy and safetensors only.
"""

from __future__ import annotations

from typing import Dict, Mapping, Tuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from wire_protocol.errors import ProtocolError, one_line
from wire_protocol.lora import Codec

Adapter = Mapping[str, "NDArray[np.float32]"]
"""LoRA and head tensors by our names (see ``model_family``), float32."""

MAX_ADAPTER_BYTES = 64 * 1024 * 1024
_SCALE = ".scale"


def encode(adapter: Adapter, codec: Codec) -> bytes:
    """Write an adapter as safetensors.

    Raises:
        ProtocolError: a value is not finite, or exceeds the range of fp16.
    """
    tensors: Dict[str, NDArray[np.generic]] = {}
    for name in sorted(adapter):
        tensor = np.ascontiguousarray(adapter[name], dtype=np.float32)
        _require_finite(name, tensor)
        if codec is Codec.INT8:
            tensors[name], tensors[name + _SCALE] = _quantise(name, tensor)
        elif codec is Codec.FP16:
            with np.errstate(over="ignore"):
                tensors[name] = tensor.astype(np.float16)
            _require_finite(name, tensors[name])
        else:
            tensors[name] = tensor
    return bytes(save(tensors, metadata={"codec": codec.value}))


def decode(data: bytes) -> Dict[str, NDArray[np.float32]]:
    """Read an adapter written by any codec; the inverse of ``encode``.

    Raises:
        ProtocolError: not safetensors, too large, a dtype outside the codecs,
            a scale without its tensor, or a value that is not finite.
    """
    if len(data) > MAX_ADAPTER_BYTES:
        raise ProtocolError(f"adapter of {len(data)} bytes exceeds {MAX_ADAPTER_BYTES}")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ProtocolError(one_line(f"adapter is not valid safetensors: {error}")) from error
    adapter: Dict[str, NDArray[np.float32]] = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALE):
            if name[: -len(_SCALE)] not in tensors:
                raise ProtocolError(f"scale {name[:80]!r} has no tensor")
            continue
        values = _dequantise(name, tensors) if tensor.dtype == np.int8 else tensor
        if values.dtype not in (np.float32, np.float16):
            raise ProtocolError(f"tensor {name[:80]!r} has dtype {values.dtype}")
        adapter[name] = np.ascontiguousarray(values, dtype=np.float32)
        _require_finite(name, adapter[name])
    return adapter


def check_shapes(adapter: Adapter, expected: Mapping[str, Tuple[int, ...]]) -> None:
    """Compare names and shapes with what was assigned.

    Raises:
        ProtocolError: a tensor is missing, unexpected or of another shape.
    """
    missing = sorted(expected.keys() - adapter.keys())
    extra = sorted(adapter.keys() - expected.keys())
    if missing or extra:
        raise ProtocolError(f"adapter lacks {missing[:3]} and has unexpected {extra[:3]}")
    for name, shape in expected.items():
        if adapter[name].shape != shape:
            raise ProtocolError(f"tensor {name} has shape {adapter[name].shape}, expected {shape}")


def _scale_axis(name: str) -> int:
    return 0 if name.endswith("lora_B") else 1


def _quantise(
    name: str, tensor: NDArray[np.float32]
) -> Tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric absmax quantisation; an all-zero row has scale 0."""
    axis = _scale_axis(name) if tensor.ndim == 2 else 0
    scale = np.abs(tensor).max(axis=axis, keepdims=True) / np.float32(127)
    safe = np.where(scale > 0, scale, np.float32(1))
    return np.rint(tensor / safe).astype(np.int8), scale.astype(np.float32)


def _dequantise(name: str, tensors: Mapping[str, NDArray[np.generic]]) -> NDArray[np.float32]:
    tensor, scale = tensors[name], tensors.get(name + _SCALE)
    axis = _scale_axis(name) if tensor.ndim == 2 else 0
    expected = tuple(1 if i == axis else n for i, n in enumerate(tensor.shape))
    if scale is None or scale.dtype != np.float32 or scale.shape != expected:
        raise ProtocolError(f"int8 tensor {name[:80]!r} needs float32 scales of shape {expected}")
    with np.errstate(over="ignore", invalid="ignore"):
        return tensor.astype(np.float32) * scale.astype(np.float32)


def _require_finite(name: str, tensor: NDArray[np.generic]) -> None:
    if not np.isfinite(tensor).all():
        raise ProtocolError(f"tensor {name[:80]!r} holds values that are not finite")
