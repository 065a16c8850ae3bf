"""Our simulation of a fleet that trains nothing: coordinator, codecs and evaluation are real."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from unittest.mock import patch

import numpy as np
from typing_extensions import Self

from benchmarks._measured import Measured, gaps
from benchmarks._our_fleet import Payload
from broker_server import simulate
from broker_server.simulated_training import TrainedUpdate, TrainingData, VirtualAssignment
from broker_server.simulation_folder import SimulationState
from tests.support.messages import a_report
from tests.support.simulations import specification, write_simulation
from wire_protocol.tensors import decode, encode


class TrivialTrainers:
    """Answers every assignment with small numbers, at once."""

    def __init__(self, data: TrainingData) -> None:
        self._codec = data.recipe.codec

    def train(self, assignments: Sequence[VirtualAssignment]) -> list[TrainedUpdate]:
        """See ``Trainers``."""
        return [self._answer(number, one) for number, one in enumerate(assignments)]

    def _answer(self, number: int, assignment: VirtualAssignment) -> TrainedUpdate:
        value = np.float32(1e-4 * (1 + number / 1000))
        adapter = decode(assignment.adapter)
        update = encode({name: np.full_like(adapter[name], value) for name in adapter}, self._codec)
        report = a_report(upload_bytes=len(update), steps_done=assignment.start.steps)
        return TrainedUpdate(assignment.device_id, update, 1, report, duration_s=1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


def simulated(payload: Payload, folder: Path, *, devices: int, rounds: int) -> Measured:
    """Simulate so many rounds, of which the first is not counted."""
    payload.write_model(folder / "tiny")
    group = {
        "board": "jetson-tx2",
        "count": devices,
        "name_prefix": "d",
        "power_mode": "MAXN",
        "link": {"up_mbps": 10, "down_mbps": 10, "round_trip_ms": 10, "jitter": 0},
    }
    fleet = {"name": "equal", "description": "Equal boards.", "devices": [group]}
    spec = specification(
        write_simulation(folder / "experiment", folder / "tiny", fleet=fleet),
        "strategy=fedlora",
        f"strategy_options={{rank: {payload.rank}}}",
        "partition.minimum=1",
        "devices_per_round=null",
        "local_steps=1",
        f"rounds={rounds}",
    )
    ends: list[float] = []
    cpu_s: list[float] = []

    def watch(state: SimulationState) -> None:
        if len(state.rounds) > len(ends):
            ends.append(time.time())
            cpu_s.append(time.process_time())

    began = time.time()

    def hire(data: TrainingData, *, processes: int) -> TrivialTrainers:
        del processes
        return TrivialTrainers(data)

    with patch.object(simulate, "hire", hire):
        simulate.simulate(spec, folder / "run", pictures=False, watch=watch)
    if len(ends) != rounds:
        raise SystemExit(f"our simulation committed {len(ends)} of {rounds} rounds")
    return Measured(
        round_s=gaps(ends),
        cpu_s=(cpu_s[-1] - cpu_s[0]) / (rounds - 1),
        # What this process holds is mostly the benchmark's.
        rss_bytes=0,
        total_s=ends[-1] - began,
    )
