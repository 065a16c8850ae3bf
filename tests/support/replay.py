"""What a scripted run must come to, worked out from who answered."""

from __future__ import annotations

import hashlib

from broker_server.run_state import RoundResult
from broker_server.store import Store
from broker_server.strategies import strategy_named
from tests.support.scripted_trainer import scripted_update
from wire_protocol.initial_adapter import initial_adapter
from wire_protocol.lora import Codec
from wire_protocol.messages import UpdateManifest
from wire_protocol.model_family import ModelShape
from wire_protocol.tensors import decode, encode

RANK = 4
SEED = 11


def replayed_adapter(store: Store, run_id: str, shape: ModelShape, *, labels: int) -> str:
    """Aggregate every round anew, each acknowledged update once; the digest of the last adapter.

    Fails where an update is not what its device makes, or not against the round's adapter.
    """
    strategy = strategy_named("fedlora", {"rank": RANK})
    ranks = (RANK,) * shape.layer_count
    adapter = encode(initial_adapter(shape, ranks, label_count=labels, seed=SEED), Codec.FP32)
    for text in store.rounds(run_id):
        result = RoundResult.model_validate_json(text)
        aggregation = strategy.begin(decode(adapter))
        base = hashlib.sha256(adapter).hexdigest()
        for device_id, one in sorted(store.updates(run_id, result.round).items()):
            manifest = UpdateManifest.model_validate_json(one)
            update = scripted_update(device_id, result.round, adapter, manifest.ranks)
            assert manifest.base_sha256 == base
            assert manifest.update.sha256 == hashlib.sha256(update).hexdigest()
            aggregation.add(
                device_id,
                decode(update),
                weight=float(manifest.examples),
                steps=manifest.report.steps_done,
            )
        adapter = encode(aggregation.result(), Codec.FP32)
    return hashlib.sha256(adapter).hexdigest()
