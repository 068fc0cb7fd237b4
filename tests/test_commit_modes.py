"""Stores where hard links are absent: the same bytes, and the same safety, by renaming copies or by one writer."""

import errno
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
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
    contents,
    fork,
    kill,
    kill_after,
    leftovers,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    wait,
    write_block,
    write_missing,
    writer_of,
)

from featstore import files
from featstore.errors import StoreError
from featstore.store import commits, ledger, locks, shards

GROUP = "cls+patches"
ROWS = 12
MODES = ("rename", "single")
SLOW = pytest.mark.slow
# Before or after which calls something happens: a quarter of them, or all.
AT = pytest.mark.parametrize(
    ("after", "step"),
    [
        pytest.param(False, 4, id="some"),
        pytest.param(False, 1, id="before", marks=SLOW),
        pytest.param(True, 1, id="after", marks=SLOW),
    ],
)


@pytest.fixture(autouse=True)
def _several_shards_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_LIMIT_BYTES", 8 * CLS.row_bytes)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def refuse_links(monkeypatch: pytest.MonkeyPatch, code: int = errno.EPERM) -> None:
    def refuse(source: Any, target: Any, **_: Any) -> None:
        if not os.path.exists(source):  # what a system looks at first
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
        raise OSError(code, os.strerror(code), str(target))

    monkeypatch.setattr(os, "link", refuse)


def new_store(root: Path, mode: str, fsync: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / files.MODE).write_bytes(files.sealed({"mode": mode, "fsync": fsync, "probed": "2026-01-01T00:00:00Z"}))
    return root


def new_set(root: Path, mode: str, rows: int = ROWS) -> Path:
    new_store(root, mode)
    return prepare(root, make_spec_of(block_rows=16), make_manifest(named(rows)), [CLS, PATCHES])


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_links(monkeypatch)


def stamped(root: Path, template: Path) -> Path:
    """A copy of a whole store; the folder of its set."""
    shutil.copytree(template, root)
    return next(root.glob("sets/*/*"))


@pytest.fixture
def make_set(tmp_path: Path, no_links: None) -> Callable[[str, object], Path]:
    """A fresh empty set in a store of a mode, copied from a template."""

    def make(mode: str, name: object) -> Path:
        template = tmp_path / f"template-{mode}"
        if not template.exists():
            new_set(template, mode)
        return stamped(tmp_path / mode / str(name), template)

    return make


def settle(folder: Path) -> None:
    commits.finish_intents(folder, ledger.read_ledger(folder), 16)
    commits.sweep_attempts(folder, older_than=-float("inf"))
    assert leftovers(folder) == []


