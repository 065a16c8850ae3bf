"""The methods that are compared, each as the settings that make it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS: Mapping[str, Any] = {
    "codec": "int8",
    "adapter_codec": "int8",
    "strategy_options": {"prefix_mode": "periodic", "prefix_every": 1},
}
"""What of ours any method can use: the codecs both ways, and the frozen prefix's hidden states,
which are computed once a round for every example instead of at every visit."""

WITH_PARTS = "+parts"

OURS: Mapping[str, Any] = {
    **PARTS,
    "strategy_options": {**PARTS["strategy_options"], "pace": "deadline"},
}

BASELINES = ("fedlora", "hetlora", "fedadapter", "flexlora")
METHODS = ("legend", "legend-paper", *BASELINES)
"""``legend`` is ours with everything; the others are as published."""


def settings_of(method: str) -> dict[str, Any]:
    """What a method changes in an experiment.

    Args:
        method: a strategy's name; ``NAME+parts`` for one with our codecs and cache.
    """
    if method == "legend":
        return {"strategy": "legend", **OURS}
    strategy, plus, rest = method.partition("+")
    return {"strategy": strategy, **(PARTS if plus + rest == WITH_PARTS else {})}
