"""What ``legend backup`` says about the file that it wrote."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from broker_server.backup_archive import BackupManifest


def backup_lines(manifest: BackupManifest, file: Path) -> list[str]:
    """What is inside, and what is not."""
    states = Counter(manifest.runs.values())
    runs = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"
    size_mb = manifest.size_bytes / 1e6
    lines = [
        f"{file}: fleet {manifest.fleet}, {len(manifest.files)} files, {size_mb:.1f} MB, checked",
        f"runs: {runs}",
    ]
    if manifest.database != "sqlite":
        lines.append(
            f"NOT inside: the {manifest.database} database. Back it up with its own tool, both "
            "while no run is active; this file holds blobs, results, counters and keys only"
        )
    if any(name.startswith(("pki/", "signing/")) for name in manifest.files):
        lines.append("private keys are inside: keep it as safe as the server itself")
    return lines
