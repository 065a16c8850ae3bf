"""The server put together: the only module that knows every part."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator

import anyio
import structlog
import uvicorn
from anyio.abc import TaskGroup

from broker_server import signing_keys
from broker_server.api import make_api
from broker_server.api_guard import HTTP_LIMITS
from broker_server.backup import check_restored, remove_stale_snapshots
from broker_server.blobs import BlobStore
from broker_server.broken_off import BrokenOff
from broker_server.broker import BrokerLauncher, open_broker
from broker_server.disk_space import one_line_when_full
from broker_server.enrollment_desk import EnrolmentDesk
from broker_server.http_tls import serve_https
from broker_server.mqtt import ServerLink
from broker_server.pki import FleetPki
from broker_server.pki_keeper import PkiKeeper
from broker_server.server import Server
from broker_server.server_state import ServerState
from broker_server.settings import ServerSettings
from broker_server.store import Store
from broker_server.voice import CertificateCheck, DeviceVoices, ServerVoice
from wire_protocol.errors import BrokerUnavailable, ConfigError

log = structlog.get_logger()

BROKER_CHECK_S = 2.0
CERTIFICATES_CHECK_S = 1.0
FORGOTTEN_UPLOAD_S = 7 * 86400.0


class _HttpServer(uvicorn.Server):
    """uvicorn, with signals left to the program around it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: ServerSettings) -> None:
    """Run the server until SIGTERM or SIGINT.

    Raises:
        ConfigError: a port is taken, the broker's program is missing, ...
        AlreadyRunning: another server holds the state directory.
        BrokerUnavailable: the broker does not answer.
    """
    state = ServerState(settings.state_dir)
    with state.locked(), one_line_when_full():
        check_restored(state.root)
        listener = _listen(settings)
        pki = _open_pki(settings)
        launcher = open_broker(
            settings.broker.url or settings.broker.kind,
            state_dir=settings.state_dir,
            host=settings.broker.host,
            port=settings.broker.port or None,
            pki=pki,
        )
        keeper = PkiKeeper(pki, launcher) if pki else None
        address = await anyio.to_thread.run_sync(launcher.start)
        store = Store(settings.database) if settings.database else Store.in_folder(state.root)
        try:
            start_number = state.count_start()
            keys = signing_keys.load_or_make(settings.pki or state.signing, settings.fleet)
            tls = address.ssl_context()
            if keeper:
                keeper.follow(tls)
            link = ServerLink(address, fleet=settings.fleet, start_number=start_number, tls=tls)
            async with link:
                remove_stale_snapshots(state.root)
                blobs = BlobStore(state.blobs)
                blobs.remove_parts_older_than(FORGOTTEN_UPLOAD_S, now=time.time())
                voice = ServerVoice(keys.server, start_number, time.monotonic())
                server = Server(
                    settings,
                    state,
                    store,
                    blobs,
                    address,
                    link,
                    voice,
                    keys.operator_key,
                    pki=pki,
                    device_voices=DeviceVoices(_certificate_check(pki) if pki else None),
                    enrolment=EnrolmentDesk(pki) if pki else None,
                )
                try:
                    await _run(server, launcher, listener, keeper)
                finally:
                    with anyio.CancelScope(shield=True):
                        await server.runs.evaluator.close()
        finally:
            store.close()
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(launcher.stop)


async def _run(
    server: Server,
    launcher: BrokerLauncher,
    listener: socket.socket,
    keeper: PkiKeeper | None,
) -> None:
    config = uvicorn.Config(
        BrokenOff(make_api(server)),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=2,
        **HTTP_LIMITS,
    )
    if keeper and server.pki:
        keeper.follow(serve_https(config, server.pki, server.refused))
    http = _HttpServer(config)
    async with anyio.create_task_group() as tasks:
        if keeper:
            tasks.start_soon(_keep_certificates, keeper, name="certificates")
        tasks.start_soon(server.pump, name="broker messages")
        tasks.start_soon(server.watch_leases, name="leases")
        tasks.start_soon(server.runs.work_through, name="runs")
        tasks.start_soon(_keep_broker, launcher, name="broker child")
        tasks.start_soon(_stop_on_signal, http, tasks, name="signals")
        tasks.start_soon(_announce, http, server, listener, name="announce")
        await http.serve(sockets=[listener])
        tasks.cancel_scope.cancel()


async def _announce(http: _HttpServer, server: Server, listener: socket.socket) -> None:
    while not http.started:  # noqa: ASYNC110 - uvicorn has a flag, not an event
        await anyio.sleep(0.02)
    host, port = listener.getsockname()[:2]
    if server.pki and host in ("0.0.0.0", "::"):  # noqa: S104 - compared; no certificate names it
        host = "127.0.0.1"
    scheme = "https" if server.pki else "http"
    url = f"{scheme}://{'[' + host + ']' if ':' in host else host}:{port}"
    server.state.announce(url)
    log.info("server_ready", url=url, broker=server.broker.url)


async def _keep_broker(launcher: BrokerLauncher) -> None:
    """Start the broker again when it died; its port and passwords stay."""
    while True:
        await anyio.sleep(BROKER_CHECK_S)
        if not launcher.running:
            log.error("broker_died")
            try:
                await anyio.to_thread.run_sync(launcher.start)
            except (BrokerUnavailable, ConfigError) as error:
                log.error("broker_not_restarted", error=str(error))


async def _keep_certificates(keeper: PkiKeeper) -> None:
    while True:
        await anyio.to_thread.run_sync(keeper.check, time.time())
        await anyio.sleep(CERTIFICATES_CHECK_S)


async def _stop_on_signal(http: _HttpServer, tasks: TaskGroup) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for received in signals:
            log.info("server_stopping", signal=received.name)
            http.should_exit = True
            with anyio.move_on_after(5):
                await anyio.sleep_forever()
            tasks.cancel_scope.cancel()
            return


def _open_pki(settings: ServerSettings) -> FleetPki | None:
    if settings.pki is None:
        return None
    pki = FleetPki(settings.pki)
    if pki.fleet != settings.fleet:
        raise ConfigError(
            f"{settings.pki} certifies fleet {pki.fleet!r}, this server leads {settings.fleet!r}; "
            "set another 'pki' or 'fleet'"
        )
    pki.prepare_to_serve(time.time())
    return pki


def _certificate_check(pki: FleetPki) -> CertificateCheck:
    def check(certificate_pem: str) -> tuple[str, str]:
        device = pki.verify_device(certificate_pem, time.time())
        return device.name, device.public_key

    return check


def _listen(settings: ServerSettings) -> socket.socket:
    """Bind now, so that a taken port is an error before anything is started."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family)
        # Every connection inherits it; asyncio sets it on sockets of its own making only. Without
        # it an answer of two writes takes 40 ms more.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; "
            "stop the other program or set another 'port'"
        ) from error
    return listener
