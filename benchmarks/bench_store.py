"""Reading and writing rows of features, against numpy's memory map (the practical limit) and other stores.

    python benchmarks/bench_store.py --output benchmarks/results

Every case runs its rivals (`store_rivals.py`) once a round, in shuffled order, and states for each the median and
quartiles of its seconds a call, and of our speed relative to it in the same round: above 1 we are faster. `cold`
rounds drop the rival's files from the page cache first, with every map closed (a mapped page stays), and include
opening. The floors are judged on standard error.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import harness
import numpy as np
import store_rivals
from store_rivals import Rival

QUICK = {"rows": 512, "width": 64, "grids": 24, "patches": 16, "grid_width": 32, "rounds": 2, "batch": 32}
CASES = (
    "gather_warm",
    "gather_cold",
    "load_warm",
    "load_cold",
    "slice_warm",
    "grids_gather_warm",
    "grids_gather_cold",
    "write_synced",
)
# What numpy's file is called in each case, as the operation that it stands for.
BASELINES = {"gather": "memmap", "slice": "memmap", "load": "np_load", "write": "plain"}
FLOORS = (  # case, rival, our speed relative to it at least, as the median over the rounds
    ("gather_warm", "memmap", 0.4),
    ("gather_warm", "zarr_oindex", 100.0),
    ("gather_cold", "memmap", 3.0),
    ("load_warm", "np_load", 0.85),
    ("grids_gather_warm", "memmap", 0.5),
    ("grids_gather_cold", "memmap", 1.0),
    ("write_synced", "plain", 0.45),
)
CALLS_COLD = 4
PACKAGES = ("numpy", "zarr", "tensorstore", "google-crc32c", "h5py", "pylance", "torch")


def main() -> None:
    options = parse_arguments()
    chosen, notes = store_rivals.available(options.rival)
    with tempfile.TemporaryDirectory(prefix="bench_store_", dir=options.scratch) as folder:
        cases = measure(Path(folder), chosen, options)
    verdicts = judge(cases)
    results = {
        "command": " ".join(["python", "benchmarks/bench_store.py", *sys.argv[1:]]),
        "config": {name: value for name, value in vars(options).items() if name not in ("scratch", "output")},
        "settings": {rival.name: rival.settings for rival in chosen},
        "notes": [
            *notes,
            f"one file a row: {store_rivals.FILE_ROWS} rows at most are kept (a timed write: "
            f"{store_rivals.TorchFiles.write_rows}); seconds of loads and writes are scaled to all rows",
        ],
        "readers": {name: found for name in PACKAGES if (found := installed(name)) is not None},
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "cases": cases,
        "floors": verdicts,
    }
    for line in [*notes, *map(sentence, verdicts)]:
        print(line, file=sys.stderr)
    harness.report("store", options, results)


def parse_arguments() -> argparse.Namespace:
    parser = harness.parser("Reading and writing rows of features, against a memory map and other stores.")
    parser.add_argument("--rows", type=int, default=131072, help="rows of the N x D array")
    parser.add_argument("--width", type=int, default=768, help="D")
    parser.add_argument("--grids", type=int, default=1024, help="rows of the N x P x D array")
    parser.add_argument("--patches", type=int, default=196, help="P")
    parser.add_argument("--grid-width", type=int, default=384, help="D of the grids")
    parser.add_argument("--block-rows", type=int, default=65536, help="rows of a block, which bounds a shard")
    parser.add_argument("--batch", type=int, default=256, help="rows of a gather; a sixteenth of it for grids")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=CASES, help="this case only; may be given again")
    parser.add_argument("--rival", action="append", help="this one only, beside numpy and ours; may be given again")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure; default: the temporary one")
    options = parser.parse_args()
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, value)
    return options


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure(folder: Path, chosen: list[type[Rival]], config: argparse.Namespace) -> dict[str, Any]:
    cases = [case for case in config.only or CASES if "cold" not in case or hasattr(os, "posix_fadvise")]
    rng = np.random.default_rng(config.seed)
    results: dict[str, Any] = {}
    shapes = {"": (config.rows, config.width), "grids_": (config.grids, config.patches, config.grid_width)}
    for prefix, shape in shapes.items():
        own = [case for case in cases if case.startswith("grids_") == bool(prefix) and case != "write_synced"]
        if not own:
            continue
        rows = rng.integers(0, 15000, shape, np.uint16).view(np.float16)
        rivals = [kind(folder, config.block_rows) for kind in chosen]
        for rival in rivals:
            rival.write(rows)
            check(rival, rows)
        batch = max(1, config.batch // (16 if prefix else 1))
        for case in own:
            results[case] = compare(case, rivals, len(rows), batch, config)
        for rival in rivals:
            rival.remove()
    if "write_synced" in cases:
        shape = (min(config.rows, config.block_rows), config.width)
        rows = rng.integers(0, 15000, shape, np.uint16).view(np.float16)
        results["write_synced"] = write(rows, [kind(folder, config.block_rows) for kind in chosen], config)
    return results


def check(rival: Rival, rows: np.ndarray) -> None:
    """A rival that gives other rows is no rival; in passing, the page tables of maps fill as in any long run."""
    rival.open()
    held = rival.num_rows or len(rows)
    for first in range(0, held, max(1, held // 8)):
        wanted = np.arange(first, min(held, first + 16))[::-1]
        np.testing.assert_array_equal(rival.gather(wanted).view(np.uint16), rows[wanted].view(np.uint16))
    if "slice" in rival.kinds:
        np.testing.assert_array_equal(rival.read(1, 9).view(np.uint16), rows[1:9].view(np.uint16))
    rival.close()


def compare(
    case: str, rivals: list[Rival], num_rows: int, batch: int, config: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """One reading case over all rivals that take part."""
    kind, state = case.removeprefix("grids_").split("_")
    part = [rival for rival in rivals if kind in rival.kinds or f"{kind}_{state}" in rival.kinds]
    by_name = {label(kind, rival): rival for rival in part}
    low, high = num_rows // 4, num_rows // 4 + max(1, num_rows // 32)
    calls: dict[str, Callable[[], object]] = {}
    counts: dict[str, float] = {}  # calls of the operation in one timed call; a fraction where fewer rows are kept
    for name, rival in by_name.items():
        if kind == "gather":
            counts[name] = CALLS_COLD if state == "cold" else rival.calls
            calls[name] = gathers(rival, batches(num_rows, batch, config.seed), int(counts[name]))
        elif kind == "load":
            counts[name] = (rival.num_rows or num_rows) / num_rows
            calls[name] = rival.load
        else:
            counts[name] = 1
            calls[name] = partial(rival.read, low, high)
    if state == "warm":
        for name, rival in by_name.items():
            rival.open()
            rival.load()
            if kind == "gather" and rival.calls > 1:  # maps: every page is entered in the page table once
                for first in range(0, num_rows, 1024):
                    rival.gather(np.arange(first, min(num_rows, first + 1024)))
            calls[name]()
    else:
        calls = {name: opened(by_name[name], call) for name, call in calls.items()}

    def evict(name: str) -> None:
        by_name[name].close()
        by_name[name].evict()

    before = {"before": evict} if state == "cold" else {}
    seconds = harness.rounds(calls, repeats=config.rounds, seed=config.seed, **before)
    for rival in part:
        rival.close()
    gc.collect()
    return summarise({name: [value / counts[name] for value in values] for name, values in seconds.items()})


def label(kind: str, rival: Rival) -> str:
    return BASELINES[kind] if isinstance(rival, store_rivals.Numpy) else rival.name


def gathers(rival: Rival, wanted: Iterator[np.ndarray], count: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(count):
            rival.gather(next(wanted))

    return call


def opened(rival: Rival, call: Callable[[], object]) -> Callable[[], None]:
    def both() -> None:
        rival.open()
        call()

    return both


def batches(num_rows: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    own = np.random.default_rng(seed)
    while True:
        yield from own.integers(0, num_rows, (64, batch))


def write(rows: np.ndarray, rivals: list[Rival], config: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One shard of rows written and on disk for good, by every rival that writes."""
    part = {label("write", rival): rival for rival in rivals if "write" in rival.kinds}
    calls: dict[str, Callable[[], object]] = {
        name: partial(rival.write, rows[: rival.write_rows]) for name, rival in part.items()
    }

    def remove(_: str) -> None:
        for rival in part.values():
            rival.remove()

    for name, call in calls.items():
        call()
        remove(name)
    seconds = harness.rounds(calls, repeats=config.rounds, seed=config.seed, before=remove)
    remove("all")
    shares = {name: min(1.0, (rival.write_rows or len(rows)) / len(rows)) for name, rival in part.items()}
    return summarise({name: [value / shares[name] for value in values] for name, values in seconds.items()})


