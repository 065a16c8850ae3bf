from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from broker_server.run_spec import (
    LocalEvaluation,
    RunSpec,
    StoredEvaluation,
    canonical_lines,
    load_run_spec,
    parse_run_spec,
    read_held_out,
)
from wire_protocol.errors import ConfigError
from wire_protocol.lora import Codec
from wire_protocol.records import Columns, Example, parse_rows, to_examples

MINIMAL: dict[str, Any] = {
    "model": "tiny",
    "dataset": "triage",
    "evaluation": {"path": "held-out.tsv", "text": "line"},
}
STORED = StoredEvaluation(sha256="a" * 64, size_bytes=10)


def write_run(folder: Path, **changes: Any) -> Path:
    path = folder / "triage.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return path


def test_a_short_file_gets_the_defaults_and_the_name_of_the_file(tmp_path: Path) -> None:
    spec = load_run_spec(write_run(tmp_path))

    assert spec.name == "triage"
    assert (spec.strategy, spec.rounds, spec.local_steps, spec.batch_size) == ("legend", 8, 10, 16)
    assert (spec.learning_rate, spec.head_learning_rate) == (1e-3, 5e-3)
    assert (spec.max_tokens, spec.quorum, spec.seed) == (64, 1.0, 0)
    assert (spec.devices_per_round, spec.deadline_s, spec.target_accuracy) == (None, None, None)


def test_legend_sends_eight_bits_and_the_papers_thirty_two_unless_told_otherwise(
    tmp_path: Path,
) -> None:
    def codecs(*overrides: str) -> tuple[Codec, Codec]:
        spec = load_run_spec(write_run(tmp_path), overrides)
        return spec.codec, spec.adapter_codec

    assert codecs() == codecs("strategy=legend") == (Codec.INT8, Codec.INT8)
    assert codecs("strategy=fedlora") == (Codec.FP32, Codec.FP32)
    assert codecs("codec=int4") == (Codec.INT4, Codec.INT8)
    with pytest.raises(ConfigError, match="strategy"):
        codecs("strategy=[legend]")


def test_legend_balances_classes_where_there_are_any_and_the_papers_do_not(tmp_path: Path) -> None:
    def loss(*overrides: str) -> str:
        return load_run_spec(write_run(tmp_path), overrides).loss

    assert loss() == loss("strategy=fedlora", "loss=balanced") == "balanced"
    assert loss("strategy=legend-paper") == loss("loss=plain") == "plain"
    assert loss("task=instruction", "labels=[]") == "plain"
    with pytest.raises(ConfigError, match=r"yaml: loss balanced needs task"):
        loss("task=instruction", "labels=[]", "loss=balanced")
    with pytest.raises(ConfigError, match="loss"):
        loss("loss=fair")


def test_the_held_out_file_is_found_next_to_the_run_file(tmp_path: Path) -> None:
    assert load_run_spec(write_run(tmp_path)).evaluation.path == tmp_path / "held-out.tsv"


def test_overrides_reach_inside_and_are_read_as_yaml(tmp_path: Path) -> None:
    overrides = [
        "rounds=3",
        "strategy_options.rank_min=4",
        "labels=[disk, power]",
        "learning_rate=2e-3",
        "deadline_s=null",
        "evaluation.label=fault",
    ]
    spec = load_run_spec(write_run(tmp_path, deadline_s=60), overrides)

    assert spec.rounds == 3
    assert spec.strategy_options == {"rank_min": 4}
    assert spec.labels == ("disk", "power")
    assert spec.learning_rate == 2e-3
    assert spec.deadline_s is None
    assert spec.evaluation.label == "fault"


