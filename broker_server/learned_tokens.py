"""How many tokens a local step really has, learned from round to round."""

from __future__ import annotations

from collections.abc import Collection

from wire_protocol.messages import UpdateManifest

TOKENS_RHO = 0.7
"""Weight of the old value in the moving average of tokens per step."""


def learned_tokens(before: float, updates: Collection[UpdateManifest]) -> float:
    """Tokens per step after a round, padding included."""
    steps = sum(update.report.steps_done for update in updates)
    measured = sum(update.report.tokens for update in updates) / max(1, steps)
    return TOKENS_RHO * before + (1 - TOKENS_RHO) * measured
