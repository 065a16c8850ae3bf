"""Keeps what some layers save for their backward pass in eight bits instead of thirty-two.

The forward pass is exact; gradients are those of rounded activations. Every row (the last
dimension) is divided by its largest absolute value. Valid on Python 3.8.

Source: FedQuad (arXiv:2506.01001), activation quantisation of some layers; how a tensor is
rounded is ours.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, Iterator, List, Sequence, Set, Tuple, Union

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

LEVELS = 127
LEAST_ROW = 16
"""Rows shorter than this are kept: their scales would take a good part of what is saved."""

Packed = Tuple[Any, Any, Any]
"""Rounded values, scales of their rows, and the dtype they had."""


@contextlib.contextmanager
def quantised(layers: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, these layers save their activations in eight bits.

    Args:
        layers: transformer layers with their adapters.
    """
    changed: List[nn.Module] = []
    try:
        for layer in layers:
            # On the instance, where it hides the method of the class.
            layer.forward = _saving_rounded(layer)
            changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward


def _saving_rounded(layer: nn.Module) -> Callable[..., Any]:
    exact = layer.forward
    weights = {_memory(value) for value in layer.parameters()}

    def forward(*values: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return exact(*values, **named)
        rounding = _Rounding(weights)
        try:
            with saved_tensors_hooks(rounding, _restored):
                return exact(*values, **named)
        finally:
            # What was saved keeps its hook, and with it whatever the hook still holds.
            rounding.known.clear()

    return forward


class _Rounding:
    """Rounds the tensors of one forward pass, each of them once.

    Args:
        weights: addresses of what is there anyway.

    Attributes:
        known: tensors that were rounded, held until the end of the pass, so that none that
            comes later can have the address of one that is gone.
    """

    def __init__(self, weights: Set[int]) -> None:
        self._weights = weights
        self.known: Dict[Tuple[Any, ...], Tuple[Any, Packed]] = {}

    def __call__(self, saved: Any) -> Union[Any, Packed]:
        if not saved.is_floating_point() or saved.dim() == 0 or saved.shape[-1] < LEAST_ROW:
            return saved
        if _memory(saved) in self._weights:
            return saved
        version = saved._version  # noqa: SLF001 - rises whenever its values change
        key = (saved.data_ptr(), saved.shape, saved.stride(), version)
        if key not in self.known:
            self.known[key] = (saved, _rounded(saved.detach()))
        return self.known[key][1]


def _memory(values: Any) -> int:
    """Where a tensor's memory begins, whatever part of it the tensor is."""
    address: int = values.untyped_storage().data_ptr()
    return address


def _rounded(values: Any) -> Packed:
    # In float32, because the scale of a half-precision row may be too small for its dtype.
    scales = values.abs().amax(dim=-1, keepdim=True).float() / LEVELS
    rounded = (values / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_()
    return rounded.to(torch.int8), scales, values.dtype


def _restored(packed: Union[Any, Packed]) -> Any:
    if not isinstance(packed, tuple):
        return packed
    rounded, scales, dtype = packed
    return (rounded * scales).to(dtype)
