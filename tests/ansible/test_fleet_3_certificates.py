"""Devices that are thrown out and let in again; certificates of a fleet that trains nothing."""

from __future__ import annotations

import pytest

from tests.ansible.fleet import BOARDS, IDENTITY, Fleet

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(3600)]


def test_certificates_are_renewed_and_the_server_goes_on(fleet: Fleet, training: bool) -> None:
    if training:
        pytest.skip("the same was done in the middle of a round")
    before = {name: fleet.serial(name) for name in BOARDS}
    shown = {port: fleet.presented(port) for port in (8300, 8883)}
    server = fleet.unit("server", "MainPID", "broker-server")
    fleet.play("rotate.yml")
    for name in BOARDS:
        assert fleet.serial(name) != before[name]
        fleet.wait_until_state(name, "online")
    assert all(fleet.presented(port) != certificate for port, certificate in shown.items())
    assert fleet.unit("server", "MainPID", "broker-server") == server


def test_a_revoked_device_is_refused_until_it_is_let_in_again(fleet: Fleet) -> None:
    key = fleet.lab.execute("orin", "sha256sum", f"{IDENTITY}/device.key")
    fleet.play("revoke.yml", "-e", "revoke_device=orin")
    fleet.wait_until_state("orin", "revoked")
    # It is told so and gives up, which leaves its starts for the day it is let in again.
    fleet.until(lambda: fleet.unit("orin", "ActiveState") == "failed", "the agent has ended")
    assert fleet.unit("orin", "ExecMainStatus") == "77"
    # The broker was restarted for it: the others come back, and this one does not.
    for name in ("pi", "pi5"):
        fleet.wait_until_state(name, "online")
    assert fleet.devices()["orin"]["state"] == "revoked"

    refused = fleet.try_play("site.yml", "--limit", "orin", "--tags", "identity")
    assert refused.returncode != 0
    assert "orin was revoked" in refused.stdout
    fleet.play("site.yml", "--limit", "orin", "-e", "device_identity_readmit=true")
    fleet.wait_until_state("orin", "online")
    assert fleet.lab.execute("orin", "sha256sum", f"{IDENTITY}/device.key") != key
