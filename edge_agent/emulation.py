"""Imitating a slower board: what its profile means on this machine.

One second of the board takes ``time_dilation`` seconds here, so that several
boards, faster than this machine in sum, can be imitated at once. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.link import LinkShape
from edge_agent.settings import EmulateSettings
from profiles.errors import ProfileError
from profiles.loader import load_board
from wire_protocol.errors import ConfigError

USABLE_MEMORY = 0.7
"""Share of a board's memory that training may plan with; the rest is the system's."""


@dataclass(frozen=True)
class Emulation:
    """The board that this agent pretends to be.

    Attributes:
        flops_per_s: training speed to imitate, already divided by the dilation.
        memory_bytes: what training may use on such a board.
        label: one line for every report.
    """

    board: str
    power_mode: str
    flops_per_s: float
    memory_bytes: int
    link: LinkShape
    label: str


def emulation_of(settings: EmulateSettings) -> Emulation:
    """Work out what to imitate.

    Raises:
        ConfigError: no such board or power mode.
    """
    try:
        board = load_board(settings.board)
        mode = board.mode(settings.power_mode).name
        flops_per_s = board.flops_per_s(mode)
    except ProfileError as error:
        raise ConfigError(f"emulate: {error}") from error
    dilation = settings.time_dilation
    link = settings.link
    up_mbps = link.up_mbps if link else board.link.up_mbps.value
    down_mbps = link.down_mbps if link else board.link.down_mbps.value
    round_trip_ms = link.round_trip_ms if link else 5.0
    return Emulation(
        board=board.board_id,
        power_mode=mode,
        flops_per_s=flops_per_s / dilation,
        memory_bytes=settings.memory_limit_bytes or int(board.memory_bytes * USABLE_MEMORY),
        link=LinkShape(
            up_bytes_per_s=up_mbps * 1e6 / 8 / dilation,
            down_bytes_per_s=down_mbps * 1e6 / 8 / dilation,
            round_trip_s=round_trip_ms / 1e3 * dilation,
        ),
        label=f"{board.board_id} {mode}, {dilation:g}x slower than real",
    )
