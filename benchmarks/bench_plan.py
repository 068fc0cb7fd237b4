"""What `featstore plan` foretells against what `featstore extract` takes: CPU-seconds, bytes, files, memory, time.

Three jobs of different kinds, each in processes of their own as a user runs them: a tiny network over radiographs
(decoding dominates), a small vision transformer with random weights (the network dominates), and patches of many blocks
(writing dominates). CPU-seconds and memory of the child are the system's (`os.wait4`), bytes and files are counted.
Give `--images` a folder of real images; without it smooth grey JPEGs are made.
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
from bench_extract import write_images

from featstore.extraction.footprint import measure_folder
from featstore.extraction.prediction import compare

ROOT = Path(__file__).resolve().parent.parent
GOALS = {"cpu_seconds": 0.25, "bytes": 0.02, "files": 0.02}  # largest relative errors

JOBS: dict[str, list[str]] = {
    "decode: tiny at 98": ["--model", "tiny", "--res", "98"],
    "network: dinov2-small at 224": ["--model", "dinov2-small", "--res", "224", "--random-weights", "0"],
    "write: patches of tiny at 224": [
        *("--model", "tiny", "--res", "224", "--tokens", "cls,registers,patches", "--layers", "-2"),
        *("--block-rows", "64", "--name", "written"),
    ],
}


def run(arguments: list[str], store: Path) -> tuple[str, dict[str, float]]:
    """Output of a command, and what its process used."""
    call = [sys.executable, "-m", "featstore", *arguments, "--store", str(store)]
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(call, stdout=output, stderr=subprocess.DEVNULL, cwd=ROOT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {child.returncode}: {text[-500:]}")
    facts = {
        "wall_seconds": time.perf_counter() - begun,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_memory_bytes": used.ru_maxrss * 1024,  # Linux counts KiB
    }
    return text, facts


def measure(store: Path, options: list[str], probe: list[str]) -> dict[str, Any]:
    """One job, foretold and done."""
    common = ["--dataset", "bench", "--device", "cpu", *options, "--json"]
    text, cost = run(["plan", *common, *probe], store)
    said = json.loads(text)["sets"][0]
    before = set((store / "sets" / "bench").glob("*"))
    _, actual = run(["extract", *common], store)
    (folder,) = set((store / "sets" / "bench").glob("*")) - before
    size = measure_folder(folder)
    forecast = said["forecast"]
    predicted = {
        "wall_seconds": forecast["wall_seconds"],
        "cpu_seconds": forecast["cpu_seconds"]["total"],
        "peak_memory_bytes": forecast["peak_memory_bytes"],
        "bytes": said["bytes"]["final"],
        "files": said["files"]["final"],
    }
    found = compare(predicted, {**actual, "bytes": size.bytes, "files": size.files})
    return {
        "compared": found,
        "held": {name: abs(found[name]["error"]) <= goal for name, goal in GOALS.items()},
        "cpu_seconds_foretold": forecast["cpu_seconds"],
        "limiting": forecast["limiting"],
        "plan_took": cost,
        "rows": said["todo"],
    }


def main() -> None:
    parser: argparse.ArgumentParser = harness.parser(__doc__ or "")
    parser.add_argument("--images", type=Path, help="folder of real images; default: made ones")
    parser.add_argument("--count", type=int, default=400, help="images to make")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        store, root = Path(name) / "store", options.images
        if root is None:
            root = Path(name) / "data"
            write_images(root, 12 if options.quick else options.count, 64 if options.quick else 1024)
        run(["register", "bench", str(root)], store)
        jobs = dict(list(JOBS.items())[:1]) if options.quick else JOBS
        for job, arguments in jobs.items():
            probe = ["--probe", "1"] if options.quick else []
            results[job] = measure(store, arguments, probe)
    harness.report("plan", options, {"images": "real" if options.images else "made", "goals": GOALS, "jobs": results})


if __name__ == "__main__":
    main()
