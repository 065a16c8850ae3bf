"""The methods that are compared, each as the settings that make it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from broker_server.strategies import STRATEGY_NAMES

PARTS: Mapping[str, Any] = {
    "codec": "int8",
    "adapter_codec": "int8",
    "loss": "balanced",
    "strategy_options": {"prefix_mode": "periodic", "prefix_every": 1},
}
"""What of ours any method can use: the codecs both ways, a loss that allows for the classes that a
device has, and the frozen prefix's hidden states, which are computed once a round for every
example instead of at every visit."""

WITH_PARTS = "+parts"

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "fedadapter": {"strategy_options": {"prefix_mode": "pretrained"}},
}
"""What a baseline brings beside its strategy: FedAdapter its cache of activations, whose
prefix nobody trains, because all devices have the same depth."""

ALL_LAYERS = object()
"""Stands for the number of layers of the base model."""

BASELINES = ("fedlora", "hetlora", "fedadapter", "flexlora")
METHODS = ("legend", "legend-paper", *BASELINES)
"""``legend`` is ours with everything; the others are as published."""


def _options(**options: Any) -> Mapping[str, Any]:
    return {"strategy_options": options}


ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "legend": {},
    "no-depth": _options(depth_min=ALL_LAYERS),
    "no-ranks": _options(rank_min=7, rank_step=0),
    "no-cache": _options(prefix_mode="synced"),
    "no-codec": {"codec": "fp32", "adapter_codec": "fp32"},
    "no-deadline": _options(pace="slowest"),
    "no-balance": {"loss": "plain"},
    "int4": {"codec": "int4"},
    "int4-both": {"codec": "int4", "adapter_codec": "int4"},
    "momentum": _options(server_optimizer="momentum", server_learning_rate=0.2),
    "products": _options(aggregation="products"),
    "alternating": _options(factors="alternating"),
    "importance": _options(ranks="importance", ranks_every=5),
}
"""``legend`` with one part taken away or added.

    no-depth     every device trains all layers
    no-ranks     rank 7 at every layer of MiniLM, instead of 4 to 9
    no-cache     the layers below the depth as they are in this round, computed in every step
    no-codec     fp32 both ways
    no-deadline  the slowest device sets the pace, as in the paper
    no-balance   devices train as if all had the same classes
"""


def settings_of(method: str, layer_count: int) -> dict[str, Any]:
    """What a method changes in an experiment.

    Args:
        method: a strategy's name; ``NAME+parts`` for one with our codecs and cache; one of
            ``ABLATIONS``.
        layer_count: of the base model.

    Raises:
        KeyError: there is no such method; holds the known ones.
    """
    if method in ABLATIONS:
        chosen = {"strategy": "legend", **ABLATIONS[method]}
        options = chosen.get("strategy_options", {}).items()
        chosen["strategy_options"] = {
            name: layer_count if value is ALL_LAYERS else value for name, value in options
        }
        return chosen
    strategy, plus, rest = method.partition("+")
    if strategy not in STRATEGY_NAMES or plus + rest not in ("", WITH_PARTS):
        raise KeyError(", ".join((*STRATEGY_NAMES, *ABLATIONS)))
    return {"strategy": strategy, **(PARTS if plus else PUBLISHED.get(strategy, {}))}
