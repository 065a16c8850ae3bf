from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import anyio
import pytest

from broker_server.evaluator import EvaluationResult, EvaluationSetup, Evaluator
from broker_server.export import AdapterCard, export_adapter
from broker_server.held_out_tokens import (
    IGNORED_LABEL,
    TokenisedExample,
    batches,
    collate,
    parse_held_out,
    tokenise_classification,
    tokenise_instruction,
)
from tests.support.peft_models import (
    LABELS,
    save_base_model,
    shape_of,
    trained_adapter,
    write_held_out,
)
from wire_protocol.errors import ConfigError, Unavailable
from wire_protocol.initial_adapter import initial_adapter
from wire_protocol.records import Example

Answer = TypeVar("Answer")

ECHO = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    {body}
    sys.stdout.flush()
"""
PREPARED = 'print(json.dumps({"event": "prepared", "examples": 3}))'
RESULT = 'print(json.dumps({"event":"result","accuracy":1,"loss":0,"examples":3,"seconds":1}))'


class WordTokenizer:
    """One id a word: its length; 1 begins and 2 ends a text."""

    pad_token_id = 9
    eos_token_id = 2

    def __call__(
        self,
        texts: list[str],
        pairs: list[str] | None = None,
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int = 1000,
    ) -> dict[str, list[list[int]]]:
        joined = texts if pairs is None else [f"{a} {b}" for a, b in zip(texts, pairs, strict=True)]
        start = [1] if add_special_tokens else []
        rows = [start + [len(word) for word in text.split()] for text in joined]
        return {"input_ids": [row[:max_length] if truncation else row for row in rows]}


def converse(work: Callable[[Evaluator], Awaitable[Answer]], *command: str) -> Answer:
    """Run a conversation with an evaluator and close it."""

    async def conversation() -> Answer:
        evaluator = Evaluator(command) if command else Evaluator()
        try:
            with anyio.fail_after(120):
                return await work(evaluator)
        finally:
            await evaluator.close()

    return anyio.run(conversation)


def child_that(body: str) -> tuple[str, ...]:
    """A child of a few lines that speaks the line protocol."""
    return (sys.executable, "-c", ECHO.format(body=body.replace("\n", "\n    ")))


def setup_of(folder: Path) -> EvaluationSetup:
    return EvaluationSetup(folder / "base", "classification", folder / "h.jsonl", LABELS, threads=1)


def test_pairs_are_read_when_the_file_has_them() -> None:
    assert parse_held_out('{"text":"a","text_pair":"b","label":"c"}') == [Example("a", "b", "c")]
    assert parse_held_out('{"text":"a","label":"c"}\n') == [Example("a", None, "c")]


@pytest.mark.parametrize("content", ["", "\n", '{"text":"a"}', "[1]", "no json"])
def test_a_held_out_file_without_usable_examples_is_refused(content: str) -> None:
    with pytest.raises(ConfigError):
        parse_held_out(content)


def test_a_class_is_the_position_of_its_label() -> None:
    examples = [Example("one two", None, "b"), Example("three", None, "a")]
    made = tokenise_classification(examples, WordTokenizer(), labels=("a", "b"), max_tokens=2)
    assert [one.labels for one in made] == [[1], [0]]
    assert [one.inputs["input_ids"] for one in made] == [[1, 3], [1, 5]]


def test_a_held_out_label_that_the_run_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="'c' is not one of this run's"):
        tokenise_classification([Example("x", None, "c")], WordTokenizer(), labels=(), max_tokens=9)


def test_only_response_and_end_count() -> None:
    made = tokenise_instruction([Example("ask me", None, "four")], WordTokenizer(), max_tokens=9)
    assert made[0].inputs["input_ids"] == [1, 3, 2, 4, 2]
    assert made[0].labels == [IGNORED_LABEL] * 3 + [4, 2]


def test_a_long_prompt_loses_its_beginning_and_a_long_response_its_end() -> None:
    long = " ".join(["abc"] * 20)
    prompt = tokenise_instruction([Example(long, None, "four")], WordTokenizer(), max_tokens=5)
    assert prompt[0].inputs["input_ids"] == [3, 3, 3, 4, 2]
    answer = tokenise_instruction([Example("ask", None, long)], WordTokenizer(), max_tokens=5)
    assert answer[0].labels == [IGNORED_LABEL, 3, 3, 3, 3]


def test_batches_hold_every_example_once_similar_lengths_together() -> None:
    examples = [TokenisedExample({"input_ids": [0] * n}, [n]) for n in (3, 9, 1, 7, 5)]
    made = [[one.length for one in batch] for batch in batches(examples, 2)]
    assert made == [[9, 7], [5, 3], [1]]


def test_padding_fills_to_the_longest_of_the_batch() -> None:
    rows = [
        TokenisedExample({"input_ids": [5, 6], "attention_mask": [1, 1]}, [7, 8]),
        TokenisedExample({"input_ids": [4], "attention_mask": [1]}, [3]),
    ]
    assert collate(rows, WordTokenizer()) == {
        "input_ids": [[5, 6], [4, 9]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [[7, 8], [3, IGNORED_LABEL]],
    }


def test_a_child_that_dies_is_prepared_again_and_asked_once_more(tmp_path: Path) -> None:
    marker = tmp_path / "died"
    body = f"""
