"""Which board this is and how much memory a training may take.

Everything is read below a root path, so that a captured board is a folder and
a test host can pretend. Knows /proc, /sys, the device tree, nvpmodel and
cgroups; must not run programs, and asks nothing of torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from profiles.loader import board_ids, load_board
from profiles.schema import BoardProfile
from wire_protocol.errors import DeviceError, FailureCode

UNKNOWN_ARM = "generic-arm64"
UNKNOWN_PC = "generic-x86-64"

RESERVE_SHARE = 0.10
RESERVE_BYTES = 256 * 2**20
"""What the board's own work may still need after we have taken our budget."""

# The kernel writes "no limit" on cgroup v1 as the largest page-aligned number.
_NO_LIMIT_BYTES = 2**60


@dataclass(frozen=True)
class BoardFacts:
    """What a running board says about itself.

    Attributes:
        board_id: the board profile that fits best; there always is one.
        description: the device tree's model text, or the kind of machine.
        l4t: NVIDIA's Linux release, e.g. ``36.4.3``; ``None`` off Jetson.
        cpu_count: processors that are online now.
        memory_total_bytes: as the kernel reports it; 0 when it does not.
        power_mode: name of the active nvpmodel mode, if the board has modes.
        power_modes: names of all its modes, in the order of their ids.
        machine: ``uname -m``.
        note: why ``board_id`` is only the nearest profile; empty if it is exact.
    """

    board_id: str
    description: str
    l4t: str | None
    cpu_count: int
    memory_total_bytes: int
    power_mode: str | None
    power_modes: tuple[str, ...]
    machine: str
    note: str


@dataclass(frozen=True)
class MemoryBudget:
    """Memory that a training may take now.

    Attributes:
        limit_bytes: the ceiling that binds: a cgroup's limit or the whole memory.
        available_bytes: what is left below it, never negative.
        source: where the ceiling comes from, for people.
    """

    limit_bytes: int
    available_bytes: int
    source: str


def detect_board(root: Path, *, machine: str) -> BoardFacts:
    """Find the board profile of the system below ``root``.

    Args:
        root: ``/``, or a folder that holds a board's ``proc``, ``sys`` and ``etc``.
        machine: ``uname -m`` of the running system.
    """
    memory = _meminfo(root).get("MemTotal", 0)
    model = _device_tree_model(root)
    board_id, note = _match(model, memory_bytes=memory, machine=machine)
    power_mode, power_modes = read_power_modes(root)
    return BoardFacts(
        board_id=board_id,
        description=model or f"{machine} machine",
        l4t=_l4t_release(root),
        cpu_count=_cpu_count(root),
        memory_total_bytes=memory,
        power_mode=power_mode,
        power_modes=power_modes,
        machine=machine,
        note=note,
    )


def memory_budget(root: Path) -> MemoryBudget:
    """Say how much memory a training may take: what the tightest fence leaves.

    The fences are every cgroup from the process's own up to the root (v1 and
    v2), and ``MemAvailable`` less a reserve. ``MemTotal`` says nothing inside a
    container, and on Jetson the GPU takes its memory from ``MemAvailable``.

    Raises:
        DeviceError: neither a cgroup limit nor ``MemAvailable`` can be read.
    """
    memory = _meminfo(root)
    budgets = list(_cgroup_budgets(root))
    available = memory.get("MemAvailable")
    if available is not None:
        reserve = max(int(available * RESERVE_SHARE), RESERVE_BYTES)
        total = memory.get("MemTotal", available)
        budgets.append(MemoryBudget(total, max(0, available - reserve), "MemAvailable"))
    if not budgets:
        raise DeviceError(
            FailureCode.MISSING_FILE,
            f"there is no MemAvailable in {root / 'proc/meminfo'}; mount /proc there",
        )
    return min(budgets, key=lambda budget: budget.available_bytes)


def read_power_modes(root: Path) -> tuple[str | None, tuple[str, ...]]:
    """Read the active power mode and all modes, by name.

    Ids differ between boards and releases, so names are the only safe handle.
    Without a recorded choice, the board runs in the default of nvpmodel.conf.
    """
    conf = read_text(root, "etc/nvpmodel.conf") or ""
    names = {
        int(number): name
        for number, name in re.findall(
            r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", conf, re.MULTILINE
        )
    }
    status = read_text(root, "var/lib/nvpmodel/status") or ""
    active = re.search(r"pmode:(\d+)", status) or re.search(
        r"^\s*<\s*PM_CONFIG\s+DEFAULT=(\d+)\s*>", conf, re.MULTILINE
    )
    current = names.get(int(active.group(1))) if active else None
    return current, tuple(names[number] for number in sorted(names))


def read_text(root: Path, relative: str) -> str | None:
    """Read a file below ``root``; ``None`` when it cannot be read."""
    try:
        return under(root, relative).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def under(root: Path, relative: str) -> Path:
    """Find a path below ``root``, taking absolute links as ``root``'s own.

    ``/etc/nvpmodel.conf`` and ``/proc/device-tree`` are absolute links on a
    Jetson; followed blindly, a captured board would read the host's files.
    """
    path = root
    pending = list(reversed(PurePosixPath(relative).parts))
    links = 0
    while pending:
        part = pending.pop()
        target = path / part
        # 40 is the kernel's own bound (ELOOP): a loop of links ends as a missing file.
        if target.is_symlink() and links < 40:
            links += 1
            link = PurePosixPath(target.readlink())
            path = root if link.is_absolute() else path
            pending.extend(reversed([step for step in link.parts if step != "/"]))
        elif part == "..":
            path = path.parent if path != root else root
        else:
            path = target
    return path


