"""Copies on a local disk: made once, whole or not at all, left when the original changes, never needed."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from featstore import staging
from featstore.errors import ConfigError
from featstore.inputs import Inputs

DATA = bytes(range(256)) * 100


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(DATA)
    with zipfile.ZipFile(tmp_path / "data" / "x.zip", "w") as archive:
        for number in range(5):
            archive.writestr(f"{number}.png", DATA[number:])
    return tmp_path / "data"


def copies(stage: Path) -> list[Path]:
    found = sorted(path for path in stage.rglob("*") if path.is_file() and path.suffix != ".sha256")
    for path in found:
        if path.suffix != ".partial":
            seal = path.with_name(f"{path.name}.sha256").read_text()
            assert len(seal) == 64
    return found


def opened_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that are opened from now on."""
    opened: list[str] = []
    real = open
    monkeypatch.setattr(
        "builtins.open", lambda file, *rest, **more: opened.append(str(file)) or real(file, *rest, **more)
    )
    return opened


def test_the_first_read_copies_and_later_ones_read_the_copy(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = tmp_path / "stage"
    assert Inputs(root, stage=stage).read("a.png", first=4) == DATA[:4]
    assert copies(stage) == [], "a look at the first bytes copies nothing"
    assert Inputs(root, stage=stage).read("a.png") == DATA
    (copy,) = copies(stage)
    assert copy.read_bytes() == DATA
    opened = opened_by(monkeypatch)
    later = Inputs(root, stage=stage)
    assert later.read("a.png") == DATA
    assert later.read("a.png", first=2) == DATA[:2]
    assert later.hash("a.png") == hashlib.sha256(DATA).hexdigest()[:32]
    assert later.local("a.png") == copy
    assert str(copy) in opened
    assert str(root / "a.png") not in opened
    assert later.stat("a.png") == Inputs(root).stat("a.png")
    assert later.beside("a.png") == root / "a.png", "there is nothing beside it"


@pytest.mark.parametrize("call", ["read", "hash", "local"])
def test_the_original_is_read_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    opened = opened_by(monkeypatch)
    inputs = Inputs(root, stage=tmp_path / "stage")
    getattr(inputs, call)("a.png")
    assert inputs.hash("a.png") == hashlib.sha256(DATA).hexdigest()[:32]
    assert inputs.local("a.png").read_bytes() == DATA
    assert opened.count(str(root / "a.png")) == 1


@pytest.mark.parametrize("call", ["read", "hash", "local"])
@pytest.mark.parametrize("what", ["copy", "seal"])
def test_a_copy_of_other_bytes_is_dropped_made_again_and_counted(
    root: Path, tmp_path: Path, call: str, what: str
) -> None:
    stage = tmp_path / "stage"
    Inputs(root, stage=stage).read("a.png")
    (copy,) = copies(stage)
    if what == "copy":
        copy.write_bytes(DATA[::-1])  # of the right size
    else:
        copy.with_name(f"{copy.name}.sha256").write_text("0" * 64)
    later = Inputs(root, stage=stage)
    assert later.read("a.png", first=2) == DATA[:2]
    found = getattr(later, call)("a.png")
    assert (found.read_bytes() if isinstance(found, Path) else found) in (DATA, hashlib.sha256(DATA).hexdigest()[:32])
    assert copies(stage) == [copy]
    assert copy.read_bytes() == DATA
    assert later.staging_note() == f"1 copies in {stage} were damaged and were dropped; those were read from {root}"
    fresh = Inputs(root, stage=stage)
    assert fresh.read("a.png") == DATA
    assert fresh.staging_note() is None


def test_a_damaged_copy_of_an_archive_is_dropped_once_and_checked_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = tmp_path / "stage"
    Inputs(root, stage=stage).read("x.zip!/0.png")
    (copy,) = copies(stage)
    copy.write_bytes(copy.read_bytes()[::-1])
    later = Inputs(root, stage=stage)
    hashed: list[Path] = []
    real = staging._digest_of

    def digest_of(path: Path) -> str:
        value = real(path)
        hashed.append(path)
        return value

    monkeypatch.setattr(staging, "_digest_of", digest_of)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(later.read, [f"x.zip!/{number}.png" for number in range(5)] * 5))
    assert found == [DATA[number:] for number in range(5)] * 5
    assert copy.read_bytes() == (root / "x.zip").read_bytes()
    assert len(hashed) == 1
    assert (later.staging_note() or "").startswith("1 copies in ")


