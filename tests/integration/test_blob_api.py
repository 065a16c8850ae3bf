"""The blob routes as any HTTP client sees them."""

from __future__ import annotations

import httpx
import pytest

from broker_server.blobs import BlobStore
from tests.support.blob_server import CONTENT, DIGEST, BlobServer

pytestmark = [pytest.mark.integration, pytest.mark.anyio]


async def test_ranges_etags_and_heads_are_those_of_http(
    server: BlobServer, store: BlobStore
) -> None:
    store.put(CONTENT)
    url = f"{server.url}/v1/blobs/{DIGEST}"
    async with httpx.AsyncClient() as http:
        head = await http.head(url)
        middle = await http.get(url, headers={"Range": "bytes=100-199"})
        tail = await http.get(url, headers={"Range": "bytes=-100"})
        beyond = await http.get(url, headers={"Range": f"bytes={len(CONTENT)}-"})
        missing = await http.get(f"{server.url}/v1/blobs/{'0' * 64}")
        nonsense = await http.get(f"{server.url}/v1/blobs/..%2f..%2fetc%2fpasswd")
    assert head.headers["content-length"] == str(len(CONTENT))
    assert head.headers["etag"] == f'"{DIGEST}"'
    assert head.headers["accept-ranges"] == "bytes"
    assert head.content == b""
    assert (middle.status_code, middle.content) == (206, CONTENT[100:200])
    assert middle.headers["content-range"] == f"bytes 100-199/{len(CONTENT)}"
    assert (tail.status_code, tail.content) == (206, CONTENT[-100:])
    assert beyond.status_code == 416
    assert (missing.status_code, missing.json()["error"]) == (404, "not_found")
    assert nonsense.status_code in (400, 404)


async def test_wrong_requests_are_answered_with_a_reason(
    server: BlobServer, store: BlobStore
) -> None:
    async with httpx.AsyncClient(base_url=server.url) as http:
        opened = await http.post("/v1/blobs", json={"sha256": DIGEST, "size_bytes": 10})
        no_offset = await http.patch(f"/v1/blobs/{DIGEST}", content=b"x")
        elsewhere = await http.patch(
            f"/v1/blobs/{DIGEST}", content=b"x", headers={"Upload-Offset": "5"}
        )
        too_much = await http.patch(
            f"/v1/blobs/{DIGEST}", content=b"x" * 11, headers={"Upload-Offset": "0"}
        )
        damaged = await http.patch(
            f"/v1/blobs/{DIGEST}", content=b"x" * 10, headers={"Upload-Offset": "0"}
        )
        bad = await http.post("/v1/blobs", json={"sha256": "short", "size_bytes": 1})
        huge = await http.post("/v1/blobs", content=b"{" + b" " * 10_000)
        probe = await http.post("/v1/probe", content=b"x" * 1000)
        greedy = await http.get("/v1/probe?bytes=999999999")
    assert (opened.status_code, opened.json()) == (201, {"state": "open", "offset": 0})
    assert (no_offset.status_code, no_offset.json()["error"]) == (400, "bad_request")
    assert (elsewhere.status_code, elsewhere.json()["offset"]) == (409, 0)
    assert (too_much.status_code, too_much.json()["error"]) == (413, "too_large")
    assert (damaged.status_code, damaged.json()["error"]) == (422, "wrong_digest")
    assert (bad.status_code, "sha256" in bad.json()["detail"]) == (400, True)
    assert huge.status_code == 413
    assert probe.json() == {"bytes": 1000}
    assert greedy.status_code == 400
