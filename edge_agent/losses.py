"""What training minimises: cross entropy over classes, or over the tokens that follow each token.

Knows torch. Valid on Python 3.8.
"""

from __future__ import annotations

from typing import Any, Optional, Sequence

import torch
from torch.nn.functional import cross_entropy

from edge_agent.dataset import IGNORED_LABEL, Tokenised


def log_prior(data: Sequence[Tokenised], label_count: int, *, loss: str) -> Optional[Any]:
    """How often each class occurs in local data, as logarithms, (label_count,) float32.

    Minus infinity for a class that does not occur; None unless the loss is ``balanced``.
    """
    if loss != "balanced":
        return None
    counts = torch.zeros(label_count)
    for example in data:
        counts[example.labels[0]] += 1
    return torch.log(counts / counts.sum())


def class_loss(logits: Any, labels: Any, prior: Optional[Any]) -> Any:
    """Mean cross entropy over classes.

    With a prior the model learns what a text says about its class beside how often the class
    occurs here: frequencies explain themselves, and a class that is not here is not pushed away.

    Args:
        logits: (batch, classes).
        labels: (batch,).
        prior: see ``log_prior``; None trains as everybody else does.

    Source: Menon et al., arXiv:2007.07314, logit adjustment; per device as in
    FedLC, arXiv:2209.00189, and FedRS (KDD 2021).
    """
    return cross_entropy(logits if prior is None else logits + prior.to(logits.device), labels)


def token_loss(logits: Any, labels: Any) -> Any:
    """Mean cross entropy over the tokens that follow each token.

    Args:
        logits: (batch, tokens, vocabulary).
        labels: (batch, tokens); ``IGNORED_LABEL`` where nothing is to be predicted.
    """
    return cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
    )
