"""From a stored run to its plan: everything that is worked out before round 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

from broker_server.adapter_cuts import stored_cuts
from broker_server.blobs import BlobStore
from broker_server.prefix_book import PrefixCheckpoint
from broker_server.privacy import epsilon_after, noise_source, privacy_rule
from broker_server.run_spec import RunSpec
from broker_server.run_state import RunCheckpoint, RunPlan
from broker_server.strategies import DeviceCapacity, RunShape, Strategy
from broker_server.strategies.prefix import prefix_rule
from broker_server.strategies.protected import protected_strategy
from broker_server.strategies.strategy import narrow_ranks, tail_rule
from wire_protocol.errors import ConfigError, ProtocolError
from wire_protocol.initial_adapter import initial_adapter
from wire_protocol.lora import BYTES_PER_VALUE, Codec
from wire_protocol.messages import (
    Command,
    Prefix,
    RoundStart,
    TailPenalty,
    TrainingRecipe,
    encode_message,
)
from wire_protocol.model_family import FAMILIES, ModelShape, adapter_shapes
from wire_protocol.parts import BlobRef
from wire_protocol.tensors import encode

TYPICAL_FILL = 0.5
"""Share of ``max_tokens`` that texts are taken to fill until a round measured it."""


@dataclass(frozen=True)
class PreparedRun:
    """What a coordinator is made of."""

    plan: RunPlan
    strategy: Strategy
    checkpoint: RunCheckpoint


def check_run(spec: RunSpec, shape: ModelShape) -> None:
    """Refuse what can be known to be wrong before anything starts.

    Raises:
        ConfigError: the task does not fit the model, labels are missing, or
            the strategy's options are wrong.
    """
    task = FAMILIES[shape.family].task
    if task != spec.task:
        raise ConfigError(
            f"base model {spec.model!r} is a {shape.family}, which does {task}, not {spec.task}"
        )
    if spec.task == "classification" and len(spec.labels) < 2:
        raise ConfigError("classification needs at least two labels; list them under 'labels'")
    if spec.privacy is not None:
        epsilon_after(spec.privacy, spec.rounds)  # says now if it cannot be reckoned later
    _rehearse(strategy_of(spec), spec, shape)


def _rehearse(strategy: Strategy, spec: RunSpec, shape: ModelShape) -> None:
    """Configure one imaginary device and write its assignment: what breaks, breaks now."""
    sizes = run_shape(spec, shape)
    able = DeviceCapacity("rehearsal", 1e-6, 1e-6, 1e6, 1e6, 0.0, 0.0, 0.0, 0.0, 1e12, 1)
    configuration = strategy.configure(sizes, [able], 1)
    start = RoundStart(
        run_id="r" * 40,
        round_number=spec.rounds,
        assignment_id="a" * 110,
        ranks=configuration.global_ranks,
        steps=spec.local_steps,
        deadline_s=1.0,
        seed=0,
        recipe=recipe_of(spec, strategy),
        adapter=BlobRef(sha256="0" * 64, size_bytes=2**40),
        prefix=Prefix(adapter=BlobRef(sha256="0" * 64, size_bytes=2**40)),
        model_digest="0" * 64,
    )
    try:
        encode_message(Command(command=start), message_id="m" * 40, sid=2**40)
    except ProtocolError as error:
        raise ConfigError(
            f"an assignment of this run would not fit into a message ({error}); "
            "use fewer or shorter labels"
        ) from error


def strategy_of(spec: RunSpec) -> Strategy:
    """The run's strategy, with what protects it.

    Raises:
        ConfigError: an option is wrong, or two protections exclude each other.
    """
    _, options = prefix_rule(spec.strategy, spec.strategy_options)
    return protected_strategy(
        spec.strategy,
        options,
        privacy=privacy_rule(spec.privacy),
        noise=noise_source(spec.privacy),
    )


def recipe_of(spec: RunSpec, strategy: Strategy) -> TrainingRecipe:
    """How every device of a run trains."""
    tail = tail_rule(strategy)
    return TrainingRecipe(
        task=spec.task,
        dataset=spec.dataset,
        labels=spec.labels if spec.task == "classification" else (),
        batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        head_learning_rate=spec.head_learning_rate,
        max_tokens=spec.max_tokens,
        codec=spec.codec,
        adapter_codec=spec.adapter_codec,
        clip_norm=spec.privacy.clip_norm if spec.privacy else None,
        tail=TailPenalty(share=tail.share, weight=tail.weight) if tail else None,
        loss=spec.loss,
    )


def run_shape(spec: RunSpec, shape: ModelShape) -> RunShape:
    """Sizes that the strategies reckon with."""
    labels = len(spec.labels) if spec.task == "classification" else 0
    sizes = adapter_shapes(shape, (1,) * shape.layer_count, labels)
    per_layer = [
        sum(math.prod(size) for name, size in sizes.items() if name.startswith(f"layers.{layer}."))
        for layer in range(shape.layer_count)
    ]
    head = sum(math.prod(size) for name, size in sizes.items() if name.startswith("head."))
    peak = spec.batch_size * spec.max_tokens
    of_b = sum(math.prod(size) for name, size in sizes.items() if name.endswith(".lora_B"))
    return RunShape(
        layer_count=shape.layer_count,
        values_per_rank=tuple(per_layer),
        head_values=head,
        tokens_per_step=peak * TYPICAL_FILL,
        peak_tokens_per_step=peak,
        steps=spec.local_steps,
        bytes_per_value_up=BYTES_PER_VALUE[spec.codec],
        bytes_per_value_down=BYTES_PER_VALUE[spec.adapter_codec],
        b_share=of_b / sum(per_layer),
        batch_size=spec.batch_size,
        prefix=prefix_rule(spec.strategy, spec.strategy_options)[0],
    )


def prepare_run(
    run_id: str,
    spec: RunSpec,
    *,
    shape: ModelShape,
    digest: str,
    blobs: BlobStore,
    checkpoint: str | None,
) -> PreparedRun:
    """Build plan and strategy, and the first checkpoint unless there is one.

    Raises:
        ConfigError: see ``check_run``.
    """
    check_run(spec, shape)
    strategy = strategy_of(spec)
    sizes = run_shape(spec, shape)
    recipe = recipe_of(spec, strategy)
    plan = RunPlan(
        run_id=run_id,
        rounds=spec.rounds,
        shape=sizes,
        recipe=recipe,
        model_digest=digest,
        seed=spec.seed,
        devices_per_round=spec.devices_per_round,
        quorum=spec.quorum,
        deadline_s=spec.deadline_s,
        target_accuracy=spec.target_accuracy,
        prefix=sizes.prefix,
        narrow_ranks=narrow_ranks(strategy),
    )
    if checkpoint is not None:
        return PreparedRun(plan, strategy, RunCheckpoint.model_validate_json(checkpoint))
    ranks = strategy.global_ranks(sizes)
    first = initial_adapter(shape, ranks, label_count=len(recipe.labels), seed=spec.seed)
    data = encode(first, Codec.FP32)
    adapter = BlobRef(sha256=blobs.put(data), size_bytes=len(data))
    start = RunCheckpoint(
        round_number=0,
        attempt=0,
        adapter=adapter,
        baseline_done=False,
        tokens_per_step=sizes.tokens_per_step,
        prefix=PrefixCheckpoint(
            cuts=stored_cuts(blobs, data, plan, next_round=1),
        ),
    )
    return PreparedRun(plan, strategy, start)
