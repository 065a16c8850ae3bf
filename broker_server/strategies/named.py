"""Strategies by the name that a run specification uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from broker_server.strategies.fedadapter import FEDADAPTER_OPTIONS, FedAdapter
from broker_server.strategies.fedlora import FEDLORA_OPTIONS, FedLora
from broker_server.strategies.fedquad import FEDQUAD_OPTIONS, fed_quad
from broker_server.strategies.legend import (
    LEGEND_OPTIONS,
    PAPER_OPTIONS,
    legend,
    legend_paper,
)
from broker_server.strategies.one_factor import ffa_lora, ro_lora
from broker_server.strategies.options import Reader, read_options
from broker_server.strategies.strategy import Strategy
from broker_server.strategies.tiered_lora import (
    HETLORA_OPTIONS,
    TIERED_OPTIONS,
    flex_lora,
    het_lora,
)
from wire_protocol.errors import ConfigError

_STRATEGIES: Mapping[str, tuple[Callable[..., Strategy], Mapping[str, Reader]]] = {
    "legend": (legend, LEGEND_OPTIONS),
    "legend-paper": (legend_paper, PAPER_OPTIONS),
    "fedlora": (FedLora, FEDLORA_OPTIONS),
    "hetlora": (het_lora, HETLORA_OPTIONS),
    "flexlora": (flex_lora, TIERED_OPTIONS),
    "fedadapter": (FedAdapter, FEDADAPTER_OPTIONS),
    "fedquad": (fed_quad, FEDQUAD_OPTIONS),
    "ffa": (ffa_lora, FEDLORA_OPTIONS),
    "rolora": (ro_lora, FEDLORA_OPTIONS),
}

STRATEGY_NAMES = tuple(_STRATEGIES)
"""What ``strategy_named`` knows."""


def strategy_named(name: str, options: Mapping[str, object]) -> Strategy:
    """Build a strategy from a run specification.

    Args:
        name: one of ``STRATEGY_NAMES``.
        options: plain values; those not given keep their defaults.

    Raises:
        ConfigError: unknown name or option, with the known ones, or a wrong value.
    """
    if name not in _STRATEGIES:
        raise ConfigError(f"there is no strategy {name!r}; use one of {', '.join(_STRATEGIES)}")
    make, readers = _STRATEGIES[name]
    return make(**read_options(name, readers, options))
