"""The hub's cache and the hub itself, and what is said when there are no weights."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from featstore.backbones import describe, digests, fetching, hub
from featstore.backbones.reachable import is_reachable
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.errors import ConfigError, MissingWeightsError, WeightsError

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DINOV3_BASE = "facebook/dinov3-vitb16-pretrain-lvd1689m"


# The hub's cache, and a hub on the loopback device


def fill_cache(cache: Path, repo: str, files: dict[str, bytes]) -> Path:
    """Lay files out as huggingface_hub does: large ones as blobs named by their SHA-256; returns the snapshot."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    for folder in (snapshot, home / "blobs", home / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        large = name.endswith(".safetensors")
        blob = home / "blobs" / (hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest())
        blob.write_bytes(content)
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


TINY_FILES = {path.name: path.read_bytes() for path in TINY_FOLDER.iterdir() if path.suffix != ".md"}


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_cached_snapshot_needs_no_network(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fill_cache(hub_cache, "lab/tiny-net", TINY_FILES)
    monkeypatch.setattr(digests, "sha256", None)  # the blob's name is its digest
    source = describe("hf:lab/tiny-net")
    assert source.name == "tiny-net"
    assert source.weights == {
        "kind": "hub",
        "repo": "lab/tiny-net",
        "revision": COMMIT,
        "digest": hashlib.sha256(TINY_FILES["model.safetensors"]).hexdigest(),
    }
    assert source.origin == f"hub lab/tiny-net at {COMMIT[:12]}, in {snapshot}"
    assert source.processor == json.loads(TINY_FILES["preprocessor_config.json"])
    assert describe("hf:lab/tiny-net", revision=COMMIT) == source
    assert describe("hf:lab/tiny-net", revision="main") == source
    assert str(hub_cache) not in json.dumps([source.weights, source.identity])


def test_same_bytes_are_the_same_identity_from_hub_and_folder(hub_cache: Path) -> None:
    fill_cache(hub_cache, "lab/tiny-net", TINY_FILES)
    cached, local, embedded = describe("hf:lab/tiny-net"), describe(f"hf:{TINY_FOLDER}"), describe("tiny")
    assert cached.identity == local.identity == embedded.identity
    assert len({source.weights["kind"] for source in (cached, local, embedded)}) == 3


def test_random_weights_need_only_the_config(hub_cache: Path) -> None:
    fill_cache(hub_cache, "lab/tiny-net", {"config.json": TINY_FILES["config.json"]})
    assert describe("hf:lab/tiny-net", random_weights=0).weights == describe("tiny-random").weights
    with pytest.raises(
        MissingWeightsError,
        match=r"not whole in this machine's cache \(.* has neither .*\), and the hub cannot be",
    ):
        describe("hf:lab/tiny-net")
    with pytest.raises(MissingWeightsError, match=r"no config\.json from lab/other: ") as caught:
        describe("hf:lab/other", random_weights=0)
    assert "--random-weights" not in str(caught.value)


def test_named_model_in_the_cache_must_be_that_model(hub_cache: Path) -> None:
    fill_cache(hub_cache, "facebook/dinov2-small", TINY_FILES)
    with pytest.raises(WeightsError, match="not that of dinov2-small: family 'dinov2_with_registers' instead of"):
        describe("dinov2-small")


NO_IDS = ["name", "a/b/c", "a b/c", "lab/x..y", "lab/x--y", "lab/x-", "-lab/x", "lab/x.git", f"lab/{'x' * 97}", "é/x"]


@pytest.mark.parametrize("place", NO_IDS)
def test_no_hub_id(place: str, hub_cache: Path) -> None:
    with pytest.raises(ConfigError, match="neither a folder on this machine nor a hub id of the form OWNER/NAME"):
        describe(f"hf:{place}")


@pytest.mark.parametrize(
    "place", [*NO_IDS, "lab/x", "l.a-b_1/x.y-z_2", "a/b", f"lab/{'x' * 96}", "facebook/dinov2-base"]
)
def test_hub_ids_are_those_of_the_hub(place: str) -> None:
    try:
        validate_repo_id(place)
        valid = "/" in place  # a hub id without owner is an old kind that no backbone has
    except HFValidationError:
        valid = False
    if place != "é/x":  # the hub's pattern lets it through, the hub has no such owner
        assert bool(hub.HUB_ID.fullmatch(place)) == valid


class Answer(BaseHTTPRequestHandler):
    """Every request gets the server's status and error code."""

    def do_GET(self) -> None:
        status, code = self.server.answer  # type: ignore[attr-defined]
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"told {code}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def loopback(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A hub that says no; set `answer` to (status, error code)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.requests = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    huggingface_hub.close_session()


@pytest.mark.parametrize("status", [401, 403])
def test_gated(status: int, loopback: ThreadingHTTPServer) -> None:
    loopback.answer = status, "GatedRepo"  # type: ignore[attr-defined]
    with pytest.raises(MissingWeightsError, match="its licence is not accepted by this account") as caught:
        describe("dinov3-base")
    text = str(caught.value)
    for line in (
        f"accept the licence on the hub's page of {DINOV3_BASE}, log in with `hf auth login`",
        f"`featstore fetch dinov3-base` or `hf download {DINOV3_BASE}`",
        "here give the folder that it prints: --model dinov3-base --weights DIR",
        "HF_HOME",
        "--random-weights 0",
    ):
        assert line in text
    asked = [path for path in loopback.requests if path.startswith("/api/models/")]  # type: ignore[attr-defined]
    assert asked == [f"/api/models/{DINOV3_BASE}/revision/main"]  # once: a "no" is not asked for again


def test_unknown_repository(loopback: ThreadingHTTPServer) -> None:
    loopback.answer = 404, "RepoNotFound"  # type: ignore[attr-defined]
    with pytest.raises(
        MissingWeightsError, match=r"hub has no repository 'lab/absent', or it is private.*hf auth login"
    ):
        describe("hf:lab/absent")


def test_unknown_revision(loopback: ThreadingHTTPServer) -> None:
    loopback.answer = 404, "RevisionNotFound"  # type: ignore[attr-defined]
    with pytest.raises(MissingWeightsError, match="'facebook/dinov2-base' has no revision 'v9'; give a branch"):
        describe("dinov2-base", revision="v9")


def test_hub_out_of_order(loopback: ThreadingHTTPServer) -> None:
    loopback.answer = 418, ""  # type: ignore[attr-defined]
    with pytest.raises(MissingWeightsError, match="no weights from facebook/dinov2-base: ") as caught:
        describe("dinov2-base")
    assert "accept the licence" not in str(caught.value)


def test_download_that_breaks_off(loopback: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(repo: str, **options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(
        MissingWeightsError,
        match=r"no room for facebook/dinov2-base in the hub's cache .* \(No space left on device\); make room there, "
        "or point HF_HOME at a larger disk, and run the same line again",
    ):
        hub.fetch("facebook/dinov2-base")

    def broken(repo: str, **options: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(MissingWeightsError, match=r"could not be read \(OSError: \[Errno 5\] Input/output error"):
        hub.fetch("facebook/dinov2-base")


def test_after_a_download_the_folder_is_used(
    loopback: ThreadingHTTPServer, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = huggingface_hub.snapshot_download

    def download(repo: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool = False) -> str:
        asked.append((local_files_only, revision, allow_patterns))
        if local_files_only:
            return real(repo, local_files_only=True)
        return str(fill_cache(hub_cache, repo, TINY_FILES))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fill_cache(hub_cache, "lab/tiny-net", {"config.json": TINY_FILES["config.json"]})  # half a snapshot
    assert describe("hf:lab/tiny-net").identity == describe("tiny").identity
    needed = ["config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.json"]
    older = ["config.json", "preprocessor_config.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    assert asked == [(True, None, needed), (True, None, older), (False, None, ["*.json", "*.safetensors"])]
    describe("hf:lab/tiny-net")
    assert [local for local, *_ in asked[3:]] == [True]


def test_hub_without_safetensors(
    loopback: ThreadingHTTPServer, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = fill_cache(hub_cache, "lab/old-net", {"config.json": TINY_FILES["config.json"]})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(snapshot))
    with pytest.raises(
        MissingWeightsError,
        match=r"the hub does not have them all: .* has neither a \.safetensors file nor pytorch_model\.bin",
    ):
        describe("hf:lab/old-net")


def test_proxy_is_left_to_the_hubs_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    assert not is_reachable("http://127.0.0.1:9")
    assert not is_reachable("nonsense")
    monkeypatch.setenv("no_proxy", "example.org")  # which is no proxy
    assert not is_reachable("http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert not is_reachable("http://127.0.0.1:9")  # of another scheme
    assert is_reachable("https://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not is_reachable("https://127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:9")
    assert is_reachable("http://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    with pytest.raises(MissingWeightsError, match=r"the hub could not be read \(ConnectError: .*\n.*accept the"):
        describe("dinov3-base")
    huggingface_hub.close_session()


OFFLINE = """
import sys, time
cpu = time.process_time()
time.sleep = lambda seconds: sys.exit(f"slept {seconds} s before another try")
from featstore.backbones import describe
from featstore.errors import MissingWeightsError
start = time.perf_counter()
try:
    describe("dinov3-7b")
except MissingWeightsError as error:
    print(time.perf_counter() - start, time.process_time() - cpu)
    print("torch" in sys.modules or "transformers" in sys.modules)
    print(error)
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"HF_HUB_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
        {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://hub.invalid"},
    ],
    ids=["offline", "closed-port", "no-name"],
)
def test_offline_answer_is_quick(environment: dict[str, str], tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", OFFLINE],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    times, heavy, text = run.stdout.split("\n", 2)
    wall, cpu = (float(value) for value in times.split())
    assert cpu < 0.7
    assert wall < 1
    assert heavy == "False"
    assert "no weights from facebook/dinov3-vit7b16-pretrain-lvd1689m: not in this machine's cache, and the hub" in text
    assert f"this one is {tmp_path / 'hub'}" in text
    assert run.stderr == ""


def test_cached_lookup_of_an_absent_revision(hub_cache: Path) -> None:
    fill_cache(hub_cache, "facebook/dinov2-base", TINY_FILES)
    with pytest.raises(
        MissingWeightsError,
        match=rf"in this machine's cache \(it has {COMMIT}, not v9: --revision {COMMIT} takes that one",
    ) as caught:
        describe("dinov2-base", revision="v9")
    assert "`featstore fetch dinov2-base --revision v9`" in str(caught.value)


def test_a_cache_that_does_not_know_its_main_revision(hub_cache: Path) -> None:
    snapshot = fill_cache(hub_cache, "lab/tiny-net", TINY_FILES)  # as one that was fetched by its commit
    (snapshot.parents[1] / "refs" / "main").unlink()
    with pytest.raises(
        MissingWeightsError,
        match=rf"\(it has {COMMIT}, and not which of them is main: --revision {COMMIT} takes that one\)",
    ) as caught:
        describe("hf:lab/tiny-net")
    assert "here give the folder that it prints: --model hf:DIR" in str(caught.value)
    assert describe("hf:lab/tiny-net", revision=COMMIT).identity == describe("tiny").identity


def test_an_empty_cache_folder(hub_cache: Path) -> None:
    (hub_cache / "models--lab--tiny-net").mkdir(parents=True)
    with pytest.raises(
        MissingWeightsError, match="not whole in this machine's cache \\(nothing whole is there\\), and the"
    ):
        describe("hf:lab/tiny-net")


@pytest.fixture
def black_hole() -> Iterator[tuple[str, int]]:
    """An address that answers no connection, as one whose packets are dropped."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):  # more than wait in line
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(server.getsockname())
        yield server.getsockname()


def test_dropped_packets_are_an_answer_too(black_hole: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    held = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", black_hole)] * 8

    def look_up(*asked: object, **named: object) -> list[tuple[object, ...]]:
        return held

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    started = time.monotonic()
    assert not is_reachable("http://hub.test")
    assert time.monotonic() - started < 1  # one deadline for all the addresses
    with socket.create_server(("127.0.0.1", 0)) as server:
        held.append((*held[0][:4], server.getsockname()))
        assert is_reachable("http://hub.test", 10.0)
        assert time.monotonic() - started < 2  # the one that answers is enough


def test_a_name_server_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **named: done.wait(20) and [])
    started = time.monotonic()
    assert not is_reachable("http://hub.test")
    assert time.monotonic() - started < 1
    done.set()


def test_silence_is_told_with_what_helps(
    black_hole: tuple[str, int], hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = f"http://127.0.0.1:{black_hole[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with pytest.raises(
        MissingWeightsError,
        match=rf"{endpoint} did not answer within 0\.\d s \(`featstore fetch` waits longer, HF_HUB_OFFLINE=1 not even",
    ):
        describe("dinov3-7b")
    monkeypatch.setattr(fetching, "PATIENT_SECONDS", 0.1)
    with pytest.raises(
        MissingWeightsError, match=rf"the hub cannot be reached: {endpoint} does not answer\."
    ) as caught:
        fetching.fetch_model("dinov3-7b")
    assert "--random-weights" not in str(caught.value)
