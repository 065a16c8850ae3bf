"""Which half precision a training step computes in, and how its gradients are scaled.

Valid on Python 3.8 and with torch before 2.3.
"""

from __future__ import annotations

from typing import Any

import torch


def autocast_dtype(device_type: str, precision: str) -> Any:
    """Half precision on CUDA; fp16 where bf16 is asked of a GPU that lacks it."""
    if device_type != "cuda" or precision == "fp32":
        return None
    if precision == "bf16" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float16


def grad_scaler(*, enabled: bool) -> Any:
    """Keeps small fp16 gradients from becoming zero; does nothing unless enabled."""
    if hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler("cuda", enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)  # torch before 2.3
