"""The devices' training recipe, run here on a virtual clock.

The only module on this side that imports the agent's recipe. What is trained is
what a live device trains, step for step; what it costs is reckoned from the
tokens of the very batches. Results depend on the assignment alone, not on what
this process trained before.
"""

from __future__ import annotations

import gc
import itertools
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers

from broker_server.virtual_cache import CacheBook, VirtualCache
from broker_server.virtual_fleet import Conditions, ModelCost
from edge_agent.dataset import Tokenised, endless_batches
from edge_agent.error_feedback import COARSE, encode_with_feedback
from edge_agent.finetune import BaseModel, Supervision, load_base_model, prepare_data, train
from edge_agent.frozen_prefix import PrefixCache
from edge_agent.prefix_store import PrefixStore
from edge_agent.round_directory import LocalLimits, Recipe, TrainingReport, TrainRequest
from wire_protocol.errors import DeviceError, FailureCode, ProtocolError
from wire_protocol.lora import BYTES_PER_VALUE, Codec, TailRule, quantising_token_layers
from wire_protocol.messages import RoundStart, TrainingRecipe
from wire_protocol.parts import StepReport
from wire_protocol.records import Columns
from wire_protocol.tensors import Adapter, decode, encode

COMPUTED_TOGETHER = 32
"""Examples of similar length whose hidden states are computed in one batch."""

CACHE_BYTES = 20_000_000_000
"""Most that hidden states may take; never more than a share of the free disk."""

UPLOAD_MARGIN_ROUND_TRIPS = 4
"""A live agent keeps this much, besides the upload itself, to arrive in time."""


@dataclass(frozen=True)
class TrainingData:
    """What every trainer loads once.

    Attributes:
        train_file: the examples of all devices.
        rows: by device, its row numbers in the file.
        threads: of torch's arithmetic.
        model_digest: of the base model.
        prefix_dir: where hidden states are kept; None computes them in every step.
            Results are the same whatever lies there; devices and runs may share it.
    """

    model_dir: Path
    recipe: TrainingRecipe
    train_file: Path
    columns: Columns
    rows: Mapping[str, tuple[int, ...]]
    threads: int
    model_digest: str = ""
    prefix_dir: Path | None = None


@dataclass(frozen=True)
class VirtualAssignment:
    """One assignment, and what the device is like while it works on it.

    Attributes:
        adapter: the global adapter as it was sent.
        below: the snapshot of the layers below, if there is one.
        cache: what the device holds of the present prefix.
        residual: what a coarse codec left out of its earlier updates.
    """

    device_id: str
    start: RoundStart
    conditions: Conditions
    cost: ModelCost
    adapter: bytes
    below: bytes | None = None
    cache: VirtualCache = field(default_factory=VirtualCache)
    residual: bytes | None = None

    def applied(self) -> Adapter:
        """Every layer of the adapter that the device applies."""
        return {**(decode(self.below) if self.below else {}), **decode(self.adapter)}


@dataclass(frozen=True)
class TrainedUpdate:
    """What came of an assignment: an update, or the reason why there is none.

    Attributes:
        update: the encoded delta; empty after a failure.
        report: as the device reports it, in virtual seconds.
        duration_s: from assignment to update, or to the failure.
        cache: what the device holds now; None after a failure.
        residual: what the codec has left out so far; None where it leaves out nothing.
    """

    device_id: str
    update: bytes
    examples: int
    report: StepReport | None
    duration_s: float
    failure: tuple[str, str] | None = None
    cache: VirtualCache | None = None
    residual: bytes | None = None


