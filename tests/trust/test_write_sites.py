"""Every place that writes is known, and says how its crash is tested."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import write_sites as sites
from tests.support.write_sites import points, raw_writes
from wire_protocol.durable import DIE_AT

KILLED_IN_A_FLEET = {
    *sites.STARTING,
    *sites.MODELS,
    *sites.RUNNING,
    *sites.WORKING,
    *sites.MEASURING,
    *sites.TRAINING,
}
BY_ITS_PARTS = {
    "server.broker_login": "written before the broker starts; the next start reads old or new",
    "server.broker_config": "written anew at every start of the broker",
    "server.signing_key": "made once by a command, which is given again",
    "server.tokens": "one file, replaced as a whole by an operator's command",
    "server.pki_issued": "one line a record; a torn last line is cut off when it is opened",
    "server.pki_tokens": "the same",
    "server.pki_crl": "replaced as a whole, made again from the list",
    "server.pki_certificate": "replaced as a whole by an operator's command",
    "server.enrolment": "one file a device, replaced as a whole",
    "server.store.expected": "one transaction of an operator's command, which is given again",
    "operator.enrolment_tokens": "an operator's command, given again",
    "operator.inventory": "the same",
    "server.restore": "prepared beside the state in use; a mark tells that places are changed",
    "server.restore.done": "a command, given again; the server refuses to start in between",
    "agent.local": "a round that a person tries out; begun again by hand",
    "agent.authority": "enrolment is a command, which is given again",
    "agent.device_key": "the same",
    "agent.enrolment": "the same",
    "agent.enrolment.done": "the same",
    "agent.first_certificate": "the same",
    "agent.operator_key": "the same",
    "agent.identity": "the same",
    "agent.identity.replaced": "the same",
    "agent.certificate": "replaced as a whole; the old one is still valid",
    "agent.certificate_trial": "a copy to be tried out, thrown away in any case",
    "trainer.benchmark": "the trainer dies, and with it the benchmark that asked",
    "trainer.residual": "lies beside the result until that exists; remade by a round trained again",
    "agent.residual": "one rename of a file that is on the disk; done again if it was not",
}
"""Sites that no fleet test kills, and why the guarantee of the helper is enough for them."""

BY_HAND = {
    "edge_agent.capability.measure_disk": "measures the disk, keeps nothing",
    "edge_agent.doctor_child.first_to_die": "a switch of the kernel",
    "edge_agent.doctor_child.take": "the same",
    "edge_agent.doctor_limit._in_own_group": "the same",
    "edge_agent.enroll._Place.locked": "a lock file",
    "edge_agent.model_cache.set_aside": "takes a name away; what lies there is checked again",
    "edge_agent.onnx_runtime.export": "a model to be timed, thrown away",
    "edge_agent.outbox.Outbox._load": "moves an unreadable file aside",
    "edge_agent.peak_memory.reset_peak": "a switch of the kernel",
    "edge_agent.state_dir.StateDir.locked": "a lock file",
    "edge_agent.status_file.StatusFile.write": "describes a process, which does not survive",
    "edge_agent.trainer.Trainer._start": "the trainer's log",
    "edge_agent.trainer._packages_folder": "links that every start makes right",
    "edge_agent.trainer_child._be_the_one_to_kill": "a switch of the kernel",
    "edge_agent.blobs.BlobClient._fetch_once": "appends to a part whose digest is checked",
    "broker_server.blobs.BlobStore.put": "a part, through write_in_halves and move_into_place",
    "broker_server.blobs.BlobStore.adopt": "a link to a complete blob, then move_into_place",
    "broker_server.blobs.BlobStore.append": "a part, through write_in_halves; digest checked",
    "broker_server.backup.Snapshot.__init__": "a folder for the time of one backup",
    "broker_server.backup._link_or_copy": "the same",
    "broker_server.backup_archive._take": "unpacked beside the state in use, checked, then used",
    "broker_server.restore.restore": "the same",
    "broker_server.restore._build_model": "the same",
    "broker_server.restore._change_places": "an operator's command; the old state is kept aside",
    "broker_server.broker_process.BrokerProcess.start": "pid file and log of a process",
    "broker_server.broker_tls.end_session": "a file for one call of a program",
    "broker_server.dataset_split.write_text": "an operator's command, given again",
    "broker_server.ray_trainers.RayTrainers.__init__": "Ray's own folder during a simulation",
    "broker_server.run_folder._append": "for people; written anew by the next start of the run",
    "broker_server.demo._fresh_folder": "the demo's folder",
    "broker_server.demo_children.Children.start": "a log",
    "broker_server.export.replace_folder": "a folder, through write_in_halves and move_into_place",
    "broker_server.export.put_in_place": "the point aside lies behind it",
    "broker_server.model_export.to_onnx": "an operator's command, given again",
    "broker_server.model_export._fresh_folder": "the same",
    "broker_server.operator_api_client._replacing": "the same",
    "broker_server.model_registry.ModelRegistry._link": "links, then move_into_place",
    "broker_server.pki_folder.locked": "a lock file",
    "broker_server.pki_folder.Journal.append": "the points of Journal lie around it",
    "broker_server.server_state.ServerState.locked": "a lock file",
    "broker_server.store.Store._transaction": "the points of _transaction lie around it",
    "broker_server.tokens.TokenStore._locked": "a lock file",
}
"""Functions that write without ``wire_protocol.durable``, and why they may."""

WRITER = """
import sys
from pathlib import Path
from wire_protocol.durable import move_into_place, remove_file, sync, write_durably
what, target = sys.argv[1], Path(sys.argv[2])
if what == "file":
    write_durably(target, b"new" * 1000, site="test")
