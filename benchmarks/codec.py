"""What the codecs save, cost and lose.

    python benchmarks/codec.py [--quick] [--json FILE] [--data DIR] [--seeds N] [--rounds N]
        [--devices N] [--steps N] [--scored N] [--codecs fp16,int8,int4] [--workers N] [--out DIR]

Speed: an update of BERT-large (3.1 MB in float32) is written and read by every codec in turn.
Quality and bytes: the same simulated run with every codec and seed, FedLoRA with equal ranks, so
that nothing differs but the codec; devices add what a coarse codec left out to their next update,
as live ones do. Accuracy is the mean of the last rounds (at most five) on DIR/test.tsv.

``bytes_ratio_X`` is what the updates of a run took with codec X, framing included, over what they
took in float32. ``accuracy_delta_X`` is in points, X minus float32, mean over paired seeds; null
where float32 itself learned nothing.
The full run trains all-MiniLM-L6-v2 on DIR (train.tsv, test.tsv); hours on two cores. --quick
trains a small random model on generated log lines: it shows that everything works, and the bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._experiment import FULL, quick_experiment
from benchmarks._machine import load, machine
from benchmarks.aggregate import an_update
from broker_server.compare import read_run
from broker_server.simulate import simulate
from broker_server.simulation_spec import parse_simulation_spec
from wire_protocol.lora import Codec
from wire_protocol.tensors import decode, encode

LAST_ROUNDS = 5
RANK = 8
LEAST_GAIN = 0.05
"""Accuracy over the untrained adapter's below which differences between codecs are noise."""

Row = dict[str, Any]


