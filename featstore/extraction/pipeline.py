"""The extraction loop: batches -> backbone -> tokens -> rows -> blocks, each committed when it is whole.

Batches are cut at fixed positions inside a block, failed images keep their slot and the tail is padded, so the bytes
written do not depend on what was done before, by whom, or how often it was interrupted.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from featstore import files, records
from featstore.backbones.tokens import Backbone, Tokens
from featstore.configs import RunConfig, parse_share
from featstore.datasets.manifest import MISSING, check_unchanged
from featstore.errors import ConfigError, DeviceError, FeatstoreError
from featstore.extraction.loader import GONE, Batch, Job, Loader
from featstore.extraction.plan import Plan
from featstore.extraction.prepare import is_prepared, prepare
from featstore.images import to_pixels
from featstore.store import commits, ledger
from featstore.store.commits import BlockWriter
from featstore.store.layout import ArraySpec
from featstore.store.reader import ShardedArray

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference, relative to the row's own norm, that another machine, kernel or batch size may cause.
PARITY = {"float32": 5e-3, "bfloat16": 5e-2, "float16": 2e-2}


@dataclass(slots=True)
class Summary:
    """What one run did to one set."""

    name: str
    computed: int = 0
    failed: int = 0
    blocks: int = 0
    seconds: float = 0.0
    batch_size: int = 0
    device: str = ""
    reasons: dict[str, int] = field(default_factory=dict)


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
    advance: Callable[[int, int], None] = lambda *_: None,
) -> Summary:
    """Compute and commit every missing block of a plan.

    `advance(images, failed)` is called after each batch. `backbone` saves loading the same network twice.

    Raises:
        FeatstoreError: files changed, too many failures, an overflow, or results that do not match what is committed.
    """
    started = time.monotonic()
    summary = Summary(plan.name)
    if len(plan.todo) == 0:
        if not is_prepared(plan):
            prepare(plan)
        return summary
    sizes = plan.manifest.table.column("size").to_numpy()
    check_unchanged(plan.manifest, plan.todo[sizes[plan.todo] != MISSING])
    prepare(plan)
    device = choose_device(run.device)
    worker = _Worker(plan, run, device, backbone or load_backbone(plan, run, device))
    summary.device, summary.batch_size = device, worker.batch_size
    worker.guard()
    for group, arrays in worker.groups():
        worker.compute(group, arrays, summary, advance)
    summary.seconds = time.monotonic() - started
    _write_run(plan, run, summary)
    commits.sweep_attempts(plan.folder, older_than=commits.STALE_SECONDS)
    return summary


def load_backbone(plan: Plan, run: RunConfig, device: str) -> Backbone:
    """The plan's network on a device, in the set's compute dtype."""
    return plan.source.load(
        device=device, compute_dtype=plan.spec["identity"]["compute_dtype"], attention=run.attention
    )


class _Worker:
    """One process at work on one set."""

    def __init__(self, plan: Plan, run: RunConfig, device: str, backbone: Backbone):
        self.plan, self.run, self.device, self.backbone = plan, run, device, backbone
        self.ledger = ledger.read_ledger(plan.folder)
        self.rows_per_block = int(plan.spec["layout"]["block_rows"])
        self.row_index: Int64[np.ndarray, " N"] = ledger.read_rows(plan.folder, plan.manifest.short)
        size = plan.preprocess
        tokens = plan.source.architecture.num_tokens(size.height, size.width)
        self.batch_size = min(run.batch_size or default_batch_size(tokens, device), self.rows_per_block)
        self.counted: set[int] = set()
        self.workers = run.workers or int(records.machine()["cores"] or 1)

    def groups(self) -> list[tuple[str, list[ArraySpec]]]:
        """Array groups that hold something the plan asks for."""
        wanted = {array.name for array in self.plan.arrays}
        return [
            (name, arrays) for name, arrays in self.ledger.groups.items() if wanted & {item.name for item in arrays}
        ]

    def jobs(self, group: str) -> tuple[list[Job], dict[int, tuple[int, int]]]:
        """Batches of every block that is not committed, and the row range of each block."""
        done = commits.committed_blocks(self.plan.folder, group)
        if self.run.retry_failed:
            done -= {block for block in done if commits.read_commit(self.plan.folder, group, block).failed}
        position = {int(row): i for i, row in enumerate(self.row_index)}
        jobs, ranges = [], {}
        for block, start, stop in self.ledger.blocks(self.rows_per_block):
            # Rows that only an older manifest has are not here to be read any more.
            if block in done or not any(row in position for row in range(start, stop)):
                continue
            ranges[block] = (start, stop)
            for first in range(start, stop, self.batch_size):
                rows = range(first, min(first + self.batch_size, stop))
                jobs.append(Job(block, tuple(position.get(row, GONE) for row in rows)))
        return jobs, ranges

    def compute(
        self, group: str, arrays: list[ArraySpec], summary: Summary, advance: Callable[[int, int], None]
    ) -> None:
        """Extract and commit all missing blocks of one array group."""
        jobs, ranges = self.jobs(group)
        allowed = parse_share(self.run.max_failed) * len({row for job in jobs for row in job.rows} - {GONE})
        writer: BlockWriter | None = None
        with Loader(self.plan.manifest, self.plan.preprocess, jobs, workers=self.workers) as loader:
            try:
                for batch in loader:
                    if writer is None or writer.block != batch.job.block:
                        start, stop = ranges[batch.job.block]
                        writer = BlockWriter(
                            self.plan.folder, group, arrays, batch.job.block, start, stop, self.rows_per_block
                        )
                        writer.__enter__()
                    writer.append(self.embed(batch, arrays), batch.states)
                    self._count(batch, summary, allowed)
                    advance(len(batch.states), sum(state.reason is not None for state in batch.states))
                    if writer.done:
                        if self.run.retry_failed:  # only now that the new rows are there
                            commits.take_back(self.plan.folder, group, arrays, writer.block, self.rows_per_block)
                        writer.commit()
                        writer.__exit__()
                        writer = None
                        summary.blocks += 1
            finally:
                if writer is not None:
                    writer.__exit__()

    def _count(self, batch: Batch, summary: Summary, allowed: float) -> None:
        # An image counts once, however many array groups it is read for; a sample that left the data set does not.
        for row, state in zip(batch.job.rows, batch.states):
            if row == GONE or row in self.counted:
                continue
            self.counted.add(row)
            summary.computed += 1
            if state.reason is not None:
                summary.failed += 1
                summary.reasons[state.reason] = summary.reasons.get(state.reason, 0) + 1
        if summary.failed > allowed:
            raise FeatstoreError(
                f"{summary.failed} images could not be decoded, more than --max-failed {self.run.max_failed} allows; "
                f"the last reason: {list(summary.reasons)[-1]}; what is committed stays"
            )

    def embed(self, batch: Batch, arrays: list[ArraySpec]) -> dict[str, np.ndarray]:
        """Rows of every array for one batch; NaN where the image failed."""
        count = len(batch.states)
        failed = np.array([state.reason is not None for state in batch.states])
        if failed.all():
            return {array.name: _nan_rows(array, count) for array in arrays}
        pixels = torch.from_numpy(batch.pixels)
        if count < self.batch_size:  # one shape a run: kernels and rounding stay the same at the tail
            pixels = torch.cat([pixels, pixels.new_zeros((self.batch_size - count, *pixels.shape[1:]))])
        if self.device.startswith("cuda"):
            pixels = pixels.pin_memory()
        with torch.inference_mode():
            inputs = to_pixels(
                pixels,
                self.plan.preprocess,
                device=self.device,
                dtype=TORCH_DTYPES[self.plan.spec["identity"]["compute_dtype"]],
            )
            tokens = self.backbone(inputs, layers=self.plan.layers)
            rows = {array.name: _to_rows(pick(tokens, array.name)[:count], array) for array in arrays}
        for array in arrays:
            rows[array.name][failed] = _nan_rows(array, 1)[0]
        return rows

    def guard(self) -> None:
        """Recompute two committed rows before adding to a set: other weights, code or kernels must not slip in.

        Raises:
            ConfigError: they differ by more than rounding can explain.
        """
        for group, arrays in self.groups():
            blocks = sorted(commits.committed_blocks(self.plan.folder, group))
            position = {int(row): i for i, row in enumerate(self.row_index)}
            rows: list[int] = []
            for block in dict.fromkeys(blocks[:1] + blocks[-1:]):
                commit = commits.read_commit(self.plan.folder, group, block)
                good = [row for row in range(commit.start, commit.stop) if row not in commit.failed and row in position]
                rows += good[: 1 if len(blocks) > 1 else 2]
            if not rows:
                continue
            job = Job(-1, tuple(position[row] for row in rows))
            with Loader(self.plan.manifest, self.plan.preprocess, [job], workers=1) as loader:
                batch = next(iter(loader))
            if any(state.reason is not None for state in batch.states):
                continue  # the file was damaged since; check_unchanged speaks for the rows that matter
            fresh = self.embed(batch, arrays)
            for array in arrays:
                held = ShardedArray(self.plan.folder / "data.zarr" / array.name).gather(np.array(rows))
                difference = relative_difference(_as_float(held, array), _as_float(fresh[array.name], array))
                limit = PARITY[self.plan.spec["identity"]["compute_dtype"]]
                if not difference <= limit:
                    raise ConfigError(
                        f"{self.plan.name}: recomputing committed rows of {array.name} gives a relative difference of "
                        f"{difference:.2g}, more than {limit}; this machine or software would mix other numbers into "
                        "the set; use the device and versions that `featstore info` lists, or a new set (--name)"
                    )


def relative_difference(held: Float[np.ndarray, "..."], fresh: Float[np.ndarray, "..."]) -> float:
    """Largest over the rows of |held - fresh| / |held| in the 2-norm."""
    a, b = held.reshape(len(held), -1).astype(np.float64), fresh.reshape(len(fresh), -1).astype(np.float64)
    return float((np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(a, axis=1), 1e-12)).max())


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


def _nan_rows(array: ArraySpec, count: int) -> np.ndarray:
    return _to_rows(torch.full((count, *array.row_shape), float("nan")), array)


def _as_float(values: np.ndarray, array: ArraySpec) -> np.ndarray:
    if array.dtype == "bfloat16":
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _write_run(plan: Plan, run: RunConfig, summary: Summary) -> None:
    """How and where it was computed; never part of identity."""
    record: dict[str, Any] = {
        "time": records.utc_now(),
        "manifest": plan.manifest.short,
        "weights": plan.source.origin,
        "run": asdict(run),
        "summary": asdict(summary),
        "versions": records.versions(),
        "machine": records.machine(),
        "peak_memory_bytes": records.peak_memory_bytes(),
    }
    files.write_atomic(plan.folder / "runs" / f"{uuid.uuid4().hex}.json", files.sealed(record))
