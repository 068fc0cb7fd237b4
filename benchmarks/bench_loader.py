"""Batches for training: our loader against torch's DataLoader over a memory map of the same rows.

    python benchmarks/bench_loader.py --output benchmarks/results

Every case runs its loaders once a round, in shuffled order, for one epoch or --batches batches of it, and reports for
each the median and quartiles of its rows a second and of its speed relative to DataLoader (batched fetch, no workers)
in the same round. `cold` rounds drop the files from the page cache first, with every map closed. Last: a full load of a
set whose blocks are small, before and after `compact`, against np.load of the same bytes.
"""

import argparse
import gc
import os
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from featstore import files
from featstore.datasets.manifest import Manifest
from featstore.store import commits, ledger
from featstore.store.compact import compact, open_compact
from featstore.store.features import FeatureSet
from featstore.store.layout import ArraySpec, make_spec
from featstore.store.reader import ShardedArray
from featstore.store.training import FeatureDataset, FeatureLoader

QUICK = {
    "rows": 512,
    "width": 64,
    "grids": 64,
    "patches": 16,
    "grid_width": 32,
    "rounds": 1,
    "batches": 3,
    "batch": 32,
    "small_rows": 512,
    "small_width": 64,
    "small_block": 64,
}
Case = Callable[[], int]


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="bench_loader_", dir=options.scratch) as folder:
        cases = measure(Path(folder), options)
    results = {
        "command": " ".join(["python", "benchmarks/bench_loader.py", *sys.argv[1:]]),
        "config": {name: value for name, value in vars(options).items() if name not in ("scratch", "output")},
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "cases": cases,
    }
    harness.report("loader", options, results)


def parse_arguments() -> argparse.Namespace:
    parser = harness.parser("Batches for training, against torch's DataLoader over a memory map.")
    parser.add_argument("--rows", type=int, default=262144, help="rows of the N x D array")
    parser.add_argument("--width", type=int, default=768, help="D")
    parser.add_argument("--grids", type=int, default=4096, help="rows of the N x P x D array")
    parser.add_argument("--patches", type=int, default=196, help="P")
    parser.add_argument("--grid-width", type=int, default=384, help="D of the grids")
    parser.add_argument("--batch", type=int, default=256, help="rows of a batch; a quarter of it for grids")
    parser.add_argument("--batches", type=int, default=64, help="batches a round")
    parser.add_argument("--small-rows", type=int, default=32768, help="rows of the set in small blocks")
    parser.add_argument("--small-width", type=int, default=4096, help="its D")
    parser.add_argument("--small-block", type=int, default=256, help="its rows a block")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure; default: the temporary one")
    options = parser.parse_args()
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, value)
    return options


