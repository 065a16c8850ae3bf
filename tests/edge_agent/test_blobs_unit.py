"""What the blob client decides without a network: manifests and patience."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.blobs import BlobClient
from edge_agent.model_manifest import ModelFile, manifest_digest, model_files
from edge_agent.server_connection import Patience, Retries
from wire_protocol.errors import DeviceError, FailureCode, ProtocolError, ServerUnavailable

EMPTY = hashlib.sha256(b"").hexdigest()


def described(paths: Sequence[str]) -> dict[str, object]:
    return {"files": [{"path": path, "sha256": EMPTY, "size_bytes": 0} for path in paths]}


def digest_of(paths: Sequence[str]) -> str:
    return manifest_digest([ModelFile(path=path, sha256=EMPTY, size_bytes=0) for path in paths])


def test_the_digest_of_a_base_model_is_that_of_its_canonical_manifest() -> None:
    text = (
        f'{{"files":[{{"path":"a.json","sha256":"{EMPTY}","size_bytes":0}},'
        f'{{"path":"b/c","sha256":"{EMPTY}","size_bytes":0}}]}}'
    )
    assert digest_of(["b/c", "a.json"]) == hashlib.sha256(text.encode()).hexdigest()


@given(paths=st.permutations(["config.json", "model.safetensors", "1_Pooling/config.json"]))
def test_the_order_in_which_a_server_lists_files_does_not_matter(paths: list[str]) -> None:
    files = model_files(described(paths), digest_of(sorted(paths)))
    assert [file.path for file in files] == paths


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../up", "a/../../b", "a//b", "a/", ".hidden", "a\\b", "a\x00b"]
)
def test_a_path_that_leads_out_of_the_folder_is_refused(path: str) -> None:
    with pytest.raises(ProtocolError):
        model_files(described([path]), digest_of([path]))


@pytest.mark.parametrize(
    "answer", [{}, {"files": None}, {"files": [{}]}, {"files": [{"path": "a", "sha256": "x"}]}]
)
def test_what_is_no_description_is_refused(answer: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="description"):
        model_files(answer, EMPTY)


def test_a_file_that_was_exchanged_changes_the_digest() -> None:
    answer = described(["model.safetensors"])
    with pytest.raises(ProtocolError, match="not those of model"):
        model_files(answer, digest_of(["model.safetensors", "config.json"]))


def test_patience_counts_from_the_last_byte_that_came_through() -> None:
    patience = Patience(total_s=0.05, first_retry_s=0.001, longest_retry_s=0.01)

    async def run() -> tuple[int, DeviceError]:
        retries = Retries(patience, FailureCode.DOWNLOAD_FAILED)
        attempts = 0

        async def attempt() -> None:
            nonlocal attempts
            attempts += 1
            if attempts <= 20:
                await anyio.sleep(0.01)
                retries.progressed()
            raise ServerUnavailable("broken again")

        with pytest.raises(DeviceError) as caught:
            await retries.run(attempt)
        return attempts, caught.value

    attempts, error = anyio.run(run)
    assert attempts > 20
    assert error.code is FailureCode.DOWNLOAD_FAILED
    assert "broken again" in str(error)


def test_a_byte_that_is_sent_again_and_again_is_no_progress() -> None:
    patience = Patience(total_s=0.1, first_retry_s=0.001, longest_retry_s=0.01)

    async def run() -> int:
        retries = Retries(patience, FailureCode.UPLOAD_FAILED)
        reached = 0

        async def attempt() -> None:
            nonlocal reached
            await anyio.sleep(0.02)
            if reached < 20:
                reached += 1
            retries.arrived(reached)
            raise ServerUnavailable("broken again")

        with pytest.raises(DeviceError):
            await retries.run(attempt)
        return reached

    assert anyio.run(run) == 20


def test_a_file_that_is_not_there_cannot_be_uploaded(tmp_path: Path) -> None:
    async def run() -> None:
        async with BlobClient("http://127.0.0.1:1") as client:
            await client.upload(tmp_path / "missing")

    with pytest.raises(DeviceError, match="missing") as caught:
        anyio.run(run)
    assert caught.value.code is FailureCode.MISSING_FILE


def test_an_agent_that_has_nothing_to_fetch_does_not_load_httpx() -> None:
    program = "import sys, edge_agent.blobs, edge_agent.link; sys.exit('httpx' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
