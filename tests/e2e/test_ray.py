"""A simulation on a Ray cluster of two nodes finds what one process finds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from broker_server.run_state import RunStatus
from tests.support.simulations import specification, write_simulation
from wire_protocol.errors import ConfigError, Unavailable

pytestmark = [pytest.mark.e2e, pytest.mark.train, pytest.mark.timeout(900)]

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed: pip install 'legend-edge[ray]'"
)
FIGURES = ("metrics.jsonl", "assignments.jsonl", "summary.json", "checkpoint.json")


@pytest.fixture(scope="module")
def spec_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny_models import make_base_model  # noqa: PLC0415 - imports torch

    model_dir = make_base_model(tmp_path_factory.mktemp("model"), "bert")
    return write_simulation(tmp_path_factory.mktemp("experiment"), model_dir)


@pytest.fixture(scope="module")
def cluster_address(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[str]:
    """Two nodes of one CPU each on loopback."""
    monkeypatch_module.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster  # noqa: PLC0415 - an optional extra

    # Not pytest's folder: the paths of Ray's sockets would be too long.
    folder = tempfile.mkdtemp(prefix="ray-test-")
    # Where Ray notes the address of its newest cluster, in a folder that must be there.
    monkeypatch_module.setenv("RAY_TMPDIR", folder)
    Path(folder, "ray").mkdir()
    node: dict[str, Any] = {
        "num_cpus": 1,
        "object_store_memory": 80 * 2**20,
        "include_dashboard": False,
        "temp_dir": folder,
    }
    cluster: Any = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        cluster.wait_for_nodes(timeout=300)
        yield cluster.address
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@needs_ray
def test_two_nodes_find_what_one_process_and_two_processes_find(
    spec_path: Path, tmp_path: Path, cluster_address: str
) -> None:
    from broker_server.ray_trainers import ray_engine  # noqa: PLC0415 - imports torch
    from broker_server.simulate import simulate  # noqa: PLC0415 - imports torch

    run = partial(simulate, specification(spec_path), pictures=False)
    assert run(tmp_path / "one").status is RunStatus.FINISHED
    run(tmp_path / "two", processes=2)
    # A node has one CPU and a trainer takes one: there is one on each node.
    run(tmp_path / "ray", engine=ray_engine(count=2, address=cluster_address))
    for name in FIGURES:
        expected = (tmp_path / "one" / name).read_bytes()
        assert (tmp_path / "two" / name).read_bytes() == expected, name
        assert (tmp_path / "ray" / name).read_bytes() == expected, name


@needs_ray
def test_more_workers_than_the_cluster_has_cpus_are_refused_and_not_waited_for(
    spec_path: Path, tmp_path: Path, cluster_address: str
) -> None:
    from broker_server.ray_trainers import ray_engine  # noqa: PLC0415 - imports torch
    from broker_server.simulate import simulate  # noqa: PLC0415 - imports torch

    engine = ray_engine(count=3, address=cluster_address)
    with pytest.raises(ConfigError, match="at most 2 workers"):
        simulate(specification(spec_path), tmp_path / "many", engine=engine)


@needs_ray
def test_a_cluster_of_its_own_leaves_nothing_behind(spec_path: Path, tmp_path: Path) -> None:
    from broker_server.operator_cli import main as legend  # noqa: PLC0415 - as the command does

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", tempfile.mkdtemp(prefix="r-"))
        folder = Path(tempfile.gettempdir())
        command = ["simulate", str(spec_path), "--engine", "ray", "--out", str(tmp_path / "own")]
        done = CliRunner().invoke(legend, command)
        assert done.exit_code == 0, done.output
        assert [path.name for path in folder.iterdir() if path.name.startswith("legend-ray")] == []
    shutil.rmtree(folder)


@needs_ray
def test_a_cluster_that_is_not_there_is_one_line(spec_path: Path, tmp_path: Path) -> None:
    from broker_server.ray_trainers import ray_engine  # noqa: PLC0415 - imports torch
    from broker_server.simulate import simulate  # noqa: PLC0415 - imports torch

    engine = ray_engine(count=1, address="127.0.0.1:1")
    with pytest.raises(Unavailable, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        simulate(specification(spec_path), tmp_path / "none", engine=engine)


def test_without_ray_the_command_says_what_to_install(
    spec_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from broker_server import ray_trainers  # noqa: PLC0415 - imports torch
    from broker_server.operator_cli import main as legend  # noqa: PLC0415 - as the command does

    monkeypatch.setattr(ray_trainers, "find_spec", lambda _name: None)
    out = str(tmp_path / "none")
    done = CliRunner().invoke(legend, ["simulate", str(spec_path), "--engine", "ray", "--out", out])
    assert done.exit_code == ConfigError.exit_code
    assert done.stderr.splitlines() == [
        "error: engine ray needs Ray: pip install 'legend-edge[ray]', or leave it out"
    ]


def test_an_address_without_the_engine_is_refused(spec_path: Path) -> None:
    from broker_server.operator_cli import main as legend  # noqa: PLC0415 - as the command does

    done = CliRunner().invoke(legend, ["simulate", str(spec_path), "--address", "127.0.0.1:6379"])
    assert done.exit_code != 0
    assert "--address belongs to --engine ray" in done.stderr
