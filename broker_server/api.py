"""The HTTP API: blobs for devices and operators, everything else for operators.

Knows requests and answers; every decision is the server's. OpenAPI at /openapi.json.
"""

from __future__ import annotations

import ipaddress
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import Body, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from broker_server.access import Refusal
from broker_server.api_guard import Gate, Guard
from broker_server.backup import Snapshot
from broker_server.base_model import ModelFile
from broker_server.blob_api import blob_router
from broker_server.counters import TrafficMeter
from broker_server.enrollment_api import enrolment_router
from broker_server.expected_api import expected_router
from broker_server.expected_devices import ExpectedDevices
from broker_server.metrics import CONTENT_TYPE_LATEST, Metrics
from broker_server.model_registry import shape_of
from broker_server.run_folder import list_files
from broker_server.run_spec import parse_run_spec
from broker_server.run_state import RoundResult
from broker_server.run_views import (
    device_list,
    model_view,
    run_detail,
    run_line,
    run_report,
)
from broker_server.server import Server
from broker_server.server_checkup import checkup
from broker_server.store import RunRecord
from broker_server.tokens import TokenStore
from wire_protocol.errors import ConfigError, LegendError, ProtocolError, Refused, one_line
from wire_protocol.messages import PROTOCOL_VERSION
from wire_protocol.parts import Count, Sha256
from wire_protocol.topics import check_name


class FileEntry(BaseModel):
    """One file of a base model, uploaded as a blob before."""

    model_config = ConfigDict(extra="forbid")
    path: str = Field(min_length=1, max_length=300)
    sha256: Sha256
    size_bytes: Count


