"""The three ways to have an MQTT broker: embedded, a mosquitto child, or one that runs already.

Port and passwords of a broker that we run are kept in its folder, so that a server that comes back
is found by the devices that knew it.
"""

from __future__ import annotations

import json
import secrets
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import structlog

from broker_server.broker_address import BrokerAddress, Credentials
from broker_server.broker_ports import becomes_free, is_free, is_loopback, some_free_port
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
from broker_server.broker_tls import (
    RELOADED,
    MosquittoTls,
    check_host,
    check_with_own_certificate,
    end_session,
    tls_files,
)
from broker_server.pki import FleetPki
from broker_server.pki_x509 import server_name
from wire_protocol.durable import write_durably
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

    def apply_certificates(self, revoked: Sequence[str | None]) -> None:
        """Take its certificate and the list of revoked ones into use.

        Args:
            revoked: names of clients whose sessions must end; None for one that is not known.

        Raises:
            BrokerUnavailable: it did not; ask again.
            ConfigError: it cannot.
        """


def open_broker(
    choice: str,
    *,
    state_dir: Path,
    host: str = _LOOPBACK,
    port: int | None = None,
    pki: FleetPki | None = None,
) -> BrokerLauncher:
    """Read the broker setting.

    Args:
        choice: ``embedded``, ``mosquitto``, or a URL such as ``mqtts://user:password@host:8883``.
        state_dir: the server's; a broker of ours lives in ``broker`` below it.
        host: where mosquitto listens; the embedded broker is for loopback only.
        port: None takes a free one at the first start and keeps it.
        pki: with it, every connection is TLS with certificates of the fleet's authority.

    Raises:
        ConfigError: none of these, or one that cannot do TLS as wanted.
    """
    if choice == "embedded":
        if pki is not None:
            raise ConfigError(
                "the embedded broker cannot check certificates; with 'pki' set broker.kind to "
                "mosquitto or external"
            )
        if not is_loopback(host):
            raise ConfigError(
                f"the embedded broker has no access rules and must not listen on {host}; "
                "use mosquitto for devices on other machines"
            )
        return ChildBroker(EmbeddedBroker(), folder=state_dir / "broker", host=host, port=port)
    if choice == "mosquitto":
        program = Mosquitto() if pki is None else MosquittoTls(pki)
        return ChildBroker(program, folder=state_dir / "broker", host=host, port=port, pki=pki)
    if "://" in choice:
        return _external_broker(parse_broker_url(choice), pki)
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
        loopback_only=is_loopback(parts.hostname),
    )


def _external_broker(address: BrokerAddress, pki: FleetPki | None) -> ExternalBroker:
    if pki is None:
        return ExternalBroker(address)
    if not address.tls:
        raise ConfigError("with 'pki' the broker must be reached by TLS; set an mqtts:// URL")
    with_certificate = replace(address, tls_files=tls_files(pki, "server"))
    return ExternalBroker(with_certificate, session=server_name(pki.fleet))


class ExternalBroker:
    """A broker that somebody else runs.

    Args:
        address: where it is.
        tls: verifies its certificate; None takes the address's own.
        session: client id of the server's session, where the broker names clients by certificate
            and would not let a check have a session of its own.
    """

    def __init__(
        self,
        address: BrokerAddress,
        *,
        tls: ssl.SSLContext | None = None,
        session: str | None = None,
    ) -> None:
        self._address = address
        self._tls = tls or address.ssl_context()
        self._session = session

    def start(self) -> BrokerAddress:
        """Check that it answers."""
        check_that_it_answers(self._address, tls=self._tls, session=self._session)
        return self._address

    def stop(self) -> None:
        """Leave it alone."""

    @property
    def running(self) -> bool:
        """Not ours to say; the connection to it tells."""
        return True

    def apply_certificates(self, revoked: Sequence[str | None]) -> None:
        """Tell people: only whoever runs it can do that."""
        log.warning("external_broker_must_read_its_certificates_again", revoked=list(revoked))


class ChildBroker:
    """A broker that this server runs, and that ends with it.

    Args:
        program: which.
        folder: its private files: settings, passwords, log.
        host: where it listens.
        port: None takes a free one at the first start and keeps it.
        pki: what a program for TLS knows its clients by.
    """

    def __init__(
        self,
        program: BrokerProgram,
        *,
        folder: Path,
        host: str = _LOOPBACK,
        port: int | None,
        pki: FleetPki | None = None,
    ) -> None:
        self._program = program
        self._folder = folder
        self._host = host
        self._wanted_port = port
        self._pki = pki
        self._process = BrokerProcess(folder)
        # Restarts and revocations come from different threads.
        self._lock = threading.Lock()

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
        if self._pki is not None:
            check_host(self._pki, self._own_host)
        with self._lock:
            return self._start()

    def stop(self) -> None:
        """End the child and wait for it."""
        with self._lock:
            self._process.stop()

    def apply_certificates(self, revoked: Sequence[str | None]) -> None:
        """Reload and end sessions; start anew where sessions cannot be ended one by one."""
        with self._lock:
            # One that has died reads everything when it is started again.
            if self._pki is None or not self.running:
                return
            reloaded = self._process.reload(RELOADED)
            names = [name for name in revoked if name is not None]
            one_by_one = self._pki.can_issue and len(names) == len(revoked)
            if reloaded and one_by_one:
                address = self._address(_Kept.load(self._folder / "broker.json"))
                for name in names:
                    end_session(self._pki, address, name, time.time())
            elif revoked or not reloaded:
                # Everybody has to come back then, and those who may not do not.
                log.warning("broker_restarts_for_certificates", reloaded=reloaded)
                self._process.stop()
                self._start()

    def _start(self) -> BrokerAddress:
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
            if is_free(self._host, kept.port):
                break
        raise BrokerUnavailable(f"{self._program.name} ended or hung at its start: {words}")

    def _try(self, command: list[str], kept: _Kept) -> bool:
        listener = Listener(self._host, kept.port, (kept.server, kept.device), self._folder)
        for name, text in self._program.files(listener).items():
            write_durably(self._folder / name, text.encode(), site="server.broker_config")
        self._process.start(command)
        return self._answers(kept)

    def _answers(self, kept: _Kept) -> bool:
        address = self._address(kept)
        if self._pki is not None:
            address = check_with_own_certificate(self._pki, address)
        return wait_until_it_answers(address, still_running=lambda: self._process.running)

    def _choose_port(self, kept_port: int) -> int:
        port = self._wanted_port or kept_port
        # Our own port of before: a broker that was killed may hold it a moment longer.
        patience_s = _PORT_PATIENCE_S if port == kept_port else 0.0
        if port and becomes_free(self._host, port, patience_s):
            return port
        if self._wanted_port is not None:
            raise ConfigError(
                f"port {self._wanted_port} on {self._host} is taken by another program; "
                "stop it or choose another broker port"
            )
        if kept_port:
            log.warning("broker_port_taken", port=kept_port, host=self._host)
        return some_free_port(self._host)

    @property
    def _own_host(self) -> str:
        return _LOOPBACK if self._host in ("0.0.0.0", "::", "") else self._host  # noqa: S104 - compared

    def _address(self, kept: _Kept) -> BrokerAddress:
        secured = self._pki is not None
        return BrokerAddress(
            self._own_host,
            kept.port,
            server_credentials=None if secured else kept.server,
            device_credentials=None if secured else kept.device,
            tls=secured,
            tls_files=None if self._pki is None else tls_files(self._pki, "server"),
            loopback_only=is_loopback(self._host),
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
        write_durably(path, (json.dumps(content) + "\n").encode(), site="server.broker_login")
