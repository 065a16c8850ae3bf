"""HetLoRA's penalty on the last ranks of every module, so that those not needed shrink.

    weight * sum over modules of ||B[:, g:]|| ||A[g:, :]||,   g = kept_ranks(r, share)

Knows torch. Valid on Python 3.8.

Source: HetLoRA, arXiv:2401.06432, rank self-pruning.
"""

from __future__ import annotations

from typing import Any, List, Mapping, Optional, Tuple

import torch

from wire_protocol.lora import TailRule, kept_ranks


class TailPenalty:
    """The penalty of an adapter while it is trained.

    Args:
        parameters: what is trained of the layers, by our names; a module counts
            where both of its factors are.
        rule: None penalises nothing.
    """

    def __init__(self, parameters: Mapping[str, Any], rule: Optional[TailRule]) -> None:
        self._rule = rule
        self._tails: List[Tuple[Any, Any, int]] = []
        if rule is None or rule.weight == 0:
            return
        for name, down in parameters.items():
            up = parameters.get(name[:-1] + "B") if name.endswith("lora_A") else None
            if up is not None:
                self._tails.append((down, up, kept_ranks(down.shape[0], rule.share)))

    def added_to(self, loss: Any) -> Any:
        """The loss with the penalty; the loss itself where nothing is penalised."""
        if self._rule is None or not self._tails:
            return loss
        norm = torch.linalg.vector_norm
        sizes = [norm(up[:, kept:]) * norm(down[kept:]) for down, up, kept in self._tails]
        return loss + self._rule.weight * torch.stack(sizes).sum()
