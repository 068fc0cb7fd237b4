"""What `featstore doctor` finds on file systems and buckets that lack something, and the single-writer lock."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sets import (
    CLS,
    PATCHES,
    check_blocks,
    contents,
    fork,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    wait,
    write_missing,
)

from featstore import doctor, files
from featstore.doctor import folders
from featstore.errors import StoreError
from featstore.store.importer import import_features

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "REPLACING_SECONDS", 0.02)
    monkeypatch.setattr(folders, "PATIENCE_SECONDS", 0.3)


def states(found: doctor.Diagnosis) -> dict[str, str]:
    return {item.name: item.state for item in found.findings}


def not_ok(found: doctor.Diagnosis) -> dict[str, str]:
    """What is amiss apart from the machine's own space, read-ahead and kind of disk."""
    return {
        name: state
        for name, state in states(found).items()
        if state != "ok" and name not in ("space", "inodes", "quota", "kind", "read-ahead")
    }


def raises(code: int) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


# --- folders


def test_a_local_disk_needs_nothing(tmp_path: Path) -> None:
    seen: list[int] = []
    found = doctor.diagnose(tmp_path, advance=seen.append)
    assert not_ok(found) == {}
    assert (found.mode, found.fsync) == ("link", True)
    assert len(seen) == len(found.findings) == len(doctor.probes_of(tmp_path)) == 19
    assert list(tmp_path.iterdir()) == []
    assert doctor.settle(tmp_path, found) == "nothing to write down"
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_does_not_exist_yet_is_left_so(tmp_path: Path) -> None:
    assert doctor.diagnose(tmp_path / "a" / "b").mode == "link"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", sorted(files.NO_LINKS), ids=lambda code: errno.errorcode[code])
def test_without_links_copies_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "link", raises(code))
    found = doctor.diagnose(tmp_path)
    assert not_ok(found) == {"hard links": "missing"}
    assert errno.errorcode[code] in next(item.value for item in found.findings if item.name == "hard links")
    assert found.mode == "rename"
    assert doctor.settle(tmp_path, found).endswith("mode.json written")
    path = tmp_path / files.MODE
    held = files.unseal(path.read_bytes(), path)
    assert (held["mode"], held["fsync"]) == ("rename", True)
    assert files.commit_mode(tmp_path / "sets" / "x") == "rename"
    assert doctor.settle(tmp_path, found) == "nothing to write down"
    assert [path.name for path in tmp_path.iterdir()] == [files.MODE]


def linking_twice(source: Any, target: Any) -> None:
    Path(target).write_bytes(Path(source).read_bytes())


def copying(source: Any, target: Any) -> None:
    if os.path.exists(target):
        raise FileExistsError(errno.EEXIST, "exists")
    linking_twice(source, target)


@pytest.mark.parametrize(("link", "value"), [(linking_twice, "replaced"), (copying, "copied")])
def test_links_that_are_none_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: Any, value: str
) -> None:
    monkeypatch.setattr(os, "link", link)
    found = doctor.diagnose(tmp_path)
    assert next(item for item in found.findings if item.name == "hard links").value == value
    assert found.mode == "rename"


def replacing(source: Path, final: Path) -> bool:
    os.replace(source, final)
    return True


@pytest.mark.parametrize("rename_new", [raises(errno.EINVAL), raises(errno.ENOSYS), replacing])
def test_without_links_and_exclusive_renames_one_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename_new: Any
) -> None:
    monkeypatch.setattr(os, "link", raises(errno.EPERM))
    monkeypatch.setattr(files, "rename_new", rename_new)
    found = doctor.diagnose(tmp_path)
    assert found.mode == "single"
    assert not_ok(found) == {"hard links": "missing", "rename without replacing": "degraded"}
    doctor.settle(tmp_path, found)
    assert files.commit_mode(tmp_path) == "single"


def test_links_alone_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "rename_new", raises(errno.EINVAL))
    assert doctor.diagnose(tmp_path).mode == "link"


