"""The simulated cluster against closed forms, a step-by-step loop, and the policy that it stands for."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore.extraction.division import Claim, Next, take_over

ROOT = Path(__file__).parent.parent
EVEN = np.ones(1)
UNEVEN = np.array([0.7, 0.9, 1.0, 1.0, 1.1, 1.6])
QUIET = {"slow_share": 0.0, "failures_per_day": 0.0}
ROUGH = {"slow_share": 0.05, "slow_factor": 25.0, "failures_per_day": 400.0, "restart": 60.0, "patience": 30.0}


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("virtual_cluster")


@pytest.fixture
def bench(virtual: Any) -> Any:
    return importlib.import_module("simulate_cluster")


def run(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    call = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize(("blocks", "gpus"), [(64, 8), (65, 8), (100, 8), (5, 8)])
def test_equal_blocks_on_faultless_ranks_take_as_many_rounds_as_the_longest_stripe(
    virtual: Any, blocks: int, gpus: int
) -> None:
    cluster = virtual.Cluster(gpus, **QUIET)
    for strategy in (virtual.Strategy("take-over"), virtual.Strategy("central")):
        draws = virtual.Draws(cluster, blocks, 10.0, EVEN, 0)
        assert virtual.Job(draws, strategy).run().makespan == pytest.approx(10 * math.ceil(blocks / gpus))
    found = virtual.run_stripes(draws)
    assert found.makespan == pytest.approx(10 * math.ceil(blocks / gpus))
    assert found.efficiency(draws) == pytest.approx(blocks / gpus / math.ceil(blocks / gpus))
    assert found.efficiency(draws, 30.0) < found.efficiency(draws)


@pytest.mark.parametrize("seed", range(5))
def test_a_rank_alone_is_the_loop_one_would_write(virtual: Any, seed: int) -> None:
    cluster = virtual.Cluster(4, **ROUGH)
    draws = virtual.Draws(cluster, 200, 10.0, UNEVEN, seed)
    fallen = 0
    for rank in range(4):
        now, failures, expected = 0.0, 0, []
        fails = draws.gap(rank, 0)
        for piece in range(rank, 200, 4):
            while now + draws.first[piece] > fails:
                failures += 1
                now = fails + cluster.restart
                fails = now + draws.gap(rank, failures)
            now += draws.first[piece]
            expected.append(now)
        found = virtual.alone(draws, rank)
        assert found.ends == pytest.approx(np.array(expected))
        assert len(found.falls) == failures
        fallen += failures
    assert fallen > 0


@pytest.mark.parametrize("slow_of", ["block", "rank"])
@pytest.mark.parametrize("seed", range(6))
def test_every_decision_is_that_of_the_policy(virtual: Any, slow_of: str, seed: int) -> None:
    """`take_over` is asked with all that is left at each look, from the moment the first rank is idle to the end."""
    cluster = virtual.Cluster(12, machine=3, slow_of=slow_of, survey_block=0.0, **ROUGH)
    draws = virtual.Draws(cluster, 150, 10.0, UNEVEN, seed)
    asked: list[Next] = []

    class Checked(virtual.Job):  # type: ignore[misc]
        def candidates(self, rank: int, now: float, most: int) -> list[tuple[int, str]]:
            claims = {
                piece: [
                    Claim(
                        f"{held.rank}",
                        float(held.since),
                        float(now if held.dead is None else held.dead),
                        held.dead is not None and held.rank // 3 == rank // 3,
                    )
                    for held in attempts
                ]
                for piece, attempts in self.held.items()
            }
            left = sorted([*self.held, *self.is_free])
            found = take_over(
                left,
                claims,
                owner=f"{rank} anew",
                ranks=(rank, 12),
                now=float(now),
                patience=cluster.patience,
                pace=draws.seconds,
            )
            asked.append(found)
            made: list[tuple[int, str]] = super().candidates(rank, now, most)
            assert [piece for piece, _ in made[:1]] == ([found.piece] if found.what == "take" else [])
            assert not made or (made[0][1] == "help") == found.helping
            for piece, kind in made[1:]:  # the same survey, without what somebody else was faster at
                left.remove(made[made.index((piece, kind)) - 1][0])
                again = take_over(left, claims, owner="", ranks=(rank, 12), now=float(now), patience=30.0, pace=10.0)
                assert again.piece == piece
            return made

    job = Checked(draws, virtual.Strategy(tries=8))
    outcome = job.run()
    assert job.left == 0
    assert not job.is_free
    assert outcome.makespan >= draws.work / 12 or slow_of == "rank"
    assert {found.what for found in asked} >= {"take", "wait"}
    assert any(found.helping for found in asked)


@pytest.mark.parametrize("strategy", ["take-over", "central"])
@pytest.mark.parametrize("seed", range(4))
def test_every_block_is_committed_once_whatever_fails(virtual: Any, strategy: str, seed: int) -> None:
    cluster = virtual.Cluster(6, machine=1, slow_of="block", **ROUGH)
    draws = virtual.Draws(cluster, 90, 10.0, UNEVEN, seed)
    job = virtual.Job(draws, virtual.Strategy(strategy, notice=5.0 if seed % 2 else None))
    before, outcome = job.left, job.run()
    assert 0 < before <= 90
    assert (job.left, len(job.held), len(job.is_free)) == (0, 0, 0)
    assert draws.work / 6 <= outcome.makespan
    assert outcome.last_exit >= outcome.makespan


def test_one_seed_is_one_result(virtual: Any) -> None:
    cluster = virtual.Cluster(8, slow_of="rank", **ROUGH)
    found = [
        virtual.Job(virtual.Draws(cluster, 200, 10.0, UNEVEN, seed), virtual.Strategy()).run() for seed in (1, 1, 2)
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_take_over_makes_good_what_stripes_lose(virtual: Any) -> None:
    """Stripes wait for the rank that failed most; with take-over all lose what failures cost on average."""
    cluster = virtual.Cluster(32, restart=600.0, failures_per_day=20.0, slow_share=0.0)
    draws = virtual.Draws(cluster, 3200, 10.0, UNEVEN, 3)
    alone = virtual.run_stripes(draws).efficiency(draws)
    shared = virtual.Job(draws, virtual.Strategy()).run().efficiency(draws)
    lost = 20 * 600 / (86400 + 20 * 600)  # of the time of every rank
    assert alone < 0.7
    assert 1 - lost - 0.06 < shared <= 1


def test_helping_ends_what_is_slow_only_where_it_runs(virtual: Any) -> None:
    """A block takes 50 times as long for the rank that drew it: the job ends without it."""
    cluster = virtual.Cluster(16, slow_share=0.05, slow_factor=50.0, failures_per_day=0.0, slow_of="rank")
    made = {}
    for helping in (False, True):
        draws = virtual.Draws(cluster, 160, 10.0, EVEN, 1)
        draws.first[:] = 10.0
        draws.first[150] = 500.0  # the last but ten, for the rank whose stripe it is in
        made[helping] = virtual.Job(draws, virtual.Strategy(helping=helping)).run()
    assert made[False].makespan == 590
    assert made[True].makespan < 200
    assert (made[False].helped, made[False].doubled, made[False].wasted) == (0, 0, 0)
    assert made[True].helped > 0
    assert made[True].wasted == pytest.approx(500)
    assert made[True].last_exit == 590


def test_the_quick_run_fills_every_table(tmp_path: Path, bench: Any) -> None:
    done = run("simulate_cluster.py", "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads(next(tmp_path.glob("cluster-*.json")).read_text())
    assert record["quick"]
    found = record["results"]["tables"]
    assert set(found) == {*bench.CONDITIONS, "block size", "variants"}
    assert all(found.values())
    page = bench.markdown(record["results"])
    assert page.count("|---") > 0
    assert "bad data: at least 95 % in " in page
    for lines in found.values():
        for line in lines:
            assert all(0 < value["min"] <= value["median"] < 1.1 for value in line.values() if isinstance(value, dict))


def test_the_page_shows_the_newest_result(bench: Any) -> None:
    done = run("simulate_cluster.py", "--markdown")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (ROOT / "docs/scaling.md").read_text()
    assert bench.newest()["assumed"]["block_times"] == bench.spreads()[2]


def test_default_blocks_are_those_of_new_sets(bench: Any, virtual: Any) -> None:
    sizes = {model: bench.Case(model, 1000, virtual.Cluster(8)) for model in bench.MODELS}
    assert {model: case.size for model, case in sizes.items()} == {
        "dinov3-7b@512": 256,
        "dinov3-large@512": 256,
        "dinov2-base@224": 2048,
    }
    assert sizes["dinov3-7b@512"].blocks == 4
    assert sizes["dinov3-7b@512"].seconds == pytest.approx(256 / 46)


def test_the_verdict_names_the_wall(bench: Any) -> None:
    lines = [{"blocks_a_gpu": blocks, "x": {"median": value}} for blocks, value in ((8, 0.8), (80, 0.96), (800, 0.99))]
    assert bench.verdict(lines, "x") == "x: at least 95 % in 2 of 3 jobs, in all with 80 blocks a GPU or more"
    lines[2]["x"]["median"] = 0.9
    assert bench.verdict(lines, "x").endswith("1 of 3 jobs; more blocks a GPU are no guarantee")


def test_block_times_are_read_off_the_markers(bench: Any, tmp_path: Path) -> None:
    times = importlib.import_module("block_times")
    for block, second in enumerate((5, 9, 10, 12, 15)):
        path = tmp_path / f"{block:08d}.json"
        path.write_text("{}")
        os.utime(path, (second, second))
    (tmp_path / "00000009.intent").write_text("")
    (tmp_path / "123.json").write_text("")
    assert times.block_seconds(tmp_path) == [1, 2, 3]


@pytest.mark.slow
def test_the_block_time_benchmark_runs(tmp_path: Path) -> None:
    done = run("block_times.py", "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(next(tmp_path.glob("block_times-*.json")).read_text())["results"]
    assert len(found["relative"]) == 2 + 1
    assert found["where"] == "measured on a CPU"


def test_without_results_they_say_what_to_run(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = importlib.import_module("block_times")
    monkeypatch.setattr(times, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no full result of block_times .*run benchmarks/block_times\.py"):
        times.measured()
    with pytest.raises(FileNotFoundError, match=r"no full result of cluster .*run this with --output first"):
        bench.newest()
