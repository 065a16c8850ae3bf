"""Proof that a memory limit bites: a child that takes more than it may have must be killed.

Reading the limit proves nothing: systemd accepts ``MemoryMax=`` and says nothing where the kernel
has no memory controller (a Raspberry Pi as it is delivered) or where the cgroups are read-only (a
container). The child is small, takes a bounded amount, and is the kernel's first choice when the
machine itself runs short. Knows Linux, systemd and cgroups; what it means is ``doctor_memory``'s.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_agent.board import memory_budget
from wire_protocol.errors import LegendError, one_line

LIMIT_BYTES = 64 * 2**20
"""Several times what the child's interpreter needs, and nothing to any board that can train."""
WANTED_BYTES = 2 * LIMIT_BYTES
_TIMEOUT_S = 60.0
_CHILD = Path(__file__).with_name("doctor_child.py")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Untested:
    """It could not be tried, and why."""

    why: str


@dataclass(frozen=True)
class Killed:
    """The child was killed at its limit.

    Attributes:
        held_bytes: what it had taken by then, besides its interpreter.
        through: who set the limit.
    """

    held_bytes: int
    through: str


@dataclass(frozen=True)
class Survived:
    """The child got all that it wanted.

    Attributes:
        limit_bytes: what its own cgroup says; 0: nobody ever told the kernel.
        swapped_bytes: what of it went to swap.
        through: who was asked to set the limit.
    """

    limit_bytes: int
    swapped_bytes: int
    through: str


Proof = Untested | Killed | Survived


def prove() -> Proof:
    """Start the child under a limit and see how it ends; takes about a second."""
    try:
        if memory_budget(Path("/")).available_bytes < WANTED_BYTES:
            return Untested(f"less than {WANTED_BYTES // 2**20} MiB of memory are free")
    except LegendError as error:
        return Untested(one_line(error))
    if Path("/run/systemd/system").is_dir() and shutil.which("systemd-run"):
        return _in_scope()
    return _in_own_group()


def verdict(returncode: int, printed: str, complaint: str, through: str) -> Proof:
    """What the end of the child means.

    Args:
        returncode: negative: the signal that ended it.
        printed: its stdout; see ``doctor_child``.
        complaint: its stderr, or that of whoever was to start it.
        through: who was to set the limit.
    """
    said = [line.split() for line in printed.splitlines()]
    words = {line[0]: int(line[1]) for line in said if len(line) == 2 and line[1].isdecimal()}
    held = words.get("held", 0)
    if returncode == -signal.SIGKILL and "limit" in words and held < LIMIT_BYTES:
        return Killed(held, through)
    if returncode == 0 and "swapped" in words:
        return Survived(words["limit"], words["swapped"], through)
    if ["refused"] in said:
        return Untested("another limit (ulimit -d or -v) ended the child first")
    last = complaint.strip().rpartition("\n")[2]
    return Untested(f"{through} did not run the child: {last or f'exit status {returncode}'}")


def _in_scope() -> Proof:
    root = os.geteuid() == 0
    if not root and not Path(f"/run/user/{os.geteuid()}/systemd").is_dir():
        return Untested("only root, or a user who is logged in, may ask systemd for a limit")
    command = ["systemd-run", "--scope", "--quiet", "--collect"]
    command += [] if root else ["--user"]
    limits = [f"MemoryMax={LIMIT_BYTES}", "MemorySwapMax=0"]
    proof = _run([*command, *(f"--property={one}" for one in limits), "--"], (), "systemd")
    if isinstance(proof, Survived) and not root and not proof.limit_bytes:
        # On cgroup v1, and where nothing is delegated to users, this says nothing about services.
        return Untested("systemd may not limit the memory of this user's programs; ask as root")
    return proof


def _in_own_group() -> Proof:
    why = "there is no systemd here"
    with ExitStack() as entered:
        for parent, names in _parents():
            group = parent / f"legend-doctor-{os.getpid()}"
            try:
                entered.enter_context(_made(group))
                (group / names[0]).write_text(str(LIMIT_BYTES), encoding="ascii")
            except OSError as error:
                why = f"there is no systemd here, and {parent} is not ours: {error.strerror}"
                continue
            for name, value in names[1]:
                if (group / name).exists():
                    (group / name).write_text(value, encoding="ascii")
            return _run([], [str(group / "cgroup.procs")], "a cgroup of its own")
    return Untested(why)


_V1 = (
    "memory.limit_in_bytes",
    (("memory.swappiness", "0"), ("memory.memsw.limit_in_bytes", str(LIMIT_BYTES))),
)
_V2 = ("memory.max", (("memory.swap.max", "0"),))


def _parents() -> Iterator[tuple[Path, tuple[str, tuple[tuple[str, str], ...]]]]:
    """Where a cgroup with a limit could be made, and which files set it; the nearest first."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        number, controllers, place = line.split(":", 2)
        if "memory" in controllers.split(","):
            for folder in _upwards(_CGROUPS / "memory", place):
                if (folder / "memory.limit_in_bytes").exists():
                    yield folder, _V1
        elif number == "0":
            for mount in (_CGROUPS, _CGROUPS / "unified"):
                for folder in _upwards(mount, place):
                    if "memory" in _read(folder / "cgroup.subtree_control").split():
                        yield folder, _V2


def _upwards(mount: Path, place: str) -> Iterator[Path]:
    """A cgroup's folder and its parents'."""
    folder = mount / place.strip("/")
    while True:
        yield folder
        if folder == mount:
            return
        folder = folder.parent


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


@contextmanager
def _made(group: Path) -> Iterator[None]:
    group.mkdir()
    try:
        yield
    finally:
        # The kernel lets go of a dead process's memory in its own time.
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def _run(starter: Sequence[str], joined: Sequence[str], through: str) -> Proof:
    command = [*starter, sys.executable, "-I", "-S", str(_CHILD), str(WANTED_BYTES), *joined]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Untested(f"the child was not done after {_TIMEOUT_S:.0f} s")
    except OSError as error:
        return Untested(f"{command[0]}: {error.strerror}")
    return verdict(done.returncode, done.stdout, done.stderr, through)
