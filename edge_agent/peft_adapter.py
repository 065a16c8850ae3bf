"""Our adapter on a base model and off again, through PEFT; the only module that imports it.

Knows where each tensor goes. Knows no data, no optimiser. Valid on Python 3.8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import peft
import torch
from numpy.typing import NDArray

from edge_agent.base_model import BaseModel
from wire_protocol.lora import LORA_SCALE
from wire_protocol.model_family import HEAD_BIAS, HEAD_WEIGHT, adapter_shapes, layer_of
from wire_protocol.tensors import Adapter, check_shapes

_NAME = "default"
"""PEFT's name of the one adapter that we attach."""


@dataclass(frozen=True)
class AttachedAdapter:
    """An adapter inside a base model; ``detach`` ends its life.

    Attributes:
        base: the base model, whose linear modules PEFT has wrapped in place.
        ranks: trained rank at every layer; 0 where a layer is frozen.
        lora: trained LoRA parameters by our names.
        head: trained head parameters by our names.
        start: value of every trained tensor when it was attached, float32.
    """

    base: BaseModel
    peft_model: Any
    ranks: Tuple[int, ...]
    lora: Dict[str, Any]
    head: Dict[str, Any]
    start: Dict[str, NDArray[np.float32]]
    base_head: Dict[str, Any]

    @property
    def trained(self) -> Dict[str, Any]:
        """Every trained parameter by our names."""
        return {**self.lora, **self.head}


def ranks_in(adapter: Adapter, layer_count: int) -> Tuple[int, ...]:
    """Rank at every layer of the adapter; 0 at layers that it does not hold."""
    ranks = [0] * layer_count
    for name, tensor in adapter.items():
        layer = layer_of(name)
        if layer is not None and 0 <= layer < layer_count and name.endswith("lora_A"):
            ranks[layer] = tensor.shape[0]
    return tuple(ranks)


def lora_config(base: BaseModel, ranks: Sequence[int]) -> Any:
    """PEFT's configuration of an adapter with these ranks; rank 0 leaves a layer out.

    Patterns are the full module names: a bare ``layer.1`` would match layer 11 too.
    """
    family = base.family
    by_module = {
        f"{family.layers_path}.{layer}.{module}": rank
        for layer, rank in enumerate(ranks)
        if rank
        for module in family.modules
    }
    return peft.LoraConfig(
        r=max(ranks),
        lora_alpha=LORA_SCALE * max(ranks),
        rank_pattern=by_module,
        alpha_pattern={name: LORA_SCALE * rank for name, rank in by_module.items()},
        target_modules=sorted(by_module),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=base.shape.family == "gpt2",  # its Conv1D stores (d_in, d_out)
    )


def attach(
    base: BaseModel, adapter: Adapter, ranks: Sequence[int], *, factors: str = "both"
) -> AttachedAdapter:
    """Put an adapter on a base model and make the assigned part of it trainable.

    A layer of the adapter with rank 0 in ``ranks`` is applied but frozen. A layer
    with a smaller rank than the adapter's trains its first rows; the other rows
    are not applied.

    Args:
        base: a base model without an adapter.
        adapter: the global adapter.
        ranks: rank to train at every layer, at most the adapter's.
        factors: ``both``, or only ``A`` or ``B``; the other is applied frozen.

    Raises:
        ProtocolError: the adapter does not fit the base model or the ranks.
    """
    held = ranks_in(adapter, base.shape.layer_count)
    check_shapes(adapter, adapter_shapes(base.shape, held, base.label_count))
    assigned = adapter_shapes(base.shape, tuple(ranks), base.label_count, factors=factors)
    prefix = {name: _prefix(name, adapter, ranks) for name in adapter}
    check_shapes({name: prefix[name] for name in assigned if name in prefix}, assigned)

    applied = [rank or held[layer] for layer, rank in enumerate(ranks)]
    base_head = {name: _head(base)[name].detach().clone() for name in _head(base)}
    peft_model = peft.get_peft_model(base.model, lora_config(base, applied))
    parameters = {**_lora_parameters(base, applied), **_head(base)}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(prefix[name]))  # a copy: torch wants what it may write
            parameter.requires_grad_(requires_grad=name in assigned)
    lora = {name: parameters[name] for name in assigned if layer_of(name) is not None}
    head = {name: parameters[name] for name in assigned if layer_of(name) is None}
    start = {name: np.array(prefix[name], dtype=np.float32) for name in assigned}
    return AttachedAdapter(base, peft_model, tuple(ranks), lora, head, start, base_head)


def tensors(attached: AttachedAdapter) -> Dict[str, NDArray[np.float32]]:
    """The trained tensors as they are now, by our names, float32."""
    return {
        name: parameter.detach().cpu().numpy().astype(np.float32, copy=True)
        for name, parameter in attached.trained.items()
    }


def delta(attached: AttachedAdapter) -> Dict[str, NDArray[np.float32]]:
    """What training changed: trained tensors minus their values when attached."""
    return {name: value - attached.start[name] for name, value in tensors(attached).items()}


def set_training_mode(attached: AttachedAdapter) -> None:
    """Dropout in the trained layers and the head only; what is frozen stays deterministic."""
    base = attached.base
    base.model.eval()
    # transformers 4 asks the stack, not each layer, whether to checkpoint activations.
    base.model.get_submodule(base.family.layers_path.rpartition(".")[0]).training = True
    for layer, rank in zip(base.layers, attached.ranks):
        if rank:
            layer.train()
    for name, module in base.model.named_children():
        if name != base.model.base_model_prefix:
            module.train()


def detach(attached: AttachedAdapter) -> None:
    """Give the base model back exactly as it was before ``attach``."""
    model = attached.peft_model.unload()
    with torch.no_grad():
        for name, parameter in _head(attached.base).items():
            parameter.copy_(attached.base_head[name])
    model.requires_grad_(requires_grad=False).eval()
    # PEFT leaves its configuration behind, and warns about it at the next attach.
    if hasattr(model, "peft_config"):
        del model.peft_config


def _prefix(name: str, adapter: Adapter, ranks: Sequence[int]) -> NDArray[np.float32]:
    layer = layer_of(name)
    if layer is None or not ranks[layer]:
        return adapter[name]
    rank = ranks[layer]
    return adapter[name][:rank] if name.endswith("lora_A") else adapter[name][:, :rank]


def _lora_parameters(base: BaseModel, ranks: Sequence[int]) -> Dict[str, Any]:
    parameters: Dict[str, Any] = {}
    wanted: List[Tuple[int, str]] = [
        (layer, module)
        for layer, rank in enumerate(ranks)
        if rank
        for module in base.family.modules
    ]
    for layer, module in wanted:
        wrapped = base.layers[layer].get_submodule(module)
        parameters[f"layers.{layer}.{module}.lora_A"] = wrapped.lora_A[_NAME].weight
        parameters[f"layers.{layer}.{module}.lora_B"] = wrapped.lora_B[_NAME].weight
    return parameters


def _head(base: BaseModel) -> Dict[str, Any]:
    """Parameters of the final linear; empty for causal language models."""
    if not base.family.head_path or not base.label_count:
        return {}
    linear = base.model.get_submodule(base.family.head_path)
    return {HEAD_WEIGHT: linear.weight, HEAD_BIAS: linear.bias}
