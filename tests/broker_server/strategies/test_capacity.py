from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.strategies import CapacityEstimate, RoundTimes, device_capacity, observe
from broker_server.strategies.capacity import BoardBounds, believed, scale_to_observed
from tests.support.capacities import device

POSITIVE = st.floats(1e-9, 1e9)


def forward_after(values: list[float], rho: float) -> float:
    estimate: CapacityEstimate | None = None
    for value in values:
        measured = CapacityEstimate(forward_s_per_token_layer=value)
        estimate = observe(estimate, measured, rho=rho).estimate
    assert estimate is not None
    assert estimate.forward_s_per_token_layer is not None
    return estimate.forward_s_per_token_layer


def test_the_first_measurement_is_the_estimate() -> None:
    measured = CapacityEstimate(up_bytes_per_s=3.0, round_trip_s=0.1)

    assert observe(None, measured).estimate == measured


def test_a_new_measurement_moves_the_estimate_by_one_minus_rho() -> None:
    assert forward_after([1.0, 1.5], rho=0.7) == pytest.approx(0.7 * 1.0 + 0.3 * 1.5)


def test_what_was_not_measured_keeps_its_value() -> None:
    known = CapacityEstimate(forward_s_per_token_layer=2.0, up_bytes_per_s=5.0)

    seen = observe(known, CapacityEstimate(up_bytes_per_s=5.0))

    assert seen.estimate == known


@pytest.mark.parametrize("measured", [2.01, 0.49, 1000.0])
def test_a_changed_power_mode_resets_the_estimate(measured: float) -> None:
    assert forward_after([1.0, 1.0, measured], rho=0.9) == measured


@pytest.mark.parametrize("measured", [2.0, 0.5])
def test_a_factor_of_two_is_still_noise(measured: float) -> None:
    assert forward_after([1.0, measured], rho=0.9) == pytest.approx(0.9 + 0.1 * measured)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, -math.inf, math.nan])
def test_a_measurement_out_of_range_is_ignored_and_named(wrong: float) -> None:
    known = CapacityEstimate(forward_s_per_token_layer=2.0, round_trip_s=0.5)
    measured = CapacityEstimate(forward_s_per_token_layer=wrong, round_trip_s=0.5)

    seen = observe(known, measured)

    assert seen.estimate == known
    assert seen.ignored == ("forward_s_per_token_layer",)


@given(st.lists(POSITIVE, min_size=1, max_size=20), st.floats(0, 0.99))
def test_an_estimate_stays_within_the_hull_of_its_measurements(
    values: list[float], rho: float
) -> None:
    estimate = forward_after(values, rho)

    assert min(values) * (1 - 1e-12) <= estimate <= max(values) * (1 + 1e-12)


@given(POSITIVE, POSITIVE, st.floats(0, 0.9))
def test_an_estimate_converges_to_a_constant_measurement(
    start: float, constant: float, rho: float
) -> None:
    assert forward_after([start] + [constant] * 200, rho) == pytest.approx(constant, rel=1e-6)


def test_times_of_a_round_become_rates_per_token_and_layer() -> None:
    times = RoundTimes(
        tokens=1000,
        layer_count=6,
        depth=2,
        forward_s=12.0,
        backward_s=5.0,
        downloaded_bytes=300,
        download_s=2.0,
        uploaded_bytes=80,
        upload_s=4.0,
    )

    assert times.measurement() == CapacityEstimate(
        forward_s_per_token_layer=12.0 / 6000,
        backward_s_per_token_layer=5.0 / 2000,
        up_bytes_per_s=20.0,
        down_bytes_per_s=150.0,
    )


def test_a_download_that_was_not_needed_measures_nothing() -> None:
    times = RoundTimes(1000, 6, 2, 12.0, 5.0, 0, 0.0, 80, 4.0)

    assert times.measurement().down_bytes_per_s is None


def test_a_device_without_a_measured_link_has_no_capacity_yet() -> None:
    estimate = CapacityEstimate(forward_s_per_token_layer=1.0, backward_s_per_token_layer=1.0)

    assert device_capacity(estimate, device_id="a", memory_budget_bytes=1, examples=1) is None


def test_a_measured_device_has_a_capacity() -> None:
    estimate = CapacityEstimate(1.0, 2.0, 3.0, 4.0, 0.5, 6.0, 7.0, 8.0)

    capacity = device_capacity(estimate, device_id="a", memory_budget_bytes=9.0, examples=10)

    assert capacity is not None
    assert capacity.device_id == "a"
    assert capacity.backward_s_per_token_layer == 2.0
    assert capacity.up_bytes_per_s == 3.0
    assert capacity.memory_bytes_per_token_layer == 8.0
    assert capacity.memory_budget_bytes == 9.0
    assert capacity.examples == 10


BOARD = BoardBounds(s_per_token_layer=1e-4, memory_bytes=8e9)


@given(st.floats(1e-12, 1e3), st.floats(0, 1e15))
def test_what_is_believed_is_never_orders_of_magnitude_from_the_board(
    seconds: float, memory: float
) -> None:
    claimed = replace(
        device("d", memory_budget_bytes=memory),
        forward_s_per_token_layer=seconds,
        backward_s_per_token_layer=seconds,
    )

    capacity, doubts = believed(claimed, BOARD)

    assert 1e-5 <= capacity.forward_s_per_token_layer <= 1e-2
    assert capacity.memory_budget_bytes <= 1e10
    assert (capacity == claimed) is (doubts == ())
    assert believed(capacity, BOARD) == (capacity, ())


def test_a_doubt_says_what_was_claimed() -> None:
    claimed = replace(
        device("d", memory_budget_bytes=64e9),
        forward_s_per_token_layer=1e-8,
        backward_s_per_token_layer=1.0,
    )

    _, doubts = believed(claimed, BOARD)

    assert doubts == (
        "its forward pass is 10000 times faster than its board",
        "its backward pass is 10000 times slower than its board",
        "it claims 8 times the memory of its board",
    )


@pytest.mark.parametrize(
    ("claimed_s", "observed_s", "scale"),
    [
        (10.0, 11.0, 1.0),
        (10.0, 9.5, 1.0),  # clocks differ
        (10.0, 100.0, 1.0),  # a lost connection
        (100.0, 10.0, 0.1),  # longer than it took
        (0.01, 300.0, 30_000.0),  # a thousandth of what it took
        (0.0, 5.0, 1.0),
        (5.0, math.inf, 1.0),
    ],
)
def test_times_that_cannot_be_true_are_those_that_were_observed(
    claimed_s: float, observed_s: float, scale: float
) -> None:
    assert scale_to_observed(claimed_s, observed_s) == pytest.approx(scale)
