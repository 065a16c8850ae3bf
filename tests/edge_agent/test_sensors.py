from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.sensors import (
    SensorReading,
    parse_get_throttled,
    parse_measure_temp,
    parse_tegrastats,
    read_sensors,
    read_thermal_zones,
    run_program,
)

if TYPE_CHECKING:
    from typing import Self

BOARDS = Path(__file__).parents[1] / "golden/boards"


@dataclass
class RecordedPrograms:
    """Plays back what the programs of a recorded board printed."""

    board: Path
    calls: list[str] = field(default_factory=list)

    def __call__(self, arguments: Sequence[str]) -> str | None:
        name = "tegrastats" if arguments[0] == "tegrastats" else "-".join(arguments)
        self.calls.append(name)
        file = self.board / f"programs/{name}.txt"
        return file.read_text() if file.exists() else None


@pytest.mark.parametrize(
    ("folder", "temperature_c", "power_w"),
    [
        ("jetson-tx2-jp4.6", 35.5, 1.649),
        ("jetson-nano-jp4.6", 37.0, 1.997),
        ("jetson-xavier-nx-jp5", 33.0, 3.528),
        ("jetson-agx-xavier-jp5", 38.75, 3.555),
        ("jetson-agx-orin-jp6", 52.968, 13.907),
        ("jetson-orin-nano-jp6", 58.25, 6.843),
    ],
)
def test_tegrastats_of_every_release_is_understood(
    folder: str, temperature_c: float, power_w: float
) -> None:
    reading = read_sensors(BOARDS / folder, RecordedPrograms(BOARDS / folder))
    assert reading.temperature_c == pytest.approx(temperature_c)
    assert reading.power_w == pytest.approx(power_w)


def test_the_triples_of_jetpack_7_are_understood() -> None:
    reading = parse_tegrastats(
        "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) SWAP 0/31408MB (cached 0MB) "
        "CPU [23%@2201,10%@2201] EMC_FREQ 3%@3199 GR3D_FREQ 12%@[1300,1300] VIC off APE 174 "
        "cpu@52.968C/52.968C gpu@47.625C/47.625C VDD_GPU_SOC 5139mW/5139mW/5139mW "
        "VDD_CPU_CV 3268mW/3268mW/3268mW VIN_SYS_5V0 5500mW/5500mW/5500mW"
    )
    assert reading == SensorReading(temperature_c=52.968, power_w=13.907)


def test_a_jetson_that_hides_its_rails_still_shows_its_temperature() -> None:
    reading = parse_tegrastats(
        "RAM 2130/7774MB (lfb 1004x4MB) SWAP 0/3887MB (cached 0MB) CPU [11%@1190,2%@1190] "
        "EMC_FREQ 0% GR3D_FREQ 0% AO@31C GPU@31.5C PMIC@100C AUX@31.5C CPU@33C thermal@31.95C"
    )
    assert reading == SensorReading(temperature_c=33.0)


def test_a_jetson_reports_its_power_mode_and_trip_points_beside_tegrastats() -> None:
    board = BOARDS / "jetson-xavier-nx-jp5"
    reading = read_sensors(board, RecordedPrograms(board))
    assert (reading.power_mode, reading.throttled) == ("MODE_20W_6CORE", False)


def test_without_tegrastats_the_thermal_zones_tell_the_temperature() -> None:
    programs = RecordedPrograms(BOARDS / "no-programs")
    reading = read_sensors(BOARDS / "jetson-xavier-nx-jp5", programs)
    assert programs.calls == ["tegrastats"]
    assert (reading.temperature_c, reading.power_w) == (33.0, None)


def test_a_pi_with_a_weak_supply_says_so_now_and_for_its_past() -> None:
    programs = RecordedPrograms(BOARDS / "rpi-4b-4gb")
    reading = read_sensors(BOARDS / "rpi-4b-4gb", programs)
    assert reading == SensorReading(
        temperature_c=82.3,
        throttled=True,
        throttle_flags=(
            "under_voltage",
            "throttled",
            "under_voltage_occurred",
            "throttled_occurred",
        ),
    )
    assert "tegrastats" not in programs.calls


