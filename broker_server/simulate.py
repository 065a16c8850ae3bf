"""``legend simulate``: a whole run with real training and a virtual fleet.

The composition root of simulations. Coordinator, strategies, aggregation,
codecs, evaluation and the training recipe are those of a live run; the fleet,
its links and the clock are virtual.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from broker_server import evaluate
from broker_server.base_model import BaseModel, read_base_model
from broker_server.blobs import BlobStore
from broker_server.coordinator import Coordinator
from broker_server.evaluator import EvaluationSetup
from broker_server.export import AdapterCard, export_adapter
from broker_server.fleet import Fleet
from broker_server.partition import PartitionOptions, split_by_label
from broker_server.plots import write_plots
from broker_server.run_folder import ADAPTER_FOLDER, RunReport
from broker_server.run_setup import PreparedRun, prepare_run
from broker_server.run_spec import (
    HeldOut,
    LocalEvaluation,
    RunSpec,
    StoredEvaluation,
    read_held_out,
    read_rows,
)
from broker_server.run_state import RunStatus
from broker_server.simulated_training import TrainedUpdate, TrainingData, quiet_libraries
from broker_server.simulation_folder import Score, SimulationFolder, SimulationState, report_of
from broker_server.simulation_plots import write_simulation_plot
from broker_server.simulation_spec import SimulationSpec, find_base_model
from broker_server.simulation_trainers import Trainers, hire
from broker_server.strategies import (
    RoundOutcome,
    Strategy,
    learn_from_round,
    restore_state,
)
from broker_server.virtual_fleet import ModelCost, VirtualFleet, generator_for
from broker_server.virtual_run import Testbed, VirtualRun
from wire_protocol.errors import ConfigError, LegendError
from wire_protocol.parts import BlobRef, DatasetReport
from wire_protocol.records import to_examples
from wire_protocol.tensors import decode

RUN_ID = "simulation"
"""The same for every run: assignments, and so seeds, of two strategies carry the same names."""

BLOBS_FOLDER = "blobs"
PREFIX_FOLDER = "prefix"


@dataclass(frozen=True)
class LocalData:
    """The training file, split.

    Attributes:
        rows: by device, its row numbers in the file.
        reports: by device, what it tells the server about its dataset.
    """

    rows: Mapping[str, tuple[int, ...]]
    reports: Mapping[str, DatasetReport]


def simulate(
    spec: SimulationSpec,
    out: Path,
    *,
    processes: int = 1,
    engine: Callable[[TrainingData], Trainers] | None = None,
    pictures: bool = True,
    prefix_dir: Path | None = None,
    watch: Callable[[SimulationState], object] = lambda _state: None,
) -> SimulationState:
    """Run a simulation to its end, or go on with an interrupted one.

    Args:
        spec: what to simulate.
        out: the run's folder; made if needed.
        processes: that train; the results do not depend on it.
        engine: hires others than processes on this machine; the results do not depend on it.
        pictures: draw the finished run; takes seconds.
        prefix_dir: where hidden states of frozen layers are kept, in the run's
            folder by default; runs may share one, the results do not depend on it.
        watch: told about every committed state.

    Raises:
        ConfigError: a file or a key of the specification is wrong, or the
            folder holds another simulation.
        LegendError: a device's or the server's work cannot be done here.
    """
    folder = SimulationFolder(out)
    state = folder.prepare(spec)
    if state is not None and state.status is not RunStatus.RUNNING:
        return state
    quiet_libraries()
    scene = _set_scene_or_disclaim(spec, folder, state)
    judge = Judge(spec, scene.run, scene.base.folder, out, scene.blobs)

    def commit(reached: SimulationState) -> None:
        folder.write(reached, report_of(spec, reached, scene.run.labels))
        watch(reached)

    data = _training_data(spec, scene, prefix_dir or out / PREFIX_FOLDER)
    with engine(data) if engine else hire(data, processes=processes) as trainers:
        testbed = Testbed(
            run=scene.run,
            cost=scene.cost,
            fleet=scene.fleet,
            devices=_born(scene, state),
            blobs=scene.blobs,
            trainers=trainers,
            judge=judge.score,
            commit=commit,
            tamper=tampering(spec, list(scene.fleet.devices)),
        )
        prepared = scene.prepared
        coordinator = Coordinator(prepared.plan, prepared.strategy, prepared.checkpoint)
        first = state or SimulationState(now=0.0, checkpoint=prepared.checkpoint)
        ended = VirtualRun(testbed, coordinator, first).run()
    if pictures:
        _draw(out, report_of(spec, ended, scene.run.labels), scene.fleet)
    return ended


def _set_scene_or_disclaim(
    spec: SimulationSpec, folder: SimulationFolder, state: SimulationState | None
) -> _Scene:
    """See ``_set_scene``; a simulation that cannot begin leaves its folder free."""
    try:
        return _set_scene(spec, folder.root, state)
    except LegendError:
        if state is None:
            folder.disclaim()
        raise


def _draw(out: Path, report: RunReport, fleet: VirtualFleet) -> None:
    write_plots(out, report)
    write_simulation_plot(out, report, _boards(fleet))


@dataclass(frozen=True)
class _Scene:
    """Everything of a simulation that holds no model yet."""

    base: BaseModel
    cost: ModelCost
    fleet: VirtualFleet
    blobs: BlobStore
    run: RunSpec
    prepared: PreparedRun
    data: LocalData


def _set_scene(spec: SimulationSpec, out: Path, state: SimulationState | None) -> _Scene:
    base = read_base_model(find_base_model(spec.model))
    fleet = VirtualFleet(
        spec.fleet_profile(),
        seed=spec.seed,
        link_jitter=spec.link_jitter,
        link_scale=spec.link_scale,
        availability=spec.availability,
    )
    blobs = BlobStore(out / BLOBS_FOLDER)
    held_out = read_held_out(spec.evaluation)
    run = spec.run_spec(held_out, _stored(blobs, held_out))
    prepared = prepare_run(
        RUN_ID,
        run,
        shape=base.shape,
        digest=base.digest,
        blobs=blobs,
        checkpoint=state.checkpoint.model_dump_json() if state else None,
    )
    _remind(prepared.strategy, state, blobs)
    return _Scene(
        base=base,
        cost=ModelCost(base.shape, base.digest, base.size_bytes, spec.work_scale),
        fleet=fleet,
        blobs=blobs,
        run=run,
        prepared=prepared,
        data=split_training_file(spec, list(fleet.devices), run),
    )


class Judge:
    """Scores global adapters like the server does: as the PEFT folder that people get.

    Args:
        spec: names the held-out files.
        run: task, labels, lengths.
        model_dir: the base model.
        out: the run's folder; ``adapter/`` in it is written anew each time.
        blobs: holds adapters and held-out examples.
    """

    def __init__(
        self, spec: SimulationSpec, run: RunSpec, model_dir: Path, out: Path, blobs: BlobStore
    ) -> None:
        self._spec = spec
        self._run = run
        self._model_dir = model_dir
        self._folder = out / ADAPTER_FOLDER
        self._blobs = blobs
        self._test = self._bench(spec.evaluation)
        self._validation = (
            self._bench(spec.validation, spec.validation_examples) if spec.validation else None
        )

    def score(self, round_number: int, adapter: BlobRef) -> tuple[Score, Score | None]:
        """The score that decides, and that on the test file if it is another one.

        The test file is scored in the rounds that the specification says.

        Raises:
            LegendError: the adapter does not fit the base model.
        """
        labels = self._run.labels if self._run.task == "classification" else ()
        card = AdapterCard(
            title=f"{self._spec.name}, round {round_number} (simulated)",
            base_model=self._spec.model_name,
            labels=labels,
            metrics={"round": round_number},
        )
        tensors = decode(self._blobs.read(adapter.sha256))
        export_adapter(tensors, self._model_dir, self._folder, card=card)
        if self._validation is None:
            return self._score(self._test), None
        every = self._spec.test_every
        last = round_number == self._spec.rounds
        due = last or every == 1 or (round_number > 0 and round_number % every == 0)
        return self._score(self._validation), self._score(self._test) if due else None

    def _score(self, bench: evaluate.Bench) -> Score:
        return Score.model_validate(evaluate.evaluate(bench, self._folder))

    def _bench(self, held_out: LocalEvaluation, most: int | None = None) -> evaluate.Bench:
        stored = _stored(self._blobs, _evenly_spaced(read_held_out(held_out), most))
        setup = EvaluationSetup(
            model_dir=self._model_dir,
            task=self._run.task,
            file=self._blobs.path(stored.sha256),
            labels=self._run.labels,
            max_tokens=self._run.max_tokens,
            threads=self._spec.threads,
        )
        return evaluate.prepare(setup.request())


def split_training_file(spec: SimulationSpec, device_ids: Sequence[str], run: RunSpec) -> LocalData:
    """Split the training file over the devices; depends on seed, file and partition alone.

    Raises:
        ConfigError: the file cannot be read, is too short, or has a label that
            the run does not know.
    """
    examples = to_examples(read_rows(spec.train.path), spec.train.columns)
    labels = [example.label for example in examples]
    classes = run.task == "classification"
    if classes and (unknown := sorted(set(labels) - set(run.labels))):
        raise ConfigError(f"train: {unknown[0]!r} is a label that the held-out file lacks")
    # Free answers are no classes to skew by.
    kinds = labels if classes else [""] * len(labels)
    options = PartitionOptions(
        devices=len(device_ids),
        alpha=spec.partition.alpha,
        quantity_alpha=spec.partition.quantity_alpha,
        minimum=spec.partition.minimum,
    )
    parts = split_by_label(kinds, options, generator=generator_for(spec.seed, "partition"))
    rows = {
        name: tuple(int(row) for row in part) for name, part in zip(device_ids, parts, strict=True)
    }
    reports = {
        name: DatasetReport(
            examples=len(mine),
            labels=tuple(sorted(Counter(labels[row] for row in mine))) if classes else (),
        )
        for name, mine in rows.items()
    }
    return LocalData(rows, reports)


def tampering(
    spec: SimulationSpec, device_ids: Sequence[str]
) -> Callable[[int, TrainedUpdate], TrainedUpdate]:
    """What the attackers of a simulation make of updates; nothing without attackers.

    Raises:
        ConfigError: an attacker is not in the fleet.
    """
    attackers = spec.attackers
    if attackers is None:
        return lambda _round, trained: trained
    try:
        bad = attackers.among(device_ids, generator_for(spec.seed, "attackers"))
    except ValueError as error:
        raise ConfigError(str(error)) from error

    def tamper(round_number: int, trained: TrainedUpdate) -> TrainedUpdate:
        if trained.device_id not in bad:
            return trained
        purpose = f"attack {round_number} {trained.device_id}"
        update = attackers.poisoned(trained.update, generator_for(spec.seed, purpose))
        examples = attackers.claimed_examples or trained.examples
        return replace(trained, update=update, examples=examples)

    return tamper


def _remind(strategy: Strategy, state: SimulationState | None, blobs: BlobStore) -> None:
    """Give a strategy back what it knew when the simulation was stopped."""
    if state is None:
        return
    if state.baseline is not None:
        learn_from_round(strategy, RoundOutcome(0, state.baseline.accuracy, 0.0))
    for result in state.rounds:
        learn_from_round(strategy, RoundOutcome(result.round, result.accuracy, result.duration_s))
    if state.strategy_state is not None:
        restore_state(strategy, decode(blobs.read(state.strategy_state.sha256)))


def _training_data(spec: SimulationSpec, scene: _Scene, prefix_dir: Path) -> TrainingData:
    return TrainingData(
        model_dir=scene.base.folder,
        recipe=scene.prepared.plan.recipe,
        train_file=spec.train.path,
        columns=spec.train.columns,
        rows=scene.data.rows,
        threads=spec.threads,
        model_digest=scene.base.digest,
        prefix_dir=prefix_dir,
    )


def _born(scene: _Scene, state: SimulationState | None) -> Fleet:
    """The server's registry, with what it had learned when the simulation was stopped."""
    devices = Fleet()
    for device_id in scene.fleet.devices:
        data = (scene.run.dataset, scene.data.reports[device_id])
        devices.born(device_id, 1, scene.fleet.birth(device_id, scene.cost, data), 0.0)
    for device_id, estimate in (state.estimates if state else {}).items():
        devices.devices[device_id].estimate = estimate
    return devices


def _evenly_spaced(held_out: HeldOut, most: int | None) -> HeldOut:
    """At most so many of the examples, the same ones every time."""
    lines = held_out.content.splitlines(keepends=True)
    if most is None or most >= len(lines):
        return held_out
    return HeldOut(
        b"".join(lines[row * len(lines) // most] for row in range(most)), held_out.labels
    )


def _stored(blobs: BlobStore, held_out: HeldOut) -> StoredEvaluation:
    return StoredEvaluation(sha256=blobs.put(held_out.content), size_bytes=len(held_out.content))


def _boards(fleet: VirtualFleet) -> Mapping[str, str]:
    return {name: device.group.board for name, device in fleet.devices.items()}
