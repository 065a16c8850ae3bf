"""Inventories of Ansible, read and written; Ansible itself is the judge where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from broker_server.fleet_inventory import Host, Site, read_inventory, write_inventory
from wire_protocol.errors import ConfigError

SITE = Site("10.0.0.10", 8300, "https://10.0.0.10:8300", "home", "0.1.0")
SAMPLE = Path(__file__).parents[2] / "ansible/inventory-sample.yml"
NESTED = """
all:
  hosts:
    pi-2: {ansible_host: 10.0.0.22}
  vars:
    fleet_token: !vault |
      $ANSIBLE_VAULT;1.1;AES256
      6162
  children:
    devices:
      vars: {edge_agent_device_id: "{{ inventory_hostname }}"}
      children:
        pis:
        jetsons:
          hosts:
            orin_lab: {edge_agent_device_id: orin-lab}
    server: {hosts: {fleet-server: {ansible_host: 10.0.0.10}}}
pis:
  hosts:
    pi-1: {ansible_host: "{{ somewhere }}"}
    pi-2:
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "inventory.yml"
    path.write_text(text, encoding="utf-8")
    return path


def as_ansible_reads(path: Path) -> dict[str, dict[str, Any]]:
    """Hosts of the group ``devices`` with their variables."""
    program = shutil.which("ansible-inventory") or shutil.which(
        "ansible-inventory", path=str(Path(sys.executable).parent)
    )
    if program is None:
        pytest.skip("ansible is not installed")
    done = subprocess.run(
        [program, "-i", str(path), "--list"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=path.parent,
    )
    found = json.loads(done.stdout)
    names: set[str] = set()
    pending = ["devices"]
    while pending:
        group = found.get(pending.pop(), {})
        names |= set(group.get("hosts", ()))
        pending += group.get("children", ())
    return {name: found["_meta"]["hostvars"].get(name, {}) for name in names}


def test_the_devices_of_the_sample_inventory_are_found() -> None:
    assert read_inventory(SAMPLE) == [
        Host("orin-lab", "orin-lab", "10.0.0.22"),
        Host("pi-kitchen", "pi-kitchen", "10.0.0.21"),
    ]


def test_groups_of_groups_and_variables_are_followed(tmp_path: Path) -> None:
    assert read_inventory(written(tmp_path, NESTED)) == [
        Host("orin_lab", "orin-lab"),
        Host("pi-1", "pi-1"),
        Host("pi-2", "pi-2", "10.0.0.22"),
    ]


def test_ansible_finds_the_same_hosts(tmp_path: Path) -> None:
    path = written(tmp_path, NESTED)
    assert {host.name for host in read_inventory(path)} == set(as_ansible_reads(path))


def test_what_is_written_is_an_inventory_for_ansible(tmp_path: Path) -> None:
    devices: list[dict[str, Any]] = [
        {"device_id": "pi", "board": "rpi-5-8", "state": "online", "address": "10.0.0.21"},
        {"device_id": "orin", "board": "x: {y\n#", "state": "lost", "datasets": {"a\nb": {}}},
        {"device_id": "new", "state": "expected", "address": ""},
    ]
    path = written(tmp_path, write_inventory(SITE, devices))
    hosts = as_ansible_reads(path)
    assert set(hosts) == {"pi", "orin", "new"}
    assert hosts["pi"]["ansible_host"] == "10.0.0.21"
    assert hosts["new"]["edge_agent_server"] == SITE.url
    assert "ansible_host" not in hosts["new"]


def test_a_server_without_devices_gives_an_inventory_too(tmp_path: Path) -> None:
    assert read_inventory(written(tmp_path, write_inventory(SITE, []))) == []


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", True), ("10.0.0.10", False)])
def test_an_address_that_devices_cannot_reach_is_pointed_out(host: str, warned: bool) -> None:
    site = Site(host, 8300, f"http://{host}:8300", "home", "0.1.0")
    assert ("Loopback" in write_inventory(site, [])) is warned


NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True) | st.sampled_from(
    ["7", "on", "yes", "null", "1e3", "0x10", "1-2"]
)
TEXT = st.text(max_size=40)


@given(st.dictionaries(NAMES, st.tuples(TEXT, TEXT), max_size=5))
def test_names_come_back_whatever_devices_say_about_themselves(
    devices: dict[str, tuple[str, str]],
) -> None:
    rows = [
        {"device_id": name, "board": board, "state": "online", "datasets": {data: {}}}
        for name, (board, data) in devices.items()
    ]
    document = yaml.safe_load(write_inventory(SITE, rows))
    assert set(document["devices"]["hosts"]) == set(devices)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "must be a mapping"),
        ("devices: [a]\n", "group devices must be a mapping"),
        ("devices: {hosts: [a, b]}\n", "must be a mapping, not a list"),
        ("devices: {hosts: {a: 3}}\n", "host a must be a mapping"),
        ("server: {hosts: {a: }}\n", "no group 'devices'"),
        ("", "no group 'devices'"),
        ("devices: {hosts: {Pi_1: }}\n", "set edge_agent_device_id"),
        ("devices: {hosts: {'pi[1:9]': }}\n", "ansible-inventory"),
        ("devices: {hosts: {a: {edge_agent_device_id: '{{ x }}'}}}\n", "only Ansible"),
        ("devices: {hosts: {a: , b: {edge_agent_device_id: a}}}\n", "a and b are both device a"),
        ("devices: {children: {x: {children: {devices: }}}}\n", "a child of itself"),
        ("devices: {hosts: {a: ", "is not YAML"),
        ("a: " * 30, "is not YAML"),
        ("devices: &a {children: *a}\n", "deep"),
        ("\x00", "is not YAML"),
    ],
)
def test_what_is_no_inventory_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        read_inventory(written(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_inventory(tmp_path / "none.yml")


@given(st.binary(max_size=200))
def test_no_file_whatever_is_in_it_ends_in_anything_but_our_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inventory.yml"
        path.write_bytes(content)
        with pytest.raises(ConfigError):
            read_inventory(path)
