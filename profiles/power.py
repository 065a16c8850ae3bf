"""What a board draws while it trains, as far as its profile tells."""

from __future__ import annotations

from profiles.schema import BoardProfile


def training_watts(board: BoardProfile, power_mode: str | None) -> float | None:
    """Power while training in a mode: the mode's budget, an upper bound.

    A mode without a cap is taken to draw as much more than the strongest capped mode as it is
    faster: an estimate, and of the right kind only while speed follows the clock.

    Args:
        board: its profile.
        power_mode: by name; None means the board's default.

    Returns:
        Watts of the whole module; None when the profile knows none.
    """
    name = power_mode or board.default_power_mode
    mode = next((mode for mode in board.power_modes if mode.name == name), None)
    if mode is None:
        return None
    if mode.watts is not None:
        return mode.watts.value
    capped = [
        (other.watts.value, other.relative_speed.value)
        for other in board.power_modes
        if other.watts is not None
    ]
    if not capped:
        return None
    watts, speed = max(capped)
    return watts * max(1.0, mode.relative_speed.value / speed)
