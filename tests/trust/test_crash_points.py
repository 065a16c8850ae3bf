"""Every place that writes, killed there: afterwards the run goes on and nothing counts twice.

The places are found in the source, so a new one fails here until it says how it is tested. Each is
killed by ``LEGEND_DIE_AT`` (see ``wire_protocol.durable``) in a real fleet that trains by script.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from broker_server.base_model import read_config
from broker_server.export import WEIGHTS_FILE, AdapterCard, peft_files
from broker_server.run_folder import ADAPTER_FOLDER, says
from tests.support.replay import replayed_adapter
from tests.support.scripted_site import ScriptedSite, open_scripted_site
from tests.support.tiny_models import LABELS, make_base_model
from tests.support.write_sites import (
    MEASURING,
    MODELS,
    RUNNING,
    STARTING,
    TRAINING,
    WORKING,
    points,
)
from wire_protocol.durable import DIE_AT
from wire_protocol.errors import LegendError
from wire_protocol.model_family import model_shape

pytestmark = pytest.mark.e2e
log = logging.getLogger("crash")

LAST = (
    "server.store.checkpoint/begin#6",
    "server.store.status/begin#2",
    "server.store.status/done#2",
    "server.adapter/half#18",
    "server.adapter/aside#3",
    "server.adapter/written#5",
    "server.adapter/done#5",
    "server.results/done#6",
)
"""Points at the end of a run of two rounds.

