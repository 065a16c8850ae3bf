"""What a device applies below the layers that it trains, and for how long that stays the same.

    synced      the global adapter of the round: features like everybody's, new in every round
    periodic    the global adapter as it was every R rounds: a device computes what its frozen
                layers make of an example once in R rounds
    pretrained  nothing: the base model as it is, once for the whole run

Every strategy may have each of them. Knows rounds and numbers; knows no device's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from broker_server.strategies.options import Reader, choice, integer, read_options

PrefixMode = Literal["synced", "periodic", "pretrained"]

PREFIX_OPTIONS: Mapping[str, Reader] = {
    "prefix_mode": choice("synced", "periodic", "pretrained"),
    "prefix_every": integer(1),
}
"""What every strategy takes beside its own options."""


@dataclass(frozen=True)
class PrefixRule:
    """How long the layers below a device's depth stay as they are.

    Attributes:
        every: rounds between two refreshes of a periodic prefix.
    """

    mode: PrefixMode = "synced"
    every: int = 10

    @property
    def is_kept(self) -> bool:
        """Whether it outlives a round, so that devices keep what it computes."""
        return self.mode != "synced"

    def refreshes(self, round_number: int) -> bool:
        """Whether a periodic prefix is taken anew before this round (from 1)."""
        return self.mode == "periodic" and (round_number - 1) % self.every == 0

    def rounds_left(self, round_number: int) -> int | None:
        """Rounds after this one in which the prefix is the same; None for all of them."""
        if self.mode != "periodic":
            return None
        return self.every - 1 - (round_number - 1) % self.every


SYNCED = PrefixRule()

DEFAULT_RULE: Mapping[str, PrefixRule] = {"legend": PrefixRule("periodic", every=1)}
"""By strategy; ``synced`` for those that are not named."""


def prefix_rule(
    strategy: str, options: Mapping[str, object]
) -> tuple[PrefixRule, dict[str, object]]:
    """Part the prefix's options from the others.

    Args:
        strategy: its name, for messages and the default.
        options: plain values of a run specification.

    Returns:
        The rule, and the options that are left.

    Raises:
        ConfigError: a wrong value.
    """
    ours = {name: value for name, value in options.items() if name in PREFIX_OPTIONS}
    rest = {name: value for name, value in options.items() if name not in PREFIX_OPTIONS}
    read: dict[str, Any] = read_options(strategy, PREFIX_OPTIONS, ours)
    default = DEFAULT_RULE.get(strategy, SYNCED)
    mode = read.get("prefix_mode", default.mode)
    return PrefixRule(mode, read.get("prefix_every", default.every)), rest
