from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

import profiles
from profiles.errors import ProfileError
from profiles.loader import board_ids, fleet_names, load_board, load_fleet
from profiles.schema import (
    Figure,
    FleetLink,
    FleetProfile,
    MbpsRange,
    json_schemas,
    write_json_schemas,
)

PACKAGE = Path(profiles.__file__).parent
TX2_GFLOPS = load_board("jetson-tx2").training_gflops.value


def figures(value: object) -> Iterator[Figure]:
    """Every Figure anywhere inside a profile."""
    if isinstance(value, Figure):
        yield value
    elif isinstance(value, BaseModel):
        for _, part in value:
            yield from figures(part)
    elif isinstance(value, tuple):
        for part in value:
            yield from figures(part)


def numbers_without_a_basis(value: Any, path: str = "") -> Iterator[str]:
    """Paths of plain numbers that do not stand beside a basis and a source."""
    if isinstance(value, dict):
        vouched = "basis" in value and "source" in value
        for key, part in value.items():
            if isinstance(part, (int, float)) and not vouched:
                yield f"{path}{key}"
            yield from numbers_without_a_basis(part, f"{path}{key}.")
    elif isinstance(value, list):
        for part in value:
            yield from numbers_without_a_basis(part, path)


def test_the_json_schemas_in_the_package_are_current(tmp_path: Path) -> None:
    write_json_schemas(tmp_path)
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    shipped = {file.name: file.read_text() for file in (PACKAGE / "schema").iterdir()}
    assert written == json_schemas() == shipped, "run: python -m profiles.schema"


@pytest.mark.parametrize(
    "file", sorted((PACKAGE / "boards").iterdir()), ids=lambda file: str(file.stem)
)
def test_every_board_file_is_valid_against_the_json_schema(file: Path) -> None:
    schema = json.loads((PACKAGE / "schema/board.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    "file", sorted((PACKAGE / "fleets").iterdir()), ids=lambda file: str(file.stem)
)
def test_every_fleet_file_is_valid_against_the_json_schema(file: Path) -> None:
    schema = json.loads((PACKAGE / "schema/fleet.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize("board_id", board_ids())
def test_every_figure_of_a_board_says_where_it_comes_from(board_id: str) -> None:
    found = list(figures(load_board(board_id)))
    assert len(found) >= 6
    assert all(figure.source.strip() for figure in found)


@pytest.mark.parametrize("board_id", board_ids())
def test_a_board_has_no_number_without_a_basis_but_its_nominal_memory(board_id: str) -> None:
    raw = load_board(board_id).model_dump(mode="json")
    assert list(numbers_without_a_basis(raw)) == ["memory_bytes"]


@pytest.mark.parametrize("board_id", board_ids())
def test_the_relative_speed_is_the_training_rate_over_that_of_the_tx2(board_id: str) -> None:
    board = load_board(board_id)
    ratio = board.training_gflops.value / TX2_GFLOPS
    assert board.relative_training_speed.value == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("board_id", board_ids())
def test_a_board_is_named_like_its_memory(board_id: str) -> None:
    board = load_board(board_id)
    last = board_id.rpartition("-")[2]
    if last.isdecimal() and board.vendor != "various":
        assert board.memory_bytes == int(last) * 2**30


def test_the_fleet_ratios_of_the_paper_hold_at_full_speed() -> None:
    speeds = [
        load_board(board_id).relative_training_speed.value
        for board_id in ("jetson-tx2", "jetson-xavier-nx-8", "jetson-agx-xavier-32")
    ]
    assert speeds == pytest.approx([1, 2.5, 6])


def test_the_tx2_rate_follows_from_the_recorded_forward_time() -> None:
    weights_per_layer = 4 * 768**2 + 2 * 768 * 3072
    operations = 2 * weights_per_layer * 12 * (4 * 256)
    assert pytest.approx(operations / 0.525 / 1e9, rel=0.01) == TX2_GFLOPS


def test_a_power_mode_slows_a_board_down_by_its_share() -> None:
    nano = load_board("jetson-nano")
    assert nano.flops_per_s("5W") == pytest.approx(0.694 * nano.flops_per_s("MAXN"))


def test_without_a_power_mode_the_default_one_counts() -> None:
    tx2 = load_board("jetson-tx2")
    assert tx2.flops_per_s(None) == tx2.flops_per_s("MAXP_CORE_ARM") < tx2.flops_per_s("MAXN")


def test_a_power_mode_is_found_under_the_name_that_nvpmodel_gives_it() -> None:
    orin = load_board("jetson-agx-orin-64")
    assert orin.mode("MODE_30W") is orin.mode("30w")


def test_an_unknown_power_mode_is_refused_with_the_modes_there_are() -> None:
    with pytest.raises(ProfileError, match=r"^jetson-nano has no power mode '9W'; .*MAXN, 5W$"):
        load_board("jetson-nano").flops_per_s("9W")


@pytest.mark.parametrize("name", fleet_names())
def test_a_fleet_names_as_many_devices_as_it_counts(name: str) -> None:
    fleet = load_fleet(name)
    ids = [device_id for group in fleet.devices for device_id in group.device_ids]
    assert len(set(ids)) == len(ids) == fleet.device_count


def test_the_paper_fleet_has_the_boards_of_the_paper() -> None:
    fleet = load_fleet("paper80")
    counts: dict[str, int] = {}
    for group in fleet.devices:
        counts[group.board] = counts.get(group.board, 0) + group.count
        assert group.power_mode is None
    assert counts == {"jetson-tx2": 30, "jetson-xavier-nx-8": 40, "jetson-agx-xavier-32": 10}
    assert fleet.mode_switch_rounds == 20


def test_the_demo_fleet_has_four_devices_in_small_steps_of_speed() -> None:
    fleet = load_fleet("demo4")
    speeds = {
        group.device_ids[0]: load_board(group.board).flops_per_s(group.power_mode)
        for group in fleet.devices
    }
    assert list(speeds) == ["pi5-kitchen", "nano-5w", "nano-roof", "nano-10w"]
    assert 1.5 < max(speeds.values()) / min(speeds.values()) < 2.5
    assert speeds["pi5-kitchen"] < speeds["nano-5w"] < speeds["nano-10w"]


def test_two_devices_of_one_name_are_refused() -> None:
    raw = load_fleet("demo4").model_dump()
    raw["devices"] = [*raw["devices"], raw["devices"][0]]
    with pytest.raises(ValidationError, match="two devices are called pi5-kitchen"):
        FleetProfile.model_validate(raw)


@given(low=st.floats(0.1, 100), factor=st.floats(1, 100), fraction=st.floats(0, 1))
def test_a_drawn_link_speed_lies_within_its_range(
    low: float, factor: float, fraction: float
) -> None:
    speed = MbpsRange(low=low, high=low * factor)
    link = FleetLink(up_mbps=speed, down_mbps=7, round_trip_ms=1, jitter=0)
    assert low <= link.up_mbps_at(fraction) * (1 + 1e-9)
    assert link.up_mbps_at(fraction) <= low * factor * (1 + 1e-9)
    assert link.down_mbps_at(fraction) == 7


def test_the_middle_of_a_link_range_is_its_geometric_mean() -> None:
    speed = MbpsRange(low=1, high=25)
    link = FleetLink(up_mbps=speed, down_mbps=speed, round_trip_ms=1, jitter=0)
    assert link.up_mbps_at(0.5) == pytest.approx(5)


def test_a_quantile_outside_0_to_1_is_refused() -> None:
    link = FleetLink(up_mbps=1, down_mbps=1, round_trip_ms=1, jitter=0)
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        link.up_mbps_at(1.5)
