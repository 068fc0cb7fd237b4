"""How much the times of equal blocks differ: a short real extraction on the CPU, read off its markers.

The simulation needs the spread alone: every time is divided by the median of its run. One line and, with --output, one
result file; `simulate_cluster.py` reads the newest full one.
"""

import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
from PIL import Image

from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.extraction import pipeline
from featstore.extraction.creation import create_set, load_backbone
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store

RESULTS = Path(__file__).parent / "results"
STAGE = "block_times"
SIDES = (512, 768, 1024, 1536)  # pixels; decoding them differs as with real data, in random order


def measured() -> tuple[list[float], str]:
    """Block times over the median of their run, and the name of the result file they stand in."""
    for path in sorted(RESULTS.glob(f"{STAGE}-*.json"), reverse=True):
        record = json.loads(path.read_text())
        if not record["quick"]:
            return [float(value) for value in record["results"]["relative"]], path.name
    raise FileNotFoundError(f"no full result of {STAGE} in {RESULTS}; run benchmarks/block_times.py --output {RESULTS}")


def write_images(root: Path, count: int) -> None:
    """Smooth grey JPEGs of several sizes."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for number in range(count):
        side = int(rng.choice(SIDES))
        coarse = Image.fromarray(rng.integers(0, 255, (side // 16, side // 16), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(root / "images" / f"{number:05d}.jpg", quality=92)


def block_seconds(folder: Path) -> list[float]:
    """Seconds between the markers of a set, in the order they were written; the first block warms up."""
    written = sorted(path.stat().st_mtime_ns for path in folder.rglob("[0-9]*.json") if len(path.stem) == 8)
    return [(later - earlier) / 1e9 for earlier, later in itertools.pairwise(written)][1:]


def measure(*, count: int, rows: int, runs: int, model: str, res: str) -> dict[str, Any]:
    """Extract the same images `runs` times, as a new set each, and read the times of the blocks off the markers."""
    settings = RunConfig(device="cpu")
    relative: list[float] = []
    medians: list[float] = []
    backbone: Any = None
    with tempfile.TemporaryDirectory() as home:
        root = Path(home)
        write_images(root / "data", count)
        register(root / "store", "bench", root / "data", RegisterConfig())
        for run in range(runs):
            config = SetConfig(
                model=model, res=res, random_weights=0, compute_dtype="bfloat16", block_rows=rows, name=f"run{run}"
            )
            plan = make_plan(Store(root / "store"), "bench", config, settings)
            backbone = backbone or load_backbone(plan, settings, "cpu")
            plan, _, _ = create_set(plan, settings, "cpu", backbone, lambda line: None)
            pipeline.extract(plan, settings, backbone=backbone)
            seconds = block_seconds(plan.folder)
            medians.append(statistics.median(seconds))
            relative += [round(value / medians[-1], 4) for value in seconds]
    return {
        "where": "measured on a CPU",
        "config": {"model": model, "res": res, "images": count, "rows of a block": rows, "runs": runs, "sides": SIDES},
        "median_seconds": [round(value, 4) for value in medians],
        "coefficient_of_variation": round(statistics.pstdev(relative) / statistics.fmean(relative), 4),
        "quartiles": [round(value, 4) for value in harness.quartiles(relative)],
        "relative": relative,
    }


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    if options.quick:
        found = measure(count=16, rows=4, runs=1, model="tiny", res="56")
    else:
        found = measure(count=480, rows=16, runs=6, model="dinov2-small", res="224")
    harness.report(STAGE, options, found)


if __name__ == "__main__":
    main()
