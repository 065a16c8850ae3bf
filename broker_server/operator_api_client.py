"""The operator's side of the HTTP API: one method per route.

Knows addresses, JSON bodies and how an answer becomes one of our errors; knows
nothing of terminals. Answers come back as the JSON they are, so that ``--json``
shows what the server said.
"""

from __future__ import annotations

import hashlib
import io
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, final
from urllib.parse import quote

import httpx

from broker_server.base_model import read_base_model
from broker_server.run_spec import RunSpec, StoredEvaluation
from wire_protocol.errors import (
    ConfigError,
    LegendError,
    ProtocolError,
    Refused,
    ServerUnavailable,
)

Json = dict[str, Any]
Report = Callable[[int, int], None]
"""Called with the bytes moved so far and the bytes in all."""

CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
_ADAPTER_FOLDER = "adapter/"
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


@final
class OperatorApi:
    """A connection to one server; use it as a context manager.

    Args:
        url: address of the server, e.g. ``http://127.0.0.1:8300``.
        token: sent as bearer token; None where the server wants none.
        ca: for https, ``ca.pem`` of the fleet; None trusts the system's authorities.

    Every method raises, besides what it says itself:

    Raises:
        ServerUnavailable: no server answers, or it failed on its side.
        ConfigError: the server found the request wrong (400, 422).
        Refused: it said no for another reason (401, 403, 404, 409).
        ProtocolError: what answers is no LEGEND server.
    """

    def __init__(self, url: str, *, token: str | None = None, ca: Path | None = None) -> None:
        self._url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            # A server in the local network is reached directly whatever proxy the shell
            # uses; over https the environment may name the certificate authority.
            self._http = httpx.Client(
                base_url=self._url + "/v1/",
                headers=headers,
                timeout=_TIMEOUT_S,
                trust_env=self._url.startswith("https:"),
                verify=_believing(ca) if ca else True,
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"{url!r} is no server address: {error}") from error

    def __enter__(self) -> OperatorApi:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def health(self) -> Json:
        """``GET /v1/health``."""
        return self._json("GET", "health")

    def doctor(self) -> Json:
        """``GET /v1/doctor``: what the server knows about its own health."""
        return self._json("GET", "doctor")

    def devices(self) -> list[Json]:
        """``GET /v1/devices``."""
        return self._list("devices")

    def enrolments(self) -> list[Json]:
        """``GET /v1/enrolments``: who waits, and what was decided."""
        return self._list("enrolments")

    def decide(self, device_id: str, decision: str) -> None:
        """``POST /v1/devices/{id}/{decision}``: accept, reject or revoke."""
        self._checked(self._send("POST", f"devices/{_part(device_id)}/{decision}"))

    def expect(self, inventory: Json) -> Json:
        """``PUT /v1/expected``: how an inventory differs from what the server knows."""
        return self._json("PUT", "expected", inventory)

    def models(self) -> list[Json]:
        """``GET /v1/models``."""
        return self._list("models")

    def model(self, name_or_digest: str) -> Json:
        """``GET /v1/models/{name_or_digest}``, with its files."""
        return self._json("GET", f"models/{_part(name_or_digest)}")

    def register_model(self, name: str, files: list[Json]) -> str:
        """``POST /v1/models``; the files were uploaded before. Returns the digest."""
        return str(self._json("POST", "models", {"name": name, "files": files})["digest"])

    def runs(self) -> list[Json]:
        """``GET /v1/runs``."""
        return self._list("runs")

    def run(self, run_id: str) -> Json:
        """``GET /v1/runs/{id}``."""
        return self._json("GET", f"runs/{_part(run_id)}")

    def submit_run(self, spec: RunSpec) -> str:
        """``POST /v1/runs``. Returns the id of the new run."""
        return str(self._json("POST", "runs", spec.model_dump(mode="json"))["run_id"])

    def cancel_run(self, run_id: str) -> None:
        """``POST /v1/runs/{id}/cancel``."""
        self._checked(self._send("POST", f"runs/{_part(run_id)}/cancel"))

    def run_files(self, run_id: str) -> list[str]:
        """``GET /v1/runs/{id}/files``: paths in the run's result folder."""
        path = f"runs/{_part(run_id)}/files"
        return [str(name) for name in self._items(self._json("GET", path), "files")]

    def download_run_file(self, run_id: str, name: str, target: Path) -> None:
        """``GET /v1/runs/{id}/files/{name}`` into a file."""
        self._download(f"runs/{_part(run_id)}/files/{_part(name)}", target)

    def download_blob(self, sha256: str, target: Path, *, report: Report | None = None) -> None:
        """``GET /v1/blobs/{sha256}`` into a file.

        Raises:
            ProtocolError: the bytes are not those of the digest.
        """
        self._download(f"blobs/{_part(sha256)}", target, sha256=sha256, report=report)

    def backup(self, target: Path, *, report: Report | None = None) -> None:
        """``POST /v1/backup`` into a file that only its owner can read."""
        self._download("backup", target, method="POST", mode=0o600, report=report)

    def upload_bytes(self, content: bytes) -> StoredEvaluation:
        """Store bytes in the server's blob store."""
        sha256 = hashlib.sha256(content).hexdigest()
        self._upload(io.BytesIO(content), sha256, len(content), report=_silent)
        return StoredEvaluation(sha256=sha256, size_bytes=len(content))

    def upload_file(self, path: Path, *, sha256: str, report: Report | None = None) -> None:
        """Store a file of a known digest; goes on where an earlier upload stopped."""
        with path.open("rb") as stream:
            self._upload(stream, sha256, path.stat().st_size, report=report or _silent)

    def _upload(self, stream: BinaryIO, sha256: str, size_bytes: int, *, report: Report) -> None:
        """``POST /v1/blobs``, then ``PATCH /v1/blobs/{sha256}`` until complete."""
        state = self._json("POST", "blobs", {"sha256": sha256, "size_bytes": size_bytes})
        offset = size_bytes if state.get("state") == "exists" else int(state.get("offset", 0))
        report(offset, size_bytes)
        complete = state.get("state") == "exists"
        while not complete:
            stream.seek(offset)
            answer = self._send(
                "PATCH",
                f"blobs/{sha256}",
                content=stream.read(CHUNK_BYTES),
                headers={"Upload-Offset": str(offset)},
            )
            moved = _next_offset(answer, offset) if answer.status_code in (204, 409) else None
            if moved is None:
                self._checked(answer)
                raise ProtocolError(f"{self._url} did not say how much of an upload it has")
            offset, complete = moved, moved >= size_bytes
            report(offset, size_bytes)

    def _list(self, key: str) -> list[Json]:
        return self._items(self._json("GET", key), key)

    def _items(self, answer: Json, key: str) -> list[Any]:
        items = answer.get(key)
        if not isinstance(items, list):
            raise ProtocolError(f"{self._url} answered without {key!r}: is it a LEGEND server?")
        return items

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Json:
        answer = self._checked(self._send(method, path, json=body))
        value = _json_or_none(answer)
        if not isinstance(value, dict):
            raise ProtocolError(f"{self._url} did not answer with JSON: is it a LEGEND server?")
        return value

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        with self._translated():
            return self._http.request(method, path, **content)

    def _download(
        self,
        path: str,
        target: Path,
        *,
        method: str = "GET",
        mode: int = 0o644,
        sha256: str | None = None,
        report: Report | None = None,
    ) -> None:
        digest, done = hashlib.sha256(), 0
        stream = self._http.stream(method, path)
        with self._translated(), stream as answer, _replacing(target, mode) as f:
            if answer.is_error:
                answer.read()
            self._checked(answer)
            total = int(answer.headers.get("Content-Length", 0))
            for chunk in answer.iter_bytes(CHUNK_BYTES):
                f.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                (report or _silent)(done, total)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise ProtocolError(f"{self._url} sent other bytes than {sha256[:12]}; try again")

    def _checked(self, answer: httpx.Response) -> httpx.Response:
        if not answer.is_success:
            raise _error_of(answer, self._url)
        return answer

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise ConfigError(
                    f"the certificate of {self._url} is not trusted: give the fleet's ca.pem with "
                    "--ca or LEGEND_CA, and use a name that the certificate is for"
                ) from error
            raise ServerUnavailable(
                f"no server answers at {self._url}; start one with broker-server serve"
            ) from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ConfigError(f"{self._url} is no server address; use https://HOST:PORT") from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ServerUnavailable(
                f"{self._url} broke off: {reason.rstrip('.')}; try again, or try https"
            ) from error


