"""The fleet that the tests of this folder share; they run in the order of their files' names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ansible.fleet import (
    HOSTS,
    TORCH,
    Fleet,
    build_wheel,
    traces,
    write_data,
    write_inventory,
)
from tests.ansible.lab import Lab, what_is_missing


@pytest.fixture(scope="session")
def training() -> bool:
    """Whether the fleet trains; without, provisioning takes a third of the time."""
    return os.environ.get("LEGEND_LAB", "") != "short"


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory, training: bool) -> tuple[Path, Path]:
    """The package's wheel, and every other one that hosts with Python 3.11 need."""
    dist, house = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("wheelhouse")
    wheel = build_wheel(dist)
    what = [f"{wheel}[server,train]", TORCH] if training else [f"{wheel}[server]"]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    options = ["--only-binary", ":all:", "--python-version", "3.11", "--dest", str(house)]
    subprocess.run([*pip, *options, *what], check=True)
    return dist, house


@pytest.fixture(scope="session")
def bare_fleet(wheels: tuple[Path, Path], training: bool) -> Iterator[Fleet]:
    """One server and three devices that differ in board, memory and processor; nothing on them."""
    if missing := what_is_missing():
        pytest.skip(missing)
    if shutil.which("ansible-playbook") is None:
        pytest.skip("ansible-playbook is not installed: pip install ansible-core")
    default = Path.home() / ".cache" / "legend-edge-lab"
    dist, house = wheels
    lab = Lab(Path(os.environ.get("LEGEND_LAB_DIR", default)), house)
    try:
        lab.start(list(HOSTS))
        write_data(lab)
        yield Fleet(lab, write_inventory(lab, dist, house, training=training))
    finally:
        lab.stop()


@pytest.fixture(scope="session")
def fleet(bare_fleet: Fleet) -> Fleet:
    """The same with everything on it: check mode on bare hosts first, which changes nothing."""
    bare_fleet.before = {host.name: traces(bare_fleet, host.name) for host in HOSTS}
    bare_fleet.play("site.yml", "--check", "--diff")
    for host in HOSTS:
        assert traces(bare_fleet, host.name) == bare_fleet.before[host.name]
    assert not bare_fleet.authority.exists()
    bare_fleet.play("site.yml")
    return bare_fleet
