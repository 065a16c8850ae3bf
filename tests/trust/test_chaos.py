"""Links cut, broker, server and agents killed, for many rounds: every update counts exactly once.

The run under attack must deliver, bit for bit, what the same fleet delivers in peace. For that all
devices must answer in every round, so one device a round is held back until everybody who was
thrown out is back; what happens before and, to the server, after that is left to a seed.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.brokers import Kind
from tests.support.scripted_site import ScriptedSite, open_scripted_site
from tests.support.scripted_trainer import free, hold
from tests.support.update_spy import UpdateSpy

pytestmark = pytest.mark.e2e
log = logging.getLogger("chaos")

CUT, BROKER, SERVER, AGENTS, SERVER_LATE = "cut", "broker", "server", "agents", "server late"
KINDS: tuple[Kind, ...] = ("mosquitto", "embedded")


@dataclass
class Attack:
    """A run of ``rounds`` rounds on a fleet, with faults drawn from a seed.

    Attributes:
        faults: what happens in which round, in this order.
    """

    site: ScriptedSite
    names: list[str]
    faults: dict[int, list[str]]
    rng: random.Random
    done: Counter[str] = field(default_factory=Counter)
    thrown_out: int = 0

    def run(self, rounds: int) -> str:
        """Go through it; returns the run's id once it is finished."""
        site = self.site
        for number in range(1, rounds + 1):
            hold(site.script, number, self.held_in(number))
        run_id = site.launch_scripted(rounds=rounds)
        for number in range(1, rounds + 1):
            self._wait_for_round(run_id, number)
            for fault in self.faults.get(number, []):
                time.sleep(self.rng.uniform(0.0, 1.5))
                if fault != SERVER_LATE:
                    self._strike(fault)
            free(site.script, number)
            if SERVER_LATE in self.faults.get(number, []):
                time.sleep(self.rng.uniform(0.0, 1.5))
                self._strike(SERVER_LATE)
        run = site.wait_for_end(run_id)
        assert run["status"] == "finished", run["reason"]
        return run_id

    def held_in(self, number: int) -> str:
        """The device that must wait in this round."""
        return self.names[number % len(self.names)]

    def _wait_for_round(self, run_id: str, number: int) -> None:
        """Until every device has an assignment of this round."""

        def open_now() -> bool:
            record = self.site.store.run(run_id)
            assert record is not None
            assert record.status in ("queued", "running"), record.reason
            if record.checkpoint is None:
                return False
            checkpoint = self.site.checkpoint(run_id)
            if checkpoint.round_number != number or not checkpoint.members:
                return False
            assert set(checkpoint.members) == set(self.names), "a device missed the round's start"
            return True

        self.site.until(open_now, f"round {number} is open")

    def _strike(self, fault: str) -> None:
        site, before = self.site, self.site.sids()
        self.done[fault] += 1
        if fault == CUT:
            self.thrown_out += site.cut_links()
        elif fault == BROKER:
            site.kill_broker()
        elif fault == AGENTS:
            victims = self.rng.sample(self.names, max(1, len(self.names) // 5))
            for name in victims:
                site.kill(name)
                site.start_agent(name)
            before = {name: before[name] for name in victims}
        else:
            site.kill("server")
            site.start_server()
            # The embedded broker is the server's child and went with it.
            before = before if site.own_broker is None else {}
        site.wait_until_all_are_back(self.names, after=before)


def check(attack: Attack, run_id: str, calm_id: str, *, rounds: int) -> None:
    """Exactly once, nothing lost, and the same result as in peace."""
    site, names = attack.site, attack.names
    arrivals = site.arrivals(run_id)
    assert set(arrivals) == {(n, name) for n in range(1, rounds + 1) for name in names}
    calm = site.arrivals(calm_id)
    assert set(calm) == set(arrivals), "in peace a device missed a round"
    assert arrivals == calm
    assert site.checkpoint(run_id).adapter == site.checkpoint(calm_id).adapter
    assert site.delivered_adapter(run_id) == site.delivered_adapter(calm_id)
    run = site.run(run_id)
    statuses = Counter(one["status"] for result in run["rounds"] for one in result["devices"])
    assert statuses == {"updated": rounds * len(names)}
    for name in names:
        site.wait_for_empty_outbox(name)
        said = site.log(name)
        for complaint in ("update_rejected", "assignment_failed", "assignment_crashed"):
            assert complaint not in said, f"{name}: {complaint}"
    for complaint in ("run_crashed", "aggregation_failed", "evaluation_failed", "update_rejected"):
        assert complaint not in site.log("server"), complaint


def attacked(
    site: ScriptedSite, count: int, rounds: int, faults: dict[int, list[str]], *, seed: int
) -> None:
    """The attacked run, then the calm one, on the same fleet; prints what happened."""
    names = [f"dev-{number:02d}" for number in range(count)]
    began = time.monotonic()
    for name in names:
        site.start_agent(name)
    site.wait_for_devices(*names)
    started_s = time.monotonic() - began
    spy = UpdateSpy(site.spy_address())
    spy.start()
    attack = Attack(site, names, faults, random.Random(seed))
    began = time.monotonic()
    run_id = attack.run(rounds)
    attacked_s = time.monotonic() - began
    spy.stop()
    began = time.monotonic()
    site.wait_until_all_are_back(names, after={})
    calm_id = site.launch_scripted(rounds=rounds)
    assert site.wait_for_end(calm_id)["status"] == "finished"
    calm_s = time.monotonic() - began
    check(attack, run_id, calm_id, rounds=rounds)
    figures = {
        "devices": count,
        "rounds": rounds,
        "updates_applied": len(site.arrivals(run_id)),
        "manifests_published": spy.published,
        "duplicates_absorbed": spy.published - spy.distinct,
        **{f"faults_{name.replace(' ', '_')}": times for name, times in attack.done.items()},
        "connections_reset": attack.thrown_out,
        "start_s": round(started_s, 1),
        "attacked_s": round(attacked_s, 1),
        "calm_s": round(calm_s, 1),
    }
    log.info("chaos: %s", json.dumps(figures))


def drawn_faults(rounds: int, *, seed: int) -> dict[int, list[str]]:
    """Two rounds in three have a fault, some of them two."""
    rng = random.Random(seed)
    weighted = [CUT] * 6 + [AGENTS] * 4 + [BROKER] * 2 + [SERVER] * 2
    return {
        number: rng.sample(weighted, rng.choice((1, 1, 2)))
        for number in range(1, rounds + 1)
        if rng.random() < 0.66
    }


@pytest.mark.timeout(600)
def test_a_few_faults_of_each_kind_leave_no_trace_in_the_result(tmp_path: Path) -> None:
    faults = {1: [CUT], 2: [SERVER_LATE], 3: [BROKER, CUT], 4: [AGENTS]}
    with open_scripted_site(tmp_path, "mosquitto") as site:
        attacked(site, 4, 5, faults, seed=1)


@pytest.mark.timeout(600)
def test_the_embedded_broker_may_die_with_its_server_and_alone(tmp_path: Path) -> None:
    with open_scripted_site(tmp_path, "embedded") as site:
        attacked(site, 3, 3, {1: [SERVER], 2: [BROKER, CUT]}, seed=1)


@pytest.mark.trust
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(1200)
def test_twenty_agents_survive_forty_rounds_of_it(tmp_path: Path, kind: Kind) -> None:
    faults = drawn_faults(40, seed=20)
    if kind == "mosquitto":
        faults |= {number: [SERVER_LATE] for number in (7, 19, 31)}
    with open_scripted_site(tmp_path, kind) as site:
        attacked(site, 20, 40, faults, seed=20)