def add_model(
    api: OperatorApi, source: str, *, name: str | None, report: Callable[[str, int, int], None]
) -> Json:
    """Upload a base model and register it.

    Args:
        api: the server.
        source: a local folder, or else the id of a model on the Hugging Face hub.
        name: what runs call it; None takes the last part of ``source``.
        report: called with file name, bytes done and bytes in all.

    Raises:
        ConfigError: the folder holds no supported model, or the id leads nowhere.
    """
    folder = Path(source)
    model = read_base_model(folder if folder.is_dir() else _from_hub(source))
    for file in model.files:
        show = partial(report, file.path)
        api.upload_file(model.folder / file.path, sha256=file.sha256, report=show)
    chosen = name or folder.resolve().name
    digest = api.register_model(chosen, [asdict(file) for file in model.files])
    return {"name": chosen, "digest": digest, "size_bytes": model.size_bytes}


def fetch_adapter(api: OperatorApi, run_id: str, folder: Path) -> list[Path]:
    """Download a run's adapter folder, e.g. for PEFT's ``from_pretrained``."""
    names = [name for name in api.run_files(run_id) if name.startswith(_ADAPTER_FOLDER)]
    if not names:
        raise Refused(f"run {run_id} has no adapter yet; wait for its first round")
    targets = [_inside(folder, name[len(_ADAPTER_FOLDER) :]) for name in names]
    for name, target in zip(names, targets, strict=True):
        api.download_run_file(run_id, name, target)
    return targets


