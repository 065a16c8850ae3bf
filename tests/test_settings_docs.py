"""docs/settings.md names every key that the three files can hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from broker_server.run_spec import LocalEvaluation, LocalRunSpec
from broker_server.settings import BrokerSettings, ServerSettings
from edge_agent.settings import AgentSettings, DatasetSettings, EmulateSettings, LinkSettings

PAGE = (Path(__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("heading", "models"),
    [
        ("The agent", (AgentSettings, DatasetSettings, EmulateSettings, LinkSettings)),
        ("The server", (ServerSettings, BrokerSettings)),
        ("A run", (LocalRunSpec, LocalEvaluation)),
    ],
)
def test_every_key_is_described(heading: str, models: tuple[type[BaseModel], ...]) -> None:
    (section,) = re.findall(rf"^## {heading}.*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    words = set(re.findall(r"[a-z_]+", section))
    missing = [key for model in models for key in model.model_fields if key not in words]
    assert missing == []