It commits: begun, baseline, round 1 open and done, round 2 open and done. It exports three
candidates and two results of four files each; the last one is what people get.
"""
QUICK = (
    "server.store.checkpoint/done#6",
    "agent.outbox/written",
    "agent.outbox/done",
)
"""Those that ``make test`` takes along; the others are marked ``trust``."""


def of(sites: tuple[str, ...]) -> list[str]:
    """Every point of these sites, in the order of the sites and steps."""
    order = ("begin", "half", "written", "aside", "done")
    steps = points()
    return [f"{site}/{step}" for site in sites for step in order if step in steps.get(site, ())]


@dataclass
class Scene:
    """A fleet of two, and how to kill one of its processes at a point.

    Attributes:
        before: session numbers of agents when they were killed.
    """

    site: ScriptedSite
    devices: list[str] = field(default_factory=lambda: ["left", "right"])
    before: dict[str, int] = field(default_factory=dict)

    def restart_armed(self, name: str, point: str) -> None:
        """Kill it, and start it again so that it will die at the point."""
        if name in self.site.processes:
            # What is seen of it until the server notices is of the process that is being killed.
            if (sid := self.site.sids().get(name)) is not None:
                self.before[name] = sid
            self.site.kill(name)
        self.site.environment = {DIE_AT: point}
        self._start(name)
        self.site.environment = {}

    def restart(self, name: str) -> None:
        """Start what died; it must have died of what we did."""
        assert self.site.processes[name].wait() == -signal.SIGKILL
        self._start(name)
        if name == "server":
            self.site.until(self.answers, "the server answers")

    def died(self, name: str) -> bool:
        """Whether the process has ended."""
        return self.site.processes[name].poll() is not None

    def wait_for_death(self, name: str) -> None:
        self.site.until(lambda: self.died(name), f"{name} dies at the point")

    def wait_for_fleet(self) -> None:
        """Until everybody is connected and known."""
        self.site.wait_until_all_are_back(self.devices, after=self.before)

    def launch(self, *, rounds: int, model: str = "tiny") -> str | None:
        """A run, unless the server dies while it is asked for one."""
        runs = {record.run_id for record in self.site.store.runs()}
        try:
            return self.site.launch_scripted(rounds=rounds, model=model)
        except LegendError:
            found = {record.run_id for record in self.site.store.runs()} - runs
            return found.pop() if found else None

    def march(
        self,
        name: str,
        places: list[str],
        *,
        provoke: Callable[[str], object] = lambda _point: None,
    ) -> None:
        """Kill a process at one place after the other, and check the run that all this hit.

        Args:
            provoke: called with the point once it is armed; makes the process get there where the
                run alone does not.
        """
        rounds = len(places) + 2
        run_id = self.launch(rounds=rounds)
        assert run_id is not None
        kept: dict[int, dict[str, str]] = {}
        for point in places:
            log.info("%s dies at %s", name, point)
            self.restart_armed(name, point)
            provoke(point)
            self.wait_for_death(name)
            kept |= self.updates_so_far(run_id, rounds)
        self.restart(name)
        self.wait_for_fleet()
        self.check(run_id, rounds=rounds, kept=kept)

    def check(self, run_id: str, *, rounds: int, kept: dict[int, dict[str, str]]) -> None:
        """The run is complete, each update counted once, the adapter is what they come to."""
        site = self.site
        run = site.wait_for_end(run_id)
        assert run["status"] == "finished", run["reason"]
        assert [result["round"] for result in run["rounds"]] == list(range(1, rounds + 1))
        for result in run["rounds"]:
            updates = site.store.updates(run_id, result["round"])
            assert {d["device_id"] for d in result["devices"]} == set(updates)
            for device_id, manifest in kept.get(result["round"], {}).items():
                assert updates[device_id] == manifest, "an acknowledged update changed"
        self._check_adapter(run_id)
        folder = site.folder / "server" / "runs" / run_id
        site.until(lambda: says(folder, "finished"), "the results say that the run is over")
        site.until(lambda: not site.blobs_of_updates(run_id), "what was used up is gone")
        for name in self.devices:
            site.wait_for_empty_outbox(name)

    def _check_adapter(self, run_id: str) -> None:
        """Replay the run, and compare with what the server has and what it delivers."""
        site = self.site
        record = site.store.run(run_id)
        assert record is not None
        with site.api() as api:
            model = next(one for one in api.models() if one["digest"] in record.spec)
        model_dir = site.folder / str(model["name"])
        shape = model_shape(read_config(model_dir))
        digest = replayed_adapter(site.store, run_id, shape, labels=len(LABELS))
        assert site.checkpoint(run_id).adapter.sha256 == digest
        delivered = site.folder / "server" / "runs" / run_id / ADAPTER_FOLDER
        site.until((delivered / WEIGHTS_FILE).exists, "the adapter is delivered")
        content = site.blob(digest)
        card = AdapterCard(title="", base_model="", labels=LABELS)
        wanted = peft_files(content, model_dir, card=card)[WEIGHTS_FILE]
        assert (delivered / WEIGHTS_FILE).read_bytes() == wanted

    def updates_so_far(self, run_id: str | None, rounds: int) -> dict[int, dict[str, str]]:
        """What was acknowledged when a process died."""
        if run_id is None:
            return {}
        return {n: self.site.store.updates(run_id, n) for n in range(1, rounds + 1)}

    def answers(self) -> bool:
        """Whether the server's API does."""
        with suppress(LegendError):
            self.site.devices()
            return True
        return False

    def _start(self, name: str) -> None:
        if name == "server":
            self.site.start_server_process(self.site.port)
        else:
            self.site.start_agent(name)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with open_scripted_site(tmp_path_factory.mktemp("site"), "mosquitto") as site:
        scene = Scene(site)
        for name in scene.devices:
            site.start_agent(name)
        site.wait_for_devices(*scene.devices)
        yield scene


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "point",
    [
        *(point for point in QUICK if point.startswith("server.")),
        *(pytest.param(point, marks=pytest.mark.trust) for point in LAST),
    ],
)
def test_a_server_killed_while_it_writes_finishes_the_run(scene: Scene, point: str) -> None:
    scene.restart_armed("server", point)
    scene.site.until(scene.answers, "the server answers")
    run_id = scene.launch(rounds=2)
    scene.wait_for_death("server")
    kept = scene.updates_so_far(run_id, 2)
    scene.restart("server")
    scene.wait_for_fleet()
    assert run_id is not None
    scene.check(run_id, rounds=2, kept=kept)