def fetch_model(api: OperatorApi, name_or_digest: str, folder: Path) -> None:
    """Download the files of a registered base model."""
    for file in api.model(name_or_digest)["files"]:
        target = _inside(folder, str(file["path"]))
        api.download_blob(str(file["sha256"]), target)


def _believing(ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca))
    except OSError as error:
        raise ConfigError(f"{ca} is no certificate of an authority: {error.strerror}") from error


def _from_hub(model_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - optional
        from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ConfigError(
            f"there is no folder {model_id}; to fetch it from the hub: pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(model_id, allow_patterns=list(_HUB_PATTERNS)))
    except (OSError, ValueError, httpx.HTTPError, HfHubHTTPError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"no folder {model_id}, and the hub does not give it: {reason}"
        ) from error


def _inside(folder: Path, name: str) -> Path:
    """A file below ``folder``; a server must not write elsewhere."""
    target = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ProtocolError(f"the server named a file {name[:80]!r} outside the folder")
    return target


def _error_of(answer: httpx.Response, url: str) -> LegendError:
    """The member of our error tree that an answer's status stands for."""
    body = _json_or_none(answer)
    detail = body.get("detail") if isinstance(body, dict) else None
    text = detail if isinstance(detail, str) and detail else f"HTTP status {answer.status_code}"
    if answer.status_code in (400, 422):
        return ConfigError(text)
    if answer.status_code == 401:
        return Refused(f"{text}: --token or LEGEND_TOKEN")
    if answer.is_client_error:
        return Refused(text)
    return ServerUnavailable(f"the server at {url} failed: {text}")


def _next_offset(answer: httpx.Response, sent_from: int) -> int | None:
    """How much the server has; None when it did not say or nothing moved."""
    value = answer.headers.get("Upload-Offset")
    if value is None:
        body = _json_or_none(answer)
        value = body.get("offset") if isinstance(body, dict) else None
    offset = int(value) if value is not None and str(value).isdecimal() else sent_from
    return offset if offset != sent_from else None


def _json_or_none(answer: httpx.Response) -> object:
    try:
        value: object = answer.json()
    except ValueError:
        return None
    return value


@contextmanager
def _replacing(target: Path, mode: int) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``target`` once it is complete."""
    fresh = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        stream = os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _part(text: str) -> str:
    """A piece of a path, so that no name can lead to another route."""
    return quote(text, safe="")


def _silent(_done: int, _total: int) -> None:
    """For callers that show no progress."""
