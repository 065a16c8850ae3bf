"""The three ways to have an MQTT broker: embedded, a mosquitto child, or one that runs already.

Port and passwords of a broker that we run are kept in its folder, so that a server that comes back
is found by the devices that knew it.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import secrets
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import structlog

from broker_server.broker_address import BrokerAddress, Credentials
from broker_server.broker_process import (
    BrokerProcess,
    check_that_it_answers,
    wait_until_it_answers,
)
from broker_server.broker_programs import (
    DEVICE_USER,
    SERVER_USER,
    BrokerProgram,
    EmbeddedBroker,
    Listener,
    Mosquitto,
)
from wire_protocol.errors import BrokerUnavailable, ConfigError

log = structlog.get_logger()

_LOOPBACK = "127.0.0.1"
_PORT_CHOICES = 3
_PORT_PATIENCE_S = 3.0


class BrokerLauncher(Protocol):
    """A broker that this server needs. The methods block: call them in a thread."""

    def start(self) -> BrokerAddress:
        """Return once the broker accepts this server; starts it again if it has ended.

        Raises:
            ConfigError: wrong password, program not installed, port taken.
            BrokerUnavailable: it does not answer, or it ended at once.
        """

    def stop(self) -> None:
        """End what was started; harmless otherwise."""

    @property
    def running(self) -> bool:
        """False when the broker was started here and has ended."""


def open_broker(
    choice: str, *, state_dir: Path, host: str = _LOOPBACK, port: int | None = None
) -> BrokerLauncher:
    """Read the broker setting.

    Args:
        choice: ``embedded``, ``mosquitto``, or a URL such as ``mqtts://user:password@host:8883``.
        state_dir: the server's; a broker of ours lives in ``broker`` below it.
        host: where mosquitto listens; the embedded broker is for loopback only.
        port: None takes a free one at the first start and keeps it.

    Raises:
        ConfigError: none of these.
    """
    if choice == "embedded":
        if not _is_loopback(host):
            raise ConfigError(
                f"the embedded broker has no access rules and must not listen on {host}; "
                "use mosquitto for devices on other machines"
            )
        return ChildBroker(EmbeddedBroker(), folder=state_dir / "broker", host=host, port=port)
    if choice == "mosquitto":
        return ChildBroker(Mosquitto(), folder=state_dir / "broker", host=host, port=port)
    if "://" in choice:
        return ExternalBroker(parse_broker_url(choice))
    raise ConfigError(f"broker {choice!r} is not 'embedded', 'mosquitto' or an mqtt:// URL")


def parse_broker_url(url: str) -> BrokerAddress:
    """Read ``mqtt://[user:password@]host[:port]``; ``mqtts`` means TLS.

    Raises:
        ConfigError: anything else; the text of the error does not show the password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"the broker URL is wrong: {error}") from error
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.path not in ("", "/"):
        raise ConfigError(
            "a broker URL looks like mqtt://user:password@host:1883, or mqtts:// with TLS"
        )
    tls = parts.scheme == "mqtts"
    user = None
    if parts.username is not None:
        user = Credentials(unquote(parts.username), unquote(parts.password or ""))
    return BrokerAddress(
        parts.hostname,
        port or (8883 if tls else 1883),
        server_credentials=user,
        tls=tls,
        loopback_only=_is_loopback(parts.hostname),
    )


class ExternalBroker:
    """A broker that somebody else runs.

    Args:
        address: where it is.
        tls: verifies its certificate; None trusts the system's authorities.
    """

    def __init__(self, address: BrokerAddress, *, tls: ssl.SSLContext | None = None) -> None:
        self._address = address
        self._tls = tls or address.ssl_context()

    def start(self) -> BrokerAddress:
        """Check that it answers."""
        check_that_it_answers(self._address, tls=self._tls)
        return self._address

    def stop(self) -> None:
        """Leave it alone."""

    @property
    def running(self) -> bool:
        """Not ours to say; the connection to it tells."""
        return True


