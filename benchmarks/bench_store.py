"""Reading and writing shards, against numpy's memory map (the practical limit), zarr-python and tensorstore.

    python benchmarks/bench_store.py --output benchmarks/results

Every case runs its readers once a round, in shuffled order, and reports for each the median and
quartiles of its seconds and of its speed relative to the baseline in the same round. `cold` rounds drop the files from
the page cache first, with every map closed (a mapped page stays); they include opening.
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness
import numpy as np
import tensorstore
import zarr

from featstore.store.reader import ShardedArray
from featstore.store.shards import (
    ShardWriter,
    array_metadata,
    chunk_rows_for,
    shard_key,
    shard_rows_for,
)

Reader = Callable[[], Any]
QUICK = {"rows": 512, "width": 64, "grids": 24, "patches": 16, "grid_width": 32, "rounds": 2, "calls": 2, "batch": 32}


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="bench_store_", dir=options.scratch) as folder:
        cases = measure(Path(folder), options)
    results = {
        "command": " ".join(["python", "benchmarks/bench_store.py", *sys.argv[1:]]),
        "config": {name: value for name, value in vars(options).items() if name not in ("scratch", "output")},
        "readers": {name: version(name) for name in ("zarr", "tensorstore", "google-crc32c")},
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "cases": cases,
    }
    harness.report("store", options, results)


def parse_arguments() -> argparse.Namespace:
    parser = harness.parser("Reading and writing shards, against a memory map, zarr-python and tensorstore.")
    parser.add_argument("--rows", type=int, default=131072, help="rows of the N x D array")
    parser.add_argument("--width", type=int, default=768, help="D")
    parser.add_argument("--grids", type=int, default=1024, help="rows of the N x P x D array")
    parser.add_argument("--patches", type=int, default=196, help="P")
    parser.add_argument("--grid-width", type=int, default=384, help="D of the grids")
    parser.add_argument("--block-rows", type=int, default=65536, help="rows of a block, which bounds a shard")
    parser.add_argument("--batch", type=int, default=256, help="rows of a gather; a sixteenth of it for grids")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=10, help="gathers a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure; default: the temporary one")
    options = parser.parse_args()
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, value)
    return options


def measure(folder: Path, config: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(config.seed)
    results: dict[str, Any] = {}
    shapes = {"": (config.rows, config.width), "grids_": (config.grids, config.patches, config.grid_width)}
    for prefix, shape in shapes.items():
        files = Files(folder / (prefix or "rows"), rng.integers(0, 15000, shape, np.uint16).view(np.float16), config)
        batch = max(1, config.batch // (16 if prefix else 1))
        for name, readers in files.warm(rng, batch, config).items():
            results[prefix + name] = compare(readers, config)
        gc.collect()
        if hasattr(os, "posix_fadvise"):
            for name, readers in files.cold(rng, batch, config).items():
                results[prefix + name] = compare(readers, config, before=files.evict)
    results["write_synced"] = compare(writers(folder, config, rng), config)
    return results


class Files:
    """One array three times on disk: as .npy, as our shards, which zarr and tensorstore read too."""

    def __init__(self, folder: Path, rows: np.ndarray, config: argparse.Namespace) -> None:
        self.npy, self.zarr, self.shape = folder / "rows.npy", folder / "rows.zarr", rows.shape
        self.zarr.mkdir(parents=True)
        np.save(self.npy, rows)
        shard_rows = shard_rows_for(rows[0].nbytes, config.block_rows)
        layout: dict[str, Any] = {
            "row_shape": rows.shape[1:],
            "dtype": "float16",
            "chunk_rows": chunk_rows_for(rows[0].nbytes, shard_rows),
            "shard_rows": shard_rows,
        }
        (self.zarr / "zarr.json").write_text(json.dumps(array_metadata(num_rows=len(rows), attributes={}, **layout)))
        for first in range(0, len(rows), shard_rows):
            with ShardWriter(self.zarr / shard_key(first // shard_rows, rows.ndim), **layout) as writer:
                writer.append(rows[first : first + shard_rows])

    def memmap(self) -> np.ndarray:
        return np.asarray(np.load(self.npy, mmap_mode="r"))

    def tensorstore(self) -> Any:
        kvstore = {"driver": "file", "path": f"{self.zarr}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()

    def evict(self) -> None:
        for file in (self.npy, *self.zarr.rglob("*")):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    def warm(self, rng: np.random.Generator, batch: int, config: argparse.Namespace) -> dict[str, dict[str, Reader]]:
        plain, ours = self.memmap(), ShardedArray(self.zarr)
        stock, store = zarr.open_array(self.zarr, mode="r"), self.tensorstore()
        num_rows = len(ours)
        # Page tables of both maps are filled once, as in any long run.
        for start in range(0, num_rows, 1024):
            rows = np.arange(start, min(start + 1024, num_rows))
            np.testing.assert_array_equal(plain[rows].view(np.uint16), ours.gather(rows).view(np.uint16))

        def gathers(gather: Callable[[np.ndarray], Any]) -> Reader:
            batches = self.batches(rng, batch)

            def read() -> None:
                for _ in range(config.calls):
                    gather(next(batches))

            return read

        def each(get: Callable[[int], Any]) -> Reader:
            def read() -> None:
                for row in range(0, num_rows, max(1, num_rows // 100)):
                    get(row)

            return read

        low, high = num_rows // 4, num_rows // 4 + max(1, num_rows // 32)
        return {
            "gather_warm": {
                "memmap": gathers(lambda rows: plain[rows]),
                "ours": gathers(ours.gather),
                "ours_verified": gathers(lambda rows: ours.gather(rows, verify=True)),
                "zarr_oindex": gathers(lambda rows: stock.oindex[rows]),
                "tensorstore": gathers(lambda rows: store[rows].read().result()),
            },
            "load_warm": {
                "np_load": lambda: np.load(self.npy),
                "ours": ours.load,
                "ours_verified": lambda: ours.load(verify=True),
                "zarr": lambda: stock[...],
                "tensorstore": lambda: store.read().result(),
            },
            "slice_warm": {
                "memmap": lambda: np.array(plain[low:high]),
                "ours": lambda: ours[low:high],
                "zarr": lambda: stock[low:high],
                "tensorstore": lambda: store[low:high].read().result(),
            },
            "one_row_warm": {
                "memmap": each(lambda row: np.array(plain[row])),
                "ours": each(lambda row: ours[row]),
            },
        }

    def cold(self, rng: np.random.Generator, batch: int, config: argparse.Namespace) -> dict[str, dict[str, Reader]]:
        def gathers(opened: Callable[[], Callable[[np.ndarray], Any]]) -> Reader:
            batches = self.batches(rng, batch)

            def read() -> None:
                gather = opened()
                for _ in range(4):
                    gather(next(batches))

            return read

        return {
            "gather_cold": {
                "memmap": gathers(lambda: self.memmap().__getitem__),
                "ours": gathers(lambda: ShardedArray(self.zarr).gather),
                "zarr_oindex": gathers(lambda: zarr.open_array(self.zarr, mode="r").oindex.__getitem__),
                "tensorstore": gathers(lambda: lambda rows: self.tensorstore()[rows].read().result()),
            },
            "load_cold": {
                "np_load": lambda: np.load(self.npy),
                "ours": lambda: ShardedArray(self.zarr).load(),
                "zarr": lambda: zarr.open_array(self.zarr, mode="r")[...],
                "tensorstore": lambda: self.tensorstore().read().result(),
            },
        }

    def batches(self, rng: np.random.Generator, batch: int) -> Iterator[np.ndarray]:
        seed = int(rng.integers(2**31))
        own = np.random.default_rng(seed)
        while True:
            yield from own.integers(0, self.shape[0], (64, batch))


def writers(folder: Path, config: argparse.Namespace, rng: np.random.Generator) -> dict[str, Reader]:
    """One shard from batches of 512 rows, on disk for good, against the same bytes by plain writes."""
    row_bytes = 2 * config.width
    shard_rows = min(config.rows, shard_rows_for(row_bytes, config.block_rows))
    rows = rng.integers(0, 15000, (shard_rows, config.width), np.uint16).view(np.float16)
    batches = [rows[first : first + 512] for first in range(0, shard_rows, 512)]

    def plain() -> None:
        with open(folder / "plain", "wb", buffering=0) as file:
            for batch in batches:
                file.write(batch.view(np.uint8).data)
            os.fsync(file.fileno())
        (folder / "plain").unlink()

    def ours() -> None:
        chunk_rows = chunk_rows_for(row_bytes, shard_rows)
        layout: dict[str, Any] = {"row_shape": (config.width,), "dtype": "float16", "chunk_rows": chunk_rows}
        with ShardWriter(folder / "shard", shard_rows=-(-shard_rows // chunk_rows) * chunk_rows, **layout) as writer:
            for batch in batches:
                writer.append(batch)
        (folder / "shard").unlink()

    return {"plain": plain, "ours": ours}


def compare(
    readers: dict[str, Reader], config: argparse.Namespace, before: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Median and quartiles of seconds, and of speed relative to the first reader, over shuffled rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    order = random.Random(config.seed)
    for _ in range(config.rounds):
        for name in order.sample(list(readers), len(readers)):
            gc.collect()
            if before is not None:
                before()
            start = time.perf_counter()
            readers[name]()
            seconds[name].append(time.perf_counter() - start)
    baseline = next(iter(readers))
    return {
        name: {
            "median_seconds": statistics.median(values),
            "quartiles_seconds": quartiles(values),
            f"speed_to_{baseline}": statistics.median(ratios := [a / b for a, b in zip(seconds[baseline], values)]),
            f"quartiles_speed_to_{baseline}": quartiles(ratios),
        }
        for name, values in seconds.items()
    }


def quartiles(values: list[float]) -> list[float]:
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


if __name__ == "__main__":
    main()
