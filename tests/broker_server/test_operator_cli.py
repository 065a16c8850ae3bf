from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from broker_server.operator_cli import main
from tests.support.fake_server import FakeState, closed_port_url, serving
from tests.support.run_json import live_json, member_json, round_json, run_json

pytestmark = pytest.mark.integration

DEVICE = {
    "device_id": "pi5",
    "board": "rpi-5-8",
    "emulated": None,
    "state": "online",
    "busy_with": None,
    "last_seen_s": 0.4,
    "capability": {
        "memory_budget_bytes": 6_000_000_000,
        "link": {
            "up_bytes_per_s": 2_500_000,
            "down_bytes_per_s": 5_000_000,
            "round_trip_s": 0.01,
        },
        "compute": {
            "model_digest": "a" * 64,
            "forward_seconds_per_token_layer": 1e-5,
            "backward_seconds_per_token_layer": 2e-5,
        },
    },
    "datasets": {"triage": {"examples": 400, "labels": ["disk"]}},
    "note": "",
}


@dataclass(frozen=True)
class Shell:
    """The command line next to a server whose answers are canned."""

    state: FakeState
    url: str

    def run(self, *arguments: str) -> Result:
        runner = CliRunner(env={"LEGEND_SERVER": self.url})
        return runner.invoke(main, list(arguments), catch_exceptions=False)


@pytest.fixture
def shell() -> Iterator[Shell]:
    state = FakeState()
    with serving(state) as url:
        yield Shell(state, url)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-bert"
    folder.mkdir()
    config = {
        "model_type": "bert",
        "hidden_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (folder / "model.safetensors").write_bytes(bytes(3 * 1024 * 1024))
    (folder / "README.md").write_text("not part of the model")
    return folder


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "held-out.tsv").write_text("line\tlabel\nfull\tdisk\nhot\tthermal\n")
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: tiny\ndataset: triage\nrounds: 2\nevaluation: {path: held-out.tsv, text: line}\n"
    )
    return path


def test_devices_are_listed_with_what_they_measured(shell: Shell) -> None:
    shell.state.devices.append(DEVICE)

    result = shell.run("devices")

    assert result.exit_code == 0
    for cell in ("pi5", "rpi-5-8", "online", "6.0 GB", "20.0/40.0 Mb/s", "30 ms", "triage 400"):
        assert cell in result.stdout
    assert json.loads(shell.run("devices", "--json").stdout) == [DEVICE]


def test_a_device_that_measured_nothing_yet_is_listed_too(shell: Shell) -> None:
    shell.state.devices.append(
        {**DEVICE, "capability": None, "state": "lost", "note": "no dataset\x1b[2J"}
    )

    result = shell.run("devices")

    assert "not measured" in result.stdout
    assert "lost" in result.stdout
    assert "\x1b" not in result.stdout


def test_an_empty_fleet_says_what_to_do(shell: Shell) -> None:
    assert "edge-agent start" in shell.run("devices").stdout
    assert "legend model add" in shell.run("model", "list").stdout
    assert "legend launch" in shell.run("runs").stdout


def test_a_model_is_uploaded_in_chunks_and_registered(shell: Shell, model_dir: Path) -> None:
    result = shell.run("model", "add", str(model_dir), "--json")

    assert result.exit_code == 0
    added = json.loads(result.stdout)
    registered = shell.state.models["tiny-bert"]
    assert added["digest"] == registered["digest"]
    assert [one["path"] for one in registered["files"]] == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]
    assert shell.state.patches == 5  # three chunks of weights, one for each small file
    assert "tiny-bert" in shell.run("model", "list").stdout


def test_what_the_server_has_already_is_not_sent_again(shell: Shell, model_dir: Path) -> None:
    shell.run("model", "add", str(model_dir))
    before = shell.state.patches

    assert shell.run("model", "add", str(model_dir), "--name", "again").exit_code == 0

    assert shell.state.patches == before
    assert set(shell.state.models) == {"tiny-bert", "again"}


def test_an_upload_goes_on_where_an_earlier_one_stopped(shell: Shell, model_dir: Path) -> None:
    shell.run("model", "add", str(model_dir))
    (sha256,) = [key for key, data in shell.state.blobs.items() if len(data) > 1024 * 1024]
    shell.state.partial[sha256] = shell.state.blobs.pop(sha256)[: 2 * 1024 * 1024 + 5]
    before = shell.state.patches

    shell.run("model", "add", str(model_dir))

    assert shell.state.patches == before + 1
    assert len(shell.state.blobs[sha256]) == 3 * 1024 * 1024


