"""Runs that cannot work: one clear line each, and nothing half-done."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker_server.store import Store
from tests.support.site import Site, open_site
from wire_protocol.errors import ConfigError
from wire_protocol.messages import UpdateManifest

pytestmark = [pytest.mark.e2e, pytest.mark.train]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("site")) as site:
        site.start_agent("pi")
        other = site.folder / "other.jsonl"
        other.write_text('{"text": "a", "label": "purple"}\n' * 8)
        site.start_agent("stranger", datasets={"reviews": {"path": str(other)}})
        site.wait_for_devices("pi", "stranger")
        yield site


def broker_server(folder: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Start a server that is expected to refuse its settings."""
    file = folder / "server.yml"
    file.write_text(yaml.safe_dump({"state_dir": str(folder / "server"), **settings}))
    command = [sys.executable, "-m", "broker_server.cli", "serve", "--settings", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "nobody"}, "known: tiny"),
        ({"task": "instruction"}, "does classification"),
        ({"labels": ["only"]}, "at least two labels"),
        ({"strategy_options": {"rank_mim": 3}}, "rank_mim"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_begins(
    site: Site, changes: dict[str, Any], words: str
) -> None:
    with site.api() as api:
        before = len(api.runs())
    with pytest.raises(ConfigError, match=words):
        site.launch(**changes)
    with site.api() as api:
        assert len(api.runs()) == before


def test_a_device_with_other_labels_stays_out_with_the_reason(site: Site) -> None:
    run = site.wait_for_end(site.launch(rounds=1))
    assert run["status"] == "finished"
    assert [d["device_id"] for d in run["rounds"][0]["devices"]] == ["pi"]
    assert "purple" in site.devices()["stranger"]["note"]


def test_a_cancelled_run_ends_and_the_device_is_free_again(site: Site) -> None:
    run_id = site.launch(rounds=500)
    site.until(lambda: site.run(run_id)["rounds"], "a round is done")
    with site.api() as api:
        api.cancel_run(run_id)
    run = site.wait_for_end(run_id)
    assert (run["status"], run["reason"]) == ("cancelled", "cancelled by the operator")
    site.until(lambda: site.status("pi")["busy_with"] is None, "the agent stopped")
    with pytest.raises(ConfigError, match="cancelled already"), site.api() as api:
        api.cancel_run(run_id)


def test_a_second_server_in_the_same_state_directory_is_refused(site: Site, tmp_path: Path) -> None:
    done = broker_server(tmp_path, state_dir=str(site.folder / "server"), port=0)
    assert done.returncode == 75
    assert "already uses" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = broker_server(tmp_path, port=taken.getsockname()[1])
    assert done.returncode == 78
    assert "cannot listen" in done.stderr
    assert not (tmp_path / "server" / "broker").exists()


@pytest.mark.parametrize(
    ("settings", "words", "code"),
    [
        ({"broker": {"kind": "rabbit"}}, "broker.kind", 78),
        ({"broker": {"kind": "external"}}, "needs broker.url", 78),
        ({"broker": {"kind": "external", "url": "mqtt://127.0.0.1:1"}}, "broker", 69),
        ({"host": "0.0.0.0"}, "needs a token", 78),
        ({"prot": 1}, "did you mean 'port'?", 78),
    ],
)
def test_wrong_server_settings_end_with_one_line(
    tmp_path: Path, settings: dict[str, Any], words: str, code: int
) -> None:
    done = broker_server(tmp_path, **{"port": 0, **settings})
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == code, done.stderr
    assert len(errors) == 1
    assert words in errors[0]


def test_the_operator_is_told_when_no_server_answers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "broker_server.operator_cli", "--server"]
    done = subprocess.run(
        [*command, "http://127.0.0.1:1", "devices"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 69
    assert "no server answers" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_results_of_a_run_can_be_read_by_a_person(site: Site) -> None:
    run_id = site.launch(rounds=2)
    site.wait_for_end(run_id)
    folder = site.folder / "server" / "runs" / run_id
    site.until((folder / "devices.png").exists, "the plots are drawn")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert {"accuracy.png", "summary.json", "assignments.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


def test_devices_take_turns_at_the_two_lora_factors(site: Site) -> None:
    run = site.wait_for_end(site.launch(rounds=2, strategy="rolora"))
    assert run["status"] == "finished", run["reason"]
    store = Store.in_folder(site.folder / "server")
    sizes = [
        UpdateManifest.model_validate_json(text).update.size_bytes
        for number in (1, 2)
        for text in store.updates(run["run_id"], number).values()
    ]
    both = site.wait_for_end(site.launch(rounds=1, strategy="fedlora"))
    assert len(sizes) == 2
    assert max(sizes) < both["rounds"][0]["bytes_up"]
