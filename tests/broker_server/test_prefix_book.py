"""Which prefix a device applies, what it loads for that, and what its cache is reckoned to hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from broker_server.adapter_cuts import stored_cuts
from broker_server.blobs import BlobStore
from broker_server.prefix_book import PrefixBook, PrefixCheckpoint
from broker_server.run_state import RunPlan
from broker_server.strategies.prefix import PrefixRule, prefix_rule
from broker_server.virtual_cache import CacheBook, VirtualCache
from tests.support.capacities import SIX_LAYERS, device
from tests.support.messages import a_manifest, a_recipe, a_report
from wire_protocol.errors import ConfigError
from wire_protocol.lora import Codec, LoraConfig
from wire_protocol.messages import UpdateManifest
from wire_protocol.tensors import decode, encode

PERIODIC = PrefixRule("periodic", 3)
PRETRAINED = PrefixRule("pretrained")


def an_adapter(value: float) -> dict[str, np.ndarray]:
    made = {f"layers.{layer}.q.lora_A": np.full((2, 4), value + layer) for layer in range(3)}
    return {**made, "head.weight": np.full((2, 4), value)}


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def plan_of(rule: PrefixRule, codec: Codec = Codec.FP32) -> RunPlan:
    recipe = a_recipe().model_copy(update={"adapter_codec": codec})
    values = SIX_LAYERS.values_per_rank[:3]
    shape = replace(SIX_LAYERS, layer_count=3, values_per_rank=values)
    return RunPlan("run", rounds=1, shape=shape, recipe=recipe, model_digest="0" * 64, prefix=rule)


def book_of(blobs: BlobStore, rule: PrefixRule, value: float = 0.0) -> PrefixBook:
    data = encode(an_adapter(value), Codec.FP32)
    cuts = stored_cuts(blobs, data, plan_of(rule), next_round=1)
    return PrefixBook(rule, PrefixCheckpoint(cuts=cuts))


def an_update(depth: int, *, examples: int, steps: int) -> UpdateManifest:
    ranks = (0,) * (3 - depth) + (2,) * depth
    report = a_report(steps_done=steps, batch_size=8)
    return a_manifest(ranks=ranks, examples=examples, report=report)


def of_depth(depth: int, rank: int = 2) -> LoraConfig:
    return LoraConfig.top(depth, (rank,) * 3)


def layers_of(blobs: BlobStore, sha256: str) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in decode(blobs.read(sha256))}


@pytest.mark.parametrize("rule", [PrefixRule(), PrefixRule("periodic", every=1)])
def test_devices_load_a_coarsely_written_adapter_that_is_not_the_servers_own(
    blobs: BlobStore, rule: PrefixRule
) -> None:
    rng = np.random.default_rng(0)
    exact = {name: rng.normal(size=(2, 4)).astype(np.float32) for name in an_adapter(0.0)}
    data = encode(exact, Codec.FP32)
    cuts = stored_cuts(blobs, data, plan_of(rule, Codec.INT8), next_round=1)
    book = PrefixBook(rule, PrefixCheckpoint(cuts=cuts))
    loaded = book.base(of_depth(3))
    assert loaded is not None
    got = decode(blobs.read(loaded.sha256))
    assert got.keys() == exact.keys()
    for name, values in exact.items():
        np.testing.assert_allclose(got[name], values, atol=np.abs(values).max() / 127)
    assert any(not np.array_equal(got[name], values) for name, values in exact.items())


@pytest.mark.parametrize("codec", [Codec.FP32, Codec.INT8])
@pytest.mark.parametrize("rule", [PrefixRule(), PRETRAINED])
def test_a_device_of_a_lower_rank_loads_the_ranks_that_it_trains(
    blobs: BlobStore, rule: PrefixRule, codec: Codec
) -> None:
    rng = np.random.default_rng(0)
    exact = {f"layers.{layer}.q.lora_{factor}": rng.normal(size=size).astype(np.float32)
             for layer in range(3) for factor, size in (("A", (4, 5)), ("B", (5, 4)))}  # fmt: skip
    plan = replace(plan_of(rule, codec), narrow_ranks=(1, 3))
    cuts = stored_cuts(blobs, encode(exact, Codec.FP32), plan, next_round=1)
    book = PrefixBook(rule, PrefixCheckpoint(cuts=cuts))

    # Rank 2 was not written: the next larger one holds it.
    for rank, depth, held in ((1, 3, 1), (2, 1, 3), (3, 2, 3), (4, 2, 4)):
        loaded = book.base(of_depth(depth, rank))
        assert loaded is not None
        assert loaded.sha256 in book.checkpoint().blobs()
        got = decode(blobs.read(loaded.sha256))
        trained = {f"layers.{layer}.q.lora_A" for layer in range(3 - depth, 3)}
        frozen = {f"layers.{layer}.q.lora_A" for layer in range(3 - depth)}
        assert {name for name in got if name.endswith("A")} - trained == (
            set() if rule.is_kept else frozen
        )
        for name, values in got.items():
            wanted = held if name[:-1] + "A" in trained else 4
            part = exact[name][:wanted] if name.endswith("A") else exact[name][:, :wanted]
            np.testing.assert_allclose(values, part, atol=np.abs(part).max() / 100)


def test_a_synced_prefix_changes_nothing(blobs: BlobStore) -> None:
    book = book_of(blobs, PrefixRule())
    book.begin_round(1)
    assert (book.base(of_depth(2)), book.prefix(2)) == (None, None)
    book.learn({"a": an_update(2, examples=80, steps=5)}, ())
    assert book.known(device("a")) == device("a")
    assert book.checkpoint() == PrefixCheckpoint()


def test_with_a_pretrained_prefix_devices_load_what_they_train(blobs: BlobStore) -> None:
    book = book_of(blobs, PRETRAINED)
    book.begin_round(1)
    base, prefix = book.base(of_depth(2)), book.prefix(2)
    assert base is not None
    assert layers_of(blobs, base.sha256) == {
        "layers.1",
        "layers.2",
        "head.weight",
    }
    assert prefix is not None
    assert prefix.adapter is None


def test_a_periodic_prefix_is_the_lower_part_of_an_earlier_adapter(blobs: BlobStore) -> None:
    book = book_of(blobs, PERIODIC)
    book.begin_round(1)
    first, version = book.prefix(2), book.version
    assert first is not None
    assert first.adapter is not None
    assert layers_of(blobs, first.adapter.sha256) == {"layers.0"}
    for round_number in (2, 3):
        data = encode(an_adapter(round_number), Codec.FP32)
        book.learn({}, stored_cuts(blobs, data, plan_of(PERIODIC), next_round=round_number))
        book.begin_round(round_number)
        now = book.prefix(2)
        assert now is not None
        assert (now.adapter, book.version) == (first.adapter, version)
    data = encode(an_adapter(9), Codec.FP32)
    book.learn({}, stored_cuts(blobs, data, plan_of(PERIODIC), next_round=4))
    book.begin_round(4)
    fresh = book.prefix(2)
    assert fresh is not None
    assert fresh.adapter is not None
    assert decode(blobs.read(fresh.adapter.sha256))["layers.0.q.lora_A"][0, 0] == 9
    assert book.version != version


def test_devices_are_told_how_long_a_prefix_stays(blobs: BlobStore) -> None:
    def told(rule: PrefixRule) -> list[int | None]:
        book, found = book_of(blobs, rule), []
        for round_number in range(1, 6):
            book.begin_round(round_number)
            prefix = book.prefix(2)
            assert prefix is not None
            found.append(prefix.rounds_left)
        return found

    assert told(PERIODIC) == [2, 1, 0, 2, 1]
    assert told(PrefixRule("periodic", 1)) == [0] * 5
    assert told(PRETRAINED) == [None] * 5


def test_at_full_depth_nothing_lies_below(blobs: BlobStore) -> None:
    book = book_of(blobs, PERIODIC)
    book.begin_round(1)
    base, prefix = book.base(of_depth(3)), book.prefix(3)
    assert base is not None
    assert prefix is not None
    assert prefix.adapter is None
    assert "layers.0" in layers_of(blobs, base.sha256)


def test_a_cache_fills_with_what_a_device_visited(blobs: BlobStore) -> None:
    book = book_of(blobs, PRETRAINED)
    book.learn({"a": an_update(2, examples=80, steps=5)}, ())
    assert (book.known(device("a")).warm_depth, book.known(device("a")).warm_examples) == (2, 40)
    book.learn({"a": an_update(1, examples=80, steps=5)}, ())
    assert (book.known(device("a")).warm_depth, book.known(device("a")).warm_examples) == (2, 60)
    book.learn({"a": an_update(3, examples=80, steps=20)}, ())
    assert (book.known(device("a")).warm_depth, book.known(device("a")).warm_examples) == (3, 80)


def test_a_refreshed_prefix_empties_the_caches(blobs: BlobStore) -> None:
    book = book_of(blobs, PERIODIC)
    book.begin_round(1)
    data = encode(an_adapter(5), Codec.FP32)
    cuts = stored_cuts(blobs, data, plan_of(PERIODIC), next_round=4)
    book.learn({"a": an_update(2, examples=80, steps=5)}, cuts)
    book.begin_round(3)
    assert book.known(device("a")).warm_depth == 2
    book.begin_round(4)
    assert book.known(device("a")).warm_depth == 0


def test_the_book_survives_a_restart(blobs: BlobStore) -> None:
    book = book_of(blobs, PERIODIC)
    book.begin_round(1)
    book.learn({"a": an_update(2, examples=80, steps=5)}, ())
    text = book.checkpoint().model_dump_json()
    again = PrefixBook(PERIODIC, PrefixCheckpoint.model_validate_json(text))
    assert again.checkpoint() == book.checkpoint()
    assert again.version == book.version


def test_options_of_the_prefix_are_parted_from_the_strategys() -> None:
    options = {"prefix_mode": "periodic", "prefix_every": 4, "rank": 8}
    assert prefix_rule("fedlora", options) == (PrefixRule("periodic", 4), {"rank": 8})
    with pytest.raises(ConfigError, match="prefix_mode"):
        prefix_rule("fedlora", {"prefix_mode": "sometimes"})


LENGTHS = (4, 6, 8, 10)


def test_a_virtual_cache_computes_an_example_once() -> None:
    book = CacheBook(VirtualCache(version="v"), 2, LENGTHS)
    assert book.visit([0, 1]) == 2 * 6 * 2
    assert book.visit([1, 2]) == 1 * 8 * 2
    assert book.visit([0, 1, 2]) == 0
    again = CacheBook(book.after(), 2, LENGTHS)
    assert again.visit([0, 1, 2, 3]) == 1 * 10 * 2


def test_a_virtual_cache_begins_at_the_highest_lower_boundary() -> None:
    book = CacheBook(VirtualCache(version="v"), 1, LENGTHS)
    book.visit([0, 1])
    shallower = CacheBook(book.after(), 3, LENGTHS)
    assert shallower.visit([0, 2]) == 1 * 4 * (3 - 1) + 1 * 8 * 3
    deeper = CacheBook(shallower.after(), 1, LENGTHS)
    assert deeper.visit([0, 1, 2]) == 1 * 8 * 1


def test_another_version_of_the_prefix_empties_a_virtual_cache() -> None:
    book = CacheBook(VirtualCache(version="v"), 1, LENGTHS)
    book.visit([0])
    assert book.after().of("v") == book.after()
    assert book.after().of("w") == VirtualCache(version="w")
