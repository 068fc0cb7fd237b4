"""Cached activations: seconds of an epoch of the last 2 of 12 blocks, with `--from-cache` and without it, on a CPU.

An epoch is what the product does in one: steps over the training images, validation, and the checkpoint, as a run
counts its own seconds (the checkpoint behind the last epoch is not among them). Without the cache images lie decoded
in memory, so that neither way decodes. Rounds pair the two ways, the first of a round in turn. `bound` is the ratio of
the multiplications of both ways, counted by torch: what would be left if nothing else cost anything. The run
that fills the cache is timed by itself, less what it trains; all features of one network share what it leaves.

Floor: at least 3 times as fast with a head on CLS, and the same losses to 1e-6; a head that reads the patches too is
measured beside it, because all of its last block must be computed.
"""

import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.flop_counter import FlopCounterMode

from featstore.backbones import describe
from featstore.backbones.trainable import make_trainable
from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store
from probes.adapters import adapt
from probes.adapters_config import AdapterConfig
from probes.taskspec import TaskSpec
from probes.tuning_activations import Entry, entry_block
from probes.tuning_images import ImageSet, make_image_task
from probes.tuning_model import Tuned, make_head
from probes.tuning_recipe import Optimisation, TuningRecipe
from probes.tuning_run import TuningOptions, TuningResult, finetune

SPEC = TaskSpec(name="bright", labels=("bright",))
SPLITS = ("train", "train", "train", "val", "test")  # in turn
FEATURES = ("cls", "cls+mean_patch")
FLOOR, LOSSES = 3.0, 1e-6
WAYS = ("plain", "cached")
QUICK = {"model": "tiny", "res": 42, "images": 20, "batch": 4, "epochs": 2, "repeats": 1}


def write_data(folder: Path, count: int, size: int) -> None:
    """Noise with a brighter half for one class."""
    (folder / "images").mkdir(parents=True)
    lines = ["path,split,bright"]
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 120, (size, size), dtype=np.uint8)
        bright = number // len(SPLITS) % 2
        pixels[:, : size // 2] += np.uint8(100 * bright)
        Image.fromarray(pixels).save(folder / "images" / f"{number:05d}.png")
        lines.append(f"images/{number:05d}.png,{SPLITS[number % len(SPLITS)]},{bright}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")


def run(place: Path, name: str, options: Namespace, *, features: str, cached: bool) -> TuningResult:
    """One run of its own, from the same start."""
    how = RunConfig(device="cpu", workers=2)
    config = SetConfig(model=options.model, res=str(options.res), random_weights=0, compute_dtype="float32")
    images = ImageSet(make_plan(Store(place / "store"), "bench", config, how), how)
    task = make_image_task(images, SPEC)
    backbone = images.plan.source.load(device="cpu", compute_dtype="float32")
    adapted = adapt(make_trainable(backbone), "last-k", AdapterConfig(k=options.k), features=features)
    recipe = TuningRecipe(epochs=options.epochs, batch=options.batch, optimisation=Optimisation(lr=1e-4, head_lr=1e-2))
    wanted = TuningOptions(features=features, cache=place / "cache" if cached else None, export=False)
    return finetune(task, adapted, recipe, place / name, options=wanted)


def bound(options: Namespace, features: str) -> dict[str, float]:
    """Multiplications and additions of an image in a step and in validation, both ways, and the ratio of an epoch."""
    backbone = describe(options.model, random_weights=0).load(device="cpu", compute_dtype="float32")
    adapted = adapt(make_trainable(backbone), "last-k", AdapterConfig(k=options.k), features=features)
    tuned = Tuned(adapted, features, make_head(adapted, features, 1, 0))
    images = torch.zeros(options.batch, 3, options.res, options.res)
    entry = Entry(tuned.trainable, entry_block(adapted, features), (options.res, options.res))
    taken = entry.take(lambda: tuned(images))
    counted: dict[str, float] = {}
    for way, inputs in zip(WAYS, (images, taken)):
        tuned.entry = entry if way == "cached" else None
        # Attention of a CPU's own is not among what torch counts; made of matrix products it is.
        with FlopCounterMode(display=False) as step, sdpa_kernel(SDPBackend.MATH):
            binary_cross_entropy_with_logits(tuned(inputs), torch.zeros(len(images), 1)).backward()  # type: ignore[no-untyped-call]
        with FlopCounterMode(display=False) as look, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            tuned(inputs)
        counted |= {
            f"{way}_step": step.get_total_flops() / len(images),
            f"{way}_validation": look.get_total_flops() / len(images),
        }
    epochs = [SPLITS.count("train") * counted[f"{way}_step"] + counted[f"{way}_validation"] for way in WAYS]
    return {**counted, "ratio": epochs[0] / epochs[1]}


def pairs(place: Path, options: Namespace, features: str) -> dict[str, Any]:
    """Seconds an epoch of both ways, pair by pair, and how far their losses are apart."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    curves: dict[str, Any] = {}
    for number in range(options.repeats):
        for way in WAYS if number % 2 == 0 else WAYS[::-1]:
            result = run(place, f"{features}-{way}{number}", options, features=features, cached=way == "cached")
            seconds[way].append(result.progress.seconds / options.epochs)
            curves[way] = result.history
    gap = max(float(np.abs(np.subtract(curves["plain"][name], curves["cached"][name])).max()) for name in curves[way])
    spreads = {way: harness.spread(values) for way, values in seconds.items()}
    ratio = harness.ratios(seconds, "cached")["plain"]
    return {
        "seconds_per_epoch": spreads,
        "ratio": ratio,
        "quartiles": harness.quartiles([a / b for a, b in zip(*seconds.values())]) if options.repeats > 1 else None,
        "bound": bound(options, features),
        "loss_difference": gap,
        "held": {"speed": ratio["median"] >= FLOOR, "losses": gap <= LOSSES},
    }


def measure(options: Namespace) -> dict[str, Any]:
    """Every choice of features in turn, over the same images."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_data(place / "data", options.images, options.res)
        table = RegisterConfig(table=Path("table.csv"), split_column="split", label_columns="bright")
        register(place / "store", "bench", place / "data", table)
        started = time.perf_counter()
        filling = run(place, "filling", options, features=options.features[0], cached=True)
        filled = time.perf_counter() - started - filling.progress.seconds  # with the loading of network and images
        names = ("model", "res", "images", "batch", "k", "epochs", "repeats")
        return {
            "config": {name: getattr(options, name) for name in names} | {"splits": SPLITS},
            "threads": torch.get_num_threads(),
            "floor": FLOOR,
            "filling_seconds": filled,
            "features": {features: pairs(place, options, features) for features in options.features},
        }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse, measure, report."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--model", default="dinov2-small")
    parser.add_argument("--res", type=int, default=112)
    parser.add_argument("--images", type=int, default=640, help="three fifths are trained on, one fifth validates")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2, help="of each run")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    parser.add_argument("--features", nargs="+", default=list(FEATURES), help="what heads read")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    return harness.report("activations", options, measure(options))


if __name__ == "__main__":
    main()
