"""In front of the API: identities from certificates and tokens, as the server would see them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from broker_server import api_guard
from broker_server.access import RULES, Role, Who
from broker_server.api import make_api
from broker_server.api_guard import Gate, Guard, LogShare
from broker_server.grants import Assignment, Grants
from broker_server.tokens import TokenStore
from tests.broker_server.test_api import ask, server  # noqa: F401 - fixtures

BLOB = "a" * 64


class Revoked:
    """The serial 666 is revoked."""

    def is_revoked(self, serial: int) -> bool:
        return serial == 666


class Api:
    """The guard around an application that says who got through."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __call__(
        self,
        path: str = "/v1/runs",
        *,
        method: str = "GET",
        peer: tuple[str, int] | None = None,
        token: str | None = None,
        **more: Any,
    ) -> httpx.Response:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            body = str(scope["legend.identity"]).encode()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})

        async def tls(scope: Scope, receive: Receive, send: Send) -> None:
            if peer:
                scope["extensions"] = {"legend.peer": {"name": peer[0], "serial": peer[1]}}
            await Guard(app, self.gate)(scope, receive, send)

        async def send_it() -> httpx.Response:
            headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
            headers |= more.pop("headers", {})
            transport = httpx.ASGITransport(tls)
            async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
                return await client.request(method, path, headers=headers, **more)

        return anyio.run(send_it)


@pytest.fixture
def tokens(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path)


@pytest.fixture
def api(tokens: TokenStore) -> Api:
    grants = Grants()
    grants.record("pi", Assignment("a", frozenset({BLOB}), 10))
    return Api(Gate("master", tokens, Revoked(), alone=True, rights=grants))


def test_a_certificate_makes_a_device_and_no_operator(api: Api) -> None:
    assert api("/v1/join?device_id=pi", peer=("pi", 1)).text == "device pi"
    assert api("/v1/runs", peer=("pi", 1)).status_code == 403
    assert api(f"/v1/blobs/{BLOB}", peer=("pi", 1)).status_code == 200
    assert api(f"/v1/blobs/{BLOB}", peer=("nano", 2)).status_code == 403


def test_a_revoked_certificate_is_refused_whatever_else_is_shown(api: Api) -> None:
    for token in (None, "master"):
        for path in ("/v1/join?device_id=pi", "/v1/runs", "/v1/ca", "/nowhere"):
            answer = api(path, peer=("pi", 666), token=token)
            assert (answer.status_code, answer.json()["error"]) == (403, "forbidden")
    assert api.gate.refused["revoked"] == 8


def test_the_certificate_of_the_server_or_the_broker_is_no_device(api: Api) -> None:
    for name in ("legend-server-home", "legend-broker-home"):
        assert api(f"/v1/join?device_id={name}", peer=(name, 1)).status_code == 403
    assert api.gate.refused["not_a_device"] == 2


@pytest.mark.parametrize("token", ["", "wrong", "master ", "Master", "master\t", "\xe9"])
def test_a_wrong_token_is_refused_even_with_a_certificate(api: Api, token: str) -> None:
    for peer in (None, ("pi", 1)):
        answer = api("/v1/join?device_id=pi", peer=peer, headers=_bearer(token))
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"


def _bearer(token: str) -> dict[bytes, bytes]:
    return {b"Authorization": b"Bearer " + token.encode("latin-1")}


def test_other_ways_to_show_a_token_are_refused(api: Api) -> None:
    for given in ("master", "Basic master", "Token master", ""):
        assert api(headers={"Authorization": given}).status_code == 401


def test_roles_come_from_the_token_file_while_the_server_runs(api: Api, tokens: TokenStore) -> None:
    viewer = tokens.create("dashboard", Role.VIEWER, 1.0)
    assert api(token=viewer).text == "viewer dashboard"
    assert api(method="POST", token=viewer).status_code == 403
    assert api("/v1/join?device_id=pi", token=viewer).status_code == 403
    tokens.revoke("dashboard", 2.0)
    assert api(token=viewer).status_code == 401


def test_with_certificates_an_operator_is_no_device(api: Api) -> None:
    assert api("/v1/join?device_id=pi", token="master").status_code == 403
    assert api("/v1/runs", method="POST", token="master").status_code == 200
    assert api("/v1/join?device_id=pi", token="master", peer=("pi", 1)).status_code == 200


def test_without_any_token_loopback_is_open_to_people_and_not_to_devices(
    api: Api, tokens: TokenStore
) -> None:
    api.gate.token = None
    assert api("/v1/runs").status_code == 200
    assert api("/v1/runs", peer=("pi", 1)).status_code == 403
    assert api("/v1/join?device_id=pi").status_code == 403
    api.gate.alone = False
    assert api("/v1/runs").status_code == 401


def test_revoking_the_last_token_does_not_open_the_server(api: Api, tokens: TokenStore) -> None:
    api.gate.token = None
    tokens.create("ann", Role.OPERATOR, 1.0)
    tokens.revoke("ann", 2.0)
    assert api("/v1/runs").status_code == 401


def test_a_damaged_token_file_lets_nobody_in_by_its_tokens(
    api: Api, tokens: TokenStore, tmp_path: Path
) -> None:
    api.gate.token = None
    (tmp_path / "tokens.json").write_text("{")
    for token in (None, "x"):
        assert api("/v1/runs", token=token).status_code == 503
    assert api("/v1/join?device_id=pi", peer=("pi", 1)).status_code == 200, "devices need none"
    api.gate.token = "master"
    assert api("/v1/runs", token="master").status_code == 200