def count_calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Disk-changing calls of one undisturbed commit."""
    trap = DeepTrap(at=-1, then=kill)
    with monkeypatch.context() as patch:
        trap.install(patch)
        write_block(folder, GROUP, 0, 1)
    assert {"rename", "unlink", "copy", "mkdir"} <= set(trap.seen)
    assert ("renameat2" in trap.seen) == (files.commit_mode(folder) == "rename")
    return trap.count


class DeepTrap(Trap):
    """A trap that also sees copies and exclusive renames, which are no functions of `os`."""

    def install(self, monkeypatch: Any) -> None:
        super().install(monkeypatch)
        monkeypatch.setattr(files, "rename_new", self._wrap("renameat2", files.rename_new))
        monkeypatch.setattr(files, "_copy_synced", self._wrap("copy", files._copy_synced))


# --- the same bytes


@pytest.mark.parametrize("code", sorted(files.NO_LINKS), ids=lambda code: errno.errorcode[code])
def test_every_mode_makes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    made = {}
    for mode in ("link", *MODES):
        with monkeypatch.context() as patch:
            if mode == "link":
                folder = prepare(tmp_path / mode, make_spec_of(block_rows=16), make_manifest(named(40)), [CLS, PATCHES])
            else:
                refuse_links(patch, code)
                folder = new_set(tmp_path / mode, mode, rows=40)
            write_missing(folder, 1, block_rows=16)
            assert check_blocks(folder, {1}) == {(GROUP, block): 1 for block in range(3)}
            assert leftovers(folder) == []
            made[mode] = contents(folder)
    assert made["rename"] == made["link"]
    assert made["single"] == made["link"]


def test_a_block_taken_back_is_made_again(mode: str, make_set: Callable[[str, object], Path]) -> None:
    folder = make_set(mode, "again")
    write_block(folder, GROUP, 0, 1)
    commits.take_back(folder, GROUP, ledger.read_ledger(folder).groups[GROUP], 0, 16)
    assert write_block(folder, GROUP, 0, 2)
    assert check_blocks(folder, {2}) == {(GROUP, 0): 2}
    assert leftovers(folder) == []


def test_leaving_without_a_decision_leaves_nothing(mode: str, make_set: Callable[[str, object], Path]) -> None:
    folder = make_set(mode, "left")
    before = contents(folder)
    with writer_of(folder, GROUP, 0):
        pass
    assert contents(folder) == before


def test_a_grown_set(mode: str, tmp_path: Path, no_links: None) -> None:
    folder = new_set(tmp_path, mode)
    write_missing(folder, 1, block_rows=16)
    prepare(tmp_path, make_spec_of(block_rows=16), make_manifest(named(ROWS + 9)), [CLS, PATCHES])
    write_missing(folder, 2, block_rows=16)
    assert check_blocks(folder, {1, 2}) == {(GROUP, 0): 1, (GROUP, 1): 2}


def test_without_a_settled_mode_nothing_is_written(tmp_path: Path, no_links: None) -> None:
    with pytest.raises(StoreError, match=r"no hard links can be made here .*featstore doctor STORE"):
        prepare(tmp_path, make_spec_of(), make_manifest(named(3)), [CLS])


def test_a_link_store_that_lost_its_links_is_told(tmp_path: Path, no_links: None) -> None:
    """A mode.json that only notes the absence of fsync does not permit plain renames."""
    with pytest.raises(StoreError, match="no hard links can be made here"):
        new_set(tmp_path, "link")


# --- deaths


@AT
def test_a_writer_that_dies_at_any_call_loses_nothing(
    mode: str, make_set: Callable[[str, object], Path], monkeypatch: pytest.MonkeyPatch, after: bool, step: int
) -> None:
    winners = set()
    for at in range(1, count_calls(make_set(mode, "count"), monkeypatch) + 1, step):
        folder = make_set(mode, at)
        with monkeypatch.context() as patch:
            trap = DeepTrap(at=at, then=kill, after=after)
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


def test_a_shard_that_vanishes_is_put_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the decision is never given up for it."""
    folder = new_set(tmp_path, "rename")
    link, left = files.link_kept, 1

    def vanishing(source: Path, final: Path) -> bool:
        nonlocal left
        published = link(source, final)
        if "data.zarr" in final.parts and left > 0:
            left -= 1
            final.unlink()
        return published

    with monkeypatch.context() as patch:
        patch.setattr(files, "link_kept", vanishing)
        assert write_block(folder, GROUP, 0, 1)
        commits.take_back(folder, GROUP, [CLS, PATCHES], 0, 16)
        left = 2
        patch.setattr(files, "replace_kept", lambda source, final, seen: None)
        with pytest.raises(StoreError, match="the shard just published is not there; not committed; check the disk"):
            write_block(folder, GROUP, 0, 1)
    assert commits.finish_intents(folder, ledger.read_ledger(folder), 16) == 1
    check_blocks(folder, {1})


