"""Imitating a slower board: every step takes at least as long as it would there.

Knows the floating-point operations of a step and how fast the imitated board is. It cannot
imitate a board that is faster than this machine. Valid on Python 3.8, standard library only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, Optional


@dataclass(frozen=True)
class Stretch:
    """The speed to imitate, and how to pass the time that is left.

    Attributes:
        weights_per_layer: see ``wire_protocol.model_family.ModelShape``.
        flops_per_s: sustained speed of the imitated board; None imitates nothing.
        sleep: called with the seconds that remain. A benchmark passes a function
            that returns at once: it wants the figure, not the wait.
    """

    weights_per_layer: int
    flops_per_s: Optional[float] = None
    sleep: Callable[[float], object] = time.sleep

    def forward(self, token_layers: int, *, measured_s: float) -> float:
        """Pass the rest of a forward pass of so many tokens times layers; its seconds."""
        return self._pass_time(token_layers, measured_s)

    def backward(self, tokens: int, *, depth: int, measured_s: float) -> float:
        """Pass the rest of a backward pass through ``depth`` layers; its seconds.

        The frozen matrices need no weight gradient, so it costs as much per
        layer as a forward pass, and nothing below the depth.
        """
        return self._pass_time(tokens * depth, measured_s)

    def _pass_time(self, token_layers: int, measured_s: float) -> float:
        if self.flops_per_s is None:
            return measured_s
        wanted_s = 2.0 * self.weights_per_layer * token_layers / self.flops_per_s
        if wanted_s <= measured_s:
            return measured_s
        self.sleep(wanted_s - measured_s)
        return wanted_s
