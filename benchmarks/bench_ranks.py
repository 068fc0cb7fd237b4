"""One process against two that divide the work, one core each, on a network that computes more than it reads.

Each process runs `featstore extract` with one decoding thread and one compute thread, pinned to a core of its own; two
are ranks 0 and 1 of 2. The two ways take turns. Told are the ratio of wall times of the whole command, that of the time
in which blocks were computed, and the CPU-seconds: where two processes need as many as one, a ratio below two says that
the cores were not free.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
from bench_extract import write_images

ROOT = Path(__file__).resolve().parent.parent
GOAL = 1.8


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(store: Path, world: int, size: int, cores: list[int]) -> dict[str, float]:
    """Wall seconds of the commands, seconds in which blocks were computed, and CPU-seconds."""
    options = ["--dataset", "bench", "--model", "dinov2-small", "--random-weights", "0", "--res", str(size)]
    options += ["--block-rows", "16", "--batch-size", "4", "--workers", "1", "--device", "cpu", "--store", str(store)]
    begun, used = time.perf_counter(), cpu_seconds()
    children = []
    for rank in range(world):
        own = ["--rank", str(rank), "--world", str(world)] if world > 1 else []
        children.append(
            subprocess.Popen(
                [sys.executable, "-m", "featstore", "extract", *options, *own],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                preexec_fn=lambda rank=rank: os.sched_setaffinity(0, {cores[rank]}),  # type: ignore[misc]
            )
        )
    for child in children:
        _, error = child.communicate()
        if child.returncode:
            raise RuntimeError(error.decode()[-500:])
    wall = time.perf_counter() - begun
    [folder] = (store / "sets/bench").iterdir()
    times = sorted(path.stat().st_mtime for path in folder.glob("commits/*/*.json"))
    # From the first block to the last: loading, which both ways do once a process, is left out.
    return {"wall": wall, "blocks": times[-1] - times[0], "cpu": cpu_seconds() - used, "count": len(times)}


def main() -> None:
    options = harness.parser(__doc__ or "").parse_args()
    count, size, repeats = (32, 56, 1) if options.quick else (256, 224, 3)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("this machine gives one core to this process: two processes cannot be faster than one here")
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_images(root / "data", count, 512)
        register = ["register", "bench", str(root / "data"), "--adapter", "folder", "--store", str(root / "store")]
        subprocess.run([sys.executable, "-m", "featstore", *register], cwd=ROOT, check=True, capture_output=True)
        for _ in range(repeats):
            for world, results in found.items():
                shutil.copytree(root / "store", root / "once")
                results.append(run(root / "once", world, size, cores))
                shutil.rmtree(root / "once")

    def ratio(name: str) -> dict[str, float]:
        return harness.spread([one[name] / two[name] for one, two in zip(found[1], found[2])])

    # Of n blocks the first one's time is not seen: two processes begin with one each.
    steady = [
        (one["blocks"] / (one["count"] - 1)) / (two["blocks"] / (two["count"] - 2))
        for one, two in zip(found[1], found[2])
    ]
    results = {
        "speed of two over one, computing": harness.spread(steady),
        "wall of one over wall of two, loading included": ratio("wall"),
        "CPU-seconds of two over one": harness.spread(
            [two["cpu"] / one["cpu"] for one, two in zip(found[1], found[2])]
        ),
        "load average": os.getloadavg()[0],
        "goal": GOAL,
        "runs": json.loads(json.dumps(found)),
    }
    harness.report("ranks", options, {"config": {"images": count, "pixels": size, "repeats": repeats}, **results})


if __name__ == "__main__":
    main()
