"""Decode and resize on one core, against the habit of Pillow to RGB and a bicubic resize; pixel error stated.

Also how fast the decoded cache is read, and what it saves the second backbone.
"""

import io
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from PIL import Image

from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.extraction.decoded_cache import CachedImages, fill_cache
from featstore.extraction.loader import Job
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import Plan, make_plan
from featstore.images import PreprocessSpec, preprocess
from featstore.images.opening import decode_bytes
from featstore.register import register
from featstore.store.catalog import Store

CASES = (  # kind of file, pixels of it, pixels wanted
    ("JPEG", 1024, 224),
    ("JPEG", 2048, 224),
    ("JPEG", 2048, 518),
    ("PNG", 1024, 224),
    ("PNG of 16 bits", 1024, 224),
    ("DICOM of 16 bits", 2048, 224),
)
HALF = (0.5, 0.5, 0.5)
Files = list[bytes]


def picture(size: int, rng: np.random.Generator) -> Image.Image:
    """One smooth grey picture."""
    coarse = Image.fromarray(rng.integers(0, 255, (size // 16, size // 16), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def encode(size: int, kind: str, rng: np.random.Generator) -> bytes:
    """A picture as a file; of 16 bits it fills their range."""
    image, sink = picture(size, rng), io.BytesIO()
    if kind == "JPEG":
        image.save(sink, kind, quality=92)
        return sink.getvalue()
    if kind == "PNG":
        image.save(sink, kind)
        return sink.getvalue()
    deep = np.asarray(image).astype(np.uint16) * 257
    if kind.startswith("PNG"):
        Image.fromarray(deep).save(sink, "PNG")
        return sink.getvalue()
    return dicom(deep)


def dicom(pixels: np.ndarray) -> bytes:
    """Explicit little endian, 16 bits, MONOCHROME2, whose window shows its whole range."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    made.Modality, made.PhotometricInterpretation = "DX", "MONOCHROME2"
    made.Rows, made.Columns = pixels.shape
    made.SamplesPerPixel, made.PixelRepresentation = 1, 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
    made.WindowCenter, made.WindowWidth = 32768, 65536
    made.PixelData = pixels.tobytes()
    sink = io.BytesIO()
    made.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def habit(data: bytes, size: int) -> np.ndarray:
    """Pixels (H, W, 3) as many loaders make them; what is deep is first brought to 8 bits by its range."""
    if data[128:132] == b"DICM":
        from pydicom import dcmread

        image = Image.fromarray(_to_bytes(dcmread(io.BytesIO(data)).pixel_array))
    else:
        image = Image.open(io.BytesIO(data))
        if image.mode.startswith("I;16"):
            image = Image.fromarray(_to_bytes(np.asarray(image)))
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _to_bytes(deep: np.ndarray) -> np.ndarray:
    low, high = float(deep.min()), float(deep.max())
    return ((deep.astype(np.float32) - low) * (255 / max(1.0, high - low))).astype(np.uint8)


def ours(data: bytes, spec: PreprocessSpec) -> np.ndarray:
    return preprocess(decode_bytes(data, spec.decoding), spec)


def on_all(call: Callable[..., object], files: Files, *more: Any) -> None:
    for data in files:
        call(data, *more)


def compared(kind: str, source: int, target: int, rng: np.random.Generator, *, quick: bool) -> dict[str, Any]:
    """One case: images a second of each way, and how far their pixels are apart."""
    files = [encode(source, kind, rng) for _ in range(2 if quick else 12)]
    full = PreprocessSpec(geometry="squash", height=target, width=target, mean=HALF, std=HALF)
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(on_all, ours, files, full),
        "Pillow RGB": partial(on_all, habit, files, target),
    }
    pixels = [ours(data, full)[0].astype(int) for data in files]
    others = {"Pillow RGB": [habit(data, target)[:, :, 0] for data in files]}
    if kind == "JPEG":
        scaled = replace(full, decode="scaled")
        calls["ours, --decode scaled"] = partial(on_all, ours, files, scaled)
        others["ours, --decode scaled"] = [ours(data, scaled)[0] for data in files]
    seconds = harness.interleave(calls, repeats=1 if quick else 15)
    apart = {name: [np.abs(a - b) for a, b in zip(pixels, found)] for name, found in others.items()}
    return {
        "images_per_second": {
            name: harness.spread([len(files) / value for value in values]) for name, values in seconds.items()
        },
        "peer_time_over_ours": harness.ratios(seconds, "ours"),
        "grey_levels_from_ours": {
            name: {"largest": int(np.max(values)), "mean": float(np.mean(values))} for name, values in apart.items()
        },
    }


def cached(*, quick: bool) -> dict[str, Any]:
    """Reading the decoded cache, and the second backbone with and without it, on JPEGs as in the first case."""
    count, source, target = (8, 128, "56") if quick else (200, 1024, "224")
    rng = np.random.default_rng(1)
    run = RunConfig(device="cpu", workers=1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        root.mkdir()
        for number in range(count):
            (root / f"{number:04d}.jpg").write_bytes(encode(source, "JPEG", rng))
        home = Store(Path(folder) / "store")
        register(home.path, "pictures", root, RegisterConfig())

        def plan(seed: int) -> Plan:
            config = SetConfig(model="tiny", res=target, name=f"seed{seed}", random_weights=seed)
            return make_plan(home, "pictures", config, run)

        made, _ = fill_cache(plan(0), run)
        jobs = [Job(0, tuple(range(first, min(first + 32, count)))) for first in range(0, count, 32)]

        def read() -> None:
            with CachedImages([made], jobs) as images:
                for _ in images:
                    pass

        def extracted(decoded_cache: bool) -> None:
            extract(plan(0), replace(run, decoded_cache=decoded_cache))
            home.remove(f"pictures/seed0@{target}")

        reading = harness.interleave({"cache": read}, repeats=1 if quick else 9)["cache"]
        seconds = harness.interleave(
            {"with cache": partial(extracted, True), "without": partial(extracted, False)}, repeats=1 if quick else 5
        )
    return {
        "images": count,
        "cache_images_per_second": harness.spread([count / value for value in reading]),
        "second_backbone_images_per_second": {
            name: harness.spread([count / value for value in values]) for name, values in seconds.items()
        },
        "time_without_over_with": harness.ratios(seconds, "with cache")["without"],
    }


def main() -> None:
    options = harness.parser(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    results = {}
    for kind, source, target in CASES:
        if options.quick:
            source, target = source // 8, target // 4
        results[f"{kind} {source} to {target}"] = compared(kind, source, target, rng, quick=options.quick)
    results[next(iter(results))]["decoded_cache"] = cached(quick=options.quick)
    harness.report("decode", options, results)


if __name__ == "__main__":
    main()
