"""A board whose PyTorch is for an older Python: only its trainer runs under that one.

Needs an interpreter with the packages of a file below ``profiles/constraints``, named by
``LEGEND_TRAINER_PYTHON``, e.g. of JetPack 5: Python 3.8, torch 2.4.1, transformers 4.46, peft 0.13.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.site import open_site
from tests.support.tiny_models import make_base_model
from wire_protocol.model_family import FAMILIES

pytestmark = [pytest.mark.e2e, pytest.mark.train]

ROOT = Path(__file__).parents[2]
VERSIONS = """
import json, sys, numpy, peft, safetensors, torch, transformers
print(json.dumps({"python": sys.version_info[:2], "torch": torch.__version__}))
"""

HIDDEN = """
import json, sys
from pathlib import Path
import torch
from edge_agent.base_model import load_base_model
folder, task, labels = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
base = load_base_model(folder, task, labels)
ids = torch.tensor([base.tokenizer("a line of a log, and another one")["input_ids"]])
with torch.no_grad():
    hidden = base.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
print(json.dumps([ids.tolist(), hidden.flatten().tolist()]))
"""


@pytest.fixture(scope="module")
def old_python() -> str:
    python = os.environ.get("LEGEND_TRAINER_PYTHON")
    if not python:
        pytest.skip("LEGEND_TRAINER_PYTHON names no interpreter of an older board")
    done = subprocess.run(
        [python, "-c", VERSIONS], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["python"] < [3, 10]
    return python


def test_an_old_and_a_new_trainer_train_in_the_same_rounds(old_python: str, tmp_path: Path) -> None:
    with open_site(tmp_path) as site:
        site.start_agent("xavier", trainer_python=old_python)
        site.start_agent("pi")
        site.wait_for_devices("xavier", "pi")
        run = site.wait_for_end(site.launch(rounds=2))
    assert run["status"] == "finished", run["reason"]
    for one in run["rounds"]:
        assert {device["device_id"]: device["status"] for device in one["devices"]} == {
            "xavier": "updated",
            "pi": "updated",
        }


def in_child(python: str, folder: Path, family: str) -> tuple[list[list[int]], list[float]]:
    """Token ids and last hidden states of a base model under an interpreter."""
    task = FAMILIES[family].task
    labels = 2 if task == "classification" else 0
    done = subprocess.run(
        [python, "-c", HIDDEN, str(folder), task, str(labels)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    ids, hidden = json.loads(done.stdout)
    return ids, hidden


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_base_model_saved_by_new_packages_is_the_same_under_old_ones(
    old_python: str, tmp_path: Path, family: str
) -> None:
    make_base_model(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    if "rope_parameters" in config:
        # Not the default, which a reader that misses the key would take.
        config["rope_parameters"]["rope_theta"] = 100.0
        (tmp_path / "config.json").write_text(json.dumps(config))
    ids, hidden = in_child(sys.executable, tmp_path, family)
    old_ids, old_hidden = in_child(old_python, tmp_path, family)
    assert old_ids == ids
    assert old_hidden == pytest.approx(hidden, abs=1e-4)
