"""A server in the middle of a run, and its backup."""

from __future__ import annotations

import json
from pathlib import Path

from broker_server.run_state import MemberCheckpoint, RunCheckpoint
from broker_server.server import Server
from broker_server.settings import ServerSettings
from tests.support.in_process_server import ask
from wire_protocol.parts import BlobRef

ADAPTER = b"the global adapter"


def fill(server: Server) -> None:
    """Round 3 is open: the device ``done`` has sent its update, ``open`` has not."""
    adapter = BlobRef(sha256=server.blobs.put(ADAPTER), size_bytes=len(ADAPTER))
    members = {
        name: MemberCheckpoint(
            assignment_id=f"run-1.3-0.{name}", ranks=(0, 4), steps=5, predicted_s=1.0
        )
        for name in ("done", "open")
    }
    checkpoint = RunCheckpoint(
        round_number=3,
        attempt=0,
        adapter=adapter,
        baseline_done=True,
        tokens_per_step=1.0,
        members=members,
    )
    server.store.create_run("run-1", "{}")
    server.store.set_status("run-1", "running")
    server.store.save_checkpoint("run-1", checkpoint.model_dump_json())
    server.store.record_update("run-1", 3, "done", "the manifest")
    weights = server.blobs.put(b"weights")
    files = [{"path": "sub/config.json", "sha256": weights, "size_bytes": 7}]
    server.store.save_model("ab" * 32, "tiny", files=json.dumps(files), config="{}")
    (server.state.runs / "run-1").mkdir()
    (server.state.runs / "run-1" / "summary.json").write_text("{}")
    (server.state.root / "pki").mkdir()
    (server.state.root / "pki" / "ca.key").write_text("private")
    (server.state.root / "pki" / "ca.key").chmod(0o600)
    (server.state.root / "broker").mkdir()
    (server.state.root / "broker" / "broker.json").write_text("{}")
    (server.state.root / "broker" / "broker.log").write_text("chatter")
    server.blobs.open_upload("cd" * 32, 100)


def save(server: Server, path: Path) -> Path:
    answer = ask(server, "POST", "/v1/backup")
    assert answer.status_code == 200
    path.write_bytes(answer.content)
    return path


def settings(folder: Path, **changes: str) -> ServerSettings:
    return ServerSettings.model_validate({"fleet": "home", "state_dir": folder, **changes})
