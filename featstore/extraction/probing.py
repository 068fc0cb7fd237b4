"""A few seconds of the real thing before a run: images decoded, batches through the network, a shard to the disk.

Nothing is written to a set. A network that is too large to load for this is tried with fewer of its blocks and random
weights, and the time scaled by its FLOP.
"""

import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from featstore import files, records
from featstore.backbones.architecture import VisionTransformer
from featstore.backbones.source import from_seed
from featstore.configs import RunConfig
from featstore.datasets.manifest import MISSING, Manifest
from featstore.errors import FeatstoreError
from featstore.extraction.plan import Plan, image_gflops
from featstore.images import PreprocessSpec
from featstore.inputs import Inputs
from featstore.objects import Place, as_object
from featstore.store.shards import ShardWriter, read_summary

IMAGES, SEED = 48, 0  # images to decode, and the seed that draws them
LARGEST_WEIGHTS = 2e9  # bytes; a larger network is tried with two of its blocks
WRITE_BYTES = 8 * 2**20

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Decoding:
    """Seconds of an image: of a processor (`cpu`), and of the clock while all workers decode (`wall`)."""

    cpu: float
    wall: float
    images: int
    failed: int


@dataclass(frozen=True, slots=True)
class Forwarding:
    """Seconds of one batch of `batch_size` images and of getting the network; `note` says what was not measured."""

    cpu: float
    wall: float
    batch_size: int
    load_cpu: float
    load_wall: float
    spent_cpu: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Writing:
    """Seconds of a byte and of a file, of a processor and of the clock: written, synced, linked and read back."""

    cpu_byte: float
    wall_byte: float
    cpu_file: float
    wall_file: float


# Where nothing is measured. Decoding: 1024-pixel radiographs as grey JPEG, 3.7 ms for 250 kB on one core; PNG less per
# byte. Writing: checksums twice and a local disk.
DECODE_CPU_BYTE, DECODE_CPU_IMAGE = 1.4e-8, 5e-4
WRITING = Writing(cpu_byte=1.2e-9, wall_byte=2.5e-9, cpu_file=4e-4, wall_file=4e-3)


def assumed_decoding(
    manifest: Manifest, rows: Int64[np.ndarray, " K"], workers: int, *, cores: int | None = None
) -> Decoding:
    """Decoding as it follows from the sizes of the files alone; `cores` of another machine than this one."""
    sizes = _sizes(manifest)[rows]
    cpu = DECODE_CPU_IMAGE + DECODE_CPU_BYTE * float(np.clip(sizes, 0, 50e6).mean() if len(sizes) else 0)
    return Decoding(cpu, cpu / max(1, min(workers, cores or int(records.machine()["cores"] or 1))), 0, 0)


def _sizes(manifest: Manifest) -> Int64[np.ndarray, " N"]:
    """Bytes of every sample's file; pyarrow's own `to_numpy` imports pandas, which takes a second."""
    column = manifest.table.column("size")
    if column.null_count or str(column.type) != "int64":
        return np.asarray(column.to_numpy(), np.int64)
    return np.concatenate(
        [
            np.empty(0, np.int64),
            *(
                np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset :][: len(chunk)]
                for chunk in column.chunks
                if len(chunk)
            ),
        ]
    )


def draw_rows(manifest: Manifest, rows: Int64[np.ndarray, " K"], count: int) -> list[int]:
    """Some of these rows in a seeded order, spread evenly over the sizes of their files."""
    sizes = _sizes(manifest)
    there = rows[sizes[rows] != MISSING]
    ordered = there[np.argsort(sizes[there], kind="stable")]
    rng = np.random.default_rng(SEED)
    count = min(count, len(ordered))
    places = ((np.arange(count) + rng.random(count)) * len(ordered) / max(count, 1)).astype(np.int64)
    return [int(row) for row in rng.permutation(ordered[places])]


def probe_decoding(
    manifest: Manifest,
    rows: Int64[np.ndarray, " K"],
    specs: tuple[PreprocessSpec, ...],
    run: RunConfig,
    *,
    seconds: float,
    workers: int,
) -> Decoding | None:
    """Read, decode and resize images as the run will, for all its preprocessings at once; None without any image.

    Raises:
        FeatstoreError: files are not those that were registered.
    """
    from featstore.extraction.loader import load_images, samples_of
    from featstore.images.opening import OpenFiles

    chosen = draw_rows(manifest, rows, IMAGES + 1)
    if not chosen:
        return None
    inputs, opened, samples = Inputs(manifest.root), OpenFiles(), samples_of(manifest, specs)
    failed: list[bool] = []

    def one(row: int) -> None:
        if time.perf_counter() < end:
            failed.append(load_images(inputs, opened, samples[row], specs)[1].reason is not None)

    try:
        end = float("inf")
        one(chosen[0])  # imports, and tables that are made once
        failed.clear()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        end = begun + seconds
        with ThreadPoolExecutor(workers, thread_name_prefix="probe") as pool:
            list(pool.map(one, chosen[1:] or chosen))
        wall, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
    finally:
        opened.close()
    count = max(1, len(failed))
    return Decoding(cpu / count, wall / count, len(failed), sum(failed))


