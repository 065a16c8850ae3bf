"""A simulation is a settings file: what is read, resolved and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_server.simulation_spec import find_base_model, load_simulation_spec
from tests.support.simulations import write_simulation
from wire_protocol.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_simulation(tmp_path / "experiment", tmp_path / "model")


def test_paths_begin_at_the_file_and_the_name_is_the_file_s(path: Path) -> None:
    spec = load_simulation_spec(path)
    assert spec.train.path == path.parent / "train.tsv"
    assert spec.fleet_profile().device_count == 6
    assert (spec.name, spec.method_name) == ("spec", "legend-paper")


def test_overrides_reach_inside(path: Path) -> None:
    spec = load_simulation_spec(
        path, ["partition.alpha=0.1", "availability.dropout=0.2", "method=mine", "seed=7"]
    )
    assert spec.partition.alpha == 0.1
    assert spec.availability.dropout == 0.2
    assert (spec.method_name, spec.seed) == ("mine", 7)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("availability.dropuot=0.1", "dropout"),
        ("partition.alpha=0", "partition.alpha"),
        ("availability.dropout=1", "availability.dropout"),
        ("quorum=2", "quorum"),
    ],
)
def test_what_is_wrong_is_named(path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_simulation_spec(path, [override])
    assert "\n" not in str(error.value)


def test_an_unknown_fleet_is_named_with_what_there_is(path: Path) -> None:
    spec = load_simulation_spec(path, ["fleet=papr80"])
    with pytest.raises(ConfigError, match="paper80"):
        spec.fleet_profile()


def test_a_base_model_is_a_folder_or_a_package_with_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert find_base_model(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match="neither"):
        find_base_model("no-such-package-of-models")
