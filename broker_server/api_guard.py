"""In front of every route: who asks, whether they may, and how much may be said.

Runs before anything reads a body, so that a stranger can neither learn what a request should look
like nor fill the memory. The rules are those of ``broker_server.access``.
"""

from __future__ import annotations

import hmac
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
import structlog
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from broker_server.access import (
    IDENTITY,
    LARGEST_STRANGERS_BYTES,
    NOBODY,
    Asked,
    Identity,
    ReadRights,
    Refusal,
    Role,
    Rule,
    Who,
    refusal_of,
    rule_for,
)
from broker_server.tokens import TokenStore
from wire_protocol.errors import ConfigError

log = structlog.get_logger()

HTTP_LIMITS: dict[str, Any] = {
    # A request's headers are a few hundred bytes; connections beyond this many get a 503.
    "h11_max_incomplete_event_size": 16 * 1024,
    "limit_concurrency": 4096,
    # Longer than clients keep theirs (5 s): nobody's next request meets a connection that closes.
    "timeout_keep_alive": 15,
    # Else a header of the request decides what the client's address is.
    "proxy_headers": False,
    "server_header": False,
}
"""For uvicorn."""

LONGEST_PAUSE_S = 60.0
"""A body that stops for so long is taken for a lost connection."""

PEER = "legend.peer"
_SERVERS_PREFIX = "legend-"
"""As in ``pki_x509``, which needs the cryptography package."""

_CODES = {
    401: "unauthorised",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
}


class Revocations(Protocol):
    """Knows which certificates must not be accepted any more."""

    def is_revoked(self, serial: int) -> bool:
        """Whether this one is among them."""


class LogShare:
    """Keeps strangers from filling the disk with log lines; everything is counted all the same.

    Pure: time is an argument.

    Args:
        most: lines of one kind in ``window_s`` seconds.
    """

    def __init__(self, most: int = 60, window_s: float = 60.0) -> None:
        self._most = most
        self._window_s = window_s
        self._began: dict[str, float] = {}
        self._said: Counter[str] = Counter()
        self._unsaid: Counter[str] = Counter()

    def take(self, kind: str, now: float) -> int | None:
        """How many of this kind were not said since the last one; None: do not say this one."""
        if now >= self._began.get(kind, -math.inf) + self._window_s:
            self._began[kind] = now
            self._said[kind] = 0
        if self._said[kind] >= self._most:
            self._unsaid[kind] += 1
            return None
        self._said[kind] += 1
        return self._unsaid.pop(kind, 0)


