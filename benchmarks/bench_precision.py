"""What other types than float32 cost in exactness and gain in time, as the precision gate measures it.

Every network runs over the same images in float32 and in each kind: `bfloat16`, `float16`, and 8-bit matrices that
compute in bfloat16 (`int8`, `fp8`). The thresholds in `featstore/extraction/precision.py` come from these figures.
Without --images smooth grey pictures stand in, on which tokens differ less than on photographs.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from bench_extract import write_images

from featstore.backbones import BackboneSource, describe
from featstore.backbones.tokens import Backbone, Tokens
from featstore.configs import RegisterConfig, RunConfig
from featstore.extraction.precision import measure_precision
from featstore.extraction.reduce import Forward, draw_sample
from featstore.images import PreprocessSpec, stack, to_pixels
from featstore.register import register
from featstore.store.catalog import Store

KINDS = {
    "bfloat16": ("bfloat16", "same"),
    "float16": ("float16", "same"),
    "int8": ("bfloat16", "int8"),
    "fp8": ("bfloat16", "fp8"),
}
CASES = ("tiny@98", "dinov2-small@224", "dinov2-base@224", "dinov3-small@224", "dinov3-base@224", "dinov3-small@512")


def forward_of(backbone: Backbone, spec: PreprocessSpec) -> Forward:
    """The network on stacked images."""

    def forward(images: np.ndarray) -> Tokens:
        return backbone(to_pixels(torch.from_numpy(images), spec, device=backbone.device, dtype=backbone.dtype))

    return forward


def _run(forward: Forward, batches: list[np.ndarray]) -> None:
    for batch in batches:
        forward(batch)


def measure_case(source: BackboneSource, size: int, folder: Path, count: int, batch_size: int) -> dict[str, Any]:
    """Figures of one network at one size, by kind; seconds are those of one pass over the images."""
    facts = source.architecture
    spec = PreprocessSpec(geometry="squash", height=size, width=size, mean=facts.mean, std=facts.std)
    sample = draw_sample(Store(folder).manifest("bench"), spec, RunConfig(device="cpu"))
    images = [*sample.fit, *sample.measure][:count]
    batches = [stack(images[first : first + batch_size], spec) for first in range(0, len(images), batch_size)]
    exact = forward_of(source.load(device="cpu", compute_dtype="float32"), spec)
    found: dict[str, Any] = {"images": len(images)}
    for kind, (compute_dtype, weight_dtype) in KINDS.items():
        other = forward_of(source.load(device="cpu", compute_dtype=compute_dtype, weight_dtype=weight_dtype), spec)
        passes = {name: partial(_run, one, batches) for name, one in (("float32", exact), (kind, other))}
        seconds = harness.interleave(passes, repeats=1)
        arrays = measure_precision(exact, other, batches, names={"cls", "patches"})
        found[kind] = {"arrays": arrays, "seconds": {name: values[0] for name, values in seconds.items()}}
    return found


def main() -> None:
    made = harness.parser(__doc__ or "")
    made.add_argument("--images", type=Path, help="folder of images, searched through its subfolders")
    made.add_argument("--cases", nargs="+", default=CASES, help="MODEL@SIZE; all but tiny with random weights")
    made.add_argument("--count", type=int, default=32, help="images")
    options = made.parse_args()
    cases, count = (["tiny@42"], 4) if options.quick else (options.cases, options.count)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = options.images
        if root is None:
            root = Path(folder) / "data"
            write_images(root, count, 64 if options.quick else 512)
        register(Path(folder) / "store", "bench", root, RegisterConfig())
        for case in cases:
            model, size = case.split("@")
            source = describe(model, random_weights=None if model == "tiny" else 0)
            results[case] = measure_case(source, int(size), Path(folder) / "store", count, 8)
    harness.report(
        "precision",
        options,
        {"config": {"images": "given" if options.images else "synthetic", "count": count}, "cases": results},
    )


if __name__ == "__main__":
    main()
