"""Strategies by the name that a run specification uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from broker_server.strategies.fedlora import FEDLORA_OPTIONS, FedLora
from broker_server.strategies.legend import LEGEND_OPTIONS, Legend
from broker_server.strategies.options import Reader, read_options
from broker_server.strategies.strategy import Strategy
from wire_protocol.errors import ConfigError

_STRATEGIES: Mapping[str, tuple[Callable[..., Strategy], Mapping[str, Reader]]] = {
    "legend": (Legend, LEGEND_OPTIONS),
    "fedlora": (FedLora, FEDLORA_OPTIONS),
}


def strategy_named(name: str, options: Mapping[str, object]) -> Strategy:
    """Build a strategy from a run specification.

    Args:
        name: ``legend`` or ``fedlora``.
        options: plain values; those not given keep their defaults.

    Raises:
        ConfigError: unknown name or option, with the known ones, or a wrong value.
    """
    if name not in _STRATEGIES:
        raise ConfigError(f"there is no strategy {name!r}; use one of {', '.join(_STRATEGIES)}")
    make, readers = _STRATEGIES[name]
    return make(**read_options(name, readers, options))
