"""One agent from the first start to the last: status, limits, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.site import Site, open_site

pytestmark = [pytest.mark.e2e, pytest.mark.train]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("site")) as site:
        site.start_agent("pi")
        site.wait_for_devices("pi")
        yield site


def edge_agent(folder: Path, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run one command of the agent to its end."""
    file = folder / "settings.yml"
    file.write_text(yaml.safe_dump({"state_dir": str(folder / "state"), **settings}))
    command = [sys.executable, "-m", "edge_agent.cli", "--settings", str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_an_idle_agent_stays_under_sixty_megabytes(site: Site) -> None:
    status = Path(f"/proc/{site.processes['pi'].pid}/status").read_text()
    resident_kib = int(status.split("VmRSS:")[1].split()[0])
    assert resident_kib * 1024 < 60e6


def test_a_second_agent_in_the_same_state_directory_is_told_who_holds_it(site: Site) -> None:
    command = [sys.executable, "-m", "edge_agent.cli", "--settings", str(site.folder / "pi.yml")]
    done = subprocess.run(
        [*command, "start"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 75
    assert f"pid {site.processes['pi'].pid}" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_says_what_the_running_agent_does(site: Site) -> None:
    command = [sys.executable, "-m", "edge_agent.cli", "--settings", str(site.folder / "pi.yml")]
    done = subprocess.run(
        [*command, "status", "--json"], capture_output=True, text=True, check=True, timeout=60
    )
    status = json.loads(done.stdout)
    assert (status["device_id"], status["connected"]) == ("pi", True)


def test_a_dead_device_is_noticed_at_once_and_a_frozen_one_by_its_lease(site: Site) -> None:
    os.kill(site.processes["pi"].pid, signal.SIGSTOP)
    try:
        site.until(lambda: site.devices()["pi"]["state"] == "lost", "the lease ends")
        silence_s = site.devices()["pi"]["last_seen_s"]
        # Three intervals of two seconds; asking takes a little longer.
        assert 6.0 <= silence_s < 8.0
    finally:
        os.kill(site.processes["pi"].pid, signal.SIGCONT)
    site.until(lambda: site.devices()["pi"]["state"] == "online", "it is heard again")


def test_stop_ends_the_agent_and_says_goodbye(site: Site) -> None:
    command = [sys.executable, "-m", "edge_agent.cli", "--settings", str(site.folder / "pi.yml")]
    done = subprocess.run(
        [*command, "stop"], capture_output=True, text=True, check=True, timeout=60
    )
    assert str(site.processes["pi"].pid) in done.stdout
    assert site.processes["pi"].wait(10) == 0
    site.until(lambda: site.devices()["pi"]["state"] == "lost", "the goodbye arrives")
    again = subprocess.run(
        [*command, "status"], capture_output=True, text=True, check=False, timeout=60
    )
    assert again.returncode == 69


@pytest.mark.parametrize(
    ("settings", "words", "code"),
    [
        ({"emulate": {"board": "jetson-tx3"}}, "jetson-tx2", 78),
        ({"sever": "http://x"}, "did you mean 'server'?", 78),
        ({"emulate": {"board": "jetson-tx2", "power_mode": "TURBO"}}, "MAXN", 78),
        ({"server": "ftp://x"}, "server", 78),
        ({"device_id": "Not A Name"}, "device_id", 78),
        ({"broker": "mqtt://host:notaport"}, "port", 78),
        ({"server": "https://127.0.0.1:1"}, "not enrolled", 78),
        ({"fleet": "another"}, "leads fleet 'site'", 77),
    ],
)
def test_a_wrong_setting_ends_the_agent_with_one_line(
    site: Site, tmp_path: Path, settings: dict[str, Any], words: str, code: int
) -> None:
    done = edge_agent(tmp_path, "start", **{"server": site.url, "fleet": "site", **settings})
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == code, done.stderr
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in done.stderr


def test_doctor_names_what_is_broken_and_what_to_do(site: Site, tmp_path: Path) -> None:
    done = edge_agent(
        tmp_path,
        "doctor",
        "--json",
        server="http://127.0.0.1:1",
        datasets={"reviews": {"path": str(tmp_path / "missing.csv")}},
    )
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1
    assert findings["server"]["state"] == "broken"
    assert findings["dataset"]["state"] == "broken"
    assert findings["dataset"]["remedy"]
    assert findings["memory"]["state"] == "ok"


def test_doctor_is_content_with_a_device_that_can_work(site: Site, tmp_path: Path) -> None:
    done = edge_agent(
        tmp_path,
        "doctor",
        fleet="site",
        server=site.url,
        datasets={"reviews": {"path": str(site.data)}},
    )
    assert done.returncode == 0, done.stdout


def test_training_once_needs_no_server(site: Site, tmp_path: Path) -> None:
    done = edge_agent(
        tmp_path,
        "train-once",
        "--model",
        str(site.folder / "tiny"),
        "--dataset",
        "reviews",
        "--steps",
        "2",
        "--depth",
        "1",
        "--out",
        str(tmp_path / "update.safetensors"),
        "--json",
        datasets={"reviews": {"path": str(site.data)}},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["report"]["steps_done"] == 2
    assert (tmp_path / "update.safetensors").stat().st_size > 0


def test_profile_knows_this_machine_and_every_board(tmp_path: Path) -> None:
    done = edge_agent(tmp_path, "profile", "--boards", "--json")
    assert {"jetson-nano", "rpi-5-8"} <= {row["board"] for row in json.loads(done.stdout)}
    done = edge_agent(tmp_path, "profile", "--json")
    assert json.loads(done.stdout)["capability"]["memory_budget_bytes"] > 0
