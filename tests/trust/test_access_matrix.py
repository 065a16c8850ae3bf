"""Everybody tries every route of a real server, with real certificates and tokens.

The routes are those of the application itself, so that one that is added later without a word here
fails. The same for topics: ``test_topic_matrix``. Commands that were recorded, changed or sent to
another device: ``test_replay``.
"""

from __future__ import annotations

import itertools
import re
import socket
import time
from collections.abc import Iterator
from http.client import HTTPSConnection
from typing import Any

import httpx
import pytest

from broker_server.access import Role
from broker_server.grants import UPLOADS_PER_ASSIGNMENT
from broker_server.tokens import TokenStore
from tests.broker_server.test_access import ALLOWED
from tests.support.guarded_site import (
    MODEL,
    Caller,
    GuardedSite,
    digest_of,
    guarded_site,
    has_mosquitto,
)
from tests.support.mqtt_client import MqttClient

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

UPDATE = b"what a device learned"
DIGEST = digest_of(UPDATE)

LETTER = {"nobody": "n", "device": "d", "other": "d", "viewer": "v", "operator": "o"}
"""Who is let in somewhere, and the letter for it in the table."""

NO_TLS = {"foreign", "foreign with token", "expired"}
"""They do not get as far as asking."""

ALWAYS_REFUSED = {
    "guessed token": 401,
    "ended token": 401,
    "revoked": 403,
    "revoked with token": 403,
    "server": 403,
}
SLOW = {"POST /v1/backup"}
"""Only the refusals are tried here."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedSite]:
    folder = tmp_path_factory.mktemp("guarded")
    if not has_mosquitto(folder):
        pytest.skip("mosquitto is not installed (apt install mosquitto)")
    with guarded_site(folder) as site:
        yield site


@pytest.fixture(scope="module")
def clients(site: GuardedSite) -> Iterator[dict[str, httpx.Client]]:
    opened = {name: caller.http(site.url) for name, caller in site.callers.items()}
    yield opened
    for client in opened.values():
        client.close()


def outcome(http: httpx.Client, asked: dict[str, Any]) -> str | int:
    """What comes of a request; what a route says to those who are let in is its own business."""
    try:
        answer = http.request(**asked)
    except httpx.TransportError:
        return "no TLS"
    body = answer.json() if answer.status_code in (401, 403) else {}
    is_no = body.get("error") in ("unauthorised", "forbidden") or "is revoked" in str(body)
    return answer.status_code if is_no else "let in"


def expected_outcome(name: str, route: str) -> str | int:
    if name in NO_TLS:
        return "no TLS"
    if name in ALWAYS_REFUSED:
        return ALWAYS_REFUSED[name]
    if LETTER[name] in ALLOWED[route]:
        return "let in"
    return 401 if name == "nobody" else 403


def request(route: str, site: GuardedSite, caller: Caller) -> dict[str, Any]:
    """A request of this route that does no harm where it is allowed."""
    method, _, template = route.partition(" ")
    values = {
        "sha256": site.adapters.get(caller.device, "0" * 64),
        "name_or_digest": MODEL,
        "run_id": "pi-done",
        "name:path": "summary.json",
        "device_id": "nobody-waits",
    }
    path = re.sub(r"\{([^}]*)\}", lambda match: values[match.group(1)], template)
    more: dict[str, Any] = {"params": {"device_id": caller.device}} if "join" in path else {}
    if method != "GET":
        more["content"] = b"{}"
    return {"method": method, "url": path, **more}


def test_every_route_of_the_running_server_is_in_the_table(
    site: GuardedSite, clients: dict[str, httpx.Client]
) -> None:
    described = clients["operator"].get("/openapi.json").json()["paths"]
    routes = {
        f"{method.upper()} {path}" for path, methods in described.items() for method in methods
    }
    known = {route.replace(":path}", "}") for route in ALLOWED}
    assert routes - known == set(), "say in test_access.ALLOWED who may use it"
    pages = {"GET /openapi.json", "GET /docs", "GET /docs/oauth2-redirect", "GET /redoc"}
    assert known - routes <= pages, "a rule for a route that is gone"


@pytest.mark.parametrize("route", sorted(ALLOWED))
def test_everybody_tries_every_route(
    site: GuardedSite, clients: dict[str, httpx.Client], route: str
) -> None:
    expected = {name: expected_outcome(name, route) for name in site.callers}
    if route in SLOW:
        expected = {name: verdict for name, verdict in expected.items() if verdict != "let in"}
    seen = {
        name: outcome(clients[name], request(route, site, site.callers[name])) for name in expected
    }
    assert seen == expected


@pytest.mark.parametrize("name", ["device", "other"])
def test_a_device_sees_what_it_was_given_and_nothing_of_the_other(
    site: GuardedSite, clients: dict[str, httpx.Client], name: str
) -> None:
    http, own = clients[name], site.callers[name].device
    (foreign,) = set(site.adapters) - {own}
    assert http.get(f"/v1/blobs/{site.adapters[own]}").content == f"adapter of {own}".encode()
    assert http.get(f"/v1/blobs/{site.model_file}").status_code == 200
    assert http.get(f"/v1/models/{MODEL}").json()["files"][0]["sha256"] == site.model_file
    answers = [
        http.request(method, f"/v1/blobs/{sha256}", headers=headers)
        for sha256 in (site.adapters[foreign], site.held_out, "0" * 64)
        for method in ("GET", "HEAD")
        for headers in ({}, {"Range": "bytes=0-3"}, {"If-None-Match": f'"{sha256}"'})
    ]
    assert {answer.status_code for answer in answers} == {403}
    assert len({answer.headers["content-length"] for answer in answers}) == 1
    for query in (f"device_id={foreign}", f"device_id={own}&device_id={foreign}"):
        assert http.get(f"/v1/join?{query}").status_code == 403
    assert http.get(f"/v1/join?device_id={own}").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/blobs/%2e%2e/runs",
        "/v1/blobs/..%2f..%2fserver.db",
        "/v1/models/%2e%2e%2f%2e%2e",
        "//v1/runs",
        "/v1/./runs",
        "/v1/runs%0a",
        "/v1/runs;/v1/probe",
        "/v1/probe/../runs",
        "/V1/runs",
    ],
)
def test_no_spelling_of_a_path_leads_around_the_rules(site: GuardedSite, path: str) -> None:
    address = httpx.URL(site.url)
    for name in ("nobody", "device", "viewer"):
        caller = site.callers[name]
        # Not with httpx, which puts a path in order before it sends it.
        http = HTTPSConnection(address.host, address.port or 0, context=caller.context, timeout=60)
        headers = {"Authorization": f"Bearer {caller.token}"} if caller.token else {}
        http.request("GET", path, headers=headers)
        assert http.getresponse().status in (401, 403, 404), (name, path)
        http.close()


def announce(http: httpx.Client, content: bytes, **changes: Any) -> httpx.Response:
    body = {"sha256": digest_of(content), "size_bytes": len(content), **changes}
    return http.post("/v1/blobs", json=body)


def append(http: httpx.Client, content: bytes, offset: int = 0) -> httpx.Response:
    headers = {"Upload-Offset": str(offset)}
    return http.patch(f"/v1/blobs/{DIGEST}", content=content, headers=headers)


def test_a_devices_upload_is_out_of_everybody_elses_reach(
    site: GuardedSite, clients: dict[str, httpx.Client]
) -> None:
    own, other, operator = clients["device"], clients["other"], clients["operator"]
    assert announce(own, UPDATE).json() == {"state": "open", "offset": 0}
    assert append(own, UPDATE[:5]).status_code == 204

    assert append(other, b"poison", 5).status_code == 404
    assert announce(other, UPDATE).json() == {"state": "open", "offset": 0}
    assert append(other, b"?" * len(UPDATE)).status_code == 422
    for name in ("nobody", "viewer", "revoked", "server"):
        assert announce(clients[name], UPDATE).status_code in (401, 403)
        assert append(clients[name], b"poison", 5).status_code in (401, 403)

    assert announce(own, UPDATE).json()["offset"] == 5
    assert append(own, UPDATE[5:], 5).status_code == 204
    assert announce(own, UPDATE).json() == {"state": "exists"}
    assert announce(other, UPDATE).json() == {"state": "open", "offset": 0}
    for http in (own, other):
        assert http.get(f"/v1/blobs/{DIGEST}").status_code == 403
    assert operator.get(f"/v1/blobs/{DIGEST}").status_code == 404, "no manifest has named it"


def test_a_device_sends_no_more_than_its_assignment_can_need(
    site: GuardedSite, clients: dict[str, httpx.Client]
) -> None:
    http = clients["other"]
    assert announce(http, UPDATE, size_bytes=2**20).status_code == 413
    statuses = [announce(http, b"%d" % number).status_code for number in range(20)]
    assert statuses.count(201) <= UPLOADS_PER_ASSIGNMENT
    assert set(statuses) == {201, 403}
    idle = site.admit("idle")
    with idle.http(site.url) as idle_http:
        assert idle_http.get("/v1/join?device_id=idle").status_code == 200
        assert announce(idle_http, UPDATE).status_code == 403
        assert append(idle_http, UPDATE).status_code == 403


def test_no_answer_to_a_viewer_holds_a_secret(
    site: GuardedSite, clients: dict[str, httpx.Client]
) -> None:
    secrets = [caller.token for caller in site.callers.values() if caller.token]
    secrets += [
        line
        for file in (*site.pki.folder.glob("*.key"), *site.state_dir.rglob("*.key"))
        for line in file.read_text(errors="replace").split("\n")[1:2]
        if len(line) > 20
    ]
    assert len(secrets) > 4
    read = 0
    for route, who in ALLOWED.items():
        if "v" in who and route.startswith("GET"):
            answer = clients["viewer"].request(**request(route, site, site.callers["viewer"]))
            read += answer.status_code == 200
            assert not [secret for secret in secrets if secret in answer.text], route
    assert read > 6


def test_refusals_are_counted_by_reason_and_logged_without_secrets(
    site: GuardedSite, clients: dict[str, httpx.Client]
) -> None:
    for name in ("nobody", "guessed token", "viewer", "device", "server"):
        clients[name].post("/v1/runs", content=b"{}")
    clients["device"].get(f"/v1/blobs/{site.held_out}")
    clients["device"].get("/v1/join?device_id=nano")
    counted = clients["operator"].get("/v1/health").json()["refused_requests"]
    reasons = {"no_credentials", "bad_token", "role", "not_assigned", "other_device"}
    assert reasons | {"not_a_device"} <= set(counted)
    log = site.log()
    assert "request_refused" in log
    for caller in site.callers.values():
        assert caller.token is None or caller.token == "operator" or caller.token not in log


def wait_until_refused(http: httpx.Client, path: str) -> httpx.Response:
    deadline = time.monotonic() + 60
    while (answer := http.get(path)).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


@pytest.mark.parametrize("way", ["operator", "command"])
def test_revoking_a_device_ends_its_live_sessions_at_once_and_no_others(
    site: GuardedSite, clients: dict[str, httpx.Client], way: str
) -> None:
    name, path = f"lost-{way}", f"/v1/join?device_id=lost-{way}"
    lost, kept = site.admit(name), site.callers["other"]
    port = site.broker_port()
    with (
        lost.http(site.url) as http,
        MqttClient(port, lost.context, name) as mqtt,
        MqttClient(port, kept.context, "nano") as staying,
    ):
        assert http.get(path).status_code == 200
        assert mqtt.connect()
        assert staying.connect()
        if way == "operator":
            revoked = clients["operator"].post(f"/v1/devices/{name}/revoke")
            assert revoked.status_code == 200
            assert http.get(path).status_code == 403, "the connection that was open before"
        else:
            site.pki.revoke(name, time.time())
            assert wait_until_refused(http, path).status_code == 403
        mqtt.wait_for_disconnect()
        assert not mqtt.connect()
        assert staying.connected
        for again in (http, clients["other"]):
            status = again.get("/v1/models").status_code
            assert status == (200 if again is clients["other"] else 403)
    with lost.http(site.url) as http:
        assert http.get(path).status_code == 403


def test_a_token_that_is_revoked_ends_on_connections_that_are_open(
    site: GuardedSite, clients: dict[str, httpx.Client]
) -> None:
    tokens = TokenStore(site.state_dir)
    caller = Caller(site.callers["nobody"].context, tokens.create("cat", Role.OPERATOR, 1.0))
    with caller.http(site.url) as http:
        assert http.get("/v1/runs").status_code == 200
        tokens.revoke("cat", 2.0)
        assert http.get("/v1/runs").status_code == 401


def test_the_api_speaks_no_plain_http(site: GuardedSite) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(site.url.replace("https:", "http:") + "/v1/ca")


def test_nobody_can_say_endlessly_much(site: GuardedSite, clients: dict[str, httpx.Client]) -> None:
    address = httpx.URL(site.url)
    for name in ("nobody", "device"):
        context = site.callers[name].context
        with (
            socket.create_connection((address.host, address.port or 0), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname=address.host) as connection,
        ):
            connection.sendall(b"GET /v1/ca HTTP/1.1\r\nX-More: " + b"x" * 20_000)
            # The headers never end, and the server does not wait for the end.
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    stranger, operator = clients["nobody"], clients["operator"]
    assert stranger.post("/v1/enroll", content=b"x" * 20_000).status_code == 413
    assert stranger.post("/v1/runs", content=b"x" * 20_000).status_code == 401
    assert operator.post("/v1/runs", content=b"x" * 2_000_000).status_code == 413
    assert operator.post("/v1/runs", content=iter([b"x"] * 10)).status_code == 413
    assert operator.get("/v1/health").status_code == 200


@pytest.mark.trust
def test_no_method_on_any_route_is_open_by_accident(
    site: GuardedSite, clients: dict[str, httpx.Client]
) -> None:
    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"]
    for route, method in itertools.product(ALLOWED, methods):
        asked = request(route, site, site.callers["device"])
        exact = f"{'GET' if method == 'HEAD' else method} {route.partition(' ')[2]}"
        for name in ("nobody", "device", "other", "viewer", "revoked", "server"):
            if name in LETTER and LETTER[name] in ALLOWED.get(exact, ""):
                continue
            answer = clients[name].request(**{**asked, "method": method})
            assert answer.status_code in (401, 403, 404, 405), (name, method, route)
