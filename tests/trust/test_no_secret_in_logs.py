"""No password, token or key stands where people look: logs, answers, errors, reprs."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from broker_server.broker import open_broker
from broker_server.broker_address import BrokerAddress, Credentials
from broker_server.operator_api_client import OperatorApi, add_model
from broker_server.operator_cli import ServerAddress
from broker_server.run_spec import load_run_spec, read_held_out
from broker_server.settings import ServerSettings
from broker_server.settings import load_settings as load_server_settings
from broker_server.store import Store
from edge_agent.mqtt import BrokerLogin
from edge_agent.server_connection import ServerConnection
from edge_agent.settings import AgentSettings
from tests.support.processes import PATIENCE_S
from tests.support.site import Json, Site
from tests.support.tiny_models import make_base_model, write_reviews
from tests.support.tls_site import TlsSite
from wire_protocol.errors import ConfigError, LegendError
from wire_protocol.signed import Signer

PASSWORD = "xyzzy-Fleet-Token-0123456789"
BROKER_PASSWORD = "plugh-Broker-Password-98765"
SHORTEST = 16
"""Shorter strings of a key file may stand anywhere by chance."""


def leaks(secrets: dict[str, str], places: dict[str, str]) -> list[str]:
    """Which secret stands where."""
    assert secrets
    assert all(len(secret) >= SHORTEST for secret in secrets.values())
    return [
        f"{what} in {where}: ...{text[max(0, text.index(secret) - 80) : text.index(secret)]}<HERE>"
        for where, text in places.items()
        for what, secret in secrets.items()
        if secret in text
    ]


def secrets_below(folder: Path) -> dict[str, str]:
    """Every private key, seed and password in the files that are for their owner alone."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file() or path.stat().st_mode & 0o077:
            continue
        if path.name == "server-signing.json":
            found[name] = json.loads(path.read_text())["seed"]
        elif path.suffix == ".key":
            for number, line in enumerate(path.read_text(errors="replace").splitlines()):
                for secret in re.findall(r"[A-Za-z0-9+/=_-]{32,}", line.strip("-")):
                    found[f"{name}:{number}"] = secret
        elif path.name == "broker.json":
            kept = json.loads(path.read_text())
            found |= {f"{name}:{user}": kept[user] for user in kept if isinstance(kept[user], str)}
    # Public halves are not secret: the operator's key and the statement about the server's key.
    public = "".join(path.read_text() for path in folder.rglob("*.pub"))
    return {what: text for what, text in found.items() if text not in public}


def written_below(folder: Path) -> dict[str, str]:
    """Logs, results and status files: what a person may read or send to somebody."""
    patterns = ("*.log", "status.json", "server.json", "summary.json", "*.jsonl", "README.md")
    return {
        path.relative_to(folder).as_posix(): path.read_text(errors="replace")
        for pattern in patterns
        for path in folder.rglob(pattern)
        if path.is_file()
    }


def answers_to(http: httpx.Client, run_id: str) -> dict[str, str]:
    """Everything that the API says to somebody who may only look, mistakes included."""
    paths = [
        "/metrics", "/openapi.json", "/v1/health", "/v1/doctor", "/v1/devices", "/v1/models",
        "/v1/models/tiny", "/v1/runs", f"/v1/runs/{run_id}", f"/v1/runs/{run_id}/files",
        f"/v1/runs/{run_id}/files/summary.json", "/v1/join?device_id=left", "/v1/enrolments",
        "/v1/runs/none", "/nowhere",
    ]  # fmt: skip
    found = {path: http.get(path) for path in paths}
    found["POST /v1/backup"] = http.post("/v1/backup")
    assert found["/v1/health"].status_code == 200
    assert found["POST /v1/backup"].status_code == 403, "a viewer must not fetch keys"
    assert found["/v1/join?device_id=left"].status_code == 403, "nor the broker's password"
    return {path: f"{answer.headers}\n{answer.text}" for path, answer in found.items()}


