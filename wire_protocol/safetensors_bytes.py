"""The safetensors format: tensors to bytes with one copy, and back with none.

The format's own library copies each tensor several times, which takes longer than adding it up.
The bytes are the same. Reading is as strict: the tensors must fill the bytes behind the header
without a hole or an overlap. Devices with equal ranks send equal headers, so that most are looked
up and not parsed. Valid on Python 3.8; imports NumPy only.

Source: the format's description in the safetensors project.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Dict, Mapping, NamedTuple, Tuple

import numpy as np
from numpy.typing import NDArray

from wire_protocol.errors import ProtocolError

MAX_HEADER_BYTES = 4 * 1024 * 1024
"""Far more than any adapter has; a parsed header takes many times its bytes."""

_REMEMBERED_BYTES = 128 * 1024
"""Longer headers are parsed each time: what is remembered must stay small whoever sends it."""

_LENGTH = 8
_METADATA = "__metadata__"
_ALIGNMENT = 8
_DTYPES: Dict[str, "np.dtype[Any]"] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
"""What adapters are made of (see ``tensors``), in the order in which a file has them."""

_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = {dtype: index for index, dtype in enumerate(_NAMES)}


class _Place(NamedTuple):
    """One tensor, in bytes behind the header."""

    begin: int
    end: int
    name: str
    dtype: "np.dtype[Any]"
    shape: Tuple[int, ...]


def tensor_bytes(tensors: Mapping[str, "NDArray[Any]"], metadata: Mapping[str, str]) -> bytes:
    """Write tensors; the same bytes whatever their order.

    Args:
        tensors: contiguous, of a dtype that a codec writes.
        metadata: words for the header.
    """
    header: Dict[str, Any] = {_METADATA: dict(metadata)}
    values = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0])):
        begin, end = end, end + tensor.nbytes
        dtype, shape = _NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        values.append(tensor.data)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([len(text).to_bytes(_LENGTH, "little"), text, *values])


def tensor_views(data: bytes) -> Dict[str, "NDArray[Any]"]:
    """Read-only views of the tensors in ``data``, which they keep alive; in its order.

    Raises:
        ProtocolError: not safetensors, or a dtype that no codec writes.
    """
    begin = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    if begin > min(len(data), _LENGTH + MAX_HEADER_BYTES):
        raise _invalid(f"its header of {begin - _LENGTH} bytes is cut off or too long")
    layout_of = _remembered_layout if begin <= _REMEMBERED_BYTES else _layout
    layout = layout_of(data[_LENGTH:begin])
    end = begin + (layout[-1].end if layout else 0)
    if end != len(data):
        raise _invalid(f"its tensors end at byte {end} of {len(data)}")
    return {
        place.name: np.ndarray(place.shape, place.dtype, data, begin + place.begin)
        for place in layout
    }


def _layout(header: bytes) -> Tuple[_Place, ...]:
    """What a header says, where the tensors lie one behind the other from 0 on."""
    try:
        described = json.loads(header.decode("utf-8")) if header[:1] == b"{" else None
    except (ValueError, RecursionError) as error:
        raise _invalid("its header is not JSON") from error
    if not isinstance(described, dict):
        raise _invalid("its header is no JSON object")
    metadata = described.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _invalid("its metadata are not strings")
    layout = tuple(sorted(_place(name, info) for name, info in described.items()))
    end = 0
    for place in layout:
        if place.begin != end:
            raise _invalid(f"tensor {place.name[:80]!r} does not begin where the one before ends")
        end = place.end
    return layout


_remembered_layout = lru_cache(maxsize=16)(_layout)


def _place(name: str, info: Mapping[str, Any]) -> _Place:
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        # Not isinstance: true and false are whole numbers to it.
        whole = {type(number) for number in (*shape, begin, end)} == {int}
        if not whole or min(begin, end, *shape) < 0 or not isinstance(shape, list):
            raise _invalid(f"tensor {name[:80]!r} has a shape or place that is no number")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ProtocolError(f"tensor {name[:80]!r} has dtype {str(dtype)[:20]!r}")
        # NumPy decides which shapes there are; this one takes no memory, whatever it says.
        values = np.broadcast_to(np.zeros((), _DTYPES[dtype]), shape)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise _invalid(f"tensor {name[:80]!r} is not described as it should be") from error
    if end - begin != values.size * values.itemsize:
        raise _invalid(f"tensor {name[:80]!r} does not fill its {end - begin} bytes")
    return _Place(begin, end, name, values.dtype, values.shape)


def _invalid(problem: str) -> ProtocolError:
    return ProtocolError(f"adapter is not valid safetensors: {problem}")