def ignoring_exclusive(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
    return REAL_OPEN(path, flags & ~os.O_EXCL, mode, **options)


REAL_OPEN = os.open


@pytest.mark.parametrize(
    ("name", "fake", "words"),
    [
        ("open", ignoring_exclusive, "exclusive create: O_EXCL is ignored, .*created twice"),
        ("replace", raises(errno.EXDEV), r"rename: files or folders cannot be renamed, .*\(EXDEV"),
        ("rename", raises(errno.EPERM), r"rename: files or folders cannot be renamed, .*\(EPERM"),
    ],
)
def test_what_no_mode_can_do_without_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fake: Any, words: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fake)
        found = doctor.diagnose(tmp_path)
    assert found.mode is None
    with pytest.raises(StoreError, match=f"no store can be written here: {words}.*put the store on a local disk"):
        doctor.settle(tmp_path, found)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", raises(errno.EROFS))
    found = doctor.diagnose(tmp_path)
    assert [item.name for item in found.findings] == ["write"]
    with pytest.raises(StoreError, match=r"nothing can be created here .*Read-only file system"):
        doctor.settle(tmp_path, found)


def test_a_file_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="a store is a folder, this is a file"):
        doctor.diagnose(tmp_path / "file")


@pytest.mark.parametrize("code", sorted(files.NO_SYNC), ids=lambda code: errno.errorcode[code])
def test_without_fsync_commits_survive_kills_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "fsync", raises(code))
    spec, manifest = make_spec_of(block_rows=16), make_manifest(named(20))
    with pytest.raises(StoreError, match=r"this file system cannot sync .*`featstore doctor STORE` settles"):
        prepare(tmp_path, spec, manifest, [CLS])
    found = doctor.diagnose(tmp_path)
    assert not_ok(found) == {"fsync of files": "degraded", "fsync of folders": "degraded"}
    assert (found.mode, found.fsync) == ("link", False)
    doctor.settle(tmp_path, found)
    folder = prepare(tmp_path, spec, manifest, [CLS, PATCHES])
    write_missing(folder, 1, block_rows=16)
    assert len(check_blocks(folder, {1})) == 2


def test_a_failing_disk_is_no_disk_without_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doctor._write(tmp_path / files.MODE, files.sealed({"mode": "link", "fsync": False, "probed": ""}))
    monkeypatch.setattr(os, "fsync", raises(errno.EIO))
    with pytest.raises(StoreError, match=r"cannot write .*Input/output error"):
        files.write_atomic(tmp_path / "a", b"")


def test_a_store_above_does_not_speak_for_this_one(tmp_path: Path) -> None:
    (tmp_path / files.MODE).write_text("somebody else's")
    prepare(tmp_path / "store", make_spec_of(), make_manifest(named(3)), [CLS])
    assert files.commit_mode(tmp_path / "store" / "sets") is None


def test_a_mode_is_left_only_before_the_first_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / files.MODE
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", raises(errno.EPERM))
        doctor.settle(tmp_path, doctor.diagnose(tmp_path))
        assert path.is_file()
    assert doctor.settle(tmp_path, doctor.diagnose(tmp_path)) == f"{path} removed: this place does not need it"
    assert not path.exists()
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", raises(errno.EPERM))
        doctor.settle(tmp_path, doctor.diagnose(tmp_path))
        prepare(tmp_path, make_spec_of(), make_manifest(named(3)), [CLS])
    assert "mode rename stays though link works here too, since sets exist" in doctor.settle(
        tmp_path, doctor.diagnose(tmp_path)
    )
    assert files.commit_mode(tmp_path) == "rename"
    # A store that was moved to a poorer place follows it.
    monkeypatch.setattr(os, "link", raises(errno.EPERM))
    monkeypatch.setattr(files, "rename_new", raises(errno.EINVAL))
    doctor.settle(tmp_path, doctor.diagnose(tmp_path))
    assert files.commit_mode(tmp_path) == "single"


