"""The HTTP routes of enrolment: two for devices that nobody knows yet, the rest for operators.

    GET  /v1/ca                          the authority; the device compares it with its token
    POST /v1/enroll                      a token and a signing request; asked again, how it went
    GET  /v1/enrolments                  who waits, and what was decided
    POST /v1/devices/{device_id}/accept  .../reject  .../revoke

Strangers are let in to the first two, so these are cheap to refuse: little may be sent, and an
address that shows bad tokens is soon asked to wait.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from broker_server.enrollment import Entry, Member, Status
from broker_server.enrollment_desk import Answer, EnrolmentDesk
from wire_protocol.errors import ProtocolError, Refused

LARGEST_REQUEST_BYTES = 16 * 1024
_ADDRESSES = 4096
_AT_ONCE = 4
"""Requests of strangers that are worked on at the same time; the others wait their turn."""


class EnrolRequest(BaseModel):
    """The body of ``POST /v1/enroll``."""

    model_config = ConfigDict(extra="ignore")
    device_id: Annotated[str, Field(min_length=1, max_length=48)]
    csr_pem: Annotated[str, Field(max_length=8192)]
    secret: Annotated[str, Field(min_length=1, max_length=200)]


class Patience:
    """How many bad requests an address may make: ``burst`` at once, then one each ``rest_s``.

    Pure: time is an argument. Remembers the addresses that were bad last, and not more of them
    than ``_ADDRESSES``.
    """

    def __init__(self, *, burst: int = 20, rest_s: float = 3.0) -> None:
        self._burst = burst
        self._rest_s = rest_s
        self._free_at: OrderedDict[str, float] = OrderedDict()

    def wait_s(self, address: str, now: float) -> float:
        """How long this address has to wait before it is listened to; 0: not at all."""
        owed_s = self._free_at.get(address, now) - now
        return max(0.0, owed_s - (self._burst - 1) * self._rest_s)

    def tried(self, address: str, now: float) -> None:
        """A bad request came from there."""
        self._free_at[address] = max(self._free_at.pop(address, now), now) + self._rest_s
        if len(self._free_at) > _ADDRESSES:
            self._free_at.popitem(last=False)


def enrolment_router(desk: EnrolmentDesk | None, *, operator_key: str) -> APIRouter:
    """The routes; who may use which is decided by the guard in front of them.

    Args:
        desk: decides; None: this server has no certificates, and says so.
        operator_key: public key in hex that enrolled devices believe.
    """
    routes = _Closed() if desk is None else _Routes(desk, operator_key)
    router = APIRouter()
    for method, path, handler in (
        ("GET", "/v1/ca", routes.authority),
        ("POST", "/v1/enroll", routes.enroll),
        ("GET", "/v1/enrolments", routes.enrolments),
        ("POST", "/v1/devices/{device_id}/accept", routes.accept),
        ("POST", "/v1/devices/{device_id}/reject", routes.reject),
        ("POST", "/v1/devices/{device_id}/revoke", routes.revoke),
    ):
        router.add_api_route(path, handler, methods=[method])
    return router


class _Closed:
    """What a server without certificates answers."""

    async def closed(self) -> dict[str, object]:
        """Say what is missing."""
        raise Refused(
            "this server has no certificates to give: broker-server pki init, then set 'pki'"
        )

    authority = enroll = enrolments = accept = reject = revoke = closed


class _Routes:
    def __init__(self, desk: EnrolmentDesk, operator_key: str) -> None:
        self._desk = desk
        self._operator_key = operator_key
        self._patience = Patience()
        self._turns = CapacityLimiter(_AT_ONCE)

    async def authority(self) -> dict[str, object]:
        """The certificate of the fleet's authority."""
        return {"ca_pem": self._desk.pki.ca_pem, "fleet": self._desk.pki.fleet}

    async def enroll(self, request: Request) -> dict[str, object]:
        """Ask to be let in, or how it went."""
        address = request.client.host if request.client else ""
        wait_s = self._patience.wait_s(address, time.monotonic())
        if wait_s > 0:
            detail = f"too many bad enrolment requests from this address; wait {wait_s:.0f} s"
            raise HTTPException(429, detail)
        try:
            asked = _parsed(await _body(request))
            answer = await to_thread.run_sync(
                self._desk.ask,
                asked.device_id,
                asked.csr_pem,
                asked.secret,
                time.time(),
                limiter=self._turns,
            )
        except (Refused, ProtocolError):
            self._patience.tried(address, time.monotonic())
            raise
        return self._told(answer)

    async def enrolments(self) -> dict[str, object]:
        """Who waits, and what was decided."""
        entries = await to_thread.run_sync(self._desk.entries)
        return {"enrolments": enrolment_list(entries, time.time())}

    async def accept(self, device_id: str) -> dict[str, object]:
        """Let a device in that waits."""
        return await self._decide(self._desk.accept, device_id, Status.ACCEPTED)

    async def reject(self, device_id: str) -> dict[str, object]:
        """Turn a device away that waits."""
        return await self._decide(self._desk.reject, device_id, Status.REJECTED)

    async def revoke(self, device_id: str) -> dict[str, object]:
        """Throw a device out."""
        return await self._decide(self._desk.revoke, device_id, Status.REVOKED)

    async def _decide(
        self, decision: Callable[[str, float], None], device_id: str, status: Status
    ) -> dict[str, object]:
        await to_thread.run_sync(decision, device_id, time.time())
        return {"device_id": device_id, "status": status.value}

    def _told(self, answer: Answer) -> dict[str, object]:
        pki = self._desk.pki
        told: dict[str, object] = {"status": answer.status.value, "fleet": pki.fleet}
        if answer.status is Status.ACCEPTED:
            told |= {
                "certificate_pem": answer.certificate_pem,
                "ca_pem": pki.ca_pem,
                "operator_public_key": self._operator_key,
            }
        return told


def enrolment_list(entries: dict[str, Entry], now: float) -> list[dict[str, object]]:
    """Every key of every name, for people and programs. Ages in seconds."""
    return [
        {
            "device_id": name,
            "status": member.status.value,
            "key": member.claim.fingerprint,
            "since_s": round(max(0.0, now - member.since), 1),
            "replaces": entry.accepted is not None and member is entry.pending,
        }
        for name, entry in entries.items()
        for member in _members(entry)
    ]


def _members(entry: Entry) -> list[Member]:
    return [member for member in (entry.inside, entry.outside) if member is not None]


async def _body(request: Request) -> bytes:
    """Read no more than anybody needs to enrol."""
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > LARGEST_REQUEST_BYTES:
            raise HTTPException(
                413, f"an enrolment request has at most {LARGEST_REQUEST_BYTES} bytes"
            )
    return content


def _parsed(content: bytes) -> EnrolRequest:
    try:
        return EnrolRequest.model_validate_json(content)
    except ValueError as error:
        raise ProtocolError(
            "an enrolment request is JSON with device_id, csr_pem and secret"
        ) from error
