"""File systems that are full, read-only, flaky or gone: clear errors, nothing lost, and a rerun completes the work."""

import builtins
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_sets import (
    CLS,
    PATCHES,
    check_blocks,
    committed_files,
    contents,
    leftovers,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    write_missing,
)

from featstore.errors import StoreError
from featstore.store import commits, ledger
from featstore.store.catalog import Store
from featstore.store.gc import collect, plan_gc
from featstore.store.moving import move_set, rename_set
from featstore.store.verify import verify_set

GROUP = "cls+patches"
SLOW = pytest.mark.slow
CODES = ("EDQUOT", "EIO", "ESTALE", "ENOSPC", "EROFS", "EACCES")
CALLS = ("link", "unlink", "rename", "replace", "mkdir", "fsync")
HERE = Path(__file__).resolve().parent


class Refusing:
    """The n-th call that changes the disk is refused, and with `stays` every later one; writing into a file counts."""

    def __init__(self, code: int, at: int, stays: bool):
        self.code, self.at, self.stays, self.count = code, at, stays, 0

    def check(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.at or (self.stays and self.count > self.at):
            raise OSError(self.code, os.strerror(self.code))

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in CALLS:
            patch.setattr(os, name, self._wrap(getattr(os, name), name == "fsync"))
        real = builtins.open

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return real(path, mode, *args, **kwargs)
            self.check()
            return _File(real(path, mode, *args, **kwargs), self.check)

        patch.setattr(builtins, "open", opened)

    def _wrap(self, call: Callable[..., Any], is_sync: bool) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.check()
            return None if is_sync else call(*args, **kwargs)

        return wrapped


class _File:
    """A file whose writes are counted."""

    def __init__(self, file: Any, check: Callable[[], None]):
        self.file, self.check = file, check

    def write(self, data: Any) -> int:
        self.check()
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(time, "sleep", lambda _: None)


def make(root: Path) -> Path:
    """A set of three blocks, the first of them committed."""
    folder = prepare(root, make_spec_of(), make_manifest(named(40)), [CLS, PATCHES])
    write_missing(folder, 1, block_rows=16)
    for block in (1, 2):
        commits.take_back(folder, GROUP, [CLS, PATCHES], block, 16)
    for array in ("cls", "patches"):
        for block in (1, 2):
            shutil.rmtree(folder / "data.zarr" / array / "c" / str(block))
    return folder


def inside(root: Path) -> Path:
    return next(path for path in (root / "sets" / "demo").iterdir() if not path.name.startswith("."))


def write(root: Path) -> None:
    folder = prepare(root, make_spec_of(), make_manifest(named(40)), [CLS, PATCHES])
    write_missing(folder, 1, block_rows=16)


def run_gc(root: Path) -> None:
    """After the write was undone in part: orphans and an attempt to remove."""
    store = Store(root)
    for item in plan_gc(store, older_than=0.0):
        collect(store, item)


def run_rename(root: Path) -> None:
    if Store(root).find("demo", "tiny"):
        rename_set(Store(root).entry("demo/tiny"), "demo/new")


def run_move(root: Path) -> None:
    target = root.with_name(f"{root.name}-to")
    if Store(root).entries():
        move_set(Store(root), Store(root).entry("demo/tiny"), target)


def prepare_for(work: Callable[[Path], None], template: Path) -> None:
    folder = make(template)
    if work is not write:
        write_missing(folder, 1, block_rows=16)
    if work is run_gc:
        commits.take_back(folder, GROUP, [CLS, PATCHES], 1, 16)
        (folder / "attempts" / "unknown").mkdir(parents=True)
        (folder / "attempts" / "unknown" / "cls.0").write_bytes(b"x")


@pytest.mark.parametrize("stays", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("work", [write, run_gc, run_rename, run_move])
@pytest.mark.parametrize("code", ["EDQUOT", "EIO", *(pytest.param(code, marks=SLOW) for code in CODES[2:])])
def test_refusals_are_told_and_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Path], None], code: str, stays: bool
) -> None:
    template = tmp_path / "template"
    prepare_for(work, template)
    calm = tmp_path / "calm"
    shutil.copytree(template, calm)
    work(calm)
    landed = calm.with_name("calm-to") if work is run_move else calm
    held = {path: facts[2] for path, facts in committed_files(inside(template)).items()}
    number = getattr(errno, code)
    messages = []
    step = 1 if work is run_rename else 13
    for at in range(1, 2000, step):
        root = tmp_path / str(at)
        shutil.copytree(template, root)
        with monkeypatch.context() as patch:
            refusing = Refusing(number, at, stays)
            refusing.install(patch)
            try:
                work(root)
            except StoreError as error:
                messages.append(str(error))
        places = [path for path in (root, root.with_name(f"{root.name}-to")) if any(path.glob("sets/*/*/spec.json"))]
        assert places
        found = {path: facts[2] for path, facts in committed_files(inside(places[-1])).items()}
        assert {path: found[path] for path in held} == held
        assert len(check_blocks(inside(places[-1]), {1})) >= 1
        work(root)  # the disk is well again
        end = root.with_name(f"{root.name}-to") if work is run_move else root
        assert whole(end) == whole(landed)
        if refusing.count < at:
            break
    assert messages
    wanted = os.strerror(number)
    assert all(wanted in message and str(tmp_path) in message for message in messages), messages


