"""Hostile HTTP requests for every route that an application's own OpenAPI names, from a seed."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

import httpx

from tests.support.mutations import TOKENS, mutated_bytes, mutated_json, nasty

SHA = "ab" * 32
BODIES: dict[str, bytes] = {
    "/v1/runs": json.dumps(
        {
            "name": "r", "model": "tiny", "dataset": "reviews", "labels": ["negative", "positive"],
            "strategy": "legend", "strategy_options": {"rank_min": 4}, "rounds": 2, "seed": 1,
            "evaluation": {"sha256": SHA, "size_bytes": 10},
        }
    ).encode(),
    "/v1/models": json.dumps(
        {"name": "m", "files": [{"path": "config.json", "sha256": SHA, "size_bytes": 2}]}
    ).encode(),
    "/v1/blobs": json.dumps({"sha256": SHA, "size_bytes": 10}).encode(),
}  # fmt: skip
PARAMETERS = (
    "x", "tiny", "", "..", "../../etc/passwd", "%2e%2e/x", "a/b", "\x00", "\r\nX: y", "é", "🦙",
    "'; drop table runs", "%", "%ff", SHA, SHA.upper(), "0" * 63, "9" * 40, "k" * 4000, "*", "nan",
)  # fmt: skip
HEADERS: tuple[tuple[str, str], ...] = (
    ("Upload-Offset", "0"), ("Upload-Offset", "9" * 5000), ("Upload-Offset", "-1"),
    ("Upload-Offset", "1e3"), ("Range", "bytes=0-"), ("Range", "bytes=-1"), ("Range", "bytes=9-1"),
    ("Range", "bytes=" + "0-0," * 900), ("Range", "lines=1"), ("Content-Type", "text/plain"),
    ("Content-Type", "multipart/form-data; boundary=x"), ("Content-Encoding", "gzip"),
    ("Authorization", "Bearer "), ("Authorization", "Bearer " + "x" * 4000), ("Host", "x:y:z"),
    ("Authorization", "Basic \xff"), ("If-None-Match", "*"), ("X-Forwarded-For", "127.0.0.1"),
    ("Expect", "100-continue"), ("Content-Type", "application/json; charset=utf-16"),
)  # fmt: skip
RAW: tuple[bytes, ...] = (
    b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET /v1/health HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 70_000 + b"\r\n\r\n",
    b"GET /v1/health HTTP/1.1\r\n" + b"a: b\r\n" * 9_000 + b"\r\n",
    b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n{}",
    b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
    b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    b"PATCH /v1/blobs/" + SHA.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    b"Upload-Offset: 0\r\n\r\nffffffffffffffff\r\nx",
    b"GET /v1/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    (b"GET /v1/health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
     b"Sec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n"),
    b"\x10\x0e\x00\x04MQTT\x04\x02\x00\x3c\x00\x02ab",
)  # fmt: skip


@dataclass(frozen=True)
class HostileRequest:
    """One request; the same for the same seed."""

    method: str
    path: str
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


def routes_of(openapi: dict[str, Any]) -> list[tuple[str, str]]:
    """Every (method, path) that an application describes."""
    return [
        (method.upper(), path)
        for path, operations in sorted(openapi["paths"].items())
        for method in sorted(operations)
    ]


def hostile_request(
    rng: random.Random, routes: Sequence[tuple[str, str]], known: Sequence[str] = ()
) -> HostileRequest:
    """A request for one of the routes, wrong in one way or several.

    Args:
        rng: the source of the case.
        routes: methods and path templates.
        known: path parameters that name something.
    """
    method, template = rng.choice(routes)
    path = template
    while "{" in path:
        head, _, rest = path.partition("{")
        value = rng.choice([*PARAMETERS, *known])
        path = head + quote(value, safe=rng.choice(("", "/%"))) + rest.partition("}")[2]
    if rng.random() < 0.4:
        names = ("device_id", "bytes", "limit", "since", "x")
        query = {name: _text(rng) for name in rng.sample(names, rng.randrange(1, 3))}
        path += "?" + urlencode(query, errors="replace")
    if rng.random() < 0.1:
        method = rng.choice(("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"))
    headers = [rng.choice(HEADERS) for _ in range(rng.choice((0, 0, 1, 2)))]
    body = b""
    if method in ("POST", "PUT", "PATCH", "DELETE"):
        sample = BODIES.get(template, rng.choice(list(BODIES.values())))
        body = mutated_json(rng, sample)
        if rng.random() < 0.3:
            body = mutated_bytes(rng, body, [sample])
        if not any(name == "Content-Type" for name, _ in headers):
            headers.append(("Content-Type", "application/json"))
    return HostileRequest(method, path, headers, body)


def send(http: httpx.Client, request: HostileRequest) -> httpx.Response | None:
    """Send it; None where the client itself cannot write such a request."""
    try:
        built = http.build_request(
            request.method,
            request.path,
            headers=[
                (name.encode("latin-1", "replace"), value.encode("latin-1", "replace"))
                for name, value in request.headers
            ],
            content=request.body,
        )
        return http.send(built)
    except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeError):
        return None


def send_raw(host: str, port: int, data: bytes) -> bytes:
    """Send bytes that are no request; returns the beginning of the answer, if there is one."""
    with socket.create_connection((host, port), timeout=5) as sock:
        sock.settimeout(0.5)
        try:
            sock.sendall(data)
            return sock.recv(4096)
        except (TimeoutError, ConnectionError):
            return b""


def raw_request(rng: random.Random) -> bytes:
    """Bytes for the port of an HTTP server."""
    data = rng.choice(RAW)
    return mutated_bytes(rng, data, [*RAW, *TOKENS]) if rng.random() < 0.5 else data


def _text(rng: random.Random) -> str:
    value = nasty(rng)
    return value if isinstance(value, str) else json.dumps(value)[:2000]