def _device_tree_model(root: Path) -> str:
    for place in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        model = (read_text(root, place) or "").replace("\0", "").strip()
        if model:
            return model
    return ""


def _match(model: str, *, memory_bytes: int, machine: str) -> tuple[str, str]:
    """The board id for a model text, and a note when it is not exact."""
    boards = [load_board(board_id) for board_id in board_ids()]
    lengths = {
        board.board_id: max(
            (len(text) for text in board.detection.device_tree_models if text in model), default=0
        )
        for board in boards
    }
    longest = max(lengths.values())
    if longest:
        family = [board for board in boards if lengths[board.board_id] == longest]
        return _variant(family, memory_bytes=memory_bytes)
    for board in boards:
        if machine.lower() in board.detection.machines:
            expected = board.board_id == UNKNOWN_PC and not model
            what = model or f"{machine} machine"
            return board.board_id, "" if expected else f"no board profile for {what!r}"
    return UNKNOWN_PC, f"no board profile for machine {machine!r}"


def _variant(family: list[BoardProfile], *, memory_bytes: int) -> tuple[str, str]:
    """The smallest variant that covers the memory: the kernel never sees all of it."""
    family = sorted(family, key=lambda board: board.memory_bytes)
    if len(family) > 1 and not memory_bytes:
        return family[0].board_id, "memory size unknown, smallest variant assumed"
    for board in family:
        if memory_bytes <= board.memory_bytes:
            return board.board_id, ""
    largest = family[-1]
    return largest.board_id, f"has more memory than the largest variant, {largest.board_id}"


def _l4t_release(root: Path) -> str | None:
    text = read_text(root, "etc/nv_tegra_release") or ""
    found = re.search(r"R(\d+)\s+\(release\),\s+REVISION:\s*([\d.]+)", text)
    return f"{found.group(1)}.{found.group(2)}" if found else None


def _cpu_count(root: Path) -> int:
    online = (read_text(root, "sys/devices/system/cpu/online") or "").strip()
    count = 0
    for span in online.split(","):
        first, _, last = span.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            count += int(last or first) - int(first) + 1
    if count < 1:
        cpuinfo = read_text(root, "proc/cpuinfo") or ""
        count = len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE))
    return max(1, count)


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes; empty when it cannot be read."""
    text = read_text(root, "proc/meminfo") or ""
    rows = re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)
    return {key: int(kilobytes) * 1024 for key, kilobytes in rows}


def _cgroup_budgets(root: Path) -> Iterator[MemoryBudget]:
    """One budget per cgroup with a limit, from the process's own up to the root."""
    for line in (read_text(root, "proc/self/cgroup") or "").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and not controllers:
            for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                for place in _up_to_root(group):
                    yield from _v2_budget(root, f"{mount}/{place}", place)
        elif "memory" in controllers.split(","):
            for place in _up_to_root(group):
                yield from _v1_budget(root, f"sys/fs/cgroup/memory/{place}", place)


def _up_to_root(group: str) -> Iterator[str]:
    """A cgroup's path and its parents'; the path may not exist inside a container."""
    parts = [part for part in PurePosixPath(group).parts if part not in {"/", ".."}]
    for length in range(len(parts), -1, -1):
        yield "/".join(parts[:length])


def _v2_budget(root: Path, folder: str, group: str) -> Iterator[MemoryBudget]:
    # Above memory.high the kernel does not kill but slows a process to a crawl: as good as a limit.
    limits = [_number(root, f"{folder}/{name}") for name in ("memory.max", "memory.high")]
    limit = min((value for value in limits if value is not None), default=None)
    usage = _number(root, f"{folder}/memory.current") or 0
    cache = _stat(root, f"{folder}/memory.stat", "inactive_file")
    if limit is not None:
        yield _budget(limit, usage - cache, f"cgroup v2 /{group}")


def _v1_budget(root: Path, folder: str, group: str) -> Iterator[MemoryBudget]:
    limit = _number(root, f"{folder}/memory.limit_in_bytes")
    usage = _number(root, f"{folder}/memory.usage_in_bytes") or 0
    cache = _stat(root, f"{folder}/memory.stat", "total_inactive_file")
    if limit is not None:
        yield _budget(limit, usage - cache, f"cgroup v1 /{group}")


def _budget(limit: int, usage: int, source: str) -> MemoryBudget:
    return MemoryBudget(limit, min(limit, max(0, limit - usage)), source)


def _number(root: Path, relative: str) -> int | None:
    """A cgroup's number of bytes; ``None`` for "max", "unlimited" and missing files."""
    text = (read_text(root, relative) or "").strip()
    if not text.isdecimal() or int(text) >= _NO_LIMIT_BYTES:
        return None
    return int(text)


def _stat(root: Path, relative: str, key: str) -> int:
    """File cache that the kernel drops first when memory is short: usage, but not in our way."""
    found = re.search(rf"^{key} (\d+)$", read_text(root, relative) or "", re.MULTILINE)
    return int(found.group(1)) if found else 0