def whole(root: Path) -> dict[str, bytes]:
    """All bytes of the one set, once what dead writers left is away."""
    folder = inside(root)
    run_gc(root)
    commits.finish_intents(folder, ledger.read_ledger(folder), 16)
    commits.sweep_attempts(folder, older_than=0.0)
    assert leftovers(folder) == []
    return {name: data for name, data in contents(folder).items() if name != "archive.lock"}  # empty, and nobody's


FULL = """
import sys; sys.path.insert(0, {here!r})
from pathlib import Path
from tiny_sets import *
from featstore.errors import StoreError
root = Path({root!r})
manifest = make_manifest(named(4000))
folder = prepare(root, make_spec_of(block_rows=256), manifest, [CLS, PATCHES])
try:
    write_missing(folder, 1, block_rows=256)
except StoreError as error:
    print(error)
done = check_blocks(folder, {{1}})
print(len(done), "whole;", leftovers(folder))
"""


def in_namespace(command: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, timeout=120)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()[:100]}")
    return done


@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")
def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    script = tmp_path / "full.py"
    root = tmp_path / "small"
    root.mkdir()
    script.write_text(FULL.format(here=str(HERE), root=str(root)))
    done = in_namespace(f"mount -t tmpfs -o size=256k none {root} && cd {HERE.parent} && {sys.executable} {script}")
    assert done.returncode == 0, done.stderr
    told, counted = done.stdout.splitlines()
    assert "cannot write (No space left on device); free space" in told
    assert counted.endswith(" whole; []")
    assert 0 < int(counted.split()[0]) < 16


@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")
def test_a_mount_that_became_read_only(tmp_path: Path) -> None:
    root = tmp_path / "store"
    make(root)
    script = tmp_path / "full.py"
    text = FULL.format(here=str(HERE), root=str(root)).replace("4000", "40").replace("256", "16")
    script.write_text(text)
    done = in_namespace(
        f"mount --bind {root} {root} && mount -o remount,ro,bind {root} && cd {HERE.parent} "
        f"&& {sys.executable} {script}"
    )
    assert done.returncode == 0, done.stderr
    told, counted = done.stdout.splitlines()
    assert "cannot write (Read-only file system)" in told
    assert counted == "1 whole; []"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; the read-only mount stands for this")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.chmod(0o500)
    try:
        with pytest.raises(StoreError, match=r"cannot write \(Permission denied\)"):
            write_missing(folder, 1, block_rows=16)
    finally:
        folder.chmod(0o700)
    assert len(check_blocks(folder, {1})) == 1


@pytest.mark.parametrize("shift", [-86400.0, 86400.0], ids=["back", "forward"])
def test_a_clock_that_jumps_costs_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float) -> None:
    """Between an attempt and the next sweep: a living attempt of another machine is kept, or its writer is told."""
    folder = make(tmp_path)
    real = time.time
    held = committed_files(folder)
    with commits.BlockWriter(folder, GROUP, [CLS, PATCHES], 1, 16, 32, 16) as writer:
        other = writer.home.with_name(f"unknown-1-{'0' * 32}")
        other.mkdir()
        monkeypatch.setattr(time, "time", lambda: real() + shift)
        run_gc_of_an_hour(tmp_path)
        assert other.exists() == (shift < 0)
        for path in (writer.home, folder / "attempts"):
            if path.exists():
                os.utime(path, (real() + shift, real() + shift))
        commits.sweep_attempts(folder, older_than=3600.0)
    monkeypatch.setattr(time, "time", real)
    write_missing(folder, 1, block_rows=16)
    assert len(check_blocks(folder, {1})) == 3
    assert {path: committed_files(folder)[path] for path in held} == held
    assert verify_set(Store(tmp_path), Store(tmp_path).entry("demo/tiny"), deep=True).ok


def run_gc_of_an_hour(root: Path) -> None:
    store = Store(root)
    for item in plan_gc(store):
        collect(store, item)
