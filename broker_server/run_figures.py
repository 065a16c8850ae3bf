"""What a run has cost and reached so far: sums that grow by one round at a time.

A round of two hundred devices is 0.3 MB, so nothing here keeps rounds. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from broker_server.run_state import RoundResult


@dataclass
class RunFigures:
    """Sums over the rounds of a run, in order.

    Attributes:
        rounds: number of the last one; they are numbered from 1 without gaps.
        duration_s: time in rounds, without evaluation and without time that the server was down.
        waiting_s: sum of the rounds' mean waiting times.
        idle_s: sum of the waiting times of all devices that sent updates.
        busy_s: sum of the completion times of the same devices.
        devices: everyone who took part.
        emulated: those of them that imitate a board.
    """

    rounds: int = 0
    accuracy: float | None = None
    accuracy_best: float | None = None
    loss: float | None = None
    duration_s: float = 0.0
    waiting_s: float = 0.0
    idle_s: float = 0.0
    busy_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    clipped: int = 0
    refused: int = 0
    devices: set[str] = field(default_factory=set)
    emulated: set[str] = field(default_factory=set)

    def add(self, result: RoundResult) -> dict[str, object]:
        """Count a round.

        Returns:
            Its line in the metrics; ``elapsed_s`` is the duration of all rounds so far.
        """
        self.rounds = result.round
        self.accuracy, self.loss = result.accuracy, result.loss
        self.accuracy_best = max(result.accuracy, self.accuracy_best or result.accuracy)
        self.duration_s += result.duration_s
        self.waiting_s += result.waiting_s
        self.bytes_up += result.bytes_up
        self.bytes_down += result.bytes_down
        self.clipped += result.clipped
        self.refused += result.refused
        for device in result.devices:
            self.idle_s += device.waiting_s or 0.0
            self.busy_s += device.completion_s or 0.0
            self.devices.add(device.device_id)
            if device.emulated:
                self.emulated.add(device.device_id)
        updated = sum(device.status == "updated" for device in result.devices)
        return {
            **result.model_dump(mode="json", exclude={"devices"}),
            "elapsed_s": self.duration_s,
            "devices": len(result.devices),
            "updates": updated,
        }
