"""HTTPS with the fleet's certificates: whoever shows one is named to the application.

A certificate is optional in the handshake: operators come with tokens. What the application finds
in ``scope["extensions"]["legend.peer"]`` is a certificate of the fleet's authority that is valid
at the time of this very request; a revoked one is refused on connections that are open already.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import structlog
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from broker_server.pki import FleetPki
from wire_protocol.errors import ConfigError

log = structlog.get_logger()

PEER = "legend.peer"


@dataclass(frozen=True)
class Peer:
    """Who showed a certificate, and until when it is valid (seconds since 1970)."""

    name: str
    serial: int
    not_after: float


def serve_https(
    config: uvicorn.Config, pki: FleetPki, refused: Counter[str] | None = None
) -> ssl.SSLContext:
    """Make a server that is about to start speak TLS; returns what it does that with.

    Args:
        config: of the server.
        pki: the fleet's certificates.
        refused: counts requests of revoked and expired certificates.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    context = https_context(pki)
    config.http = protocol_with_peers(pki, Counter() if refused is None else refused)
    # Where uvicorn itself puts the context that it makes from files; ours can be reloaded.
    config.load()
    config.ssl = context
    return context


def https_context(pki: FleetPki) -> ssl.SSLContext:
    """What the HTTP server speaks TLS with.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_OPTIONAL
    pair = pki.pair("server")
    try:
        context.load_verify_locations(pki.ca_file)
        context.load_cert_chain(pair.certificate, pair.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"cannot serve HTTPS with {pair.certificate}: {error}") from error
    return context


def protocol_with_peers(pki: FleetPki, refused: Counter[str]) -> type[asyncio.Protocol]:
    """The HTTP protocol of uvicorn, with the peer of a connection added to its requests."""

    class PeerProtocol(H11Protocol):
        # The class above narrows its argument in the same way.
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            peer = peer_of(transport.get_extra_info("peercert"))
            if peer is not None:
                self.app = _NamesThePeer(self.app, peer, pki, refused)

    return PeerProtocol


def peer_of(certificate: dict[str, Any] | None) -> Peer | None:
    """Read what ``SSLSocket.getpeercert`` says about a verified certificate."""
    if not certificate:
        return None
    names = [
        value
        for part in certificate.get("subject", ())
        for key, value in part
        if key == "commonName"
    ]
    if len(names) != 1:
        return None
    return Peer(
        names[0],
        int(certificate["serialNumber"], 16),
        ssl.cert_time_to_seconds(certificate["notAfter"]),
    )


class _NamesThePeer:
    """Around the application, for one connection."""

    def __init__(self, app: ASGIApp, peer: Peer, pki: FleetPki, refused: Counter[str]) -> None:
        self._app = app
        self._peer = peer
        self._pki = pki
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = self._peer
        problem = None
        if self._pki.is_revoked(peer.serial):
            problem = "revoked"
        elif time.time() >= peer.not_after:
            problem = "expired"
        if problem is not None:
            self._refused[problem] += 1
            log.warning("request_refused", reason=problem, name=peer.name, path=scope["path"])
            detail = f"the certificate of {peer.name} is {problem}; enrol this device again"
            answer = JSONResponse({"error": "Refused", "detail": detail}, status_code=403)
            await answer(scope, receive, send)
            return
        named = {PEER: {"name": peer.name, "serial": peer.serial, "not_after": peer.not_after}}
        scope["extensions"] = {**scope.get("extensions", {}), **named}
        await self._app(scope, receive, send)
