"""What a coarse codec left out of one update goes into the next.

A device keeps the difference between what it learned and what its update could say, per run and
tensor, and adds it to what it learns in the next round: errors of rounding do not add up. A tensor
whose shape changed, because its rank did, starts anew; one that is not trained now keeps what it
had. Valid on Python 3.8.

Source: arXiv:1901.09847 (error feedback).
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Tuple

import numpy as np
from numpy.typing import NDArray

from wire_protocol.errors import ProtocolError
from wire_protocol.lora import Codec
from wire_protocol.tensors import Adapter, decode, encode

COARSE = (Codec.INT8, Codec.INT4)
"""Codecs that leave out enough to be worth remembering."""


def encode_with_feedback(
    delta: Adapter, residual: Adapter, codec: Codec
) -> Tuple[bytes, Dict[str, NDArray[np.float32]]]:
    """Encode an update together with what earlier ones left out.

    Args:
        delta: what was learned in this round.
        residual: what was left out so far.
        codec: how the update travels.

    Returns:
        The bytes, and the new residual. Tensors that this update does not have keep theirs.

    Raises:
        ProtocolError: a value is not finite.
    """
    wanted = {
        name: tensor + residual[name]
        if name in residual and residual[name].shape == tensor.shape
        else tensor
        for name, tensor in delta.items()
    }
    data = encode(wanted, codec)
    said = decode(data)
    left_out = {name: wanted[name] - said[name] for name in wanted}
    return data, {**residual, **left_out}


def read_residual(path: Path) -> Adapter:
    """What was left out so far; nothing when there is no file, or a damaged one."""
    try:
        return decode(path.read_bytes())
    except (OSError, ProtocolError):
        return {}
