"""A real PostgreSQL server of one test, which may stop and start it again."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.ports import free_port


@dataclass
class Postgres:
    """One server; listens on loopback.

    Attributes:
        programs: folder of ``pg_ctl`` and ``initdb``.
        folder: its data, owned by whom it runs as.
    """

    programs: Path
    folder: Path
    port: int

    @property
    def url(self) -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg://legend:secret@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -c fsync=off"
        log = str(self.folder / "log")
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", log, "-w", "start"
        )

    def stop(self) -> None:
        """Break off its connections and end it."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def initialise(self) -> None:
        """Make its files, with one user."""
        password = self.folder / "password"
        password.write_text("secret\n")
        password.chmod(0o644)
        data = str(self.folder / "data")
        self._run(
            "initdb", "-D", data, "-U", "legend", "-A", "scram-sha-256", f"--pwfile={password}"
        )

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), *arguments]
        if os.geteuid() == 0:
            # It refuses to run as root.
            command = ["runuser", "-u", "postgres", "--", *command]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder)


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """Start one; skips the test where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("PostgreSQL is not installed (apt install postgresql)")
    # Below /tmp itself: its user cannot enter the folders of tests that root runs.
    root = Path(f"/tmp/{folder.name}-{os.getpid()}")
    root.mkdir(mode=0o700)
    if os.geteuid() == 0:
        shutil.chown(root, "postgres", "postgres")
    server = Postgres(found[-1].parent, root, free_port())
    try:
        server.initialise()
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)