@pytest.mark.parametrize("made_again", [False, True])
def test_a_copy_that_goes_before_it_is_compared_harms_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_again: bool
) -> None:
    """Another thread drops the damaged copy, and may have made it again, between the look for it and its comparison."""
    stage = tmp_path / "stage"
    Inputs(root, stage=stage).read("x.zip!/0.png")
    (copy,) = copies(stage)
    whole = copy.read_bytes()
    held = staging.Stage(stage, root)
    (original,) = held.originals("x.zip", {"x.zip": (root / "x.zip").stat()})
    real, looks = staging._version, []

    def version(path: Path) -> tuple[int, int] | None:
        looks.append(path)
        if len(looks) == 1:
            copy.unlink()
            if made_again:
                held.copy(original, root / "x.zip", [whole])
            return None
        return real(path)

    def digest_of(path: Path) -> str:
        raise AssertionError("it was compared when it was written")

    monkeypatch.setattr(staging, "_version", version)
    monkeypatch.setattr(staging, "_digest_of", digest_of)
    held._checked[str(copy)] = (0, 0)
    assert held.check(original) == made_again
    assert copies(stage) == [copy] * made_again
    assert not held.damaged


def test_a_copy_is_on_the_disk_before_it_has_its_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda target: told.append("sync") or sync(target))
    monkeypatch.setattr(os, "rename", lambda *names: told.append("rename") or rename(*names))
    Inputs(root, stage=tmp_path / "new" / "stage").read("a.png")
    assert told == ["sync", "rename"]
    (copy,) = copies(tmp_path / "new")
    assert (tmp_path / "new" / "stage").stat().st_mode & 0o777 == 0o700
    assert copy.stat().st_mode & 0o777 == 0o600


def test_companions_are_copied_beside_each_other(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "d").mkdir()
    (root / "d" / "v.mhd").write_bytes(b"NDims = 3\nElementDataFile = v.raw\n")
    (root / "d" / "v.raw").write_bytes(DATA)
    (root / "s.mrxs").write_bytes(b"slide")
    (root / "s").mkdir()
    for name in ("Slidedat.ini", "Data0000.dat"):
        (root / "s" / name).write_bytes(name.encode())
    inputs = Inputs(root, stage=tmp_path / "stage")
    for path, call, beside in (("d/v.mhd", inputs.beside, "v.raw"), ("s.mrxs", inputs.local, "s/Data0000.dat")):
        copy = call(path)
        assert copy is not None
        assert copy.is_relative_to(tmp_path / "stage")
        assert copy.name == Path(path).name
        assert (copy.parent / beside).read_bytes() == (root / Path(path).parent / beside).read_bytes()
        assert inputs.hash(path) == Inputs(root).hash(path) == inputs.hash_of(path, inputs.read(path))
    opened = opened_by(monkeypatch)
    later = Inputs(root, stage=tmp_path / "stage")
    held = later.read("d/v.mhd"), later.beside("d/v.mhd"), later.hash("s.mrxs"), later.local("s.mrxs")
    assert held[1:] == (inputs.beside("d/v.mhd"), Inputs(root).hash("s.mrxs"), inputs.local("s.mrxs"))
    assert str(root / "d" / "v.raw") not in opened
    assert not [name for name in opened if name.startswith(str(root / "s"))][4:], "only the comparison above read them"
    (root / "d" / "v.raw").write_bytes(DATA[::-1])
    os.utime(root / "d" / "v.raw", ns=(9, 9))
    changed = inputs.beside("d/v.mhd")
    assert changed is not None
    assert (changed.parent / "v.raw").read_bytes() == DATA[::-1]


def test_archives_are_copied_whole(root: Path, tmp_path: Path) -> None:
    inputs = Inputs(root, stage=tmp_path / "stage")
    for number in range(5):
        assert inputs.read(f"x.zip!/{number}.png") == DATA[number:]
    (copy,) = copies(tmp_path / "stage")
    assert copy.read_bytes() == (root / "x.zip").read_bytes()
    assert inputs.stat("x.zip!/1.png") == (len(DATA) - 1, (root / "x.zip").stat().st_mtime_ns)


