"""The extraction loop: batches -> backbone -> tokens -> rows -> blocks, each committed when it is whole.

Three stages run at once: threads decode, this thread keeps the device busy, another one fetches rows from it and writes
them. Batches are cut at fixed positions inside a block, failed images keep their slot and the tail is padded, so the
bytes written do not depend on what was done before, by whom, or how often it was interrupted. (Out of memory a batch
goes through the network in pieces, whose rounding may differ: see `batching`.)
"""

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featstore import files, records
from featstore.backbones.compiling import compilation_of
from featstore.backbones.tokens import Backbone, Tokens
from featstore.configs import RunConfig
from featstore.errors import ConfigError, DeviceError, StoreError
from featstore.extraction.batching import Pieces, advised
from featstore.extraction.blocks import Blocks, progress_of, tally_of
from featstore.extraction.creation import TORCH_DTYPES, batch_size, create_set, forward_images, load_backbone, streams
from featstore.extraction.decoded_cache import Cache, CachedImages, fill_cache
from featstore.extraction.device import Landing, Transfers, facts_of
from featstore.extraction.loader import Batch, Images, Job, check_files, open_loader
from featstore.extraction.overlap import overlapped
from featstore.extraction.plan import Plan
from featstore.extraction.prepare import is_prepared, prepare
from featstore.extraction.reduce import Reducer
from featstore.objects import Place
from featstore.store import commits, compact, ledger, reductions
from featstore.store.diff import as_tokens, parity_limit, parity_of, row_differences
from featstore.store.layout import ArraySpec, read_spec
from featstore.store.locks import writer_lock
from featstore.store.reader import ShardedArray

BEHIND = 2  # batches whose rows wait to be written: the device goes on while a block is committed
FINITE = "finite:"  # before an array's name: which images have finite tokens, where its numbers cannot say so
TRIES = 16  # rows of a block that are looked at for one whose file is still good
COMPACT_BYTES = 16 * 2**20  # smaller arrays load at once however they are cut


@dataclass(slots=True)
class Summary:
    """What one run did to one set, and how; `notes` are lines to print, such as the loss of reductions it created.

    `micro_batch` images went through the network at once, `batch_size` unless memory was short.
    """

    name: str
    computed: int = 0
    failed: int = 0
    blocks: int = 0
    seconds: float = 0.0
    batch_size: int = 0
    micro_batch: int = 0
    device: str = ""
    how: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def choose_device(asked: str) -> str:
    """`auto` takes a CUDA device when there is one.

    Raises:
        DeviceError: CUDA is asked for and absent.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(f"--device {asked}: this machine or this build of torch has no CUDA device; use --device cpu")
    if ":" in asked and int(asked.partition(":")[2]) >= torch.cuda.device_count():
        raise DeviceError(f"--device {asked}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return asked


def extract(
    plan: Plan,
    run: RunConfig,
    *,
    backbone: Backbone | None = None,
    cache: Cache | None = None,
    advance: Callable[[int, int], None] = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Compute and commit every missing block of a plan.

    `advance(images, failed)` is called after each batch, from the thread that writes; what it raises stops the run.
    `say(line)` is called before work that is not part of any batch. `backbone` saves loading the same network twice,
    `cache` completing the same decoded cache twice.

    Raises:
        FeatstoreError: files changed, too many failures, an overflow, or results that do not match what is committed.
    """
    with writer_lock(plan.folder.parents[2]) as lock:

        def alive(images: int, failed: int) -> None:
            lock.renew()
            advance(images, failed)

        return _extract(plan, run, backbone, cache, advance=alive, say=say)