def main() -> int:
    """Measure, print and, if asked, write JSON."""
    options = arguments()
    codecs = [Codec.FP32, *(Codec(name) for name in options.codecs if name != "fp32")]
    folder = options.out or Path(tempfile.mkdtemp(prefix="codec-"))
    folder.mkdir(parents=True, exist_ok=True)
    base = quick_experiment(folder) if options.quick else experiment_on(options.data)
    base |= {
        key: value
        for key, value in (
            ("devices_per_round", options.devices),
            ("local_steps", options.steps),
            ("validation_examples", options.scored),
        )
        if value
    }
    if options.scored:
        # As the file that decides, of which a part is enough; nothing is decided here.
        base |= {"validation": base["evaluation"], "test_every": options.rounds}
    speeds = speed_rows(codecs, repeats=3 if options.quick else 9)
    runs = [
        run_row(base, codec, seed, options, folder)
        for seed in range(options.seeds)
        for codec in codecs
    ]
    result = {
        "benchmark": "codec",
        "quick": options.quick,
        "machine": machine(),
        "data": "generated" if options.quick else str(options.data),
        "rows": [*speeds, *runs],
        "summary": summary(speeds, runs),
    }
    Console(width=110).print(table(result["summary"], speeds, caption=result["machine"]))
    Console(width=110).print_json(data=result["summary"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def experiment_on(data: Path) -> Row:
    """MiniLM on a folder of labelled files.

    Raises:
        SystemExit: a file is missing.
    """
    for name in ("train", "test"):
        if not (data / f"{name}.tsv").is_file():
            sys.exit(f"{data} has no {name}.tsv; give a folder of train and test with --data")
    return {
        **FULL,
        "train": {"path": str((data / "train.tsv").absolute())},
        "evaluation": {"path": str((data / "test.tsv").absolute())},
    }


def speed_rows(codecs: Sequence[Codec], *, repeats: int) -> list[Row]:
    """Megabytes of float32 a second, written and read; codecs take turns."""
    update = decode(an_update(0))
    plain = sum(tensor.nbytes for tensor in update.values())
    written: dict[Codec, list[float]] = {codec: [] for codec in codecs}
    read: dict[Codec, list[float]] = {codec: [] for codec in codecs}
    sizes = {}
    for _ in range(repeats):
        for codec in codecs:
            encode_s, data = timed(lambda codec=codec: encode(update, codec))  # type: ignore[misc]
            decode_s, _ = timed(lambda data=data: decode(data))  # type: ignore[misc]
            written[codec].append(encode_s)
            read[codec].append(decode_s)
            sizes[codec] = len(data)
    return [
        {
            "part": "speed",
            "codec": codec.value,
            "encode_mb_s": plain / 1e6 / statistics.median(written[codec]),
            "decode_mb_s": plain / 1e6 / statistics.median(read[codec]),
            "random_bytes_ratio": sizes[codec] / sizes[Codec.FP32],
            "load": load(),
        }
        for codec in codecs
    ]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


def run_row(base: Row, codec: Codec, seed: int, options: argparse.Namespace, folder: Path) -> Row:
    """One simulated run; goes on where it was interrupted."""
    out = folder / f"{codec.value}-{seed}"
    document = {
        **base,
        "name": out.name,
        "strategy": "fedlora",
        "strategy_options": {"rank": RANK},
        "codec": codec.value,
        "seed": seed,
        "rounds": options.rounds,
    }
    spec = parse_simulation_spec(document, place=out.name)
    state = simulate(spec, out, processes=options.workers, pictures=False, prefix_dir=folder / "p")
    lines = read_run(out).lines
    last = [float(line["accuracy"]) for line in lines[1:]][-LAST_ROUNDS:]
    if len(lines) != options.rounds + 1:
        sys.exit(f"{out.name} ended after {len(lines) - 1} rounds: {state.reason}")
    row = {
        "part": "run",
        "codec": codec.value,
        "seed": seed,
        "accuracy": statistics.mean(last),
        "untrained": float(lines[0]["accuracy"]),
        "bytes_up": sum(int(line["bytes_up"]) for line in lines[1:]),
        "virtual_s": sum(float(line["duration_s"]) for line in lines[1:]),
        "load": load(),
    }
    print(f"{out.name}: accuracy {row['accuracy']:.4f}", file=sys.stderr, flush=True)
    return row


def summary(speeds: Sequence[Row], runs: Sequence[Row]) -> Row:
    """The figures that a claim would quote, paired by seed."""
    exact = {row["seed"]: row for row in runs if row["codec"] == "fp32"}
    trained = statistics.mean(row["accuracy"] for row in exact.values())
    untrained = statistics.mean(row["untrained"] for row in exact.values())
    learned = trained >= untrained + LEAST_GAIN
    found: Row = {
        "accuracy_fp32": trained,
        "untrained": untrained,
        "learned": learned,
        "seeds": len(exact),
    }
    for speed in speeds:
        codec = speed["codec"]
        if codec == "fp32":
            continue
        pairs = [(row, exact[row["seed"]]) for row in runs if row["codec"] == codec]
        deltas = [100 * (row["accuracy"] - base["accuracy"]) for row, base in pairs]
        ratios = [row["bytes_up"] / base["bytes_up"] for row, base in pairs]
        found |= {
            f"bytes_ratio_{codec}": statistics.mean(ratios),
            f"accuracy_delta_{codec}": statistics.mean(deltas) if learned else None,
            f"accuracy_deltas_{codec}": deltas,
            f"time_ratio_{codec}": statistics.mean(
                row["virtual_s"] / base["virtual_s"] for row, base in pairs
            ),
        }
    return found


def table(found: Row, speeds: Sequence[Row], *, caption: str) -> Table:
    """For people."""
    made = Table(title="Codecs of updates", caption=caption)
    for name in ("codec", "bytes / fp32", "encode MB/s", "decode MB/s", "accuracy, points"):
        made.add_column(name, justify="left" if name == "codec" else "right")
    for speed in speeds:
        codec = speed["codec"]
        delta = found.get(f"accuracy_delta_{codec}")
        made.add_row(
            codec,
            f"{found.get(f'bytes_ratio_{codec}', 1.0):.3f}",
            f"{speed['encode_mb_s']:.0f}",
            f"{speed['decode_mb_s']:.0f}",
            f"{100 * found['accuracy_fp32']:.2f}" if codec == "fp32" else points(delta),
        )
    return made


def points(delta: float | None) -> str:
    """A difference in points, if there is one to speak of."""
    return "nothing learned" if delta is None else f"{delta:+.2f}"


def arguments() -> argparse.Namespace:
    """The command line, with what --quick means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny model, generated data")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2_sent"))
    parser.add_argument("--seeds", type=int, help="default: 3; quick: 1")
    parser.add_argument("--rounds", type=int, help="default: 40; quick: 6")
    parser.add_argument("--devices", type=int, help="of a round; default: 10; quick: 4")
    parser.add_argument("--steps", type=int, help="of a round; default: 10; quick: 20")
    parser.add_argument("--scored", type=int, help="test examples, evenly spaced; default: all")
    parser.add_argument(
        "--codecs", type=lambda text: text.split(","), help="beside fp32; default: all"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that train")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a temporary one")
    options = parser.parse_args()
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.rounds = options.rounds or (6 if options.quick else 40)
    options.codecs = options.codecs or ["fp16", "int8", "int4"]
    return options


if __name__ == "__main__":
    sys.exit(main())