def test_commits_and_progress_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_links: None) -> None:
    folder, lock_file, told = new_set(tmp_path, "single"), tmp_path / locks.LOCK, []
    with locks.writer_lock(tmp_path) as lock:
        monkeypatch.setattr(locks, "RENEW_SECONDS", 0.0)
        for work in (lambda: write_block(folder, GROUP, 0, 1), lambda: lock.renewing(lambda *n: told.append(n))(3, 1)):
            os.utime(lock_file, (1, 1))
            work()
            assert abs(lock_file.stat().st_mtime - time.time()) < 60
    assert told == [(3, 1)]
    assert locks.held_lock(tmp_path) is None


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=SLOW)])
def test_killed_processes_lose_nothing(
    mode: str, make_set: Callable[[str, object], Path], kills: int, tmp_path: Path
) -> None:
    """Real processes, real SIGKILL; the lock of the dead is taken over."""
    folder = make_set(mode, "killed")
    root = folder.parents[2]
    prepare(root, make_spec_of(block_rows=16), make_manifest(named(16 * 8)), [CLS, PATCHES])
    rng = random.Random(kills)

    def run(seed: int) -> None:
        with locks.writer_lock(root) as lock:
            book = ledger.read_ledger(folder)
            commits.finish_intents(folder, book, 16)
            write_missing(folder, seed, block_rows=16)
            lock.renew()

    held: dict[str, Any] = {}
    for seed in range(1, kills + 1):
        status = kill_after(fork(lambda seed=seed: run(seed)), rng.uniform(0.002, 0.06))
        assert status in (-signal.SIGKILL, 0)
        now = committed_files(folder)
        assert {name: now[name] for name in held} == held
        held = now
    run(99)
    found = check_blocks(folder, {*range(1, kills + 1), 99})
    assert len(found) == len(ledger.read_ledger(folder).blocks(16))
    now = committed_files(folder)
    assert {name: now[name] for name in held} == held
    settle(folder)
    assert not list(root.glob("writer.lock*"))


# --- writers that stand still, `rename` only: in `single` nobody may overtake


@AT
def test_a_writer_that_freezes_at_any_call_changes_nothing_when_it_wakes(
    make_set: Callable[[str, object], Path], monkeypatch: pytest.MonkeyPatch, after: bool, step: int
) -> None:
    for at in range(1, count_calls(make_set("rename", "count"), monkeypatch) + 1, step):
        folder = make_set("rename", at)
        seen: dict[str, Any] = {}

        def other(folder: Path = folder, seen: dict[str, Any] = seen) -> None:
            write_block(folder, GROUP, 0, 2)
            seen.update(committed_files(folder))

        with monkeypatch.context() as patch:
            trap = DeepTrap(at=at, then=other, after=after)
            trap.install(patch)
            won = write_block(folder, GROUP, 0, 1)
        assert trap.sprung
        assert len(seen) > 3
        assert committed_files(folder) == seen
        assert check_blocks(folder, {1, 2}) == {(GROUP, 0): 1 if won else 2}
        settle(folder)


@AT
def test_a_frozen_finisher_cannot_touch_a_block_that_was_taken_back_and_made_again(
    make_set: Callable[[str, object], Path], monkeypatch: pytest.MonkeyPatch, after: bool, step: int
) -> None:
    """A freezes after its decision, B finishes it, takes the block back and commits other bytes."""
    for at in range(1, count_calls(make_set("rename", "count"), monkeypatch) + 1, step):
        folder = make_set("rename", at)
        seen: dict[str, Any] = {}

        def other(folder: Path = folder, seen: dict[str, Any] = seen) -> None:
            book = ledger.read_ledger(folder)
            commits.finish_intents(folder, book, 16)
            commits.take_back(folder, GROUP, book.groups[GROUP], 0, 16)
            write_block(folder, GROUP, 0, 2)
            seen.update(committed_files(folder))

        with monkeypatch.context() as patch:
            DeepTrap(at=at, then=other, after=after).install(patch)
            with suppress(StoreError):
                write_block(folder, GROUP, 0, 1)
        assert seen
        assert committed_files(folder) == seen
        check_blocks(folder, {1, 2})
        settle(folder)


@AT
def test_a_frozen_finisher_cannot_mark_a_block_that_was_taken_back(
    make_set: Callable[[str, object], Path], monkeypatch: pytest.MonkeyPatch, after: bool, step: int
) -> None:
    """A freezes after its decision, B finishes it and takes it back: the old marker stays away."""
    finished = 0
    for at in range(1, count_calls(make_set("rename", "count"), monkeypatch) + 1, step):
        folder = make_set("rename", at)
        taken: list[bool] = []

        def other(folder: Path = folder, taken: list[bool] = taken) -> None:
            book = ledger.read_ledger(folder)
            if commits.finish_intents(folder, book, 16) and commits.marker_path(folder, GROUP, 0).exists():
                commits.take_back(folder, GROUP, book.groups[GROUP], 0, 16)
                taken.append(True)

        with monkeypatch.context() as patch:
            DeepTrap(at=at, then=other, after=after).install(patch)
            with suppress(StoreError):
                write_block(folder, GROUP, 0, 1)
        if taken:
            finished += 1
            assert not commits.marker_path(folder, GROUP, 0).exists(), at
    assert finished > 15 // step