def _extract(
    plan: Plan,
    run: RunConfig,
    backbone: Backbone | None,
    cache: Cache | None,
    *,
    advance: Callable[[int, int], None],
    say: Callable[[str], None],
) -> Summary:
    started = time.monotonic()
    summary = Summary(plan.name)
    if len(plan.todo) == 0:
        if not is_prepared(plan):
            prepare(plan)
        if run.decoded_cache and cache is None:
            summary.notes = fill_cache(plan, run, say=say)[1]
        return summary
    check_files(plan.manifest, plan.todo)
    device = choose_device(run.device)
    plan, backbone, summary.notes = create_set(plan, run, device, backbone, say)
    if run.decoded_cache and cache is None:
        cache, lines = fill_cache(plan, run, say=say)
        summary.notes += lines
    worker = _Worker(plan, run, device, backbone or load_backbone(plan, run, device), cache)
    summary.device, summary.batch_size = device, worker.batch_size
    worker.guard()
    worker.compute(summary, advance)
    summary.micro_batch, summary.how = worker.pieces.size, facts_of(worker.backbone)
    summary.notes += worker.notes()
    summary.seconds = time.monotonic() - started
    _write_run(plan, run, summary)
    commits.sweep_attempts(plan.folder, older_than=commits.STALE_SECONDS)
    _compact(plan, summary)
    return summary


def _compact(plan: Plan, summary: Summary) -> None:
    """Large shards of small arrays beside a set that is complete; without them it is whole too, only slower to load."""
    try:
        gain = [
            array.name for array, stop in compact.compactable(plan.folder) if stop * array.row_bytes >= COMPACT_BYTES
        ]
        if gain and not _is_incomplete(plan.folder):
            compact.compact(plan.folder, arrays=gain)
    except StoreError as error:
        summary.notes.append(f"no compact copies: {error}")


def _is_incomplete(folder: Place) -> bool:
    """Whether any block of any array is not committed."""
    book = ledger.read_ledger(folder)
    blocks = {block for block, _, _ in book.blocks(int(read_spec(folder)["layout"]["block_rows"]))}
    return any(blocks - commits.committed_blocks(folder, group) for group in book.groups)


