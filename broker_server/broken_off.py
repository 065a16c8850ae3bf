"""Requests that break off while the application is busy with them.

A device lost its link, or a body turned out to be no HTTP: nobody is there any more to read the
answer, or uvicorn has given it. Neither is an error of this program, and anybody could fill the
log with the traces of it.
"""

from __future__ import annotations

import h11
import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

log = structlog.get_logger()


class BrokenOff:
    """ASGI middleware around everything.

    Args:
        app: what it surrounds.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; uvicorn closes the connection of one without an answer."""
        try:
            await self._app(scope, receive, send)
        except (ClientDisconnect, h11.LocalProtocolError) as error:
            reason = str(error) or type(error).__name__
            log.info("request_broken_off", path=scope.get("path", "")[:200], reason=reason)
