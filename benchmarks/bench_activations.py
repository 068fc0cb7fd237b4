"""Cached activations: seconds an epoch of last-2 of a network of 12 blocks, with the cache and without it.

An epoch is what the loop does: steps over the training images, then validation. The first pass, which fills the cache,
is timed by itself.
"""

import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import harness
import numpy as np
from PIL import Image

from featstore.backbones.trainable import make_trainable
from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store
from probes.adapters import adapt
from probes.adapters_config import AdapterConfig
from probes.taskspec import TaskSpec
from probes.tuning_images import ImageSet, make_image_task
from probes.tuning_recipe import TuningRecipe
from probes.tuning_run import TuningOptions, TuningResult, finetune


def write_data(folder: Path, count: int, size: int) -> None:
    """Noise with a brighter half for one class; train, train, val, test in turn."""
    (folder / "images").mkdir(parents=True)
    lines = ["path,split,bright"]
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 120, (size, size), dtype=np.uint8)
        pixels[:, : size // 2] += np.uint8(100 * (number // 4 % 2))
        Image.fromarray(pixels).save(folder / "images" / f"{number:05d}.png")
        split = ("train", "train", "val", "test")[number % 4]
        lines.append(f"images/{number:05d}.png,{split},{number // 4 % 2}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")


def run(store: Path, folder: Path, options: Namespace, *, epochs: int, cache: Path | None) -> TuningResult:
    """One run of its own, from the same start."""
    how = RunConfig(device="cpu", workers=2)
    config = SetConfig(model=options.model, res=str(options.res), random_weights=0, compute_dtype="float32")
    task = make_image_task(ImageSet(make_plan(Store(store), "bench", config, how), how), SPEC)
    images = task.features
    assert isinstance(images, ImageSet)
    backbone = images.plan.source.load(device="cpu", compute_dtype="float32")
    adapted = adapt(make_trainable(backbone), "last-k", AdapterConfig(k=options.k), features="cls+mean_patch")
    recipe = TuningRecipe(epochs=epochs, batch=options.batch)
    wanted = TuningOptions(features="cls+mean_patch", cache=cache, export=False)
    return finetune(task, adapted, recipe, folder, options=wanted)


SPEC = TaskSpec(name="bright", labels=("bright",))


def measure(options: Namespace) -> dict[str, Any]:
    """Seconds an epoch of both ways, in turn, and how far their losses are apart."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder / "data", options.images, options.res)
        table = RegisterConfig(table=Path("table.csv"), split_column="split", label_columns="bright")
        register(folder / "store", "bench", folder / "data", table)
        started = time.perf_counter()
        run(folder / "store", folder / "first", options, epochs=1, cache=folder / "cache")
        first = time.perf_counter() - started
        seconds: dict[str, list[float]] = {"plain": [], "cached": []}
        curves: dict[str, Any] = {}
        for number in range(options.repeats):
            for name, cache in (("plain", None), ("cached", folder / "cache")):
                result = run(folder / "store", folder / f"{name}{number}", options, epochs=options.epochs, cache=cache)
                seconds[name].append(result.progress.seconds / options.epochs)
                curves[name] = result.history
        gap = max(
            float(np.abs(np.subtract(curves["plain"][name], curves["cached"][name])).max()) for name in curves["plain"]
        )
        return {
            "config": {name: getattr(options, name) for name in ("model", "res", "images", "batch", "k", "epochs")},
            "seconds_per_epoch": {name: harness.spread(values) for name, values in seconds.items()},
            "ratio": harness.ratios(seconds, "cached")["plain"],
            "first_run_seconds": first,
            "loss_difference": gap,
        }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse, measure, report."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--model", default="dinov2-small")
    parser.add_argument("--res", type=int, default=112)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.res, options.images, options.batch, options.epochs, options.repeats = (
            "tiny",
            42,
            16,
            4,
            1,
            1,
        )
    return harness.report("activations", options, measure(options))


if __name__ == "__main__":
    main()
