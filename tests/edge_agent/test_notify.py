"""Talking to systemd, over real sockets."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """systemd's end, and what NOTIFY_SOCKET says."""
    name = f"legend-{uuid.uuid4().hex}"
    address = str(tmp_path / "notify") if request.param == "path" else "\0" + name
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.settimeout(5)
        yield receiver, address.replace("\0", "@")


def test_systemd_hears_every_message(manager: tuple[socket.socket, str]) -> None:
    receiver, address = manager
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready("connected")
    notifier.status("training\nround 3")
    notifier.watchdog()
    notifier.stopping("bye")
    assert [receiver.recv(200) for _ in range(4)] == [
        b"READY=1\nSTATUS=connected",
        b"STATUS=training round 3",
        b"WATCHDOG=1",
        b"STOPPING=1\nSTATUS=bye",
    ]


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_without_systemd_nothing_happens(environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    notifier.ready("connected")
    assert notifier.watchdog_interval_s is None


def test_a_manager_that_is_gone_does_no_harm(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).watchdog()


def test_the_watchdog_is_fed_twice_per_limit() -> None:
    assert Notifier({"WATCHDOG_USEC": "30000000"}).watchdog_interval_s == 15.0


def test_a_watchdog_that_is_meant_for_another_process_is_ignored() -> None:
    environ = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "17"}
    assert Notifier(environ, pid=18).watchdog_interval_s is None
    assert Notifier(environ, pid=17).watchdog_interval_s == 15.0


@pytest.mark.parametrize("text", ["", "0", "soon", "-1"])
def test_a_senseless_watchdog_limit_means_none(text: str) -> None:
    assert Notifier({"WATCHDOG_USEC": text}).watchdog_interval_s is None
