"""What must survive a killed server: devices, models, runs, rounds, updates.

SQLAlchemy 2 over SQLite (WAL, synchronous=FULL) or any database it can reach.
Knows rows, not rules: documents are JSON text written and read by their owners.
Every method is one transaction; when it returns, the data is on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import (
    Engine,
    Integer,
    String,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from wire_protocol.errors import ConfigError


class Row(DeclarativeBase):
    """Parent of the tables."""


class DeviceRow(Row):
    """The last birth of a device, and what the server estimates about it."""

    __tablename__ = "devices"
    device_id: Mapped[str] = mapped_column(String(48), primary_key=True)
    sid: Mapped[int] = mapped_column(Integer)
    birth: Mapped[str] = mapped_column(Text)


class ModelRow(Row):
    """A registered base model: its files by digest and its config.json."""

    __tablename__ = "models"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(80), unique=True)
    files: Mapped[str] = mapped_column(Text)
    config: Mapped[str] = mapped_column(Text)


class RunRow(Row):
    """One run: what was asked, where it stands, and its last checkpoint."""

    __tablename__ = "runs"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(String(80), unique=True)
    spec: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text, default="")
    checkpoint: Mapped[str | None] = mapped_column(Text, default=None)
    baseline: Mapped[str | None] = mapped_column(Text, default=None)


class RoundRow(Row):
    """The result of one committed round."""

    __tablename__ = "rounds"
    run_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    round_number: Mapped[int] = mapped_column(Integer, primary_key=True)
    result: Mapped[str] = mapped_column(Text)


class UpdateRow(Row):
    """An acknowledged update: once per run, round and device."""

    __tablename__ = "updates"
    __table_args__ = (UniqueConstraint("run_id", "round_number", "device_id"),)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(String(80))
    round_number: Mapped[int] = mapped_column(Integer)
    device_id: Mapped[str] = mapped_column(String(48))
    manifest: Mapped[str] = mapped_column(Text)


@dataclass(frozen=True)
class RunRecord:
    """One run as it is stored."""

    run_id: str
    spec: str
    status: str
    reason: str
    checkpoint: str | None
    baseline: str | None


class Store:
    """The server's database.

    Args:
        url: an SQLAlchemy URL, e.g. ``sqlite:////var/lib/legend/server.db``.

    Raises:
        ConfigError: the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            self._engine = create_engine(url)
            if self._engine.dialect.name == "sqlite":
                _make_sqlite_durable(self._engine)
            Row.metadata.create_all(self._engine)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"database {_hide_password(url)} cannot be opened: {reason}"
            ) from error

    @classmethod
    def in_folder(cls, folder: Path) -> Store:
        """The default: an SQLite file in the server's state directory."""
        return cls(f"sqlite:///{folder / 'server.db'}")

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    def save_device(self, device_id: str, sid: int, birth: str) -> None:
        """Insert or replace a device."""
        with Session(self._engine) as session, session.begin():
            session.merge(DeviceRow(device_id=device_id, sid=sid, birth=birth))

    def devices(self) -> Sequence[tuple[str, int, str]]:
        """Every known device as (device_id, sid, birth)."""
        with Session(self._engine) as session:
            rows = session.scalars(select(DeviceRow).order_by(DeviceRow.device_id))
            return [(row.device_id, row.sid, row.birth) for row in rows]

    def save_model(self, digest: str, name: str, *, files: str, config: str) -> None:
        """Register a base model; a name given again now means the new digest."""
        with Session(self._engine) as session, session.begin():
            for row in session.scalars(select(ModelRow).where(ModelRow.name == name)):
                if row.digest != digest:
                    row.name = f"{row.name}@{row.digest[:12]}"
            session.flush()
            session.merge(ModelRow(digest=digest, name=name, files=files, config=config))

    def models(self) -> Sequence[ModelRow]:
        """Every registered base model."""
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.scalars(select(ModelRow).order_by(ModelRow.name)))

    def model(self, name_or_digest: str) -> ModelRow | None:
        """One base model by name or digest."""
        either = (ModelRow.name == name_or_digest) | (ModelRow.digest == name_or_digest)
        with Session(self._engine, expire_on_commit=False) as session:
            return session.scalars(select(ModelRow).where(either)).first()

    def create_run(self, run_id: str, spec: str) -> None:
        """Queue a run."""
        with Session(self._engine) as session, session.begin():
            session.add(RunRow(run_id=run_id, spec=spec, status="queued"))

    def set_status(self, run_id: str, status: str, reason: str = "") -> None:
        """Move a run through its life."""
        change = update(RunRow).where(RunRow.run_id == run_id)
        with Session(self._engine) as session, session.begin():
            session.execute(change.values(status=status, reason=reason))

    def save_checkpoint(
        self,
        run_id: str,
        checkpoint: str,
        *,
        baseline: str | None = None,
        result: tuple[int, str] | None = None,
    ) -> None:
        """Commit the state of a run and, in the same transaction, a finished round."""
        values = {"checkpoint": checkpoint}
        if baseline is not None:
            values["baseline"] = baseline
        with Session(self._engine) as session, session.begin():
            session.execute(update(RunRow).where(RunRow.run_id == run_id).values(**values))
            if result is not None:
                number, text = result
                session.merge(RoundRow(run_id=run_id, round_number=number, result=text))

    def runs(self) -> Sequence[RunRecord]:
        """Every run, oldest first."""
        with Session(self._engine) as session:
            return [_record(row) for row in session.scalars(select(RunRow).order_by(RunRow.number))]

    def run(self, run_id: str) -> RunRecord | None:
        """One run."""
        with Session(self._engine) as session:
            row = session.scalars(select(RunRow).where(RunRow.run_id == run_id)).first()
            return _record(row) if row else None

    def rounds(self, run_id: str) -> Sequence[str]:
        """Results of the committed rounds, in order."""
        query = select(RoundRow).where(RoundRow.run_id == run_id).order_by(RoundRow.round_number)
        with Session(self._engine) as session:
            return [row.result for row in session.scalars(query)]

    def record_update(self, run_id: str, round_number: int, device_id: str, manifest: str) -> bool:
        """Commit an accepted update.

        Returns:
            False when this device's update of this round is already there.
        """
        row = UpdateRow(
            run_id=run_id, round_number=round_number, device_id=device_id, manifest=manifest
        )
        try:
            with Session(self._engine) as session, session.begin():
                session.add(row)
        except IntegrityError:
            return False
        return True

    def updates(self, run_id: str, round_number: int) -> dict[str, str]:
        """Manifests of the acknowledged updates of one round, by device."""
        query = select(UpdateRow).where(
            UpdateRow.run_id == run_id, UpdateRow.round_number == round_number
        )
        with Session(self._engine) as session:
            return {row.device_id: row.manifest for row in session.scalars(query)}


def _record(row: RunRow) -> RunRecord:
    return RunRecord(row.run_id, row.spec, row.status, row.reason, row.checkpoint, row.baseline)


def _make_sqlite_durable(engine: Engine) -> None:
    """WAL lets readers go on while a commit runs; FULL makes a commit survive power loss."""

    @event.listens_for(engine, "connect")
    def _set_pragmas(connection: object, _record: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()


def _hide_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]
