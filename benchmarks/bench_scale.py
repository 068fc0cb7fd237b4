"""What a million rows cost in memory and time, and what ten thousand blocks cost to open and resume.

    python benchmarks/bench_scale.py --output benchmarks/results

Every step is a process of its own, watched from outside. What is judged is the peak of the memory that it holds for
itself (anonymous and shared pages, interpreter and imports among them) beyond the bytes of its result. Pages of mapped
files, which are the system's cache and go when memory is short, are stated beside it, as is the sum of both (VmHWM).
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np

from featstore import files
from featstore.datasets import manifest as manifests
from featstore.datasets.manifest import Manifest
from featstore.objects import Place
from featstore.store import commits, ledger
from featstore.store.catalog import Store
from featstore.store.commits import BlockWriter, RowState
from featstore.store.features import FeatureSet
from featstore.store.layout import ArraySpec, check_store, make_spec, read_spec, set_folder

LIMIT_BYTES = 2**30
LIMIT_RESUME_SECONDS = 0.5
FACTS = {"train": 0.8, "valid": 0.1, "test": 0.1}
SET = "scale/synthetic@1"


def main() -> None:
    options = parse_arguments()
    if options.step:
        print(json.dumps(measured(options)))
        return
    with tempfile.TemporaryDirectory(prefix="bench_scale_", dir=options.scratch) as folder:
        store = Path(folder) / "store"
        steps = {name: run(name, store, options) for name in ROWS_STEPS}
        many = Path(folder) / "blocks"
        blocks = {name: run(name, many, options) for name in BLOCK_STEPS}
        flat = {}
        for rows in [10**power for power in range(3, 7) if 10**power <= options.rows]:
            flat[rows] = opening_seconds(Path(folder) / f"open{rows}", rows)
    results = {
        "command": " ".join(["python", "benchmarks/bench_scale.py", *sys.argv[1:]]),
        "config": {"rows": options.rows, "width": options.width, "blocks": options.blocks},
        "steps": steps,
        "blocks": blocks,
        "opening_seconds_by_rows": flat,
    }
    for name, step in steps.items():
        word = "holds" if step["own_beyond_result"] < LIMIT_BYTES else "MISSED"
        print(
            f"{word:7}{name}: {step['seconds']:.2f} s, {step['own_beyond_result'] / 2**20:.0f} MiB beyond the "
            f"result of {step['result_bytes'] / 2**20:.0f} MiB, limit {LIMIT_BYTES / 2**20:.0f} MiB "
            f"(mapped pages of files included: {step['peak_beyond_result'] / 2**20:.0f} MiB)",
            file=sys.stderr,
        )
    seconds = blocks["resume"]["seconds"]
    word = "holds" if seconds < LIMIT_RESUME_SECONDS else "MISSED"
    print(f"{word:7}resume over {options.blocks} blocks: {seconds:.3f} s, limit 0.5 s", file=sys.stderr)
    harness.report("scale", options, results)


def parse_arguments() -> argparse.Namespace:
    parser = harness.parser("Peak memory and time of a large set.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=10_000, help="blocks of the set that is resumed")
    parser.add_argument("--step", choices=[*ROWS_STEPS, *BLOCK_STEPS], help="run one step here (used by the script)")
    parser.add_argument("--store", type=Path, help="store of the step")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure; default: the temporary one")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.blocks = 20_000, 200
    return options


def run(name: str, store: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One step in a process of its own."""
    sizes = ["--rows", options.rows, "--width", options.width, "--blocks", options.blocks]
    command = [sys.executable, __file__, "--step", name, "--store", store, *sizes]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as wrong:
        child = subprocess.Popen([str(part) for part in command], stdout=out, stderr=wrong)
        own = mapped = 0
        while child.poll() is None:
            now, pages = resident_bytes(child.pid)
            own, mapped = max(own, now), max(mapped, pages)
            time.sleep(0.005)
        texts = []
        for stream in (out, wrong):
            stream.seek(0)
            texts.append(stream.read().decode())
    if child.returncode:
        raise RuntimeError(f"step {name} failed:\n{texts[1]}")
    found: dict[str, Any] = json.loads(texts[0])
    found |= {"own_bytes": own or found["peak_bytes"], "mapped_bytes": mapped}
    return {**found, "own_beyond_result": found["own_bytes"] - found["result_bytes"]}


