"""Measures memory in a process of its own: `peaks FOLDER KINDS WAYS`, or `together FOLDER LIMIT INTENSITY`."""

import ctypes
import gc
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from featstore.extraction.loader import Sample, load_images
from featstore.extraction.memory import Gate
from featstore.images import PreprocessSpec, preprocess
from featstore.images.extent import footprint, measure
from featstore.images.opening import OpenFiles, decode_bytes
from featstore.inputs import Inputs


def memory(name: str) -> int:
    """`VmRSS` or `VmHWM` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def start() -> int:
    """Forget the peak; bytes held now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def spec_of(way: str) -> PreprocessSpec:
    geometry: Any = "spline" if way == "spline" else "squash"
    half = (0.5, 0.5, 0.5)
    return PreprocessSpec(
        geometry=geometry, height=28, width=28, mean=half, std=half, intensity="native" if way == "spline" else way
    )


def peaks(folder: Path, kinds: str, ways: str) -> list[list[Any]]:
    """[kind, way, bytes at the peak, bytes foretold] of every file that a way can be done on."""
    found: list[list[Any]] = []
    for kind in kinds.split(","):
        for way in ways.split(","):
            if way == "clahe" and kind.split()[1] in ("RGB", "P", "CMYK"):
                continue
            spec = spec_of(way)
            data = (folder / f"{kind} small").read_bytes()
            preprocess(decode_bytes(data, spec.decoding), spec)  # imports, tables
            before = start()
            data = (folder / kind).read_bytes()
            preprocess(decode_bytes(data, spec.decoding), spec)
            found.append([kind, way, memory("VmHWM") - before, footprint(measure(data, len(data)), [spec])])
    return found


def together(folder: Path, limit: str, intensity: str) -> list[int]:
    """[bytes at the peak, bytes let in at once] of decoding all files by 8 threads."""
    from PIL import Image

    spec, gate, inputs, small = spec_of(intensity), Gate(int(limit)), Inputs(folder), folder.parent / "small.png"
    samples = [Sample(path.name, None, path.stat().st_size) for path in sorted(folder.iterdir())]
    Image.new("L", (40, 40), 7).save(small)
    preprocess(decode_bytes(small.read_bytes(), spec.decoding), spec)
    opened, before = OpenFiles(), start()
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(load_images, inputs, opened, sample, [spec], gate) for sample in samples]
        assert all(future.result()[1].reason is None for future in done)
    return [memory("VmHWM") - before, gate.most]


if __name__ == "__main__":
    torch.set_num_threads(1)
    function = {"peaks": peaks, "together": together}[sys.argv[1]]
    print(json.dumps(function(Path(sys.argv[2]), *sys.argv[3:])))
