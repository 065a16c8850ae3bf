"""Faults as input: one name for two devices, clocks that jump, a changed base model, a bad link."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from edge_agent.model_cache import folder_digest
from tests.support.replay import replayed_adapter
from tests.support.scripted_site import ScriptedSite, open_scripted_site
from tests.support.scripted_trainer import free, hold
from tests.support.tiny_models import LABELS
from wire_protocol.model_family import model_shape

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500)]

YEAR_S = 365.25 * 86400

SHIFTED_CLOCK = """
import datetime
import os
import time

_file, _seen = os.environ["CLOCK_FILE"], set()
_time, _datetime = time.time, datetime.datetime


def _shift():
    with open(_file) as file:
        shift = float(file.read() or 0)
    if shift not in _seen:
        _seen.add(shift)
        with open(_file + ".seen", "a") as file:
            file.write(f"{shift}\\n")
    return shift


class _Shifted(_datetime):
    @classmethod
    def now(cls, tz=None):
        return _datetime.fromtimestamp(time.time(), tz)


time.time = lambda: _time() + _shift()
time.time_ns = lambda: int(time.time() * 1e9)
datetime.datetime = _Shifted
"""
"""Imported by every Python as it starts: what this process reads as the time of day is wrong."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedSite]:
    with open_scripted_site(tmp_path_factory.mktemp("site"), "mosquitto") as site:
        site.start_agent("steady", broker=direct(site))
        site.wait_for_devices("steady")
        yield site


def direct(site: ScriptedSite) -> str:
    """The broker without a proxy in front of it."""
    assert site.address is not None
    return f"mqtt://{site.device_login()}@127.0.0.1:{site.address.port}"


def statuses(site: ScriptedSite, run_id: str) -> list[dict[str, str]]:
    """How each device's part ended, round by round; the result is right whoever took part."""
    run = site.wait_for_end(run_id)
    assert run["status"] == "finished", run["reason"]
    shape = model_shape(json.loads((site.folder / "tiny" / "config.json").read_text()))
    digest = replayed_adapter(site.store, run_id, shape, labels=len(LABELS))
    assert site.checkpoint(run_id).adapter.sha256 == digest
    return [
        {device["device_id"]: device["status"] for device in result["devices"]}
        for result in run["rounds"]
    ]


def test_two_agents_of_one_name_are_named_and_stop_nobody_else(site: ScriptedSite) -> None:
    site.start_agent("twin-a", device_id="twin", broker=direct(site))
    site.wait_for_devices("twin")
    site.start_agent("twin-b", device_id="twin", broker=direct(site))
    site.until(lambda: "device_id_used_twice" in site.log("server"), "the server says so")
    assert "two agents use this device id" in site.devices()["twin"]["note"]
    ended = statuses(site, site.launch_scripted(rounds=2))
    assert ended == [{"steady": "updated"}] * 2
    site.kill("twin-a")
    site.kill("twin-b")


def test_a_clock_that_jumps_by_ten_years_changes_nothing(site: ScriptedSite) -> None:
    clock = site.folder / "clock-shift"
    clock.write_text("0")
    (site.folder / "shifted").mkdir()
    (site.folder / "shifted" / "sitecustomize.py").write_text(SHIFTED_CLOCK)
    site.environment = {"PYTHONPATH": str(site.folder / "shifted"), "CLOCK_FILE": str(clock)}
    site.start_agent("clock")
    site.environment = {}
    site.wait_for_devices("clock")
    jumps = [10 * YEAR_S, -10 * YEAR_S]
    for number in (1, 2):
        hold(site.script, number, "clock")
    run_id = site.launch_scripted(rounds=2)
    for number, shift in enumerate(jumps, start=1):
        assignment = f"{run_id}.{number}-0.clock"
        site.until(lambda: site.status("clock")["busy_with"] == assignment, "it works")  # noqa: B023
        before = site.sids()
        clock.write_text(str(shift))
        site.mqtt_proxy.cut()
        site.wait_until_all_are_back(["clock"], after={"clock": before["clock"]})
        free(site.script, number)
    assert statuses(site, run_id) == [{"steady": "updated", "clock": "updated"}] * 2
    seen = (clock.parent / "clock-shift.seen").read_text().split()
    assert {float(line) for line in seen} >= set(jumps), "the agent read the wrong time"
    site.kill("clock")


def test_a_base_model_that_changed_on_the_device_is_put_right_before_it_is_used(
    site: ScriptedSite,
) -> None:
    folder = next((site.folder / "steady" / "cache" / "models").iterdir())
    weights = folder / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    (folder / "notes.txt").write_text("mine")
    assert statuses(site, site.launch_scripted(rounds=1)) == [{"steady": "updated"}]
    assert "base_model_was_changed" in site.log("steady")
    assert weights.read_bytes() == right
    assert folder_digest(folder) == folder.name


def test_a_device_whose_link_breaks_at_every_connection_stops_nobody(site: ScriptedSite) -> None:
    site.start_agent("flappy")
    site.wait_for_devices("flappy")
    proxy, over = site.mqtt_proxy, threading.Event()

    def flap() -> None:
        for _ in range(6):
            connections = proxy.connections
            proxy.cut()
            while proxy.connections == connections and not over.wait(0.05):
                pass

    flapping = threading.Thread(target=flap)
    flapping.start()
    try:
        ended = statuses(site, site.launch_scripted(rounds=3))
    finally:
        over.set()
        flapping.join()
    assert [one["steady"] for one in ended] == ["updated"] * 3
    site.wait_until_all_are_back(["flappy"], after={})
    calm = statuses(site, site.launch_scripted(rounds=1))
    assert calm == [{"steady": "updated", "flappy": "updated"}]
