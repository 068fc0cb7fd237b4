"""Writers as real processes that are killed, frozen or race: what is committed is whole and never changes."""

import os
import random
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
    check_blocks,
    committed_files,
    contents,
    fork,
    kill_after,
    leftovers,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    wait,
    write_missing,
)

from featstore.store import commits, ledger, shards

GROUP = "cls+patches"


@pytest.fixture(autouse=True)
def _several_shards_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_LIMIT_BYTES", 8 * CLS.row_bytes)  # 8 rows of cls, 2 of patches
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here cuts the power, and the page cache outlives a kill


def new_set(root: Path, rows: int, block_rows: int) -> Path:
    return prepare(root, make_spec_of(block_rows=block_rows), make_manifest(named(rows)), [CLS, PATCHES])


def settle(folder: Path, block_rows: int) -> None:
    commits.finish_intents(folder, ledger.read_ledger(folder), block_rows)
    commits.sweep_attempts(folder, older_than=0.0)
    assert leftovers(folder) == []


NUM_ROWS, BLOCK_ROWS = 152, 16


def run(root: Path, seed: int, order: int = 1) -> None:
    folder = new_set(root, NUM_ROWS, BLOCK_ROWS)
    write_missing(folder, seed, block_rows=BLOCK_ROWS, order=order)


def child_of(root: Path, seed: int, order: int = 1) -> Callable[[], None]:
    return lambda: run(root, seed, order)


def undisturbed(tmp_path: Path) -> tuple[Path, float]:
    """A set written in peace, and how long that took."""
    started = time.monotonic()
    assert wait(fork(child_of(tmp_path / "peace", 1))) == 0
    return new_set(tmp_path / "peace", NUM_ROWS, BLOCK_ROWS), time.monotonic() - started


def kill_until_done(tmp_path: Path, kills: int) -> None:
    peace, seconds = undisturbed(tmp_path)
    rng = random.Random(kills)
    done = rounds = 0
    while done < kills:
        root = tmp_path / f"war{rounds}"
        rounds += 1
        folder = root / peace.relative_to(tmp_path / "peace")
        held: dict[str, Any] = {}
        while True:
            child = fork(child_of(root, 1))
            # Short lives, so that one store takes several kills before it is complete.
            status = kill_after(child, rng.uniform(0, seconds / 3))
            assert status in (0, -signal.SIGKILL)
            now = committed_files(folder) if (folder / "ledger").is_dir() else {}
            assert {name: now[name] for name in held} == held
            held = now
            if status == 0:
                break
            done += 1
        settle(folder, BLOCK_ROWS)
        assert contents(folder) == contents(peace)


def test_killed_processes_end_in_the_bytes_of_an_undisturbed_store(tmp_path: Path) -> None:
    kill_until_done(tmp_path, 20)


@pytest.mark.slow
def test_a_hundred_killed_processes(tmp_path: Path) -> None:
    kill_until_done(tmp_path, 100)


def freeze_once(root: Path, delay: float) -> bool:
    """Freeze a writer, complete the set with other bytes, let it go on; True if it really stood in between."""
    child = fork(child_of(root, 1))
    time.sleep(delay)
    os.kill(child, signal.SIGSTOP)
    run(root, 2)
    folder = new_set(root, NUM_ROWS, BLOCK_ROWS)
    held = committed_files(folder)
    found = check_blocks(folder, {1, 2})
    assert len(found) == -(-NUM_ROWS // BLOCK_ROWS)
    os.kill(child, signal.SIGCONT)
    assert wait(child) == 0
    assert committed_files(folder) == held
    assert check_blocks(folder, {1, 2}) == found
    settle(folder, BLOCK_ROWS)
    return set(found.values()) == {1, 2}


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_frozen_processes_wake_up_to_an_unchanged_store(tmp_path: Path, count: int) -> None:
    _, seconds = undisturbed(tmp_path)
    rng = random.Random(count)
    between = [freeze_once(tmp_path / str(i), rng.uniform(0, seconds)) for i in range(count)]
    assert any(between)


@pytest.mark.parametrize("order", [pytest.param(1, marks=pytest.mark.slow), -1], ids=["same way", "towards each other"])
def test_two_processes_write_one_set(tmp_path: Path, order: int) -> None:
    for number in range(4):
        root = tmp_path / str(number)
        children = [fork(child_of(root, 1)), fork(child_of(root, 2, order))]
        assert [wait(child) for child in children] == [0, 0]
        folder = new_set(root, NUM_ROWS, BLOCK_ROWS)
        found = check_blocks(folder, {1, 2})
        assert len(found) == -(-NUM_ROWS // BLOCK_ROWS)
        settle(folder, BLOCK_ROWS)


@pytest.mark.slow
def test_a_crowd_that_writes_takes_back_dies_and_freezes(tmp_path: Path) -> None:
    rng = random.Random(5)
    _, seconds = undisturbed(tmp_path)
    root = tmp_path / "crowd"
    folder = new_set(root, NUM_ROWS, BLOCK_ROWS)
    for _ in range(30):
        children = [fork(child_of(root, seed, rng.choice([1, -1]))) for seed in range(1, 5)]
        time.sleep(rng.uniform(0, seconds))
        for child in children:
            os.kill(child, rng.choice([signal.SIGSTOP, signal.SIGKILL, 0]))
        time.sleep(rng.uniform(0, seconds / 2))
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGCONT)
        assert {wait(child) for child in children} <= {0, -signal.SIGKILL}
        check_blocks(folder, {1, 2, 3, 4})
        run(root, 1)
        assert len(check_blocks(folder, {1, 2, 3, 4})) == -(-NUM_ROWS // BLOCK_ROWS)
        settle(folder, BLOCK_ROWS)
        for block in rng.sample(range(NUM_ROWS // BLOCK_ROWS), 5):
            commits.take_back(folder, GROUP, [CLS, PATCHES], block, BLOCK_ROWS)