def test_a_changed_original_is_copied_anew(root: Path, tmp_path: Path) -> None:
    inputs = Inputs(root, stage=tmp_path / "stage")
    inputs.read("a.png")
    (root / "a.png").write_bytes(DATA[::-1])
    os.utime(root / "a.png", ns=(5, 5))
    assert inputs.read("a.png") == DATA[::-1]
    assert len(copies(tmp_path / "stage")) == 2


def test_a_cut_copy_is_not_used(root: Path, tmp_path: Path) -> None:
    inputs = Inputs(root, stage=tmp_path / "stage")
    inputs.read("a.png")
    (copy,) = copies(tmp_path / "stage")
    copy.write_bytes(DATA[:100])
    assert inputs.read("a.png") == DATA
    assert copy.read_bytes() == DATA, "it was made again"


def test_what_a_killed_process_left_is_overwritten(root: Path, tmp_path: Path) -> None:
    inputs = Inputs(root, stage=tmp_path / "stage")
    inputs.read("a.png")
    (copy,) = copies(tmp_path / "stage")
    copy.rename(copy.with_name(f"{copy.name}.partial"))
    copy.with_name(f"{copy.name}.partial").write_bytes(DATA * 2)
    assert inputs.read("a.png") == DATA
    assert copies(tmp_path / "stage") == [copy]
    assert copy.read_bytes() == DATA


def test_an_original_that_changes_while_it_is_copied_is_not_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs(root, stage=tmp_path / "stage")
    real = staging.Stage._write

    def write(self: staging.Stage, path: str, target: int, data: bytes) -> bool:
        os.utime(root / "a.png", ns=(7, 7))
        return real(self, path, target, data)

    monkeypatch.setattr(staging.Stage, "_write", write)
    assert inputs.read("a.png") == DATA
    assert copies(tmp_path / "stage") == []


def test_a_full_disk_is_no_error_and_is_counted(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(root, stage=tmp_path / "stage")
    assert inputs.staging_note() is None

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for _ in range(2):
            assert inputs.read("a.png") == DATA
        assert inputs.hash("a.png") == hashlib.sha256(DATA).hexdigest()[:32]
        assert inputs.local("a.png") == root / "a.png"
        assert inputs.read("x.zip!/1.png") == DATA[1:]
    assert inputs.unstaged == 2
    note = inputs.staging_note()
    assert note is not None
    assert note.startswith("2 files were not copied to ")
    assert "(No space left on device)" in note
    assert copies(tmp_path / "stage") == []
    monkeypatch.setattr(staging, "RESERVE", 2**60)
    small = Inputs(root, stage=tmp_path / "stage")
    assert small.read("a.png") == DATA
    assert small.unstaged == 1
    assert copies(tmp_path / "stage") == []


def test_a_stage_in_the_data_is_refused(root: Path, tmp_path: Path) -> None:
    for inside in (root, root / "stage", root / ".." / "data" / "x"):
        with pytest.raises(ConfigError, match=r"--stage .* lies in the data set's folder .*; name a folder outside of"):
            Inputs(root, stage=inside)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"--stage .*file/x: cannot be made \(.*\); name another folder"):
        Inputs(root, stage=tmp_path / "file" / "x")


def test_inputs_go_to_worker_processes(root: Path, tmp_path: Path) -> None:
    for stage in (None, tmp_path / "stage"):
        assert pickle.loads(pickle.dumps(Inputs(root, stage=stage))).read("a.png") == DATA
    assert len(copies(tmp_path / "stage")) == 1


def test_threads_race_for_one_file(root: Path, tmp_path: Path) -> None:
    inputs = Inputs(root, stage=tmp_path / "stage")
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(inputs.read, ["a.png", "x.zip!/0.png"] * 40))
    assert found == {DATA}
    assert len(copies(tmp_path / "stage")) == 2


def _read_all(root: Path, stage: Path, names: list[str]) -> bool:
    inputs = Inputs(root, stage=stage)
    return all(inputs.read(name) == DATA for name in names) and inputs.unstaged == 0


def test_processes_race_for_the_same_files(root: Path, tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(40)]
    for name in names:
        (root / name).write_bytes(DATA)
    with multiprocessing.get_context("forkserver").Pool(3) as pool:
        assert all(pool.starmap(_read_all, [(root, tmp_path / "stage", names)] * 3))
    assert sorted(path.read_bytes() == DATA for path in copies(tmp_path / "stage")) == [True] * 40
