"""Files that are whole or absent: sealing, replacing, first-wins publication, and what a refusing disk is told as."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Barrier, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore import files
from featstore.errors import CorruptError, StoreError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def encodable(value: object) -> bool:
    try:
        files.canonical_json(value)
    except UnicodeEncodeError:  # lone surrogates, which no file name or reason that we write holds
        return False
    return True


@given(st.dictionaries(st.text().filter(lambda key: key != "digest"), JSON, max_size=4).filter(encodable))
def test_what_is_sealed_comes_back(value: dict[str, object]) -> None:
    assert files.unseal(files.sealed(value), Path("x")) == json.loads(files.canonical_json(value))


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert files.canonical_json({"b": 1, "a": [1, "é"]}) == '{"a":[1,"é"],"b":1}'.encode()
    assert files.digest({"b": 1, "a": 2}) == files.digest({"a": 2, "b": 1}) != files.digest({"a": 2, "b": 2})
    assert files.digest(b"abc").startswith("ba7816bf8f01cfea")  # FIPS 180-2, appendix B.1


def test_every_flipped_bit_of_a_sealed_file_is_found_or_changes_nothing() -> None:
    value = {"start": 0, "names": ["a", "b"], "share": 0.5, "text": "é"}
    data = files.sealed(value)
    found = 0
    for position in range(len(data) * 8):
        raw = bytearray(data)
        raw[position // 8] ^= 1 << position % 8
        try:
            assert files.unseal(bytes(raw), Path("x")) == value
        except CorruptError:
            found += 1
    assert found > 0.9 * len(data) * 8


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"{", b"{}", b"\xff\xfe", b'{"digest": 3', b'"text"'])
def test_what_is_no_sealed_file_is_told(data: bytes) -> None:
    with pytest.raises(CorruptError, match=r"x.json: not a sealed JSON file .*; restore it from a copy"):
        files.unseal(data, Path("x.json"))


def test_a_changed_value_is_told() -> None:
    data = files.sealed({"rows": 12}).replace(b"12", b"13")
    with pytest.raises(CorruptError, match=r"x.json: content does not match its digest; restore it from a copy"):
        files.unseal(data, Path("x.json"))


def test_retry_repeats_what_passes_by_itself_and_nothing_else() -> None:
    calls: list[int] = []

    def flaky(code: int, failures: int) -> str:
        calls.append(code)
        if len(calls) <= failures:
            raise OSError(code, os.strerror(code))
        return "read"

    assert files.retry(lambda: flaky(errno.EIO, 3), pause=0.0) == "read"
    assert len(calls) == 4
    calls.clear()
    with pytest.raises(OSError, match="Stale"):
        files.retry(lambda: flaky(errno.ESTALE, 9), pause=0.0)
    assert len(calls) == 4
    calls.clear()
    with pytest.raises(OSError, match="No space"):
        files.retry(lambda: flaky(errno.ENOSPC, 9), pause=0.0)
    assert len(calls) == 1


def test_write_atomic_replaces_whole_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b" / "x"
    files.write_atomic(path, b"one")
    files.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"

    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refuse)
    message = (
        r"x: cannot write \(Permission denied\); free space, fix access or name another --store, then run the same"
    )
    with pytest.raises(StoreError, match=message):
        files.write_atomic(path, b"three")
    assert [(item.name, item.read_bytes()) for item in path.parent.iterdir()] == [("x", b"two")]


def test_the_first_of_many_wins(tmp_path: Path) -> None:
    for number in range(20):
        path, barrier = tmp_path / f"{number}" / "x", Barrier(8)
        won: list[int] = []

        def create(me: int, path: Path = path, barrier: Barrier = barrier, won: list[int] = won) -> None:
            barrier.wait()
            if files.create_exclusive(path, str(me).encode() * 5000):
                won.append(me)

        threads = [Thread(target=create, args=(me,)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert path.read_bytes() == str(won[0]).encode() * 5000
        assert [item.name for item in path.parent.iterdir()] == ["x"]


def test_a_link_whose_answer_was_lost_still_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS sends a request again when the answer is lost; the second one then finds the first one's link."""
    real = os.link

    def twice(source: Path, final: Path) -> None:
        real(source, final)
        real(source, final)

    monkeypatch.setattr(os, "link", twice)
    assert files.create_exclusive(tmp_path / "x", b"mine")
    assert not files.create_exclusive(tmp_path / "x", b"other")
    assert (tmp_path / "x").read_bytes() == b"mine"


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EXDEV])
def test_a_place_without_hard_links_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(
        StoreError, match=r"no hard links can be made here \(.*\), which commits need; run `featstore doctor STORE`"
    ):
        files.create_exclusive(tmp_path / "x", b"data")
    assert list(tmp_path.iterdir()) == []


def test_link_kept_keeps_both_and_never_replaces(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"a")
    b.write_bytes(b"b")
    assert not files.link_kept(a, b)
    assert files.link_kept(a, tmp_path / "c")
    assert [path.read_bytes() for path in (a, b, tmp_path / "c")] == [b"a", b"b", b"a"]
    with pytest.raises(FileNotFoundError):
        files.link_kept(tmp_path / "absent", tmp_path / "d")


def test_folders_that_cannot_be_synced_pass_and_bad_disks_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [errno.EINVAL, errno.EIO]

    def refuse(_: int) -> None:
        raise OSError(codes[0], os.strerror(codes[0]))

    (tmp_path / files.MODE).write_bytes(files.sealed({"mode": "link", "fsync": False, "probed": ""}))
    monkeypatch.setattr(os, "fsync", refuse)
    files.sync_folder(tmp_path)
    codes.pop(0)
    with pytest.raises(OSError, match="Input/output"):
        files.sync_folder(tmp_path)


def test_make_folder_syncs_every_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    files.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    files.make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"file/x: cannot write \(File exists\)"):
        files.create_exclusive(tmp_path / "file" / "x", b"")


def test_names_tell_whether_their_writer_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not files.is_dead(files.own_name())
    script = "from featstore import files; print(files.own_name())"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert files.is_dead(ended)
    assert files.is_dead(f"00000003.intent.{ended}.partial")
    assert not files.is_dead("0" * 12 + ended[12:])  # another machine's process cannot be seen from here
    assert not files.is_dead("no name of ours")
    waiting = [sys.executable, "-c", script + "; import sys; sys.stdout.flush(); input()"]
    sleeper = subprocess.Popen(waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert sleeper.stdout is not None
    name = sleeper.stdout.readline().strip()
    assert not files.is_dead(name)
    sleeper.kill()
    while Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert files.is_dead(name)  # not reaped yet
    sleeper.communicate()
    assert files.is_dead(name)
    with monkeypatch.context() as patch:  # a living process of another user whose /proc is hidden

        def hidden(pid: int, signal: int) -> None:
            assert signal == 0
            raise PermissionError(errno.EPERM, "not yours")

        patch.setattr(os, "kill", hidden)
        assert not files.is_dead(name)
    monkeypatch.setattr(files, "_processes", lambda: "")
    assert not files.is_dead(name)
    assert files.own_name().startswith("unknown-")
