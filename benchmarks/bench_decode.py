"""Decode and resize on one core, against the habit of Pillow to RGB and a bicubic resize; pixel error stated."""

import io
from functools import partial

import harness
import numpy as np
import torch
from PIL import Image

from featstore.images import PreprocessSpec, decode, preprocess


def encode(size: int, kind: str, rng: np.random.Generator) -> bytes:
    """One smooth grey picture."""
    coarse = Image.fromarray(rng.integers(0, 255, (size // 16, size // 16), dtype=np.uint8))
    sink = io.BytesIO()
    coarse.resize((size, size), Image.Resampling.BICUBIC).save(
        sink, kind, **({"quality": 92} if kind == "JPEG" else {})
    )
    return sink.getvalue()


def habit(data: bytes, size: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def ours_on(pictures: list[bytes], spec: PreprocessSpec) -> list[np.ndarray]:
    return [preprocess(decode(data), spec) for data in pictures]


def habit_on(pictures: list[bytes], size: int) -> list[np.ndarray]:
    return [habit(data, size) for data in pictures]


def main() -> None:
    options = harness.parser(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    results = {}
    for kind, source, target in (("JPEG", 1024, 224), ("JPEG", 2048, 224), ("PNG", 1024, 224), ("JPEG", 2048, 518)):
        if options.quick:
            source, target = source // 8, target // 4
        pictures = [encode(source, kind, rng) for _ in range(2 if options.quick else 12)]
        spec = PreprocessSpec(geometry="squash", height=target, width=target, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        error = max(
            int(np.abs(preprocess(decode(data), spec)[0].astype(int) - habit(data, target)[:, :, 0]).max())
            for data in pictures
        )
        calls = {"ours": partial(ours_on, pictures, spec), "Pillow RGB": partial(habit_on, pictures, target)}
        seconds = harness.interleave(calls, repeats=1 if options.quick else 9)
        results[f"{kind} {source} to {target}"] = {
            "images_per_second": {
                name: harness.spread([len(pictures) / value for value in values]) for name, values in seconds.items()
            },
            "peer_time_over_ours": harness.ratios(seconds, "ours"),
            "largest_difference_in_grey_levels": error,
        }
    harness.report("decode", options, results)


if __name__ == "__main__":
    main()
