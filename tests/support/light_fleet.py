"""Many light devices in a process of their own.

    python -m tests.support.light_fleet '{"url": ..., "devices": 2000, ...}'

Says one JSON line when every device is connected, and one with what it counted when its standard
input is closed.
"""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from edge_agent.blobs import BlobClient
from edge_agent.join import login_from_url
from edge_agent.server_connection import Patience
from tests.support import light_device
from wire_protocol.messages import RoundStart
from wire_protocol.model_family import ModelShape


@dataclass(frozen=True)
class FleetPlan:
    """What the child is told.

    Attributes:
        at_once: updates that wait for each other before they are all sent.
    """

    url: str
    broker_url: str
    folder: str
    devices: int
    at_once: int
    heartbeat_s: float
    model_digest: str
    shape: dict[str, Any]


class LightFleet:
    """The child process."""

    def __init__(self, plan: FleetPlan) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.light_fleet", json.dumps(asdict(plan))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def wait_until_connected(self) -> dict[str, Any]:
        """Return once every device has said its birth."""
        return self._line()

    def finish(self) -> dict[str, Any]:
        """End the devices; returns what they counted."""
        _pipe(self._process.stdin).close()
        counted = self._line()
        self._process.wait(60)
        return counted

    def close(self) -> None:
        """End the process, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(60)

    def _line(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        assert line, "the light fleet died; see its traceback above"
        answer: dict[str, Any] = json.loads(line)
        return answer


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


class _Barrier:
    """Lets a round's updates go when all of them are ready."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ready: Counter[tuple[str, int]] = Counter()
        self._changed = asyncio.Condition()

    async def wait(self, start: RoundStart) -> None:
        key = (start.run_id, start.round_number)
        async with self._changed:
            self._ready[key] += 1
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._ready[key] >= self._size)


async def _live(plan: FleetPlan) -> None:
    Path(plan.folder).mkdir(exist_ok=True)
    async with BlobClient(plan.url, patience=Patience(answer_s=120)) as blobs:
        shared = light_device.Site(
            fleet="site",
            login=login_from_url(plan.broker_url),
            blobs=blobs,
            folder=Path(plan.folder),
            shape=ModelShape(**plan.shape),
            model_digest=plan.model_digest,
            heartbeat_s=plan.heartbeat_s,
            may_send=_Barrier(plan.at_once).wait,
        )
        devices = [light_device.LightDevice(f"d-{n}", shared) for n in range(plan.devices)]
        room = asyncio.Semaphore(50)

        async def join(device: light_device.LightDevice) -> None:
            async with room:
                await device.start()

        began = time.monotonic()
        await asyncio.gather(*(join(device) for device in devices))
        _say({"connect_s": time.monotonic() - began})
        await asyncio.to_thread(sys.stdin.read)
        for device in devices:
            await device.stop()
        counted = {
            "acked": sum(device.updates_acked for device in devices),
            "rejected": [why for device in devices for why in device.rejected],
            "resends": sum(device.resends for device in devices),
            "ack_delays_s": [delay for device in devices for delay in device.ack_delays_s],
        }
        _say(counted)


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(_live(FleetPlan(**json.loads(sys.argv[1]))))