@pytest.mark.parametrize(
    ("name", "fake", "finding"),
    [
        ("preadv", raises(errno.EOPNOTSUPP), "read-ahead"),
        ("statvfs", raises(errno.ENOSYS), "space"),
        ("statvfs", raises(errno.ENOSYS), "inodes"),
        ("flock", raises(errno.ENOLCK), "file locks"),
        ("flock", lambda *_: None, "file locks"),
    ],
)
def test_what_is_only_a_pity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fake: Any, finding: str
) -> None:
    monkeypatch.setattr(fcntl if name == "flock" else os, name, fake)
    found = doctor.diagnose(tmp_path)
    assert states(found)[finding] == "degraded"
    assert found.mode == "link"


def test_another_clock_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 500)
    found = {item.name: item for item in [probe(tmp_path) for probe in folders.PROBES if probe.name == "clock"]}
    assert found["clock"].state == "degraded"
    assert found["clock"].value == "+500 s"


def test_a_file_that_others_never_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "rename", lambda *_: None)
    probe = next(probe for probe in folders.PROBES if probe.name == "visibility")
    assert (probe(tmp_path).state, probe(tmp_path).value) == ("degraded", "inf ms")


def test_half_replaced_files_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that is a copy: the reader meets files that are not whole."""

    def slow_copy(source: Path, target: Path) -> None:
        with open(source, "rb") as held, open(target, "wb") as file:
            file.write(held.read(100))
            file.flush()
            time.sleep(0.02)
            file.write(held.read())

    monkeypatch.setattr(os, "replace", slow_copy)
    probe = next(probe for probe in folders.PROBES if probe.name == "whole replacement")
    assert probe(tmp_path).state == "degraded"


def test_names_that_are_too_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_bytes
    for longest, state in ((143, "degraded"), (100, "missing")):

        def limited(path: Path, data: bytes, longest: int = longest) -> int:
            if len(path.name) > longest:
                raise OSError(errno.ENAMETOOLONG, "File name too long")
            return real(path, data)

        monkeypatch.setattr(Path, "write_bytes", limited)
        assert states(doctor.diagnose(tmp_path))["long names"] == state
    assert doctor.diagnose(tmp_path).mode is None


TABLE = r"""22 27 0:21 / / rw,relatime - ext4 /dev/vda rw
30 22 0:25 / /mnt rw - tmpfs none rw
31 30 0:26 / /mnt/my\040share ro,nosuid shared:3 - nfs4 host:/x rw,vers=4.2
32 22 0:27 / /mnt rw,noatime - fuse.sshfs host: rw
"""


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/a", ("ext4", "rw,relatime")),
        ("/mnt/my share/s", ("nfs4", "ro,nosuid")),
        ("/mnt/s", ("fuse.sshfs", "rw,noatime")),
    ],
)
def test_the_file_system_of_a_folder(folder: str, expected: tuple[str, str]) -> None:
    assert folders.file_system(Path(folder), TABLE) == expected


def test_what_a_killed_doctor_left_goes(tmp_path: Path) -> None:
    child = fork(lambda: (tmp_path / f".doctor-{files.own_name()}").mkdir())
    assert wait(child) == 0
    living = tmp_path / f".doctor-{files.own_name()}"
    living.mkdir()
    doctor.diagnose(tmp_path)
    assert list(tmp_path.iterdir()) == [living]


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        doctor.diagnose(tmp_path, advance=stop)
    assert list(tmp_path.iterdir()) == []


# --- real file systems


def run_doctor(*arguments: str, before: str = "") -> "subprocess.CompletedProcess[str]":
    program = (
        f"{before}\nimport sys, cli.main\nsys.argv = ['featstore', 'doctor', *{arguments!r}]\ncli.main.featstore()"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)


# Answers link and linkat with EPERM, and other calls as asked, for the rest of the process (seccomp on x86-64).
POORER = """
import ctypes, struct
code = lambda *items: b"".join(struct.pack("HBBI", *item) for item in items)
calls = {86: 1, 265: 1, %s}
tests = []
for number, answer in calls.items():
    tests += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | answer)]
