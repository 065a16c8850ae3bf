"""``legend demo``: a whole fleet on one machine, as the processes it is made of.

The composition root of the demonstration: it starts the programs that a person
would start, talks to the server like the ``legend`` command does, and checks
the exported adapter in a process that has none of our code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from broker_server.dataset_split import write_text
from broker_server.demo_children import Children, child_environment
from broker_server.demo_fleet import (
    MODEL_NAME,
    RECIPE,
    DemoFleet,
    DemoFolder,
    agent_command,
    base_model_dir,
    read_fleet,
    server_command,
    write_data,
    write_run_file,
)
from broker_server.demo_report import DemoResult, result_of, show_summary
from broker_server.operator_api_client import OperatorApi, add_model, fetch_adapter
from broker_server.run_spec import load_run_spec, read_held_out
from broker_server.transfer_progress import show_transfers
from broker_server.watch import watch_run
from wire_protocol.errors import LegendError, ServerUnavailable

Json = Mapping[str, Any]

_POLL_S = 0.25
_SERVER_PATIENCE_S = 60.0
_ONLINE_PATIENCE_S = 180.0
_MEASURE_PATIENCE_S = 420.0
_CHECK_PATIENCE_S = 300.0
_CHECK_TOLERANCE_EXAMPLES = 1
"""Batches are padded differently, so that a tie between two labels may flip."""


@dataclass(frozen=True)
class DemoOptions:
    """What ``legend demo`` was asked for.

    Attributes:
        folder: everything is written here; None makes a temporary one.
        json_file: where to write the result; None does not.
    """

    broker: str = "embedded"
    rounds: int = 6
    fleet: str = "demo4"
    folder: Path | None = None
    json_file: Path | None = None


@dataclass(frozen=True)
class Stage:
    """What every step of the demonstration needs."""

    folder: DemoFolder
    fleet: DemoFleet
    children: Children
    console: Console

    def say(self, line: str) -> None:
        """Tell the person what happens."""
        self.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def wait_for(self, what: str, patience_s: float, *, done: Callable[[], bool]) -> None:
        """Poll until something is so.

        Raises:
            LegendError: a process died meanwhile, or it never happened.
        """
        deadline = time.monotonic() + patience_s
        while not done():
            self.children.check()
            if time.monotonic() > deadline:
                logs = self.folder.logs
                raise LegendError(f"no {what} within {patience_s:.0f} s; see the logs in {logs}")
            time.sleep(_POLL_S)


def run_demo(options: DemoOptions, *, console: Console | None = None) -> DemoResult:
    """Train on an imitated fleet and check what came out.

    Raises:
        ConfigError: the fleet does not exist or the base model is not installed.
        LegendError: a process died, the run failed, or the exported adapter
            does not reproduce the run's accuracy.
    """
    began = time.monotonic()
    shown = console or Console()
    fleet, model_dir = read_fleet(options.fleet), base_model_dir()
    folder = _fresh_folder(options.folder)
    write_data(folder, list(fleet.devices))
    write_run_file(folder, options.rounds)
    with _stops_on_sigterm(), Children(folder.logs) as children:
        stage = Stage(folder, fleet, children, shown)
        stage.say(f"everything is written to {folder.root}")
        run = _run_on_fleet(stage, options.broker, model_dir)
    shown.print("checking the adapter with nothing but transformers and peft")
    _check_adapter(folder, model_dir, expected=run["rounds"][-1]["accuracy"])
    result = result_of(run, fleet.boards, folder.adapter, wall_s=time.monotonic() - began)
    show_summary(shown, run, result, model_dir=model_dir)
    if options.json_file is not None:
        write_text(options.json_file, json.dumps(result.to_json(), indent=2) + "\n")
    return result


def _fresh_folder(given: Path | None) -> DemoFolder:
    """A folder for this demonstration alone: state of an earlier one would be gone on with."""
    if given is None:
        return DemoFolder(Path(tempfile.mkdtemp(prefix="legend-demo-")))
    if given.exists() and (not given.is_dir() or any(given.iterdir())):
        raise LegendError(f"{given} is not empty; give --keep a new folder")
    return DemoFolder(given.resolve())


def _run_on_fleet(stage: Stage, broker: str, model_dir: Path) -> Json:
    """Start everything, train, fetch the adapter; returns the finished run's JSON."""
    folder = stage.folder
    url = _start_server(stage, broker)
    for device_id in stage.fleet.devices:
        command = agent_command(folder, stage.fleet, device_id, url=url)
        stage.children.start(device_id, command)
    try:
        with OperatorApi(url) as api:
            run = _train(api, stage, model_dir)
            if run["status"] != "finished":
                why = f"the run {run['status']}: {run['reason']}"
                raise LegendError(f"{why}; see the logs in {folder.logs}")
            fetch_adapter(api, run["run_id"], folder.adapter)
    except ServerUnavailable:
        stage.children.check()  # a dead server explains itself better
        raise
    return run


