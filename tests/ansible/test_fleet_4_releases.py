"""New releases in batches, broken ones that stop at the canary, and the way back.

Without the training packages, whatever the fleet had: they take minutes and prove nothing here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ansible.fleet import BOARDS, Fleet, build_another_version, recap

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(3600)]

LIGHT = ("-e", json.dumps({"edge_agent_extras": [], "edge_agent_torch": ""}))
FIRST = "orin"
"""The canary: an inventory that is written in order of names begins with it."""


def _running(fleet: Fleet) -> dict[str, str]:
    """What each agent says that it is, in the process that systemd watches."""
    statuses = {name: fleet.status(name) for name in BOARDS}
    for name, status in statuses.items():
        assert str(status["pid"]) == fleet.unit(name, "MainPID")
    return {name: status["version"] for name, status in statuses.items()}


def _release(version: str, folder: Path) -> tuple[str, ...]:
    return ("-e", f"edge_agent_version={version}", "-e", f"edge_agent_wheel_dir={folder}", *LIGHT)


def test_releases_are_rolled_out_stopped_and_rolled_back(
    fleet: Fleet, tmp_path: Path, training: bool
) -> None:
    if not training:
        pytest.skip("LEGEND_LAB=short: no new releases")
    old = _running(fleet)[FIRST]
    link = ("readlink", "/opt/edge-agent/current")
    folder = fleet.lab.execute(FIRST, *link).removeprefix("releases/")
    good, broken = tmp_path / "good", tmp_path / "broken"
    build_another_version(good, "0.9.1")
    build_another_version(broken, "0.9.2", first_words="raise SystemExit('broken on purpose')")

    fleet.play("rollout.yml", *_release("0.9.1", good))
    assert _running(fleet) == dict.fromkeys(BOARDS, "0.9.1")

    pids = {name: fleet.unit(name, "MainPID") for name in BOARDS}
    impatient = ("-e", "edge_agent_health_timeout_s=30")
    answer = fleet.try_play("rollout.yml", *_release("0.9.2", broken), *impatient)
    assert answer.returncode != 0
    assert f"{FIRST} did not become healthy with 0.9.2" in answer.stdout
    assert list(recap(answer.stdout)) == [FIRST]
    assert _running(fleet) == dict.fromkeys(BOARDS, "0.9.1")
    untouched = set(BOARDS) - {FIRST}
    assert all(fleet.unit(name, "MainPID") == pids[name] for name in untouched)

    fleet.play("rollback.yml", "-e", f"rollback_version={folder}")
    assert _running(fleet) == dict.fromkeys(BOARDS, old)
    for name in BOARDS:
        fleet.wait_until_state(name, "online")
