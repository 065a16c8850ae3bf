"""The doctor's proof that a memory limit bites, and its advice where one does not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent import doctor_child, doctor_limit
from edge_agent.board import detect_board
from edge_agent.doctor_finding import Finding
from edge_agent.doctor_limit import (
    LIMIT_BYTES,
    WANTED_BYTES,
    Killed,
    Proof,
    Survived,
    Untested,
    prove,
    verdict,
)
from edge_agent.doctor_memory import has_controller, limit_findings

BOARDS = Path(__file__).parents[1] / "golden/boards"
MIB = 2**20
UNLIMITED = Survived(limit_bytes=0, swapped_bytes=0, through="systemd")


def findings(root: Path, proof: Proof) -> dict[str, Finding]:
    facts = detect_board(root, machine="aarch64")
    return {finding.check: finding for finding in limit_findings(root, facts, proof)}


def captured(board: str, root: Path, **files: str) -> Path:
    """A copy of a captured board with other files; ``__`` in a name stands for ``/``."""
    shutil.copytree(BOARDS / board, root, symlinks=True)
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_a_child_over_its_limit_is_killed_on_this_machine() -> None:
    proof = prove()
    if isinstance(proof, Untested):
        pytest.skip(f"a memory limit cannot be tested here: {proof.why}")
    if isinstance(proof, Survived) and has_controller(Path("/")) is False:
        pytest.skip("this kernel cannot limit memory")
    assert isinstance(proof, Killed), proof
    assert 0 < proof.held_bytes < LIMIT_BYTES


def test_no_cgroup_of_the_proof_is_left_behind() -> None:
    prove()
    groups = [parent / f"legend-doctor-{os.getpid()}" for parent, _ in doctor_limit._parents()]
    assert [group for group in groups if group.exists()] == []


def test_without_any_limit_the_child_takes_what_it_was_told_to_and_ends() -> None:
    most = 8 * MIB
    done = subprocess.run(
        [sys.executable, "-I", "-S", doctor_child.__file__, str(most)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[-2] == f"held {most}"
    assert lines[-1].startswith("swapped ")
    assert isinstance(verdict(0, done.stdout, "", "systemd"), Survived)


def test_a_child_that_another_limit_ends_proves_nothing() -> None:
    script = f"ulimit -v {256 * 1024}; exec {sys.executable} -I -S {doctor_child.__file__} {2**30}"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    proof = verdict(done.returncode, done.stdout, done.stderr, "systemd")
    assert isinstance(proof, Untested)
    assert "ulimit" in proof.why


@pytest.mark.parametrize(
    ("returncode", "printed", "complaint", "expected"),
    [
        (-signal.SIGKILL, f"limit {LIMIT_BYTES}\nheld {50 * MIB}\n", "", Killed(50 * MIB, "x")),
        (0, f"limit {LIMIT_BYTES}\nheld 9\nswapped 7\n", "", Survived(LIMIT_BYTES, 7, "x")),
        (0, "limit 0\nheld 9\nswapped 0\n", "", Survived(0, 0, "x")),
        (1, "", "hello\nNo medium found\n", Untested("x did not run the child: No medium found")),
        (-signal.SIGTERM, "limit 0\n", "", Untested("x did not run the child: exit status -15")),
    ],
)
def test_every_end_of_the_child_has_one_meaning(
    returncode: int, printed: str, complaint: str, expected: Proof
) -> None:
    assert verdict(returncode, printed, complaint, "x") == expected


def test_a_kill_beyond_the_limit_is_no_proof_of_the_limit() -> None:
    printed = f"limit {LIMIT_BYTES}\nheld {LIMIT_BYTES + MIB}\n"
    assert isinstance(verdict(-signal.SIGKILL, printed, "", "x"), Untested)


def test_a_limit_that_bites_is_said_with_its_figures() -> None:
    finding = findings(BOARDS / "rpi-5-8gb", Killed(50 * MIB, "systemd"))["memory limit"]
    assert finding.state == "ok"
    for figure in (50, LIMIT_BYTES // MIB, WANTED_BYTES // MIB):
        assert str(figure) in finding.seen


def test_a_raspberry_pi_as_delivered_is_told_its_boot_option() -> None:
    finding = findings(BOARDS / "rpi-4b-4gb", UNLIMITED)["memory limit"]
    assert finding.state == "warning"
    assert "no memory controller" in finding.seen
    assert "cgroup_enable=memory" in finding.remedy
    assert "/boot/firmware/cmdline.txt" in finding.remedy


def test_an_older_raspberry_pi_os_is_told_its_own_file(tmp_path: Path) -> None:
    root = captured("rpi-4b-4gb", tmp_path / "pi", boot__cmdline_txt="console=tty1\n")
    assert "/boot/cmdline.txt" in findings(root, UNLIMITED)["memory limit"].remedy


def test_a_kernel_that_ignores_the_boot_option_is_named(tmp_path: Path) -> None:
    root = captured("rpi-4b-4gb", tmp_path / "pi", proc__cmdline="quiet cgroup_enable=memory\n")
    assert "ignores" in findings(root, UNLIMITED)["memory limit"].remedy


def test_a_kernel_without_the_controller_is_named_without_a_test_too() -> None:
    proof = Untested("only root may ask systemd for a limit")
    finding = findings(BOARDS / "rpi-4b-4gb", proof)["memory limit"]
    assert "no memory controller" in finding.seen
    assert "cgroup_enable=memory" in finding.remedy


def test_a_limit_that_systemd_kept_to_itself_is_told_apart() -> None:
    finding = findings(BOARDS / "rpi-5-8gb", UNLIMITED)["memory limit"]
    assert "did not tell the kernel" in finding.seen
    assert "daemon-reexec" in finding.remedy


def test_memory_that_went_to_swap_is_told_apart() -> None:
    proof = Survived(LIMIT_BYTES, 70 * MIB, "systemd")
    finding = findings(BOARDS / "jetson-xavier-nx-jp5", proof)["memory limit"]
    assert "70 MiB of it went to swap" in finding.seen
    assert "swap" in finding.remedy


def test_what_cannot_be_tested_says_why() -> None:
    proof = Untested("only root, or a user who is logged in, may ask systemd for a limit")
    finding = findings(BOARDS / "rpi-5-8gb", proof)["memory limit"]
    assert finding.seen.startswith("cannot be tested here: only root")
    assert "sudo edge-agent doctor" in finding.remedy


@pytest.mark.parametrize("board", ["jetson-agx-orin-jp6", "jetson-tx2-jp4.6"])
def test_a_jetson_is_told_that_its_gpu_memory_is_not_counted(board: str) -> None:
    found = findings(BOARDS / board, Killed(50 * MIB, "systemd"))
    assert found["memory limit"].state == "ok"
    assert "CUDA" in found["GPU memory"].seen


def test_only_a_jetson_is_told_so() -> None:
    assert "GPU memory" not in findings(BOARDS / "rpi-5-8gb", Killed(50 * MIB, "systemd"))


@pytest.mark.parametrize(
    ("board", "expected"),
    [
        ("rpi-4b-4gb", False),
        ("rpi-5-8gb", True),
        ("jetson-tx2-jp4.6", True),
        ("container-cgroup-v2", None),
    ],
)
def test_the_kernels_controller_is_read_below_a_root(board: str, expected: bool | None) -> None:
    assert has_controller(BOARDS / board) is expected
