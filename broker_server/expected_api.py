"""The HTTP route of expected devices: ``PUT /v1/expected`` takes an inventory.

Answers how it differs from what the server knows and, if asked to, with an enrolment token for each
device that has no certificate; a token is shown this once.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from broker_server.expected_devices import ExpectedDevices
from wire_protocol.errors import ProtocolError
from wire_protocol.topics import check_name

DAY_S = 86_400.0
MOST_DEVICES = 10_000
_SERVERS_PREFIX = "legend-"
"""As in ``pki_x509``, which needs the cryptography package."""


def _device_id(name: str) -> str:
    try:
        check_name("device id", name)
    except ProtocolError as error:
        raise ValueError(str(error)) from error
    if name.startswith(_SERVERS_PREFIX):
        raise ValueError(f"device id {name!r} begins with {_SERVERS_PREFIX!r}, as servers do")
    return name


class Inventory(BaseModel):
    """The body of ``PUT /v1/expected``.

    Attributes:
        devices: device id -> address, which may be empty.
        tokens_ttl_s: seconds in which tokens must be used; None: make none.
    """

    model_config = ConfigDict(extra="forbid")
    devices: dict[
        Annotated[str, AfterValidator(_device_id)], Annotated[str, Field(max_length=253)]
    ] = Field(max_length=MOST_DEVICES)
    tokens_ttl_s: float | None = Field(None, ge=60, le=31 * DAY_S)


def expected_router(expected: ExpectedDevices) -> APIRouter:
    """The route; who may use it is decided by the guard in front of it."""

    async def expect(inventory: Inventory) -> dict[str, object]:
        """Expect these devices and no others."""
        ttl_s = inventory.tokens_ttl_s
        if ttl_s is not None:
            expected.check_enrolling()
        found = expected.take(inventory.devices)
        tokens = {}
        if ttl_s is not None:
            tokens = await to_thread.run_sync(lambda: expected.make_tokens(ttl_s=ttl_s))
        return {**asdict(found), "tokens": tokens}

    router = APIRouter()
    router.add_api_route("/v1/expected", expect, methods=["PUT"])
    return router