@pytest.mark.trust
@pytest.mark.timeout(2400)
def test_a_server_killed_at_every_point_in_turn_finishes_the_run(scene: Scene) -> None:
    def write_a_run(point: str) -> None:
        if point.startswith("server.store.run/"):
            scene.site.until(scene.answers, "the server answers")
            scene.launch(rounds=1)

    scene.march("server", of(RUNNING), provoke=write_a_run)
    for record in scene.site.store.runs():
        assert scene.site.wait_for_end(record.run_id)["status"] == "finished"


@pytest.mark.trust
@pytest.mark.timeout(600)
def test_a_server_killed_at_every_point_of_its_start_can_start_again(scene: Scene) -> None:
    for point in of(STARTING):
        log.info("the server dies at %s", point)
        scene.restart_armed("server", point)
        scene.wait_for_death("server")
    scene.restart("server")
    scene.wait_for_fleet()
    run_id = scene.launch(rounds=1)
    assert run_id is not None
    scene.check(run_id, rounds=1, kept={})


@pytest.mark.trust
@pytest.mark.timeout(600)
def test_a_server_killed_while_it_registers_a_model_takes_it_the_next_time(scene: Scene) -> None:
    site = scene.site
    for layers, point in enumerate(of(MODELS), start=4):
        log.info("the server dies at %s", point)
        name = f"layers-{layers}"
        make_base_model(site.folder / name, "bert", layers=layers)
        scene.restart_armed("server", point)
        site.until(scene.answers, "the server answers")
        with suppress(LegendError):
            site.register_model(name)
        scene.wait_for_death("server")
        scene.restart("server")
        site.register_model(name)
    scene.wait_for_fleet()
    run_id = scene.launch(rounds=1, model=name)
    assert run_id is not None
    scene.check(run_id, rounds=1, kept={})


@pytest.mark.timeout(400)
@pytest.mark.parametrize("point", [point for point in QUICK if point.startswith("agent.")])
def test_an_agent_killed_while_it_works_comes_back_into_the_round(scene: Scene, point: str) -> None:
    scene.restart_armed("left", point)
    if not point.startswith("agent.counter"):
        scene.wait_for_fleet()
    run_id = scene.launch(rounds=2)
    assert run_id is not None
    scene.wait_for_death("left")
    kept = scene.updates_so_far(run_id, 2)
    scene.restart("left")
    scene.check(run_id, rounds=2, kept=kept)


@pytest.mark.trust
@pytest.mark.timeout(1200)
def test_an_agent_killed_at_every_point_in_turn_comes_back_every_time(scene: Scene) -> None:
    scene.march("left", of(WORKING))


@pytest.mark.trust
@pytest.mark.timeout(600)
def test_an_agent_killed_while_it_measures_itself_goes_on_the_next_time(scene: Scene) -> None:
    for point in of(MEASURING):
        log.info("the agent dies at %s", point)
        scene.restart_armed("fresh", point)
        scene.wait_for_death("fresh")
    scene.restart("fresh")
    scene.site.wait_for_devices("fresh")
    scene.devices.append("fresh")
    scene.wait_for_fleet()
    run_id = scene.launch(rounds=1)
    assert run_id is not None
    scene.check(run_id, rounds=1, kept={})


@pytest.mark.trust
@pytest.mark.timeout(600)
def test_a_trainer_killed_while_it_writes_is_a_named_failure_and_nothing_more(
    scene: Scene,
) -> None:
    for point in of(TRAINING):
        log.info("the trainer dies at %s", point)
        scene.restart_armed("left", point)
        scene.wait_for_fleet()
        run_id = scene.launch(rounds=1)
        assert run_id is not None
        run = scene.site.wait_for_end(run_id)
        members = {one["device_id"]: one for one in run["rounds"][0]["devices"]}
        assert members["right"]["status"] == "updated"
        assert members["left"]["status"] == "failed"
        assert "out_of_memory" in members["left"]["detail"]
    scene.site.kill("left")
    scene.site.start_agent("left")
    scene.wait_for_fleet()
    run_id = scene.launch(rounds=1)
    assert run_id is not None
    scene.check(run_id, rounds=1, kept={})
