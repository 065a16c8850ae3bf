"""tools/check_dependencies.py finds what it should; its list is kept honest."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from email.message import Message
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools import check_dependencies as check
from tools.known_bad_versions import KNOWN_BAD, KnownBad

BAD = KnownBad("paho-mqtt", "2.2.0", "#914", "https://example.org")
ACCEPTED = KnownBad("torch", "2.6", "CVE-1", "https://example.org", accepted="never unpickled")


@dataclass
class Package:
    """As much of an installed package as is looked at."""

    name: str
    version: str = "1.0"
    licence: dict[str, str] = field(default_factory=lambda: {"License-Expression": "MIT"})

    @property
    def metadata(self) -> Message:
        message = Message()
        for key, value in self.licence.items():
            message[key] = value
        return message


def packages(*given: Package) -> Any:
    return given


def test_a_requirement_needs_a_lower_bound() -> None:
    wanted = [Requirement("a>=1"), Requirement("b"), Requirement("c<3"), Requirement("types-x")]
    assert [line.split()[0] for line in check.unbounded(wanted)] == ["b", "c"]


def test_a_bound_that_admits_a_bad_version_is_a_problem_unless_it_is_accepted() -> None:
    wanted = [Requirement("paho_mqtt>=2.1,<3"), Requirement("torch>=2.1")]
    (line,) = check.bounds_that_admit(wanted, [BAD, ACCEPTED])
    assert "require >=2.2.0" in line
    assert list(check.bounds_that_admit([Requirement("paho-mqtt>=2.2")], [BAD])) == []


def test_an_installed_bad_version_is_a_problem() -> None:
    found = check.installed_versions(
        packages(Package("Paho_MQTT", "2.1.0"), Package("torch", "2.1.0")), [BAD, ACCEPTED]
    )
    assert [line.split()[:2] for line in found] == [["Paho_MQTT", "2.1.0"]]
    assert list(check.installed_versions(packages(Package("paho-mqtt", "2.2.1")), [BAD])) == []


@pytest.mark.parametrize(
    ("licence", "fine"),
    [
        ({"License-Expression": "Apache-2.0 OR BSD-3-Clause"}, True),
        ({"License": "BSD 3-Clause\n\nlong text"}, True),
        ({"Classifier": "License :: OSI Approved :: MIT License"}, True),
        ({"License": "AGPL-3.0"}, False),
        ({"Classifier": "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"}, False),
        ({"License": "all rights reserved"}, False),
        ({}, False),
    ],
)
def test_a_licence_is_known_and_free_or_somebody_must_look(
    licence: dict[str, str], fine: bool
) -> None:
    problems = list(check.licences(packages(Package("x", licence=licence))))
    assert (problems == []) == fine


def test_every_entry_of_the_list_has_a_source_and_a_version() -> None:
    for entry in KNOWN_BAD:
        assert entry.source.startswith("https://")
        assert entry.package == canonicalize_name(entry.package)
        assert Version(entry.fixed)
    assert len({entry.package for entry in KNOWN_BAD}) == len(KNOWN_BAD)


def program(folder: Path, body: str) -> Path:
    """A stand-in for pip-audit: its service is a third party that tests cannot have."""
    path = folder / "pip-audit"
    path.write_text(f"#!{sys.executable}\nimport sys, json, pathlib\n{body}\n")
    path.chmod(0o755)
    return path


def test_an_audit_service_that_knows_nothing_is_not_taken_for_good_news(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped = {"dependencies": [{"name": "jinja2", "skip_reason": "not found"}], "fixes": []}
    program(tmp_path, f"print(json.dumps({skipped!r}))")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    asked, found = check.audit()
    assert "does not answer" in asked
    assert found == []


def test_a_vulnerability_that_the_audit_finds_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(
        tmp_path,
        "names = pathlib.Path(sys.argv[2]).read_text().split()\n"
        "vuln = {'id': 'PYSEC-1', 'aliases': ['CVE-2099-1'], 'fix_versions': ['9.9']}\n"
        "print(json.dumps({'dependencies': [{'name': names[0].split('==')[0],"
        " 'version': names[0].split('==')[1], 'vulns': [vuln]}]}))",
    )
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    asked, (line,) = check.audit()
    assert asked.startswith(f"asked about {len(list(distributions()))} packages")
    assert "CVE-2099-1, fixed in 9.9" in line


def test_without_pip_audit_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not installed" in check.audit()[0]


def test_this_project_passes() -> None:
    requirements = list(check.project_requirements(check.read_project(check.PROJECT)))
    assert list(check.unbounded(requirements)) == []
    assert list(check.bounds_that_admit(requirements, KNOWN_BAD)) == []
    assert list(check.installed_versions(distributions(), KNOWN_BAD)) == []
