"""The supported model families: where their layers are and what LoRA adapts.

One table, read by the server (initial adapter, checks, export) and by the
trainer (placing the adapter). Pure data from a model's ``config.json``; valid
on Python 3.8; imports nothing outside the standard library.

Our own tensor names are the same for every family:

    layers.{l}.{module}.lora_A   (r, d_in)
    layers.{l}.{module}.lora_B   (d_out, r)
    head.weight                  (labels, hidden)     classification only
    head.bias                    (labels,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

from wire_protocol.errors import ConfigError

HEAD_WEIGHT = "head.weight"
HEAD_BIAS = "head.bias"

Shape = Tuple[int, ...]


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what an adapter looks like and what a layer costs.

    Attributes:
        weights_per_layer: parameters of one transformer layer's matrices; a
            forward pass costs about twice as many floating-point operations
            per token.
    """

    family: str
    layer_count: int
    hidden_size: int
    key_value_size: int
    weights_per_layer: int


@dataclass(frozen=True)
class ModelFamily:
    """How one transformers architecture is laid out.

    Attributes:
        layers_path: dotted path to the list of layers inside the task model.
        modules: adapted linear modules of a layer, as paths below the layer.
        head_path: the final linear module of the classification head.
        saved_head: module that PEFT stores whole (``modules_to_save``).
    """

    layers_path: str
    modules: Tuple[str, ...]
    shapes: Callable[[ModelShape], Tuple[Shape, ...]]
    head_path: Optional[str] = None
    saved_head: Optional[str] = None
    layers_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"

    @property
    def task(self) -> str:
        """``classification`` or ``instruction`` (causal language modelling)."""
        return "classification" if self.head_path else "instruction"


def _square(shape: ModelShape) -> Tuple[Shape, ...]:
    hidden = shape.hidden_size
    return ((hidden, hidden), (hidden, hidden))


def _grouped(shape: ModelShape) -> Tuple[Shape, ...]:
    hidden = shape.hidden_size
    return ((hidden, hidden), (shape.key_value_size, hidden))


def _fused(shape: ModelShape) -> Tuple[Shape, ...]:
    return ((3 * shape.hidden_size, shape.hidden_size),)


MOST_LAYERS = 1000
WIDEST = 2**24

FAMILIES: Mapping[str, ModelFamily] = {
    "bert": ModelFamily(
        "bert.encoder.layer",
        ("attention.self.query", "attention.self.value"),
        _square,
        head_path="classifier",
        saved_head="classifier",
    ),
    "roberta": ModelFamily(
        "roberta.encoder.layer",
        ("attention.self.query", "attention.self.value"),
        _square,
        head_path="classifier.out_proj",
        saved_head="classifier",
    ),
    "distilbert": ModelFamily(
        "distilbert.transformer.layer",
        ("attention.q_lin", "attention.v_lin"),
        _square,
        head_path="classifier",
        saved_head="classifier",
        layers_key="n_layers",
        hidden_key="dim",
    ),
    "deberta-v2": ModelFamily(
        "deberta.encoder.layer",
        ("attention.self.query_proj", "attention.self.value_proj"),
        _square,
        head_path="classifier",
        saved_head="classifier",
    ),
    "gpt2": ModelFamily(
        "transformer.h", ("attn.c_attn",), _fused, layers_key="n_layer", hidden_key="n_embd"
    ),
    "llama": ModelFamily("model.layers", ("self_attn.q_proj", "self_attn.v_proj"), _grouped),
    "qwen2": ModelFamily("model.layers", ("self_attn.q_proj", "self_attn.v_proj"), _grouped),
}


def family_of(config: Mapping[str, Any]) -> str:
    """The family of a model from its ``config.json``.

    Raises:
        ConfigError: the architecture is not in the table.
    """
    name = str(config.get("model_type", "unknown"))[:60]
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"base model type {name!r} has no supported layers; use one of {known}")
    return name


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Read the sizes of a base model from its ``config.json``.

    Raises:
        ConfigError: the architecture is unknown or a size is missing.
    """
    name = family_of(config)
    family = FAMILIES[name]
    try:
        hidden = int(config[family.hidden_key])
        layers = int(config[family.layers_key])
        heads = int(config.get("num_attention_heads") or config.get("n_heads") or config["n_head"])
        head_size = int(config.get("head_dim") or hidden // heads)
        key_value = int(config.get("num_key_value_heads") or heads) * head_size
        inner = int(
            config.get("intermediate_size")
            or config.get("hidden_dim")
            or config.get("n_inner")
            or 4 * hidden
        )
    except KeyError as error:
        raise ConfigError(f"config.json of the base model lacks {error}") from error
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError("config.json of the base model has a size that is no number") from error
    # Lists of this length are made before a tensor is looked at.
    if not (0 < layers <= MOST_LAYERS and all(0 < n <= WIDEST for n in (hidden, key_value, inner))):
        raise ConfigError("config.json of the base model has sizes that no model has")
    projections = 3 if name in ("llama", "qwen2") else 2
    weights = 2 * hidden * hidden + 2 * hidden * key_value + projections * hidden * inner
    return ModelShape(name, layers, hidden, key_value, weights)


def adapter_shapes(
    shape: ModelShape, ranks: Tuple[int, ...], label_count: int, *, factors: str = "both"
) -> Dict[str, Shape]:
    """Name and shape of every tensor of an adapter with these ranks.

    Args:
        shape: sizes of the base model.
        ranks: rank at every layer; 0 leaves the layer out.
        label_count: classes of the head; 0 for causal language models.
        factors: ``both``, or only ``A`` or ``B``.

    Raises:
        ConfigError: ``ranks`` does not have one entry per layer.
    """
    if len(ranks) != shape.layer_count:
        raise ConfigError(f"{len(ranks)} ranks for a model of {shape.layer_count} layers")
    family = FAMILIES[shape.family]
    shapes: Dict[str, Shape] = {}
    for layer, rank in enumerate(ranks):
        if rank == 0:
            continue
        for module, (d_out, d_in) in zip(family.modules, family.shapes(shape)):
            if factors != "B":
                shapes[f"layers.{layer}.{module}.lora_A"] = (rank, d_in)
            if factors != "A":
                shapes[f"layers.{layer}.{module}.lora_B"] = (d_out, rank)
    if family.head_path and label_count:
        shapes[HEAD_WEIGHT] = (label_count, shape.hidden_size)
        shapes[HEAD_BIAS] = (label_count,)
    return shapes


def layer_of(tensor_name: str) -> Optional[int]:
    """Layer of one of our tensor names; None for the head."""
    parts = tensor_name.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def peft_key(family_name: str, tensor_name: str) -> str:
    """Key of one of our tensors in PEFT's ``adapter_model.safetensors``."""
    family = FAMILIES[family_name]
    if tensor_name in (HEAD_WEIGHT, HEAD_BIAS):
        return f"base_model.model.{family.head_path}.{tensor_name.partition('.')[2]}"
    return f"base_model.model.{family.layers_path}.{tensor_name.partition('.')[2]}.weight"