def test_a_folder_that_is_no_model_is_refused_before_anything_is_sent(
    shell: Shell, tmp_path: Path
) -> None:
    result = shell.run("model", "add", str(tmp_path))

    assert result.exit_code == 78
    assert result.stderr.startswith("error: ")
    assert shell.state.patches == 0


def test_a_run_is_submitted_with_its_held_out_examples(shell: Shell, run_file: Path) -> None:
    result = shell.run("launch", str(run_file), "--set", "rounds=3", "--no-watch")

    assert (result.exit_code, result.stdout) == (0, "run-1\n")
    (spec,) = shell.state.submitted
    assert (spec["name"], spec["rounds"], spec["labels"]) == ("run", 3, ["disk", "thermal"])
    held_out = shell.state.blobs[spec["evaluation"]["sha256"]]
    assert held_out.splitlines()[0] == b'{"text":"full","label":"disk"}'
    assert spec["evaluation"]["size_bytes"] == len(held_out)


@pytest.mark.parametrize(("dataset", "warned"), [("triage", False), ("traige", True)])
def test_a_dataset_that_no_device_has_is_said_when_the_run_is_launched(
    shell: Shell, run_file: Path, dataset: str, warned: bool
) -> None:
    shell.state.devices = [DEVICE]

    result = shell.run("launch", str(run_file), "--set", f"dataset={dataset}", "--no-watch")

    assert (result.exit_code, result.stdout) == (0, "run-1\n")
    assert ("no device has a dataset 'traige' yet (they have: triage)" in result.stderr) == warned


def test_a_mistake_in_the_run_file_is_one_line_and_nothing_is_submitted(
    shell: Shell, run_file: Path
) -> None:
    result = shell.run("launch", str(run_file), "--set", "round=3")

    assert result.exit_code == 78
    assert "unknown key 'round'; did you mean 'rounds'" in result.stderr
    assert result.stderr.count("\n") == 1
    assert shell.state.submitted == []


def test_the_reason_for_which_the_server_refuses_a_run_is_shown(
    shell: Shell, run_file: Path
) -> None:
    shell.state.refuse_runs_with = "there is no base model 'tiny'"

    result = shell.run("launch", str(run_file))

    assert (result.exit_code, result.stderr) == (78, "error: there is no base model 'tiny'\n")


@pytest.mark.parametrize(
    ("status", "exit_code"), [("finished", 0), ("failed", 1), ("cancelled", 2)]
)
def test_launch_follows_the_run_and_ends_like_it(
    shell: Shell, run_file: Path, status: str, exit_code: int
) -> None:
    shell.state.runs["run-1"] = [run_json(status=status, reason="so it is")]

    result = shell.run("launch", str(run_file))

    assert result.exit_code == exit_code
    assert f"run run-1 {status}: so it is" in result.stdout


def test_watch_follows_the_newest_run(shell: Shell) -> None:
    shell.state.runs["old"] = [run_json(run_id="old", status="failed")]
    shell.state.runs["new"] = [run_json(run_id="new", status="finished")]

    result = shell.run("watch")

    assert result.exit_code == 0
    assert "run new finished" in result.stdout


def test_watch_without_any_run_says_so(shell: Shell) -> None:
    result = shell.run("watch")
    assert (result.exit_code, "no run to watch" in result.stderr) == (78, True)


def test_a_run_is_shown_with_the_depths_of_its_devices(shell: Shell) -> None:
    rounds = [
        round_json(1, member_json("pi5"), member_json("nano", status="failed", depth=2)),
        round_json(2, member_json("pi5", depth=5)),
    ]
    shell.state.runs["run-1"] = [run_json(rounds=rounds, live=[live_json("pi5")])]

    lines = shell.run("show", "run-1").stdout.splitlines()

    assert ["nano", "(2)", "-"] in [line.split() for line in lines]
    assert ["pi5", "4", "5"] in [line.split() for line in lines]
    assert json.loads(shell.run("show", "run-1", "--json").stdout)["rounds"] == rounds


def test_runs_are_listed(shell: Shell) -> None:
    shell.state.runs["run-1"] = [run_json()]
    assert "1/2" in shell.run("runs").stdout
    assert json.loads(shell.run("runs", "--json").stdout)[0]["run_id"] == "run-1"


def test_a_run_is_cancelled_once(shell: Shell) -> None:
    shell.state.runs["run-1"] = [run_json()]
    assert shell.run("cancel", "run-1").exit_code == 0
    assert shell.state.cancelled == ["run-1"]

    shell.state.runs["run-1"] = [run_json(status="finished")]
    result = shell.run("cancel", "run-1")
    assert (result.exit_code, result.stderr) == (77, "error: run run-1 has ended\n")


