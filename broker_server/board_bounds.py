"""What can be believed of a device's reports: its board's bounds, the server's clock.

Joins profiles and messages to the arithmetic of ``strategies.capacity``; a board
without a known speed has no bounds.
"""

from __future__ import annotations

from broker_server.strategies.capacity import BoardBounds, scale_to_observed
from profiles.errors import ProfileError
from profiles.loader import load_board
from wire_protocol.model_family import ModelShape
from wire_protocol.parts import StepReport

OPERATIONS = 2.0
"""Floating-point operations per weight and token of one pass, as profiles count them."""

_ANY_HOST = "generic-"
"""Boards that stand for whatever host it is: their speed is nobody's."""


def bounds_of(board_id: str, shape: ModelShape) -> BoardBounds | None:
    """Speed and memory of a board with a base model; None where they are not known."""
    if board_id.startswith(_ANY_HOST):
        return None
    try:
        board = load_board(board_id)
    except ProfileError:
        return None
    flops_per_s = max(board.flops_per_s(mode.name) for mode in board.power_modes)
    seconds = OPERATIONS * shape.weights_per_layer / flops_per_s
    return BoardBounds(seconds, float(board.memory_bytes))


def cross_checked(report: StepReport, observed_s: float) -> tuple[StepReport, str]:
    """Hold the times of a report against the time that the server saw pass.

    Args:
        report: of one assignment.
        observed_s: from sending the assignment to the update's arrival.

    Returns:
        The report with times that add up to what was observed where they cannot be
        true, and why; the same report and an empty line otherwise.
    """
    names = ("download_s", "forward_s", "backward_s", "upload_s")
    claimed_s = sum(getattr(report, name) for name in names)
    scale = scale_to_observed(claimed_s, observed_s)
    if scale == 1.0:
        return report, ""
    changed = {name: getattr(report, name) * scale for name in names}
    line = f"it says {claimed_s:.1f} s for a round that took {observed_s:.1f} s here"
    return report.model_copy(update=changed), line
