"""Extraction: files to committed blocks against the loops that most people write; on a GPU, every size of network.

On the CPU (the default) all run the same random ViT-S/14 at 224 over the same grey JPEGs: ours in float32 and in
bfloat16; the naive loop (an image at a time, RGB, eager attention, float32); and the better one (16 images at a time,
torch's attention). `--gpu` measures networks of random weights against the eager autocast loop: see `bench_gpu.py`.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import bench_gpu
import harness
import numpy as np
import torch
from PIL import Image

from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.extraction import pipeline
from featstore.extraction.creation import create_set, load_backbone
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store

NAIVE = "naive loop, batch 1"
BETTER = "naive loop, batch 16"
FLOORS = {"ours": 1.2, "ours bfloat16": 2.5}  # times the speed of the naive loop


def write_images(root: Path, count: int, size: int) -> None:
    """Smooth grey JPEGs, as compressible as radiographs."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (size // 16, size // 16), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(root / "images" / f"{number:05d}.jpg", quality=92)


def naive(root: Path, network: torch.nn.Module, size: int, batch_size: int, output: Path) -> None:
    """What most people write."""
    paths = sorted((root / "images").iterdir())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    features = []
    for start in range(0, len(paths), batch_size):
        images = []
        for path in paths[start : start + batch_size]:
            image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            images.append((torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - mean) / std)
        with torch.no_grad():
            features.append(network(torch.stack(images)).last_hidden_state[:, 0].numpy())
    np.save(output, np.concatenate(features).astype(np.float16))


class Extraction:
    """One data set in a folder and the network that runs over it."""

    def __init__(self, folder: Path, model: str, count: int, source: int, size: int) -> None:
        self.root, self.model, self.size = folder / "data", model, size
        write_images(self.root, count, source)
        register(folder / "store", "bench", self.root, RegisterConfig())
        self.store = Store(folder / "store")
        self.settings = RunConfig(device="cpu")
        self.networks: dict[str, Any] = {}
        self.made: dict[str, list[Any]] = {}
        self.runs = 0

    def plan(self, dtype: str) -> Any:
        self.runs += 1  # a new name is a new set: everything is computed and committed again
        config = SetConfig(
            model=self.model,
            res=str(self.size),
            random_weights=0,
            compute_dtype=dtype,  # type: ignore[arg-type]
            name=f"run{self.runs}",
        )
        return make_plan(self.store, "bench", config, self.settings)

    def create(self, dtype: str) -> float:
        """Make a set that `ours` will fill; seconds of the precision gate, which a set passes once."""
        plan = self.plan(dtype)
        if dtype not in self.networks:
            self.networks[dtype] = load_backbone(plan, self.settings, "cpu")
        started = time.perf_counter()
        made, _, _ = create_set(plan, self.settings, "cpu", self.networks[dtype], lambda line: None)
        self.made.setdefault(dtype, []).append(made)
        return time.perf_counter() - started

    def ours(self, dtype: str) -> None:
        pipeline.extract(self.made[dtype].pop(), self.settings, backbone=self.networks[dtype])

    def peer(self, attention: str) -> torch.nn.Module:
        plan = self.plan("float32")
        network: torch.nn.Module = plan.source.load(device="cpu", compute_dtype="float32", attention=attention).network
        return network


def cpu(options: Any) -> dict[str, Any]:
    """Files to committed blocks; peer time over ours, and whether the floors held."""
    count, source, size, repeats = (8, 128, 56, 1) if options.quick else (32, 1024, 224, options.repeats)
    model = "tiny" if options.quick else "dinov2-small"
    with tempfile.TemporaryDirectory() as folder:
        setting = Extraction(Path(folder), model, count, source, size)
        eager, sdpa, output = setting.peer("eager"), setting.peer("sdpa"), Path(folder) / "naive.npy"
        gate = {dtype: [setting.create(dtype) for _ in range(repeats + 1)] for dtype in ("float32", "bfloat16")}
        calls = {
            "ours": lambda: setting.ours("float32"),
            "ours bfloat16": lambda: setting.ours("bfloat16"),
            BETTER: lambda: naive(setting.root, sdpa, size, 16, output),
            NAIVE: lambda: naive(setting.root, eager, size, 1, output),
        }
        seconds = harness.interleave(calls, repeats=repeats, warmup=1)
    over = {ours: harness.ratios(seconds, ours) for ours in FLOORS}
    # The machine is shared: the fastest run of each is what it can do, and pairs are shown beside it.
    best = {ours: min(seconds[NAIVE]) / min(seconds[ours]) for ours in FLOORS}
    return {
        "config": {"model": model, "images": count, "source": source, "size": size, "repeats": repeats},
        "images_per_second": {
            name: harness.spread([count / value for value in values]) for name, values in seconds.items()
        },
        "peer_time_over_ours": over["ours"],
        "peer_time_over_ours_bfloat16": over["ours bfloat16"],
        # Once for each set, on at most 64 images; not in the times above.
        "gate_seconds": harness.spread(gate["bfloat16"][1:]),
        "floors": {
            ours: {
                "asked": asked,
                "median": over[ours][NAIVE]["median"],
                "best_over_best": best[ours],
                "held": over[ours][NAIVE]["median"] >= asked,
            }
            for ours, asked in FLOORS.items()
        },
        "best_over_best_of_the_better_loop": {ours: min(seconds[BETTER]) / min(seconds[ours]) for ours in FLOORS},
    }


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gpu", action="store_true", help="networks of every size on a CUDA device, instead")
    parser.add_argument("--device", default="cuda", help="for --gpu; cpu only with --quick, to see that it runs")
    parser.add_argument("--models", help="for --gpu: comma-separated, default: all")
    parser.add_argument("--seconds", type=float, default=5.0, help="for --gpu: of every measurement")
    options = parser.parse_args()
    if not options.gpu:
        harness.report("extract", options, cpu(options))
        return
    if options.device == "cpu" and not options.quick:
        parser.error("--gpu --device cpu is for --quick alone: it measures nothing worth keeping")
    if options.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured")
        return
    harness.report("gpu", options, bench_gpu.measure(options))


if __name__ == "__main__":
    main()
