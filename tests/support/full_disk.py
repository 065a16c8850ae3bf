"""A small disk of its own that a test can really fill: a tmpfs, mounted as root."""

from __future__ import annotations

import errno
import io
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class SmallDisk:
    """A mounted file system of a few megabytes."""

    root: Path

    @property
    def free_bytes(self) -> int:
        """What is left for anybody."""
        disk = os.statvfs(self.root)
        return disk.f_bavail * disk.f_frsize

    def fill(self) -> None:
        """Take every byte that is left."""
        with (self.root / "filler").open("ab", buffering=0) as file:
            written = 1
            while written:
                written = _write_some(file)

    def make_space(self) -> None:
        """Give the bytes back."""
        (self.root / "filler").unlink(missing_ok=True)


def _write_some(file: io.FileIO) -> int:
    try:
        return file.write(bytes(4096))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return 0


@contextmanager
def small_disk(root: Path, *, megabytes: int) -> Iterator[SmallDisk]:
    """Mount one; skips the test where that is not allowed."""
    root.mkdir(parents=True, exist_ok=True)
    options = f"size={megabytes}m,mode=0700"
    command = ["mount", "-t", "tmpfs", "-o", options, "legend-test", str(root)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount(8) here")
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    try:
        yield SmallDisk(root)
    finally:
        # Lazily: a database may still be open in this process.
        subprocess.run(["umount", "-l", str(root)], check=True)