class SimulatedTrainer:
    """One process with a warm base model and the tokenised examples.

    Args:
        data: what to train on.

    Raises:
        DeviceError: the base model or the training file cannot be used.
    """

    def __init__(self, data: TrainingData) -> None:
        torch.set_num_threads(data.threads)
        quiet_libraries()
        recipe = data.recipe
        self._data = data
        self._recipe = Recipe(
            task=recipe.task,
            labels=recipe.labels,
            learning_rate=recipe.learning_rate,
            head_learning_rate=recipe.head_learning_rate,
            max_tokens=recipe.max_tokens,
            codec=recipe.codec,
            clip_norm=recipe.clip_norm,
            tail=TailRule(recipe.tail.share, recipe.tail.weight) if recipe.tail else None,
            loss=recipe.loss,
        )
        self._base: BaseModel = load_base_model(
            data.model_dir, recipe.task, self._recipe.label_count
        )
        self._examples = prepare_data(
            self._base, data.train_file, columns=data.columns, recipe=self._recipe
        )
        self._cache = _prefix_cache(data, self._examples)
        # Collections come after every device; what is loaded now stays and need not be searched.
        gc.freeze()

    def train(self, assignment: VirtualAssignment) -> TrainedUpdate:
        """Train as the device would; a device's failure is a result like any other."""
        torch.set_num_threads(self._data.threads)
        examples = [self._examples[row] for row in self._data.rows[assignment.device_id]]
        clock = VirtualSteps(assignment, examples)
        try:
            outcome = train(
                self._base,
                examples,
                adapter=assignment.applied(),
                request=self._request(assignment, clock.training_deadline_s),
                supervision=Supervision(
                    on_step=clock.stepped, elapsed_s=clock.elapsed_s, sleep=lambda _seconds: None
                ),
                cache=self._cache if assignment.start.prefix else None,
            )
            update, residual = self._encoded(outcome.delta, assignment.residual)
        except DeviceError as error:
            failure = (error.code.value, str(error))
            spent_s = clock.download_s + clock.elapsed_s()
            return TrainedUpdate(assignment.device_id, b"", 0, None, spent_s, failure)
        return replace(clock.finished(update, outcome.report), residual=residual)

    def _encoded(self, delta: Adapter, residual: bytes | None) -> tuple[bytes, bytes | None]:
        """The update as a device sends it, and what that leaves out; see ``WarmTrainer``."""
        codec = self._recipe.codec
        try:
            # What was left out would come on top of an update that privacy limits in size.
            if codec not in COARSE or self._recipe.clip_norm is not None:
                return encode(delta, codec), None
            left_out = decode(residual) if residual else {}
            update, left_out = encode_with_feedback(delta, left_out, codec)
            return update, encode(left_out, Codec.FP32)
        except ProtocolError as error:
            line = f"the update cannot be sent: {error}; lower the learning rate"
            raise DeviceError(FailureCode.NON_FINITE_LOSS, line) from error

    def _request(self, assignment: VirtualAssignment, deadline_s: float) -> TrainRequest:
        start = assignment.start
        return TrainRequest(
            ranks=start.ranks,
            steps=start.steps,
            deadline_s=deadline_s,
            seed=start.seed,
            recipe=self._recipe,
            limits=LocalLimits(start.recipe.batch_size, threads=self._data.threads),
            model_dir=self._data.model_dir,
            adapter_file=Path(start.adapter.sha256),
            dataset_file=self._data.train_file,
            columns=self._data.columns,
            factors=start.factors,
            quantised_layers=start.quantised_layers,
        )


