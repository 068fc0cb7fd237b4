"""Writers that die, freeze, race or meet a full disk: what is committed is whole, of one attempt, and never changes."""

import errno
import itertools
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_sets import (
    CLS,
    PATCHES,
    KilledError,
    Trap,
    check_blocks,
    committed_files,
    kill,
    leftovers,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    values_of,
    write_block,
    writer_of,
)

from featstore import files
from featstore.errors import StoreError
from featstore.store import commits, ledger, shards

GROUP = "cls+patches"
ROWS = 12  # one block of 16, so that the last shard is short
SLOW = pytest.mark.slow
BEFORE_AFTER = pytest.mark.parametrize(
    "after", [pytest.param(False, id="before"), pytest.param(True, id="after", marks=SLOW)]
)


@pytest.fixture(autouse=True)
def _several_shards_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_LIMIT_BYTES", 8 * CLS.row_bytes)  # 8 rows of cls, 2 of patches
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here cuts the power, and the page cache outlives a kill


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """An empty set of one block, to be copied."""
    return new_set(tmp_path / "template")


def new_set(root: Path, rows: int = ROWS, block_rows: int = 16) -> Path:
    return prepare(root, make_spec_of(block_rows=block_rows), make_manifest(named(rows)), [CLS, PATCHES])


def copied(template: Path, folder: Path) -> Path:
    shutil.copytree(template, folder)
    return folder


def settle(folder: Path, block_rows: int = 16) -> None:
    commits.finish_intents(folder, ledger.read_ledger(folder), block_rows)
    commits.sweep_attempts(folder, older_than=0.0)
    assert leftovers(folder) == []


