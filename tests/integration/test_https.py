"""The API over TLS: who is named to it, and who is not served at all."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from broker_server.http_tls import PEER, Peer, _NamesThePeer, peer_of, serve_https
from broker_server.pki import FleetPki
from broker_server.pki_x509 import DAY_S
from edge_agent.mqtt import BrokerLogin, Connected, Disconnected
from tests.support.brokers import FLEET, device_link, next_of, require
from tests.support.pki import anonymous_context, certified_device, make_pki
from tests.support.ports import wait_until

pytestmark = pytest.mark.integration


async def says_who_asks(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers with the peer that it was told of."""
    peer = scope.get("extensions", {}).get(PEER)
    await JSONResponse({"peer": peer, "path": Request(scope).url.path})(scope, receive, send)


class RunningHttps:
    """Such an application behind TLS."""

    def __init__(self, pki: FleetPki) -> None:
        self.pki = pki
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}/"
        config = uvicorn.Config(says_who_asks, log_config=None, lifespan="off")
        self.context = serve_https(config, pki)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def https(tmp_path: Path) -> Iterator[RunningHttps]:
    running = RunningHttps(make_pki(tmp_path / "pki"))
    running.start()
    yield running
    running.stop()


def ask(https: RunningHttps, context: ssl.SSLContext) -> Any:
    return httpx.get(https.url, verify=context).json()["peer"]


def test_a_device_is_named_by_its_certificate(https: RunningHttps, tmp_path: Path) -> None:
    device = certified_device(https.pki, "pi-1", tmp_path)
    peer = ask(https, device.context)
    assert (peer["name"], peer["serial"]) == ("pi-1", device.serial)


def test_without_a_certificate_one_is_served_and_nameless(https: RunningHttps) -> None:
    assert ask(https, anonymous_context(https.pki)) is None


@pytest.mark.parametrize("stranger", ["foreign", "expired"])
def test_a_bad_certificate_is_worse_than_none(
    https: RunningHttps, tmp_path: Path, stranger: str
) -> None:
    if stranger == "foreign":
        foreign = make_pki(tmp_path / "foreign")
        device = certified_device(foreign, "pi-1", tmp_path, trusts=https.pki)
    else:
        long_ago = time.time() - 91 * DAY_S
        device = certified_device(https.pki, "pi-1", tmp_path, now=long_ago)
    with pytest.raises(httpx.TransportError):
        ask(https, device.context)


def test_a_client_that_knows_another_authority_does_not_talk_to_it(
    https: RunningHttps, tmp_path: Path
) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(https, anonymous_context(make_pki(tmp_path / "foreign")))


def test_plain_http_gets_no_answer(https: RunningHttps) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(https.url.replace("https", "http"))


def test_revoking_counts_on_connections_that_are_open(https: RunningHttps, tmp_path: Path) -> None:
    device = certified_device(https.pki, "pi-1", tmp_path)
    with httpx.Client(verify=device.context) as client:
        assert client.get(https.url).status_code == 200
        FleetPki(https.pki.folder).revoke("pi-1", time.time())
        refused = client.get(https.url)
    assert refused.status_code == 403
    assert "pi-1 is revoked" in refused.json()["detail"]
    with httpx.Client(verify=device.context) as client:
        assert client.get(https.url).status_code == 403


@pytest.mark.anyio
async def test_a_certificate_that_ends_on_an_open_connection_is_refused(tmp_path: Path) -> None:
    peer = Peer("pi-1", 1, not_after=time.time() - 1)
    refused: Counter[str] = Counter()
    app = _NamesThePeer(says_who_asks, peer, make_pki(tmp_path / "pki"), refused)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as client:
        answer = await client.get("http://server/")
    assert answer.status_code == 403
    assert "expired" in answer.json()["detail"]
    assert refused == {"expired": 1}


