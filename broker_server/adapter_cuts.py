"""Parts a global adapter at every depth: what a device trains, and what lies below.

Knows bytes and the blob store; knows no run.
"""

from __future__ import annotations

from broker_server.blobs import BlobStore
from broker_server.prefix_book import AdapterCut
from broker_server.strategies.prefix import PrefixRule
from wire_protocol.lora import Codec
from wire_protocol.model_family import layer_of
from wire_protocol.parts import BlobRef
from wire_protocol.tensors import Adapter, decode, encode


def stored_cuts(
    blobs: BlobStore, adapter: bytes, layer_count: int, rule: PrefixRule, next_round: int
) -> tuple[AdapterCut, ...]:
    """Part an adapter at depths 1..L and store the parts.

    Args:
        blobs: where they go.
        adapter: encoded.
        layer_count: L.
        rule: what is needed of it; nothing while the prefix is synced.
        next_round: the first round that begins with this adapter.
    """
    if not rule.is_kept:
        return ()
    tensors = decode(adapter)
    # The lower parts are needed of an adapter that becomes a snapshot only.
    with_bottom = rule.refreshes(next_round)
    return tuple(
        AdapterCut(
            top=_stored(blobs, _part(tensors, layer_count - depth, layer_count)),
            bottom=_stored(blobs, _part(tensors, 0, layer_count - depth, head=False))
            if with_bottom and depth < layer_count
            else None,
        )
        for depth in range(1, layer_count + 1)
    )


def _part(adapter: Adapter, first: int, end: int, *, head: bool = True) -> Adapter:
    wanted = range(first, end)
    layers = {name: layer_of(name) for name in adapter}
    return {
        name: adapter[name]
        for name, layer in layers.items()
        if (layer in wanted if layer is not None else head)
    }


def _stored(blobs: BlobStore, adapter: Adapter) -> BlobRef:
    data = encode(adapter, Codec.FP32)
    return BlobRef(sha256=blobs.put(data), size_bytes=len(data))
