"""What is left when everything was removed."""

from __future__ import annotations

import pytest

from tests.ansible.fleet import HOSTS, Fleet, traces

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(3600)]


def test_reset_leaves_no_file_user_unit_or_port_behind(fleet: Fleet) -> None:
    fleet.play("reset.yml", "-e", "reset_confirm=yes")
    for host in HOSTS:
        assert traces(fleet, host.name) == fleet.before[host.name]
    for name in ("pi", "pi5"):
        line = fleet.lab.execute(name, "cat", "/boot/firmware/cmdline.txt")
        assert "cgroup_enable" not in line
