"""Blocks that are computed again: the old commit stands until a whole attempt is decided in its place."""

import errno
import itertools
import os
import random
import shutil
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
    kill,
    leftovers,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    states_of,
    values_of,
    write_block,
    writer_of,
)

from featstore import files
from featstore.errors import CorruptError, StoreError
from featstore.store import commits, decisions, ledger, shards

GROUP = "cls+patches"
# At which calls something happens: some of them, or all.
STEP = pytest.mark.parametrize("step", [pytest.param(13, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
ROWS = 12


@pytest.fixture(autouse=True)
def _several_shards_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_LIMIT_BYTES", 8 * CLS.row_bytes)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(params=["link", "rename", "single"])
def template(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store whose block 0 is committed from seed 1, on a file system with hard links or without."""
    root = tmp_path / "template"
    if request.param != "link":
        root.mkdir()
        note = {"mode": request.param, "fsync": True, "probed": "2026-01-01T00:00:00Z"}
        (root / files.MODE).write_bytes(files.sealed(note))

        def refuse(source: Any, target: Any, **_: Any) -> None:
            if not os.path.exists(source):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(target))

        monkeypatch.setattr(os, "link", refuse)
    folder = prepare(root, make_spec_of(block_rows=16), make_manifest(named(ROWS)), [CLS, PATCHES])
    write_block(folder, GROUP, 0, 1)
    return root


def copied(template: Path, root: Path) -> Path:
    shutil.copytree(template, root)
    return next(root.glob("sets/*/*"))


def replace_block(folder: Any, group: str, seed: int, before: Callable[[], None] = lambda: None) -> bool:
    """Compute block 0 again and commit it in the place of what is committed when that begins."""
    over = None
    with suppress(FileNotFoundError):
        over = decisions.read_marker(folder, group, 0)
    with writer_of(folder, group, 0) as writer:
        rows = {array.name: values_of(array, writer.start, writer.stop, seed) for array in writer.arrays}
        writer.append(rows, states_of(writer.stop - writer.start, seed))
        before()
        return writer.commit(over=over)


def restart(folder: Path) -> None:
    """What the next run does first."""
    commits.finish_intents(folder, ledger.read_ledger(folder), 16)
    commits.sweep_attempts(folder, older_than=-float("inf"))
    assert leftovers(folder) == []


def calls_of(template: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    folder, trap = copied(template, root), Trap(at=-1, then=kill)
    with monkeypatch.context() as patch:
        trap.install(patch)
        assert replace_block(folder, GROUP, 2)
    return trap.count


def test_a_replacement_counts_and_leaves_nothing(template: Path, tmp_path: Path) -> None:
    folder = copied(template, tmp_path / "one")
    assert replace_block(folder, GROUP, 2)
    assert check_blocks(folder, {2}) == {(GROUP, 0): 2}
    assert leftovers(folder) == []
    held = committed_files(folder)
    assert replace_block(folder, GROUP, 2)  # the same bytes
    assert committed_files(folder) == held
    assert leftovers(folder) == []


def test_the_first_of_two_replacements_counts(template: Path, tmp_path: Path) -> None:
    folder = copied(template, tmp_path / "one")
    won: list[bool] = []
    assert not replace_block(folder, GROUP, 2, lambda: won.append(replace_block(folder, GROUP, 3)))
    assert won == [True]
    assert check_blocks(folder, {3}) == {(GROUP, 0): 3}
    assert leftovers(folder) == []


@STEP
def test_dying_at_any_call_leaves_the_old_block_or_the_intent_of_the_new_one(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    found = []
    for at, after in itertools.product(range(1, calls_of(template, tmp_path / "count", monkeypatch) + 1, step), (0, 1)):
        folder = copied(template, tmp_path / f"{at}-{after}")
        with monkeypatch.context() as patch:
            Trap(at=at, then=kill, after=bool(after)).install(patch)
            with pytest.raises(KilledError):
                replace_block(folder, GROUP, 2)
        is_decided = commits.intent_path(folder, GROUP, 0).exists()
        marked = commits.committed_blocks(folder, GROUP) == {0}
        assert marked or is_decided
        restart(folder)
        [seed] = check_blocks(folder, {1, 2}).values()
        assert seed == 2 or not is_decided
        found.append((marked, is_decided, seed))
        shutil.rmtree(folder.parents[2])
    if step == 1:
        assert {(True, False, 1), (False, True, 2), (True, False, 2)} <= set(found)


@STEP
def test_who_freezes_at_any_call_changes_nothing_when_it_wakes(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    for at, after in itertools.product(range(1, calls_of(template, tmp_path / "count", monkeypatch) + 1, step), (0, 1)):
        folder = copied(template, tmp_path / f"{at}-{after}")
        seen: dict[str, Any] = {}

        def other(folder: Path = folder, seen: dict[str, Any] = seen) -> None:
            restart_others(folder)
            assert replace_block(folder, GROUP, 3)
            seen.update(committed_files(folder))

        with monkeypatch.context() as patch:
            trap = Trap(at=at, then=other, after=bool(after))
            trap.install(patch)
            with suppress(StoreError):
                replace_block(folder, GROUP, 2)
        assert trap.sprung
        assert committed_files(folder) == seen
        assert check_blocks(folder, {3}) == {(GROUP, 0): 3}
        restart(folder)
        shutil.rmtree(folder.parents[2])


def restart_others(folder: Path) -> None:
    """Another process comes while this one stands still: it finishes what is decided and sweeps nothing."""
    commits.finish_intents(folder, ledger.read_ledger(folder), 16)


@STEP
def test_freezing_and_dying_together(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A freezes, B finishes its decision or makes its own and dies at one of its calls, A goes on."""
    calls = calls_of(template, tmp_path / "count", monkeypatch)
    pairs = random.Random(0).sample(list(itertools.product(range(1, calls + 1), range(1, 2 * calls))), 120 // step)
    for freeze, death in pairs:
        folder = copied(template, tmp_path / f"{freeze}-{death}")

        def other(folder: Path = folder, death: int = death) -> None:
            with monkeypatch.context() as patch:
                Trap(at=death, then=kill).install(patch)
                with suppress(KilledError):
                    restart_others(folder)
                    replace_block(folder, GROUP, 3)

        with monkeypatch.context() as patch:
            Trap(at=freeze, then=other).install(patch)
            with suppress(StoreError):
                replace_block(folder, GROUP, 2)
        restart(folder)
        assert check_blocks(folder, {1, 2, 3}).keys() == {(GROUP, 0)}
        shutil.rmtree(folder.parents[2])


def test_a_finisher_that_moves_the_new_marker_away_puts_it_back(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked when the old one stood there, and moves what stands there when another has just marked the block."""
    folder = copied(template, tmp_path / "one")
    home = folder / "attempts"
    real = commits.mark

    def mark(*arguments: Any) -> None:
        real(*arguments)
        [attempt] = home.iterdir()
        os.replace(commits.marker_path(folder, GROUP, 0), attempt / commits.REPLACED)

    monkeypatch.setattr(commits, "mark", mark)
    assert replace_block(folder, GROUP, 2)
    assert check_blocks(folder, {2}) == {(GROUP, 0): 2}
    assert leftovers(folder) == []


def test_a_damaged_attempt_does_not_take_the_place_of_a_block(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(template, tmp_path / "one")
    held = committed_files(folder)

    def damage() -> None:
        [path] = folder.glob("attempts/*/cls.0")
        data = bytearray(path.read_bytes())
        data[3] ^= 1
        path.write_bytes(data)

    with pytest.raises(StoreError, match=r"cls\.0: the shard just written is damaged .*; not committed; check the di"):
        replace_block(folder, GROUP, 2, damage)
    assert committed_files(folder) == held
    assert leftovers(folder) == []


def test_an_intent_whose_shards_are_gone_moves_no_marker(template: Path, tmp_path: Path) -> None:
    folder = copied(template, tmp_path / "one")
    held = committed_files(folder)
    with writer_of(folder, GROUP, 0) as writer:
        rows = {array.name: values_of(array, 0, ROWS, 2) for array in writer.arrays}
        writer.append(rows, states_of(ROWS, 2))
        writer._write_marker()
        decisions.decide(folder, GROUP, 0, writer.attempt, decisions.read_marker(folder, GROUP, 0))
        (writer.home / "cls.0").unlink()
        with suppress(CorruptError):
            commits.finish_intents(folder, ledger.read_ledger(folder), 16)
    assert committed_files(folder) == held
    assert leftovers(folder) == []
