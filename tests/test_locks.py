"""One writer at a time: the lock of stores that need it."""

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_sets import (
    CLS,
    PATCHES,
    check_blocks,
    fork,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    wait,
    write_missing,
    writer_of,
)

from featstore import doctor, files
from featstore.errors import StoreError
from featstore.store import locks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def single(tmp_path: Path) -> Path:
    doctor._write(tmp_path / files.MODE, files.sealed({"mode": "single", "fsync": True, "probed": ""}))
    return tmp_path


def left(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith(locks.LOCK))


def held_by_another(root: Path, name: str, *, age: float = 0.0) -> None:
    facts = {"name": name, "host": "node7", "pid": 4711, "time": "2026-01-01T00:00:00Z"}
    (root / locks.LOCK).write_bytes(files.sealed(facts))
    now = time.time()
    os.utime(root / locks.LOCK, (now - age, now - age))


ELSEWHERE = f"{'0' * 12}-4711-{'a' * 32}"


@pytest.mark.parametrize("mode", ["link", "rename", None])
def test_other_modes_take_no_lock(tmp_path: Path, mode: str | None) -> None:
    if mode:
        doctor._write(tmp_path / files.MODE, files.sealed({"mode": mode, "fsync": True, "probed": ""}))
    with locks.writer_lock(tmp_path) as lock, locks.writer_lock(tmp_path):
        lock.renew()
        assert left(tmp_path) == []


def test_the_lock_goes_with_its_block(single: Path) -> None:
    with locks.writer_lock(single) as lock:
        assert left(single) == [locks.LOCK]
        facts = files.unseal((single / locks.LOCK).read_bytes(), single / locks.LOCK)
        assert facts["pid"] == os.getpid()
        with locks.writer_lock(single) as again:  # a command inside a command
            assert again is lock
        assert lock.is_ours()
    assert left(single) == []
    with pytest.raises(ZeroDivisionError), locks.writer_lock(single):
        _ = 1 / 0
    assert left(single) == []


def test_a_second_writer_is_refused(single: Path) -> None:
    def second() -> None:
        with (
            pytest.raises(
                StoreError, match=rf"process {os.getppid()} on .* one writer at a time .*remove .*writer.lock"
            ),
            locks.writer_lock(single),
        ):
            pass

    with locks.writer_lock(single) as lock:
        assert wait(fork(second)) == 0
        assert lock.is_ours()
        assert left(single) == [locks.LOCK]


def test_the_dead_are_taken_over_with_what_they_left(single: Path) -> None:
    folder = prepare(single, make_spec_of(block_rows=16), make_manifest(named(20)), [CLS, PATCHES])

    def die() -> None:
        locks._acquire(single)
        writer_of(folder, "cls+patches", 0).__enter__()

    assert wait(fork(die)) == 0
    assert left(single) == [locks.LOCK]
    assert len(list((folder / "attempts").iterdir())) == 1
    with locks.writer_lock(single):
        assert not (folder / "attempts").exists()
        write_missing(folder, 1, block_rows=16)
    assert len(check_blocks(folder, {1})) == 2


@pytest.mark.parametrize(("age", "taken"), [(0.0, False), (3500.0, False), (3700.0, True), (-1e6, False)])
def test_silence_of_an_hour_is_death(single: Path, monkeypatch: pytest.MonkeyPatch, age: float, taken: bool) -> None:
    held_by_another(single, ELSEWHERE, age=age)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 1e7)  # this machine's clock has no say
    if taken:
        with locks.writer_lock(single) as lock:
            assert lock.is_ours()
    else:
        with pytest.raises(StoreError, match="process 4711 on node7"), locks.writer_lock(single):
            pass
        assert left(single) == [locks.LOCK]


def test_a_writer_that_was_taken_over_stops(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locks.writer_lock(single) as lock:
        held_by_another(single, ELSEWHERE)
        lock.renew()  # too soon after the last sign of life to be looked at
        monkeypatch.setattr(locks, "RENEW_SECONDS", 0.0)
        with pytest.raises(StoreError, match="another writer took this store over while this process stood still"):
            lock.renew()
    assert files.unseal((single / locks.LOCK).read_bytes(), single / locks.LOCK)["name"] == ELSEWHERE


def test_signs_of_life(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.0)
    with locks.writer_lock(single) as lock:
        os.utime(single / locks.LOCK, (1, 1))
        lock.renew()
        assert abs((single / locks.LOCK).stat().st_mtime - time.time()) < 60


def test_a_lock_that_never_got_its_content(single: Path) -> None:
    """Its writer died between creating and writing: the announcement tells; without one, time does."""
    path = single / locks.LOCK
    path.touch()
    with pytest.raises(StoreError, match=r"process . on an unknown machine has been writing here since just now"):
        locks._acquire(single)
    os.utime(path, (time.time() - 100,) * 2)
    with locks.writer_lock(single):
        pass
    path.touch()
    assert wait(fork(lambda: (single / f"{locks.LOCK}.{files.own_name()}").touch())) == 0
    with locks.writer_lock(single):
        assert left(single) == [locks.LOCK]


def test_writers_that_start_together(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (single / f"{locks.LOCK}.{ELSEWHERE}").touch()
    monkeypatch.setattr(locks, "TRIES", 2)
    with pytest.raises(StoreError, match="other writers are starting here at the same time"), locks.writer_lock(single):
        pass
    assert left(single) == [f"{locks.LOCK}.{ELSEWHERE}"]


@pytest.mark.parametrize("rounds", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_many_start_over_a_dead_holder_and_never_two_at_once(single: Path, rounds: int) -> None:
    """Each winner creates a file that must not be there; the loser of the race for the lock is refused or waits."""

    def enter(number: int) -> None:
        while not (single / "gate").exists():
            pass
        with suppress(StoreError), locks.writer_lock(single):
            with open(single / "inside", "x"):
                time.sleep(0.002)
            (single / "inside").unlink()
            (single / f"won{number}").touch()

    won = 0
    for _ in range(rounds):
        assert wait(fork(lambda: locks._acquire(single))) == 0
        children = [fork(lambda number=number: enter(number)) for number in range(4)]
        (single / "gate").touch()
        assert [wait(child) for child in children] == [0] * 4
        (single / "gate").unlink()
        won += len(list(single.glob("won*")))
        for path in single.glob("won*"):
            path.unlink()
    assert won >= rounds
    assert left(single) == []
