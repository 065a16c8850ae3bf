"""What a person writes to simulate a run: an experiment is a settings file.

The keys of a run (see ``run_spec``) and those that a live fleet answers by
being there: which devices, whose data, who drops out. Knows files; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker_server.attackers import Attackers
from broker_server.run_spec import (
    HeldOut,
    LocalEvaluation,
    Name,
    RunOptions,
    RunSpec,
    StoredEvaluation,
    apply_override,
    read_yaml,
)
from profiles.errors import ProfileError
from profiles.loader import load_fleet
from profiles.schema import FleetProfile
from wire_protocol.errors import ConfigError
from wire_protocol.settings import explain

Share = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PartitionSettings(_Strict):
    """How the training file is split over the devices; see ``partition``."""

    alpha: float = Field(default=1.0, gt=0)
    quantity_alpha: float | None = Field(default=None, gt=0)
    minimum: int = Field(default=1, ge=1)


class Availability(_Strict):
    """Who is there.

    Attributes:
        dropout: share of assignments whose device is lost in mid-round; it is
            back for the next round.
        absent: share of the fleet that is away; redrawn every ``absent_rounds``.
        hot: share of the fleet that is too hot for full speed; redrawn every
            ``hot_rounds``.
        hot_speed: what is left of their speed.
    """

    dropout: Share = 0.0
    absent: Share = 0.0
    absent_rounds: int = Field(default=5, ge=1)
    hot: Share = 0.0
    hot_rounds: int = Field(default=3, ge=1)
    hot_speed: float = Field(default=0.5, gt=0, le=1)


class SimulationSpec(RunOptions):
    """One simulated run.

    Attributes:
        method: what comparisons call it; default: the strategy's name.
        model: folder of a base model, or a Python package that contains one.
        fleet: name of a fleet profile, or its YAML file.
        train: labelled file that is split over the devices.
        evaluation: held-out file of the reported quality.
        validation: held-out file for every decision (targets, selection);
            default: the evaluation file.
        validation_examples: evenly spaced ones of the validation file that are
            used; None for all of them.
        test_every: the evaluation file is scored after every so many rounds and
            after the last; only where there is a validation file.
        attackers: devices that send something else than what they learned.
        link_jitter: replaces the jitter of the profile's links.
        link_scale: every link has this many times the profile's bandwidth.
        work_scale: the arithmetic of a token is this many times the model's own: the
            clock, not the memory, of a larger model or of longer texts.
        threads: of torch's arithmetic; the last digits may depend on it.
    """

    method: Name | None = None
    model: Annotated[str, Field(min_length=1)]
    dataset: Name = "train"
    fleet: Annotated[str, Field(min_length=1)]
    train: LocalEvaluation
    evaluation: LocalEvaluation
    validation: LocalEvaluation | None = None
    validation_examples: int | None = Field(default=None, ge=1)
    test_every: int = Field(default=1, ge=1)
    partition: PartitionSettings = PartitionSettings()
    availability: Availability = Availability()
    attackers: Attackers | None = None
    link_jitter: Share | None = None
    link_scale: float = Field(default=1.0, gt=0, le=1e6)
    work_scale: float = Field(default=1.0, gt=0, le=1e6)
    threads: int = Field(default=1, ge=1, le=256)

    @property
    def method_name(self) -> str:
        """What comparisons call this run."""
        return self.method or self.strategy

    @property
    def model_name(self) -> str:
        """The base model for people."""
        return Path(self.model).name[:80]

    def fleet_profile(self) -> FleetProfile:
        """The devices to simulate.

        Raises:
            ConfigError: no such fleet, or its file is wrong.
        """
        try:
            return load_fleet(self.fleet)
        except ProfileError as error:
            raise ConfigError(str(error)) from error

    def run_spec(self, held_out: HeldOut, stored: StoredEvaluation) -> RunSpec:
        """The same run as the live server would accept it."""
        labels = self.labels or (held_out.labels if self.task == "classification" else ())
        changed = {"labels": labels, "model": self.model_name, "evaluation": stored}
        rest = self.model_dump(include=set(RunOptions.model_fields) - set(changed))
        return RunSpec(**rest, **changed)


def load_simulation_spec(path: Path, overrides: Sequence[str] = ()) -> SimulationSpec:
    """Read a simulation file and apply ``key=value`` overrides to it.

    Args:
        path: a YAML file; relative paths in it begin at its folder, and
            without a ``name`` the run is called like the file.
        overrides: values are YAML; dots reach inside (``partition.alpha=0.1``).

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, missing
            or has a bad value, or the base model is not there.
    """
    document = read_yaml(path)
    document.setdefault("name", path.stem)
    for override in overrides:
        apply_override(document, override)
    _anchor(document, path.parent)
    return parse_simulation_spec(document, place=str(path))


def parse_simulation_spec(document: dict[str, Any], *, place: str) -> SimulationSpec:
    """Check the keys of a simulation.

    Args:
        document: what the file held, its paths resolved.
        place: the file's name, for messages.

    Raises:
        ConfigError: a key is unknown, missing or has a bad value; one line.
    """
    try:
        return SimulationSpec.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{place}: {explain(error, SimulationSpec)}") from error


def find_base_model(name: str) -> Path:
    """The folder of a base model.

    Args:
        name: a folder, or the name of an installed package whose ``model``
            folder holds one.

    Raises:
        ConfigError: neither is there.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    package = name.replace("-", "_")
    found = find_spec(package) if package.isidentifier() else None
    if found is not None and found.origin is not None:
        packaged = Path(found.origin).with_name("model")
        if (packaged / "config.json").is_file():
            return packaged
    raise ConfigError(f"model: {name!r} is neither a base model's folder nor a package with one")


def _anchor(document: dict[str, Any], folder: Path) -> None:
    """Make paths that the file gives relative to itself absolute."""
    for key in ("train", "evaluation", "validation"):
        section = document.get(key)
        if isinstance(section, dict) and isinstance(section.get("path"), str):
            local = Path(section["path"]).expanduser()
            document[key] = {**section, "path": str((folder / local).absolute())}
    fleet = document.get("fleet")
    if isinstance(fleet, str) and fleet.endswith((".yaml", ".yml")):
        document["fleet"] = str((folder / fleet).absolute())
    model = document.get("model")
    if isinstance(model, str) and (folder / Path(model).expanduser()).is_dir():
        document["model"] = str((folder / Path(model).expanduser()).absolute())