class ChildBroker:
    """A broker that this server runs, and that ends with it.

    Args:
        program: which.
        folder: its private files: settings, passwords, log.
        host: where it listens.
        port: None takes a free one at the first start and keeps it.
    """

    def __init__(
        self, program: BrokerProgram, *, folder: Path, host: str = _LOOPBACK, port: int | None
    ) -> None:
        self._program = program
        self._folder = folder
        self._host = host
        self._wanted_port = port
        self._process = BrokerProcess(folder)

    @property
    def running(self) -> bool:
        """Whether the child lives."""
        return self._process.running

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._process.pid

    def start(self) -> BrokerAddress:
        """Start it, or find it running; see ``BrokerLauncher``."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = _Kept.load(self._folder / "broker.json")
        if self._answers(kept):
            return self._address(kept)
        self._process.stop()
        command = self._program.command(self._folder)
        if self._process.end_orphan():
            log.info("orphaned_broker_ended", broker=self._program.name)
        for _ in range(_PORT_CHOICES):
            kept = kept.with_port(self._choose_port(kept.port))
            kept.save(self._folder / "broker.json")
            if self._try(command, kept):
                return self._address(kept)
            words = self._process.last_words()
            self._process.stop()
            # Between our look and its own bind, another program may take a port.
            if _is_free(self._host, kept.port):
                break
        raise BrokerUnavailable(f"{self._program.name} ended or hung at its start: {words}")

    def stop(self) -> None:
        """End the child and wait for it."""
        self._process.stop()

    def _try(self, command: list[str], kept: _Kept) -> bool:
        listener = Listener(self._host, kept.port, (kept.server, kept.device), self._folder)
        for name, text in self._program.files(listener).items():
            _write_private(self._folder / name, text)
        self._process.start(command)
        return self._answers(kept)

    def _answers(self, kept: _Kept) -> bool:
        address = self._address(kept)
        return wait_until_it_answers(address, still_running=lambda: self._process.running)

    def _choose_port(self, kept_port: int) -> int:
        port = self._wanted_port or kept_port
        # Our own port of before: a broker that was killed may hold it a moment longer.
        patience_s = _PORT_PATIENCE_S if port == kept_port else 0.0
        if port and _becomes_free(self._host, port, patience_s):
            return port
        if self._wanted_port is not None:
            raise ConfigError(
                f"port {self._wanted_port} on {self._host} is taken by another program; "
                "stop it or choose another broker port"
            )
        if kept_port:
            log.warning("broker_port_taken", port=kept_port, host=self._host)
        return _some_free_port(self._host)

    def _address(self, kept: _Kept) -> BrokerAddress:
        return BrokerAddress(
            _LOOPBACK if self._host in ("0.0.0.0", "::", "") else self._host,  # noqa: S104 - compared
            kept.port,
            server_credentials=kept.server,
            device_credentials=kept.device,
            loopback_only=_is_loopback(self._host),
        )


@dataclass(frozen=True)
class _Kept:
    """What must be the same after a restart. Port 0: none chosen yet."""

    port: int
    server: Credentials
    device: Credentials

    @classmethod
    def load(cls, path: Path) -> _Kept:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                int(content["port"]),
                Credentials(SERVER_USER, str(content[SERVER_USER])),
                Credentials(DEVICE_USER, str(content[DEVICE_USER])),
            )
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is unreadable; delete it to make new broker passwords"
            ) from error
        return cls(
            0,
            Credentials(SERVER_USER, secrets.token_urlsafe(24)),
            Credentials(DEVICE_USER, secrets.token_urlsafe(24)),
        )

    def with_port(self, port: int) -> _Kept:
        return _Kept(port, self.server, self.device)

    def save(self, path: Path) -> None:
        content = {
            "port": self.port,
            SERVER_USER: self.server.password,
            DEVICE_USER: self.device.password,
        }
        _write_private(path, json.dumps(content) + "\n")


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _some_free_port(host: str) -> int:
    # Below the ports of outgoing connections (32768 and up): a device on this machine that retries
    # a closed port among those can be given the same one, connect to itself, and so hold it.
    for _ in range(200):
        port = 20_000 + secrets.randbelow(10_000)
        if _is_free(host, port):
            return port
    raise ConfigError(f"found no free port on {host} between 20000 and 29999; choose a broker port")


def _becomes_free(host: str, port: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while not _is_free(host, port):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def _is_free(host: str, port: int) -> bool:
    try:
        socket.create_server((host, port), family=_family(host)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another address"
        ) from error
    return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
