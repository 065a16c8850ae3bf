"""The small programs that the roles send to a device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from broker_server.pki import FleetPki
from edge_agent.identity import load_identity

pytestmark = pytest.mark.ansible

ROLES = Path(__file__).resolve().parents[2] / "ansible" / "roles"
IDENTITY = ROLES / "device_identity/files/identity.py"
IDLE = ROLES / "edge_agent/files/idle.py"

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl is not installed: apt install openssl"
)


def _answer(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_openssl
def test_a_key_made_on_the_device_is_certified_and_the_agent_takes_it(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    nothing = json.loads(_answer(IDENTITY, "look", folder).stdout)
    assert nothing == {"serial": "", "name": "", "matches": False}

    request = _answer(IDENTITY, "request", folder, "pi").stdout
    pki = FleetPki.create(tmp_path / "pki", "lab", ["10.0.0.10"], time.time())
    issued = pki.issue_device("pi", request, time.time())
    (folder / "device.pem").write_text(issued.pem)
    (folder / "ca.pem").write_text(pki.ca_pem)
    (folder / "operator.pub").write_text(pki.operator_public_key)

    seen = json.loads(_answer(IDENTITY, "look", folder).stdout)
    assert seen == {"serial": f"{issued.serial:x}", "name": "pi", "matches": True}
    assert load_identity(folder, device_id="pi", now=time.time()).device_id == "pi"


@needs_openssl
def test_a_key_is_kept_until_another_one_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    first = _answer(IDENTITY, "request", folder, "pi").stdout
    assert _answer(IDENTITY, "request", folder, "pi").stdout == first
    assert (folder / "device.key").stat().st_mode & 0o777 == 0o600
    assert _answer(IDENTITY, "new-request", folder, "pi").stdout not in ("", first)


def test_a_device_that_trains_is_not_restarted(tmp_path: Path) -> None:
    status, mark = tmp_path / "status.json", tmp_path / "restarted"
    status.write_text(json.dumps({"pid": os.getpid(), "busy_with": "round-7"}))
    answer = _answer(IDLE, status, "0", "touch", mark)
    assert answer.returncode == 1
    assert "round-7" in answer.stderr
    assert not mark.exists()


@pytest.mark.parametrize("text", ['{"pid": 1, "busy_with": null}', "", '{"busy_with": "x"}'])
def test_a_device_that_does_not_train_is_restarted_at_once(tmp_path: Path, text: str) -> None:
    status, mark = tmp_path / "status.json", tmp_path / "restarted"
    status.write_text(text)
    assert _answer(IDLE, status, "600", "touch", mark).returncode == 0
    assert mark.exists()


def test_what_an_agent_left_that_was_killed_stops_no_restart(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    status = tmp_path / "status.json"
    status.write_text(json.dumps({"pid": ended.pid, "busy_with": "round-7"}))
    assert _answer(IDLE, status, "600").returncode == 0
