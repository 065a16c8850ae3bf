"""Privacy: what one device can change at most, what the noise is, what it costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker_server.privacy import epsilon_after, noise_source, privacy_report, privacy_rule
from broker_server.run_spec import PrivacySettings
from broker_server.strategies import RoundOutcome, learn_from_round
from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.private_sum import (
    Assigned,
    PrivacyRule,
    PrivateSum,
    clipped,
    expected_holders,
)
from broker_server.strategies.protected import (
    Protected,
    Received,
    aggregate_round,
    protected_strategy,
)
from broker_server.strategies.strategy import Adapter
from broker_server.strategies.update_sizes import whole_norm
from edge_agent.clip_update import clip_update
from tests.support.capacities import RANKS, UPDATES, Tensors, assert_close, nested_ranks, tensors
from wire_protocol.errors import ConfigError

ZEROS: Tensors = {name: np.zeros_like(values) for name, values in tensors(0).items()}
Sums = Mapping[str, NDArray[Any]]
SETTINGS = PrivacySettings(clip_norm=1.0, noise_multiplier=1.0)


def summed(updates: Sequence[Adapter], clip_norm: float, *, old: Adapter = ZEROS) -> Sums:
    """The sum that the noise is added to: what the new adapter is without noise, times holders."""
    assigned = [Assigned(RANKS)] * 4
    private = PrivateSum(
        old,
        HolderMean(old),
        PrivacyRule(clip_norm, 0.0),
        assigned=assigned,
        generator=np.random.default_rng(0),
    )
    for number, update in enumerate(updates):
        private.add(f"d{number}", update, weight=1.0, steps=1)
    return {
        name: 4 * (new.astype(np.float64) - old[name]) for name, new in private.result().items()
    }


def distance(one: Sums, other: Sums) -> float:
    return math.sqrt(sum(float(np.sum((one[name] - other[name]) ** 2)) for name in one))


# What one device can change


@given(UPDATES, st.floats(1e-3, 100))
def test_a_clipped_update_is_within_the_norm_and_points_the_same_way(
    updates: list[tuple[Tensors, float]], clip_norm: float
) -> None:
    for update, _ in updates:
        shortened: tuple[Sums, Sums] = clipped(update, clip_norm), clip_update(update, clip_norm)
        for short in shortened:
            assert whole_norm(short) <= clip_norm * (1 + 1e-6)
            if whole_norm(update) <= clip_norm:
                assert_close({n: v.astype(np.float32) for n, v in short.items()}, update)
            else:
                scale = clip_norm / whole_norm(update)
                for name, values in short.items():
                    np.testing.assert_allclose(values, update[name] * scale, rtol=1e-4, atol=1e-8)


def test_what_a_device_does_not_clip_the_server_clips() -> None:
    honest = clip_update(tensors(3), 0.5)

    assert distance(summed([tensors(3)], 0.5), summed([honest], 0.5)) < 1e-6


def test_no_device_changes_the_sum_by_more_than_the_clip_norm() -> None:
    # Every pair of the smallest interesting updates, present or replaced by nothing.
    corners = [
        {name: np.full_like(values, value) for name, values in held.items()}
        for value in (-1e6, -1.0, -1e-3, 0.0, 1e-3, 1.0, 1e6)
        for held in (tensors(0), tensors(0, (0, 0, 4)), tensors(0, (0, 1, 2)))
    ]
    worst = 0.0
    for clip_norm in (0.1, 1.0, 10.0):
        for one, others in itertools.product(corners, itertools.combinations(corners[::4], 2)):
            with_it = summed([one, *others], clip_norm)
            without = summed(list(others), clip_norm)
            change = distance(with_it, without) / clip_norm
            worst = max(worst, change)
            assert change <= 1 + 1e-5
    # The bound is tight: the noise is not larger than it must be.
    assert worst == pytest.approx(1.0, abs=1e-5)


@given(UPDATES, st.floats(0.01, 10))
@settings(max_examples=50)
def test_both_factors_and_the_head_share_one_norm(
    updates: list[tuple[Tensors, float]], clip_norm: float
) -> None:
    update, _ = updates[0]

    assert distance(summed([update], clip_norm), summed([], clip_norm)) <= clip_norm * (1 + 1e-5)


# What does not depend on the answers


def test_the_denominator_is_who_was_asked_and_not_who_answered() -> None:
    assigned = [Assigned((0, 0, 4)), Assigned((0, 2, 4)), Assigned((2, 3, 4), "B")]

    counts = expected_holders(ZEROS, assigned)

    assert counts["head.bias"].tolist() == [3]
    assert counts["layers.2.q.lora_A"].ravel().tolist() == [2, 2, 2, 2]
    assert counts["layers.2.q.lora_B"].ravel().tolist() == [3, 3, 3, 3]
    assert counts["layers.1.q.lora_A"].ravel().tolist() == [1, 1, 0]
    assert counts["layers.1.q.lora_B"].ravel().tolist() == [2, 2, 1]
    assert counts["layers.0.q.lora_A"].ravel().tolist() == [0, 0]


@given(UPDATES, st.lists(nested_ranks(), min_size=1, max_size=4))
def test_rows_that_were_assigned_to_nobody_stay_whatever_is_sent(
    updates: list[tuple[Tensors, float]], ranks: list[tuple[int, ...]]
) -> None:
    old, assigned = tensors(7), [Assigned(one) for one in ranks]
    strategy = protected_strategy("legend", {}, privacy=PrivacyRule(1.0, 1.0))
    received = [
        Received(f"d{number}", weight, 1, lambda update=update: update)  # type: ignore[misc]
        for number, (update, weight) in enumerate(updates)
    ]

    new = aggregate_round(strategy, old, received, assigned).adapter

    for name, count in expected_holders(old, assigned).items():
        untouched = np.broadcast_to(count == 0, old[name].shape)
        np.testing.assert_array_equal(new[name][untouched], old[name][untouched])
        # Noise falls on every other row, whether somebody sent it or not.
        assert (new[name] != old[name])[~untouched].any() or untouched.all()


def test_a_claimed_number_of_examples_does_not_count() -> None:
    rule = PrivacyRule(1.0, 1.0)
    results = []
    for weight in (1.0, 1e9):
        strategy = protected_strategy(
            "legend", {}, privacy=rule, noise=lambda _: np.random.default_rng(1)
        )
        one = Received("a", weight, 1, lambda: tensors(3))
        results.append(aggregate_round(strategy, ZEROS, [one], [Assigned(RANKS)]).adapter)

    assert_close(results[0], results[1])


def test_a_device_that_does_not_clip_is_named() -> None:
    strategy = protected_strategy("legend", {}, privacy=PrivacyRule(0.1, 1.0))
    one = Received("careless", 1.0, 1, lambda: tensors(3))

    [finding] = aggregate_round(strategy, ZEROS, [one], [Assigned(RANKS)]).findings

    assert (finding.device_id, finding.verdict) == ("careless", "clipped")
    assert "above clip_norm 0.1" in finding.reason


# The noise


def test_the_noise_has_the_promised_size_and_is_new_in_every_round() -> None:
    old: Tensors = {"head.weight": np.zeros((100, 100), dtype=np.float32)}
    strategy = protected_strategy("fedlora", {}, privacy=PrivacyRule(0.5, 3.0))
    asked = [Assigned(RANKS)] * 10

    one, two = (aggregate_round(strategy, old, [], asked).adapter for _ in range(2))

    # 10,000 values: the standard deviation is known to one in a hundred (4 sigma: 3 %).
    for new in (one, two):
        assert float(np.std(new["head.weight"])) == pytest.approx(3.0 * 0.5 / 10, rel=0.03)
    assert not np.array_equal(one["head.weight"], two["head.weight"])


def test_noise_comes_from_the_operating_system_unless_a_test_asks_for_a_seed() -> None:
    secret = noise_source(SETTINGS)
    known = noise_source(SETTINGS.model_copy(update={"test_noise_seed": 3}))

    assert secret(1).normal() != secret(1).normal()
    assert known(1).normal() == known(1).normal()
    assert known(1).normal() != known(2).normal()


def test_noise_for_tests_is_the_same_after_a_restart() -> None:
    known = SETTINGS.model_copy(update={"test_noise_seed": 3})
    adapters: list[Adapter] = []
    for _ in range(2):
        strategy = protected_strategy(
            "legend", {}, privacy=privacy_rule(known), noise=noise_source(known)
        )
        for number in range(3):
            learn_from_round(strategy, RoundOutcome(number, 0.5, 1.0))
        shuffled = dict(reversed(ZEROS.items())) if adapters else ZEROS
        adapters.append(aggregate_round(strategy, shuffled, [], [Assigned(RANKS)]).adapter)

    assert_close(adapters[1], adapters[0])


# What it costs


@given(st.integers(1, 500), st.floats(0.3, 50))
@settings(max_examples=40)
def test_epsilon_grows_with_rounds_and_falls_with_noise(rounds: int, noise: float) -> None:
    def epsilon(z: float, t: int) -> float:
        private = PrivacySettings(clip_norm=1.0, noise_multiplier=z)
        value = epsilon_after(private, t)
        assert value is not None
        return value

    assert epsilon(noise, rounds) < epsilon(noise, rounds + 1)
    assert epsilon(noise * 1.1, rounds) < epsilon(noise, rounds)
    assert epsilon(noise, 0) == 0.0


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (4.0, 30), (8.0, 200)])
def test_epsilon_agrees_with_the_accountants(noise: float, rounds: int) -> None:
    dp = pytest.importorskip("dp_accounting")
    event = dp.SelfComposedDpEvent(dp.GaussianDpEvent(noise), rounds)
    loss = dp.pld.PLDAccountant(dp.NeighboringRelation.REPLACE_SPECIAL).compose(event)
    renyi = dp.rdp.RdpAccountant().compose(event)
    private = PrivacySettings(clip_norm=1.0, noise_multiplier=noise, delta=1e-5)

    epsilon = epsilon_after(private, rounds)

    assert epsilon == pytest.approx(loss.get_epsilon(1e-5), rel=1e-3)
    assert epsilon <= renyi.get_epsilon(1e-5)  # exact, so below the bound


def test_known_noise_has_no_epsilon() -> None:
    report = privacy_report(
        SETTINGS.model_copy(update={"test_noise_seed": 0}), rounds_done=1, rounds_planned=2
    )

    assert (report["epsilon"], report["epsilon_planned"]) == (None, None)
    assert report["noise_is_secret"] is False


def test_a_report_says_what_was_spent_and_what_holds_in_any_case() -> None:
    report = privacy_report(SETTINGS, rounds_done=3, rounds_planned=10)

    assert report["epsilon_round"] == pytest.approx(4.377, abs=1e-3)
    assert report["epsilon_round"] < report["epsilon"] < report["epsilon_planned"]  # type: ignore[operator]


# What cannot be sound


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("legend", {"defence": "clip"}, "clip depends on the other devices' updates"),
        ("fedlora", {"defence": "median"}, "breaks the bound"),
        ("hetlora", {}, "hetlora cannot have privacy: it weights updates by their norm"),
        ("flexlora", {}, "it averages products"),
        ("legend", {"weighting": "examples"}, "counts every device as one"),
        ("legend", {"clip_limit": 3}, "needs a defence"),
        ("legend", {"aggregation": "products"}, "which privacy does not leave it"),
    ],
)
def test_unsound_combinations_are_refused_with_the_reason(
    name: str, options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        protected_strategy(name, options, privacy=PrivacyRule(1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("legend", {"server_optimizer": "momentum", "factors": "B"}),
        ("legend", {"pace": "deadline", "weighting": "uniform"}),
        ("legend", {"defence": "none"}),
        ("ffa", {}),
        ("rolora", {}),
        ("fedadapter", {}),
    ],
)
def test_what_comes_after_the_noise_may_be_anything(name: str, options: dict[str, object]) -> None:
    strategy = protected_strategy(name, options, privacy=PrivacyRule(1.0, 1.0))

    assert isinstance(strategy, Protected)
    new = aggregate_round(strategy, tensors(1), [], [Assigned(RANKS)]).adapter
    assert all(np.isfinite(values).all() for values in new.values())
