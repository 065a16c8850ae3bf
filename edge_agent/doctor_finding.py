"""What the doctor says about one thing that it looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check: ``state`` is ``ok``, ``warning`` or ``broken``."""

    check: str
    state: str
    seen: str
    remedy: str = ""
