"""Extraction on this machine: files to committed blocks, against the loop that most people write.

The peer: one process, a batch at a time, PIL to RGB, bicubic resize, transformers' own forward pass, features kept in
a list and saved with numpy at the end. Both run the same random ViT-S/14 in float32 over the same grey JPEGs. The
last line compares bfloat16 with the peer's float32.
"""

import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from PIL import Image

from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.extraction import pipeline
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store


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


def main() -> None:
    options = harness.parser(__doc__ or "").parse_args()
    count, source, size, repeats = (8, 128, 56, 1) if options.quick else (32, 1024, 224, 5)
    model = "tiny" if options.quick else "dinov2-small"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write_images(root, count, source)
        register(Path(folder) / "store", "bench", root, RegisterConfig())
        store = Store(Path(folder) / "store")
        runs = iter(range(10**6))
        settings = RunConfig(device="cpu")
        networks: dict[str, Any] = {}

        def ours(dtype: str) -> None:
            # A new name is a new set: everything is computed and committed again.
            config = SetConfig(
                model=model, res=str(size), random_weights=0, compute_dtype=dtype, name=f"run{next(runs)}"
            )  # type: ignore[arg-type]
            plan = make_plan(store, "bench", config, settings)
            if dtype not in networks:
                networks[dtype] = pipeline.load_backbone(plan, settings, "cpu")
            pipeline.extract(plan, settings, backbone=networks[dtype])

        ours("float32")
        ours("bfloat16")
        network = networks["float32"].network
        calls = {
            "ours": lambda: ours("float32"),
            "ours bfloat16": lambda: ours("bfloat16"),
            "naive loop, batch 16": lambda: naive(root, network, size, 16, Path(folder) / "naive.npy"),
            "naive loop, batch 1": lambda: naive(root, network, size, 1, Path(folder) / "naive.npy"),
        }
        seconds = harness.interleave(calls, repeats=repeats, warmup=0)
    harness.report(
        "extract",
        options,
        {
            "config": {"model": model, "images": count, "source": source, "size": size, "repeats": repeats},
            "images_per_second": {
                name: harness.spread([count / value for value in values]) for name, values in seconds.items()
            },
            "peer_time_over_ours": harness.ratios(seconds, "ours"),
            "peer_time_over_ours_bfloat16": harness.ratios(seconds, "ours bfloat16"),
        },
    )


if __name__ == "__main__":
    main()
