"""Trains the assignments of a simulated round on a Ray cluster.

The only module that imports Ray, an optional extra. Every worker holds a base model and reads it
and the training file under the paths that they have here: on several machines, a shared folder.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typing_extensions import Self

from broker_server.simulated_training import TrainedUpdate, TrainingData, VirtualAssignment
from broker_server.simulation_trainers import Trainers, WillingTrainer
from wire_protocol.errors import ConfigError, DeviceError, FailureCode, Unavailable, one_line

_CONNECT_TIMEOUT_S = 10.0


def ray_engine(*, count: int, address: str | None = None) -> Callable[[TrainingData], Trainers]:
    """Whoever can hire trainers on a Ray cluster.

    Args:
        count: trainers; each holds a base model.
        address: of a cluster that runs (host:port); None starts one on this machine.

    Raises:
        ConfigError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise ConfigError("engine ray needs Ray: pip install 'legend-edge[ray]', or leave it out")
    return lambda data: RayTrainers(data, count=count, address=address)


class RayTrainers:
    """Trainers on the nodes of a Ray cluster; whoever is free takes the next assignment.

    Args:
        data: what to train on.
        count: trainers, spread over the nodes; each takes ``data.threads`` CPUs.
        address: of the cluster; None starts one on this machine.

    Raises:
        ConfigError: the cluster has fewer CPUs than the trainers need.
        Unavailable: there is no cluster at this address.
    """

    def __init__(self, data: TrainingData, *, count: int, address: str | None = None) -> None:
        # Before the import: Ray would tell its makers about every start.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray  # noqa: PLC0415 - an optional extra, and it takes a second

        self._ray: Any = ray
        # Sockets are in it, and their paths must be short.
        self._folder = None if address else Path(tempfile.mkdtemp(prefix="legend-ray-"))
        try:
            self._connect(address, cpus=count * data.threads)
            self._require_cpus(count, data.threads)
            worker = ray.remote(num_cpus=data.threads, scheduling_strategy="SPREAD")(WillingTrainer)
            self._workers = [worker.remote(data) for _ in range(count)]
        except BaseException:
            self.__exit__()
            raise

    def train(self, assignments: Sequence[VirtualAssignment]) -> list[TrainedUpdate]:
        """See ``Trainers``."""
        from ray.util import ActorPool  # noqa: PLC0415 - an optional extra

        pool = ActorPool(self._workers)
        try:
            # In the order of the assignments, whoever was faster.
            answers: list[TrainedUpdate | str] = list(pool.map(_asked, list(assignments)))
        except self._ray.exceptions.RayError as error:
            first_line = one_line(str(error).partition("\n")[0])
            line = (
                f"a trainer on the Ray cluster was lost: {first_line}; use fewer if memory ran out"
            )
            raise DeviceError(FailureCode.TRAINER_DIED, line) from error
        for answer in answers:
            if isinstance(answer, str):
                raise DeviceError(FailureCode.INTERNAL, answer)
        return [answer for answer in answers if isinstance(answer, TrainedUpdate)]

    def _connect(self, address: str | None, *, cpus: int) -> None:
        own = {"num_cpus": cpus, "_temp_dir": str(self._folder), "include_dashboard": False}
        try:
            if address is not None:
                _require_listener(address)
            self._ray.init(
                address or "local",
                **({} if address else own),
                log_to_driver=False,
                logging_level="error",
            )
        except (OSError, RuntimeError, ValueError) as error:
            line = (
                f"no Ray cluster at {address}: {one_line(error)}; start one with ray start --head"
            )
            raise Unavailable(line) from error

    def _require_cpus(self, count: int, threads: int) -> None:
        # Ray would wait for ever for the ones that are missing.
        cpus = int(self._ray.cluster_resources().get("CPU", 0))
        if cpus < count * threads:
            raise ConfigError(
                f"the Ray cluster has {cpus} CPUs, too few for {count} workers with {threads}"
                f" threads; use at most {cpus // threads} workers"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _require_listener(address: str) -> None:
    """Ask at the door: Ray itself would knock for minutes.

    Raises:
        OSError: nobody listens there.
        ValueError: the address has no port.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S):
        pass


def _asked(worker: Any, assignment: VirtualAssignment) -> Any:
    return worker.train.remote(assignment)
