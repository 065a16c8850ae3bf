"""Our server and agents as processes on this machine, with agents that train nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks._machine import Usage, usage_of, usage_of_trees
from benchmarks._measured import Measured, gaps
from benchmarks._trivial_trainer import write_program
from tests.support.site import Site
from tests.support.tiny_models import make_base_model
from wire_protocol.model_family import adapter_shapes, model_shape


@dataclass(frozen=True)
class Payload:
    """An adapter of about two megabytes in so many layers, four tensors each and a head."""

    layers: int
    hidden: int
    rank: int

    def write_model(self, folder: Path) -> None:
        """A random base model that such an adapter fits."""
        make_base_model(folder, "bert", layers=self.layers, hidden=self.hidden)

    def sizes(self, model_dir: Path) -> tuple[int, int]:
        """Tensors and bytes of the adapter, without framing."""
        shape = model_shape(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
        shapes = adapter_shapes(shape, (self.rank,) * self.layers, 2).values()
        values = sum(int(size[0]) * (size[1] if len(size) > 1 else 1) for size in shapes)
        return len(shapes), 4 * values


PAYLOADS = {
    1: Payload(layers=1, hidden=512, rank=256),
    32: Payload(layers=8, hidden=64, rank=256),
    192: Payload(layers=48, hidden=64, rank=43),
}
"""By the number of tensors that the peer sends; we send the head's besides, and at least four."""


class BenchmarkSite(Site):
    """A site of another base model and of agents that train nothing."""

    patience_s = 300.0

    def start_agents(self, count: int) -> list[str]:
        """Start agents; returns their names."""
        program = str(write_program(self.folder / "trainer"))
        names = [f"d{number:03}" for number in range(count)]
        for name in names:
            self.start_agent(name, trainer_python=program, heartbeat_s=30.0)
        return names

    def add_benchmark_model(self, payload: Payload) -> None:
        """Register a base model for this payload."""
        payload.write_model(self.folder / "tiny")
        self.add_model()

    def rounds_of(self, run_id: str) -> list[float]:
        """When each round was committed, in seconds since 1970, from the server's log."""
        times = []
        for text in self.log("server").splitlines():
            if '"round_committed"' in text:
                line = json.loads(text)
                if line.get("run_id", run_id) == run_id:
                    times.append(datetime.fromisoformat(line["timestamp"]).timestamp())
        return times

    @property
    def roots(self) -> list[int]:
        """Process ids of server and agents."""
        return [process.pid for process in self.processes.values()]


@contextmanager
def our_fleet(
    folder: Path, *, broker: str, agents: int, payload: Payload
) -> Iterator[BenchmarkSite]:
    """A server and agents that are all online and measured."""
    folder.mkdir(parents=True, exist_ok=True)
    site = BenchmarkSite(folder, broker)
    try:
        site.start_server()
        site.add_benchmark_model(payload)
        names = site.start_agents(agents)
        site.wait_for_devices(*names)
        yield site
    finally:
        site.close()


def idle_agent_rss_bytes(site: BenchmarkSite) -> float:
    """Mean memory of an agent without its trainer child."""
    pids = [process.pid for name, process in site.processes.items() if name != "server"]
    return usage_of(pids).rss_bytes / len(pids)


def launch_and_measure(site: BenchmarkSite, payload: Payload, *, rounds: int) -> Measured:
    """Run so many rounds beyond a first that is not counted."""
    began = time.time()
    run_id = site.launch(
        strategy="fedlora",
        strategy_options={"rank": payload.rank},
        rounds=rounds + 1,
        local_steps=1,
        deadline_s=3600.0,
        quorum=1.0,
        seed=0,
    )
    before = _usage_after(site, run_id, 1)
    after = _usage_after(site, run_id, rounds + 1)
    record = site.wait_for_end(run_id)
    if record["status"] != "finished":
        raise SystemExit(f"our run ended as {record['status']}: {record['reason']}")
    times = site.rounds_of(run_id)
    return Measured(
        round_s=gaps(times),
        cpu_s=(after.cpu_s - before.cpu_s) / rounds,
        rss_bytes=after.rss_bytes,
        total_s=time.time() - began,
    )


def _usage_after(site: BenchmarkSite, run_id: str, rounds: int) -> Usage:
    site.until(lambda: len(site.rounds_of(run_id)) >= rounds, f"round {rounds} is committed")
    return usage_of_trees(site.roots)
