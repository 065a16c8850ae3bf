"""Ansible inventories: which devices one names, and one for the devices of a server.

Reads the YAML form and no more of it than that takes: hosts of the group ``devices`` and of its
children, with the variables ``edge_agent_device_id`` and ``ansible_host``. Knows no server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wire_protocol.errors import ConfigError, ProtocolError, one_line
from wire_protocol.topics import check_name

GROUP = "devices"
LARGEST_BYTES = 4 * 2**20
_DEEPEST = 20
_IN_FULL = "have Ansible write it out: ansible-inventory -i FILE --list --yaml"
_SAME_NAME = re.compile(r"\{\{\s*inventory_hostname\s*\}\}")


@dataclass(frozen=True)
class Host:
    """One device of an inventory.

    Attributes:
        name: its host name in the inventory.
        device_id: its name in the fleet.
        address: ``ansible_host``; empty when it has none.
    """

    name: str
    device_id: str
    address: str = ""


@dataclass(frozen=True)
class Site:
    """What an inventory says about the server.

    Attributes:
        host: where it is reached.
        port: of its HTTP API.
        url: the same as devices are told.
        fleet: its name.
        version: of its software.
    """

    host: str
    port: int
    url: str
    fleet: str
    version: str


def read_inventory(path: Path) -> list[Host]:
    """The devices that an inventory lists, by device id.

    Raises:
        ConfigError: it cannot be read, has no group ``devices``, or a host in it may not be a
            device.
    """
    try:
        content = path.read_bytes()
        if len(content) > LARGEST_BYTES:
            raise ConfigError(f"{path} is larger than {LARGEST_BYTES >> 20} MiB: no inventory")
        document = yaml.load(content, _Loader)  # noqa: S506 - a SafeLoader that knows less
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {one_line(error)}") from error
    groups = _groups(document, path)
    if GROUP not in groups:
        raise ConfigError(
            f"{path} has no group {GROUP!r} with hosts; see ansible/inventory-sample.yml"
        )
    found: dict[str, Host] = {}
    for name, variables in _hosts(groups, path).items():
        host = _host(name, variables, path)
        if host.device_id in found:
            other = found[host.device_id].name
            raise ConfigError(f"{path}: {other} and {name} are both device {host.device_id}")
        found[host.device_id] = host
    return [found[device_id] for device_id in sorted(found)]


def write_inventory(site: Site, devices: Iterable[Mapping[str, Any]]) -> str:
    """An inventory with which the playbooks of ``ansible/`` reach these devices.

    Args:
        site: the server.
        devices: as ``GET /v1/devices`` lists them, with ``address`` where it is known.
    """
    lines = [
        "---",
        f"# Fleet {site.fleet}, as its server knew it. Add what it does not know: addresses, the",
        "# password fleet_token, and the files of datasets. ansible/inventory-sample.yml has more.",
        "all:",
        "  vars:",
        f"    fleet_version: {_quoted(site.version)}",
        '    edge_agent_version: "{{ fleet_version }}"',
        '    broker_server_version: "{{ fleet_version }}"',
        "",
        "server:",
        *["  # Loopback is no address for devices: write the server's own."]
        * _is_loopback(site.host),
        "  hosts:",
        "    fleet-server:",
        f"      ansible_host: {_quoted(site.host)}",
        "  vars:",
        f"    broker_server_host: {_quoted(site.host)}",
        f"    broker_server_port: {site.port}",
        f"    broker_server_fleet: {_quoted(site.fleet)}",
        "",
        f"{GROUP}:",
    ]
    hosts = [line for device in devices for line in _device_lines(device)]
    lines += ["  hosts:", *hosts] if hosts else ["  hosts: {}"]
    lines += [
        "  vars:",
        f"    edge_agent_server: {_quoted(site.url)}",
        f"    edge_agent_fleet: {_quoted(site.fleet)}",
    ]
    return "\n".join(lines) + "\n"


def _device_lines(device: Mapping[str, Any]) -> Iterator[str]:
    board = str(device.get("board") or "")
    about = [f"board {board}"] if board else []
    about += [str(device["state"])] if device.get("state") else []
    about += (
        [f"has data: {', '.join(sorted(device['datasets']))}"] if device.get("datasets") else []
    )
    address = str(device.get("address") or "")
    name = str(device["device_id"])
    # A device may be called 7 or on, which YAML takes for something else.
    key = name if yaml.safe_load(name) == name else _quoted(name)
    yield f"    {key}:" + ("" if address else " {}") + _comment("; ".join(about))
    if address:
        yield f"      ansible_host: {_quoted(address)}"


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _comment(text: str) -> str:
    # A device wrote part of it: a line break would end the comment.
    return f"  # {one_line(text)}" if text else ""


def _quoted(text: str) -> str:
    """A YAML string whatever is in it; JSON is YAML."""
    return json.dumps(text)


class _Loader(yaml.SafeLoader):
    """Knows the tags that Ansible adds, as nothing: what is encrypted stays so."""


def _unknown(_loader: yaml.SafeLoader, _suffix: str, _node: yaml.Node) -> None:
    return None


_Loader.add_multi_constructor("!", _unknown)


def _groups(document: object, path: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Every mention of every group: at the top, and below ``children``."""
    found: dict[str, list[Mapping[str, Any]]] = {}

    def collect(groups: object, depth: int) -> None:
        if groups is None:
            return
        if not isinstance(groups, dict) or depth > _DEEPEST:
            raise ConfigError(f"{path}: groups must be a mapping of names, at most {_DEEPEST} deep")
        for name, group in groups.items():
            if group is not None and not isinstance(group, dict):
                raise ConfigError(f"{path}: group {one_line(name)} must be a mapping")
            found.setdefault(str(name), []).append(group or {})
            collect((group or {}).get("children"), depth + 1)

    collect(document, 0)
    return found


