"""A hub on the loopback device: one repository, its listing and its files, as huggingface_hub asks for them."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")


class Hub(ThreadingHTTPServer):
    """`files` by name; `refused` is (status, error code) for files, `sent` replaces the bytes of one on the way."""

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repo, self.files = repo, files
        self.refused: tuple[int, str] | None = None
        self.sent: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []

    def entry(self, name: str) -> dict[str, object]:
        content = self.files[name]
        facts: dict[str, object] = {"size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
        if name.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            facts["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
        return facts


class Answer(BaseHTTPRequestHandler):
    """What the hub answers."""

    server: Hub

    def do_GET(self) -> None:
        hub, path = self.server, urlsplit(self.path).path
        hub.asked.append((self.command, path))
        if path.startswith(f"/api/models/{hub.repo}/tree/"):
            self._json(
                [{"type": "file", "path": name, "oid": "0" * 40, **_tree(hub.entry(name))} for name in hub.files]
            )
        elif path in (f"/api/models/{hub.repo}", *(f"/api/models/{hub.repo}/revision/{x}" for x in ("main", COMMIT))):
            siblings = [{"rfilename": name, **hub.entry(name)} for name in hub.files]
            self._json({"id": hub.repo, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/api/models/{hub.repo}/revision/"):
            self._refuse(404, "RevisionNotFound")
        elif path.startswith(f"/{hub.repo}/resolve/"):
            self._file(path.partition(f"/resolve/{COMMIT}/")[2])
        else:
            self._refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def _file(self, name: str) -> None:
        hub = self.server
        if hub.refused is not None and name.endswith(LARGE):
            self._refuse(*hub.refused)
            return
        content, facts = hub.sent.get(name, hub.files[name]), hub.entry(name)
        etag = facts["lfs"]["sha256"] if "lfs" in facts else facts["blobId"]  # type: ignore[index]
        self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(facts["size"])})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": f"told {code}"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


def _tree(entry: dict[str, object]) -> dict[str, object]:
    lfs = entry.get("lfs")
    if not isinstance(lfs, dict):
        return {"size": entry["size"]}
    return {"size": entry["size"], "lfs": {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 130}}


@contextlib.contextmanager
def serving(repo: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub asks in place of the real one."""
    hub = Hub(repo, files)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    address = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    huggingface_hub.close_session()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
        huggingface_hub.close_session()
