"""Shards on a local disk until their block is whole: the same bytes, nothing half, no room is no harm."""

import errno
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_sets import (
    CLS,
    PATCHES,
    check_blocks,
    contents,
    fork,
    leftovers,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    states_of,
    values_of,
    wait,
    writer_of,
)

from featstore.errors import ConfigError, StoreError
from featstore.store import commits, scratch, shards
from featstore.store.commits import BlockWriter

GROUP = "cls+patches"
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards, "SHARD_LIMIT_BYTES", 200)  # several shards a block
    return prepare(tmp_path / "store", make_spec_of(block_rows=16), make_manifest(named(20)), [CLS, PATCHES])


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    return tmp_path / "disk" / "job"


def writer_at(folder: Path, block: int, stage: Path | None) -> BlockWriter:
    writer = writer_of(folder, GROUP, block)
    return BlockWriter(
        folder, GROUP, writer.arrays, block, writer.start, writer.stop, writer.rows_per_block, stage=stage
    )


def fill(writer: BlockWriter, seed: int, *, step: int = 5, stop: int | None = None) -> None:
    for first in range(writer.start, stop or writer.stop, step):
        last = min(first + step, writer.stop)
        writer.append(
            {array.name: values_of(array, first, last, seed) for array in writer.arrays}, states_of(last - first, seed)
        )


def local_files(stage: Path) -> list[Path]:
    return sorted(path for path in stage.rglob("*") if path.is_file())


def test_bytes_are_those_of_a_run_without_a_stage(tmp_path: Path, folder: Path, stage: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder.parents[2], other)
    plain = other / folder.relative_to(folder.parents[2])
    for block in (0, 1):
        for place, where in ((folder, stage), (plain, None)):
            with writer_at(place, block, where) as writer:
                fill(writer, 3)
                assert writer.commit()
                assert writer.notes == []
    assert contents(folder) == contents(plain)
    assert check_blocks(folder, {3}) == {(GROUP, 0): 3, (GROUP, 1): 3}
    assert list((stage / "writing").iterdir()) == []
    assert leftovers(folder) == []


def test_shards_stand_on_the_stage_until_the_commit(folder: Path, stage: Path) -> None:
    with writer_at(folder, 0, stage) as writer:
        fill(writer, 1)
        names = {path.name for path in local_files(stage)}
        assert len(names) > 2
        assert all(os.stat(path).st_mode & 0o077 == 0 for path in [stage / "writing"])
        assert list(writer.home.iterdir()) == []  # type: ignore[arg-type]
        assert writer.commit()
        assert local_files(stage) == []
    assert check_blocks(folder, {1}) == {(GROUP, 0): 1}