def _hosts(groups: dict[str, list[Mapping[str, Any]]], path: Path) -> dict[str, dict[str, Any]]:
    """Hosts of the group and of its children, each with its variables.

    As Ansible has it: a child group's variables win over its parent's, a host's own over both, and
    these may stand in any group that names the host.
    """
    of_groups: dict[str, dict[str, Any]] = {}

    def walk(name: str, inherited: Mapping[str, Any], above: frozenset[str]) -> None:
        if name in above:
            raise ConfigError(f"{path}: group {one_line(name)} is a child of itself")
        mentions = groups.get(name, [])
        shared = dict(inherited)
        for mention in mentions:
            shared |= _mapping(mention.get("vars"), f"vars of {name}", path)
        for mention in mentions:
            for host in _mapping(mention.get("hosts"), f"hosts of {name}", path):
                of_groups.setdefault(str(host), {}).update(shared)
            for child in _mapping(mention.get("children"), f"children of {name}", path):
                walk(str(child), shared, above | {name})

    walk(GROUP, {}, frozenset())
    for mentions in groups.values():
        for mention in mentions:
            for host, own in _mapping(mention.get("hosts"), "hosts", path).items():
                if str(host) in of_groups:
                    of_groups[str(host)].update(_mapping(own, f"host {host}", path))
    return of_groups


def _mapping(value: object, what: str, path: Path) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {one_line(what)} must be a mapping, not a list")
    return value


def _host(name: str, variables: Mapping[str, Any], path: Path) -> Host:
    where = f"{path}: host {one_line(name, longest=60)}"
    if "[" in name:
        raise ConfigError(f"{where} stands for several; {_IN_FULL}")
    device_id = _SAME_NAME.sub(name, str(variables.get("edge_agent_device_id") or name))
    if "{{" in device_id:
        raise ConfigError(f"{where} has a device id that only Ansible can work out; {_IN_FULL}")
    try:
        check_name("device id", device_id)
    except ProtocolError as error:
        raise ConfigError(f"{where}: {error}; set edge_agent_device_id") from error
    address = variables.get("ansible_host")
    return Host(name, device_id, "" if address is None or "{{" in str(address) else str(address))
