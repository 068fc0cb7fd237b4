"""Digests of weights and their cache, the hub's cache and the hub, and what is said when there are no weights."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from backbone_conformance import safetensors_bytes, shards
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from featstore.backbones import describe, hub, weights
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.errors import ConfigError, MissingWeightsError, WeightsError

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DINOV3_BASE = "facebook/dinov3-vitb16-pretrain-lvd1689m"


def never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on hashing a file fails."""

    def fail(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(weights, "sha256", fail)


# Digests


def test_digest_of_one_file_is_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    file.write_bytes(safetensors_bytes(b"abc"))
    assert weights.digest_files((file,)) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (
        describe("tiny").weights["digest"]
        == hashlib.sha256((TINY_FOLDER / "model.safetensors").read_bytes()).hexdigest()
    )


def test_digest_of_shards_covers_names_and_bytes(tmp_path: Path) -> None:
    names = ("model-1.safetensors", "model-2.safetensors")
    folders = [
        shards(tmp_path / "a", dict(zip(names, (b"x", b"y")))),
        shards(tmp_path / "b", dict(zip(reversed(names), (b"y", b"x")))),
        shards(tmp_path / "c", dict(zip(names, (b"y", b"x")))),
        shards(tmp_path / "d", dict(zip(names, (b"x", b"z")))),
    ]
    digests = [weights.digest_files(weights.find_files(folder).files) for folder in folders]
    lines = "".join(f"{name} {hashlib.sha256((folders[0] / name).read_bytes()).hexdigest()}\n" for name in names)
    assert digests[0] == digests[1] == hashlib.sha256(lines.encode()).hexdigest()
    assert len(set(digests)) == 3


def test_cached_digest_does_not_read_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "w.safetensors", tmp_path / "cache" / "digests.json"
    file.write_bytes(safetensors_bytes(b"abc"))
    first = weights.digest_files((file,), cache)
    assert json.loads(cache.read_text())[str(file)]["sha256"] == first
    with monkeypatch.context() as patch:
        never_read(patch)
        assert weights.digest_files((file,), cache) == first
        link = tmp_path / "link.safetensors"
        link.symlink_to(file)
        assert weights.digest_files((link,), cache) == first
        with pytest.raises(AssertionError, match="was read"):
            weights.digest_files((file,), tmp_path / "other.json")


def rewrite(file: Path) -> None:
    file.write_bytes(safetensors_bytes(b"xyz"))
    os.utime(file, ns=(1, 1))


def replace_keeping_time(file: Path) -> None:
    status, other = file.stat(), file.with_suffix(".new")
    other.write_bytes(safetensors_bytes(b"xyz"))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, file)


def grow(file: Path) -> None:
    status = file.stat()
    file.write_bytes(safetensors_bytes(b"abcd"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [rewrite, replace_keeping_time, grow], ids=["mtime", "inode", "size"])
def test_changed_file_is_read_again(change: Callable[[Path], None], tmp_path: Path) -> None:
    file, cache = tmp_path / "w.safetensors", tmp_path / "digests.json"
    file.write_bytes(safetensors_bytes(b"abc"))
    first = weights.digest_files((file,), cache)
    change(file)
    second = weights.digest_files((file,), cache)
    assert second == hashlib.sha256(file.read_bytes()).hexdigest() != first
    assert weights.digest_files((file,), cache) == second


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\xff", "KEYED"])
def test_damaged_cache_is_made_anew(content: str, tmp_path: Path) -> None:
    file, cache = tmp_path / "w.safetensors", tmp_path / "digests.json"
    file.write_bytes(safetensors_bytes(b"abc"))
    cache.write_text(json.dumps({str(file): "no entry"}) if content == "KEYED" else content, encoding="latin-1")
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert weights.digest_files((file,), cache) == expected
    assert json.loads(cache.read_text())[str(file)]["sha256"] == expected


def test_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    file, blocked = tmp_path / "w.safetensors", tmp_path / "file"
    file.write_bytes(safetensors_bytes(b"abc"))
    blocked.write_text("a file where a folder would have to be")
    assert weights.digest_files((file,), blocked / "digests.json") == weights.digest_files((file,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "w.safetensors"]


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
    never_read(monkeypatch)  # the blob's name is its digest
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


def test_only_links_into_blobs_are_taken_at_their_name(tmp_path: Path) -> None:
    name = "0" * 64
    for folder in ("blobs", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"x")
        (tmp_path / f"{folder}.link").symlink_to(tmp_path / folder / name)
    (tmp_path / "blobs" / "short").write_bytes(b"x")
    (tmp_path / "short.link").symlink_to(tmp_path / "blobs" / "short")
    assert weights.blob_digest(tmp_path / "blobs.link") == name
    assert weights.blob_digest(tmp_path / "other.link") is None
    assert weights.blob_digest(tmp_path / "short.link") is None
    assert weights.blob_digest(tmp_path / "blobs" / name) is None


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
        match=r"not whole in this machine's cache \(.* has no \.safetensors file.*\), and the hub cannot be",
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
        f"`hf download {DINOV3_BASE}`",
        "--weights DIR",
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
    with pytest.raises(MissingWeightsError, match=r"could not be read \(OSError: \[Errno 28\] No space left"):
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
    assert asked == [(True, None, ["*.json", "*.safetensors"]), (False, None, ["*.json", "*.safetensors"])]
    describe("hf:lab/tiny-net")
    assert [local for local, *_ in asked[2:]] == [True]


def test_hub_without_safetensors(
    loopback: ThreadingHTTPServer, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = fill_cache(hub_cache, "lab/old-net", {"config.json": TINY_FILES["config.json"]})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(snapshot))
    with pytest.raises(MissingWeightsError, match=r"the hub does not have them all: .* has no \.safetensors file"):
        describe("hf:lab/old-net")


def test_proxy_is_left_to_the_hubs_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    assert not hub._is_reachable("http://127.0.0.1:9")
    assert not hub._is_reachable("nonsense")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert hub._is_reachable("http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    with pytest.raises(MissingWeightsError, match=r"the hub could not be read \(ConnectError: .*\n.*accept the"):
        describe("dinov3-base")
    huggingface_hub.close_session()


OFFLINE = """
import sys, time
start, cpu = time.perf_counter(), time.process_time()
time.sleep = lambda seconds: sys.exit(f"slept {seconds} s before another try")
from featstore.backbones import describe
from featstore.errors import MissingWeightsError
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
    # 0.2 s of work; the wall clock has room for a machine that is busy with other things.
    assert cpu < 0.7
    assert wall < 3
    assert heavy == "False"
    assert "no weights from facebook/dinov3-vit7b16-pretrain-lvd1689m: not in this machine's cache, and the hub" in text
    assert f"this one is {tmp_path / 'hub'}" in text
    assert run.stderr == ""


def test_cached_lookup_of_an_absent_revision(hub_cache: Path) -> None:
    fill_cache(hub_cache, "facebook/dinov2-base", TINY_FILES)
    with pytest.raises(MissingWeightsError, match=r"not whole in this machine's cache \(not in this machine's cache\)"):
        describe("dinov2-base", revision="v9")
