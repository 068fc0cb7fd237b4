"""SHA-256 of weight files: what is read, what is remembered, what is believed, and one reader at a time."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from backbone_conformance import safetensors_bytes, shards
from huggingface_hub._local_folder import write_download_metadata

from featstore.backbones import describe, digests, weights
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.errors import WeightsError

ROOT = Path(__file__).resolve().parent.parent


def never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on hashing a file fails."""

    def fail(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(digests, "sha256", fail)


# Digests


def test_digest_of_one_file_is_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    file.write_bytes(safetensors_bytes(b"abc"))
    assert digests.digest_files((file,)) == hashlib.sha256(file.read_bytes()).hexdigest()
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
    found = [digests.digest_files(weights.find_files(folder).files) for folder in folders]
    lines = "".join(f"{name} {hashlib.sha256((folders[0] / name).read_bytes()).hexdigest()}\n" for name in names)
    assert found[0] == found[1] == hashlib.sha256(lines.encode()).hexdigest()
    assert len(set(found)) == 3


def test_cached_digest_does_not_read_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "w.safetensors", tmp_path / "cache" / "digests.json"
    file.write_bytes(safetensors_bytes(b"abc"))
    first = digests.digest_files((file,), cache)
    assert json.loads(cache.read_text())[str(file)]["sha256"] == first
    with monkeypatch.context() as patch:
        never_read(patch)
        assert digests.digest_files((file,), cache) == first
        link = tmp_path / "link.safetensors"
        link.symlink_to(file)
        assert digests.digest_files((link,), cache) == first
        with pytest.raises(AssertionError, match="was read"):
            digests.digest_files((file,), tmp_path / "other.json")


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
    first = digests.digest_files((file,), cache)
    change(file)
    second = digests.digest_files((file,), cache)
    assert second == hashlib.sha256(file.read_bytes()).hexdigest() != first
    assert digests.digest_files((file,), cache) == second


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\xff", "KEYED"])
def test_damaged_cache_is_made_anew(content: str, tmp_path: Path) -> None:
    file, cache = tmp_path / "w.safetensors", tmp_path / "digests.json"
    file.write_bytes(safetensors_bytes(b"abc"))
    cache.write_text(json.dumps({str(file): "no entry"}) if content == "KEYED" else content, encoding="latin-1")
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digests.digest_files((file,), cache) == expected
    assert json.loads(cache.read_text())[str(file)]["sha256"] == expected


def test_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    file, blocked = tmp_path / "w.safetensors", tmp_path / "file"
    file.write_bytes(safetensors_bytes(b"abc"))
    blocked.write_text("a file where a folder would have to be")
    assert digests.digest_files((file,), blocked / "digests.json") == digests.digest_files((file,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "w.safetensors"]


def test_only_links_into_blobs_are_taken_at_their_name(tmp_path: Path) -> None:
    name = "0" * 64
    for folder in ("blobs", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"x")
        (tmp_path / f"{folder}.link").symlink_to(tmp_path / folder / name)
    (tmp_path / "blobs" / "short").write_bytes(b"x")
    (tmp_path / "short.link").symlink_to(tmp_path / "blobs" / "short")
    assert digests.blob_digest(tmp_path / "blobs.link") == name
    assert digests.blob_digest(tmp_path / "other.link") is None
    assert digests.blob_digest(tmp_path / "short.link") is None
    assert digests.blob_digest(tmp_path / "blobs" / name) is None


# What `hf download --local-dir` writes


def downloaded(folder: Path, name: str, etag: str) -> Path:
    """A file in a folder that the hub's client wrote, with the client's own note."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(safetensors_bytes(b"abc"))
    write_download_metadata(folder, name, "0" * 40, etag)
    return file


@pytest.mark.parametrize("name", ["model.safetensors", "vision/model.safetensors"])
def test_note_of_a_download_is_believed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = downloaded(tmp_path, name, "a" * 64)
    monkeypatch.chdir(tmp_path)
    assert digests.file_digest(file) == digests.file_digest(Path(name)) == "a" * 64
    assert digests.digest_files((file,)) == "a" * 64


def test_note_of_a_download_holds_while_the_file_does(tmp_path: Path) -> None:
    file = downloaded(tmp_path, "model.safetensors", "a" * 64)
    note = tmp_path / digests.METADATA / "model.safetensors.metadata"
    text = note.read_text()
    later = float(text.split()[2]) + 1
    os.utime(file, (later, later))
    true = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digests.file_digest(file) == true
    os.utime(file, (1, 1))
    assert digests.file_digest(file) == "a" * 64
    for other in (text.replace("a" * 64, "b" * 40), "", "x", "\xff\n\n\n", f"{'0' * 40}\n{'a' * 64}\nsoon\n"):
        note.write_text(other, encoding="latin-1")
        assert digests.file_digest(file) == true


# Sidecars


def with_sidecar(folder: Path, text: str) -> Path:
    file = folder / "w.safetensors"
    file.write_bytes(safetensors_bytes(b"abc"))
    os.utime(file, (1, 1))
    (folder / "w.safetensors.sha256").write_text(text)
    return file


A = "a" * 64


@pytest.mark.parametrize(
    "text",
    [
        f"{A}  w.safetensors\n",
        f"{A} *w.safetensors\n",
        f"{A.upper()}  ./w.safetensors",
        f"{A}\n",
        f"\ufeff{A}  w.safetensors\r\n",
        f"SHA256 (w.safetensors) = {A}\n",
        f"SHA256 (other.bin) = {'b' * 64}\nSHA256 (./w.safetensors) = {A.upper()}\n",
        f"{'b' * 64}  other.bin\n{A}  /data/w.safetensors\n\n",
        f"{A}  w.safetensors\n{A}  w.safetensors\n",
    ],
)
def test_sidecar_is_believed(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = with_sidecar(tmp_path, text)
    never_read(monkeypatch)
    assert digests.digest_files((file,), tmp_path / "cache.json") == A
    assert not (tmp_path / "cache.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold lines of `sha256sum`, a digest and a file name; write it by `sha256sum w.safetensors > "),
        ("b" * 40, "must hold lines of `sha256sum`"),
        (f"MD5 (w.safetensors) = {'a' * 32}", "must hold lines of `sha256sum`"),
        (f"SHA256 (v.safetensors) = {A}", "must give one digest of w.safetensors; it gives 0, and names v.safetensors"),
        ("version https://git-lfs.github.com/spec/v1", "must hold lines of `sha256sum`"),
        ("x" * (digests.LARGEST_SIDECAR + 1), "must hold lines of `sha256sum`, it has 1048577 bytes; write it by"),
        (f"{A}  v.safetensors\n", r"must give one digest of w\.safetensors; it gives 0, and names v\.safetensors; "),
        (f"{A}  w.safetensors\n{'b' * 64}  w.safetensors\n", "must give one digest of w.safetensors; it gives 2"),
        (f"{A}\n{A}\n", "must give one digest of w.safetensors"),
    ],
    ids=["empty", "sha1", "md5", "bsd", "pointer", "long", "other", "two", "bare"],
)
def test_sidecar_that_says_nothing_of_the_file(text: str, message: str, tmp_path: Path) -> None:
    file = with_sidecar(tmp_path, text)
    with pytest.raises(WeightsError, match=message):
        digests.file_digest(file)


def test_sidecar_older_than_its_file_is_checked(tmp_path: Path) -> None:
    file = with_sidecar(tmp_path, f"{A}  w.safetensors\n")
    os.utime(file, (2e9, 2e9))
    true = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match=rf"has the SHA-256 {true}, and w\.safetensors\.sha256 beside it says {A}; "):
        digests.file_digest(file)
    (tmp_path / "w.safetensors.sha256").write_text(f"{true}  w.safetensors\n")
    assert digests.file_digest(file) == true


def test_a_file_copied_over_with_its_old_date_is_checked(tmp_path: Path) -> None:
    file = with_sidecar(tmp_path, f"{A}  w.safetensors\n")
    other = tmp_path / "other" / file.name
    other.parent.mkdir()
    other.write_bytes(safetensors_bytes(b"xyz"))
    os.utime(other, (1, 1))
    true = hashlib.sha256(other.read_bytes()).hexdigest()
    shutil.copy2(other, file)
    with pytest.raises(WeightsError, match=rf"has the SHA-256 {true}, and w\.safetensors\.sha256 beside it says {A}; "):
        digests.file_digest(file)


# Locks

HASH = """
import sys
from pathlib import Path
from featstore.backbones import digests
real = digests.sha256
def slow(path):
    with open(sys.argv[3], "a") as log:
        log.write("read\\n")
    import time
    time.sleep(0.5)
    return real(path)
digests.sha256 = slow
print(digests.digest_files((Path(sys.argv[1]),), Path(sys.argv[2])))
"""


def test_of_several_processes_one_hashes(tmp_path: Path) -> None:
    file, cache, log = tmp_path / "w.safetensors", tmp_path / "cache" / "weights.json", tmp_path / "log"
    file.write_bytes(safetensors_bytes(b"abc"))
    line = [sys.executable, "-c", HASH, str(file), str(cache), str(log)]
    running = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {process.communicate()[0].strip() for process in running}
    assert said == {hashlib.sha256(file.read_bytes()).hexdigest()}
    assert log.read_text() == "read\n"


def test_entries_of_several_files_stay(tmp_path: Path) -> None:
    cache = tmp_path / "weights.json"
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
        digests.file_digest(tmp_path / name, cache)
    assert set(json.loads(cache.read_text())) == {str(tmp_path / "a"), str(tmp_path / "b")}
    digests.remember(cache, "more", {"x": 1})
    assert digests.recall(cache, "more") == {"x": 1}
    assert digests.recall(cache, "less") is digests.recall(None, "more") is None


def test_a_process_that_stands_still_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file, cache = tmp_path / "w.safetensors", tmp_path / "weights.json"
    file.write_bytes(safetensors_bytes(b"abc"))
    with open(f"{cache}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert digests.file_digest(file, cache) == hashlib.sha256(file.read_bytes()).hexdigest()
    with digests.reading_lock((file,), smallest=0) as first, digests.reading_lock((file,), smallest=0) as second:
        assert (first, second) == (True, False)


def test_first_reader_reads_alone_and_the_rest_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"abc")
    entered, done, together = threading.Event(), threading.Event(), threading.Barrier(3)
    order: list[str] = []

    def first() -> None:
        with digests.reading_lock((file,), smallest=0) as is_first:
            assert is_first
            entered.set()
            done.wait(10)
            order.append("first")

    def other() -> None:
        with digests.reading_lock((file,), smallest=0) as is_first:
            order.append("other")
            assert not is_first
            together.wait(10)  # all three are inside at one time

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(first)]
        entered.wait(10)
        running += [pool.submit(other) for _ in range(3)]
        time.sleep(0.2)
        assert order == []
        done.set()
        for future in running:
            future.result()
    assert order == ["first", "other", "other", "other"]


def test_small_files_and_places_without_locks_wait_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"abc")
    monkeypatch.setattr(tempfile, "tempdir", str(file))  # where no file can be made
    for smallest in (4, 0):
        with digests.reading_lock((file,), smallest=smallest) as a, digests.reading_lock((file,), smallest=0) as b:
            assert a
            assert b
