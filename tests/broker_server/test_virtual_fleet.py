"""Virtual devices: traces that depend on the seed and the round alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from broker_server.simulation_spec import Availability
from broker_server.virtual_fleet import BYTES_PER_MBIT, KEPT_VALUES, ModelCost, VirtualFleet
from profiles.loader import load_board, load_fleet
from profiles.schema import FleetProfile
from tests.support.simulations import FLEET
from wire_protocol.model_family import ModelShape
from wire_protocol.parts import DatasetReport

PROFILE = FleetProfile.model_validate(FLEET)
COST = ModelCost(ModelShape("bert", 3, 16, 16, 1000), "0" * 64, 10_000)


def test_equal_seeds_give_equal_traces_whatever_was_asked_before() -> None:
    asked, fresh = VirtualFleet(PROFILE, seed=3), VirtualFleet(PROFILE, seed=3)
    for number in range(1, 9):
        asked.conditions("tx2-1", number)
    for name in asked.devices:
        assert asked.conditions(name, 9) == fresh.conditions(name, 9)
    other = VirtualFleet(PROFILE, seed=4)
    assert other.conditions("tx2-1", 9) != fresh.conditions("tx2-1", 9)


def test_a_given_power_mode_stays_and_an_open_one_changes_only_between_periods() -> None:
    fleet = VirtualFleet(load_fleet("paper80"), seed=0)
    names = list(fleet.devices)
    modes = {number: [fleet.power_mode(name, number) for name in names] for number in range(1, 42)}
    assert all(modes[number] == modes[1] for number in range(1, 21))
    assert modes[21] != modes[1]
    assert modes[41] != modes[21]
    six = VirtualFleet(PROFILE, seed=0)
    assert {six.power_mode("pi-1", number) for number in range(1, 30)} == {"default"}


def test_speed_is_the_board_s_in_its_power_mode() -> None:
    fleet = VirtualFleet(PROFILE, seed=1)
    mode = fleet.power_mode("tx2-2", 5)
    expected = load_board("jetson-tx2").flops_per_s(mode)
    assert fleet.conditions("tx2-2", 5).flops_per_s == expected


@pytest.mark.parametrize("jitter", [None, 0.0])
def test_links_stay_in_their_range_and_vary_by_the_jitter(jitter: float | None) -> None:
    fleet = VirtualFleet(PROFILE, seed=1, link_jitter=jitter)
    share = 0.2 if jitter is None else jitter
    for name in ("tx2-1", "tx2-2", "tx2-3"):
        speeds = [fleet.conditions(name, number).up_bytes_per_s for number in range(1, 40)]
        assert min(speeds) >= 1 * BYTES_PER_MBIT * (1 - share)
        assert max(speeds) <= 10 * BYTES_PER_MBIT * (1 + share)
        assert max(speeds) / min(speeds) <= (1 + share) / (1 - share)
        assert (len(set(speeds)) > 1) is (share > 0)


def test_the_asked_share_of_the_fleet_is_hot_and_slower_for_some_rounds() -> None:
    calm = VirtualFleet(load_fleet("paper80"), seed=0)
    hot = VirtualFleet(load_fleet("paper80"), seed=0, availability=Availability(hot=0.25))
    speeds = {
        number: [
            hot.conditions(name, number).flops_per_s / calm.conditions(name, number).flops_per_s
            for name in hot.devices
        ]
        for number in range(1, 31)
    }
    drawn = [speed for of_round in speeds.values() for speed in of_round]
    assert set(drawn) == {0.5, 1.0}
    assert drawn.count(0.5) / len(drawn) == pytest.approx(0.25, abs=0.05)
    assert speeds[1] == speeds[3]
    assert speeds[3] != speeds[4]


def test_a_link_scale_changes_bandwidth_and_nothing_else() -> None:
    whole = VirtualFleet(PROFILE, seed=1).conditions("tx2-1", 2)
    quarter = VirtualFleet(PROFILE, seed=1, link_scale=0.25).conditions("tx2-1", 2)
    assert quarter.up_bytes_per_s == pytest.approx(whole.up_bytes_per_s / 4)
    assert quarter.down_bytes_per_s == pytest.approx(whole.down_bytes_per_s / 4)
    assert quarter.round_trip_s == whole.round_trip_s
    assert quarter.flops_per_s == whole.flops_per_s


def test_a_work_scale_multiplies_arithmetic_in_every_direction() -> None:
    scaled = replace(COST, work_scale=26.0)
    assert scaled.forward_s(10, 1e9) == pytest.approx(26 * COST.forward_s(10, 1e9))
    assert scaled.layers_s(10, 1e9) == pytest.approx(26 * COST.layers_s(10, 1e9))
    assert scaled.backward_s(10, 2, 1e9) == pytest.approx(26 * COST.backward_s(10, 2, 1e9))
    assert scaled.peak_memory_bytes(10, 2) == COST.peak_memory_bytes(10, 2)


def test_the_asked_share_of_assignments_is_lost() -> None:
    fleet = VirtualFleet(load_fleet("paper80"), seed=0, availability=Availability(dropout=0.25))
    moments = [fleet.lost_after(name, n, 0) for name in fleet.devices for n in range(1, 51)]
    lost = [moment for moment in moments if moment is not None]
    assert 0.23 < len(lost) / len(moments) < 0.27
    assert all(0 <= moment < 1 for moment in lost)
    steady = VirtualFleet(PROFILE, seed=0)
    assert all(steady.lost_after(name, n, 0) is None for name in steady.devices for n in range(9))


def test_devices_leave_and_come_back_between_periods_and_somebody_is_always_there() -> None:
    away = Availability(absent=0.5, absent_rounds=3)
    fleet = VirtualFleet(PROFILE, seed=0, availability=away)
    present = [fleet.present(number) for number in range(1, 31)]
    assert present[0] == present[1] == present[2]
    assert {name for names in present for name in names} == set(fleet.devices)
    assert any(len(names) < 6 for names in present)
    crowded = VirtualFleet(PROFILE, seed=0, availability=Availability(absent=0.999))
    assert all(crowded.present(number) for number in range(1, 31))


def test_a_birth_says_what_the_cost_model_of_the_strategies_reads() -> None:
    fleet = VirtualFleet(PROFILE, seed=0)
    birth = fleet.birth("pi-2", COST, ("train", DatasetReport(examples=9)))
    compute, now = birth.capability.compute, fleet.conditions("pi-2", 1)
    assert compute is not None
    # 2 operations per weight and token, forward or backward
    assert compute.forward_seconds_per_token_layer == pytest.approx(2000 / now.flops_per_s)
    assert compute.backward_seconds_per_token_layer == pytest.approx(2000 / now.flops_per_s)
    assert compute.memory_bytes_per_token_layer == 4 * 16 * KEPT_VALUES
    assert birth.capability.memory_budget_bytes == int(0.75 * load_board("rpi-4b-4").memory_bytes)
    assert COST.forward_s(10, 1000.0) == 3 * 10 * 2
    assert COST.backward_s(10, 2, 1000.0) == 2 * 10 * 2
