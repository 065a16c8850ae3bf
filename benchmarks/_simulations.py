"""Runs the simulations that a comparison needs, or goes on where it was interrupted."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks._experiment import full_experiment, quick_experiment
from benchmarks._methods import settings_of
from broker_server.base_model import read_base_model
from broker_server.compare import SimulatedRun
from broker_server.simulate import simulate
from broker_server.simulation_spec import find_base_model, parse_simulation_spec
from wire_protocol.errors import LegendError

LEAST_GAIN = 0.05
"""Accuracy that a target must lie above that of the untrained adapter."""


def simulate_all(options: argparse.Namespace) -> tuple[list[Path], dict[str, str]]:
    """Simulate every method with every seed.

    Args:
        options: see ``arguments``; ``out`` is filled in where it is not given.

    Returns:
        Folders of the runs with results, and why the others have none.
    """
    options.out = options.out or Path(tempfile.mkdtemp(prefix="simulated-"))
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.out
    base = quick_experiment(folder) if options.quick else full_experiment(options.data, folder)
    base["rounds"] = options.rounds or (8 if options.quick else 100)
    if options.work_scale is not None:
        base["work_scale"] = options.work_scale
    layer_count = read_base_model(find_base_model(base["model"])).shape.layer_count
    finished: list[Path] = []
    failed: dict[str, str] = {}
    for seed in range(options.seeds or (1 if options.quick else 3)):
        for method in options.methods:
            out = folder / f"{method}-{seed}"
            settings = settings_of(method, layer_count)
            run = {**base, "name": out.name, "method": method, "seed": seed, **settings}
            try:
                state = simulate(
                    parse_simulation_spec(run, place=out.name),
                    out,
                    processes=options.workers,
                    pictures=not options.quick,
                    prefix_dir=folder / "prefix",
                )
            except LegendError as error:
                failed[out.name] = str(error)
                continue
            print(f"{out.name}: {state.status.value}, {state.reason}", file=sys.stderr, flush=True)
            if state.rounds:
                finished.append(out)
            else:
                failed[out.name] = state.reason
    if not finished:
        sys.exit(f"no method could be simulated: {failed}")
    return finished, failed


def has_learned(runs: Sequence[SimulatedRun], target: float) -> bool:
    """Whether a target means anything; time to an untrained accuracy is noise."""
    untrained = max(float(run.lines[0]["accuracy"]) for run in runs)
    return target >= untrained + LEAST_GAIN


def arguments(description: str, methods: Sequence[str]) -> argparse.Namespace:
    """The command line of a comparison.

    Args:
        description: the script's docstring.
        methods: that it compares by default.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny model, generated data")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data/sst2_sent"), help="train, dev, test.tsv"
    )
    parser.add_argument("--seeds", type=int, help="default: 3; quick: 1")
    parser.add_argument("--rounds", type=int, help="default: 100; quick: 8")
    parser.add_argument("--workers", type=int, default=1, help="processes that train")
    parser.add_argument(
        "--work-scale",
        type=float,
        help="arithmetic of a step times this: the clock of a larger model or of longer texts",
    )
    parser.add_argument(
        "--methods",
        type=_names,
        default=tuple(methods),
        help=f"comma-separated, NAME+parts for one with our codecs and cache; default: "
        f"{','.join(methods)}",
    )
    return parser.parse_args()


def _names(text: str) -> tuple[str, ...]:
    """Methods of the command line; ends the program at one that does not exist."""
    names = tuple(text.split(","))
    for name in names:
        try:
            settings_of(name, layer_count=1)
        except KeyError as error:
            raise argparse.ArgumentTypeError(
                f"no method {name!r}; there are {error.args[0]}"
            ) from error
    return names