def test_a_cool_pi_is_not_throttled() -> None:
    reading = read_sensors(BOARDS / "rpi-5-8gb", RecordedPrograms(BOARDS / "rpi-5-8gb"))
    assert reading == SensorReading(temperature_c=48.3, throttled=False)


def test_a_throttling_that_is_over_is_only_a_flag() -> None:
    assert parse_get_throttled("throttled=0xe0000\n") == (
        False,
        ("frequency_capped_occurred", "throttled_occurred", "soft_temperature_limit_occurred"),
    )


def test_a_pc_reports_its_hottest_zone_and_its_trip_point() -> None:
    reading = read_sensors(BOARDS / "x86-pc", RecordedPrograms(BOARDS / "x86-pc"))
    assert reading == SensorReading(temperature_c=51.0, throttled=False)


def test_a_zone_above_its_passive_trip_point_is_throttled(tmp_path: Path) -> None:
    zone = tmp_path / "sys/class/thermal/thermal_zone3"
    zone.mkdir(parents=True)
    texts = {
        "type": "gpu-thermal",
        "temp": "99500",
        "trip_point_0_type": "passive",
        "trip_point_0_temp": "99000",
        "trip_point_1_type": "critical",
        "trip_point_1_temp": "104500",
    }
    for name, text in texts.items():
        (zone / name).write_text(text + "\n")
    assert read_thermal_zones(tmp_path) == SensorReading(
        temperature_c=99.5, throttled=True, throttle_flags=("gpu-thermal_passive_trip",)
    )


def test_a_machine_without_any_sensor_reports_nothing(tmp_path: Path) -> None:
    reading = read_sensors(tmp_path, RecordedPrograms(tmp_path))
    assert reading == SensorReading()


@pytest.mark.parametrize("text", ["", "error=1", "throttled=yes", "temp=hot"])
def test_other_text_of_vcgencmd_is_no_reading(text: str) -> None:
    assert parse_get_throttled(text) is None
    assert parse_measure_temp(text) is None


@given(st.text(alphabet="RAMCPU@/%[]0123456789.-mWCVD_IN \n", max_size=120))
def test_noise_from_tegrastats_never_reads_as_an_impossible_temperature(text: str) -> None:
    reading = parse_tegrastats(text)
    assert reading.temperature_c is None or -40 < reading.temperature_c < 150


def test_jtop_speaks_only_for_the_running_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jtop", fake_jtop())
    here = read_sensors(Path("/"), lambda _arguments: None)
    assert (here.temperature_c, here.power_w, here.power_mode) == (47.5, 6.1, "15W")
    board = BOARDS / "rpi-5-8gb"
    assert read_sensors(board, RecordedPrograms(board)).temperature_c == 48.3


def test_a_jtop_whose_service_does_not_answer_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = fake_jtop(fails=True)
    monkeypatch.setitem(sys.modules, "jtop", module)
    reading = read_sensors(Path("/"), lambda _arguments: None)
    assert reading.power_w is None


def fake_jtop(*, fails: bool = False) -> types.ModuleType:
    """jetson-stats as its 4.x and later releases present themselves."""
    module = types.ModuleType("jtop")

    class JtopException(Exception):
        pass

    class Jtop:
        temperature = {  # noqa: RUF012 - a fake of a third party
            "cpu": {"online": True, "temp": 47.5},
            "cv0": {"online": False, "temp": -256},
        }
        power = {"rail": {}, "tot": {"power": 6100}}  # noqa: RUF012 - the same
        nvpmodel = types.SimpleNamespace(name="15W")

        def __enter__(self) -> Self:
            if fails:
                raise JtopException("The jtop.service is not active")
            return self

        def __exit__(self, *_details: object) -> None:
            return None

        def ok(self) -> bool:
            return True

    vars(module).update(JtopException=JtopException, jtop=Jtop)
    return module


def test_a_program_that_never_ends_is_read_until_time_is_up() -> None:
    endless = "echo 'RAM 1/2MB CPU@40C'; exec sleep 60"
    text = run_program(["sh", "-c", endless], timeout_s=1.0)
    assert text is not None
    assert parse_tegrastats(text).temperature_c == 40.0


def test_a_program_that_is_missing_or_fails_says_nothing() -> None:
    assert run_program(["no-such-program-on-this-board"]) is None
    assert run_program([sys.executable, "-c", "print('x'); raise SystemExit(1)"]) is None