elif what == "folder":
    fresh = target.with_name("fresh")
    fresh.mkdir()
    (fresh / "inside").write_bytes(b"new" * 1000)
    sync(fresh)
    move_into_place(fresh, target, site="test")
else:
    remove_file(target, site="test")
"""


def test_every_write_site_says_how_its_crash_is_tested() -> None:
    listed = KILLED_IN_A_FLEET | BY_ITS_PARTS.keys()
    assert points().keys() - listed == set(), "new write sites: list them in this file"
    assert listed - points().keys() == set(), "listed, but not there any more"


def test_every_write_by_hand_says_why_it_is_one() -> None:
    there = {write.place for write in raw_writes()}
    assert there - BY_HAND.keys() == set(), "use wire_protocol.durable, or say here why not"
    assert BY_HAND.keys() - there == set(), "listed, but not there any more"


@pytest.mark.parametrize("step", ["begin", "half", "written", "done"])
def test_a_file_is_old_or_new_wherever_its_writer_dies(tmp_path: Path, step: str) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    assert killed_writer("file", target, step) == -signal.SIGKILL
    assert target.read_bytes() == (b"new" * 1000 if step == "done" else b"old")


@pytest.mark.parametrize("step", ["written", "done"])
def test_a_folder_is_absent_or_whole_wherever_its_writer_dies(tmp_path: Path, step: str) -> None:
    target = tmp_path / "folder"
    assert killed_writer("folder", target, step) == -signal.SIGKILL
    assert target.exists() == (step == "done")
    if step == "done":
        assert (target / "inside").read_bytes() == b"new" * 1000


@pytest.mark.parametrize("step", ["begin", "done"])
def test_a_file_is_there_or_gone_wherever_its_remover_dies(tmp_path: Path, step: str) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    assert killed_writer("remove", target, step) == -signal.SIGKILL
    assert target.exists() == (step == "begin")


def test_without_the_variable_nothing_dies(tmp_path: Path) -> None:
    target = tmp_path / "file"
    assert killed_writer("file", target, "never") == 0
    assert target.read_bytes() == b"new" * 1000
    assert target.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def killed_writer(what: str, target: Path, step: str) -> int:
    """Run one writer in a process of its own that dies at the step; its exit code."""
    environment = {**os.environ, DIE_AT: f"test/{step}"}
    command = [sys.executable, "-c", WRITER, what, str(target)]
    return subprocess.run(command, env=environment, check=False).returncode
