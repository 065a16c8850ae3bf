"""From the bytes of updates to the next global adapter; live and in simulation alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from broker_server.run_events import AcceptedUpdate
from broker_server.run_state import MemberCheckpoint
from broker_server.strategies import Strategy
from broker_server.strategies.defence import Finding
from broker_server.strategies.private_sum import Assigned
from broker_server.strategies.protected import Received, aggregate_round
from broker_server.strategies.strategy import Adapter
from wire_protocol.errors import ProtocolError
from wire_protocol.lora import Codec
from wire_protocol.messages import UpdateManifest
from wire_protocol.model_family import ModelShape, adapter_shapes
from wire_protocol.tensors import check_shapes, decode, encode


def problem_with(
    data: bytes,
    manifest: UpdateManifest,
    shape: ModelShape,
    label_count: int,
    *,
    assigned: MemberCheckpoint,
) -> str | None:
    """Compare an update's names, shapes, values and steps with what was assigned.

    Returns:
        What is wrong, in one line; None when all is well.
    """
    if manifest.report.steps_done > assigned.steps:
        return f"it claims {manifest.report.steps_done} steps of {assigned.steps}"
    try:
        expected = adapter_shapes(shape, manifest.ranks, label_count, factors=assigned.factors)
        check_shapes(decode(data), expected)
    except ProtocolError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class NewAdapter:
    """The encoded global adapter, and what was done about whose update."""

    data: bytes
    findings: tuple[Finding, ...]


def new_adapter(
    strategy: Strategy,
    base: bytes,
    updates: Iterable[AcceptedUpdate],
    *,
    read: Callable[[str], bytes],
    assigned: Iterable[MemberCheckpoint],
) -> NewAdapter:
    """Aggregate updates one by one; holds one adapter however many there are.

    A defence looks at them twice, and one by the median of every value keeps them.

    Args:
        strategy: knows how.
        base: the global adapter that the updates are deltas against.
        updates: in the order of their devices, so that equal updates give equal bytes.
        read: bytes by digest.
        assigned: every assignment of the round, answered or not.

    Raises:
        ProtocolError: an update does not fit the adapter.
    """
    received = [_received(update, read) for update in updates]
    asked = [Assigned(part.ranks, part.factors) for part in assigned]
    result = aggregate_round(strategy, decode(base), received, asked)
    return NewAdapter(encode(result.adapter, Codec.FP32), result.findings)


def _received(update: AcceptedUpdate, read: Callable[[str], bytes]) -> Received:
    manifest = update.manifest

    def tensors() -> Adapter:
        return decode(read(manifest.update.sha256))

    return Received(
        update.device_id,
        float(manifest.examples),
        manifest.report.steps_done,
        tensors,
        manifest.report.layer_gradients or (),
    )