program = code((0x20, 0, 0, 0), *tests, (0x06, 0, 0, 0x7FFF0000))
held = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(len(program) // 8, ctypes.addressof(held)))) == 0, ctypes.get_errno()
"""
needs_seccomp = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="the filter is written for Linux on x86-64"
)


@needs_seccomp
@pytest.mark.parametrize(
    ("refused", "mode", "fsync"), [("", "rename", True), ("316: 22", "single", True), ("74: 22", "rename", False)]
)
def test_the_command_where_the_kernel_refuses(tmp_path: Path, refused: str, mode: str, fsync: bool) -> None:
    """Not a patched function but the system itself says no, as a FUSE or SMB mount does."""
    done = run_doctor(str(tmp_path), "--json", before=POORER % refused)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["mode"], report["fsync"]) == (mode, fsync)
    held = files.unseal((tmp_path / files.MODE).read_bytes(), tmp_path / files.MODE)
    assert (held["mode"], held["fsync"]) == (mode, fsync)


@needs_seccomp
@pytest.mark.parametrize("refused", ["", "316: 22, 74: 22"], ids=["rename", "single, no fsync"])
def test_a_whole_run_where_the_kernel_refuses(tmp_path: Path, refused: str) -> None:
    """Doctor, import and deep verification in a process that cannot link; the bytes are those of a plain disk."""
    data = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    np.savez(tmp_path / "a.npz", features=data, id=np.arange(300).astype(str))
    poor, plain = tmp_path / "poor", tmp_path / "plain"
    program = f"""
from pathlib import Path
from featstore import doctor
from featstore.store.catalog import Store
from featstore.store.importer import import_features
from featstore.store.verify import verify_set
root = Path({str(poor)!r})
doctor.settle(root, doctor.diagnose(root))
store = import_features(root, Path({str(tmp_path / "a.npz")!r}), dataset="demo", model="m")[0]
assert all(verify_set(store, entry, deep=True).ok for entry in store.entries())
"""
    done = subprocess.run([sys.executable, "-c", POORER % refused + program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    import_features(plain, tmp_path / "a.npz", dataset="demo", model="m")
    found, expected = (contents(next(root.glob("sets/demo/*"))) for root in (poor, plain))
    assert found == expected
    assert len(found) > 5


def test_the_command_only_reports_on_a_dry_run(tmp_path: Path) -> None:
    done = run_doctor(str(tmp_path), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "mode link: files are published by hard links" in done.stdout
    assert "dry run: nothing written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_why_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_doctor(str(tmp_path / "file"))
    assert done.returncode == 2
    assert "a store is a folder, this is a file" in done.stderr


def mounted(kind: str, options: str = "") -> str:
    """Shell that mounts a file system at $1 in a namespace of its own."""
    if kind == "overlay":
        return (
            'mount -t tmpfs none "$1" && mkdir "$1"/{l,u,w,m} && '
            'mount -t overlay none -o lowerdir="$1"/l,upperdir="$1"/u,workdir="$1"/w "$1"/m && cd "$1"/m'
        )
    return f'mount -t {kind} {options} none "$1" && cd "$1"'


@pytest.mark.parametrize(("kind", "mode"), [("tmpfs", "link"), ("ramfs", "link"), ("overlay", "link")])
def test_other_file_systems_of_this_machine(tmp_path: Path, kind: str, mode: str) -> None:
    shell = ["unshare", "-rm", "bash", "-ec"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*shell, mounted(kind), "-", tmp_path], capture_output=True).returncode
    ):
        pytest.skip(f"{kind} cannot be mounted here")
    program = f'{mounted(kind)}; exec "$2" -m featstore doctor "$PWD" --json --dry-run'
    done = subprocess.run(
        [*shell, program, "-", str(tmp_path), sys.executable],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["mode"] == mode
    assert next(item["value"] for item in report["findings"] if item["name"] == "kind") == kind


def test_memory_is_told(tmp_path: Path) -> None:
    if not os.access("/dev/shm", os.W_OK) or folders.file_system(Path("/dev/shm"))[0] != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    place = Path("/dev/shm") / f"featstore-{os.getpid()}"
    found = doctor.diagnose(place)
    assert (states(found)["kind"], found.mode) == ("degraded", "link")
    assert not place.exists()


# --- buckets
