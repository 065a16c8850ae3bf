"""Runs a part of a base model: from one transformer layer up to another, or from one to the end.

Knows how layers are called, in every family and version of transformers: hidden states are the
first argument, and come back alone or first in a tuple. Valid on Python 3.8.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

import torch
from torch import nn

from edge_agent.base_model import BaseModel


class PassThrough(nn.Module):
    """Stands for a layer that need not run: what enters leaves.

    Args:
        layer: whose plain attributes some models read, such as the kind of its attention.
        companions: values that the layer returns beside the hidden states; None when it
            returns them bare.
    """

    def __init__(self, layer: nn.Module, companions: Optional[int]) -> None:
        super().__init__()
        self._companions = companions
        for name, value in vars(layer).items():
            if not name.startswith("_") and isinstance(value, (str, int, float)):
                setattr(self, name, value)

    def forward(self, hidden_states: Any, *_rest: Any, **_named: Any) -> Any:
        """The hidden states, wrapped like the layer's."""
        if self._companions is None:
            return hidden_states
        return (hidden_states,) + (None,) * self._companions


class HollowEmbedding(nn.Module):
    """Stands for token embeddings that were given up: zeros of their shape.

    Args:
        embedding: the module that it replaces.
    """

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self._size = int(embedding.weight.shape[1])
        weight = embedding.weight
        # A buffer, so that it is on the model's device and in its dtype.
        self.register_buffer("zero", torch.zeros((), dtype=weight.dtype, device=weight.device))

    def forward(self, ids: Any) -> Any:
        """Zeros, (..., hidden), without memory of their own."""
        return self.zero.expand(*ids.shape, self._size)


class _Reached(Exception):  # no error: how a model is left in its middle
    def __init__(self, states: Any) -> None:
        super().__init__()
        self.states = states


def states_entering(
    base: BaseModel,
    inputs: Mapping[str, Any],
    layer: int,
    *,
    start: int = 0,
    states: Any = None,
) -> Any:
    """Hidden states that enter a layer, (batch, tokens, hidden), without gradients.

    Args:
        base: with or without an adapter, in the mode that the caller has set.
        inputs: what the model reads; padded rows by name.
        layer: where to stop; nothing above it runs.
        start: the first layer that runs; what enters it is ``states``.
        states: see ``start``; not needed for 0.
    """

    def stop(_module: Any, args: Any, named: Dict[str, Any]) -> None:
        raise _Reached(named["hidden_states"] if "hidden_states" in named else args[0])

    hook = base.layers[layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), entering(base, start, states):
            base.model(**inputs, **call_options(base))
    except _Reached as reached:
        return reached.states
    finally:
        hook.remove()
    raise RuntimeError(f"the model never reached layer {layer}")


@contextlib.contextmanager
def entering(base: BaseModel, layer: int, states: Any) -> Iterator[None]:
    """While it lasts, ``states`` enter a layer and the layers below it do not run.

    Lasts for the backward pass too where activations are computed again in it.
    """
    if layer == 0:
        yield
        return

    def replace(_module: Any, args: Any, named: Dict[str, Any]) -> Any:
        if "hidden_states" in named:
            return args, {**named, "hidden_states": states}
        return (states, *args[1:]), named

    hook = base.layers[layer].register_forward_pre_hook(replace, with_kwargs=True)
    restore = skip_below(base, layer)
    try:
        yield
    finally:
        restore()
        hook.remove()


def skip_below(base: BaseModel, layer: int) -> Callable[[], None]:
    """Put a ``PassThrough`` in the place of every layer below ``layer``.

    Returns:
        What puts the layers back.
    """
    layers = base.layers
    skipped: List[nn.Module] = [layers[index] for index in range(layer)]
    companions = _companions(base)
    for index, module in enumerate(skipped):
        if not isinstance(module, PassThrough):
            layers[index] = PassThrough(module, companions)

    def restore() -> None:
        for index, module in enumerate(skipped):
            layers[index] = module

    return restore


def give_up_below(base: BaseModel, layer: int) -> None:
    """Free the layers below ``layer`` and the token embeddings, for good.

    Embeddings that are also the output layer's weights stay in memory.
    """
    skip_below(base, layer)
    embedding = base.model.get_input_embeddings()
    if isinstance(embedding, HollowEmbedding):
        return
    for module in base.model.modules():
        for name, child in module.named_children():
            if child is embedding:
                setattr(module, name, HollowEmbedding(embedding))
    for parameter in base.model.parameters():
        # Loaded weights are slices of one mapped file, which stays as long as one of them does.
        parameter.data = parameter.data.clone()


def given_up(base: BaseModel) -> int:
    """Layers, from the input, that ``give_up_below`` freed."""
    return sum(isinstance(layer, PassThrough) for layer in base.layers)


def call_options(base: BaseModel) -> Dict[str, Any]:
    """Options of a forward call that trains: causal models keep no keys and values."""
    return {} if base.family.head_path else {"use_cache": False}


def _companions(base: BaseModel) -> Optional[int]:
    """How many values a layer returns beside the hidden states; None when bare.

    Found out by running one: it differs between families and versions of transformers.
    """
    first = base.layers[0]
    if isinstance(first, PassThrough):
        return first._companions  # noqa: SLF001  # of this module
    known = getattr(base.model, "legend_companions", ())
    if known:
        return known[0]
    returned: List[Any] = []
    hook = first.register_forward_hook(lambda _module, _inputs, output: returned.append(output))
    ids = torch.ones((1, 2), dtype=torch.long, device=base.device)
    stop = base.layers[1] if len(base.layers) > 1 else None
    if stop is None:
        raise ValueError("a model of one layer has nothing below a trained layer")
    try:
        states_entering(base, {"input_ids": ids, "attention_mask": ids}, 1)
    finally:
        hook.remove()
    output = returned[0]
    companions = len(output) - 1 if isinstance(output, tuple) else None
    base.model.legend_companions = (companions,)
    return companions