class MapDataset(Dataset[Any]):
    """What one writes by hand: a memory map and a batched fetch, opened in the process that reads."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, np.load(path, mmap_mode="r")
        self.process = os.getpid()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.process != os.getpid():
            self.rows, self.process = np.load(self.path, mmap_mode="r"), os.getpid()
        numbers = np.asarray(positions)
        return torch.from_numpy(self.rows[numbers]), torch.from_numpy(numbers)


def whole(batch: Any) -> Any:
    return batch


class Source:
    """One array as a set and as .npy."""

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...], config: argparse.Namespace, block: int) -> None:
        rng = np.random.default_rng(config.seed)
        array = ArraySpec(name=name, row_shape=shape[1:], dtype="float16")
        self.npy, self.name, self.count = folder / f"{name}.npy", name, shape[0]
        self.set = folder / name
        rows = rng.integers(0, 15000, shape, np.uint16).view(np.float16)
        np.save(self.npy, rows)
        manifest = make_manifest(len(rows))
        identity = {"stored_dtype": "float16", "reductions": {}}
        facts: dict[str, Any] = {"dataset": "bench", "model": "m", "resolution": "1", "weights": {"kind": "none"}}
        spec = make_spec(**facts, identity=identity, rows_per_block=block, random=False)
        files.create_exclusive(self.set / "spec.json", files.sealed(spec))
        ledger.add_arrays(self.set, [array])
        ledger.add_rows(self.set, manifest, dict)
        book = ledger.read_ledger(self.set)
        ledger.write_metadata(self.set, spec, book)
        for number, start, stop in book.blocks(block):
            states = [commits.RowState("0" * commits.HASH_HEX)] * (stop - start)
            with commits.BlockWriter(self.set, name, [array], number, start, stop, block) as writer:
                writer.append({name: rows[start:stop]}, states)
                writer.commit()
        self.fs = FeatureSet(self.set, manifest)

    def evict(self) -> None:
        for file in (self.npy, *self.set.rglob("*")):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    def loaders(self, batch: int, config: argparse.Namespace) -> dict[str, Case]:
        """Name -> one round, which returns the rows it gave; everything is opened in it."""
        epochs = iter(range(10**9))
        sent = pickle.dumps(FeatureDataset(self.fs, self.name))  # what it finds out about the set is kept in any use

        def ours(shuffle: Any) -> Case:
            def run() -> int:
                loader = FeatureLoader(pickle.loads(sent), batch, shuffle=shuffle, seed=config.seed)
                loader.set_epoch(next(epochs))
                return consume(loader, config.batches)

            return run

        def theirs(workers: int, data: Callable[[], Dataset[Any]], collate: Callable[[Any], Any]) -> Case:
            def run() -> int:
                generator = torch.Generator().manual_seed(next(epochs))
                options: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
                held = data()
                loader = DataLoader(
                    held, batch, shuffle=True, num_workers=workers, collate_fn=collate, generator=generator, **options
                )
                return consume(loader, config.batches)

            return run

        def mapped() -> Dataset[Any]:
            return MapDataset(self.npy)

        return {
            "memmap_workers_0": theirs(0, mapped, whole),
            "memmap_workers_2": theirs(2, mapped, whole),
            "ours_full": ours(True),
            "ours_block": ours("block"),
        }


def make_manifest(count: int) -> Manifest:
    import pyarrow as pa

    from featstore.datasets.manifest import table_digest

    names = [f"s{row:08d}" for row in range(count)]
    text, number = pa.string(), pa.int64()
    absent = {name: pa.nulls(count, text) for name in ("group", "study", "mask_path", "content")}
    columns = {"id": pa.array(names, text), "path": pa.array(names, text), "size": pa.array([1] * count, number)}
    times = {"split": pa.array(["train"] * count, text), "mtime_ns": pa.array([1] * count, number)}
    table = pa.table({**columns, **times, **absent})
    return Manifest(name="bench", table=table, digest=table_digest(table), meta={"root": "/", "adapter": "table"})


def consume(loader: Iterable[Any], batches: int) -> int:
    """Take batches and look at each row, as a head would at least; the number of rows."""
    rows = 0
    for number, batch in enumerate(loader, 1):
        batch[0].view(torch.int16).sum()
        rows += len(batch[0])
        if number == batches:
            break
    return rows


def measure(folder: Path, config: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    grids = (config.grids, config.patches, config.grid_width)
    sources = {"cls": (config.rows, config.width), "patches": grids}
    for name, shape in sources.items():
        source = Source(folder, name, shape, config, block=4096 if name == "patches" else 16384)
        loaders = source.loaders(config.batch // (4 if name == "patches" else 1), config)
        for case in loaders.values():
            case()
        results[f"{name}_warm"] = compare(loaders, config)
        if hasattr(os, "posix_fadvise"):
            results[f"{name}_cold"] = compare(loaders, config, before=source.evict)
    source = Source(folder, "small", (config.small_rows, config.small_width), config, block=config.small_block)
    compact(source.set)
    loads = compactions(source)
    results["small_blocks_load_warm"] = compare(loads, config)
    if hasattr(os, "posix_fadvise"):
        results["small_blocks_load_cold"] = compare(loads, config, before=source.evict)
    return results


def compactions(source: Source) -> dict[str, Case]:
    """Full loads: the .npy, the committed shards, the compact copy."""

    def copy() -> int:
        reader = open_compact(source.set, source.name, source.count)
        assert reader is not None
        return len(reader.load())

    return {
        "np_load": lambda: len(np.load(source.npy)),
        "shards": lambda: len(ShardedArray(source.set / "data.zarr" / source.name).load()),
        "compact": copy,
    }


def compare(cases: dict[str, Case], config: argparse.Namespace, before: Callable[[], None] | None = None) -> Any:
    """Median and quartiles of rows a second, and of speed relative to the first case, over shuffled rounds."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    order = random.Random(config.seed)
    for _ in range(config.rounds):
        for name in order.sample(list(cases), len(cases)):
            gc.collect()
            if before is not None:
                before()
            start = time.perf_counter()
            rows = cases[name]()
            rates[name].append(rows / (time.perf_counter() - start))
    baseline = next(iter(cases))
    return {
        name: {
            "rows_per_second": harness.spread(values),
            f"speed_to_{baseline}": harness.spread([a / b for a, b in zip(values, rates[baseline])]),
        }
        for name, values in rates.items()
    }


if __name__ == "__main__":
    main()
