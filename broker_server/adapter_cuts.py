"""What devices load of a global adapter: all of it, or parts of it at every depth.

Knows bytes and the blob store; knows no devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from broker_server.blobs import BlobStore
from broker_server.prefix_book import AdapterCut
from broker_server.run_state import RunPlan
from broker_server.strategies.updates import rank_axis
from wire_protocol.lora import Codec
from wire_protocol.model_family import layer_of
from wire_protocol.parts import BlobRef
from wire_protocol.tensors import Adapter, decode, encode


def stored_cuts(
    blobs: BlobStore, adapter: bytes, plan: RunPlan, *, next_round: int
) -> tuple[AdapterCut, ...]:
    """Write an adapter as devices load it, at depths 1..L, and store that.

    A coarse codec rounds what devices begin with; what the server adds their updates to is not
    rounded, so that errors do not pile up from round to round.

    Args:
        blobs: where they go.
        adapter: encoded without loss.
        plan: whose prefix rule says what is needed of it; nothing while the prefix is synced and
            all devices load the adapter as it is.
        next_round: the first round that begins with this adapter.
    """
    rule, codec, layer_count = plan.prefix, plan.recipe.adapter_codec, plan.shape.layer_count
    if not (rule.is_kept or plan.narrow_ranks or codec is not Codec.FP32):
        return ()
    tensors = decode(adapter)

    def stored(part: Adapter) -> BlobRef:
        data = encode(part, codec)
        return BlobRef(sha256=blobs.put(data), size_bytes=len(data))

    # The lower parts are needed of an adapter that becomes a snapshot only.
    with_bottom = rule.refreshes(next_round)
    whole = None if rule.is_kept else stored(tensors)
    cuts = []
    for boundary in range(layer_count - 1, -1, -1):
        top = _part(tensors, boundary if rule.is_kept else 0, layer_count)
        bottom = _part(tensors, 0, boundary, head=False) if with_bottom and boundary else None
        cuts.append(
            AdapterCut(
                top=whole or stored(top),
                bottom=stored(bottom) if bottom else None,
                narrow={rank: stored(_narrowed(top, boundary, rank)) for rank in plan.narrow_ranks},
            )
        )
    return tuple(cuts)


def _narrowed(adapter: Adapter, boundary: int, rank: int) -> Adapter:
    """At most the first ``rank`` rows of A and columns of B in the layers from ``boundary`` on."""

    def narrowed(name: str) -> NDArray[np.float32]:
        layer, axis = layer_of(name), rank_axis(name)
        if layer is None or layer < boundary or axis is None:
            return adapter[name]
        return adapter[name][:rank] if axis == 0 else adapter[name][:, :rank]

    return {name: narrowed(name) for name in adapter}


def _part(adapter: Adapter, first: int, end: int, *, head: bool = True) -> Adapter:
    wanted = range(first, end)
    layers = {name: layer_of(name) for name in adapter}
    return {
        name: adapter[name]
        for name, layer in layers.items()
        if (layer in wanted if layer is not None else head)
    }
