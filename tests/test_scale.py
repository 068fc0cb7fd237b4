"""Sizes: memory of large sets, ten thousand blocks, opening cost, and the layout of the largest network."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from featstore.configs import RunConfig, SetConfig
from featstore.datasets import manifest as manifests
from featstore.extraction.plan import make_plan
from featstore.store import commits, ledger
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from featstore.store.layout import check_store

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_scale")


def run_bench(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks/bench_scale.py"), *arguments]
    # Every thread that allocates takes an arena of its own: with one a core, peaks would tell of the machine.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.slow  # four processes
def test_memory_grows_by_less_than_a_gibibyte_a_million_rows(tmp_path: Path) -> None:
    rows = 50_000
    for name in ("register", "write", "verify_deep", "filter"):
        step = run_bench("--step", name, "--store", str(tmp_path), "--rows", str(rows), "--width", "64")
        growth = step["peak_beyond_result"] - step["imports_bytes"]
        # What a process takes once (buffers of a block, of reading files) is allowed for.
        assert growth < 128 * 2**20 + GIB * rows / 1_000_000, (name, growth)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_million_rows_take_less_than_a_gibibyte(tmp_path: Path) -> None:
    results = run_bench("--scratch", str(tmp_path))["results"]
    for name, step in results["steps"].items():
        assert step["own_beyond_result"] < GIB, (name, step)
    assert results["blocks"]["resume"]["seconds"] < 0.5


def fastest(call: Any, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def test_ten_thousand_blocks_are_resumed_by_listing(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open, find what is pending, open an array: under half a second, and no marker is read."""
    bench.step_blocks(SimpleNamespace(store=tmp_path, blocks=10_000))
    fs = Store(tmp_path)[bench.SET]
    assert len(commits.committed_blocks(fs.folder, "cls")) == 10_000
    read = []
    monkeypatch.setattr(commits, "read_commit", lambda *arguments: read.append(arguments))

    def resume() -> None:
        opened = Store(tmp_path)[bench.SET]
        assert not opened.pending().any()
        assert opened.cls.shape == (160_000, 8)

    assert fastest(resume) < 0.5
    assert not read
    commits.marker_path(fs.folder, "cls", 7).unlink()
    assert fs.pending().nonzero()[0].tolist() == list(range(7 * 16, 8 * 16))


def test_opening_is_flat_in_rows(tmp_path: Path, bench: Any) -> None:
    def opening(rows: int) -> Any:
        manifest = bench.synthetic_manifest(rows)
        folder = bench.new_set(tmp_path / str(rows), manifest, 8, 16384)
        return lambda: FeatureSet(folder, manifest).arrays

    few, many = opening(1000), opening(100_000)
    for _ in range(4):
        ratio = fastest(many, 20) / fastest(few, 20)
        if ratio < 3:
            return
    pytest.fail(f"a set of 100 times the rows takes {ratio} times as long to open")


def test_the_largest_network_fits_the_limits(tmp_path: Path, bench: Any) -> None:
    """dinov3-7b at 512, patches of CheXpert's 224,316 images: 1.9 TB in at most 5,000 files, blocks of up to 4 GB."""
    count = 224_316
    check_store(tmp_path, create=True)
    manifests.save(tmp_path / "datasets", bench.synthetic_manifest(count))
    config = SetConfig(model="dinov3-7b", res="512", tokens="cls,mean_patch,patches", random_weights=0)
    plan = make_plan(Store(tmp_path), "scale", config, RunConfig(device="cpu"))
    assert {array.name: array.row_shape for array in plan.arrays} == {
        "cls": (4096,),
        "mean_patch": (4096,),
        "patches": (1024, 4096),
    }
    size = int(plan.spec["layout"]["block_rows"])
    block_bytes = size * sum(array.row_bytes for array in plan.arrays)
    assert block_bytes <= 4 * GIB
    assert plan.new_bytes == count * 2 * 4096 * 1026
    shards = 0
    for array in plan.arrays:
        shard_rows, chunk_rows = array.layout(size)
        assert size % shard_rows == shard_rows % chunk_rows == 0
        assert shard_rows * array.row_bytes <= GIB
        shards += -(-count // shard_rows)
    blocks = -(-count // size)
    assert plan.new_files == shards + blocks
    assert plan.new_files + len(list(tmp_path.rglob("*"))) + 10 <= 5000, (shards, blocks)  # 10: spec, ledger, zarr.json
    # What a run writes first, without a row, agrees with the plan.
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "spec.json").write_bytes(bench.files.sealed(plan.spec))
    book = ledger.add_arrays(folder, plan.arrays)
    assert [array.layout(size) for array in book.arrays.values()] == [array.layout(size) for array in plan.arrays]