if request["do"] == "prepare":
    {PREPARED}
elif not os.path.exists({str(marker)!r}):
    open({str(marker)!r}, "w").close()
    os._exit(9)
else:
    {RESULT}
"""

    async def work(evaluator: Evaluator) -> EvaluationResult:
        assert await evaluator.prepare(setup_of(tmp_path)) == 3
        return await evaluator.evaluate(tmp_path)

    assert converse(work, *child_that(body)) == EvaluationResult(1.0, 0.0, 3, 1.0)
    assert marker.exists()


@pytest.mark.parametrize(
    "body", ["os._exit(9)", "print('no json')", "print('[]')", "sys.exit('out of memory')"]
)
def test_a_child_that_dies_twice_is_unavailable_in_one_line(tmp_path: Path, body: str) -> None:
    async def work(evaluator: Evaluator) -> int:
        return await evaluator.prepare(setup_of(tmp_path))

    with pytest.raises(Unavailable, match="died twice") as caught:
        converse(work, *child_that(body))
    assert "\n" not in str(caught.value)
    assert ("out of memory" in str(caught.value)) == ("out of memory" in body)


@pytest.mark.parametrize(("cause", "kind"), [("config", ConfigError), ("internal", Unavailable)])
def test_a_failure_that_the_child_reports_is_not_repeated(
    tmp_path: Path, cause: str, kind: type[Exception]
) -> None:
    asked = tmp_path / "asked"
    body = f"""
open({str(asked)!r}, "a").write("x")
print(json.dumps({{"event": "failed", "cause": {cause!r}, "detail": "too bad"}}))
"""

    async def work(evaluator: Evaluator) -> int:
        return await evaluator.prepare(setup_of(tmp_path))

    with pytest.raises(kind, match="too bad"):
        converse(work, *child_that(body))
    assert asked.read_text() == "x"


def test_a_cancelled_evaluation_leaves_no_answer_for_the_next(tmp_path: Path) -> None:
    reached = tmp_path / "reached"
    body = f"""
if request["do"] == "prepare":
    {PREPARED}
elif not os.path.exists({str(reached)!r}):
    open({str(reached)!r}, "w").close()
    sys.stdin.read()
    print(json.dumps({{"event": "result", "accuracy": 0.5}}))
else:
    {RESULT}
