"""`featstore fetch`: weights ahead of time, checked byte by byte, and the lines for a machine without a network."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, serving
from huggingface_hub import constants

from cli.backbones import fetch
from featstore.backbones import describe, fetching, hub
from featstore.backbones.fetching import choose_files, fetch_model, find_target
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.errors import ConfigError, MissingWeightsError, UnknownNameError, WeightsError

ROOT = Path(__file__).resolve().parent.parent
REPO = "lab/tiny-net"
TINY_FILES = {path.name: path.read_bytes() for path in sorted(TINY_FOLDER.iterdir())}
OTHERS = {
    "flax_model.msgpack": b"x",
    "pytorch_model.bin": b"y",
    "onnx/model.safetensors": b"z",
    "onnx/config.json": b"",
}
WEIGHTS = hashlib.sha256(TINY_FILES["model.safetensors"]).hexdigest()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def server(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(REPO, {**TINY_FILES, **OTHERS}, monkeypatch) as found:
        yield found


def blob(cache: Path) -> Path:
    return cache / "models--lab--tiny-net" / "blobs" / WEIGHTS


def test_fetch_brings_one_form_of_the_weights_and_checks_it(server: Hub, hub_cache: Path) -> None:
    told: list[tuple[int, int]] = []
    found = fetch_model(f"hf:{REPO}", advance=lambda done, total: told.append((done, total)))
    size = len(TINY_FILES["model.safetensors"])
    assert set(found.files) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert found.files["model.safetensors"] == (size, WEIGHTS)
    assert found.files["config.json"] == (len(TINY_FILES["config.json"]), None)
    assert (found.commit, found.checked, found.num_bytes) == (COMMIT, True, sum(s for s, _ in found.files.values()))
    assert told == [(size, size)]
    assert (found.folder / "model.safetensors").resolve() == blob(hub_cache)
    gets = [path for method, path in server.asked if method == "GET" and "/resolve/" in path]
    assert sorted(path.rpartition("/")[2] for path in gets) == sorted(found.files)
    assert describe(f"hf:{REPO}").identity == describe("tiny").identity
    # Again: nothing is downloaded twice.
    server.asked.clear()
    assert fetch_model(f"hf:{REPO}", COMMIT) == found
    assert not [path for method, path in server.asked if method == "GET" and "/resolve/" in path]


def test_printed_lines_work_where_there_is_no_network(
    server: Hub, hub_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(f"hf:{REPO}", revision=None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{REPO} at {COMMIT}: 3 files, 3.82 MB; sizes and digests are the hub's"
    shared, copy, run = lines[3].strip(), lines[5].strip(), lines[6].strip()
    assert shared == (
        f"HF_HUB_CACHE={hub_cache} HF_HUB_OFFLINE=1 featstore extract --model hf:{REPO} --revision {COMMIT}"
    )
    assert copy == f"rsync -aL {lines[1].strip()}/ HOST:DIR/"
    assert run == "HF_HUB_OFFLINE=1 featstore extract --model hf:DIR"
    copied = shutil.copytree(lines[1].strip(), tmp_path / "copied")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    assert describe(f"hf:{REPO}", revision=COMMIT).identity == describe(f"hf:{copied}").identity
    fetch(f"hf:{REPO}", revision=COMMIT, json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["checked"] == "cache"
    assert facts["files"]["model.safetensors"]["sha256"] == WEIGHTS
    assert facts["shared_cache"] == shared
    fetch(f"hf:{REPO}", revision=None)
    assert "no network: digests are those that the cache states" in capsys.readouterr().out
    assert server.asked == []


def test_lines_of_a_named_model(tmp_path: Path) -> None:
    target = find_target("facebook/dinov2-base")
    assert target == find_target("dinov2-base") == find_target("hf:facebook/dinov2-base")
    found = fetching.Fetched(target=target, commit="c", folder=Path("/s"), cache=Path("/h"), files={}, checked=True)
    assert found.shared_line.endswith("featstore extract --model dinov2-base --revision c")
    assert found.copied_lines[1] == "HF_HUB_OFFLINE=1 featstore extract --model dinov2-base --weights DIR"


def test_damaged_bytes_are_told(server: Hub, hub_cache: Path) -> None:
    fetch_model(f"hf:{REPO}")
    content = bytearray(TINY_FILES["model.safetensors"])
    content[-1] ^= 1
    blob(hub_cache).write_bytes(content)
    with pytest.raises(
        WeightsError, match=rf"has the SHA-256 .*, it should be {WEIGHTS}; remove {blob(hub_cache)} and"
    ):
        fetch_model(f"hf:{REPO}")
    blob(hub_cache).write_bytes(content[:-1])
    with pytest.raises(WeightsError, match=r"has \d+ bytes, the hub's has \d+; remove .* and run the same line again"):
        fetch_model(f"hf:{REPO}")
    blob(hub_cache).unlink()
    fetch_model(f"hf:{REPO}")


def test_pointers_in_place_of_weights(server: Hub) -> None:
    server.files["model.safetensors"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n" * 3
    with pytest.raises(MissingWeightsError, match=r"no safetensors file .* a Git LFS pointer or a download cut short"):
        fetch_model(f"hf:{REPO}")


@pytest.mark.parametrize("status", [401, 403])
def test_gated(status: int, server: Hub) -> None:
    server.refused = status, "GatedRepo"
    with pytest.raises(MissingWeightsError, match="its licence is not accepted by this account") as caught:
        fetch_model(f"hf:{REPO}", COMMIT)
    assert f"run `featstore fetch hf:{REPO} --revision {COMMIT}` or `hf download" in str(caught.value)


def test_unknown_revision_and_repository(server: Hub) -> None:
    with pytest.raises(MissingWeightsError, match=f"'{REPO}' has no revision 'v9'; give a branch, tag or commit"):
        fetch_model(f"hf:{REPO}", "v9")
    with pytest.raises(MissingWeightsError, match="the hub has no repository 'lab/absent', or it is private"):
        fetch_model("hf:lab/absent")


def test_full_disk(server: Hub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, 1000))
    with pytest.raises(
        MissingWeightsError, match=r"needs 0\.0 GB more in the hub's cache .*, where 0\.0 GB are free; make"
    ):
        fetch_model(f"hf:{REPO}")


def test_disk_that_fills_up_meanwhile(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object, **named: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(MissingWeightsError, match=rf"no room for {REPO} in the hub's cache .*No space left on device"):
        fetch_model(f"hf:{REPO}")


def test_weights_of_another_model(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        serving("facebook/dinov2-small", dict(TINY_FILES), monkeypatch),
        pytest.raises(WeightsError, match=r"config\.json is not that of dinov2-small: family"),
    ):
        fetch_model("dinov2-small")


def test_what_cannot_be_fetched() -> None:
    with pytest.raises(ConfigError, match="tiny has no weights on the hub: there is nothing to fetch"):
        fetch_model("tiny")
    with pytest.raises(ConfigError, match=r"'timm:vit_tiny': say which weights, NAME\.TAG, such as timm:vit_base"):
        fetch_model("timm:vit_tiny")
    assert find_target("timm:vit_tiny.x").repo == "timm/vit_tiny.x"
    with pytest.raises(ConfigError, match="'nets:make' brings its own weights; fetch takes a model's name or hf:"):
        fetch_model("nets:make")
    with pytest.raises(ConfigError, match="is a folder on this machine, not a hub id; there is nothing to fetch"):
        fetch_model(f"hf:{TINY_FOLDER}")
    with pytest.raises(ConfigError, match="'a b' is no hub id of the form OWNER/NAME"):
        fetch_model("hf:a b")
    with pytest.raises(UnknownNameError, match="unknown backbone 'dinov4'"):
        fetch_model("dinov4")


def test_which_files_are_chosen() -> None:
    shards = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    index = "model.safetensors.index.json"
    assert choose_files(["config.json", "README.md", *shards, index], ()) == ["config.json", *shards, index]
    assert choose_files(["model.safetensors", "open_clip_model.safetensors"], ()) == ["model.safetensors"]
    assert choose_files(["other.safetensors", "x.bin"], ()) == ["other.safetensors"]
    assert choose_files(["model.safetensors", "x.bin", "a.json"], ("x.bin",)) == ["x.bin", "a.json"]
    torch_shards = [f"pytorch_model-{i}-of-00002.bin" for i in ("00001", "00002")]
    torch_index = "pytorch_model.bin.index.json"
    assert choose_files(["pytorch_model.bin", "training_args.bin", "tf_model.h5"], ()) == ["pytorch_model.bin"]
    assert choose_files([*torch_shards, torch_index, "x.bin"], ()) == [*torch_shards, torch_index]
    assert choose_files(["model.safetensors", *torch_shards, "pytorch_model.bin"], ()) == ["model.safetensors"]
    with pytest.raises(
        MissingWeightsError,
        match=r"has no \.safetensors file and no pytorch_model\.bin, it has x\.bin, pytorch_model-00001-of-00002\.bin; "
        "give another --revision",
    ):
        choose_files(["config.json", "x.bin", torch_shards[0]], ())
    with pytest.raises(MissingWeightsError, match=r"has no x\.bin, it has model\.safetensors; give another"):
        choose_files(["model.safetensors"], ("x.bin",))


def test_weights_that_are_no_safetensors(server: Hub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["pytorch_model.bin"] = b"weights"
    folder = hub.fetch(REPO, files=("pytorch_model.bin",))
    assert (folder / "pytorch_model.bin").read_bytes() == b"weights"
    assert not (folder / "model.safetensors").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch(REPO, files=("pytorch_model.bin",)) == folder
    with pytest.raises(MissingWeightsError, match=r"not whole in this machine's cache \(no other\.bin in"):
        hub.fetch(REPO, files=("other.bin",))


WATCHED = """
import os, sys
touched = []
def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return
    elif event not in ["os." + name for name in "mkdir remove rename link symlink utime chmod rmdir truncate".split()]:
        return
    touched.extend(str(item) for item in arguments if str(item).startswith(os.environ["HF_HUB_CACHE"]))
sys.addaudithook(watch)
from featstore.backbones import describe
for revision in (None, sys.argv[2]):
    source = describe(sys.argv[1], revision=revision)
assert touched == [], touched
print(source.weights["digest"])
"""


def test_a_cache_that_may_only_be_read(server: Hub, hub_cache: Path, tmp_path: Path) -> None:
    fetch_model(f"hf:{REPO}")
    for path in [hub_cache, *hub_cache.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.lstat().st_mtime_ns for path in [hub_cache, *hub_cache.rglob("*")]}
    # Root may write all the same, so that every call that would is listened for.
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", WATCHED, f"hf:{REPO}", COMMIT],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout.strip()) == (0, WEIGHTS), run.stderr
    assert {path: path.lstat().st_mtime_ns for path in [hub_cache, *hub_cache.rglob("*")]} == before
