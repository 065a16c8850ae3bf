"""Bound what one device says: its whole update, scaled down to a norm.

The norm is that of all tensors together, both factors and the head, because that is
what a private run promises about one device. The server clips again; doing it here
means that nothing larger ever leaves the device. Valid on Python 3.8, NumPy only.
"""

from __future__ import annotations

from typing import Dict, Mapping, Optional

import numpy as np
from numpy.typing import NDArray


def clip_update(
    update: Mapping[str, NDArray[np.float32]], clip_norm: Optional[float]
) -> Dict[str, NDArray[np.float32]]:
    """The update with a Euclidean norm of at most ``clip_norm``.

    Args:
        update: deltas by tensor name.
        clip_norm: None leaves the update as it is; a norm that is not finite is
            left to the check that follows.
    """
    if clip_norm is None:
        return dict(update)
    squares = (np.sum(np.square(delta, dtype=np.float64)) for delta in update.values())
    norm = float(np.sqrt(sum(float(square) for square in squares)))
    if not norm > clip_norm or not np.isfinite(norm):
        return dict(update)
    scale = clip_norm / norm
    return {name: (delta * scale).astype(np.float32) for name, delta in update.items()}
