"""Looks at the board and says whether its owner lets it train now."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from datetime import datetime

from edge_agent.capability import Device
from edge_agent.sensors import SensorReading
from edge_agent.state_dir import StateDir
from edge_agent.training_policy import (
    Conditions,
    mains_power,
    reason_not_to_train,
    too_warm,
)


@dataclass
class PolicyWatch:
    """Remembers the last look: a board that was too warm must cool down first.

    Attributes:
        reading: what the sensors said.
        reason: why this device does not train; empty when it may.
    """

    device: Device
    state: StateDir
    reading: SensorReading = field(default_factory=SensorReading)
    reason: str = ""
    _was_too_warm: bool = False

    def look(self, trainer_pid: int | None = None) -> None:
        """Read everything again; some boards take a second to answer.

        Args:
            trainer_pid: a warm trainer, whose memory is there for training.
        """
        settings = self.device.settings
        self.reading = self.device.sensors()
        now = Conditions(
            local_time=datetime.now().astimezone(),
            memory_available_bytes=self.device.memory_budget_bytes(trainer_pid=trainer_pid),
            disk_free_bytes=shutil.disk_usage(self.state.root).free,
            sensors=self.reading,
            on_mains=mains_power(settings.sysroot),
            was_too_warm=self._was_too_warm,
        )
        self._was_too_warm = too_warm(settings.training, now)
        self.reason = reason_not_to_train(settings.training, now)
