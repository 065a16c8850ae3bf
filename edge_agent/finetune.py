"""The training recipe: one device's share of one round, readable from top to bottom.

    attach the global adapter, train the assigned layers for some steps on local
    data, return what changed and what it cost, give the base model back.

Knows torch; knows no files, no processes and no network. Valid on Python 3.8.

Source: arXiv:2412.20004, local fine-tuning with LoRA depth and rank distribution.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.base_model import BaseModel, load_base_model
from edge_agent.clip_update import clip_update
from edge_agent.dataset import (
    Tokenised,
    collate,
    endless_batches,
    load_examples,
    padding_of,
    tokenise_classification,
    tokenise_instruction,
)
from edge_agent.frozen_prefix import FrozenPrefix, PrefixCache
from edge_agent.gradient_sizes import GradientSizes
from edge_agent.layer_range import call_options, given_up
from edge_agent.losses import class_loss, log_prior, token_loss
from edge_agent.peak_memory import is_out_of_memory, peak_bytes, release_memory, reset_peak
from edge_agent.peft_adapter import AttachedAdapter, attach, delta, detach, set_training_mode
from edge_agent.precision import autocast_dtype, grad_scaler
from edge_agent.quantised_activations import quantised
from edge_agent.round_directory import Recipe, TrainingReport, TrainRequest
from edge_agent.stretch import Stretch
from edge_agent.tail_penalty import TailPenalty
from wire_protocol.errors import DeviceError, FailureCode
from wire_protocol.lora import quantising_token_layers
from wire_protocol.model_family import layer_of
from wire_protocol.records import Columns
from wire_protocol.tensors import Adapter

__all__ = [
    "BaseModel",
    "Outcome",
    "StepCost",
    "Supervision",
    "TrainingStep",
    "load_base_model",
    "prepare_data",
    "train",
]

_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Outcome:
    """What one device learned in one round.

    Attributes:
        delta: trained minus global tensors of the assigned layers and the head.
        ranks: rank that was trained at every layer.
        examples: size of the local dataset.
    """

    delta: Mapping[str, NDArray[np.float32]]
    ranks: Tuple[int, ...]
    examples: int
    report: TrainingReport


@dataclass(frozen=True)
class Supervision:
    """How the surroundings watch and stop a training.

    Attributes:
        on_step: called after every step with the steps done and the loss.
        cancelled: asked between steps.
        elapsed_s: seconds since the assignment's deadline began to run.
        sleep: passes the seconds by which an imitated board is slower.
    """

    on_step: Callable[[int, float], object] = lambda _step, _loss: None
    cancelled: Callable[[], bool] = lambda: False
    elapsed_s: Callable[[], float] = lambda: 0.0
    sleep: Callable[[float], object] = time.sleep


@dataclass(frozen=True)
class StepCost:
    """One optimiser step: computed tokens (with padding), its loss and its seconds.

    Attributes:
        forward_token_layers: token-layer pairs of the forward pass; fewer than
            tokens times layers when frozen layers were read back.
    """

    tokens: int
    loss: float
    forward_s: float
    backward_s: float
    forward_token_layers: int


def prepare_data(
    base: BaseModel, path: Path, *, columns: Columns, recipe: Recipe
) -> List[Tokenised]:
    """Load and tokenise a local dataset for a base model.

    Raises:
        DeviceError: see ``dataset.load_examples`` and ``tokenise_classification``.
    """
    examples = load_examples(path, columns)
    max_tokens = min(recipe.max_tokens, base.max_positions)
    if recipe.task == "classification":
        return tokenise_classification(
            examples, base.tokenizer, labels=recipe.labels, max_tokens=max_tokens
        )
    return tokenise_instruction(examples, base.tokenizer, max_tokens=max_tokens)


def train(
    base: BaseModel,
    data: Sequence[Tokenised],
    *,
    adapter: Adapter,
    request: TrainRequest,
    supervision: Optional[Supervision] = None,
    cache: Optional[PrefixCache] = None,
) -> Outcome:
    """Train the assigned layers on local data; the base model is unchanged afterwards.

    Fewer steps than asked are done when the next one would miss the deadline; at
    least one is done. A batch that does not fit into memory is halved, for good.

    Args:
        base: a base model without an adapter.
        data: tokenised examples; at least one.
        adapter: the global adapter.
        request: what to train, how long and how.
        supervision: who watches; nobody by default.
        cache: where the output of the frozen layers is kept; None computes it in every step.

    Raises:
        DeviceError: CANCELLED, NON_FINITE_LOSS, or OUT_OF_MEMORY with one example.
        ProtocolError: the adapter does not fit the base model or the ranks.
    """
    watch = supervision or Supervision()
    limits = request.limits
    reset_peak()
    attached = attach(base, _of_layers_here(base, adapter), request.ranks, factors=request.factors)
    # Not before: attaching draws numbers too, and more of them for more layers.
    torch.manual_seed(request.seed)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_checkpointing(base, enabled=limits.gradient_checkpointing))
            set_training_mode(attached)
            prefix = _frozen_prefix(attached, adapter, cache, limits.precision)
            if prefix is not None:
                stack.enter_context(prefix)
            stretch = Stretch(base.shape.weights_per_layer, limits.flops_per_s, sleep=watch.sleep)
            step = TrainingStep(
                attached,
                request.recipe,
                precision=limits.precision,
                stretch=stretch,
                prefix=prefix,
                quantised_layers=request.quantised_layers,
                prior=log_prior(data, base.label_count, loss=request.recipe.loss),
            )
            report = _run_steps(step, data, request=request, watch=watch)
        learned = clip_update(delta(attached), request.recipe.clip_norm)
        return Outcome(learned, request.ranks, len(data), report)
    finally:
        detach(attached)
        release_memory()


class TrainingStep:
    """Forward, backward and update on one batch, each part timed.

    The optimiser is new in every round: between rounds the server averages the
    adapter, and moments of another adapter would mislead.

    Args:
        attached: the adapter to train.
        recipe: learning rates.
        precision: ``fp16`` and ``bf16`` take effect on CUDA only.
        stretch: what slows the step down to an imitated board.
        prefix: the frozen layers with their cache; None runs them in every step.
        quantised_layers: lowest trained layers that keep their activations in eight bits.
        prior: see ``losses.class_loss``.
    """

    def __init__(
        self,
        attached: AttachedAdapter,
        recipe: Recipe,
        *,
        precision: str,
        stretch: Stretch,
        prefix: Optional[FrozenPrefix] = None,
        quantised_layers: int = 0,
        prior: Optional[Any] = None,
    ) -> None:
        self._attached = attached
        self._prior = prior
        self._stretch = stretch
        self._prefix = prefix
        self._device = attached.base.device
        self._depth = sum(rank > 0 for rank in attached.ranks)
        layers = attached.base.layers
        lowest = len(layers) - self._depth
        self._quantised = layers[lowest : lowest + quantised_layers]
        self._padding = padding_of(attached.base.tokenizer)
        self._parameters = list(attached.trained.values())
        groups = [{"params": list(attached.lora.values()), "lr": recipe.learning_rate}]
        if attached.head:
            head = {"params": list(attached.head.values()), "lr": recipe.head_learning_rate}
            groups.append(head)
        self.gradients = GradientSizes(attached.lora)
        self._tail = TailPenalty(attached.lora, recipe.tail)
        self._optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        self._dtype = autocast_dtype(self._device.type, precision)
        self._scaler = grad_scaler(enabled=self._dtype is torch.float16)

    def run(self, batch: Sequence[Tokenised]) -> StepCost:
        """Do one step.

        Raises:
            DeviceError: NON_FINITE_LOSS; nothing was updated.
            RuntimeError, MemoryError: from torch, for one when memory runs out.
        """
        inputs = {
            name: torch.tensor(rows, device=self._device)
            for name, rows in collate(batch, self._padding).items()
        }
        tokens = inputs["input_ids"].numel()
        self._optimiser.zero_grad(set_to_none=True)
        began = self._now()
        with contextlib.ExitStack() as stack:
            forward_token_layers = self._enter_frozen(batch, tokens, stack)
            stack.enter_context(quantised(self._quantised))
            loss = self._loss(inputs)
            measured_s = self._now() - began
            forward_s = self._stretch.forward(forward_token_layers, measured_s=measured_s)
            value = float(loss.detach())
            if not math.isfinite(value):
                line = f"the loss became {value}; lower the learning rate"
                raise DeviceError(FailureCode.NON_FINITE_LOSS, line)
            began = self._now()
            self._update(self._tail.added_to(loss))
            measured_s = self._now() - began
        backward_s = self._stretch.backward(tokens, depth=self._depth, measured_s=measured_s)
        return StepCost(tokens, value, forward_s, backward_s, forward_token_layers)

    def forget_gradients(self) -> None:
        """Free what an interrupted step left behind."""
        self._optimiser.zero_grad(set_to_none=True)

    def _enter_frozen(
        self, batch: Sequence[Tokenised], tokens: int, stack: contextlib.ExitStack
    ) -> int:
        """Let the forward pass begin above the frozen layers; its token-layer pairs."""
        quantising = quantising_token_layers(tokens, len(self._quantised))
        if self._prefix is None:
            return quantising + tokens * self._attached.base.shape.layer_count
        states, computed = self._prefix.states(batch)
        stack.enter_context(self._prefix.replacing(states))
        return quantising + computed + tokens * self._depth

    def _loss(self, inputs: Dict[str, Any]) -> Any:
        labels = inputs.pop("labels")
        options = call_options(self._attached.base)
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None):
            logits = self._attached.base.model(**inputs, **options).logits.float()
        if self._attached.head:
            return class_loss(logits, labels[:, 0], self._prior)
        return token_loss(logits, labels)

    def _update(self, loss: Any) -> None:
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimiser)
        self.gradients.add()
        torch.nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT_NORM)
        self._scaler.step(self._optimiser)
        self._scaler.update()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _run_steps(
    step: TrainingStep, data: Sequence[Tokenised], *, request: TrainRequest, watch: Supervision
) -> TrainingReport:
    began = time.perf_counter()
    generator = random.Random(request.seed)  # noqa: S311  # shuffling, no secret
    lengths = [example.length for example in data]
    batch_size = min(request.limits.batch_size, len(data))
    batches = endless_batches(lengths, batch_size, generator=generator)
    costs: List[StepCost] = []
    slowest_s = 0.0
    while len(costs) < request.steps:
        if watch.cancelled():
            raise DeviceError(FailureCode.CANCELLED, "the round was cancelled")
        step_began_s = watch.elapsed_s()
        if costs and step_began_s + slowest_s > request.deadline_s:
            break
        cost = _try_step(step, [data[row] for row in next(batches)])
        if isinstance(cost, str):
            batch_size = _halve(batch_size, reason=cost)
            batches = endless_batches(lengths, batch_size, generator=generator)
            continue
        costs.append(cost)
        slowest_s = max(slowest_s, watch.elapsed_s() - step_began_s)
        watch.on_step(len(costs), cost.loss)
    return TrainingReport(
        steps_done=len(costs),
        tokens=sum(cost.tokens for cost in costs),
        forward_s=sum(cost.forward_s for cost in costs),
        backward_s=sum(cost.backward_s for cost in costs),
        training_s=time.perf_counter() - began,
        peak_memory_bytes=peak_bytes(),
        batch_size=batch_size,
        gradient_checkpointing=request.limits.gradient_checkpointing,
        first_loss=costs[0].loss,
        last_loss=costs[-1].loss,
        forward_token_layers=sum(cost.forward_token_layers for cost in costs),
        layer_gradients=step.gradients.per_value(),
    )


def _of_layers_here(base: BaseModel, adapter: Adapter) -> Adapter:
    """The adapter without the layers that a model gave up: their output is cached."""
    gone = range(given_up(base))
    return {name: tensor for name, tensor in adapter.items() if layer_of(name) not in gone}


def _frozen_prefix(
    attached: AttachedAdapter, adapter: Adapter, cache: Optional[PrefixCache], precision: str
) -> Optional[FrozenPrefix]:
    """The layers below the trained ones, if there are any and a place to keep their output."""
    base = attached.base
    boundary = sum(rank == 0 for rank in attached.ranks)
    if cache is None or boundary == 0:
        return None
    autocast = autocast_dtype(base.device.type, precision)
    return FrozenPrefix(base, adapter, boundary=boundary, cache=cache, autocast=autocast)


def _try_step(step: TrainingStep, batch: Sequence[Tokenised]) -> Union[StepCost, str]:
    """One step; torch's words when memory ran out."""
    try:
        return step.run(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        words = " ".join(str(error).split())[:150] or "no words"
    # Only here, after the handler, has the traceback let go of the step's activations.
    step.forget_gradients()
    release_memory()
    return words


def _halve(batch_size: int, *, reason: str) -> int:
    if batch_size == 1:
        line = f"memory ran out with one example ({reason}); assign less depth or shorter texts"
        raise DeviceError(FailureCode.OUT_OF_MEMORY, line)
    return batch_size // 2


@contextlib.contextmanager
def _checkpointing(base: BaseModel, *, enabled: bool) -> Iterator[None]:
    """Compute activations again in the backward pass instead of keeping them."""
    if not enabled:
        yield
        return
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers makes the embeddings require a gradient, for the reentrant kind of checkpointing;
    # the backward pass would then run through every frozen layer.
    if hasattr(base.model, "_require_grads_hook"):
        base.model.disable_input_require_grads()
    try:
        yield
    finally:
        base.model.gradient_checkpointing_disable()