def _start_server(stage: Stage, broker: str) -> str:
    """Start the server; returns its address once it answers."""
    ready = stage.folder.server_state / "server.json"
    stage.children.start("broker-server", server_command(stage.folder, broker))
    stage.wait_for("server", _SERVER_PATIENCE_S, done=ready.exists)
    url = str(json.loads(ready.read_text(encoding="utf-8"))["url"])
    with OperatorApi(url) as api:
        stage.wait_for("answer of the server", _SERVER_PATIENCE_S, done=lambda: _answers(api))
    stage.say(f"server at {url}, {broker} broker")
    return url


def _answers(api: OperatorApi) -> bool:
    try:
        return bool(api.health()["status"] == "ok")
    except ServerUnavailable:
        return False


def _train(api: OperatorApi, stage: Stage, model_dir: Path) -> Json:
    """Register the base model, launch the run and follow it to its end."""
    with show_transfers() as report:
        digest = add_model(api, str(model_dir), name=MODEL_NAME, report=report)["digest"]
    stage.say(f"base model {MODEL_NAME} uploaded")
    online = _Roll(api, stage, said="is online", counts=lambda one: one["state"] == "online")
    stage.wait_for("complete fleet", _ONLINE_PATIENCE_S, done=online.complete)
    spec = load_run_spec(stage.folder.run_file)
    held_out = read_held_out(spec.evaluation)
    run_id = api.submit_run(spec.submitted(held_out, api.upload_bytes(held_out.content)))
    stage.say(f"run {run_id} launched; the devices measure themselves with its base model")
    measured = _Roll(
        api, stage, said="has measured itself", counts=lambda one: _knows(one, str(digest))
    )
    stage.wait_for(
        "measured fleet",
        _MEASURE_PATIENCE_S,
        done=lambda: measured.complete() or _is_under_way(api.run(run_id)),
    )

    def fetch() -> Json:
        stage.children.check()
        return api.run(run_id)

    return watch_run(fetch, stage.console)


class _Roll:
    """Says once of each device of the fleet that it has come so far."""

    def __init__(
        self, api: OperatorApi, stage: Stage, *, said: str, counts: Callable[[Json], bool]
    ) -> None:
        self._api, self._stage, self._said, self._counts = api, stage, said, counts
        self._present: set[str] = set()

    def complete(self) -> bool:
        """Look again; true when every device of the fleet was seen."""
        for device in self._api.devices():
            device_id = device["device_id"]
            if device_id not in self._present and self._counts(device):
                self._present.add(device_id)
                self._stage.say(f"{device_id} ({device['board']}) {self._said}")
        return self._present.issuperset(self._stage.fleet.devices)


def _knows(device: Json, digest: str) -> bool:
    compute = (device.get("capability") or {}).get("compute") or {}
    return bool(compute.get("model_digest") == digest)


def _is_under_way(run: Json) -> bool:
    """True when the server does not wait for measurements any more."""
    assigned = any(device["depth"] for device in run["live"])
    return assigned or bool(run["rounds"]) or run["status"] not in ("queued", "running")


def _check_adapter(folder: DemoFolder, model_dir: Path, *, expected: float) -> None:
    """Evaluate the exported adapter in a process with only transformers and peft.

    Raises:
        LegendError: the accuracy differs from what the run reported.
    """
    arguments = ("--base", model_dir, "--adapter", folder.adapter, "--held-out", folder.held_out)
    tokens = ("--max-tokens", RECIPE["max_tokens"])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "broker_server.demo_check", *map(str, arguments + tokens)],
            env=child_environment(os.environ),
            capture_output=True,
            check=False,
            timeout=_CHECK_PATIENCE_S,
        )
    except subprocess.TimeoutExpired as error:
        raise LegendError(f"the check took more than {_CHECK_PATIENCE_S:.0f} s") from error
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise LegendError(f"the exported adapter cannot be loaded: {words}")
    found = json.loads(done.stdout.decode().strip().rpartition("\n")[2])
    difference = abs(found["accuracy"] - expected) * found["examples"]
    if difference > _CHECK_TOLERANCE_EXAMPLES + 0.5:
        raise LegendError(
            f"the exported adapter scores {found['accuracy']:.4f}, the run said {expected:.4f}"
        )


@contextmanager
def _stops_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C does, so that no process stays behind."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