@dataclass
class DebugSite(Site):
    """A server that wants a token, at debug level."""

    token: str = PASSWORD

    def server_settings(self, port: int) -> Json:
        return {**super().server_settings(port), "token": self.token}

    @contextmanager
    def api(self) -> Iterator[OperatorApi]:
        with OperatorApi(self.url, token=self.token) as api:
            yield api

    def start_agent(self, name: str, **changes: Any) -> None:
        super().start_agent(name, **{"token": self.token, **changes})

    def _start(
        self,
        name: str,
        module: str,
        arguments: list[str],
        settings: Json,
        *,
        before: list[str] | None = None,
    ) -> None:
        level = ["--log-level", "debug"]
        if module == "broker_server.cli":
            arguments = [arguments[0], *level, *arguments[1:]]
        else:
            before = [*(before or []), *level]
        super()._start(name, module, arguments, settings, before=before)


@dataclass
class DebugTlsSite(TlsSite):
    """A server with certificates, and agents with keys, at debug level."""

    settings: Json = field(default_factory=dict)

    def agent_command(self, name: str, *arguments: str, **settings: Any) -> list[str]:
        command = super().agent_command(name, *arguments, **{**self.settings, **settings})
        place = command.index("--settings")
        return [*command[:place], "--log-level", "debug", *command[place:]]

    def spawn(
        self, name: str, command: list[str], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        if name == "server":
            command = [*command, "--log-level", "debug"]
        return super().spawn(name, command, environment)


def new_token(settings_file: Path, role: str) -> str:
    command = [sys.executable, "-m", "broker_server.cli", "token", "create"]
    arguments = ["--settings", str(settings_file), "--name", role, "--role", role]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.train
def test_a_round_with_a_token_at_debug_level_writes_no_secret_down(tmp_path: Path) -> None:
    site = DebugSite(tmp_path, patience_s=300.0)
    try:
        site.start_server()
        site.add_model()
        site.start_agent("left")
        site.wait_for_devices("left")
        viewer = new_token(tmp_path / "server.yml", "viewer")
        operator = new_token(tmp_path / "server.yml", "operator")
        run_id = site.launch(rounds=1)
        assert site.wait_for_end(run_id)["status"] == "finished"
        refused = httpx.get(
            f"{site.url}/v1/health", headers={"Authorization": f"Bearer {PASSWORD}x"}
        )
        assert refused.status_code == 401
        with httpx.Client(base_url=site.url, headers={"Authorization": f"Bearer {viewer}"}) as http:
            answers = answers_to(http, run_id)
        secrets = secrets_below(tmp_path / "server") | {
            "token": PASSWORD,
            "viewer": viewer,
            "operator": operator,
        }
        assert any("broker.json" in what for what in secrets)
        assert any("server-signing.json" in what for what in secrets)
        assert leaks(secrets, written_below(tmp_path)) == []
        # A token that was sent comes back to nobody, not even to its owner.
        assert leaks(secrets, answers | {"refused": refused.text}) == []
    finally:
        site.close()


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.train
def test_a_round_with_certificates_at_debug_level_writes_no_key_down(tmp_path: Path) -> None:
    data = write_reviews(tmp_path / "reviews.jsonl")
    make_base_model(tmp_path / "tiny", "bert")
    site = DebugTlsSite(tmp_path, settings={"datasets": {"reviews": {"path": str(data)}}})
    try:
        site.start_server()
        viewer = new_token(tmp_path / "server.yml", "viewer")
        operator = new_token(tmp_path / "server.yml", "operator")
        enrolment = site.token("left")
        wrong = site.enroll("left", "0" * 43 + enrolment[enrolment.index(".") :])
        enrolled = site.enroll("left", enrolment)
        assert (wrong.returncode != 0, enrolled.returncode) == (True, 0), enrolled.stderr
        site.start_agent("left", "start")
        with OperatorApi(site.url, token=operator, ca=site.pki.ca_file) as api:
            add_model(api, str(tmp_path / "tiny"), name="tiny", report=lambda *_: None)
            run_id = launch(api, tmp_path, data)
            site.until(lambda: api.run(run_id)["status"] not in ("queued", "running"), "it ends")
            assert api.run(run_id)["status"] == "finished", site.log("left")
        headers = {"Authorization": f"Bearer {viewer}"}
        tls = ssl.create_default_context(cafile=site.pki.ca_file)
        with httpx.Client(base_url=site.url, headers=headers, verify=tls) as http:
            answers = answers_to(http, run_id)
        secret = enrolment.partition(".")[0]
        secrets = secrets_below(tmp_path) | {
            "viewer": viewer,
            "operator": operator,
            "enrolment": secret,
        }
        names = " ".join(secrets)
        for key in ("ca.key", "server.key", "operator.key", "server-signing.json", "device.key"):
            assert key in names, f"{key} was not looked at"
        assert leaks(secrets, written_below(tmp_path) | answers) == []
        said = {
            f"enroll {n}": done.stdout + done.stderr for n, done in enumerate((wrong, enrolled))
        }
        assert leaks(secrets, said) == []
    finally:
        site.close()


def launch(api: OperatorApi, folder: Path, data: Path) -> str:
    run = {
        "name": "quiet",
        "model": "tiny",
        "dataset": "reviews",
        "rounds": 1,
        "local_steps": 2,
        "batch_size": 4,
        "max_tokens": 16,
        "evaluation": {"path": str(data)},
    }
    file = folder / "run.yml"
    file.write_text(yaml.safe_dump(run))
    spec = load_run_spec(file)
    held_out = read_held_out(spec.evaluation)
    return api.submit_run(spec.submitted(held_out, api.upload_bytes(held_out.content)))


OURS = {"password": PASSWORD, "broker password": BROKER_PASSWORD, "seed": "7b" * 32}


def test_what_holds_a_secret_does_not_show_it(tmp_path: Path) -> None:
    url = f"mqtt://user:{BROKER_PASSWORD}@host:1883"
    holders = [
        AgentSettings(token=PASSWORD, broker=url),
        ServerSettings.model_validate(
            {
                "token": PASSWORD,
                "broker": {"kind": "external", "url": url},
                "database": f"postgresql://user:{PASSWORD}@host/db",
            }
        ),
        Credentials("user", BROKER_PASSWORD),
        BrokerAddress("host", 1, server_credentials=Credentials("user", BROKER_PASSWORD)),
        BrokerLogin("host", 1883, "user", BROKER_PASSWORD),
        Signer(bytes.fromhex("7b" * 32)),
        ServerAddress("http://host", PASSWORD),
        OperatorApi("http://host", token=PASSWORD),
        ServerConnection("http://host", token=PASSWORD, answer_s=1.0),
    ]
    shown = {type(holder).__name__: f"{holder!r} {holder!s}" for holder in holders}
    seed = {"seed as bytes": repr(bytes.fromhex("7b" * 32))}
    assert leaks(OURS | seed, shown) == []


def failures(tmp_path: Path) -> Iterator[LegendError]:
    """Errors that are about something secret."""
    yaml_file = tmp_path / "server.yml"
    for text in (
        f"token: [{PASSWORD}]",
        f"token: {PASSWORD}\nprot: 1",
        f"broker: {{kind: external, url: 'http://user:{BROKER_PASSWORD}@host'}}",
        f"token: '{PASSWORD}\nnot yaml: [",
    ):
        yaml_file.write_text(text)
        yield failure(lambda: load_server_settings(yaml_file))
    for url in (f"nonsense://user:{PASSWORD}@host/db", f"sqlite:///{PASSWORD}:/@no/such/db"):
        yield failure(lambda url=url: Store(url))
    for url in (f"mqtt://user:{BROKER_PASSWORD}@host:port", f"mqtt://u:{BROKER_PASSWORD}@h/path"):
        yield failure(lambda url=url: open_broker(url, state_dir=tmp_path))
    unreachable = f"mqtt://user:{BROKER_PASSWORD}@127.0.0.1:1"
    yield failure(lambda: open_broker(unreachable, state_dir=tmp_path).start())
    yield failure(lambda: OperatorApi("http://127.0.0.1:1", token=PASSWORD).health())


def failure(what: Any) -> LegendError:
    try:
        what()
    except LegendError as error:
        return error
    raise AssertionError("it worked")


def test_errors_do_not_quote_what_is_secret(tmp_path: Path) -> None:
    found = list(failures(tmp_path))
    said = {f"error {number}": f"{error} {error!r}" for number, error in enumerate(found)}
    assert leaks(OURS, said) == []
    # Not even with the errors that they were made of: a crash prints those as well.
    chains = {
        f"traceback {number}": "".join(traceback.format_exception(error))
        for number, error in enumerate(found)
        if not isinstance(error, ConfigError)  # those never come with a traceback: one line
    }
    assert leaks(OURS, chains) == []
