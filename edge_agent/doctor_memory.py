"""What the doctor says about memory limits: whether they bite here, and what to do if not.

The proof is about the machine that runs this; why it failed is read below a root path, so that a
captured board explains itself too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edge_agent.board import BoardFacts, read_text
from edge_agent.doctor_finding import Finding
from edge_agent.doctor_limit import LIMIT_BYTES, WANTED_BYTES, Killed, Proof, Survived, Untested

CHECK = "memory limit"
_BOOT_OPTION = "cgroup_enable=memory"
_MIB = 2**20


def limit_findings(root: Path, facts: BoardFacts, proof: Proof) -> Iterator[Finding]:
    """Say whether a memory limit bites, and on a Jetson what it does not count.

    Args:
        root: ``/``, or the folder of a captured board.
        facts: the board below ``root``.
        proof: what became of the child.
    """
    if isinstance(proof, Killed):
        seen = (
            f"a child that took {proof.held_bytes // _MIB} of {WANTED_BYTES // _MIB} MiB under a "
            f"limit of {LIMIT_BYTES // _MIB} MiB was killed (limit set by {proof.through})"
        )
        yield Finding(CHECK, "ok", seen)
    elif isinstance(proof, Survived):
        seen = (
            f"a child took {WANTED_BYTES // _MIB} MiB over a limit of {LIMIT_BYTES // _MIB} MiB "
            f"and lives: {_why(root, proof)}"
        )
        yield Finding(CHECK, "warning", seen, _remedy(root, facts, proof))
    elif has_controller(root) is False:
        seen = "the kernel has no memory controller: MemoryMax= is accepted and does nothing"
        yield Finding(CHECK, "warning", seen, _boot_remedy(root, facts))
    else:
        yield Finding(CHECK, "warning", f"cannot be tested here: {proof.why}", _other_way(proof))
    if facts.l4t is not None:
        yield Finding(
            "GPU memory",
            "warning",
            "a cgroup's limit does not count what CUDA takes on a Jetson, so MemoryMax= does not "
            "bound it; only torch's own limit does, which the trainer sets",
            "nothing, if the board has memory to spare; else set 'memory_limit_bytes'",
        )


def has_controller(root: Path) -> bool | None:
    """Whether the kernel can limit memory; None where nothing below ``root`` tells.

    ``/proc/cgroups`` is no witness: since Linux 6.12 it may not name what only v2 has.
    """
    if read_text(root, "sys/fs/cgroup/memory/memory.limit_in_bytes") is not None:
        return True
    found = [
        text.split()
        for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified")
        if (text := read_text(root, f"{mount}/cgroup.controllers")) is not None
    ]
    return any("memory" in controllers for controllers in found) if found else None


def _why(root: Path, proof: Survived) -> str:
    if proof.swapped_bytes:
        return f"{proof.swapped_bytes // _MIB} MiB of it went to swap"
    if has_controller(root) is False:
        return "the kernel has no memory controller"
    if not proof.limit_bytes:
        return f"{proof.through} took the limit and did not tell the kernel"
    return "the kernel knows the limit and does not keep it"


def _remedy(root: Path, facts: BoardFacts, proof: Survived) -> str:
    if proof.swapped_bytes:
        return "turn swap off, or boot with swapaccount=1: swap on a card makes training crawl"
    if has_controller(root) is False:
        return _boot_remedy(root, facts)
    if not proof.limit_bytes:
        return (
            "if this is a container: mount its cgroups writable, then systemctl daemon-reexec; "
            f"else boot with {_BOOT_OPTION}"
        )
    return "set 'memory_limit_bytes': the trainer then limits itself"


def _boot_remedy(root: Path, facts: BoardFacts) -> str:
    if _BOOT_OPTION in (read_text(root, "proc/cmdline") or "").split():
        return f"this kernel ignores {_BOOT_OPTION}: update it (some 6.6 and 6.12 do)"
    if not facts.board_id.startswith("rpi-"):
        return f"boot the kernel with {_BOOT_OPTION}"
    places = ("boot/firmware/cmdline.txt", "boot/cmdline.txt")
    place = next((one for one in places if read_text(root, one) is not None), places[0])
    return (
        f"add {_BOOT_OPTION} to the end of the one line in /{place} and reboot; "
        "Ansible's role raspberry_pi does it"
    )


def _other_way(proof: Untested) -> str:
    return "run it as root: sudo edge-agent doctor" if "root" in proof.why else ""
