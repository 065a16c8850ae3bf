"""What several rounds took, whoever did them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Measured:
    """The rounds after the first, which pays for everything that is loaded once.

    Attributes:
        round_s: of each, from the end of the one before it.
        cpu_s: of all processes together, per round; 0 where it was not measured.
        rss_bytes: of all processes together at the end.
        total_s: from the first process's start to the last round's end.
    """

    round_s: list[float]
    cpu_s: float
    rss_bytes: int
    total_s: float

    @property
    def median_s(self) -> float:
        """The middle round."""
        return statistics.median(self.round_s)


def gaps(ends: Sequence[float]) -> list[float]:
    """Seconds from each round's end to the next one's."""
    return [later - earlier for earlier, later in pairwise(ends)]
