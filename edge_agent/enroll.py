"""``edge-agent enroll``: how a device gets its identity.

    <identity>.pending/    device.key and request.json while the server has not decided;
                           then ca.pem, operator.pub and device.pem too, before it becomes
    <identity>/            the identity, by one rename
    <identity>.replaced/   the one of before, for the moment between two renames

The key is made here and never leaves. Before the server is told anything it has proved, with its
authority's certificate, that it is the one that the token was made by. Whatever interrupts this,
the next call goes on: with the same key while a request waits, or with the rename that was left.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import secrets
import shutil
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import anyio

from edge_agent.backoff import full_jitter
from edge_agent.fleet_tls import FleetContext, fleet_context
from edge_agent.identity import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    OPERATOR,
    Identity,
    identity_folder,
    load_identity,
)
from edge_agent.server_connection import Rejected, ServerConnection
from edge_agent.settings import AgentSettings
from edge_agent.state_dir import disk_error, write_durably
from edge_agent.x509 import (
    certificate_request,
    private_key_pem,
    public_key_of,
    read_certificate,
    read_private_key,
)
from wire_protocol.durable import move_into_place, remove_file, sync
from wire_protocol.errors import (
    AlreadyRunning,
    ConfigError,
    LegendError,
    ProtocolError,
    Refused,
    ServerUnavailable,
)

REQUEST = "request.json"
FIRST_POLL_S, LONGEST_POLL_S = 2.0, 10.0
_ANSWER_S = 30.0
_PINNED_DIGITS = 32


@dataclass(frozen=True)
class Ticket:
    """Where to enrol, and what lets us.

    Attributes:
        url: the server, https.
        secret: the half of the token that the server is shown.
        pin: the other half, the beginning of the sha256 of the server's authority.
    """

    url: str
    secret: str = field(repr=False)
    pin: str

    @classmethod
    def read(cls, url: str, token: str) -> Ticket:
        """Take a token apart.

        Raises:
            ConfigError: no https address, or not a token.
        """
        if not url.startswith("https://"):
            raise ConfigError(f"--url {url} does not begin with https://; an enrolment needs TLS")
        secret, _, pin = token.strip().partition(".")
        if not secret or len(pin) != _PINNED_DIGITS or set(pin) - set("0123456789abcdef"):
            raise ConfigError(
                "--token is not one of broker-server pki token; copy the whole line, both halves"
            )
        return cls(url.rstrip("/"), secret, pin)


@dataclass(frozen=True)
class Enrolment:
    """How it stands.

    Attributes:
        device_id: who asked.
        status: ``accepted`` or ``pending``.
        key: what an operator sees of the key, to compare.
        url: of the server.
    """

    device_id: str
    status: str
    key: str
    url: str

    def sentence(self, settings: AgentSettings) -> str:
        """What a person has to know, and what to do next."""
        if self.status == "pending":
            return (
                f"{self.device_id} waits with key {self.key}: an operator accepts it with legend "
                f"devices accept {self.device_id}; then run edge-agent enroll again"
            )
        place = identity_folder(settings)
        if not self.url:
            return f"{self.device_id} is enrolled already, with key {self.key} in {place}"
        line = f"{self.device_id} is enrolled, with key {self.key} in {place}"
        if settings.server.rstrip("/") == self.url:
            return f"{line}; start it: edge-agent start"
        return f"{line}; set 'server: {self.url}' in the settings, then: edge-agent start"


async def enroll(
    settings: AgentSettings, ticket: Ticket | None, *, wait_s: float, again: bool
) -> Enrolment:
    """Get this device its identity, or go on with getting it.

    Args:
        settings: name the device, and where its identity belongs.
        ticket: None goes on with the request that waits.
        wait_s: how long to wait for an operator.
        again: replace an identity that is there.

    Raises:
        ConfigError: nothing to go on with, another server than the token's, an identity is there.
        Refused: the server says no, and why.
        ServerUnavailable: it does not answer.
        AlreadyRunning: another ``enroll`` is at work.
        DeviceError: the disk is full or failed.
    """
    place = _Place(identity_folder(settings))
    with place.locked():
        place.finish_interrupted()
        goes_on = ticket is None and place.waits
        present = None if again or goes_on else place.present(settings.device_id)
        if present is not None:
            return Enrolment(present.device_id, "accepted", fingerprint(present.seed), "")
        ticket = place.begin(ticket)
        seed = place.key()
        tls = await _pinned(ticket, place, settings.fleet)
        answer = await _ask_until_decided(settings.device_id, ticket, seed, tls, wait_s)
        status = str(answer.get("status"))
        if status == "accepted":
            place.accept(answer, settings.device_id, time.time())
        elif status in ("rejected", "revoked"):
            place.give_up()
            raise Refused(_turned_away(settings.device_id, status))
        elif status != "pending":
            raise ProtocolError(f"the server answers with status {status[:40]!r}; update the older")
    return Enrolment(settings.device_id, status, fingerprint(seed), ticket.url)


def fingerprint(seed: bytes) -> str:
    """What a person compares with what the server shows."""
    return hashlib.sha256(public_key_of(seed)).hexdigest()[:16]


class _Place:
    """The folders of an identity that comes into being."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.pending = target.with_name(f"{target.name}.pending")
        self._replaced = target.with_name(f"{target.name}.replaced")

    @contextmanager
    def locked(self) -> Iterator[None]:
        try:
            self.target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self.target.with_name(f"{self.target.name}.lock")
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _give_to_owner_of(self.target.parent, lock)
        except OSError as error:
            raise ConfigError(
                f"cannot write in {self.target.parent}: {error.strerror}; run this as the user of "
                "the agent, or set 'state_dir'"
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise AlreadyRunning(
                    "another edge-agent enroll is at work on this device"
                ) from error
            yield
        except OSError as error:
            raise disk_error(self.target, error) from error
        finally:
            os.close(descriptor)

    @property
    def waits(self) -> bool:
        """Whether a request was made and not decided."""
        return (self.pending / REQUEST).exists()

    def present(self, device_id: str) -> Identity | None:
        """The identity that is there and good; a bad one is replaced without asking."""
        if not self.target.exists():
            return None
        try:
            return load_identity(self.target, device_id=device_id, now=time.time())
        except ConfigError:
            return None

    def begin(self, ticket: Ticket | None) -> Ticket:
        """Write down what is asked of whom, so that another call can go on."""
        request = self.pending / REQUEST
        if ticket is None:
            try:
                return Ticket(**json.loads(request.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise ConfigError(
                    "no enrolment waits on this device; give --url and --token"
                ) from error
        self.pending.mkdir(mode=0o700, exist_ok=True)
        sync(self.pending.parent)
        write_durably(request, json.dumps(asdict(ticket)).encode(), site="agent.enrolment")
        return ticket

    def key(self) -> bytes:
        """The key of the request that waits, made on the first call."""
        path = self.pending / KEY
        try:
            return read_private_key(path.read_text(encoding="ascii"))
        except FileNotFoundError:
            seed = secrets.token_bytes(32)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is damaged; delete {self.pending} and enrol anew") from error
        write_durably(path, private_key_pem(seed).encode(), site="agent.device_key")
        return seed

    def accept(self, answer: dict[str, object], device_id: str, now: float) -> None:
        """Write down what the server certified, check it, and put it in place."""
        operator = f"{answer.get('operator_public_key')}\n".encode()
        write_durably(self.pending / OPERATOR, operator, site="agent.operator_key")
        certificate = str(answer.get("certificate_pem")).encode()
        write_durably(self.pending / CERTIFICATE, certificate, site="agent.first_certificate")
        try:
            load_identity(self.pending, device_id=device_id, now=now)
        except ConfigError as error:
            (self.pending / CERTIFICATE).unlink()
            raise ProtocolError(
                f"the server sent an identity that is not usable: {error}"
            ) from error
        self._put_in_place()

    def finish_interrupted(self) -> None:
        """Put a complete identity in place; a call before this one ended right before that."""
        if (self.pending / CERTIFICATE).exists():
            self._put_in_place()
        if self.target.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)

    def give_up(self) -> None:
        """Forget the request and its key."""
        shutil.rmtree(self.pending)
        sync(self.pending.parent)

    def _put_in_place(self) -> None:
        remove_file(self.pending / REQUEST, site="agent.enrolment.done")
        for unfinished in self.pending.glob(".*.tmp"):
            unfinished.unlink()
        _give_to_owner_of(self.target.parent, self.pending, *self.pending.iterdir())
        if self.target.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            move_into_place(self.target, self._replaced, site="agent.identity.replaced")
        move_into_place(self.pending, self.target, site="agent.identity")
        shutil.rmtree(self._replaced, ignore_errors=True)


async def _pinned(ticket: Ticket, place: _Place, fleet: str) -> FleetContext:
    """Fetch the authority's certificate, check it against the token, and believe no one else.

    Raises:
        ConfigError: it is not the server that made the token, or it leads another fleet.
    """
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE  # what comes is checked against the token
    server = ServerConnection(ticket.url, token=None, answer_s=_ANSWER_S, tls=unverified)
    try:
        answer = await server.ask("GET", "/v1/ca")
        authority = read_certificate(str(answer.get("ca_pem")))
    except (ValueError, Rejected) as error:
        raise ConfigError(
            f"{ticket.url} has no authority of its own; is it a LEGEND server with a PKI?"
        ) from error
    finally:
        await server.close()
    digest = hashlib.sha256(authority.der).hexdigest()
    if not secrets.compare_digest(digest[:_PINNED_DIGITS], ticket.pin):
        raise ConfigError(
            f"{ticket.url} is not the server that made this token (its authority is "
            f"{digest[:_PINNED_DIGITS]}, the token's {ticket.pin}); check --url and --token: "
            "somebody may be in between. Nothing was sent"
        )
    if answer.get("fleet") != fleet:
        raise ConfigError(
            f"the server leads fleet {answer.get('fleet')!r}, this device belongs to {fleet!r}; "
            "set 'fleet' in the settings"
        )
    path = place.pending / AUTHORITY
    write_durably(path, ssl.DER_cert_to_PEM_cert(authority.der).encode(), site="agent.authority")
    return fleet_context(path, certain_s=float(authority.not_before))


async def _ask_until_decided(
    device_id: str, ticket: Ticket, seed: bytes, tls: FleetContext, wait_s: float
) -> dict[str, object]:
    """Ask until the server has decided, or the time is over.

    Raises:
        ServerUnavailable: it never answered.
    """
    request = {
        "device_id": device_id,
        "csr_pem": certificate_request(seed, device_id),
        "secret": ticket.secret,
    }
    server = ServerConnection(ticket.url, token=None, answer_s=_ANSWER_S, tls=tls)
    give_up_at = anyio.current_time() + wait_s
    rng = random.Random()  # noqa: S311 - jitter, not a secret
    answer: dict[str, object] = {}
    failure: LegendError | None = None
    try:
        for attempt in range(1_000_000):
            try:
                answer = await server.ask("POST", "/v1/enroll", json=request)
            except ServerUnavailable as error:
                failure = error
                if tls.clock_is_behind and attempt == 0:
                    continue  # the context has learnt it from this very attempt
            except Rejected as error:
                raise Refused(str(error)) from error
            left_s = give_up_at - anyio.current_time()
            if answer.get("status", "pending") != "pending" or left_s <= 0:
                break
            pause_s = full_jitter(
                min(attempt, 10), base_s=FIRST_POLL_S, cap_s=LONGEST_POLL_S, rng=rng
            )
            await anyio.sleep(min(pause_s, left_s))
    finally:
        await server.close()
    if not answer and failure is not None:
        raise failure
    return answer


def _turned_away(device_id: str, status: str) -> str:
    if status == "revoked":
        return (
            f"the key of {device_id!r} was revoked; enrol with a new token: broker-server pki token"
        )
    return (
        f"an operator rejected {device_id!r}; ask why, then enrol with a new token: "
        "broker-server pki token"
    )


def _give_to_owner_of(folder: Path, *paths: Path) -> None:
    """When root enrols, the files must be readable for the user that runs the agent."""
    if os.geteuid() != 0:
        return
    owner = folder.stat()
    for path in paths:
        os.chown(path, owner.st_uid, owner.st_gid)
