"""What must stay light stays light: checked in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "onnxruntime", "matplotlib", "pyarrow")


def modules_after(code: str) -> set[str]:
    """Names of the top-level modules that are loaded after running ``code``."""
    script = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_contract_and_the_cores_need_no_torch() -> None:
    loaded = modules_after(
        "import wire_protocol, broker_server.strategies, broker_server.coordinator, edge_agent.cli"
    )
    assert not loaded & set(HEAVY)


def test_the_running_agent_s_shell_loads_neither_torch_nor_numpy() -> None:
    assert not modules_after("import edge_agent.app") & {*HEAVY, "numpy", "safetensors"}


def test_the_running_server_loads_no_torch() -> None:
    assert not modules_after("import broker_server.app") & set(HEAVY)


@pytest.mark.parametrize(
    "program", ["edge_agent.cli", "broker_server.cli", "broker_server.operator_cli"]
)
def test_help_loads_nothing_that_is_slow_to_load(program: str) -> None:
    loaded = modules_after(f"import {program}")
    assert not loaded & {*HEAVY, "numpy", "pydantic", "httpx", "paho", "rich", "sqlalchemy"}


def test_the_state_machines_load_no_transport() -> None:
    loaded = modules_after("import broker_server.coordinator, edge_agent.session")
    assert not loaded & {"paho", "httpx", "fastapi", "sqlalchemy", "anyio", "uvicorn"}