def test_export_fetches_the_adapter_folder_only(shell: Shell, tmp_path: Path) -> None:
    shell.state.runs["run-1"] = [run_json()]
    shell.state.files["run-1"] = {
        "metrics.jsonl": b"",
        "adapter/adapter_config.json": b"{}",
        "adapter/adapter_model.safetensors": b"weights",
    }

    result = shell.run("export", "run-1", str(tmp_path / "out"))

    assert result.exit_code == 0
    assert "PeftModel.from_pretrained" in result.stdout
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


def test_a_server_cannot_write_outside_the_export_folder(shell: Shell, tmp_path: Path) -> None:
    shell.state.runs["run-1"] = [run_json()]
    shell.state.files["run-1"] = {"adapter/../../escaped": b"x"}

    result = shell.run("export", "run-1", str(tmp_path / "a" / "b"))

    assert (result.exit_code, "outside the folder" in result.stderr) == (76, True)
    assert not (tmp_path / "escaped").exists()


def test_exporting_a_run_without_rounds_is_explained(shell: Shell, tmp_path: Path) -> None:
    shell.state.runs["run-1"] = [run_json()]
    result = shell.run("export", "run-1", str(tmp_path))
    assert (result.exit_code, "no adapter yet" in result.stderr) == (77, True)


def test_an_unknown_run_is_the_servers_answer(shell: Shell) -> None:
    result = shell.run("show", "nothing")
    assert (result.exit_code, result.stderr) == (77, "error: there is no run 'nothing'\n")


def test_a_token_opens_a_server_that_wants_one(shell: Shell) -> None:
    shell.state.token = "secret"
    refused = shell.run("devices")
    assert (refused.exit_code, "LEGEND_TOKEN" in refused.stderr) == (77, True)
    assert shell.run("--token", "secret", "devices").exit_code == 0


def test_no_server_is_one_line_that_says_how_to_start_one() -> None:
    result = CliRunner().invoke(main, ["--server", closed_port_url(), "devices"])
    assert result.exit_code == 69
    assert result.stderr == (
        f"error: no server answers at {closed_port_url()}; start one with broker-server serve\n"
    )


@pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://[::1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    result = CliRunner().invoke(main, ["--server", url, "devices"])
    assert (result.exit_code, "is no server address" in result.stderr) == (78, True)


def test_splitting_a_file_loses_no_row_and_keeps_every_column(tmp_path: Path) -> None:
    source = tmp_path / "all.tsv"
    rows = [f"line {number}\t{'ab'[number % 2]}\t{number}" for number in range(40)]
    source.write_text("\n".join(["text\tlabel\tmore", *rows]) + "\n")
    arguments = ["data", "split", str(source), "--devices", "3", "--alpha", "0.5"]

    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "out"), "--json"])

    assert result.exit_code == 0
    counts = json.loads(result.stdout)
    assert sum(sum(row.values()) for row in counts.values()) == 40
    written = [(tmp_path / "out" / name).read_text().splitlines() for name in counts]
    assert all(lines[0] == "text\tlabel\tmore" for lines in written)
    assert sorted(line for lines in written for line in lines[1:]) == sorted(rows)


def test_a_csv_file_becomes_json_lines_and_a_table_is_shown(tmp_path: Path) -> None:
    source = tmp_path / "all.csv"
    source.write_text('text,kind\n"a, b",x\nc,y\nd,x\ne,y\n')
    arguments = ["data", "split", str(source), "--devices", "2", "--alpha", "100"]

    result = CliRunner().invoke(
        main, [*arguments, "--label", "kind", "--out", str(tmp_path / "out")]
    )

    assert result.stdout.split()[:4] == ["device", "x", "y", "all"]
    lines = [
        json.loads(line)
        for name in ("device-1.jsonl", "device-2.jsonl")
        for line in (tmp_path / "out" / name).read_text().splitlines()
    ]
    assert {"text": "a, b", "kind": "x"} in lines
    assert len(lines) == 4


def test_a_split_by_a_column_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,kind\na,b\n")
    arguments = ["data", "split", str(tmp_path / "a.csv"), "--devices", "1", "--alpha", "1"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)])
    assert (result.exit_code, "it has: text, kind" in result.stderr) == (78, True)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from broker_server.operator_cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "heavy = {'httpx', 'rich', 'torch', 'numpy', 'matplotlib', 'transformers', 'pydantic'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"
