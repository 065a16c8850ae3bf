"""A small virtual fleet, a small dataset and a specification around a tiny base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from broker_server.simulation_spec import SimulationSpec, load_simulation_spec

FLEET: Mapping[str, Any] = {
    "name": "six",
    "description": "Six boards of two kinds.",
    "mode_switch_rounds": 2,
    "devices": [
        {
            "board": "jetson-tx2",
            "count": 3,
            "name_prefix": "tx2",
            "power_mode": None,
            "link": {
                "up_mbps": {"low": 1, "high": 10},
                "down_mbps": {"low": 2, "high": 20},
                "round_trip_ms": 10,
                "jitter": 0.2,
            },
        },
        {
            "board": "rpi-4b-4",
            "count": 3,
            "name_prefix": "pi",
            "power_mode": "default",
            "link": {"up_mbps": 5, "down_mbps": 10, "round_trip_ms": 20, "jitter": 0.1},
        },
    ],
}

TEXTS = (
    ("the film was good and moving", "positive"),
    ("the film was bad and dull", "negative"),
    ("a wonderful cast with great ending", "positive"),
    ("an awful script with no ending", "negative"),
)
"""Six words each, so that every example has the same number of tokens."""

WORDS = 6


def write_simulation(folder: Path, model_dir: Path, *, fleet: Mapping[str, Any] = FLEET) -> Path:
    """Write data, fleet and specification; returns the specification's path."""
    rows = "".join(f"{text}\t{label}\n" for text, label in TEXTS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.tsv").write_text("text\tlabel\n" + rows * 24, encoding="utf-8")
    (folder / "test.tsv").write_text("text\tlabel\n" + rows * 2, encoding="utf-8")
    (folder / "fleet.yaml").write_text(json.dumps(fleet), encoding="utf-8")
    document = {
        "model": str(model_dir),
        "fleet": "fleet.yaml",
        # Everybody takes part in every round.
        "strategy": "legend-paper",
        "train": {"path": "train.tsv"},
        "evaluation": {"path": "test.tsv"},
        "partition": {"alpha": 1.0, "minimum": 4},
        "rounds": 3,
        "devices_per_round": 4,
        "local_steps": 2,
        "batch_size": 4,
        "learning_rate": 0.01,
        "max_tokens": 16,
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def specification(path: Path, *overrides: str) -> SimulationSpec:
    """Read it, with overrides as on the command line."""
    return load_simulation_spec(path, overrides)