def test_what_is_copied_is_on_the_disk_before_the_block_is_decided(
    folder: Path, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    decided: list[int] = []
    decide = commits.decide
    monkeypatch.setattr(commits, "decide", lambda *place: (decided.append(len(synced)), decide(*place))[1])
    with writer_at(folder, 0, stage) as writer:
        fill(writer, 1)
        names = {path.name for path in local_files(stage)}
        assert writer.commit()
    home = str(writer.home)
    assert {Path(path).name for path in synced[: decided[0]] if str(Path(path).parent) == home} >= names
    assert home in synced[: decided[0]], "and so are their names"


def test_a_copy_that_differs_is_not_committed(folder: Path, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.copyfile

    def flip(source: Any, target: Any) -> None:
        real(source, target)
        if Path(target).name.startswith("patches"):
            data = bytearray(Path(target).read_bytes())
            data[3] ^= 1
            Path(target).write_bytes(data)

    monkeypatch.setattr(scratch.shutil, "copyfile", flip)
    with writer_at(folder, 0, stage) as writer:
        fill(writer, 1)
        with pytest.raises(StoreError, match="the shard just published is damaged"):
            writer.commit()
    assert commits.committed_blocks(folder, GROUP) == set()
    assert local_files(stage) == []


def test_a_block_that_is_dropped_leaves_nothing(folder: Path, stage: Path) -> None:
    with writer_at(folder, 0, stage) as writer:
        fill(writer, 1, stop=10)
        assert local_files(stage) != []
    assert local_files(stage) == []
    assert leftovers(folder) == []


def test_what_a_killed_writer_left_is_swept_by_the_next(folder: Path, stage: Path) -> None:
    def work() -> None:
        with writer_at(folder, 0, stage) as writer:
            fill(writer, 1, stop=10)
            time.sleep(60)

    child = fork(work)
    while not local_files(stage):
        time.sleep(0.01)
    with writer_at(folder, 1, stage) as writer:
        fill(writer, 2)
        assert len({path.parent for path in local_files(stage)}) == 2, "of a living one nothing is taken"
        assert writer.commit()
    os.kill(child, signal.SIGKILL)
    assert wait(child) == -9
    assert local_files(stage) != []
    with writer_at(folder, 0, stage) as writer:
        assert local_files(stage) == []
        fill(writer, 2)
        assert writer.commit()
    assert check_blocks(folder, {2}) == {(GROUP, 0): 2, (GROUP, 1): 2}


class Facts:
    f_bavail, f_frsize = 1, 4096


@pytest.mark.parametrize("how", ["told", "refused"])
def test_a_full_stage_is_done_without(folder: Path, stage: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def refuse(*_: object) -> None:
        raise FULL

    if how == "told":
        monkeypatch.setattr(os, "statvfs", lambda _: Facts)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    with writer_at(folder, 0, stage) as writer:
        fill(writer, 1)
        assert local_files(stage) == []
        assert writer.notes == [f"--stage {stage}: blocks are written to the store directly (No space left on device)"]
        assert writer.commit()
    assert check_blocks(folder, {1}) == {(GROUP, 0): 1}


def test_a_stage_that_fills_up_between_shards_takes_what_fits(
    folder: Path, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = os.posix_fallocate

    def some(descriptor: int, start: int, size: int) -> None:
        calls.append(size)
        if len(calls) > 2:
            raise FULL
        real(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", some)
    with writer_at(folder, 0, stage) as writer:
        fill(writer, 1)
        assert [path.stat().st_size for path in local_files(stage)] == sorted(calls[:2], reverse=False) or len(
            local_files(stage)
        ) == 2
        assert len(list(writer.home.iterdir())) == len(calls) - 2  # type: ignore[arg-type]
        assert writer.commit()
    assert check_blocks(folder, {1}) == {(GROUP, 0): 1}


def test_space_is_taken_in_advance_to_the_byte(folder: Path, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, int] = {}
    real = os.posix_fallocate

    def note(descriptor: int, start: int, size: int) -> None:
        sizes[Path(os.readlink(f"/proc/self/fd/{descriptor}")).name] = size
        real(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", note)
    for block in (0, 1):
        sizes.clear()
        with writer_at(folder, block, stage) as writer:
            fill(writer, 1)
            assert {path.name: path.stat().st_size for path in local_files(stage)} == sizes
            assert writer.commit()


def test_a_file_system_that_gives_no_space_in_advance_is_used(
    folder: Path, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with writer_at(folder, 0, stage) as writer:
        fill(writer, 1)
        assert len(local_files(stage)) > 2
        assert writer.commit()


def test_a_stage_that_cannot_be_made_is_done_without(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with writer_at(folder, 0, tmp_path / "file" / "stage") as writer:
        fill(writer, 1)
        assert writer.commit()
        assert "blocks are written to the store directly (Not a directory)" in writer.notes[0]


def test_a_disk_that_breaks_is_named(folder: Path, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, rows: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shards.ShardWriter, "append", fail)
    with (
        writer_at(folder, 0, stage) as writer,
        pytest.raises(
            StoreError, match=rf"{stage}: cannot write \(Input/output error\); free space there, name another --stage"
        ),
    ):
        fill(writer, 1)
    with writer_at(folder, 0, None) as writer, pytest.raises(StoreError, match="name another --store"):
        fill(writer, 1)
    assert leftovers(folder) == []


def test_a_stage_in_the_store_is_refused(folder: Path, stage: Path) -> None:
    store = folder.parents[2]
    scratch.check_stage(stage, store)
    scratch.check_stage(None, store)
    for inside in (store, store / "tmp"):
        with pytest.raises(ConfigError, match=r"lies in the store .*; name a folder on a local disk"):
            scratch.check_stage(inside, store)
