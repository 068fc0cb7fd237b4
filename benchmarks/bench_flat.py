"""Memory over time of a long run: many tiny images, a tiny backbone, resident memory after every batch."""

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import harness
import numpy as np

CONTENTS = 64  # distinct pictures; the other files are hard links to them
FOLDER = 2000  # files in one folder
WARM = 0.25  # of the rows, before memory is looked at: imports, pools, the first blocks
SIDE = 14  # pixels: one patch of the tiny backbone


def picture(number: int) -> bytes:
    """A grey PNG of 8x8 pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write_files(root: Path, count: int) -> None:
    """`count` files, most of them hard links."""
    contents = root.parent / "contents"
    contents.mkdir()
    for number in range(CONTENTS):
        (contents / f"{number}.png").write_bytes(picture(number))
    for number in range(count):
        if number % FOLDER == 0:
            folder = root / f"{number // FOLDER:04d}"
            folder.mkdir(parents=True)
        os.link(contents / f"{number % CONTENTS}.png", folder / f"{number:07d}.png")


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, count: int, batch: int, workers: int) -> dict[str, Any]:
    """Register and extract in this process; memory after every batch."""
    import torch

    from featstore.configs import RegisterConfig, RunConfig, SetConfig
    from featstore.extraction.pipeline import extract
    from featstore.extraction.plan import make_plan
    from featstore.register import register
    from featstore.store.catalog import Store

    torch.set_num_threads(1)
    write_files(folder / "data", count)
    started = time.perf_counter()
    register(folder / "store", "flat", folder / "data", RegisterConfig())
    registered = time.perf_counter() - started
    run = RunConfig(batch_size=batch, workers=workers, device="cpu")
    plan = make_plan(Store(folder / "store"), "flat", SetConfig(model="tiny", res=f"{SIDE}"), run)
    seen: list[tuple[int, int]] = []
    before, started = resident(), time.perf_counter()

    def advance(images: int, failed: int) -> None:
        seen.append(((seen[-1][0] if seen else 0) + images + failed, resident()))

    summary = extract(plan, run, advance=advance)
    seconds = time.perf_counter() - started
    return {
        "rows": count,
        "computed": summary.computed,
        "failed": summary.failed,
        "register_seconds": registered,
        "seconds": seconds,
        "images_per_second": count / seconds,
        "before_mb": before / 1e6,
        "stages": summary.stages,
        **trend(seen, count),
    }


def trend(seen: list[tuple[int, int]], count: int) -> dict[str, Any]:
    """The slope of memory over images after the warm-up, by least squares, and ten points on the way."""
    images, held = np.array(seen, np.float64).T
    late = images > WARM * count
    slope = float(np.polyfit(images[late], held[late], 1)[0])
    points = np.linspace(0, len(seen) - 1, 10).astype(int)
    return {
        "slope_mb_per_100k": slope * 1e5 / 1e6,
        "bytes_per_row": slope,
        "peak_mb": float(held.max()) / 1e6,
        "first_mb": float(held[late][0]) / 1e6,
        "last_mb": float(held[-1]) / 1e6,
        "over_time": [[int(images[at]), round(float(held[at]) / 1e6, 1)] for at in points],
    }


def in_child(count: int, batch: int, workers: int) -> dict[str, Any]:
    """`measure` in a process of its own, in a folder that goes with it."""
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, __file__, "--child", folder, str(count), str(batch), str(workers)]
        paths = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(call, stdout=subprocess.PIPE, check=True, env={**os.environ, "PYTHONPATH": paths})
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def main() -> None:
    options = harness.parser(__doc__ or "")
    options.add_argument("--rows", type=int, default=200_000, help="images")
    options.add_argument("--batch", type=int, default=256, help="images of a batch")
    options.add_argument("--workers", type=int, default=2, help="decoding threads")
    given = options.parse_args()
    harness.report("flat", given, in_child(2000 if given.quick else given.rows, given.batch, given.workers))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(Path(sys.argv[2]), *map(int, sys.argv[3:]))))
    else:
        main()