def test_without_a_pki_what_claims_to_be_a_certificate_means_nothing(api: Api) -> None:
    api.gate.pki = None
    assert api("/v1/join?device_id=pi", peer=("pi", 1)).status_code == 401
    assert api("/v1/join?device_id=pi", token="master").status_code == 200


def test_a_refusal_is_counted_and_logged_without_what_was_shown(
    api: Api, tokens: TokenStore
) -> None:
    viewer = tokens.create("dashboard", Role.VIEWER, 1.0)
    with capture_logs() as logs:
        api("/v1/runs?token=master", method="POST", token="Master-of-nothing")
        api("/v1/runs?token=master", method="POST", token=viewer)
        api("/nowhere", token=viewer)
        api("/v1/runs")
    assert api.gate.refused == {"bad_token": 1, "role": 1, "unknown_route": 1, "no_credentials": 1}
    assert [line["reason"] for line in logs] == list(api.gate.refused)
    said = repr(logs)
    assert "master" not in said.lower()
    assert viewer not in said
    assert "dashboard" in said


def test_a_flood_of_refusals_is_counted_in_full_and_logged_in_part(api: Api) -> None:
    with capture_logs() as logs:
        for _ in range(100):
            api("/v1/runs")
        api("/nowhere", token="master")
    assert api.gate.refused["no_credentials"] == 100
    assert len(logs) == 61, "a flood of one kind does not hide another"


def test_the_next_line_says_how_many_were_not_said() -> None:
    share = LogShare(most=2, window_s=10.0)
    assert [share.take("role", now) for now in (0.0, 1.0, 2.0, 9.0)] == [0, 0, None, None]
    assert share.take("revoked", 9.0) == 0
    assert [share.take("role", now) for now in (10.0, 11.0, 12.0)] == [2, 0, None]


def test_no_answer_to_a_viewer_holds_the_brokers_or_the_servers_password(
    ask: Callable[..., httpx.Response],  # noqa: F811 - the fixture
    server: Any,  # noqa: F811 - the fixture
) -> None:
    viewer = TokenStore(server.state.root).create("dashboard", Role.VIEWER, 1.0)
    read = 0
    for rule in RULES:
        if rule.method == "GET" and Who.VIEWER in rule.who:
            answer = ask("GET", rule.path.replace("{run_id}", "none"), token=viewer)
            assert '"forbidden"' not in answer.text, rule.path
            read += answer.status_code == 200
            for secret in ("pass/word", "pass%2Fword", "secret", viewer):
                assert secret not in answer.text, rule.path
    assert read > 6
    assert ask("GET", "/v1/join?device_id=pi", token=viewer).status_code == 403


def test_a_stranger_may_say_little(api: Api) -> None:
    assert api("/v1/enroll", method="POST", content=b"x" * 16_000).status_code == 200
    assert api("/v1/enroll", method="POST", content=b"x" * 17_000).status_code == 413
    assert api.gate.refused["too_large"] == 1


def test_what_is_not_http_is_closed(api: Api) -> None:
    sent: list[Any] = []

    async def speak() -> None:
        async def never() -> Any:
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)

        async def app(*_arguments: Any) -> None:
            raise AssertionError

        await Guard(app, api.gate)({"type": "websocket", "path": "/v1/runs"}, never, send)

    anyio.run(speak)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_body_that_stops_is_over_and_a_whole_one_leaves_all_the_time(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_guard, "LONGEST_PAUSE_S", 0.01)
    pieces: list[Any] = []
    parts = [{"type": "http.request", "body": b"x", "more_body": True}]

    async def receive() -> Any:
        if parts:
            return parts.pop()
        return await anyio.sleep_forever()

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        pieces.extend([await receive(), await receive()])

    async def send(_message: Any) -> None:
        raise AssertionError

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/enroll",
        "headers": [],
        "query_string": b"",
    }

    async def slow() -> None:
        await Guard(app, api.gate)(dict(scope), receive, send)

    anyio.run(slow)
    assert [piece["type"] for piece in pieces] == ["http.request", "http.disconnect"]

    parts.append({"type": "http.request", "body": b"x", "more_body": False})
    pieces.clear()

    async def whole() -> None:
        with anyio.move_on_after(0.2):
            await Guard(app, api.gate)(dict(scope), receive, send)

    anyio.run(whole)
    assert pieces == [], "the second receive waits for as long as the answer takes"


def test_every_route_of_the_application_has_a_rule_and_every_rule_a_route(
    server: Any,  # noqa: F811 - the fixture
) -> None:
    app = make_api(server)
    described = {
        (method.upper(), path)
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }
    pages = {
        (method, str(getattr(route, "path", "")))
        for route in app.routes
        for method in getattr(route, "methods", None) or ()
        if method != "HEAD"
    }
    routes = {(method, path.replace(":path}", "}")) for method, path in described | pages}
    rules = {(rule.method, rule.path.replace(":path}", "}")) for rule in RULES}
    assert routes - rules == set(), "a route without a rule is closed to everybody"
    assert rules - routes == set(), "a rule for a route that is gone"


def test_health_says_how_many_were_refused(
    ask: Callable[..., httpx.Response],  # noqa: F811 - the fixture
) -> None:
    ask("GET", "/v1/runs", token="wrong")
    assert ask("GET", "/v1/health").json()["refused_requests"] == {"bad_token": 1}