def test_a_renewed_certificate_is_shown_to_new_connections(
    https: RunningHttps, tmp_path: Path
) -> None:
    with httpx.Client(verify=anonymous_context(https.pki)) as client:
        assert client.get(https.url).status_code == 200
        issued = https.pki.renew_service("server", time.time())
        pair = https.pki.pair("server")
        https.context.load_cert_chain(pair.certificate, pair.key)
        assert client.get(https.url).status_code == 200
    port = httpx.URL(https.url).port
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        anonymous_context(https.pki).wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        shown = secured.getpeercert()
    assert shown is not None
    assert int(str(shown["serialNumber"]), 16) == issued.serial


@pytest.mark.parametrize(
    "certificate",
    [
        None,
        {},
        {"subject": (), "serialNumber": "01", "notAfter": "Jan  1 00:00:00 2030 GMT"},
        {"subject": ((("commonName", "a"),), (("commonName", "b"),))},
    ],
)
def test_a_certificate_without_one_name_names_nobody(certificate: dict[str, Any] | None) -> None:
    assert peer_of(certificate) is None


SETTINGS = """
fleet: {fleet}
state_dir: {root}/state
pki: {root}/pki
port: 0
broker: {{kind: {kind}}}
"""


def broker_server(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "broker_server.cli", *arguments]


@contextmanager
def running_server(root: Path) -> Iterator[str]:
    """A whole server with certificates; gives its URL."""
    require("mosquitto")
    settings = root / "settings.yml"
    settings.write_text(SETTINGS.format(root=root, fleet=FLEET, kind="mosquitto"))
    subprocess.run(broker_server("pki", "init", "--settings", str(settings)), check=True)
    announced = root / "state" / "server.json"
    with subprocess.Popen(broker_server("serve", "--settings", str(settings))) as process:
        try:
            wait_until(lambda: announced.exists() or process.poll() is not None, seconds=60)
            yield httpx.Response(200, content=announced.read_bytes()).json()["url"]
        finally:
            process.terminate()


@pytest.mark.anyio
async def test_revoking_at_the_command_line_ends_what_a_running_server_allows(
    tmp_path: Path,
) -> None:
    with running_server(tmp_path) as url:
        assert url.startswith("https://127.0.0.1:")
        pki = FleetPki(tmp_path / "pki")
        device = certified_device(pki, "pi-1", tmp_path)
        join = f"{url}/v1/join?device_id=pi-1"

        def get() -> httpx.Response:
            return httpx.get(join, verify=device.context, timeout=30)

        joined = await to_thread.run_sync(get)
        assert joined.status_code == 200, joined.text
        broker = httpx.URL(joined.json()["broker_url"])
        assert broker.scheme == "mqtts"
        assert not broker.userinfo
        assert broker.port is not None
        login = BrokerLogin(broker.host, broker.port, tls=device.context)
        async with device_link(login, "pi-1", tmp_path) as link:
            await next_of(link, Connected)
            command = broker_server("pki", "revoke", "--pki", str(pki.folder), "pi-1")
            await to_thread.run_sync(lambda: subprocess.run(command, check=True))
            assert (await to_thread.run_sync(get)).status_code == 403
            with anyio.fail_after(60):
                await next_of(link, Disconnected)
                await next_of(link, Disconnected)
            assert not link.connected


def test_a_server_with_certificates_wants_a_broker_that_checks_them(tmp_path: Path) -> None:
    make_pki(tmp_path / "pki")
    settings = tmp_path / "settings.yml"
    settings.write_text(SETTINGS.format(root=tmp_path, fleet=FLEET, kind="embedded"))
    done = subprocess.run(
        broker_server("serve", "--settings", str(settings)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert "embedded broker cannot check certificates" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_does_not_serve_with_another_fleet_s_certificates(tmp_path: Path) -> None:
    make_pki(tmp_path / "pki")
    settings = tmp_path / "settings.yml"
    settings.write_text(SETTINGS.format(root=tmp_path, fleet="other", kind="mosquitto"))
    done = subprocess.run(
        broker_server("serve", "--settings", str(settings)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert "certifies fleet 'lab'" in done.stderr
