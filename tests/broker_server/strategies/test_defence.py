"""Poisoned updates: what is clipped, what is refused, and what stays as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_server.strategies import restore_state, saved_state
from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.defence import Defence, DefenceRule
from broker_server.strategies.named import STRATEGY_NAMES
from broker_server.strategies.private_sum import Assigned
from broker_server.strategies.protected import (
    Aggregated,
    Protected,
    Received,
    aggregate_round,
    protected_strategy,
)
from broker_server.strategies.review import Review
from broker_server.strategies.robust_mean import RobustMean
from broker_server.strategies.strategy import Adapter
from broker_server.strategies.update_sizes import Ruler, whole_norm
from tests.support.capacities import RANKS, UPDATES, Tensors, assert_close, nested_ranks, tensors
from wire_protocol.errors import ConfigError

OLD = tensors(7)
ALL = [Assigned(RANKS)]


def received(
    updates: Sequence[Adapter], weights: Sequence[float] | None = None, *, steps: int = 10
) -> list[Received]:
    """Updates of devices ``d00``, ``d01``, ..."""
    heavy = weights or [100.0] * len(updates)
    return [
        Received(f"d{number:02}", weight, steps, lambda update=update: update)  # type: ignore[misc]
        for number, (update, weight) in enumerate(zip(updates, heavy, strict=True))
    ]


def settled(
    updates: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    strategy: str = "legend",
    options: Mapping[str, object] | None = None,
) -> Aggregated:
    """One round from the adapter ``OLD``."""
    guarded = protected_strategy(strategy, {"defence": "clip", **(options or {})})
    return aggregate_round(guarded, OLD, received(updates, weights), ALL)


def plain(updates: Sequence[Adapter], weights: Sequence[float] | None = None) -> Tensors:
    mean = HolderMean(OLD)
    for one in received(updates, weights):
        mean.add(one.device_id, one.read(), weight=one.weight, steps=one.steps)
    return mean.result()


def times(update: Adapter, factor: float) -> Tensors:
    return {name: (values * np.float32(factor)) for name, values in update.items()}


def honest(count: int, *, size: float = 0.01) -> list[Tensors]:
    """Updates that point roughly the same way, as those of one round do."""
    common = tensors(500, size=size)
    return [
        {name: common[name] + values for name, values in tensors(seed, size=size / 2).items()}
        for seed in range(count)
    ]


# Laws


@given(UPDATES)
def test_clipping_never_makes_an_update_larger(updates: list[tuple[Tensors, float]]) -> None:
    review = Review(Defence(DefenceRule(refuse_limit=None, clip_limit=1.0)), OLD)
    for one in received([update for update, _ in updates]):
        review.look(one.device_id, one.read(), weight=one.weight, steps=one.steps)
    for one in received([update for update, _ in updates]):
        before, after = one.read(), review.judge(one.device_id).applied(one.read())
        assert after.keys() == before.keys()
        for name in before:
            assert whole_norm({name: after[name]}) <= whole_norm({name: before[name]})
        for module, parts in Ruler(OLD).measure(after, steps=10).products.items():
            assert (
                parts.bound()
                <= Ruler(OLD).measure(before, steps=10).products[module].bound() + 1e-9
            )


@given(st.integers(0, 99), nested_ranks(), st.lists(st.integers(1, 500), min_size=3, max_size=8))
def test_equal_updates_are_averaged_as_without_a_defence(
    seed: int, ranks: tuple[int, ...], weights: list[int]
) -> None:
    update = tensors(seed, ranks, size=0.01)
    same, heavy = [update] * len(weights), [float(weight) for weight in weights]

    for kind in ("clip", "trimmed_mean", "median"):
        options: dict[str, object] = {"defence": kind, "weight_limit": None}
        result = settled(same, heavy, options=options)

        assert result.findings == ()
        assert_close(result.adapter, plain(same, heavy))


@given(UPDATES, st.sampled_from(["clip", "trimmed_mean", "median"]), st.data())
def test_the_order_of_arrival_decides_nothing(
    updates: list[tuple[Tensors, float]], kind: str, data: st.DataObject
) -> None:
    arrived = received([update for update, _ in updates], [float(w) for _, w in updates])
    other = data.draw(st.permutations(arrived))
    one, two = (
        aggregate_round(protected_strategy("legend", {"defence": kind}), OLD, order, ALL)
        for order in (arrived, other)
    )

    assert_close(one.adapter, two.adapter, atol=1e-6)
    assert set(one.findings) == set(two.findings)


@given(UPDATES, st.sampled_from(["clip", "trimmed_mean", "median"]))
def test_rows_that_nobody_trained_keep_their_value_to_the_last_bit(
    updates: list[tuple[Tensors, float]], kind: str
) -> None:
    result = settled([update for update, _ in updates], options={"defence": kind})

    for name, old in OLD.items():
        if name.startswith("head"):
            continue
        axis = 0 if name.endswith("A") else 1
        held = max((u[name].shape[axis] for u, _ in updates if name in u), default=0)
        untouched = (slice(None),) * axis + (slice(held, None),)
        np.testing.assert_array_equal(result.adapter[name][untouched], old[untouched])


@given(st.integers(5, 15), st.integers(0, 2), st.floats(-1e6, 1e6))
def test_no_few_attackers_move_a_trimmed_mean_out_of_the_honest_range(
    count: int, attackers: int, value: float
) -> None:
    good = honest(count)
    bad = [{name: np.full_like(v, np.float32(value)) for name, v in OLD.items()}] * attackers
    mean = RobustMean(OLD, HolderMean(OLD), kind="trimmed_mean", trim=0.4)
    for one in received([*good, *bad]):
        mean.add(one.device_id, one.read(), weight=1.0, steps=1)

    for name, new in mean.result().items():
        stack = np.stack([update[name] for update in good]).astype(np.float64)
        moved = new.astype(np.float64) - OLD[name]
        assert (moved >= stack.min(axis=0) - 1e-6).all()
        assert (moved <= stack.max(axis=0) + 1e-6).all()


@given(st.lists(st.floats(-5, 5, width=32), min_size=5, max_size=11))
def test_a_median_is_the_median(values: list[float]) -> None:
    old: Tensors = {"head.bias": np.zeros(1, dtype=np.float32)}
    median = RobustMean(old, HolderMean(old), kind="median", trim=0.1)
    for number, value in enumerate(values):
        update = {"head.bias": np.array([value], dtype=np.float32)}
        median.add(f"d{number}", update, weight=1.0, steps=1)

    assert median.result()["head.bias"][0] == pytest.approx(float(np.median(values)), abs=1e-6)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 4))
@settings(max_examples=50)
def test_the_norm_of_a_product_needs_no_product(seed: int, other: int, rank: int) -> None:
    old, update = tensors(seed, (0, 0, 4)), tensors(other + 50, (0, 0, rank))
    up, down = (old[f"layers.2.q.lora_{f}"].astype(np.float64) for f in "BA")
    up, down = up[:, :rank], down[:rank]
    new_up, new_down = (update[f"layers.2.q.lora_{f}"].astype(np.float64) for f in "BA")

    parts = Ruler(old).measure(update, steps=1).products["layers.2.q"]

    exact = [np.linalg.norm(m) for m in (new_up @ down, up @ new_down, new_up @ new_down)]
    assert [parts.by_b, parts.by_a, parts.by_both] == pytest.approx(exact, rel=1e-6)
    change = (up + new_up) @ (down + new_down) - up @ down
    assert parts.bound() >= np.linalg.norm(change) - 1e-9


# Attackers


@pytest.mark.parametrize("factor", [30.0, -30.0])
def test_updates_far_above_the_usual_size_are_refused_by_name(factor: float) -> None:
    good = honest(8)

    result = settled([*good, times(good[0], factor), times(good[1], factor)])

    assert [(one.device_id, one.verdict) for one in result.findings] == [
        ("d08", "refused"),
        ("d09", "refused"),
    ]
    assert "times its usual size (limit 5)" in result.findings[0].reason
    assert_close(result.adapter, plain(good))


def test_an_update_somewhat_too_large_counts_as_one_at_the_limit() -> None:
    good = honest(8)
    large = times(good[0], 4.0)

    result = settled([*good, large])

    [finding] = result.findings
    assert (finding.device_id, finding.verdict) == ("d08", "clipped")
    assert "and" in finding.reason
    for name, values in result.adapter.items():
        if name.startswith("head"):
            continue  # weight and bias are one block
        counted = 9 * (values.astype(np.float64) - OLD[name]) - sum(one[name] for one in good)
        sizes = [float(np.linalg.norm(one[name])) for one in [*good, large]]
        assert np.linalg.norm(counted) < 2.001 * np.median(sizes)


def test_one_poisoned_layer_is_enough_to_be_refused() -> None:
    good = honest(6)
    sly = {**good[0], "layers.2.q.lora_B": good[0]["layers.2.q.lora_B"] * np.float32(50)}

    result = settled([*good, sly])

    [finding] = result.findings
    assert finding.verdict == "refused"
    assert "layers.2.q.lora_B" in finding.reason


def test_factors_that_are_small_each_are_clipped_for_their_product() -> None:
    flat = {name: np.full_like(values, 0.01) for name, values in OLD.items()}
    good = [times(flat, 1 + 0.01 * number) for number in range(6)]
    # Random signs cancel against what is there; aligned ones add up in the product.
    strong = {
        name: np.sign(OLD[name]) * np.float32(0.0195) if "lora" in name else values
        for name, values in flat.items()
    }
    rule = DefenceRule(clip_limit=2.0)
    review = Review(Defence(rule), OLD)
    everyone = received([*good, strong])
    for one in everyone:
        review.look(one.device_id, one.read(), weight=one.weight, steps=one.steps)

    verdict = review.judge("d06")

    assert all(review.judge(one.device_id).scales == {} for one in everyone[:6])
    [finding] = verdict.findings
    assert ".product is" in finding.reason


def test_a_claimed_number_of_examples_is_believed_up_to_a_limit() -> None:
    good = honest(5)

    result = settled(good, [100.0, 100.0, 100.0, 100.0, 1e15])

    [finding] = result.findings
    assert (finding.device_id, finding.verdict) == ("d04", "weight")
    assert_close(result.adapter, plain(good, [100.0, 100.0, 100.0, 100.0, 300.0]))


def test_values_that_are_not_finite_are_refused_and_the_round_goes_on() -> None:
    good = honest(4)
    bad = times(good[0], 1.0)
    bad["head.bias"][0] = np.nan

    result = settled([*good, bad])

    assert [one.verdict for one in result.findings] == ["refused"]
    assert "not finite" in result.findings[0].reason
    assert_close(result.adapter, plain(good))


def test_a_round_whose_updates_are_all_refused_changes_nothing() -> None:
    strategy = protected_strategy("legend", {})
    for _ in range(3):
        aggregate_round(strategy, OLD, received(honest(5)), ALL)

    result = aggregate_round(strategy, OLD, received(honest(5, size=10.0)), ALL)

    assert [one.verdict for one in result.findings] == ["refused"] * 5
    assert_close(result.adapter, OLD)


def test_attackers_in_the_majority_of_one_round_meet_the_memory_of_earlier_ones() -> None:
    strategy, good = protected_strategy("legend", {}), honest(8)
    for _ in range(3):
        aggregate_round(strategy, OLD, received(good), ALL)
    bad = [times(one, -30.0) for one in good[:5]]

    result = aggregate_round(strategy, OLD, received([*good[:3], *bad]), ALL)

    assert {one.device_id for one in result.findings} == {"d03", "d04", "d05", "d06", "d07"}
    assert_close(result.adapter, plain(good[:3]))


def test_a_layer_with_one_holder_follows_it_half_way() -> None:
    shallow = [tensors(seed, (0, 0, 4), size=0.01) for seed in range(4)]
    deep = tensors(9, size=0.01)
    name = "layers.0.q.lora_A"

    trusted = settled([*shallow, deep], options={"few_holders": 1}).adapter[name]
    doubted = settled([*shallow, deep], options={"few_holders": 4}).adapter[name]

    np.testing.assert_allclose(doubted - OLD[name], (trusted - OLD[name]) / 4, atol=1e-6)


def test_a_fleet_of_one_is_not_slowed_down_for_its_size() -> None:
    update = tensors(3, size=0.01)

    assert_close(settled([update], options={"few_holders": 9}).adapter, plain([update]))


def test_devices_with_fewer_steps_are_measured_like_the_others() -> None:
    review = Review(Defence(), OLD)
    for number, one in enumerate(honest(5)):
        review.look(f"d{number}", one, weight=1.0, steps=10)
    review.look("few", times(honest(5)[0], 0.4), weight=1.0, steps=3)

    assert review.judge("few").findings == ()


# Memory


def test_what_is_usual_survives_a_restart_to_the_last_bit() -> None:
    strategy = protected_strategy("legend", {})
    for number in range(10):
        aggregate_round(strategy, OLD, received(honest(5, size=0.01 + number / 1000)), ALL)
    restarted = protected_strategy("legend", {})
    restore_state(restarted, saved_state(strategy))
    both = [strategy, restarted]

    one, two = (aggregate_round(s, OLD, received(honest(5, size=0.03)), ALL) for s in both)

    assert one.findings == two.findings
    for name in OLD:
        np.testing.assert_array_equal(one.adapter[name], two.adapter[name])
    assert saved_state(strategy).keys() == saved_state(restarted).keys()


# Options


@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_every_strategy_can_be_defended(name: str) -> None:
    good = honest(6)

    result = settled([*good, times(good[0], -40.0)], strategy=name) if name not in (
        "ffa", "rolora"
    ) else settled(
        [{n: v for n, v in u.items() if "lora_A" not in n} for u in [*good, times(good[0], -40)]],
        strategy=name,
    )  # fmt: skip

    assert [one.device_id for one in result.findings] == ["d06"]


def test_legend_is_defended_unless_told_otherwise_and_papers_are_not() -> None:
    assert isinstance(protected_strategy("legend", {}), Protected)
    for name in ("legend", *STRATEGY_NAMES[1:]):
        options: dict[str, object] = {"defence": "none"} if name == "legend" else {}
        assert not isinstance(protected_strategy(name, options), Protected)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("legend", {"defence": "krum"}, "one of none, clip, trimmed_mean, median, not 'krum'"),
        ("legend", {"clip_limit": 0.5}, "at least 1"),
        ("legend", {"clip_limit": 6}, "refuse_limit 5 lies below clip_limit 6"),
        ("legend", {"defence": "none", "clip_limit": 3}, "clip_limit .* needs a defence"),
        ("legend", {"trim": 0.1}, "trim .* belongs to defence trimmed_mean"),
        ("legend", {"defence": "trimmed_mean", "trim": 0.5}, "below 0.5"),
        ("hetlora", {"defence": "median"}, "weights updates by their norm; use defence clip"),
        ("legend", {"aggregation": "products", "defence": "median"}, "median does not leave it"),
        ("flexlora", {"defence": "trimmed_mean"}, "averages products"),
        ("fedlora", {"rnk": 8}, "it has: rank, defence, clip_limit"),
        ("fedlora", {"weight_limit": 3}, "needs a defence"),
    ],
)
def test_a_wrong_option_says_what_would_be_right(
    name: str, options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        protected_strategy(name, options)


def test_secure_aggregation_and_looking_at_updates_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="looks at single updates, which secure"):
        protected_strategy("legend", {"defence": "trimmed_mean"}, secure=True)
    with pytest.raises(ConfigError, match="which secure aggregation does not leave it"):
        protected_strategy("legend", {"aggregation": "products"}, secure=True)
    with pytest.raises(ConfigError, match="secure aggregation hides them"):
        protected_strategy("flexlora", {}, secure=True)
    assert not isinstance(protected_strategy("legend", {}, secure=True), Protected)