@dataclass
class Gate:
    """What is needed to say who asks and whether they may.

    Attributes:
        token: the one of the settings: operator, and every device where there is no PKI.
        tokens: those with names and roles.
        pki: None: devices show no certificates and are not told from operators.
        alone: only this machine can reach the API, so that it is open as long as no token exists.
        rights: what devices were given.
        refused: counts every refusal by its reason.
    """

    token: str | None
    tokens: TokenStore
    pki: Revocations | None
    alone: bool
    rights: ReadRights
    refused: Counter[str] = field(default_factory=Counter)
    _log_share: LogShare = field(default_factory=LogShare)

    def identify(self, scope: Scope) -> Identity | Refusal:
        """Who asks, from certificate and token; a bad one of either is a refusal."""
        device = self._device(scope)
        if isinstance(device, Refusal):
            return device
        given = Headers(scope=scope).get("authorization")
        try:
            if given is not None:
                return self._with_token(given, device)
            if device is not None:
                return Identity(device=device)
            if self.alone and self.token is None and not self.tokens.records():
                return Identity(role=Role.OPERATOR, name="(no token)", undivided=self.pki is None)
        except ConfigError as error:
            log.error("tokens_unreadable", error=str(error))
            return Refusal(503, "tokens_unreadable", "the server cannot read its tokens")
        return NOBODY

    def _device(self, scope: Scope) -> str | Refusal | None:
        peer = scope.get("extensions", {}).get(PEER) if self.pki else None
        if peer is None or self.pki is None:
            return None
        name = str(peer["name"])
        if self.pki.is_revoked(int(peer["serial"])):
            return Refusal(403, "revoked", f"the certificate of {name} is revoked")
        if name.startswith(_SERVERS_PREFIX):
            return Refusal(403, "not_a_device", f"{name} is no device")
        return name

    def _with_token(self, given: str, device: str | None) -> Identity | Refusal:
        scheme, _, secret = given.partition(" ")
        if scheme.lower() == "bearer" and secret:
            shown = secret.encode("latin-1")
            if self.token and hmac.compare_digest(shown, self.token.encode()):
                return Identity(device, Role.OPERATOR, "(settings)", self.pki is None)
            if record := self.tokens.find(secret):
                return Identity(device, record.role, record.name, self.pki is None)
        return Refusal(401, "bad_token", "this server wants a token; give the right one")

    def refuse(self, refusal: Refusal, scope: Scope) -> JSONResponse:
        """Count, log and word a refusal."""
        self.refused[refusal.reason] += 1
        unsaid = self._log_share.take(refusal.reason, time.monotonic())
        if unsaid is not None:
            log.warning(
                "request_refused",
                reason=refusal.reason,
                status=refusal.status,
                method=scope["method"][:20],
                path=scope["path"][:200],
                who=str(scope.get(IDENTITY, NOBODY)),
                client=(scope.get("client") or ("",))[0],
                unsaid_before=unsaid,
            )
        return answer_to(refusal)


def answer_to(refusal: Refusal) -> JSONResponse:
    """A refusal as HTTP."""
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
    error = _CODES.get(refusal.status, refusal.reason)
    content = {"error": error, "detail": refusal.detail}
    return JSONResponse(content, status_code=refusal.status, headers=headers)


class Guard:
    """ASGI middleware in front of every route.

    Args:
        app: what is guarded.
        gate: knows who may pass.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            self._gate.refused["not_http"] += 1
            await send({"type": "websocket.close", "code": 1008})
            return
        identity = self._gate.identify(scope)
        rule = rule_for(scope["method"], scope["path"])
        refusal = identity if isinstance(identity, Refusal) else self._judge(scope, identity, rule)
        if isinstance(identity, Identity):
            scope[IDENTITY] = identity
        if refusal is not None:
            await self._gate.refuse(refusal, scope)(scope, receive, send)
            return
        await self._app(scope, _impatient(receive), send)

    def _judge(self, scope: Scope, identity: Identity, rule: Rule | Refusal) -> Refusal | None:
        query = scope.get("query_string", b"").decode("latin-1")
        asked = Asked(scope["method"], scope["path"], query)
        return refusal_of(identity, asked, rule, self._gate.rights) or _too_much(scope, rule)


def _too_much(scope: Scope, rule: Rule | Refusal) -> Refusal | None:
    if not isinstance(rule, Rule) or rule.largest_body_bytes is None:
        return None
    limit = rule.largest_body_bytes
    if Who.ANYBODY in rule.who:
        limit = min(limit, LARGEST_STRANGERS_BYTES)
    headers = Headers(scope=scope)
    length = headers.get("content-length", "")
    if "chunked" in headers.get("transfer-encoding", "").lower() or (
        length.isdecimal() and int(length) > limit
    ):
        return Refusal(
            413, "too_large", f"a request has at most {limit} bytes with a Content-Length"
        )
    return None


def _impatient(receive: Receive) -> Receive:
    """The same, but a body that does not go on is over; a whole one leaves all the time."""
    complete = False

    async def next_message() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        with anyio.move_on_after(LONGEST_PAUSE_S):
            message = await receive()
            complete = not message.get("more_body", False)
            return message
        complete = True
        return {"type": "http.disconnect"}

    return next_message
