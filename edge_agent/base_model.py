"""The frozen base model of a run, as the trainer holds it between rounds.

Knows transformers; knows nothing of LoRA. Valid on Python 3.8.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from wire_protocol.errors import ConfigError, DeviceError, FailureCode
from wire_protocol.model_family import FAMILIES, ModelFamily, ModelShape, model_shape

_FRESH_HEAD_LAYERS = ("pooler.dense", "pre_classifier", "classifier.dense")
"""Dense layers between the encoder and the final linear, which a checkpoint may lack."""


@dataclass(frozen=True)
class BaseModel:
    """A task model with frozen float32 weights, its tokenizer and its sizes.

    Attributes:
        label_count: classes of the head; 0 for causal language models.
        max_positions: longest sequence that the model can read, in tokens.
    """

    model: Any
    tokenizer: Any
    shape: ModelShape
    label_count: int
    max_positions: int

    @property
    def family(self) -> ModelFamily:
        """Where the layers and the head are."""
        return FAMILIES[self.shape.family]

    @property
    def layers(self) -> Any:
        """The transformer layers, from input to output."""
        return self.model.get_submodule(self.family.layers_path)

    @property
    def device(self) -> Any:
        """Where the weights are."""
        return next(self.model.parameters()).device


def load_base_model(model_dir: Path, task: str, label_count: int) -> BaseModel:
    """Load a base model for a task, on CUDA when there is a device.

    The final linear of a classification head is whatever the adapter brings. The
    dense layers before it (pooler, pre_classifier, classifier.dense) are neither
    trained nor sent; where the checkpoint lacks them, transformers would draw them
    at random, differently on every device. They become the identity instead: the
    same everywhere, without sending them, and the head reads the encoder's output.

    Args:
        model_dir: folder with config.json, safetensors weights and the tokenizer.
        task: ``classification`` or ``instruction``.
        label_count: classes; 0 for causal language models.

    Raises:
        DeviceError: MISSING_FILE, or UNSUPPORTED_MODEL when the architecture is
            unknown, made for another task, or its checkpoint is incomplete.
    """
    if not (model_dir / "config.json").is_file():
        raise DeviceError(FailureCode.MISSING_FILE, f"base model folder {model_dir} is incomplete")
    try:
        shape, config = _read_config(model_dir, task)
        tokenizer = _load_tokenizer(model_dir)
        model = _load_weights(model_dir, task, label_count, rotation=_rotation(config))
    except (ConfigError, OSError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        raise DeviceError(
            FailureCode.UNSUPPORTED_MODEL, f"base model {model_dir}: {line}"
        ) from error
    # transformers 5 keeps the checkpoint's dtype unless told; our deltas are float32.
    model = model.float().requires_grad_(requires_grad=False).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    return BaseModel(model, tokenizer, shape, label_count, _max_positions(config, tokenizer))


def _read_config(model_dir: Path, task: str) -> tuple[ModelShape, dict[str, Any]]:
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    shape = model_shape(config)
    if FAMILIES[shape.family].task != task:
        raise ConfigError(f"a {shape.family} base model cannot do {task}")
    return shape, config


def _load_tokenizer(model_dir: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except ValueError as error:
        # What transformers 5 calls every tokenizer that tokenizer.json describes in full; 4 has
        # the same class under its old name.
        if "TokenizersBackend" not in str(error):
            raise
        return PreTrainedTokenizerFast.from_pretrained(str(model_dir), local_files_only=True)


def _rotation(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 has to be told about rotary positions in a config that 5 has written.

    It would take its default for the keys that it misses, and train another model than the others.
    """
    written = config.get("rope_parameters")
    if not written or int(transformers.__version__.partition(".")[0]) >= 5:
        return {}
    scaling = {key: value for key, value in written.items() if key != "rope_theta"}
    scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": written["rope_theta"], "rope_scaling": scaling if scaled else None}


def _load_weights(model_dir: Path, task: str, label_count: int, *, rotation: dict[str, Any]) -> Any:
    options: dict[str, Any] = {
        **rotation,
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    if task == "classification":
        # A checkpoint fine-tuned for other labels brings a final linear of another shape.
        options.update(num_labels=label_count, ignore_mismatched_sizes=True)
        model, info = AutoModelForSequenceClassification.from_pretrained(str(model_dir), **options)
    else:
        model, info = AutoModelForCausalLM.from_pretrained(str(model_dir), **options)
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    family = FAMILIES[model_shape(model.config.to_dict()).family]
    _fill_missing(model, set(info["missing_keys"]) | mismatched, family)
    return model


def _fill_missing(model: Any, names: set[str], family: ModelFamily) -> None:
    """Make dense head layers without weights the identity.

    Raises:
        ConfigError: anything else has no weights.
    """
    for name in sorted(names):
        module_name, _, kind = name.rpartition(".")
        if module_name == family.head_path:
            continue
        parameter = model.get_parameter(name)
        if not module_name.endswith(_FRESH_HEAD_LAYERS) or len(set(parameter.shape)) != 1:
            raise ConfigError(f"the checkpoint has no weights for {name}")
        with torch.no_grad():
            if kind == "weight":
                torch.nn.init.eye_(parameter)
            else:
                parameter.zero_()


def _max_positions(config: dict[str, Any], tokenizer: Any) -> int:
    positions = int(config.get("max_position_embeddings") or config.get("n_positions") or 512)
    if config["model_type"] == "roberta":
        # RoBERTa numbers its positions from padding_idx + 1.
        positions -= int(config.get("pad_token_id", 1)) + 1
    return int(min(positions, tokenizer.model_max_length))
