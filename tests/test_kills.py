"""SIGKILL at any time: nothing committed is lost, at most the block in flight is computed again, bytes are equal."""

import random
import shutil
import signal
import statistics
import time
from itertools import pairwise
from pathlib import Path

import pytest
from forked import Child, shared
from pictures import register_pictures, tree_bytes

from featstore.store.catalog import Store

BLOCK = 16
COMMAND = [
    "extract",
    "--dataset",
    "pics",
    "--model",
    "tiny",
    "--res",
    "42",
    "--block-rows",
    str(BLOCK),
    "--batch-size",
    "8",
]


def start(store: Path) -> Child:
    return shared().start(COMMAND, program="featstore", environment={"FEATSTORE_HOME": str(store)})


def finish(store: Path) -> str:
    ended = start(store).end()
    assert ended.code == 0, ended.out + ended.err
    return ended.out


def markers(store: Path) -> dict[Path, tuple[int, int]]:
    """Inode and mtime of every marker and of every shard that a marker names."""
    folders = list((store / "sets" / "pics").glob("tiny@42-*"))
    found = {}
    for folder in folders:
        blocks = sorted(folder.glob("commits/*/*.json"))
        shards = [shard for marker in blocks for shard in folder.glob(f"data.zarr/*/c/{int(marker.stem)}/0")]
        for path in [*blocks, *shards]:
            stat = path.stat()
            found[path] = (stat.st_ino, stat.st_mtime_ns)
    return found


def num_committed(store: Path) -> int:
    return len(list((store / "sets" / "pics").glob("tiny@42-*/commits/*/*.json")))


def seconds_per_block(store: Path) -> float:
    """Of a run that nobody killed: what is random about a kill must fit the machine."""
    times = sorted(path.stat().st_mtime for path in (store / "sets" / "pics").glob("tiny@42-*/commits/*/*.json"))
    return statistics.median(later - earlier for earlier, later in pairwise(times))


def kill_until_done(store: Path, kills: int, num_blocks: int, rng: random.Random, pace: float) -> tuple[int, int, int]:
    """Kill `kills` runs, most between the first and the last commit.

    Returns (kills in between, kills of runs that had committed, blocks redone).
    """
    between = working = redone = 0
    for number in range(kills):
        before = num_committed(store)
        held = markers(store)
        process = start(store)
        # Some die while starting; the others when a few more blocks stand, at a random moment of the next.
        wanted = before + rng.randint(1, max(1, (num_blocks - before) // (kills - number + 1)))
        deadline = time.monotonic() + (rng.uniform(0.0, 3.0) if number % 10 == 9 else 60)
        while (
            num_committed(store) < min(wanted, num_blocks - 2)
            and time.monotonic() < deadline
            and process.poll() is None
        ):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, pace))
        process.kill()
        code = process.end().code
        after = num_committed(store)
        # What a killed run leaves is taken away by the next: so these are the blocks it had begun and not committed.
        redone += len(list((store / "sets" / "pics").glob("tiny@42-*/attempts/*")))
        killed = code == -signal.SIGKILL
        between += killed and 0 < after < num_blocks
        working += killed and before < after < num_blocks
        assert after >= before
        assert {path: markers(store)[path] for path in held} == held
    return between, working, redone


@pytest.mark.parametrize(
    ("kills", "count"), [(1, 96), pytest.param(20, 600, marks=pytest.mark.slow)], ids=["one", "twenty"]
)
def test_killed_runs_lose_nothing(tmp_path: Path, kills: int, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    store, calm = tmp_path / "store", tmp_path / "calm"
    register_pictures(store, tmp_path / "data", count)
    shutil.copytree(store, calm)
    finish(calm)
    num_blocks = -(-count // BLOCK)
    pace = seconds_per_block(calm)
    between, working, redone = kill_until_done(store, kills, num_blocks, random.Random(kills), pace)
    held = markers(store)
    finish(store)
    assert {path: markers(store)[path] for path in held} == held
    a, b = (Store(path)["pics", "tiny@42"].folder for path in (calm, store))
    assert tree_bytes(b) == tree_bytes(a)
    with capsys.disabled():
        print(
            f"\n{kills} kills, {between} between the first and the last of {num_blocks} commits, "
            f"{working} of runs that had committed; "
            f"{redone} blocks of {BLOCK} rows begun again"
        )
    assert between >= kills // 2
    assert working >= max(1, kills // 4)
    assert redone <= kills  # one block in flight a run


def test_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    store = tmp_path / "store"
    register_pictures(store, tmp_path / "data", 1000)  # some seconds of work, also where the machine is busy
    process = start(store)
    while num_committed(store) < 2 and process.poll() is None:
        time.sleep(0.002)
    process.kill(signal.SIGINT)
    ended = process.end(60)
    output = ended.out + ended.err
    assert ended.code == 130, output
    assert "what is committed stays, the same command goes on from there" in output
    assert "Traceback" not in output
    finish(store)
    assert Store(store)["pics", "tiny@42"].ok.all()
    assert not list((store / "sets").glob("pics/*/attempts"))
