"""Check what this project depends on: bounds, bad versions, licences; fails on a problem.

    python tools/check_dependencies.py

Needs no network. Where pip-audit is installed and its vulnerability service really answers, that is
asked too; whether it was is always said. (Behind a mirror without advisories pip-audit finds
nothing and calls it a success, so it is asked about a package that is known to be bad first.)
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.known_bad_versions import KNOWN_BAD, LICENCE_EXCEPTIONS, KnownBad

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
CANARY = ("jinja2", "2.4.1")
"""Has had advisories for ten years: an answer without any is none."""

_FREE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|MPL|Mozilla Public License|Zlib|"
    r"Unlicense|HPND|EPL-2\.0 OR BSD)",
    re.IGNORECASE,
)
_COPYLEFT = re.compile(r"\bA?GPL|Affero|GNU General Public", re.IGNORECASE)
_AUDIT_S = 300


def main() -> int:
    """Run every check; 1 when there is a problem."""
    requirements = list(project_requirements(read_project(PROJECT)))
    installed = list(distributions())
    problems = [
        *unbounded(requirements),
        *bounds_that_admit(requirements, KNOWN_BAD),
        *installed_versions(installed, KNOWN_BAD),
        *licences(installed),
    ]
    sys.stdout.write(
        f"{len(requirements)} requirements and {len(installed)} installed packages checked "
        f"against {len(KNOWN_BAD)} known problems\n"
    )
    asked, found = audit()
    sys.stdout.write(f"pip-audit: {asked}\n")
    problems += found
    for problem in problems:
        sys.stdout.write(f"problem: {problem}\n")
    return 1 if problems else 0


def read_project(path: Path) -> dict[str, Any]:
    """Read pyproject.toml, on Python 3.10 too."""
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
    content: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    return content


def project_requirements(project: dict[str, Any]) -> Iterator[Requirement]:
    """Every requirement of the project and its extras, without itself."""
    own = canonicalize_name(project["project"]["name"])
    groups = [project["project"]["dependencies"]]
    groups += project["project"].get("optional-dependencies", {}).values()
    for group in groups:
        for text in group:
            requirement = Requirement(text)
            if canonicalize_name(requirement.name) != own:
                yield requirement


def unbounded(requirements: Iterable[Requirement]) -> Iterator[str]:
    """Requirements that any old version would fulfil; stubs for the type checker may."""
    for requirement in requirements:
        bounded = any(one.operator in (">=", "==", "~=", ">") for one in requirement.specifier)
        if not bounded and not requirement.name.startswith("types-"):
            yield f"{requirement.name} has no lower bound in pyproject.toml"


def bounds_that_admit(
    requirements: Iterable[Requirement], bad: Iterable[KnownBad]
) -> Iterator[str]:
    """Requirements that a version with a known problem would fulfil, and that is not accepted."""
    by_name = {one.package: one for one in bad if not one.accepted}
    for requirement in requirements:
        known = by_name.get(canonicalize_name(requirement.name))
        bounds = [
            Version(one.version) for one in requirement.specifier if one.operator in (">=", "==")
        ]
        if known and bounds and max(bounds) < Version(known.fixed):
            yield f"{requirement} admits {known.problem}; require >={known.fixed} ({known.source})"


def installed_versions(installed: Iterable[Distribution], bad: Iterable[KnownBad]) -> Iterator[str]:
    """Installed packages with a known problem that is not accepted."""
    by_name = {one.package: one for one in bad if not one.accepted}
    for package in installed:
        known = by_name.get(canonicalize_name(package.name))
        if known and Version(package.version) < Version(known.fixed):
            found = f"{package.name} {package.version}"
            yield f"{found} has {known.problem}; install >={known.fixed} ({known.source})"


def licences(installed: Iterable[Distribution]) -> Iterator[str]:
    """Packages whose licence is unknown, or none that we can ship with."""
    for package in installed:
        name = canonicalize_name(package.name)
        words = licence_of(package)
        if name in LICENCE_EXCEPTIONS or (_FREE.search(words) and not _COPYLEFT.search(words)):
            continue
        shown = words[:80] or "no licence named"
        yield f"{package.name}: {shown}; look at it, then add it to tools/known_bad_versions.py"


def licence_of(package: Distribution) -> str:
    """What a package says about its licence, in one line."""
    about = package.metadata
    marked = [
        text.rpartition("::")[2].strip()
        for text in about.get_all("Classifier") or []
        if text.startswith("License ::")
    ]
    # Some packages put the whole text into the field: its first line names it.
    first_lines = [text.strip().partition("\n")[0] for text in about.get_all("License") or []]
    return " ".join([*(about.get_all("License-Expression") or []), *first_lines, *marked])


def audit() -> tuple[str, list[str]]:
    """Ask pip-audit, if it is there and its service knows what it should know.

    Returns:
        What was done, and the problems found.
    """
    program = Path(sys.executable).with_name("pip-audit")
    command = str(program) if program.exists() else shutil.which("pip-audit")
    if command is None:
        return "not asked: it is not installed (pip install pip-audit)", []
    canary = _ask(command, [f"{CANARY[0]}=={CANARY[1]}"])
    if not canary:
        return "not asked: its vulnerability service does not answer here", []
    pins = sorted(f"{one.name}=={one.version.partition('+')[0]}" for one in distributions())
    accepted = " ".join(one.problem for one in KNOWN_BAD if one.accepted)
    found = [line for name, line in _ask(command, pins) if name not in accepted]
    return f"asked about {len(pins)} packages, {len(found)} problems", found


def _ask(command: str, pins: list[str]) -> list[tuple[str, str]]:
    """(id, line) of every vulnerability of these packages; empty when nothing answers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("\n".join(pins) + "\n", encoding="utf-8")
        arguments = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json"]
        try:
            done = subprocess.run(
                [command, "-r", str(file), *arguments],
                capture_output=True,
                text=True,
                check=False,
                timeout=_AUDIT_S,
            )
            answer = json.loads(done.stdout)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return []
    found = []
    for package in answer["dependencies"]:
        for one in package.get("vulns", []):
            name = next((text for text in one["aliases"] if text.startswith("CVE")), one["id"])
            fixed = ", ".join(one["fix_versions"]) or "no version yet"
            line = f"{package['name']} {package['version']}: {name}, fixed in {fixed}"
            found.append((name, line))
    return found


if __name__ == "__main__":
    sys.exit(main())
