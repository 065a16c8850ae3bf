"""kill -9 of every process in the middle of a round: the run ends, nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker_server.run_state import RoundResult
from broker_server.store import Store
from tests.support.site import Site, open_site
from wire_protocol.messages import UpdateManifest

pytestmark = [pytest.mark.e2e, pytest.mark.train]

SLOW = {"emulate": {"board": "jetson-nano", "time_dilation": 40000}}
"""Stretches a step of the tiny model to about a third of a second: time to be killed in."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("site")) as site:
        for name in ("left", "right"):
            site.start_agent(name, **slow_settings())
        site.wait_for_devices("left", "right")
        yield site


def slow_settings() -> dict[str, Any]:
    link = {"up_mbps": 1e7, "down_mbps": 1e7, "round_trip_ms": 0.0}
    return {"emulate": {**SLOW["emulate"], "link": link}}


def test_two_rounds_use_one_trainer_process(site: Site) -> None:
    before = {name: site.status(name)["trainer_starts"] for name in ("left", "right")}
    run = site.wait_for_end(site.launch(rounds=3))
    assert run["status"] == "finished"
    for name, starts in before.items():
        # The benchmark already started the child that then trained three rounds.
        assert starts == 1
        assert site.status(name)["trainer_starts"] == 1


def test_a_killed_trainer_is_a_named_failure_and_the_device_stays(site: Site) -> None:
    run_id = site.launch(rounds=2, local_steps=12)
    site.wait_until_training(run_id, "left")
    os.kill(site.trainer_pid("left"), signal.SIGKILL)
    run = site.wait_for_end(run_id)
    assert run["status"] == "finished"
    first, second = ({d["device_id"]: d for d in r["devices"]} for r in run["rounds"])
    assert first["left"]["status"] == "failed"
    assert "out_of_memory" in first["left"]["detail"]
    assert first["right"]["status"] == "updated"
    assert second["left"]["status"] == "updated"


def test_a_killed_agent_comes_back_into_the_same_round(site: Site) -> None:
    run_id = site.launch(rounds=1, local_steps=20)
    site.wait_until_training(run_id, "left")
    trainer = site.trainer_pid("left")
    site.kill("left")
    site.until(lambda: site.devices()["left"]["state"] == "lost", "the death is noticed")
    site.until(lambda: not Path(f"/proc/{trainer}").exists(), "no trainer is left behind")
    site.start_agent("left", **slow_settings())
    run = site.wait_for_end(run_id)
    assert run["status"] == "finished"
    statuses = {d["device_id"]: d["status"] for d in run["rounds"][0]["devices"]}
    assert statuses == {"left": "updated", "right": "updated"}


def test_a_killed_server_goes_on_and_keeps_what_it_acknowledged(site: Site) -> None:
    run_id = site.launch(rounds=2, local_steps=20)
    store = Store.in_folder(site.folder / "server")
    site.wait_until_training(run_id, "left")
    site.until(lambda: store.updates(run_id, 1), "a first update is acknowledged")
    acknowledged = store.updates(run_id, 1)
    site.kill("server")
    site.start_server()
    run = site.wait_for_end(run_id)
    assert run["status"] == "finished"
    assert len(run["rounds"]) == 2
    kept = store.updates(run_id, 1)
    assert {name: kept[name] for name in acknowledged} == acknowledged
    assert set(kept) == {"left", "right"}
    assert all(d["status"] == "updated" for r in run["rounds"] for d in r["devices"])


def test_ranks_that_a_run_learned_survive_a_killed_server(site: Site) -> None:
    options = {"ranks": "importance", "ranks_every": 1, "left_out_max": 0, "depth_min": 3}
    run_id = site.launch(rounds=3, local_steps=12, strategy_options=options)
    site.wait_until_training(run_id, "left", round_number=2)
    site.kill("server")
    site.start_server()
    run = site.wait_for_end(run_id)
    assert run["status"] == "finished", run["reason"]
    ranks = [{tuple(d["ranks"]) for d in one["devices"]} for one in run["rounds"]]
    assert all(len(found) == 1 for found in ranks)
    assert len(set().union(*ranks)) > 1
    assert {sum(found) for one in ranks for found in one} == {4 + 5 + 6}
    assert all(d["status"] == "updated" for r in run["rounds"] for d in r["devices"])


def test_every_update_was_counted_exactly_once(site: Site) -> None:
    store = Store.in_folder(site.folder / "server")
    for record in store.runs():
        for text in store.rounds(record.run_id):
            result = RoundResult.model_validate_json(text)
            stored = store.updates(record.run_id, result.round).values()
            manifests = [UpdateManifest.model_validate_json(one) for one in stored]
            updated = [device for device in result.devices if device.status == "updated"]
            assert len(updated) == len(manifests) > 0
            assert result.bytes_up == sum(one.update.size_bytes for one in manifests)
    for name in ("left", "right"):
        site.wait_for_empty_outbox(name)
