"""HetLoRA's self-pruning: a device whose last ranks shrank while it trained gets fewer.

    tail score = sum over modules of ||B[:, g:]|| ||A[g:, :]||,   g = kept_ranks(r, share)
    score after training < score before  =>  r = max(rank_min, g)

The server holds what a device began with (before a coarse codec rounded it) and
what it made of it, so it judges by itself; the device only trains with the
penalty (``edge_agent.tail_penalty``). What is remembered is how often a device
was pruned: its tier, and with it the rank that is cut, changes with the cohort.

Source: HetLoRA, arXiv:2401.06432, rank self-pruning; judged by the server, by us.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire_protocol.lora import kept_ranks

Factors = Mapping[str, NDArray[Any]]
_STATE = "pruned/"


class SelfPruning:
    """How often each device was pruned.

    Args:
        share: gamma, what is left of a rank that is pruned once.
        rank_min: nobody gets less.
    """

    def __init__(self, share: float, rank_min: int) -> None:
        self._share = share
        self._rank_min = rank_min
        self._times: dict[str, int] = {}

    def allowed(self, device_id: str, rank: int) -> int:
        """What is left of a rank for this device."""
        for _ in range(self._times.get(device_id, 0)):
            rank = self._cut(rank)
        return rank

    def judge(self, device_id: str, before: Factors, after: Factors) -> None:
        """Compare what a device began with and what it trained; the same shapes, once a round."""
        rank = max(values.shape[0] for name, values in after.items() if name.endswith("lora_A"))
        shrank = tail_score(after, self._share) < tail_score(before, self._share)
        if shrank and self._cut(rank) < rank:
            self._times[device_id] = self._times.get(device_id, 0) + 1

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Everything, as tensors to be stored."""
        return {
            f"{_STATE}{name}": np.array([times], dtype=np.float32)
            for name, times in self._times.items()
        }

    def restore(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Go on from what ``state`` returned; an empty one begins anew."""
        self._times = {
            name.removeprefix(_STATE): int(values[0])
            for name, values in state.items()
            if name.startswith(_STATE)
        }

    def _cut(self, rank: int) -> int:
        return min(rank, max(self._rank_min, kept_ranks(rank, self._share)))


def tail_score(factors: Factors, share: float) -> float:
    """Size of the last ranks of all modules.

    Args:
        factors: ``lora_A`` (r, d_in) and ``lora_B`` (d_out, r) of every module.
        share: of the ranks that are no tail.
    """
    score = 0.0
    for name, down in factors.items():
        if name.endswith("lora_A"):
            kept = kept_ranks(down.shape[0], share)
            up = factors[f"{name[:-1]}B"][:, kept:].astype(np.float64)
            score += float(np.linalg.norm(up) * np.linalg.norm(down[kept:].astype(np.float64)))
    return score