class _Worker:
    """One process at work on one set."""

    def __init__(self, plan: Plan, run: RunConfig, device: str, backbone: Backbone, cache: Cache | None):
        self.plan, self.run, self.device, self.backbone, self.cache = plan, run, device, backbone, cache
        self.blocks = Blocks(
            plan.folder, plan.manifest, [array.name for array in plan.arrays], retry_failed=run.retry_failed
        )
        self.row_index = self.blocks.row_index
        self.batch_size = batch_size(plan, run, device, backbone)
        self.pieces = Pieces(self.batch_size, device)
        self.transfers = Transfers(device)
        held = [array for arrays in self.blocks.groups.values() for array in arrays]
        self.empty = {array.name: _as_numpy(_empty_rows(array, 1))[0] for array in held}
        self.reducers: dict[str, Reducer] = {}
        for arrays in self.blocks.groups.values():
            for array in arrays:
                reduction = reductions.read_reduction(plan.folder, plan.spec, array.name)
                if reduction is not None:
                    self.reducers[array.name] = Reducer(reduction, device)

    def compute(self, summary: Summary, advance: Callable[[int, int], None]) -> None:
        """Extract and commit all missing blocks."""
        jobs = self.blocks.jobs(self.batch_size)
        tally = tally_of((job for items in jobs.values() for job in items), self.run)

        def after(batch: Batch) -> None:
            tally.add(batch)
            summary.computed, summary.failed, summary.reasons = tally.computed, tally.failed, tally.reasons
            advance(*progress_of(batch))

        if self.device.startswith("cuda") and jobs:
            self.trial(list(self.plan.arrays))
        for groups, items in jobs.items():
            with self.images(items) as images:
                summary.blocks += self._write(groups, images, after)
                summary.notes += images.notes

    def _write(self, groups: tuple[str, ...], images: Images, after: Callable[[Batch], None]) -> int:
        """Compute here and write in another thread; returns the number of blocks committed."""
        arrays = [array for group in groups for array in self.blocks.groups[group]]

        def write(started: Iterator[tuple[Batch, _Rows]]) -> int:
            current: list[_Rows] = []

            def batches() -> Iterator[Batch]:
                for batch, rows in started:
                    current[:] = [rows]
                    yield batch

            def rows_of(batch: Batch, arrays: list[ArraySpec]) -> dict[str, np.ndarray]:
                return current.pop().wait()

            return self.blocks.write(groups, batches(), rows_of, after)

        return overlapped(((batch, self.start(batch, arrays)) for batch in images), write, ahead=BEHIND)

    def trial(self, arrays: list[ArraySpec]) -> None:
        """One forward pass over nothing at the run's shape, so that what does not fit shows before the first image."""
        spec = self.plan.preprocess
        nothing = np.zeros(
            (self.batch_size, 1, spec.height, spec.width), np.uint8 if spec.quantise == "uint8" else "f4"
        )
        self._compute(nothing, arrays).wait()  # its rows must live as long as they are copied

    def notes(self) -> list[str]:
        """What there is to say about how the network ran."""
        failure = compilation_of(self.backbone).failure
        return self.pieces.notes + ([f"not compiled, the network ran as it is: {failure}"] if failure else [])

    def images(self, jobs: list[Job]) -> Images:
        """Batches of some jobs: decoded, or out of the decoded cache where that holds them."""
        if self.cache is not None:
            return CachedImages(self.cache, jobs)
        return open_loader(self.plan.manifest, self.plan.preprocess, jobs, self.run)

    def start(self, batch: Batch, arrays: list[ArraySpec]) -> "_Rows":
        """Set the device to work on one batch; where an image failed its rows are NaN, or zero in integer arrays."""
        failed = np.array([state.reason is not None for state in batch.states])
        rows = [int(self.row_index[row]) for row in batch.job.rows]
        if failed.all():
            landing = Landing({array.name: _empty_rows(array, len(rows)) for array in arrays}, {})
        else:
            landing = self._compute(batch.pixels, arrays)
        return _Rows(landing, self.empty, arrays, rows, failed)

    def _compute(self, pixels: np.ndarray, arrays: list[ArraySpec]) -> Landing:
        layers = tuple(sorted({int(array.name.split("/")[1]) for array in arrays if "/" in array.name}))

        def forward(images: Tensor) -> dict[str, Tensor]:
            tokens = forward_images(self.plan, self.device, self.backbone, images, layers)
            found = {}
            for array in arrays:  # made small and cast here, so that only what is asked for leaves the device
                values = pick(tokens, array.name)
                reducer = self.reducers.get(array.name)
                if reducer is not None:
                    values = reducer.floats(values)
                    if reducer.reduction.is_int8:  # integers cannot say that something was not finite
                        found[FINITE + array.name] = torch.isfinite(values).flatten(1).all(1)
                        values = reducer.quantised(values)
                found[array.name] = values.to(TORCH_DTYPES[array.dtype]).contiguous()
            return found

        # One shape a run: kernels and rounding stay the same at the tail. Streamed networks are not compiled and take
        # long enough for what is there.
        size = len(pixels) if streams(self.backbone) else max(self.batch_size, len(pixels))
        with torch.inference_mode(), advised(self.device, size, pixels.shape[2:]):
            rows = self.pieces(self.transfers.upload(pixels, size), forward)
            return self.transfers.download({name: values[: len(pixels)] for name, values in rows.items()})

    def guard(self) -> None:
        """Recompute two committed rows before adding to a set: other weights, code or kernels must not slip in.

        Raises:
            ConfigError: they differ by more than rounding can explain.
        """
        for group, arrays in self.blocks.groups.items():
            blocks = sorted(commits.committed_blocks(self.plan.folder, group))
            position = self.blocks.position
            candidates: list[list[int]] = []
            for block in dict.fromkeys(blocks[:1] + blocks[-1:]):
                commit = commits.read_commit(self.plan.folder, group, block)
                good = [row for row in range(commit.start, commit.stop) if row not in commit.failed and row in position]
                # One row of each, or two of the only one; each stands before those that may take its place.
                candidates += [good] if len(blocks) > 1 else [good[::2], good[1::2]]
            rows, batch = self._decodable([each[:TRIES] for each in candidates])
            if batch is None:
                continue
            fresh = self.start(batch, arrays).wait()
            for array in arrays:
                held = ShardedArray(self.plan.folder / "data.zarr" / array.name).gather(np.array(rows))
                reduction = self.reducers[array.name].reduction if array.name in self.reducers else None
                before = as_tokens(held, reduction)
                # bfloat16 rows travel as bits; what is held has the type that reads them.
                after = as_tokens(fresh[array.name].view(held.dtype), reduction)
                difference = float(row_differences(before, after).max())
                limit = parity_limit(parity_of(self.plan.spec), before, reduction)
                if not difference <= limit:
                    raise ConfigError(
                        f"{self.plan.name}: recomputing committed rows of {array.name} gives a relative difference of "
                        f"{difference:.2g}, more than {limit}; this machine or software would mix other numbers into "
                        "the set; use the device and versions that `featstore info` lists, or a new set (--name)"
                    )

    def _decodable(self, candidates: list[list[int]]) -> tuple[list[int], Batch | None]:
        """The first row of the set that can still be decoded of every list, and their images; None where none can.

        A file may have been damaged since: `check_unchanged` speaks for the rows that matter.
        """
        waiting = [iter(each) for each in candidates]
        chosen = [next(each, None) for each in waiting]
        while rows := [row for row in chosen if row is not None]:
            job = Job(-1, tuple(self.blocks.position[row] for row in rows))
            # As at the time, from the files: the cache need not hold these rows.
            with open_loader(self.plan.manifest, self.plan.preprocess, [job], self.run, workers=1) as loader:
                batch = next(iter(loader))
            broken = {row for row, state in zip(rows, batch.states) if state.reason is not None}
            if not broken:
                return rows, batch
            chosen = [next(each, None) if row in broken else row for row, each in zip(chosen, waiting)]
        return [], None