class NewModel(BaseModel):
    """The body of ``POST /v1/models``."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=60)
    files: list[FileEntry] = Field(min_length=1, max_length=200)


def make_api(server: Server) -> FastAPI:
    """Build the application around a server."""
    api = FastAPI(title="LEGEND Edge", version=version("legend-edge"))
    gate = Gate(
        server.settings.token,
        TokenStore(server.state.root),
        server.pki,
        _is_loopback(server.settings.host),
        server.rights.grants,
        server.refused,
    )

    def refuse(refusal: Refusal, request: Request) -> Response:
        return gate.refuse(refusal, request.scope)

    api.add_middleware(Guard, gate=gate)
    api.add_middleware(TrafficMeter, counters=server.counters)  # the outermost: counts refusals too
    uploaded = server.counters.uploaded
    api.include_router(
        blob_router(server.blobs, on_complete=uploaded, rights=server.rights, on_refused=refuse)
    )
    api.include_router(enrolment_router(server.enrolment, operator_key=server.operator_key))
    expected = ExpectedDevices(server.store, server.fleet, server.pki)
    api.include_router(expected_router(expected))
    routes = _Routes(server, expected)
    for method, path, handler, status in (
        ("GET", "/metrics", routes.metrics, 200),
        ("POST", "/v1/backup", routes.backup, 200),
        ("GET", "/v1/doctor", routes.doctor, 200),
        ("GET", "/v1/health", routes.health, 200),
        ("GET", "/v1/join", routes.join, 200),
        ("GET", "/v1/devices", routes.devices, 200),
        ("GET", "/v1/models", routes.models, 200),
        ("POST", "/v1/models", routes.add_model, 201),
        ("GET", "/v1/models/{name_or_digest}", routes.model, 200),
        ("GET", "/v1/runs", routes.runs, 200),
        ("POST", "/v1/runs", routes.launch, 201),
        ("GET", "/v1/runs/{run_id}", routes.run, 200),
        ("POST", "/v1/runs/{run_id}/cancel", routes.cancel, 200),
        ("GET", "/v1/runs/{run_id}/files", routes.files, 200),
        ("GET", "/v1/runs/{run_id}/files/{name:path}", routes.file, 200),
    ):
        api.add_api_route(path, handler, methods=[method], status_code=status)
    api.add_exception_handler(LegendError, _known_error)
    api.add_exception_handler(RequestValidationError, _bad_request)
    api.add_exception_handler(StarletteHTTPException, _http_error)
    return api


class _Routes:
    """The handlers; they run on the event loop and touch the server directly."""

    def __init__(self, server: Server, expected: ExpectedDevices) -> None:
        self._server = server
        self._expected = expected
        self._metrics = Metrics(server)

    async def metrics(self) -> Response:
        """Counters and gauges in Prometheus' text format."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def backup(self) -> StreamingResponse:
        """Everything that the server needs to go on elsewhere, as one archive."""
        # On the event loop: nothing of a run changes while the picture is taken.
        snapshot = Snapshot(self._server)
        return StreamingResponse(snapshot.pieces(), media_type="application/x-tar")

    async def doctor(self) -> dict[str, object]:
        """What the server knows about its own health."""
        return await checkup(self._server)

    async def health(self) -> dict[str, object]:
        """How the server is."""
        server = self._server
        return {
            "status": "ok",
            "version": version("legend-edge"),
            "fleet": server.settings.fleet,
            "broker": {
                "kind": server.settings.broker.kind,
                "url": server.broker.url,
                "connected": server.link.connected,
            },
            "devices_online": sum(d.online for d in server.fleet.devices.values()),
            "dropped_messages": server.counters.dropped_by_channel,
            "refused_requests": dict(server.refused),
        }

    async def join(self, device_id: str, request: Request) -> dict[str, object]:
        """Tell a device where the broker is and how to get in."""
        check_name("device id", device_id)
        broker = self._server.broker
        host = request.client.host if request.client else ""
        if broker.loopback_only and not _is_loopback(host):
            raise Refused(
                f"device {device_id} is at {host}, but this server's broker "
                f"({self._server.settings.broker.kind}) serves this machine only; set broker.kind "
                "to mosquitto with broker.host, or to external"
            )
        user = broker.device_credentials
        login = f"{quote(user.username, safe='')}:{quote(user.password, safe='')}@" if user else ""
        place = broker.host
        if not broker.loopback_only and _is_loopback(place):
            # It listens on every address: the one that the device reached us at is one of them.
            place = request.url.hostname or place
        bracketed = f"[{place}]" if ":" in place else place
        scheme = "mqtts" if broker.tls else "mqtt"
        return {
            "fleet": self._server.settings.fleet,
            "protocol": [PROTOCOL_VERSION],
            "operator_key": self._server.operator_key,
            "broker_url": f"{scheme}://{login}{bracketed}:{broker.port}",
            "certificate_left_s": _certificate_left_s(request),
        }

    async def devices(self) -> dict[str, object]:
        """Every device of the fleet, and those that are expected."""
        server = self._server
        certificates = server.pki.records() if server.pki else ()
        known = device_list(server.fleet, time.monotonic(), certificates)
        return {"devices": self._expected.listed(known)}

    async def models(self) -> dict[str, object]:
        """Every registered base model."""
        views = []
        for row in self._server.models.rows():
            shape = shape_of(row)
            view = model_view(row, shape.family, shape.layer_count)
            views.append({key: value for key, value in view.items() if key != "files"})
        return {"models": views}

    async def add_model(self, model: NewModel) -> dict[str, object]:
        """Make uploaded files a base model, and let idle devices measure it."""
        server = self._server
        files = [ModelFile(file.path, file.sha256, file.size_bytes) for file in model.files]
        digest = server.models.register(model.name, files)
        server.rights.model_registered()
        if server.runs.active is None:
            online = [name for name, known in server.fleet.devices.items() if known.online]
            server.measure(online, digest)
        return {"digest": digest}

    async def model(self, name_or_digest: str) -> dict[str, object]:
        """One base model with its files."""
        row = self._server.models.find(name_or_digest)
        shape = shape_of(row)
        return model_view(row, shape.family, shape.layer_count)

    async def runs(self) -> dict[str, object]:
        """Every run, oldest first."""
        return {
            "runs": [self._line(record) for record in self._server.store.runs()],
        }

    async def launch(self, document: dict[str, Any] = Body()) -> dict[str, object]:  # noqa: B008 - FastAPI's way to name the body
        """Queue a run."""
        return {"run_id": self._server.runs.launch(parse_run_spec(document))}

    async def run(self, run_id: str) -> dict[str, object]:
        """One run, with what its devices do now."""
        record = self._record(run_id)
        report = run_report(record, self._rounds(run_id))
        loop = self._loop(record)
        return run_detail(record, report, loop, self._server.fleet, time.monotonic())

    async def cancel(self, run_id: str) -> dict[str, object]:
        """Stop a run."""
        self._record(run_id)
        self._server.runs.cancel(run_id)
        return {"run_id": run_id, "status": "cancelling"}

    async def files(self, run_id: str) -> dict[str, object]:
        """Names of the files in a run's result folder."""
        self._record(run_id)
        return {"files": list(list_files(self._folder(run_id)))}

    async def file(self, run_id: str, name: str) -> FileResponse:
        """One file of a run's result folder."""
        self._record(run_id)
        if name not in list_files(self._folder(run_id)):
            raise HTTPException(404, f"run {run_id} has no file {name!r}")
        return FileResponse(self._folder(run_id) / name)

    def _folder(self, run_id: str) -> Path:
        return self._server.state.runs / run_id

    def _record(self, run_id: str) -> RunRecord:
        record = self._server.store.run(run_id)
        if record is None:
            raise HTTPException(404, f"no run {run_id!r}; list them: legend runs")
        return record

    def _rounds(self, run_id: str) -> list[RoundResult]:
        texts = self._server.store.rounds(run_id)
        return [RoundResult.model_validate_json(text) for text in texts]

    def _line(self, record: RunRecord) -> dict[str, object]:
        # Only the last round: a hundred with two hundred devices each would hold everybody up.
        text = self._server.store.last_round(record.run_id)
        last = [RoundResult.model_validate_json(text)] if text else []
        return run_line(run_report(record, last), self._loop(record))

    def _loop(self, record: RunRecord) -> Any:
        active = self._server.runs.active
        return active if active and active.context.run_id == record.run_id else None


def _certificate_left_s(request: Request) -> float | None:
    """For how long the device's certificate is good; its own clock may be wrong."""
    not_after = request.scope.get("extensions", {}).get("legend.peer", {}).get("not_after")
    return None if not_after is None else float(not_after) - time.time()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "testclient")


async def _known_error(_request: Request, error: Exception) -> JSONResponse:
    status = 503
    for kind, code in ((ConfigError, 422), (ProtocolError, 422), (Refused, 403)):
        if isinstance(error, kind):
            status = code
    name = type(error).__name__
    detail = one_line(error, longest=1000)
    return JSONResponse({"error": name, "detail": detail}, status_code=status)


async def _bad_request(_request: Request, error: Exception) -> JSONResponse:
    detail = "the request is not understood"
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        detail = one_line(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
    return JSONResponse({"error": "bad_request", "detail": detail}, status_code=422)


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, StarletteHTTPException) else 500
    detail = error.detail if isinstance(error, StarletteHTTPException) else str(error)
    names = {404: "not_found"}
    return JSONResponse(
        {"error": names.get(status, "http_error"), "detail": detail}, status_code=status
    )
