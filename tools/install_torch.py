"""Install PyTorch for the CPU unless a suitable one is there; never gigabytes of CUDA by surprise.

    python tools/install_torch.py REQUIREMENT

Where the configured package index offers a CPU build under the plain name (macOS, Windows,
64-bit ARM before 2.11, or a local build), pip installs it. Where the plain name means a CUDA build
(Linux on x86-64), uv takes the CPU build of the same version instead.

Set TORCH_BACKEND to have a GPU build on purpose: ``auto`` looks at the driver, ``cu128`` and the
like name one; see the documentation of ``uv pip install --torch-backend``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]


def main(requirement: str) -> None:
    """Install what is asked for, the small way."""
    backend = os.environ.get("TORCH_BACKEND", "")
    if not backend and (found := installed()):
        print(f"torch {found} is installed already")
    elif backend:
        install_with_uv(requirement, backend)
    elif means_cuda(requirement):
        print("the plain package is a CUDA build of several GB; taking the CPU build instead")
        install_with_uv(requirement, "cpu")
    else:
        subprocess.run([*PIP, "-q", requirement], check=True)


def installed() -> str | None:
    """Version of the torch that is there."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def means_cuda(requirement: str) -> bool:
    """Ask pip what it would install, without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [*PIP, "-q", "--dry-run", "--report", str(report), requirement]
        subprocess.run(command, check=True)
        plan = json.loads(report.read_text(encoding="utf-8"))
    names = {item["metadata"]["name"].lower() for item in plan["install"]}
    return any(name.startswith(("nvidia-", "cuda-")) for name in names)


def install_with_uv(requirement: str, backend: str) -> None:
    """Install a build for one kind of accelerator."""
    subprocess.run([*PIP, "-q", "uv>=0.9"], check=True)
    uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    subprocess.run([*uv, "--torch-backend", backend, requirement], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
