"""Shared by the benchmarks: interleaved timing, one JSON line, result files that are added and never replaced."""

import argparse
import gc
import json
import random
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featstore.records import machine, utc_now, versions


def interleave(calls: dict[str, Callable[[], object]], *, repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Wall seconds of every call, in turn A B A B ..., so that drift of the machine hits all alike."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def rounds(
    calls: dict[str, Callable[[], object]],
    *,
    repeats: int,
    seed: int = 0,
    before: Callable[[str], object] = lambda _: None,
) -> dict[str, list[float]]:
    """Wall seconds of every call, each round in another shuffled order; `before` runs first, untimed, with its name."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(seed)
    for _ in range(repeats):
        for name in order.sample(list(calls), len(calls)):
            gc.collect()
            before(name)
            started = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def quartiles(values: list[float]) -> list[float]:
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(seconds: dict[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    """Peer time / our time, pair by pair: above 1 we are faster."""
    return {
        name: spread([peer / mine for peer, mine in zip(values, seconds[ours])])
        for name, values in seconds.items()
        if name != ours
    }


def commit() -> str:
    """The commit that is measured, with a mark if the tree has changes."""
    folder = Path(__file__).parent
    call = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    return subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--output", type=Path, help="folder for the result file; a new one is added each time")
    made.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    return made


def report(stage: str, options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """Print one JSON line and, with --output, keep it as a file of its own."""
    record = {
        "stage": stage,
        "time": utc_now(),
        "commit": commit(),
        "quick": options.quick,
        "machine": {key: value for key, value in machine().items() if key != "host"},
        "versions": versions(),
        "results": results,
    }
    print(json.dumps(record))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"{stage}-{record['time'].replace(':', '').replace('-', '')}-{uuid.uuid4().hex[:6]}.json"
        (options.output / name).write_text(json.dumps(record, indent=1) + "\n")
    return record
