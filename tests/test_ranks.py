"""Several processes at one data set: torchrun, --rank and --world, or none who know of each other."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pictures import CONFIG as REGISTERED
from pictures import register_pictures, tree_bytes, write_pictures, write_table

from featstore.configs import RunConfig, SetConfig
from featstore.errors import ConfigError, FeatstoreError
from featstore.extraction.distributed import Ranks, find_ranks, ranks_of
from featstore.extraction.passes import Pass
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store
from featstore.store.verify import verify_set

ROOT = Path(__file__).resolve().parent.parent
CONFIG = SetConfig(model="tiny", res="42", block_rows=16)
OPTIONS = ["--model", "tiny", "--res", "42", "--block-rows", "16", "--batch-size", "8", "--device", "cpu"]


def start(store: Path, *more: str, ranks: int = 0, **options: Any) -> "subprocess.Popen[str]":
    """`featstore extract`, by torchrun where `ranks` says so, in a process group of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "featstore", "extract", *OPTIONS, "--store", str(store), *more],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def finish(process: "subprocess.Popen[str]", code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out, err


def expected(root: Path, data: Path, count: int) -> dict[str, bytes]:
    """The set as one process makes it."""
    register_pictures(root, data, count)
    run = RunConfig(device="cpu", batch_size=8)
    extract(make_plan(Store(root), "pics", CONFIG, run), run)
    return set_bytes(root)


def folder_of(store: Path) -> Path:
    return next((store / "sets/pics").iterdir())


def set_bytes(store: Path) -> dict[str, bytes]:
    return tree_bytes(folder_of(store))


def blocks_done(store: Path) -> int:
    """Blocks committed by all runs that wrote down what they did."""
    return sum(json.loads(path.read_text())["summary"]["blocks"] for path in folder_of(store).glob("runs/*.json"))


@pytest.mark.slow
def test_torchrun_makes_the_set_of_one_process(tmp_path: Path) -> None:
    before = expected(tmp_path / "one", tmp_path / "same", 100)
    register_pictures(tmp_path / "two", tmp_path / "data", 100)
    out, err = finish(start(tmp_path / "two", ranks=2))
    assert set_bytes(tmp_path / "two") == before
    assert out.count("store ") == 1  # one process speaks
    assert "computed by rank 0 of 2 in" in out
    assert err.count("loading the backbone") == 1
    assert blocks_done(tmp_path / "two") == 7
    shares = [json.loads(path.read_text())["summary"]["blocks"] for path in folder_of(tmp_path / "two").glob("runs/*")]
    assert len(shares) == 2


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_in_any_order(tmp_path: Path, world: int) -> None:
    before = expected(tmp_path / "one", tmp_path / "same", 100)
    register_pictures(tmp_path / "store", tmp_path / "data", 100)
    order = random.Random(world).sample(range(world), world)
    for rank in order:
        finish(start(tmp_path / "store", "--rank", str(rank), "--world", str(world), "--no-take-over"))
    assert set_bytes(tmp_path / "store") == before
    assert blocks_done(tmp_path / "store") == 7  # nobody did the work of another


def test_ranks_in_one_process_each_do_their_stripe(tmp_path: Path) -> None:
    before = expected(tmp_path / "one", tmp_path / "same", 100)
    register_pictures(tmp_path / "store", tmp_path / "data", 100)
    for rank, blocks in ((2, [2, 5]), (0, [0, 3, 6]), (1, [1, 4])):
        run = RunConfig(device="cpu", batch_size=8, rank=rank, world=3, take_over=False)
        summary = extract(make_plan(Store(tmp_path / "store"), "pics", CONFIG, run), run)
        assert (summary.blocks, summary.taken_over) == (len(blocks), 0)
        markers = {int(path.stem) for path in folder_of(tmp_path / "store").glob("commits/*/*.json")}
        assert markers >= set(blocks)
    assert set_bytes(tmp_path / "store") == before


def test_the_first_rank_to_end_takes_over_what_is_left(tmp_path: Path) -> None:
    before = expected(tmp_path / "one", tmp_path / "same", 100)
    register_pictures(tmp_path / "store", tmp_path / "data", 100)
    run = RunConfig(device="cpu", batch_size=8, rank=1, world=3)
    summary = extract(make_plan(Store(tmp_path / "store"), "pics", CONFIG, run), run)
    assert (summary.blocks, summary.taken_over) == (7, 5)
    assert set_bytes(tmp_path / "store") == before
    assert not (folder_of(tmp_path / "store") / "claims").exists()


@pytest.mark.slow
def test_processes_that_know_nothing_of_each_other_divide_the_work(tmp_path: Path) -> None:
    before = expected(tmp_path / "one", tmp_path / "same", 200)
    register_pictures(tmp_path / "store", tmp_path / "data", 200)
    for process in [start(tmp_path / "store") for _ in range(2)]:
        finish(process)
    assert set_bytes(tmp_path / "store") == before
    assert blocks_done(tmp_path / "store") <= 13 + 2  # both may begin with one block at the same moment


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 50])
def test_killed_ranks_lose_nothing(tmp_path: Path, kills: int) -> None:
    count = 400 if kills < 10 else 1600
    before = expected(tmp_path / "one", tmp_path / "same", count)
    store = tmp_path / "store"
    register_pictures(store, tmp_path / "data", count)
    rng = random.Random(kills)
    blocks = -(-count // 16)
    in_work = redone = 0
    for number in range(kills):
        world = rng.choice((1, 2, 3))
        processes = [
            start(store, "--rank", str(rank), "--world", str(world)) if world > 1 else start(store)
            for rank in range(world)
        ]
        held = len(list(store.glob("sets/pics/*/commits/*/*.json")))
        deadline = time.monotonic() + 60
        wanted = min(held + rng.randint(0, max(1, (blocks - held) // (kills - number + 1))), blocks - 2)
        while (
            len(list(store.glob("sets/pics/*/commits/*/*.json"))) < wanted
            and time.monotonic() < deadline
            and any(process.poll() is None for process in processes)
        ):
            time.sleep(0.005)
        in_work += processes[0].poll() is None and held < blocks
        processes[0].send_signal(signal.SIGKILL)
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, 2))  # some go on for a while without the one that was lost
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=300)
        redone += len(list(store.glob("sets/pics/*/attempts/*")))
    finish(start(store, ranks=2))
    assert set_bytes(store) == before
    assert in_work >= kills // 2
    # What a killed process leaves open is what is done again: at most one block each, and one that is helped with.
    assert redone <= 3 * kills
    [entry] = Store(store).find("pics", "tiny@42")
    assert verify_set(Store(store), entry, deep=True).ok


@pytest.mark.slow
def test_a_rank_that_wakes_up_late_harms_nothing(tmp_path: Path) -> None:
    """One rank is stopped in the middle of its block; another one does that block; then it goes on."""
    before = expected(tmp_path / "one", tmp_path / "same", 400)
    store = tmp_path / "store"
    register_pictures(store, tmp_path / "data", 400)
    frozen = start(store, "--rank", "0", "--world", "2")
    while not list(store.glob("sets/pics/*/attempts/*")):
        time.sleep(0.005)
        assert frozen.poll() is None
    frozen.send_signal(signal.SIGSTOP)
    finish(start(store, "--rank", "1", "--world", "2"))
    assert set_bytes(store).keys() >= {name for name in before if name.startswith("data.zarr")}
    frozen.send_signal(signal.SIGCONT)
    finish(frozen)
    assert set_bytes(store) == before


def test_other_bytes_come_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks at one block that compute different numbers: whose commit comes first decides, whole."""
    from featstore.extraction import lane

    before = expected(tmp_path / "one", tmp_path / "same", 40)
    store = tmp_path / "store"
    register_pictures(store, tmp_path / "data", 40)
    run = RunConfig(device="cpu", batch_size=8)
    plan = make_plan(Store(store), "pics", CONFIG, run)
    real, done = Pass.jobs, []

    def late(work: Pass, number: int) -> Any:
        jobs = real(work, number)
        if not done:  # between the look at the marker and the first image another process does everything
            done.append(1)
            monkeypatch.setattr(Pass, "jobs", real)
            monkeypatch.setattr("featstore.extraction.claims.Claims.is_free", lambda *_: True)
            monkeypatch.setattr("featstore.extraction.claims.Claims.take", lambda *_: True)
            extract(plan, run)
            pick = lane.pick
            monkeypatch.setattr(lane, "pick", lambda tokens, name: pick(tokens, name) * 1.5)
        return jobs

    monkeypatch.setattr(Pass, "jobs", late)
    summary = extract(plan, run)
    assert set_bytes(store) == before
    assert (summary.computed, summary.blocks) == (16, 0)  # what it did is not what counts


def test_an_interrupted_rank_gives_its_claims_up(tmp_path: Path) -> None:
    register_pictures(tmp_path / "store", tmp_path / "data", 100)
    run = RunConfig(device="cpu", batch_size=8)

    def stop(images: int, failed: int) -> None:
        assert list(folder_of(tmp_path / "store").glob("claims/*.0"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(make_plan(Store(tmp_path / "store"), "pics", CONFIG, run), run, advance=stop)
    assert not (folder_of(tmp_path / "store") / "claims").exists()
    assert not list(folder_of(tmp_path / "store").glob("attempts/*"))


@pytest.mark.parametrize(
    ("rank", "world", "environ", "error"),
    [
        (0, None, {}, r"--rank and --world belong together: --rank 0 --world 8; got --rank 0 --world None"),
        (None, 4, {}, r"--world 4 needs --rank, the number of this process, from 0 to 3"),
        (4, 4, {}, r"numbered from 0 below the number of processes; got rank 4 of 4"),
        (0, 0, {}, r"got rank 0 of 0"),
        (0, 2, {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, r"processes that start by themselves; leave them to t"),
    ],
)
def test_ranks_that_cannot_be(rank: int | None, world: int | None, environ: dict[str, str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        find_ranks(rank, world, environ)


def test_ranks_as_torchrun_sets_them() -> None:
    environ = {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
    }
    ranks = find_ranks(environ=environ)
    assert ranks == Ranks(5, 8, 1, 4, "torchrun")
    assert (ranks.name, ranks.speaks) == ("rank 5 of 8", False)
    assert [ranks.own_device(device) for device in ("cuda", "cpu")] == ["cuda:1", "cpu"]
    with pytest.raises(ConfigError, match=r"--device cuda:0: torchrun started 4 processes here, each of which takes"):
        ranks.own_device("cuda:0")
    assert find_ranks(environ={"RANK": "3", "WORLD_SIZE": "9"}) == Ranks()  # somebody else's variables
    assert find_ranks(2, 3, {}).own_device("cuda:0") == "cuda:0"
    assert ranks_of(RunConfig(memory="shard", rank=1, world=2)) == Ranks()
    assert 1 <= ranks.cores <= max(1, (os.cpu_count() or 1) // 4)


def broken_pictures(tmp_path: Path, broken: Iterable[int]) -> Path:
    """A store with 100 pictures, some of which cannot be decoded."""
    write_table(tmp_path / "data", write_pictures(tmp_path / "data", 100))
    for number in broken:
        (tmp_path / f"data/images/{number:05d}.png").write_bytes(b"broken")
    register(tmp_path / "store", "pics", tmp_path / "data", REGISTERED)
    return tmp_path / "store"


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize(("limit", "is_enough"), [("5%", True), ("2%", False)])
def test_one_limit_of_failures_for_any_number_of_ranks(tmp_path: Path, world: int, limit: str, is_enough: bool) -> None:
    """Three failures of 100 in the first batch are 3 percent, not a quarter of the share of rank 0."""
    store = broken_pictures(tmp_path, range(3))
    ranks = {} if world == 1 else {"rank": 0, "world": world}
    run = RunConfig(device="cpu", batch_size=8, max_failed=limit, **ranks)
    plan = make_plan(Store(store), "pics", CONFIG, run)
    if is_enough:
        assert extract(plan, run).failed == 3
        return
    with pytest.raises(FeatstoreError, match=r"3 images could not be decoded, more than --max-failed 2% allows"):
        extract(plan, run)


def test_the_failures_of_all_ranks_are_judged_when_the_set_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight failures, four in the blocks of each rank: neither has met more than 5 percent, both together have."""
    store = broken_pictures(tmp_path, [0, 1, 2, 3, 16, 17, 18, 19])
    first, last = (
        RunConfig(device="cpu", batch_size=8, max_failed="5%", rank=rank, world=2, take_over=False) for rank in (0, 1)
    )
    plan, real, done = make_plan(Store(store), "pics", CONFIG, first), Pass.jobs, []

    def together(work: Pass, number: int) -> Any:
        if not done:  # both begin with nothing done
            done.append(True)
            assert extract(make_plan(Store(store), "pics", CONFIG, last), last).failed == 4
        return real(work, number)

    monkeypatch.setattr(Pass, "jobs", together)
    said = r"8 images could not be decoded, more than --max-failed 5% allows; the last reason: not an image file"
    with pytest.raises(FeatstoreError, match=said):
        extract(plan, first)
    again = RunConfig(device="cpu", batch_size=8, max_failed="5%")
    assert extract(make_plan(Store(store), "pics", CONFIG, again), again).computed == 0  # all is committed
