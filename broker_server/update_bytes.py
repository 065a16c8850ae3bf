"""From the bytes of updates to the next global adapter; live and in simulation alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from broker_server.run_events import AcceptedUpdate
from broker_server.strategies import Strategy
from broker_server.strategies.strategy import Factors
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
    factors: Factors,
) -> str | None:
    """Compare an update's names, shapes and values with what was trained.

    Returns:
        What is wrong, in one line; None when all is well.
    """
    try:
        expected = adapter_shapes(shape, manifest.ranks, label_count, factors=factors)
        check_shapes(decode(data), expected)
    except ProtocolError as error:
        return str(error)
    return None


def new_adapter(
    strategy: Strategy,
    base: bytes,
    updates: Iterable[AcceptedUpdate],
    *,
    read: Callable[[str], bytes],
) -> bytes:
    """Aggregate updates one by one; holds one adapter however many there are.

    Args:
        strategy: knows how.
        base: the global adapter that the updates are deltas against.
        updates: in the order of their devices, so that equal updates give equal bytes.
        read: bytes by digest.

    Raises:
        ProtocolError: an update does not fit the adapter.
    """
    aggregation = strategy.begin(decode(base))
    for update in updates:
        manifest = update.manifest
        aggregation.add(
            update.device_id,
            decode(read(manifest.update.sha256)),
            weight=float(manifest.examples),
            steps=manifest.report.steps_done,
        )
    return encode(aggregation.result(), Codec.FP32)