@AT
def test_the_one_writer_that_freezes_for_an_hour_changes_nothing_when_it_wakes(
    make_set: Callable[[str, object], Path], monkeypatch: pytest.MonkeyPatch, after: bool, step: int
) -> None:
    """In `single` another one takes the lock over then, and with it what the first one could still publish."""
    for at in range(1, count_calls(make_set("single", "count"), monkeypatch) + 1, step):
        folder = make_set("single", at)
        root = folder.parents[2]
        seen: dict[str, Any] = {}

        def other(folder: Path = folder, root: Path = root, seen: dict[str, Any] = seen) -> None:
            hour_ago = time.time() - 2 * commits.STALE_SECONDS
            os.utime(root / locks.LOCK, (hour_ago, hour_ago))
            with pytest.MonkeyPatch.context() as patch:  # as another process would
                patch.setitem(locks._held, str(root), locks._acquire(root))
                commits.finish_intents(folder, ledger.read_ledger(folder), 16)
                if not commits.marker_path(folder, GROUP, 0).exists():
                    write_block(folder, GROUP, 0, 2)
            seen.update(committed_files(folder))

        with locks.writer_lock(root) as lock, monkeypatch.context() as patch:
            DeepTrap(at=at, then=other, after=after).install(patch)
            patch.setattr(locks, "RENEW_SECONDS", 0.0)
            with suppress(StoreError):
                write_block(folder, GROUP, 0, 1)
            with pytest.raises(StoreError, match="another writer took this store over"):
                lock.renew()
        assert len(seen) > 3
        assert committed_files(folder) == seen
        check_blocks(folder, {1, 2})
        settle(folder)


def freeze_and_kill(folder: Path, monkeypatch: pytest.MonkeyPatch, freeze: int, death: int) -> None:
    """A freezes at one call, B dies at one of its own, A goes on, C comes last."""

    def other() -> None:
        with monkeypatch.context() as patch:
            DeepTrap(at=death, then=kill).install(patch)
            with suppress(KilledError):
                write_block(folder, GROUP, 0, 2)

    with monkeypatch.context() as patch:
        DeepTrap(at=freeze, then=other).install(patch)
        write_block(folder, GROUP, 0, 1)
    held = committed_files(folder)
    assert len(check_blocks(folder, {1, 2})) == 1
    write_block(folder, GROUP, 0, 3)
    settle(folder)
    assert committed_files(folder) == held


@pytest.mark.parametrize("pairs", [30, pytest.param(800, marks=SLOW)])
def test_freezing_and_dying_writers_together(
    make_set: Callable[[str, object], Path], monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    calls = count_calls(make_set("rename", "count"), monkeypatch)
    orders = list(itertools.product(range(1, calls + 1), repeat=2))
    for number, (freeze, death) in enumerate(random.Random(pairs).sample(orders, pairs)):
        freeze_and_kill(make_set("rename", number), monkeypatch, freeze, death)


@pytest.mark.parametrize("rounds", [6, pytest.param(150, marks=SLOW)])
def test_racing_writers_never_tear_a_block(make_set: Callable[[str, object], Path], rounds: int) -> None:
    """Two processes write different bytes for the same blocks, in opposite order."""
    winners = set()
    for number in range(rounds):
        folder = make_set("rename", f"race{number}")
        prepare(folder.parents[2], make_spec_of(block_rows=16), make_manifest(named(16 * 4)), [CLS, PATCHES])
        gate = folder.parents[2] / "gate"

        def race(seed: int, folder: Path = folder, gate: Path = gate) -> None:
            gate.with_name(f"ready{seed}").touch()
            while not gate.exists():
                pass
            write_missing(folder, seed, block_rows=16, order=1 if seed == 1 else -1)

        children = [fork(lambda seed=seed: race(seed)) for seed in (1, 2)]
        while len(list(gate.parent.glob("ready*"))) < 2:
            time.sleep(0.001)
        gate.touch()
        assert [wait(child) for child in children] == [0, 0]
        found = check_blocks(folder, {1, 2})
        assert len(found) == len(ledger.read_ledger(folder).blocks(16))
        winners |= set(found.values())
        settle(folder)
    assert winners == {1, 2}
