"""What must survive a killed server: devices, models, runs, rounds, updates.

SQLAlchemy 2 over SQLite (WAL, synchronous=FULL) or any database it can reach.
Knows rows, not rules: documents are JSON text written and read by their owners.
Every method is one transaction; when it returns, the data is on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import (
    Integer,
    String,
    Text,
    UniqueConstraint,
    create_engine,
    delete,
    func,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from broker_server import database_file
from broker_server.database_file import RESTORE_HINT, DatabaseDamaged
from wire_protocol.durable import BEGIN, DONE, reached
from wire_protocol.errors import ConfigError


class Row(DeclarativeBase):
    """Parent of the tables."""


class DeviceRow(Row):
    """The last birth of a device, and what the server estimates about it."""

    __tablename__ = "devices"
    device_id: Mapped[str] = mapped_column(String(48), primary_key=True)
    sid: Mapped[int] = mapped_column(Integer)
    birth: Mapped[str] = mapped_column(Text)


class ExpectedRow(Row):
    """A device of the last inventory, and where it is."""

    __tablename__ = "expected"
    device_id: Mapped[str] = mapped_column(String(48), primary_key=True)
    address: Mapped[str] = mapped_column(Text)


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
        DatabaseDamaged: it was opened, and is not what was written.
        DatabaseUnavailable: its disk is full, or it does not answer. Every method may raise it too.
    """

    def __init__(self, url: str) -> None:
        self._name = _hide_password(url)
        try:
            # A database that was restarted must not fail the first who ask it.
            self._engine = create_engine(url, pool_pre_ping=True)
            if self._engine.dialect.name == "sqlite":
                database_file.make_durable(self._engine)
            Row.metadata.create_all(self._engine)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            if isinstance(error, DBAPIError):
                meant = database_file.named(error, self._name)
                if isinstance(meant, DatabaseDamaged) or "no space" in str(meant):
                    raise meant from error
            reason = str(error).splitlines()[0]
            raise ConfigError(f"database {self._name} cannot be opened: {reason}") from error
        if (damage := self.damage()) is not None:
            self.close()
            raise DatabaseDamaged(f"database {self._name} is damaged ({damage}); {RESTORE_HINT}")

    @classmethod
    def in_folder(cls, folder: Path) -> Store:
        """The default: an SQLite file in the server's state directory."""
        return cls(f"sqlite:///{folder / 'server.db'}")

    @property
    def kind(self) -> str:
        """``sqlite``, ``postgresql``, ..."""
        return self._engine.dialect.name

    @property
    def file(self) -> Path | None:
        """Where an SQLite database lies; None for any other."""
        name = self._engine.url.database
        return Path(name) if self.kind == "sqlite" and name else None

    def damage(self) -> str | None:
        """What is wrong with the database file; None when it is whole, or not ours to check."""
        return database_file.damage_in(self._engine) if self.kind == "sqlite" else None

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    def save_device(self, device_id: str, sid: int, birth: str) -> None:
        """Insert or replace a device."""
        with self._transaction("server.store.device") as session:
            session.merge(DeviceRow(device_id=device_id, sid=sid, birth=birth))

    def devices(self) -> Sequence[tuple[str, int, str]]:
        """Every known device as (device_id, sid, birth)."""
        with self._reading() as session:
            rows = session.scalars(select(DeviceRow).order_by(DeviceRow.device_id))
            return [(row.device_id, row.sid, row.birth) for row in rows]

    def save_expected(self, addresses: Mapping[str, str]) -> None:
        """Replace the devices of the last inventory: device id -> address."""
        with self._transaction("server.store.expected") as session:
            session.execute(delete(ExpectedRow))
            session.add_all(
                ExpectedRow(device_id=device_id, address=address)
                for device_id, address in addresses.items()
            )

    def expected(self) -> dict[str, str]:
        """The devices of the last inventory, sorted: device id -> address."""
        with self._reading() as session:
            rows = session.scalars(select(ExpectedRow).order_by(ExpectedRow.device_id))
            return {row.device_id: row.address for row in rows}

    def save_model(self, digest: str, name: str, *, files: str, config: str) -> None:
        """Register a base model; a name given again now means the new digest."""
        with self._transaction("server.store.model") as session:
            for row in session.scalars(select(ModelRow).where(ModelRow.name == name)):
                if row.digest != digest:
                    row.name = f"{row.name}@{row.digest[:12]}"
            session.flush()
            session.merge(ModelRow(digest=digest, name=name, files=files, config=config))

    def models(self) -> Sequence[ModelRow]:
        """Every registered base model."""
        with self._reading() as session:
            return list(session.scalars(select(ModelRow).order_by(ModelRow.name)))

    def model(self, name_or_digest: str) -> ModelRow | None:
        """One base model by name or digest."""
        either = (ModelRow.name == name_or_digest) | (ModelRow.digest == name_or_digest)
        with self._reading() as session:
            return session.scalars(select(ModelRow).where(either)).first()

    def create_run(self, run_id: str, spec: str) -> None:
        """Queue a run."""
        with self._transaction("server.store.run") as session:
            session.add(RunRow(run_id=run_id, spec=spec, status="queued"))

    def set_status(self, run_id: str, status: str, reason: str = "") -> None:
        """Move a run through its life."""
        change = update(RunRow).where(RunRow.run_id == run_id)
        with self._transaction("server.store.status") as session:
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
        with self._transaction("server.store.checkpoint") as session:
            session.execute(update(RunRow).where(RunRow.run_id == run_id).values(**values))
            if result is not None:
                number, text = result
                session.merge(RoundRow(run_id=run_id, round_number=number, result=text))

    def runs(self) -> Sequence[RunRecord]:
        """Every run, oldest first."""
        with self._reading() as session:
            return [_record(row) for row in session.scalars(select(RunRow).order_by(RunRow.number))]

    def statuses(self) -> dict[str, str]:
        """The status of every run; without its documents, which may be large."""
        query = select(RunRow.run_id, RunRow.status).order_by(RunRow.number)
        with self._reading() as session:
            return {row[0]: row[1] for row in session.execute(query)}

    def run(self, run_id: str) -> RunRecord | None:
        """One run."""
        with self._reading() as session:
            row = session.scalars(select(RunRow).where(RunRow.run_id == run_id)).first()
            return _record(row) if row else None

    def rounds(self, run_id: str, *, after: int = 0) -> Sequence[str]:
        """Results of the committed rounds that come after this one, in order."""
        later = (RoundRow.run_id == run_id) & (RoundRow.round_number > after)
        query = select(RoundRow.result).where(later).order_by(RoundRow.round_number)
        with self._reading() as session:
            return list(session.scalars(query))

    def last_round(self, run_id: str) -> str | None:
        """Result of the last committed round."""
        query = select(RoundRow.result).where(RoundRow.run_id == run_id)
        with self._reading() as session:
            return session.scalars(query.order_by(RoundRow.round_number.desc()).limit(1)).first()

    def round_counts(self) -> dict[str, int]:
        """Number of committed rounds of every run that has any."""
        query = select(RoundRow.run_id, func.count()).group_by(RoundRow.run_id)
        with self._reading() as session:
            return {row[0]: row[1] for row in session.execute(query)}

    def record_update(self, run_id: str, round_number: int, device_id: str, manifest: str) -> bool:
        """Commit an accepted update.

        Returns:
            False when this device's update of this round is already there.
        """
        row = UpdateRow(
            run_id=run_id, round_number=round_number, device_id=device_id, manifest=manifest
        )
        try:
            with self._transaction("server.store.update") as session:
                session.add(row)
        except IntegrityError:
            return False
        return True

    def updates(self, run_id: str, round_number: int) -> dict[str, str]:
        """Manifests of the acknowledged updates of one round, by device."""
        query = select(UpdateRow).where(
            UpdateRow.run_id == run_id, UpdateRow.round_number == round_number
        )
        with self._reading() as session:
            return {row.device_id: row.manifest for row in session.scalars(query)}

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        """What is read stays usable after the block is left."""
        try:
            with Session(self._engine, expire_on_commit=False) as session:
                yield session
        except DBAPIError as error:
            raise database_file.named(error, self._name) from error

    @contextmanager
    def _transaction(self, site: str) -> Iterator[Session]:
        """One commit, on the disk when the block is left; nothing of it after an error."""
        try:
            with Session(self._engine) as session:
                yield session
                session.flush()
                reached(site, BEGIN)
                session.commit()
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise database_file.named(error, self._name) from error
        reached(site, DONE)


def _record(row: RunRow) -> RunRecord:
    return RunRecord(row.run_id, row.spec, row.status, row.reason, row.checkpoint, row.baseline)


def _hide_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]
