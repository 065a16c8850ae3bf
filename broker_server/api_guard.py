"""Who may speak to the API at all: the token, and how much may be said.

Runs before anything reads a body, so that a stranger can neither learn what a
request should look like nor fill the memory.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LARGEST_JSON_BYTES = 1024 * 1024
_STREAMED = ("/v1/blobs/", "/v1/probe")
"""Routes that read their body in pieces and bound it themselves."""


class Guard:
    """ASGI middleware in front of every route.

    Args:
        app: what is guarded.
        token: required as bearer token; None asks for none.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        given = headers.get("authorization", "").encode()
        if self._token and not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            return _error(401, "unauthorised", "this server wants a token; give the right one")
        if scope["method"] in ("GET", "HEAD") or scope["path"].startswith(_STREAMED):
            return None
        length = headers.get("content-length", "")
        if "chunked" in headers.get("transfer-encoding", "") or (
            length.isdecimal() and int(length) > LARGEST_JSON_BYTES
        ):
            limit = f"at most {LARGEST_JSON_BYTES} bytes with a Content-Length"
            return _error(413, "too_large", f"a request has {limit}")
        return None


def _error(status: int, code: str, detail: str) -> JSONResponse:
    return JSONResponse({"error": code, "detail": detail}, status_code=status)