def test_labels_that_yaml_reads_as_numbers_are_text(tmp_path: Path) -> None:
    assert load_run_spec(write_run(tmp_path, labels=[0, 1])).labels == ("0", "1")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["local_step=3"], "unknown key 'local_step'; did you mean 'local_steps'"),
        (["evaluation.lable=x"], "unknown key 'evaluation.lable'; did you mean 'label'"),
        (["evaluation.zzzz=1"], "unknown key 'evaluation.zzzz'; known keys: label, path, text"),
        (["rounds=0"], "rounds: "),
        (["rounds=many"], "rounds: "),
        (["strategy=legned"], "strategy: "),
        (["labels=[a, a]"], "a label is listed twice"),
        (["quorum=1.5"], "quorum: "),
        (["rounds"], "--set needs key=value"),
        (["=3"], "--set needs key=value"),
        (["rounds=[1"], "the value is not YAML"),
        (["model.name=x"], "model has no keys below it"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_spec(write_run(tmp_path), overrides)

    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"rounds: [1", "is not YAML"),
        (b"- a list", "does not hold the keys of a run"),
        (b"\xff\xfe\xff", "is not YAML"),
        (b"dataset: x\nevaluation: {path: y}", "key 'model' is missing"),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=expected):
        load_run_spec(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read run file .*nowhere\.yaml"):
        load_run_spec(tmp_path / "nowhere.yaml")


def test_what_is_submitted_is_what_the_server_accepts(tmp_path: Path) -> None:
    (tmp_path / "held-out.tsv").write_text("line\tlabel\nfull\tdisk\nhot\tthermal\n")
    local = load_run_spec(write_run(tmp_path, strategy_options={"rank_min": 4}))

    spec = local.submitted(read_held_out(local.evaluation), STORED)

    assert parse_run_spec(json.loads(spec.model_dump_json())) == spec
    assert spec.labels == ("disk", "thermal")
    assert spec.strategy_options == {"rank_min": 4}


def test_labels_that_the_file_lists_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "held-out.tsv").write_text("line\tlabel\nfull\tdisk\n")
    local = load_run_spec(write_run(tmp_path, labels=["thermal", "disk"]))

    assert local.submitted(read_held_out(local.evaluation), STORED).labels == ("thermal", "disk")


def test_instruction_tuning_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "held-out.tsv").write_text("line\tlabel\nwhy\tbecause\n")
    local = load_run_spec(write_run(tmp_path, task="instruction"))

    assert local.submitted(read_held_out(local.evaluation), STORED).labels == ()


def test_the_server_does_not_accept_a_local_path() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.sha256 is missing|unknown key"):
        parse_run_spec({**MINIMAL, "name": "x"})


def test_a_run_spec_cannot_be_changed() -> None:
    spec = RunSpec(name="x", model="m", dataset="d", evaluation=STORED)
    with pytest.raises(ValueError, match="frozen"):
        spec.rounds = 3  # type: ignore[misc]


def test_csv_tsv_and_json_lines_give_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('t,label\n"x, y",1\n', encoding="utf-8-sig")
    (tmp_path / "a.tsv").write_text("t\tlabel\nx, y\t1\n")
    (tmp_path / "a.jsonl").write_text('{"t": "x, y", "label": 1, "other": null}\n')

    contents = {
        read_held_out(LocalEvaluation(path=tmp_path / name, text="t")).content
        for name in ("a.csv", "a.tsv", "a.jsonl")
    }

    assert contents == {b'{"text":"x, y","label":"1"}\n'}


def test_parquet_gives_the_same_examples(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet  # noqa: PLC0415 - optional

    table = pyarrow.table({"t": ["a", "b"], "u": ["c", "d"], "label": [1, 0]})
    parquet.write_table(table, tmp_path / "a.parquet")

    held_out = read_held_out(LocalEvaluation(path=tmp_path / "a.parquet", text="t", text_pair="u"))

    assert held_out.content.splitlines()[0] == b'{"text":"a","text_pair":"c","label":"1"}'
    assert held_out.labels == ("0", "1")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.tsv", b"line\tlabel\n", "holds no examples"),
        ("a.tsv", b"text\tlabel\nx\ty\n", "has no column 'line'"),
        ("a.tsv", b"line\tlabel\n\xff\ty\n", "is not UTF-8 text"),
        ("a.txt", b"line", "data files end in"),
        ("a.parquet", b"no parquet", "is not a parquet file"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
    ],
)
def test_a_held_out_file_that_cannot_be_used_is_explained(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ConfigError, match=expected):
        read_held_out(LocalEvaluation(path=tmp_path / name, text="line"))


@given(st.lists(st.builds(Example, st.text(), st.none() | st.text(), st.text()), max_size=5))
def test_every_text_survives_the_canonical_form(examples: list[Example]) -> None:
    content = canonical_lines(examples).decode()

    paired = [one for one in examples if one.text_pair is not None]
    single = [one for one in examples if one.text_pair is None]
    for some, columns in ((paired, Columns(text_pair="text_pair")), (single, Columns())):
        kept = [
            row for row in parse_rows(content, ".jsonl") if ("text_pair" in row) == (some is paired)
        ]
        assert to_examples(kept, columns) == some
