"""A real HTTP server with the operator API's shapes and canned answers."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

Json = dict[str, Any]


@dataclass
class FakeState:
    """What the server answers, and what it was sent."""

    token: str | None = None
    devices: list[Json] = field(default_factory=list)
    models: dict[str, Json] = field(default_factory=dict)
    runs: dict[str, list[Json]] = field(default_factory=dict)
    """Answers to ``GET /v1/runs/{id}``, one after the other; the last one stays."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    partial: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    submitted: list[Json] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    patches: int = 0
    refuse_runs_with: str | None = None


def error(status: int, code: str, detail: str) -> JSONResponse:
    return JSONResponse({"error": code, "detail": detail}, status)


def build_app(state: FakeState) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def check_token(request: Request, call_next: Any) -> Response:
        if state.token and request.headers.get("Authorization") != f"Bearer {state.token}":
            return error(401, "unauthorized", "this server needs a token")
        answer: Response = await call_next(request)
        return answer

    _add_blobs(app, state)
    _add_models(app, state)
    _add_runs(app, state)

    @app.get("/v1/health")
    async def health() -> Json:
        return {"status": "ok", "version": "0", "fleet": "test", "devices_online": 1}

    @app.get("/v1/devices")
    async def devices() -> Json:
        return {"devices": state.devices}

    return app


def _add_blobs(app: FastAPI, state: FakeState) -> None:
    @app.post("/v1/blobs")
    async def open_upload(request: Request) -> Response:
        body = await request.json()
        if body["sha256"] in state.blobs:
            return JSONResponse({"state": "exists"})
        state.sizes[body["sha256"]] = body["size_bytes"]
        offset = len(state.partial.setdefault(body["sha256"], b""))
        return JSONResponse({"state": "open", "offset": offset}, 201)

    @app.patch("/v1/blobs/{sha256}")
    async def append(sha256: str, request: Request) -> Response:
        state.patches += 1
        have = state.partial[sha256]
        if int(request.headers["Upload-Offset"]) != len(have):
            return JSONResponse({"offset": len(have)}, 409)
        have += await request.body()
        state.partial[sha256] = have
        if len(have) >= state.sizes[sha256]:
            if hashlib.sha256(have).hexdigest() != sha256:
                return error(422, "wrong_digest", "the bytes are not those of the digest")
            state.blobs[sha256] = state.partial.pop(sha256)
        return Response(status_code=204, headers={"Upload-Offset": str(len(have))})

    @app.get("/v1/blobs/{sha256}")
    async def read(sha256: str) -> Response:
        if sha256 not in state.blobs:
            return error(404, "not_found", "there is no such blob")
        return Response(state.blobs[sha256])


def _add_models(app: FastAPI, state: FakeState) -> None:
    @app.get("/v1/models")
    async def models() -> Json:
        return {"models": [{**one, "files": None} for one in state.models.values()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        if name not in state.models:
            return error(404, "not_found", f"there is no base model {name!r}")
        return JSONResponse(state.models[name])

    @app.post("/v1/models")
    async def register(request: Request) -> Response:
        body = await request.json()
        missing = [one["path"] for one in body["files"] if one["sha256"] not in state.blobs]
        if missing:
            return error(422, "missing_blob", f"upload {missing[0]} first")
        digest = hashlib.sha256(str(body["files"]).encode()).hexdigest()
        state.models[body["name"]] = {
            **body,
            "digest": digest,
            "family": "bert",
            "layer_count": 2,
            "size_bytes": sum(one["size_bytes"] for one in body["files"]),
        }
        return JSONResponse({"digest": digest}, 201)


def _add_runs(app: FastAPI, state: FakeState) -> None:
    @app.get("/v1/runs")
    async def runs() -> Json:
        last = [answers[-1] for answers in state.runs.values()]
        return {
            "runs": [
                {
                    **{key: one[key] for key in ("run_id", "name", "strategy", "status", "reason")},
                    "round_number": one["round_number"],
                    "rounds": one["rounds_total"],
                    "accuracy": one["accuracy_before"],
                }
                for one in last
            ]
        }

    @app.post("/v1/runs")
    async def submit(request: Request) -> Response:
        if state.refuse_runs_with:
            return error(422, "bad_run", state.refuse_runs_with)
        state.submitted.append(await request.json())
        return JSONResponse({"run_id": "run-1"}, 201)

    @app.get("/v1/runs/{run_id}")
    async def run(run_id: str) -> Response:
        if run_id not in state.runs:
            return error(404, "not_found", f"there is no run {run_id!r}")
        answers = state.runs[run_id]
        return JSONResponse(answers.pop(0) if len(answers) > 1 else answers[0])

    @app.post("/v1/runs/{run_id}/cancel")
    async def cancel(run_id: str) -> Response:
        if state.runs[run_id][-1]["status"] in ("finished", "failed", "cancelled"):
            return error(409, "conflict", f"run {run_id} has ended")
        state.cancelled.append(run_id)
        return JSONResponse({})

    @app.get("/v1/runs/{run_id}/files")
    async def files(run_id: str) -> Json:
        held = state.files.get(run_id, {})
        return {"files": sorted(held)}

    @app.get("/v1/runs/{run_id}/files/{name:path}")
    async def file(run_id: str, name: str) -> Response:
        return Response(state.files[run_id][name])


@contextmanager
def serving(state: FakeState) -> Iterator[str]:
    """Serve on a free loopback port; gives the address."""
    config = uvicorn.Config(build_app(state), host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the fake server did not start")
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def closed_port_url() -> str:
    """An address where nothing answers: port 1 is never assigned to a program."""
    return "http://127.0.0.1:1"
