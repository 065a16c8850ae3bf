"""How large the gradients of each trained layer are, for a server that shares out ranks.

Knows torch. Valid on Python 3.8.
"""

from __future__ import annotations

import math
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch

from wire_protocol.model_family import layer_of


class GradientSizes:
    """Collects squares of gradients, step by step, without waiting for the device.

    Args:
        parameters: what is trained of the layers, by our names.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        by_layer: Dict[int, List[Any]] = {}
        for name, parameter in parameters.items():
            layer = layer_of(name)
            if layer is not None:
                by_layer.setdefault(layer, []).append(parameter)
        self._layers = [by_layer[layer] for layer in sorted(by_layer)]
        self._sums: Optional[Any] = None
        self._steps = 0

    def add(self) -> None:
        """Take the gradients that the parameters have now."""
        squares = torch.stack(
            [
                torch.stack([parameter.grad.square().sum() for parameter in layer]).sum()
                for layer in self._layers
            ]
        )
        self._sums = squares if self._sums is None else self._sums + squares
        self._steps += 1

    def per_value(self) -> Optional[Tuple[float, ...]]:
        """Root mean square of a value's gradient, by layer from the lowest trained to the output.

        None before the first step, and where a gradient was not finite.
        """
        if self._sums is None:
            return None
        counts = [sum(parameter.numel() for parameter in layer) for layer in self._layers]
        roots = tuple(
            math.sqrt(total / (count * self._steps)) if total >= 0 else math.nan
            for total, count in zip(self._sums.tolist(), counts)
        )
        return roots if all(math.isfinite(root) for root in roots) else None
