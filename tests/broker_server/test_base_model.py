from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from broker_server.base_model import (
    ModelFile,
    digest_of,
    manifest_of,
    read_base_model,
    read_tensor,
    tensor_shapes,
)
from tests.support.peft_models import write_base_folder
from wire_protocol.errors import ConfigError

ONE = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base_folder(tmp_path / "base", "bert", {"one": ONE})


def shard(base: Path) -> None:
    """Turn the one weight file into a shard with an index."""
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"one": "model-00001-of-00001.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def test_only_files_that_make_up_the_model_count(base: Path) -> None:
    before = manifest_of(base)
    (base / "README.md").write_text("read me")
    (base / ".gitattributes").write_text("x")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "1_Pooling").mkdir()
    assert manifest_of(base) == before
    assert [file.path for file in before] == ["config.json", "model.safetensors", "tokenizer.json"]


def test_the_manifest_names_content_and_size(base: Path) -> None:
    file = manifest_of(base)[0]
    content = (base / "config.json").read_bytes()
    assert file == ModelFile("config.json", hashlib.sha256(content).hexdigest(), len(content))


def test_the_digest_is_that_of_the_canonical_manifest() -> None:
    files = (ModelFile("b", "22", 2), ModelFile("a", "11", 1))
    canonical = (
        '{"files":[{"path":"a","sha256":"11","size_bytes":1},'
        '{"path":"b","sha256":"22","size_bytes":2}]}'
    )
    assert digest_of(files) == hashlib.sha256(canonical.encode()).hexdigest()


def test_another_tokenizer_makes_another_model(base: Path) -> None:
    before = read_base_model(base)
    (base / "tokenizer.json").write_text('{"changed":1}')
    after = read_base_model(base)
    assert before.digest != after.digest
    assert before.shape == after.shape
    assert after.size_bytes == before.size_bytes + len('{"changed":1}') - len("{}")


def test_shards_and_their_index_count(base: Path) -> None:
    shard(base)
    names = [file.path for file in manifest_of(base)]
    assert "model-00001-of-00001.safetensors" in names
    assert "model.safetensors.index.json" in names
    assert read_tensor(base, "one").tolist() == ONE.tolist()


def test_a_missing_shard_is_named(base: Path) -> None:
    shard(base)
    (base / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ConfigError, match="lacks the shard model-00001-of-00001"):
        manifest_of(base)


@pytest.mark.parametrize("name", ["../model.safetensors", "a/b.safetensors", 7])
def test_an_index_cannot_lead_outside_the_folder(base: Path, name: object) -> None:
    shard(base)
    index = {"weight_map": {"one": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="no file name"):
        manifest_of(base)


def test_pickled_weights_are_refused_with_a_way_out(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickled.*save_pretrained"):
        manifest_of(base)


def test_a_folder_without_a_tokenizer_is_refused(base: Path) -> None:
    (base / "tokenizer.json").rename(base / "tokenizer_config.json")
    with pytest.raises(ConfigError, match="no tokenizer"):
        manifest_of(base)


def test_an_unknown_family_is_refused(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match=r"'t5'.*use one of bert"):
        read_base_model(base)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_config_that_cannot_be_read_is_one_line(base: Path, content: str | None) -> None:
    (base / "config.json").unlink()
    if content is not None:
        (base / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        read_base_model(base)
    assert "\n" not in str(caught.value)


def test_shapes_come_from_the_header(base: Path) -> None:
    assert tensor_shapes(base) == {"one": (2, 3)}


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, (2).to_bytes(8, "little") + b"[]"])
def test_a_weight_file_that_is_not_safetensors_is_refused(base: Path, content: bytes) -> None:
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="not a safetensors file"):
        tensor_shapes(base)


def test_bfloat16_and_half_precision_are_read_as_float32(base: Path) -> None:
    values = np.array([1.0, -2.5, 0.15625], dtype=np.float32)  # exact in both
    upper_halves = (values.view("<u4") >> 16).astype("<u2").tobytes()
    header = {
        "wide": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
        "half": {"dtype": "F16", "shape": [3], "data_offsets": [6, 12]},
        "whole": {"dtype": "I64", "shape": [0], "data_offsets": [12, 12]},
    }
    raw = json.dumps(header).encode()
    data = upper_halves + values.astype("<f2").tobytes()
    (base / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    assert read_tensor(base, "wide").tolist() == values.tolist()
    assert read_tensor(base, "half").tolist() == values.tolist()
    with pytest.raises(ConfigError, match="I64"):
        read_tensor(base, "whole")
    with pytest.raises(ConfigError, match="no tensor 'absent'"):
        read_tensor(base, "absent")
