"""One HTTP connection to the server, and how its failures are named.

httpx is loaded at the first request: an agent that waits for work does without it.
Knows status codes and retries; not what is asked.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from edge_agent.backoff import full_jitter
from edge_agent.fleet_tls import refused_by_server, tls_advice
from wire_protocol.errors import (
    DeviceError,
    FailureCode,
    ProtocolError,
    Refused,
    ServerUnavailable,
)

if TYPE_CHECKING:
    import httpx

_LONGEST_DETAIL = 300


Result = TypeVar("Result")


class Rejected(ProtocolError):
    """The server answered, and trying the same again is of no use.

    Args:
        status: the HTTP status.
        detail: what the server said.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True)
class Patience:
    """How long transfers are tried.

    Attributes:
        total_s: give up when no byte came through for so long.
        first_retry_s: upper bound of the first delay; doubles with every failure in a row.
        longest_retry_s: the upper bound never exceeds this.
        answer_s: a connection that is silent for so long is taken for dead.
    """

    total_s: float = 300.0
    first_retry_s: float = 0.5
    longest_retry_s: float = 20.0
    answer_s: float = 30.0


class Retries:
    """Waits between attempts of one transfer, until patience is over.

    Args:
        patience: how long.
        code: the failure that it ends with.
    """

    def __init__(self, patience: Patience, code: FailureCode) -> None:
        self._patience = patience
        self._code = code
        self._rng = random.Random()  # noqa: S311 - jitter, not a secret
        self._progress_at_s = anyio.current_time()
        self._furthest_bytes = 0
        self._failures = 0

    def arrived(self, offset_bytes: int) -> None:
        """So much of a file is through; no progress unless it is more than ever before.

        What is sent may still be lost on the way, but each byte of the file counts once, so that
        a link which swallows everything does not last for ever.
        """
        if offset_bytes > self._furthest_bytes:
            self._furthest_bytes = offset_bytes
            self.progressed()

    def progressed(self) -> None:
        """A byte came through: patience and backoff begin anew."""
        self._progress_at_s = anyio.current_time()
        self._failures = 0

    async def run(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Repeat ``attempt`` while the server cannot be reached.

        Raises:
            DeviceError: nothing came through for too long; says what went wrong last.
        """
        while True:
            outcome = await _outcome(attempt)
            if not isinstance(outcome, ServerUnavailable):
                return outcome
            await self._rest(outcome)

    async def _rest(self, error: ServerUnavailable) -> None:
        patience = self._patience
        waited_s = anyio.current_time() - self._progress_at_s
        if waited_s >= patience.total_s:
            raise DeviceError(
                self._code, f"gave up after {waited_s:.0f} s without progress: {error}"
            ) from error
        delay_s = full_jitter(
            self._failures,
            base_s=patience.first_retry_s,
            cap_s=patience.longest_retry_s,
            rng=self._rng,
        )
        self._failures += 1
        await anyio.sleep(min(delay_s, patience.total_s - waited_s))


async def _outcome(attempt: Callable[[], Awaitable[Result]]) -> Result | ServerUnavailable:
    try:
        return await attempt()
    except ServerUnavailable as error:
        return error


class ServerConnection:
    """Requests to one server.

    Args:
        url: e.g. ``http://server:8080``.
        token: sent as bearer token; None sends none.
        answer_s: a connection that is silent for so long is taken for dead.
        tls: whom to believe and what to present, for https; None trusts the system's authorities.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        answer_s: float,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._tls = tls
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._answer_s = answer_s
        self._opened: httpx.AsyncClient | None = None

    async def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.aclose()

    async def ask(
        self, method: str, path: str, *, json: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Exchange JSON.

        Raises:
            ServerUnavailable, Refused, Rejected: see ``stream``.
            ProtocolError: the answer is not a JSON object.
        """
        async with self.stream(method, path, json=json) as response:
            await response.aread()
            try:
                answer = response.json()
            except ValueError as error:
                raise ProtocolError(f"{self._url}{path} does not answer with JSON") from error
        if not isinstance(answer, dict):
            raise ProtocolError(f"{self._url}{path} does not answer with a JSON object")
        return answer

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: AsyncIterator[bytes] | None = None,
        json: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """Begin a request; the body of a good answer is read by the caller.

        Raises:
            ServerUnavailable: no connection, a broken one, or the server is in trouble (5xx).
            Refused: 401 or 403, or the server does not accept this device's certificate.
            Rejected: another 4xx.
        """
        import httpx  # noqa: PLC0415 - see the module's docstring

        try:
            async with self._client().stream(
                method, path, headers=headers, content=content, json=json
            ) as response:
                if response.status_code >= 300:
                    await response.aread()
                    _raise_for(response)
                yield response
        except httpx.TransportError as error:
            advice = tls_advice(error)
            if refused_by_server(error):
                raise Refused(f"{self._url} refuses this device: {advice}") from error
            raise ServerUnavailable(
                f"{self._url} does not answer: {advice or str(error) or type(error).__name__}"
            ) from error

    def _client(self) -> httpx.AsyncClient:
        import httpx  # noqa: PLC0415 - see the module's docstring

        if self._opened is None:
            self._opened = httpx.AsyncClient(
                base_url=self._url,
                headers=self._headers,
                timeout=httpx.Timeout(self._answer_s, connect=min(10.0, self._answer_s)),
                verify=self._tls or True,
            )
        return self._opened


def _raise_for(response: httpx.Response) -> None:
    status, detail = response.status_code, _detail(response)
    if status in (401, 403):
        raise Refused(f"the server refuses this device: {detail}")
    if status >= 500 or status in (408, 429):
        raise ServerUnavailable(f"the server is in trouble ({status}): {detail}")
    raise Rejected(status, f"the server says {status}: {detail}")


def _detail(response: httpx.Response) -> str:
    try:
        answer = response.json()
        text = answer.get("detail") if isinstance(answer, dict) else None
    except ValueError:
        text = None
    return " ".join(str(text or response.reason_phrase or "no reason given").split())[
        :_LONGEST_DETAIL
    ]