def probe_forward(
    plan: Plan, run: RunConfig, device: str, *, seconds: float, batch_size: Callable[[object], int], say: Say
) -> Forwarding:
    """Batches through the plan's network, or through a few of its blocks where it is too large to load for that.

    `batch_size` gives the run's own for a network; of it as many images are tried as fit in the time.
    """
    import torch

    from featstore.extraction.creation import forward_images, load_backbone
    from featstore.extraction.estimate import forward_seconds

    size = (plan.preprocess.height, plan.preprocess.width)
    whole = image_gflops(plan.source, size, plan.window)
    image_seconds = forward_seconds(whole, device, plan.spec["identity"]["compute_dtype"])
    tried, note = _tried(plan, device, image_seconds, seconds)
    part = image_gflops(tried.source, size, tried.window) / max(whole, 1e-12) if note else 1.0
    say(f"{plan.name}: loading {note or 'the network'} for a probe")
    begun, begun_cpu = time.perf_counter(), time.process_time()
    backbone = load_backbone(tried, run, device)
    load_wall, load_cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
    full = batch_size(backbone)
    count = max(1, min(full, int(seconds / 2 / max(image_seconds * part, 1e-9))))
    # Batches are powers of two and filled up, kernels differ little from there on.
    count = 1 << (count.bit_length() - 1) if count < full else full
    images = torch.zeros((count, 1, *size), dtype=torch.uint8 if plan.preprocess.quantise == "uint8" else torch.float32)
    layers = plan.layers if not note else ()

    def once() -> tuple[float, float]:
        started, started_cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            forward_images(tried, device, backbone, images, layers)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
        return time.perf_counter() - started, time.process_time() - started_cpu

    say(f"{plan.name}: {count} images at a time through it")
    spent = time.process_time()
    first = once()
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds - first[0]
    while not times or (time.perf_counter() < end and len(times) < 20):
        times.append(once())
    scale = full / count / part
    wall, cpu = (statistics.median(values) * scale for values in zip(*times, strict=True))
    if note:
        scaled = plan.source.architecture.num_parameters() / max(tried.source.architecture.num_parameters(), 1)
        load_wall, load_cpu = load_wall * scaled, load_cpu * scaled
        note = f"measured on {note} with random weights, scaled by FLOP"
    elif count < full:
        note = f"measured on batches of {count} instead of {full}"
    return Forwarding(cpu, wall, full, load_cpu, load_wall, time.process_time() - spent, note)


def _tried(plan: Plan, device: str, image_seconds: float, seconds: float) -> tuple[Plan, str]:
    """The plan with the network to be tried, and what that is where it is not the whole one."""
    architecture = plan.source.architecture
    item = 4 if plan.spec["identity"]["compute_dtype"] == "float32" else 2
    large = item * architecture.num_parameters() > LARGEST_WEIGHTS and not device.startswith("cuda")
    slow = image_seconds > seconds
    if not isinstance(architecture, VisionTransformer) or architecture.depth <= 4 or not (large or slow):
        return plan, ""
    depth = 1 if item * architecture.num_parameters() / architecture.depth > LARGEST_WEIGHTS / 8 else 2
    short = replace(architecture, depth=depth)
    source = from_seed(plan.source.model, short, 0, processor=plan.source.processor, pos_interp=plan.source.pos_interp)
    return replace(plan, source=source), f"{depth} of its {architecture.depth} blocks"


@contextlib.contextmanager
def _scratch(store: Place) -> Iterator[tuple[Path, bool]]:
    """A folder to write to for a moment, and whether it is on the store's own disk."""
    home, there = None, False
    if as_object(store) is None:
        with contextlib.suppress(OSError, FeatstoreError):
            files.make_folder(store / "cache")
            home, there = Path(tempfile.mkdtemp(prefix="probe-", dir=str(store / "cache"))), True
    folder = home or Path(tempfile.mkdtemp(prefix="featstore-probe-"))
    try:
        yield folder, there
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def probe_writing(store: Place) -> tuple[Writing, str]:
    """Shards written as a commit does it, beside the store's sets; (seconds, what was not measured)."""
    with _scratch(store) as (folder, there):
        rows = np.zeros((WRITE_BYTES // 2048, 1024), np.float16)
        _write(folder / "a", rows[:1])
        small = [_write(folder / f"small{number}", rows[:1]) for number in range(4)]
        large = _write(folder / "large", rows)
    wall, cpu = (statistics.median(values) for values in zip(*small, strict=True))
    found = Writing(
        cpu_byte=max(large[1] - cpu, 1e-4) / WRITE_BYTES,
        wall_byte=max(large[0] - wall, 1e-4) / WRITE_BYTES,
        cpu_file=cpu,
        wall_file=wall,
    )
    return found, "" if there else "the store's own disk or bucket was not measured, a local folder was"


def _write(place: Path, rows: np.ndarray) -> tuple[float, float]:
    begun, begun_cpu = time.perf_counter(), time.process_time()
    layout = {"row_shape": (1024,), "dtype": "float16", "chunk_rows": 128, "shard_rows": 8192}
    files.make_folder(place / "attempt")
    with ShardWriter(place / "attempt" / "shard", **layout) as writer:  # type: ignore[arg-type]
        writer.append(rows)
        writer.close()
    files.make_folder(place / "c")
    files.link_kept(place / "attempt" / "shard", place / "c" / "0")
    read_summary(place / "c" / "0", **layout, deep=True)  # type: ignore[arg-type]
    return time.perf_counter() - begun, time.process_time() - begun_cpu
