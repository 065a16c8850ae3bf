"""What devices load of a global adapter: all of it, or parts of it at every depth.

Knows bytes and the blob store; knows no devices.
"""

from __future__ import annotations

from broker_server.blobs import BlobStore
from broker_server.prefix_book import AdapterCut
from broker_server.run_state import RunPlan
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
            devices load the adapter as it is.
        next_round: the first round that begins with this adapter.
    """
    rule, codec, layer_count = plan.prefix, plan.recipe.adapter_codec, plan.shape.layer_count
    if not rule.is_kept:
        if codec is Codec.FP32:
            return ()
        return (AdapterCut(top=_stored(blobs, decode(adapter), codec)),) * layer_count
    tensors = decode(adapter)
    # The lower parts are needed of an adapter that becomes a snapshot only.
    with_bottom = rule.refreshes(next_round)
    return tuple(
        AdapterCut(
            top=_stored(blobs, _part(tensors, layer_count - depth, layer_count), codec),
            bottom=_stored(blobs, _part(tensors, 0, layer_count - depth, head=False), codec)
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


def _stored(blobs: BlobStore, adapter: Adapter, codec: Codec) -> BlobRef:
    data = encode(adapter, codec)
    return BlobRef(sha256=blobs.put(data), size_bytes=len(data))
