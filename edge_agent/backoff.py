"""How long to wait before trying again.

Pure: knows neither clock nor network. Every retry of the agent uses it, so that a fleet
that lost its server at the same instant does not come back at the same instant.
"""

from __future__ import annotations

import random


def full_jitter(attempt: int, *, base_s: float, cap_s: float, rng: random.Random) -> float:
    """Draw a delay between 0 and an upper bound that doubles with every failure.

    Args:
        attempt: failures so far that this delay follows, from 0.
        base_s: the upper bound after the first failure.
        cap_s: the upper bound never exceeds this.
        rng: the source of the draw.

    Returns:
        Seconds to wait.

    Source: "full jitter", https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter
    """
    # 2**30 s is beyond any cap; a larger exponent would only overflow after days of failures.
    return rng.uniform(0.0, min(cap_s, base_s * 2.0 ** min(attempt, 30)))