"""

    async def work(evaluator: Evaluator) -> float:
        await evaluator.prepare(setup_of(tmp_path))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(evaluator.evaluate, tmp_path)
            while not reached.exists():  # noqa: ASYNC110 - the child tells by a file
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
        return (await evaluator.evaluate(tmp_path)).accuracy

    assert converse(work, *child_that(body)) == 1.0


def test_evaluating_before_preparing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="before it was prepared"):
        converse(lambda evaluator: evaluator.evaluate(tmp_path))


def test_the_parent_imports_no_torch() -> None:
    code = (
        "import sys, broker_server.evaluator, broker_server.export; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model, held-out examples, and two adapters."""
    root = tmp_path_factory.mktemp("evaluate")
    base = save_base_model(root / "base", "roberta")
    write_held_out(root / "h.jsonl")
    card = AdapterCard("run", "base", LABELS)
    untrained = initial_adapter(shape_of(base), (2, 2, 2), label_count=3, seed=0)
    export_adapter(untrained, base, root / "untrained", card=card)
    trained = trained_adapter(shape_of(base), (0, 4, 8), 3)
    export_adapter(trained, base, root / "trained", card=card)
    return root


@pytest.mark.train
def test_adapters_do_not_leak_into_the_next_evaluation(folder: Path) -> None:
    async def work(evaluator: Evaluator) -> list[EvaluationResult]:
        await evaluator.prepare(setup_of(folder))
        names = ("untrained", "trained", "untrained")
        return [await evaluator.evaluate(folder / name) for name in names]

    before, between, after = converse(work)
    assert before.accuracy == after.accuracy
    assert before.loss == pytest.approx(after.loss)
    assert between.loss != pytest.approx(before.loss, rel=0.01)
    assert between.examples == 40


@pytest.mark.train
def test_the_batch_size_does_not_change_the_result(folder: Path) -> None:
    async def work(evaluator: Evaluator) -> list[EvaluationResult]:
        results = []
        for size in (1, 40):
            await evaluator.prepare(replace(setup_of(folder), batch_size=size))
            results.append(await evaluator.evaluate(folder / "trained"))
        return results

    single, whole = converse(work)
    assert single.accuracy == whole.accuracy
    assert single.loss == pytest.approx(whole.loss, rel=1e-5)


@pytest.mark.train
def test_a_killed_child_is_replaced_without_anyone_noticing(folder: Path) -> None:
    async def work(evaluator: Evaluator) -> list[EvaluationResult]:
        await evaluator.prepare(setup_of(folder))
        before = await evaluator.evaluate(folder / "trained")
        assert evaluator._child is not None
        os.kill(evaluator._child.process.pid, signal.SIGKILL)
        return [before, await evaluator.evaluate(folder / "trained")]

    before, after = converse(work)
    assert before.accuracy == after.accuracy
    assert before.loss == pytest.approx(after.loss)


@pytest.mark.train
def test_a_broken_adapter_is_refused_and_the_next_one_scored(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((folder / "trained" / "adapter_config.json").read_text())
    # One more layer than the folder has tensors for.
    config["target_modules"].append("roberta.encoder.layer.0.attention.self.query")
    (broken / "adapter_config.json").write_text(json.dumps(config))
    weights = (folder / "trained" / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(weights)

    async def work(evaluator: Evaluator) -> list[EvaluationResult]:
        await evaluator.prepare(setup_of(folder))
        before = await evaluator.evaluate(folder / "trained")
        with pytest.raises(ConfigError, match="missing adapter keys"):
            await evaluator.evaluate(broken)
        with pytest.raises(ConfigError, match="cannot load the adapter"):
            await evaluator.evaluate(folder / "absent")
        return [before, await evaluator.evaluate(folder / "trained")]

    before, after = converse(work)
    assert before.loss == pytest.approx(after.loss)


@pytest.mark.train
def test_a_held_out_file_of_other_labels_is_a_wrong_file(folder: Path) -> None:
    async def work(evaluator: Evaluator) -> int:
        return await evaluator.prepare(replace(setup_of(folder), labels=("bad", "good")))

    with pytest.raises(ConfigError, match="'odd' is not one of this run's"):
        converse(work)
