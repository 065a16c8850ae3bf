"""What can be said of the roles and playbooks without a host."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker_server.settings import ServerSettings
from edge_agent.settings import AgentSettings
from edge_agent.training_policy import TrainingPolicy
from wire_protocol.errors import ConfigError, Refused
from wire_protocol.settings import parse_settings

pytestmark = pytest.mark.ansible

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE = ROOT / "ansible"
CONSTRAINTS = ROOT / "profiles" / "constraints"
ROLES = sorted(path.name for path in (ANSIBLE / "roles").iterdir())
# Their variables come from the role that uses them.
USED_BY_ROLES = ("release", "mosquitto")
GIVEN_BY_ROLES = {"device_identity_name"}
PLAYBOOKS = sorted(path.name for path in (ANSIBLE / "playbooks").glob("*.yml"))
PYTHON_OF = {"py38": "3.8", "py310": "3.10", "py311": "3.11", "py312": "3.12", "py313": "3.13"}


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _run(program: str, *arguments: str, cwd: Path = ANSIBLE) -> subprocess.CompletedProcess[str]:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed: pip install ansible-core ansible-lint yamllint")
    path = f"{Path(found).parent}:{os.environ['PATH']}"  # ansible-lint starts its neighbours
    environment = {**os.environ, "NO_COLOR": "1", "PATH": path}
    return subprocess.run(
        [found, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def _options(role: str) -> dict[str, dict[str, Any]]:
    content = _yaml(ANSIBLE / "roles" / role / "meta" / "argument_specs.yml")
    options: dict[str, dict[str, Any]] = content["argument_specs"]["main"]["options"]
    return options


def test_yamllint_finds_nothing() -> None:
    answer = _run("yamllint", "--strict", ".")
    assert answer.returncode == 0, answer.stdout


def test_ansible_lint_passes_the_production_profile() -> None:
    answer = _run("ansible-lint", "--nocolor", "--offline", "--profile", "production")
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_a_playbook_is_valid_with_the_sample_inventory(playbook: str) -> None:
    answer = _run(
        "ansible-playbook", "--syntax-check", "-i", "inventory-sample.yml", f"playbooks/{playbook}"
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("role", ROLES)
def test_every_option_of_a_role_has_its_prefix_and_a_sentence(role: str) -> None:
    for name, option in _options(role).items():
        assert name.startswith(f"{role}_")
        assert option["description"].endswith(".")


@pytest.mark.parametrize("role", ROLES)
def test_the_defaults_of_a_role_are_those_that_it_documents(role: str) -> None:
    documented = {
        name: option["default"]
        for name, option in _options(role).items()
        if not option.get("required")
    }
    assert _yaml(ANSIBLE / "roles" / role / "defaults" / "main.yml") == documented


@pytest.mark.parametrize("role", ROLES)
def test_the_readme_of_a_role_lists_its_variables(role: str) -> None:
    readme = (ANSIBLE / "roles" / role / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)
    assert listed == list(_options(role))


@pytest.mark.parametrize("role", [role for role in ROLES if role not in USED_BY_ROLES])
def test_the_sample_inventory_names_every_variable_with_its_default(role: str) -> None:
    sample = (ANSIBLE / "inventory-sample.yml").read_text(encoding="utf-8")
    for name, option in _options(role).items():
        if name in GIVEN_BY_ROLES:
            continue
        line = re.search(rf"^ *(# )?{name}: (.+)$", sample, re.MULTILINE)
        assert line, f"{name} is not in the sample inventory"
        if not option.get("required"):
            commented = re.search(rf"^ *# {name}: (.+)$", sample, re.MULTILINE)
            assert commented, f"{name} is optional and not commented out"
            assert yaml.safe_load(commented.group(1)) == option["default"]


def _render(role: str, template: str, **values: Any) -> str:
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ANSIBLE / "roles" / role / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        autoescape=False,
    )
    environment.filters["to_json"] = json.dumps
    text: str = environment.get_template(template).render(**values)
    return text


def _agent_values(**changes: Any) -> dict[str, Any]:
    defaults = _yaml(ANSIBLE / "roles/edge_agent/defaults/main.yml")
    return {
        **defaults,
        "edge_agent_device_id": "pi",
        "edge_agent_server": "https://10.0.0.10:8300",
        "edge_agent_memory": {"stdout": str(2 * 2**30)},
        "edge_agent_is_jetson": False,
        "base_board_model": "",
        "ansible_facts": {"getent_group": {"video": [], "root": []}},
        "role_path": "",
        "lookup": lambda *_: "NoNewPrivileges=yes",
        **changes,
    }


def test_the_settings_of_an_agent_are_ones_that_it_accepts() -> None:
    dataset = {"path": "/srv/logs.csv", "text": "line", "label": "kind"}
    text = _render(
        "edge_agent",
        "settings.yml.j2",
        **_agent_values(
            edge_agent_datasets={"triage": dataset},
            edge_agent_training={"window": "22:00-06:30", "temperature_max_c": 75},
            edge_agent_settings={"threads": 3, "heartbeat_s": 10},
        ),
    )
    settings = parse_settings(AgentSettings, text, source="rendered", environ={}, prefix="X_")
    assert (settings.device_id, settings.server, settings.threads) == (
        "pi",
        "https://10.0.0.10:8300",
        3,
    )
    assert (settings.training.window, settings.training.temperature_max_c) == ("22:00-06:30", 75)
    assert settings.datasets["triage"].text == "line"


def test_every_condition_of_training_can_be_set_from_the_inventory() -> None:
    known = _options("edge_agent")["edge_agent_training"]["options"]
    assert set(known) == set(TrainingPolicy.model_fields)


@pytest.mark.parametrize("url", ["", "mqtts://broker:8883"])
def test_the_settings_of_the_server_are_ones_that_it_accepts(url: str) -> None:
    defaults = _yaml(ANSIBLE / "roles/broker_server/defaults/main.yml")
    values = {
        **defaults,
        "broker_server_host": "10.0.0.10",
        "broker_server_token": "it's: {secret}",
        "broker_server_broker_url": url,
    }
    text = _render("broker_server", "settings.yml.j2", **values)
    settings = parse_settings(ServerSettings, text, source="rendered", environ={}, prefix="X_")
    assert (settings.pki, settings.token) == (
        Path("/var/lib/broker-server/pki"),
        "it's: {secret}",
    )
    assert settings.broker.kind == ("external" if url else "mosquitto")
    assert settings.broker.url == (url or None)


def _unit(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def test_an_allocation_fails_before_the_kernel_kills() -> None:
    unit = _unit(_render("edge_agent", "edge-agent.service.j2", **_agent_values()))
    share = int(unit["LimitDATA"]) / (2 * 2**30)
    assert share < int(unit["MemoryHigh"].rstrip("%")) / 100
    assert int(unit["MemoryHigh"].rstrip("%")) < int(unit["MemoryMax"].rstrip("%"))
    assert unit["OOMPolicy"] == "continue"


def test_an_agent_that_is_refused_or_misconfigured_keeps_its_starts() -> None:
    unit = _unit(_render("edge_agent", "edge-agent.service.j2", **_agent_values()))
    never = {Refused.exit_code, ConfigError.exit_code}
    assert {int(code) for code in unit["RestartPreventExitStatus"].split()} == never


def test_the_broker_has_the_revocation_list_before_the_server_lets_it_read_anew() -> None:
    tasks = _yaml(ANSIBLE / "roles/fleet_ca/tasks/install.yml")
    order = [file for task in tasks for file in task.get("loop", [])]
    assert order.index("crl.pem") < order.index("issued.jsonl")


def test_the_unit_names_only_groups_that_the_host_has() -> None:
    unit = _unit(_render("edge_agent", "edge-agent.service.j2", **_agent_values()))
    assert unit["SupplementaryGroups"] == "video"


def test_a_jetson_keeps_its_devices_and_its_address_space() -> None:
    unit = _unit(
        _render("edge_agent", "edge-agent.service.j2", **_agent_values(edge_agent_is_jetson=True))
    )
    assert "PrivateDevices" not in unit
    assert "LimitDATA" not in unit


def test_no_unit_forbids_what_torch_needs() -> None:
    sandbox = (ANSIBLE / "roles/release/templates/sandbox.j2").read_text(encoding="utf-8")
    assert "MemoryDenyWriteExecute" not in _unit(sandbox)


def _edited(text: str) -> str:
    tasks = _yaml(ANSIBLE / "roles/raspberry_pi/tasks/pi.yml")
    block = next(task["block"] for task in tasks if "block" in task)
    edit = next(
        task["ansible.builtin.replace"] for task in block if "ansible.builtin.replace" in task
    )
    return re.sub(edit["regexp"], edit["replace"], text, flags=re.MULTILINE)


@pytest.mark.parametrize("ending", ["", "\n", " \n"])
def test_the_kernel_command_line_stays_one_line_and_is_edited_once(ending: str) -> None:
    once = _edited("console=tty1 cgroup_disable=memory rootwait" + ending)
    assert once.split()[-1] == "cgroup_enable=memory"
    assert once.strip().count("\n") == 0
    assert _edited(once) == once


def test_power_modes_are_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "var/lib/nvpmodel").mkdir(parents=True)
    conf = "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >\n< PM_CONFIG DEFAULT=0 >\n"
    (tmp_path / "etc/nvpmodel.conf").write_text(conf)
    script = ANSIBLE / "roles/jetson/files/power_modes.py"
    command = [sys.executable, str(script), f"{tmp_path}/"]
    before = json.loads(subprocess.check_output(command))
    (tmp_path / "var/lib/nvpmodel/status").write_text("pmode:0001 fmode:quiet\n")
    after = json.loads(subprocess.check_output(command))
    assert before == {"modes": {"15W": 0, "7W": 1}, "active": 0}
    assert after["active"] == 1


@pytest.mark.parametrize("file", sorted(CONSTRAINTS.glob("*.txt")), ids=lambda path: path.stem)
def test_the_constraints_of_a_board_still_resolve_for_it(file: Path) -> None:
    python = PYTHON_OF[file.stem.rpartition("-")[2]]
    if python == "3.8":  # the trainer's interpreter only: our own package needs 3.10
        what = [str(file)]
    else:
        what = ["--constraint", str(file), "--extra", "train", str(ROOT / "pyproject.toml")]
    arguments = ["pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    arguments += ["--only-binary", ":all:", "--python-version", python]
    glibc = "2_31" if python == "3.8" else "2_35"
    arguments += ["--python-platform", f"aarch64-manylinux_{glibc}"]
    answer = _run("uv", *arguments, *what, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    resolved = dict(re.findall(r"^([\w.-]+)==(\S+)$", answer.stdout, re.MULTILINE))
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", file.read_text(), re.MULTILINE):
        assert resolved.get(name, version) == version
    if file.stem.startswith("rpi"):
        assert not [name for name in resolved if name.startswith("nvidia-")]