def resident_bytes(process: int) -> tuple[int, int]:
    """(memory of its own, pages of files that it has mapped) of a process at this moment; zeros where unknown."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0, 0
    sizes = {key: int(value) * 1024 for key, value in re.findall(r"(Rss\w+):\s+(\d+) kB", status)}
    return sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0), sizes.get("RssFile", 0)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    import pyarrow.compute
    import pyarrow.parquet  # noqa: F401 - counted with the other imports

    before = peak_bytes()
    started = time.perf_counter()
    result, facts = (ROWS_STEPS | BLOCK_STEPS)[options.step](options)
    seconds = facts.pop("seconds", time.perf_counter() - started)
    peak = peak_bytes()
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "imports_bytes": before,
        "result_bytes": result,
        "peak_beyond_result": peak - result,
        **facts,
    }


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def synthetic_manifest(count: int) -> Manifest:
    """Samples without files, columns made by pyarrow and numpy."""
    import pyarrow as pa

    rng = np.random.default_rng(0)
    ids = pa.array(np.char.mod("patient%06d/study1/view1.jpg", np.arange(count)))
    splits = pa.array(list(FACTS)).take(pa.array(rng.choice(len(FACTS), count, p=list(FACTS.values()))))
    columns = {
        "id": ids,
        "path": ids,
        "size": pa.array(rng.integers(10_000, 100_000, count)),
        "split": splits,
        "group": pa.array(np.char.mod("patient%05d", np.arange(count) // 4)),
        "study": pa.nulls(count, pa.string()),
        "mask_path": pa.nulls(count, pa.string()),
        "content": pa.nulls(count, pa.string()),
        "mtime_ns": pa.array(np.zeros(count, np.int64)),
        "finding": pa.array(rng.integers(0, 2, count)),
    }
    table = pa.table(columns)
    meta = {"root": "/nowhere", "adapter": "table", "missing": count}
    return Manifest(name="scale", table=table, digest=manifests.table_digest(table), meta=meta)


def values_of(block: int, rows: int, width: int) -> np.ndarray:
    return np.random.default_rng([1, block]).integers(1, 15000, (rows, width), np.uint16).view(np.float16)


def new_set(root: Path, manifest: Manifest, width: int, block_rows: int) -> Place:
    check_store(root, create=True)
    manifests.save(root / "datasets", manifest)
    spec = make_spec(
        dataset="scale",
        model="synthetic",
        resolution="1",
        identity={"weights": "w", "stored_dtype": "float16", "compute_dtype": "float32", "reductions": {}},
        rows_per_block=block_rows,
        weights={"kind": "random", "seed": 0},
        random=True,
    )
    folder = set_folder(root, spec)
    files.create_exclusive(folder / "spec.json", files.sealed(spec))
    ledger.add_arrays(folder, [ArraySpec(name="cls", row_shape=(width,), dtype="float16")])
    ledger.add_rows(folder, manifest, dict)
    ledger.write_metadata(folder, spec, ledger.read_ledger(folder))
    return folder


def opened(root: Path) -> FeatureSet:
    return Store(root)[SET]


Measure = tuple[int, dict[str, Any]]  # (bytes of the result, further facts)


def step_register(options: argparse.Namespace) -> Measure:
    """Manifest, spec, ledger and mapping: all that stands before the first row."""
    new_set(options.store, synthetic_manifest(options.rows), options.width, 16384)
    return 0, {}


def step_write(options: argparse.Namespace) -> Measure:
    (folder,) = (options.store / "sets" / "scale").iterdir()
    book, size = ledger.read_ledger(folder), int(read_spec(folder)["layout"]["block_rows"])
    for block, start, stop in book.blocks(size):
        values = values_of(block, stop - start, options.width)
        with BlockWriter(folder, "cls", book.groups["cls"], block, start, stop, size) as writer:
            for first in range(0, len(values), 256):
                rows = values[first : first + 256]
                state = [RowState(hashlib.sha256(row.tobytes()).hexdigest()[:32]) for row in rows]
                writer.append({"cls": rows}, state)
            assert writer.commit()
    return 0, {"bytes": options.rows * options.width * 2}


def step_verify_deep(options: argparse.Namespace) -> Measure:
    from featstore.store.verify import verify_set

    store = Store(options.store)
    verdict = verify_set(store, store.entry(SET), deep=True)
    assert verdict.ok, verdict.problems
    return 0, {"blocks": verdict.num_blocks}


def step_gather(options: argparse.Namespace) -> Measure:
    cls = opened(options.store).cls
    rng = np.random.default_rng(1)
    found = np.zeros((0,), np.float16)
    for _ in range(100):
        rows = rng.integers(0, options.rows, 256)
        found = cls[rows]
    first = values_of(0, min(16384, options.rows), options.width)
    low = rows < len(first)
    np.testing.assert_array_equal(found[low].view(np.uint16), first[rows[low]].view(np.uint16))
    return found.nbytes, {}


def step_load(options: argparse.Namespace) -> Measure:
    return int(opened(options.store).load("cls").nbytes), {}


def step_filter(options: argparse.Namespace) -> Measure:
    """Rows picked by columns of the manifest and by state, then their features."""
    import pyarrow.compute as pc

    fs = opened(options.store)
    table = fs.rows
    chosen = pc.and_(pc.equal(table["split"], "train"), pc.equal(table["finding"], 1)).to_numpy()
    chosen &= pc.equal(table["state"], "ok").to_numpy() & fs.ok
    found = fs.cls[chosen]
    assert len(found) == chosen.sum() > 0.3 * options.rows
    return int(found.nbytes), {"rows": len(found)}


def step_blocks(options: argparse.Namespace) -> Measure:
    """A set whose ledger asks for many blocks, each with a marker that nobody has to read."""
    rows_per_block = 16
    folder = new_set(options.store, synthetic_manifest(options.blocks * rows_per_block), 8, rows_per_block)
    home = commits.group_folder(folder, "cls")
    home.mkdir(parents=True)
    for block in range(options.blocks):
        commits.marker_path(folder, "cls", block).write_bytes(b"{}")
    return 0, {}


def step_resume(options: argparse.Namespace) -> Measure:
    """Open a set and find what it lacks, as a resumed run does first; markers are listed, not read."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        fs = opened(options.store)
        missing = int(fs.pending().sum())
        _ = fs.cls
        seconds.append(time.perf_counter() - started)
        assert missing == 0
    return 0, {"seconds": sorted(seconds)[2], "quartiles_seconds": harness.quartiles(seconds)}


def opening_seconds(root: Path, rows: int) -> float:
    """Median seconds to open a set and one of its arrays, manifest at hand."""
    from featstore.store.reader import ShardedArray

    manifest = synthetic_manifest(rows)
    folder = new_set(root, manifest, 8, 16384)
    seconds = []
    for _ in range(21):
        started = time.perf_counter()
        fs = FeatureSet(folder, manifest)
        assert ShardedArray(folder / "data.zarr" / fs.arrays[0]).shape == (rows, 8)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[10]


ROWS_STEPS: dict[str, Callable[[argparse.Namespace], Measure]] = {
    "register": step_register,
    "write": step_write,
    "verify_deep": step_verify_deep,
    "gather": step_gather,
    "load": step_load,
    "filter": step_filter,
}
BLOCK_STEPS: dict[str, Callable[[argparse.Namespace], Measure]] = {"blocks": step_blocks, "resume": step_resume}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