class VirtualSteps:
    """The clock of one assignment: each step costs what its tokens cost.

    The batches are drawn here a second time, from the assignment's seed, so
    that the recipe can be told the virtual time while it runs.

    Args:
        assignment: what is trained, where.
        examples: the device's own.
    """

    def __init__(self, assignment: VirtualAssignment, examples: Sequence[Tokenised]) -> None:
        self._assignment = assignment
        self._examples = len(examples)
        start, link = assignment.start, assignment.conditions
        self._depth = start.lora.depth
        self._cache = assignment.cache
        self.download_bytes = start.adapter.size_bytes
        below = start.prefix.adapter if start.prefix else None
        if below and below.sha256 not in self._cache.loaded:
            self.download_bytes += below.size_bytes
            self._cache = self._cache.with_loaded(below.sha256)
        self.download_s = self.download_bytes / link.down_bytes_per_s
        # With a prefix the adapter holds no more than what is trained.
        held = start.lora.layer_count if start.prefix is None else self._depth
        codecs = start.recipe.codec, start.recipe.adapter_codec
        share = self._depth / held * BYTES_PER_VALUE[codecs[0]] / BYTES_PER_VALUE[codecs[1]]
        upload_s = start.adapter.size_bytes * share / link.up_bytes_per_s
        margin_s = upload_s + UPLOAD_MARGIN_ROUND_TRIPS * link.round_trip_s
        self.training_deadline_s = max(1.0, start.deadline_s - self.download_s - margin_s)
        self._lengths = [example.length for example in examples]
        batches = step_batches(self._lengths, start.recipe.batch_size, seed=start.seed)
        self._batches = list(itertools.islice(batches, start.steps))
        self._tokens = [
            len(batch) * max(self._lengths[row] for row in batch) for batch in self._batches
        ]
        self._forward, self._caches = self._forward_token_layers()
        self._done = 0

    def _forward_token_layers(self) -> tuple[list[int], list[VirtualCache]]:
        """Token-layer pairs of each step's forward pass, and the cache after each step."""
        start = self._assignment.start
        layers = start.lora.layer_count
        quantising = [
            quantising_token_layers(tokens, start.quantised_layers) for tokens in self._tokens
        ]
        boundary = layers - self._depth
        if start.prefix is None or boundary == 0:
            pairs = [
                tokens * layers + more
                for tokens, more in zip(self._tokens, quantising, strict=True)
            ]
            return pairs, [self._cache] * len(pairs)
        book = CacheBook(self._cache, boundary, self._lengths)
        pairs, caches = [], []
        for batch, tokens, more in zip(self._batches, self._tokens, quantising, strict=True):
            pairs.append(book.visit(batch) + tokens * self._depth + more)
            caches.append(book.after())
        return pairs, caches

    def stepped(self, steps: int, _loss: float) -> None:
        """The recipe finished its ``steps``-th step."""
        self._done = steps

    def elapsed_s(self) -> float:
        """Virtual seconds of the steps so far."""
        return self._forward_s(self._done) + self._backward_s(self._done)

    def finished(self, update: bytes, report: TrainingReport) -> TrainedUpdate:
        """What the device reports, in virtual seconds.

        Raises:
            DeviceError: the recipe trained other batches than those reckoned with.
        """
        planned = sum(self._tokens[: report.steps_done])
        if report.tokens != planned:
            line = f"{report.tokens} tokens were trained, {planned} were reckoned with"
            raise DeviceError(FailureCode.INTERNAL, f"the virtual clock is wrong: {line}")
        cost = self._assignment.cost
        done = report.steps_done
        forward_s, backward_s = self._forward_s(done), self._backward_s(done)
        upload_s = len(update) / self._assignment.conditions.up_bytes_per_s
        largest = max(self._tokens[: report.steps_done])
        watts = self._assignment.conditions.watts
        virtual = StepReport(
            steps_done=report.steps_done,
            tokens=report.tokens,
            forward_s=forward_s,
            backward_s=backward_s,
            training_s=forward_s + backward_s,
            download_s=self.download_s,
            download_bytes=self.download_bytes,
            upload_s=upload_s,
            upload_bytes=len(update),
            peak_memory_bytes=cost.peak_memory_bytes(
                largest, self._depth, self._assignment.start.quantised_layers
            ),
            batch_size=report.batch_size,
            gradient_checkpointing=report.gradient_checkpointing,
            first_loss=report.first_loss,
            last_loss=report.last_loss,
            forward_token_layers=sum(self._forward[:done]),
            energy_j=None if watts is None else watts * (forward_s + backward_s),
            layer_gradients=report.layer_gradients,
        )
        duration_s = self._assignment.conditions.round_trip_s + self.download_s
        duration_s += virtual.training_s + upload_s
        device_id = self._assignment.device_id
        return TrainedUpdate(
            device_id,
            update,
            self._examples,
            virtual,
            duration_s,
            cache=self._caches[done - 1] if self._assignment.start.prefix else None,
        )

    def _forward_s(self, steps: int) -> float:
        pairs = sum(self._forward[:steps])
        return self._assignment.cost.layers_s(pairs, self._assignment.conditions.flops_per_s)

    def _backward_s(self, steps: int) -> float:
        tokens = sum(self._tokens[:steps])
        flops_per_s = self._assignment.conditions.flops_per_s
        return self._assignment.cost.backward_s(tokens, self._depth, flops_per_s)


def _prefix_cache(data: TrainingData, examples: Sequence[Tokenised]) -> PrefixCache | None:
    """Hidden states for all devices; those of an example depend on the training file alone."""
    if data.prefix_dir is None:
        return None
    ordered = sorted(range(len(examples)), key=lambda row: (examples[row].length, row))
    together: dict[bytes, list[Tokenised]] = {}
    for begin in range(0, len(ordered), COMPUTED_TOGETHER):
        group = [examples[row] for row in ordered[begin : begin + COMPUTED_TOGETHER]]
        for example in group:
            together.setdefault(example.digest, group)
    return PrefixCache(
        PrefixStore(data.prefix_dir, CACHE_BYTES),
        f"{data.model_digest}/{data.threads}",
        # Whatever was stored before, and by whom, must not change a digit.
        reuse_lower=False,
        companions=lambda example: together[example.digest],
    )


def quiet_libraries() -> None:
    """Keep transformers' notes about loading away from the progress bar."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def step_batches(lengths: Sequence[int], batch_size: int, *, seed: int) -> Iterable[list[int]]:
    """Rows of each step of the recipe; endless.

    Args:
        lengths: tokens of the device's own examples; at least one.
        batch_size: examples of a step.
        seed: of the assignment.
    """
    generator = random.Random(seed)  # noqa: S311 - shuffling, no secret
    return endless_batches(lengths, min(batch_size, len(lengths)), generator=generator)