def summarise(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Median and quartiles of the seconds of each, and of our speed relative to each, round by round."""
    found: dict[str, dict[str, Any]] = {
        name: {"median_seconds": statistics.median(values), "quartiles_seconds": harness.quartiles(values)}
        for name, values in seconds.items()
    }
    for name, values in seconds.items():
        if name != "ours":
            ratios = [theirs / mine for theirs, mine in zip(values, seconds["ours"], strict=True)]
            found["ours"][f"speed_to_{name}"] = statistics.median(ratios)
            found["ours"][f"quartiles_speed_to_{name}"] = harness.quartiles(ratios)
    return found


def judge(cases: dict[str, Any]) -> list[dict[str, Any]]:
    """Every floor whose case was measured."""
    found = []
    for case, rival, floor in FLOORS:
        speed = cases.get(case, {}).get("ours", {}).get(f"speed_to_{rival}")
        if speed is not None:
            found.append({"case": case, "rival": rival, "floor": floor, "speed": speed, "holds": speed >= floor})
    return found


def sentence(verdict: dict[str, Any]) -> str:
    word = "holds" if verdict["holds"] else "MISSED"
    return f"{word:7}{verdict['case']} against {verdict['rival']}: {verdict['speed']:.3g}x, floor {verdict['floor']}x"


if __name__ == "__main__":
    main()
