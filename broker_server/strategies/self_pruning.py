"""HetLoRA's self-pruning: a device whose last ranks shrank while it trained gets fewer.

    tail score = sum over modules of ||B[:, g:]|| ||A[g:, :]||,   g = kept_ranks(r, share)
    score after training < score before  =>  r = max(rank_min, g)

The server holds what a device began with and what it made of it, so it judges
by itself; the device only trains with the penalty (``edge_agent.tail_penalty``).

Source: HetLoRA, arXiv:2401.06432, rank self-pruning; judged by the server, by us.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from wire_protocol.lora import kept_ranks

Factors = Mapping[str, NDArray[np.float64]]
_STATE = "pruned/"


class SelfPruning:
    """Ranks that devices were cut to; never more than before.

    Args:
        share: gamma, what is left of a rank that is pruned once.
        rank_min: nobody gets less.
    """

    def __init__(self, share: float, rank_min: int) -> None:
        self._share = share
        self._rank_min = rank_min
        self._ranks: dict[str, int] = {}

    @property
    def ranks(self) -> Mapping[str, int]:
        """By device, where it was pruned."""
        return self._ranks

    def judge(self, device_id: str, before: Factors, after: Factors) -> None:
        """Compare what a device began with and what it trained; the same shapes.

        Judging an update twice changes nothing: the cut follows from the trained rank.
        """
        if tail_score(after, self._share) < tail_score(before, self._share):
            rank = max(values.shape[0] for name, values in after.items() if name.endswith("lora_A"))
            cut = max(self._rank_min, kept_ranks(rank, self._share))
            self._ranks[device_id] = min(cut, self._ranks.get(device_id, cut))

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Everything, as tensors to be stored."""
        return {
            f"{_STATE}{name}": np.array([rank], dtype=np.float32)
            for name, rank in self._ranks.items()
        }

    def restore(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Go on from what ``state`` returned; an empty one begins anew."""
        self._ranks = {
            name.removeprefix(_STATE): int(values[0])
            for name, values in state.items()
            if name.startswith(_STATE)
        }


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
            up = factors[name[:-1] + "B"]
            score += float(np.linalg.norm(up[:, kept:]) * np.linalg.norm(down[kept:]))
    return score
