"""The extraction loop: batches -> backbone -> tokens -> rows -> blocks, each committed when it is whole.

Batches are cut at fixed positions inside a block, failed images keep their slot and the tail is padded, so the bytes
written do not depend on what was done before, by whom, or how often it was interrupted.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featstore import files, records
from featstore.backbones.tokens import Backbone, Tokens
from featstore.configs import RunConfig
from featstore.errors import ConfigError, DeviceError, StoreError
from featstore.extraction.blocks import Blocks, progress_of, tally_of
from featstore.extraction.decoded_cache import Cache, CachedImages, fill_cache
from featstore.extraction.loader import Batch, Images, Job, check_files, open_loader
from featstore.extraction.plan import Plan
from featstore.extraction.prepare import is_prepared, prepare
from featstore.extraction.reduce import Reducer, settle, summary_line
from featstore.images import to_pixels
from featstore.objects import Place
from featstore.store import commits, compact, ledger, reductions
from featstore.store.diff import as_tokens, parity_limit, parity_of, row_differences
from featstore.store.layout import ArraySpec, read_spec
from featstore.store.locks import writer_lock
from featstore.store.reader import ShardedArray

COMPACT_BYTES = 16 * 2**20  # smaller arrays load at once however they are cut
TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


@dataclass(slots=True)
class Summary:
    """What one run did to one set; `notes` are lines to print, such as the loss of reductions it created."""

    name: str
    computed: int = 0
    failed: int = 0
    blocks: int = 0
    seconds: float = 0.0
    batch_size: int = 0
    device: str = ""
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


def default_batch_size(num_tokens: int, device: str) -> int:
    """Images per forward pass: a power of two with about 4k tokens on a CPU, 64k on a GPU."""
    budget = 65536 if device.startswith("cuda") else 4096
    return int(2 ** np.clip(np.floor(np.log2(max(1, budget / num_tokens))), 0, 8))


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

    `advance(images, failed)` is called after each batch, `say(line)` before work that is not part of any batch.
    `backbone` saves loading the same network twice, `cache` completing the same decoded cache twice.

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
    if reductions.steps_of(plan.spec):
        # Parameters come from a forward pass and must be there before the set is.
        backbone = backbone or load_backbone(plan, run, device)
        summary.notes += _create_reduced(plan, run, device, backbone, say)
        plan = replace(plan, spec=read_spec(plan.folder))
    else:
        prepare(plan)
    if run.decoded_cache and cache is None:
        cache, lines = fill_cache(plan, run, say=say)
        summary.notes += lines
    worker = _Worker(plan, run, device, backbone or load_backbone(plan, run, device), cache)
    summary.device, summary.batch_size = device, worker.batch_size
    worker.guard()
    worker.compute(summary, advance)
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


def load_backbone(plan: Plan, run: RunConfig, device: str) -> Backbone:
    """The plan's network on a device, in the set's compute dtype."""
    return plan.source.load(
        device=device, compute_dtype=plan.spec["identity"]["compute_dtype"], attention=run.attention
    )


def _batch_size(plan: Plan, run: RunConfig, device: str) -> int:
    tokens = plan.source.architecture.num_tokens(plan.preprocess.height, plan.preprocess.width)
    rows_per_block = int(plan.spec["layout"]["block_rows"])
    return min(run.batch_size or default_batch_size(tokens, device), rows_per_block)


def _forward(plan: Plan, device: str, backbone: Backbone, pixels: Tensor, layers: tuple[int, ...]) -> Tokens:
    """Tokens of stacked images."""
    if device.startswith("cuda"):
        pixels = pixels.pin_memory()
    dtype = TORCH_DTYPES[plan.spec["identity"]["compute_dtype"]]
    return backbone(to_pixels(pixels, plan.preprocess, device=device, dtype=dtype), layers=layers)


def _create_reduced(
    plan: Plan, run: RunConfig, device: str, backbone: Backbone, say: Callable[[str], None]
) -> list[str]:
    """`prepare` for a set with reductions: settle those of new arrays first; returns their losses as lines."""

    def forward(images: np.ndarray) -> Tokens:
        with torch.inference_mode():
            return _forward(plan, device, backbone, torch.from_numpy(images), plan.layers)

    settled = settle(plan, forward, run, batch_size=_batch_size(plan, run, device), say=say)
    prepare(settled.plan)
    held = read_spec(plan.folder)
    if settled.parameters is not None:
        reductions.drop_unnamed(plan.folder, held, settled.parameters)
    found = {name: reductions.read_reduction(plan.folder, held, name) for name in settled.arrays}
    return [summary_line(reduction, name) for name, reduction in found.items() if reduction is not None]


class _Worker:
    """One process at work on one set."""

    def __init__(self, plan: Plan, run: RunConfig, device: str, backbone: Backbone, cache: Cache | None):
        self.plan, self.run, self.device, self.backbone, self.cache = plan, run, device, backbone, cache
        self.blocks = Blocks(
            plan.folder, plan.manifest, [array.name for array in plan.arrays], retry_failed=run.retry_failed
        )
        self.row_index = self.blocks.row_index
        self.batch_size = _batch_size(plan, run, device)
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

        for groups, items in jobs.items():
            with self.images(items) as images:
                summary.blocks += self.blocks.write(groups, images, self.embed, after)
                summary.notes += images.notes

    def images(self, jobs: list[Job]) -> Images:
        """Batches of some jobs: decoded, or out of the decoded cache where that holds them."""
        if self.cache is not None:
            return CachedImages(self.cache, jobs)
        return open_loader(self.plan.manifest, self.plan.preprocess, jobs, self.run)

    def embed(self, batch: Batch, arrays: list[ArraySpec]) -> dict[str, np.ndarray]:
        """Rows of every array for one batch; where the image failed NaN, or zero in arrays of integers."""
        count = len(batch.states)
        failed = np.array([state.reason is not None for state in batch.states])
        if failed.all():
            return {array.name: _empty_rows(array, count) for array in arrays}
        pixels = torch.from_numpy(batch.pixels)
        if count < self.batch_size:  # one shape a run: kernels and rounding stay the same at the tail
            pixels = torch.cat([pixels, pixels.new_zeros((self.batch_size - count, *pixels.shape[1:]))])
        layers = {int(array.name.split("/")[1]) for array in arrays if "/" in array.name}
        with torch.inference_mode():
            tokens = _forward(self.plan, self.device, self.backbone, pixels, tuple(sorted(layers)))
            rows = {}
            for array in arrays:
                values = pick(tokens, array.name)[:count]
                if array.name in self.reducers:
                    values = self._reduce(values, array.name, batch, failed)
                rows[array.name] = _to_rows(values, array)
        for array in arrays:
            rows[array.name][failed] = _empty_rows(array, 1)[0]
        return rows

    def _reduce(self, values: Tensor, name: str, batch: Batch, failed: Bool[np.ndarray, " B"]) -> Tensor:
        """Patches made smaller; integers cannot say that something was not finite, so that is checked here."""
        reducer = self.reducers[name]
        reduced = reducer.floats(values)
        if not reducer.reduction.is_int8:
            return reduced
        whole = torch.isfinite(reduced).flatten(1).all(1).cpu().numpy()
        bad = np.flatnonzero(~whole & ~failed)
        if len(bad):
            row = int(self.row_index[batch.job.rows[int(bad[0])]])
            raise StoreError(
                f"{name}: row {row} holds infinity or NaN, which int8 cannot keep; nothing of this block is committed; "
                "check the weights and the compute dtype"
            )
        return reducer.quantised(reduced)

    def guard(self) -> None:
        """Recompute two committed rows before adding to a set: other weights, code or kernels must not slip in.

        Raises:
            ConfigError: they differ by more than rounding can explain.
        """
        for group, arrays in self.blocks.groups.items():
            blocks = sorted(commits.committed_blocks(self.plan.folder, group))
            position = self.blocks.position
            rows: list[int] = []
            for block in dict.fromkeys(blocks[:1] + blocks[-1:]):
                commit = commits.read_commit(self.plan.folder, group, block)
                good = [row for row in range(commit.start, commit.stop) if row not in commit.failed and row in position]
                rows += good[: 1 if len(blocks) > 1 else 2]
            if not rows:
                continue
            job = Job(-1, tuple(position[row] for row in rows))
            # As at the time, from the files: the cache need not hold these rows.
            with open_loader(self.plan.manifest, self.plan.preprocess, [job], self.run, workers=1) as loader:
                batch = next(iter(loader))
            if any(state.reason is not None for state in batch.states):
                continue  # the file was damaged since; check_unchanged speaks for the rows that matter
            fresh = self.embed(batch, arrays)
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


def pick(tokens: Tokens, name: str) -> Float[Tensor, "..."]:
    """The array `name` (`cls`, `layers/3/patches`, ...) out of one forward pass; the patch mean is taken in float32."""
    *layer, part = name.split("/")
    source = tokens.layers[int(layer[1])] if layer else tokens
    if part == "mean_patch":
        return source.patches.float().mean(1)
    found: Tensor = getattr(source, part)
    return found


def _to_rows(values: Tensor, array: ArraySpec) -> np.ndarray:
    cast = values.to(TORCH_DTYPES[array.dtype]).cpu().contiguous()
    if array.dtype == "bfloat16":  # numpy has no such type: the bits travel as uint16
        return cast.view(torch.uint16).numpy()
    return cast.numpy()


def _empty_rows(array: ArraySpec, count: int) -> np.ndarray:
    """Rows of failed images."""
    empty = 0.0 if array.dtype == "int8" else float("nan")
    return _to_rows(torch.full((count, *array.row_shape), empty), array)


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