def pick(tokens: Tokens, name: str) -> Float[Tensor, "..."]:
    """The array `name` (`cls`, `layers/3/patches`, ...) out of one forward pass; the patch mean is taken in float32."""
    *layer, part = name.split("/")
    source = tokens.layers[int(layer[1])] if layer else tokens
    if part == "mean_patch":
        return source.patches.float().mean(1)
    found: Tensor = getattr(source, part)
    return found


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one batch in the making; `numbers` are their rows in the set, `empty` is a failed row of every array."""

    landing: Landing
    empty: dict[str, np.ndarray]
    arrays: list[ArraySpec]
    numbers: list[int]
    failed: Bool[np.ndarray, " B"]

    def wait(self) -> dict[str, np.ndarray]:
        """Rows of every array.

        Raises:
            StoreError: tokens are not finite, and the array's type cannot say so.
        """
        found = self.landing.wait()
        rows = {}
        for array in self.arrays:
            if FINITE + array.name in found:
                self._check_finite(array.name, found[FINITE + array.name].numpy())
            rows[array.name] = _as_numpy(found[array.name])
            if not self.failed.all():
                rows[array.name][self.failed] = self.empty[array.name]
        return rows

    def _check_finite(self, name: str, finite: Bool[np.ndarray, " B"]) -> None:
        bad = np.flatnonzero(~finite & ~self.failed)
        if len(bad):
            raise StoreError(
                f"{name}: row {self.numbers[int(bad[0])]} holds infinity or NaN, which int8 cannot keep; nothing of "
                "this block is committed; check the weights and the compute dtype"
            )


def _as_numpy(values: Tensor) -> np.ndarray:
    # numpy has no bfloat16: its bits travel as uint16.
    return values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()


def _empty_rows(array: ArraySpec, count: int) -> Tensor:
    """Rows of failed images."""
    empty = 0.0 if array.dtype == "int8" else float("nan")
    return torch.full((count, *array.row_shape), empty).to(TORCH_DTYPES[array.dtype])


def _write_run(plan: Plan, run: RunConfig, summary: Summary) -> None:
    """How and where it was computed; never part of identity."""
    record: dict[str, Any] = {
        "time": records.utc_now(),
        "manifest": plan.manifest.short,
        "weights": plan.source.origin,
        "run": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(run).items()},
        "summary": asdict(summary),
        "versions": records.versions(),
        "machine": records.machine(),
        "peak_memory_bytes": records.peak_memory_bytes(),
    }
    files.write_atomic(plan.folder / "runs" / f"{uuid.uuid4().hex}.json", files.sealed(record))