def count_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Disk-changing calls of one undisturbed commit."""
    trap = Trap(at=-1, then=kill)
    folder = new_set(tmp_path / "count")
    with monkeypatch.context() as patch:
        trap.install(patch)
        write_block(folder, GROUP, 0, 1)
    assert {"link", "unlink", "rename", "fsync", "mkdir", "rmdir"} <= set(trap.seen)
    return trap.count


@BEFORE_AFTER
def test_a_writer_that_dies_at_any_call_loses_nothing(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    winners = set()
    for at in range(1, count_calls(tmp_path, monkeypatch) + 1):
        folder = copied(template, tmp_path / str(at))
        with monkeypatch.context() as patch:
            trap = Trap(at=at, then=kill, after=after)
            trap.install(patch)
            with pytest.raises(KilledError):
                write_block(folder, GROUP, 0, 1)
        before = committed_files(folder)
        decided = commits.intent_path(folder, GROUP, 0).exists() or bool(before)
        write_block(folder, GROUP, 0, 2)
        found = check_blocks(folder, {1, 2})
        assert found == {(GROUP, 0): 1 if decided else 2}, trap.seen[-1]
        winners.add(found[GROUP, 0])
        after_all = committed_files(folder)
        assert {name: after_all[name] for name in before} == before
        settle(folder)
        assert committed_files(folder) == after_all
    assert winners == {1, 2}


def test_a_dead_writers_decision_is_finished_by_the_next_run(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = 0
    for at in range(1, count_calls(tmp_path, monkeypatch) + 1):
        folder = copied(template, tmp_path / str(at))
        with monkeypatch.context() as patch:
            Trap(at=at, then=kill).install(patch)
            with pytest.raises(KilledError):
                write_block(folder, GROUP, 0, 1)
        decided = commits.intent_path(folder, GROUP, 0).exists()
        finished += commits.finish_intents(folder, ledger.read_ledger(folder), 16)
        if decided:
            assert check_blocks(folder, {1}) == {(GROUP, 0): 1}
        commits.sweep_attempts(folder, older_than=0.0)
        assert leftovers(folder) == []
    assert finished > 10


@BEFORE_AFTER
def test_a_writer_that_freezes_at_any_call_changes_nothing_when_it_wakes(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    for at in range(1, count_calls(tmp_path, monkeypatch) + 1):
        folder = copied(template, tmp_path / str(at))
        seen: dict[str, Any] = {}

        def other(folder: Path = folder, seen: dict[str, Any] = seen) -> None:
            write_block(folder, GROUP, 0, 2)
            seen.update(committed_files(folder))

        with monkeypatch.context() as patch:
            trap = Trap(at=at, then=other, after=after)
            trap.install(patch)
            won = write_block(folder, GROUP, 0, 1)
        assert trap.sprung
        assert len(seen) > 3
        assert committed_files(folder) == seen
        assert check_blocks(folder, {1, 2}) == {(GROUP, 0): 1 if won else 2}
        settle(folder)


def freeze_and_kill(template: Path, root: Path, monkeypatch: pytest.MonkeyPatch, freeze: int, death: int) -> None:
    """A freezes at one call, B dies at one of its own, A goes on, C comes last."""
    folder = copied(template, root)

    def other() -> None:
        with monkeypatch.context() as patch:
            Trap(at=death, then=kill).install(patch)
            with suppress(KilledError):
                write_block(folder, GROUP, 0, 2)

    with monkeypatch.context() as patch:
        Trap(at=freeze, then=other).install(patch)
        write_block(folder, GROUP, 0, 1)
    held = committed_files(folder)
    found = check_blocks(folder, {1, 2})
    assert len(found) == 1
    write_block(folder, GROUP, 0, 3)
    settle(folder)
    assert committed_files(folder) == held


def test_freezing_and_dying_writers_together(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(tmp_path, monkeypatch)
    pairs = random.Random(0).sample(list(itertools.product(range(1, calls + 1), repeat=2)), 60)
    for number, (freeze, death) in enumerate(pairs):
        freeze_and_kill(template, tmp_path / str(number), monkeypatch, freeze, death)


@pytest.mark.slow
def test_freezing_and_dying_writers_in_many_orders(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(tmp_path, monkeypatch)
    for freeze, death in random.Random(1).sample(list(itertools.product(range(1, calls + 1), repeat=2)), 1000):
        freeze_and_kill(template, tmp_path / f"{freeze}-{death}", monkeypatch, freeze, death)


@BEFORE_AFTER
def test_a_frozen_finisher_cannot_touch_a_block_that_was_taken_back_and_made_again(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """The worst case: A freezes after its decision, B finishes it, takes the block back and commits other bytes."""
    kept = 0
    for at in range(1, count_calls(tmp_path, monkeypatch) + 1):
        folder = copied(template, tmp_path / str(at))
        seen: dict[str, Any] = {}

        def other(folder: Path = folder, seen: dict[str, Any] = seen) -> None:
            write_block(folder, GROUP, 0, 2)
            commits.take_back(folder, GROUP, [CLS, PATCHES], 0, 16)
            write_block(folder, GROUP, 0, 3)
            seen.update(committed_files(folder))

        with monkeypatch.context() as patch:
            Trap(at=at, then=other, after=after).install(patch)
            with suppress(StoreError):
                write_block(folder, GROUP, 0, 1)
        assert committed_files(folder) == seen
        kept += check_blocks(folder, {3}) == {(GROUP, 0): 3}
        settle(folder)
    assert kept == at


def test_dying_while_a_block_is_taken_back(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leftover shards of other content are replaced, also where two finish the next commit at once."""
    for at in itertools.count(1):
        folder = copied(template, tmp_path / str(at))
        write_block(folder, GROUP, 0, 1)
        with monkeypatch.context() as patch:
            trap = Trap(at=at, then=kill)
            trap.install(patch)
            with suppress(KilledError):
                commits.take_back(folder, GROUP, [CLS, PATCHES], 0, 16)
        if not trap.sprung:
            break
        commits.take_back(folder, GROUP, [CLS, PATCHES], 0, 16)
        assert commits.committed_blocks(folder, GROUP) == set()
        write_block(folder, GROUP, 0, 2)
        assert check_blocks(folder, {2}) == {(GROUP, 0): 2}
    assert at > 1


@pytest.mark.slow  # in a bucket it runs always
def test_two_finishers_replace_a_leftover_without_harming_the_commit(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 3 * count_calls(tmp_path, monkeypatch)
    for at in range(1, calls):
        folder = copied(template, tmp_path / str(at))
        write_block(folder, GROUP, 0, 1)
        commits.take_back(folder, GROUP, [CLS, PATCHES], 0, 16)
        seen: dict[str, Any] = {}

        def other(folder: Path = folder, seen: dict[str, Any] = seen) -> None:
            commits.finish_intents(folder, ledger.read_ledger(folder), 16)
            write_block(folder, GROUP, 0, 3)
            seen.update(committed_files(folder))

        with monkeypatch.context() as patch:
            trap = Trap(at=at, then=other)
            trap.install(patch)
            write_block(folder, GROUP, 0, 2)
        if not trap.sprung:
            break
        assert committed_files(folder) == seen
        check_blocks(folder, {2, 3})
        settle(folder)
    assert calls / 3 < at < calls - 1


FAULTS = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO]


