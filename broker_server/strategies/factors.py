"""Factor schedules: which LoRA factor is trained in which round.

    both         A and B in every round
    B            B alone: the mean of B is then exact, and A stays as it was drawn
    alternating  B in odd rounds, A in even ones: exact too, because what is
                 frozen is the same everywhere

Source: FFA-LoRA (arXiv:2403.12313) and RoLoRA (arXiv:2502.01755).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from broker_server.strategies.strategy import Factors
from broker_server.strategies.updates import Allowed

FactorSchedule = Literal["both", "B", "alternating"]

ALLOWED: Mapping[FactorSchedule, Allowed] = {"both": "any", "B": "B", "alternating": "one"}
"""What the updates of a round may hold under each schedule."""


def factors_in(schedule: FactorSchedule, round_number: int) -> Factors:
    """What is trained in a round.

    B comes first: while it is zero, A has no gradient.

    Args:
        schedule: of the run.
        round_number: from 1.
    """
    if schedule == "alternating":
        return "B" if round_number % 2 else "A"
    return schedule
