"""`probes all` on a task of CheXpert's size: a synthetic store, one whole pass by the real command, then a warm one.

Train 181,000 x 1024 in float16, validation and test 10,000 each, 14 labels: kNN, the whole grid of 45 C, a few-shot
curve of 100 repeats, 1,000 bootstrap resamples by patient, and the baselines. Floors, on two cores: the first pass
under five minutes and 8 GiB, the second under three seconds with the start of Python.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench_probes import make_features

LABELS = [f"finding {number}" for number in range(14)]
FLOORS = {"seconds": 300.0, "peak_memory_bytes": 8 * 2**30, "warm_seconds": 3.0}
COMMANDS = {"featstore": "import cli.main; cli.main.featstore()", "probes": "import cli.main; cli.main.probes()"}


def write_data(folder: Path, train: int, held: int, width: int, seed: int = 0) -> tuple[Path, Path]:
    """Features (.npy, float16) and a table of ids, patients (three images each), splits, labels and metadata."""
    count = train + 2 * held
    X, y = make_features(count, width, len(LABELS), seed)
    np.save(folder / "features.npy", X.astype(np.float16))
    rng = np.random.default_rng(seed + 1)
    split = np.repeat(["train", "val", "test"], (train, held, held))
    # Images of a patient stand together, and no patient in two splits.
    place = np.concatenate([np.arange(train), np.arange(held), np.arange(held)])
    patients = [f"{name}-{number // 3}" for name, number in zip(split.tolist(), place.tolist())]
    columns: dict[str, Any] = {
        "id": [f"{patient}/{number}" for number, patient in enumerate(patients)],
        "patient_id": patients,
        "split": split,
        "age": rng.integers(18, 90, count).astype(str),
        "sex": rng.choice(["Female", "Male"], count),
        "view": rng.choice(["AP", "PA"], count),
        **{name: y[:, number].astype(str) for number, name in enumerate(LABELS)},
    }
    pq.write_table(pa.table(columns), folder / "table.parquet")
    return folder / "features.npy", folder / "table.parquet"


def run(program: str, *arguments: str, threads: int | None) -> dict[str, Any]:
    """Wall and CPU seconds of one command in a process of its own, and what it printed.

    Raises:
        RuntimeError: it failed.
    """
    more = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMANDS[program], *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **more},
        cwd=Path(__file__).resolve().parent.parent,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # the usage of this child alone
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{program} {' '.join(arguments)}: exit code {process.returncode}\n{output}")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "output": output,
    }


def stages(results: Path) -> dict[str, dict[str, float]]:
    """Seconds of each record, fit and scores and intervals, and the peak memory when it was made."""
    found = sorted((json.loads(path.read_bytes()) for path in results.glob("*.json")), key=lambda item: item["id"])
    return {record["probe"]: {key: record["cost"][key] for key in ("seconds", "peak_memory_bytes")} for record in found}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the store, run the pass twice, and hold it against the floors."""
    train, held, width = (600, 150, 24) if options.quick else (options.train, options.train // 18, options.width)
    repeats, resamples = (3, 20) if options.quick else (100, 1000)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        features, table = write_data(folder, train, held, width)
        store = folder / "store"
        arguments = ("--dataset", "synthetic", "--name", "features", "--store", str(store))
        run("featstore", "import", str(features), "--ids", str(table), *arguments, threads=options.threads)
        features.unlink()
        call: tuple[str, ...] = ("all", "--dataset", "synthetic", "--labels", ",".join(LABELS), "--store", str(store))
        call = (*call, "--repeats", str(repeats), "--resamples", str(resamples))
        first = run("probes", *call, threads=options.threads)
        made = stages(store / "results")
        warm = [run("probes", *call, threads=options.threads) for _ in range(1 if options.quick else 3)]
    if any("0 records made" not in item["output"] for item in warm):
        raise RuntimeError("the second pass computed something:\n" + warm[0]["output"])
    print(first["output"], file=sys.stderr)
    spent = {key: first[key] for key in ("seconds", "cpu_seconds")}
    again = {key: harness.spread([item[key] for item in warm]) for key in spent}
    # Of the process itself, as its records tell it: what the system counts for a child begins at its parent's peak.
    spent["peak_memory_bytes"] = max(item["peak_memory_bytes"] for item in made.values())
    reached = {**spent, "warm_seconds": again["seconds"]["median"]}
    config = {"train": train, "val": held, "test": held, "width": width, "labels": len(LABELS), "C": 45}
    return {
        "config": config | {"repeats": repeats, "resamples": resamples, "threads": options.threads},
        "load_before": options.load,
        "first": spent,
        "stages": made,
        "warm": again,
        "floors": {name: {"most": most, "held": reached[name] < most} for name, most in FLOORS.items()},
    }


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--train", type=int, default=181_000, help="training rows; a tenth of it shows the shape")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=None, help="OMP_NUM_THREADS of the commands; default: theirs")
    parser.add_argument("--folder", type=Path, default=None, help="where the store stands while it runs (0.5 GB)")
    options = parser.parse_args()
    options.load = list(os.getloadavg())
    harness.report("suite", options, measure(options))


if __name__ == "__main__":
    main()