@pytest.mark.parametrize("code", [errno.ENOSPC, *(pytest.param(code, marks=SLOW) for code in FAULTS[1:])])
def test_a_disk_that_refuses_once_gives_a_clear_error_and_half_of_nothing(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    messages: list[str] = []
    for at in range(1, count_calls(tmp_path, monkeypatch) + 1):
        folder = copied(template, tmp_path / str(at))

        def refuse() -> None:
            raise OSError(code, os.strerror(code), "a file")

        with monkeypatch.context() as patch:
            Trap(at=at, then=refuse).install(patch)
            try:
                write_block(folder, GROUP, 0, 1)
            except StoreError as error:
                messages.append(str(error))
        check_blocks(folder, {1})
        write_block(folder, GROUP, 0, 2)
        assert len(check_blocks(folder, {1, 2})) == 1
        settle(folder)
    assert len(messages) > 20
    assert all(f"cannot write ({os.strerror(code)})" in message for message in messages)
    assert all("run the same command again; what is committed stays" in message for message in messages)


class RefusingFile:
    """A file whose writes fail after a number of bytes, as on a full disk."""

    def __init__(self, file: Any, code: int, budget: list[int]):
        self.file, self.code, self.budget = file, code, budget

    def write(self, data: Any) -> int:
        self.budget[0] -= len(data)
        if self.budget[0] < 0:
            raise OSError(self.code, os.strerror(self.code))
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "RefusingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("code", FAULTS, ids=[errno.errorcode[code] for code in FAULTS])
def test_writes_that_fail_leave_the_block_pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    import builtins

    real = builtins.open
    for budget in range(0, 1400, 100):
        folder = new_set(tmp_path / str(budget), rows=28)
        write_block(folder, GROUP, 0, 1)
        held = committed_files(folder)
        left = [budget]

        def opened(path: Any, mode: str = "r", *args: Any, left: list[int] = left, **kwargs: Any) -> Any:
            file = real(path, mode, *args, **kwargs)
            return RefusingFile(file, code, left) if "x" in mode else file

        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", opened)
            with pytest.raises(
                StoreError, match=r"(attempts|commits)/.*: cannot write \(.*\); free space, fix access or name"
            ):
                write_block(folder, GROUP, 1, 1)
        assert committed_files(folder) == held
        assert leftovers(folder) == []
        write_block(folder, GROUP, 1, 2)
        assert check_blocks(folder, {1, 2}) == {(GROUP, 0): 1, (GROUP, 1): 2}


def test_a_file_system_without_hard_links_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_set(tmp_path)

    def link(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StoreError, match=r"no hard links can be made here .*; run `featstore doctor STORE`"):
        write_block(folder, GROUP, 0, 1)
    assert leftovers(folder) == []


def test_a_swept_attempt_is_told_and_does_not_block_the_next(tmp_path: Path) -> None:
    folder = new_set(tmp_path)
    with writer_of(folder, GROUP, 0) as writer:
        rows = {array.name: values_of(array, 0, ROWS, 1) for array in writer.arrays}
        writer.append(rows, [commits.RowState("1" * 32)] * ROWS)
        assert commits.sweep_attempts(folder, older_than=0.0) == 1
        with pytest.raises(StoreError, match=r"was removed before its commit .* run the same command again"):
            writer.commit()
    write_block(folder, GROUP, 0, 2)
    assert check_blocks(folder, {2}) == {(GROUP, 0): 2}
    settle(folder)


def test_a_set_removed_under_its_writer_does_not_come_back(tmp_path: Path) -> None:
    folder = new_set(tmp_path)
    with writer_of(folder, GROUP, 0) as writer:
        folder.rename(tmp_path / "gone")
        rows = {array.name: values_of(array, 0, ROWS, 1) for array in writer.arrays}
        writer.append(rows, [commits.RowState("1" * 32)] * ROWS)
        with pytest.raises(StoreError, match="the set was removed while block 0 was computed; not committed"):
            writer.commit()
    assert not any(path.is_file() for path in folder.rglob("*"))


def test_an_attempt_that_does_not_read_back_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_set(tmp_path)
    real = files.create_exclusive

    def damaging(path: Path, data: bytes) -> bool:
        if path.suffix == ".intent":
            shard = next((folder / "attempts").glob("*/patches.2"))
            raw = bytearray(shard.read_bytes())
            raw[5] ^= 1
            shard.write_bytes(raw)
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "create_exclusive", damaging)
        with pytest.raises(StoreError, match=r"the shard just published is damaged .*; not committed; check the disk"):
            write_block(folder, GROUP, 0, 1)
    assert check_blocks(folder, {1}) == {}
    assert leftovers(folder) == []
    write_block(folder, GROUP, 0, 2)
    assert check_blocks(folder, {2}) == {(GROUP, 0): 2}
