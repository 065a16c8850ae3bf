"""The runs, one after another: launched, resumed after a restart, cancelled, written down."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace

import anyio
import structlog

from broker_server import run_events as events
from broker_server.board_bounds import bounds_of
from broker_server.coordinator import Coordinator
from broker_server.delivery import RunContext
from broker_server.disk_space import until_stored
from broker_server.evaluator import EvaluationSetup, Evaluator
from broker_server.fleet import Fleet
from broker_server.model_registry import ModelRegistry, shape_of
from broker_server.plots import write_plots
from broker_server.run_folder import RunFolder, RunReport, says
from broker_server.run_loop import Post, RunLoop, new_message_id
from broker_server.run_setup import check_run, prepare_run
from broker_server.run_spec import RunSpec
from broker_server.run_state import RoundResult, RunStatus
from broker_server.run_views import run_report
from broker_server.server_state import ServerState
from broker_server.settings import ServerSettings
from broker_server.store import RunRecord, Store
from broker_server.strategies import Strategy
from broker_server.strategies.capacity import believed
from broker_server.strategies.learning import RoundOutcome, learn_from_round, restore_state
from wire_protocol.errors import ConfigError, LegendError
from wire_protocol.messages import UpdateManifest
from wire_protocol.tensors import decode

log = structlog.get_logger()


class RunQueue:
    """Runs one at a time; the others wait.

    Args:
        settings: threads of the evaluation.
        state: where results go.
        store: what survives.
        models: the registered base models, and the blobs.
        fleet: who can take part.
        post: speaks to devices.
    """

    def __init__(
        self,
        settings: ServerSettings,
        state: ServerState,
        store: Store,
        models: ModelRegistry,
        fleet: Fleet,
        post: Post,
    ) -> None:
        self._settings = settings
        self._state = state
        self._store = store
        self._models = models
        self._blobs = models.blobs
        self._fleet = fleet
        self._post = post
        self._spec: RunSpec | None = None
        self._queue, self._queued = anyio.create_memory_object_stream[str](math.inf)
        self._folder: RunFolder | None = None
        self.active: RunLoop | None = None
        self.evaluator = Evaluator()

    def report(self, device_id: str) -> None:
        """Tell the active run what an online device can do."""
        loop, spec = self.active, self._spec
        if loop is None or spec is None:
            return
        capacity, note = self._fleet.capacity(
            device_id,
            model_digest=loop.coordinator.plan.model_digest,
            dataset=spec.dataset,
            labels=spec.labels if spec.task == "classification" else (),
        )
        known = self._fleet.devices[device_id]
        # An imitated board has no speed of its own; every report says that it is one.
        board = bounds_of(known.birth.board, loop.context.model_shape)
        doubts: tuple[str, ...] = ()
        if capacity is not None and board is not None and not known.birth.emulated:
            capacity, doubts = believed(capacity, board)
        doubted = "; ".join(doubts) and f"not believed: {'; '.join(doubts)}"
        if doubted and doubted != known.note:
            log.warning("capacity_not_believed", device_id=device_id, why=doubts)
        known.note = note or doubted
        loop.feed(events.DeviceReported(device_id, capacity, note))

    def launch(self, spec: RunSpec) -> str:
        """Check a run and put it into the queue.

        Raises:
            ConfigError: something in it cannot work.
        """
        row = self._models.find(spec.model)
        check_run(spec, shape_of(row))
        if not self._blobs.has(spec.evaluation.sha256):
            raise ConfigError("the held-out file is not uploaded; send its blob first")
        letters = (c if c.isascii() and c.isalnum() else "-" for c in spec.name.lower())
        name = "".join(letters).strip("-") or "run"
        run_id = f"{name[:24]}-{new_message_id()[:6]}"
        # By digest: a name may come to mean another model while the run waits.
        pinned = spec.model_copy(update={"model": row.digest})
        self._store.create_run(run_id, pinned.model_dump_json())
        self._queue.send_nowait(run_id)
        return run_id

    def cancel(self, run_id: str) -> None:
        """Stop a run, queued or running.

        Raises:
            ConfigError: no such run, or it has ended.
        """
        record = self._store.run(run_id)
        if record is None:
            raise ConfigError(f"no run {run_id!r}; list them: legend runs")
        if self.active and self.active.context.run_id == run_id:
            self.active.feed(events.CancelRequested("cancelled by the operator"))
        elif record.status in (RunStatus.QUEUED.value, RunStatus.RUNNING.value):
            # Waiting, or still loading its base model.
            self._store.set_status(run_id, RunStatus.CANCELLED.value, "cancelled by the operator")
        else:
            raise ConfigError(f"run {run_id} is {record.status} already")

    async def work_through(self) -> None:
        """Run what was running before a restart, then what waits, one at a time."""
        for record in self._store.runs():
            if record.status in (RunStatus.RUNNING.value, RunStatus.QUEUED.value):
                self._queue.send_nowait(record.run_id)
                continue
            folder = self._state.runs / record.run_id
            if folder.is_dir() and not says(folder, record.status):
                # Killed between the end of this run and the last of its files.
                await self._write_results(record.run_id)
        async for run_id in self._queued:
            found = self._store.run(run_id)
            if found and found.status in (RunStatus.RUNNING.value, RunStatus.QUEUED.value):
                await self._run(found)

    async def _run(self, record: RunRecord) -> None:
        structlog.contextvars.bind_contextvars(run_id=record.run_id)
        try:
            loop = await until_stored(functools.partial(self._prepare, record), what="the run")
            if self._was_cancelled(record.run_id):
                return
            await self._set_status(record.run_id, RunStatus.RUNNING)
            for device_id, known in self._fleet.devices.items():
                if known.online:
                    self.report(device_id)
            status, reason = await loop.run()
        except LegendError as error:
            status, reason = RunStatus.FAILED, str(error)
        except Exception as error:
            # A bug must cost one run and not the server, which would meet it again at every start.
            log.exception("run_crashed")
            status, reason = RunStatus.FAILED, f"internal error: {_innermost(error)}"
        finally:
            self.active = self._spec = None
        log.info("run_ended", status=status.value, reason=reason)
        await self._set_status(record.run_id, status, reason)
        await self._write_results(record.run_id)
        structlog.contextvars.unbind_contextvars("run_id")

    async def _set_status(self, run_id: str, status: RunStatus, reason: str = "") -> None:
        async def save() -> None:
            self._store.set_status(run_id, status.value, reason)

        await until_stored(save, what="the run's status")

    def _was_cancelled(self, run_id: str) -> bool:
        record = self._store.run(run_id)
        return record is None or record.status == RunStatus.CANCELLED.value

    async def _prepare(self, record: RunRecord) -> RunLoop:
        spec = RunSpec.model_validate_json(record.spec)
        row = self._models.find(spec.model)
        shape = shape_of(row)
        prepared = prepare_run(
            record.run_id,
            spec,
            shape=shape,
            digest=row.digest,
            blobs=self._blobs,
            checkpoint=record.checkpoint,
        )
        labels = spec.labels if spec.task == "classification" else ()
        setup = EvaluationSetup(
            model_dir=self._models.folder(row.digest),
            task=spec.task,
            file=self._blobs.path(spec.evaluation.sha256),
            labels=labels,
            max_tokens=spec.max_tokens,
            threads=self._settings.evaluation_threads,
        )
        await self.evaluator.prepare(setup)
        recorded = {
            device_id: UpdateManifest.model_validate_json(text)
            for device_id, text in self._store.updates(
                record.run_id, prepared.checkpoint.round_number
            ).items()
            if device_id in prepared.checkpoint.members
        }
        context = RunContext(
            record.run_id,
            spec.name,
            setup.model_dir,
            row.name,
            shape,
            tuple(labels),
            spec.evaluation.sha256,
            spec.privacy,
        )
        self._replay(record, prepared.strategy)
        if state := prepared.checkpoint.strategy_state:
            restore_state(prepared.strategy, decode(self._blobs.read(state.sha256)))
        rho = prepared.strategy.rho
        self._spec = spec
        plan = replace(prepared.plan, life=self._state.life)
        self.active = RunLoop(
            context,
            Coordinator(plan, prepared.strategy, prepared.checkpoint, recorded),
            self._store,
            self._blobs,
            self.evaluator,
            folder=self._state.runs / record.run_id,
            post=self._post,
            on_report=lambda device_id, manifest: self._learn(device_id, manifest, rho),
            on_commit=self._add_results,
        )
        return self.active

    def _replay(self, record: RunRecord, strategy: Strategy) -> None:
        """Tell a strategy about the rounds that a killed server had committed."""
        if record.baseline is not None:
            accuracy = float(json.loads(record.baseline)["accuracy"])
            learn_from_round(strategy, RoundOutcome(0, accuracy, 0.0))
        for text in self._store.rounds(record.run_id):
            done = RoundResult.model_validate_json(text)
            learn_from_round(strategy, RoundOutcome(done.round, done.accuracy, done.duration_s))

    def _learn(self, device_id: str, manifest: UpdateManifest, rho: float) -> None:
        self._fleet.learn(device_id, manifest, rho=rho)
        if self._fleet.devices[device_id].online:
            self.report(device_id)

    async def _write_results(self, run_id: str) -> None:
        """Make the whole result folder say what the store says, pictures included."""
        self._folder = None
        report = await self._add_results(run_id)
        if report is None or report.status in (RunStatus.RUNNING.value, RunStatus.QUEUED.value):
            return
        try:
            await anyio.to_thread.run_sync(write_plots, self._state.runs / run_id, report)
        except (OSError, ValueError) as error:
            log.error("pictures_not_drawn", run_id=run_id, error=str(error))

    async def _add_results(self, run_id: str) -> RunReport | None:
        """Add the rounds to the result folder that it does not have yet.

        Returns:
            The run with these rounds; None when the folder could not be written.
        """
        record, root = self._store.run(run_id), self._state.runs / run_id
        if record is None:
            return None
        folder, self._folder = self._folder, None
        if folder is None or folder.root != root:
            folder = RunFolder(root)
        texts = self._store.rounds(run_id, after=folder.figures.rounds)
        report = run_report(record, [RoundResult.model_validate_json(text) for text in texts])
        try:
            await anyio.to_thread.run_sync(folder.add, report)
        except (OSError, ValueError) as error:
            # The store has everything; the folder is written anew next time.
            log.error("results_not_written", folder=str(root), error=str(error))
            return None
        self._folder = folder
        return report


def _innermost(error: BaseException) -> str:
    """The first real error inside groups of tasks, in one line."""
    while isinstance(inner := getattr(error, "exceptions", None), tuple) and inner:
        error = inner[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
