"""One set in a pass over images: its network, and what becomes of a batch until its rows can be written."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from featstore.backbones.compiling import compilation_of
from featstore.backbones.pooling import pick
from featstore.backbones.tokens import Backbone
from featstore.configs import RunConfig
from featstore.errors import ConfigError, StoreError
from featstore.extraction.batching import Pieces, advised
from featstore.extraction.blocks import Blocks
from featstore.extraction.creation import TORCH_DTYPES, batch_size, forward_images, streams
from featstore.extraction.device import Landing, Transfers
from featstore.extraction.loader import Batch, Job, open_loader
from featstore.extraction.plan import Plan
from featstore.extraction.reduce import Reducer
from featstore.store import commits, reductions
from featstore.store.diff import as_tokens, parity_limit, parity_of, row_differences
from featstore.store.layout import ArraySpec
from featstore.store.reader import ShardedArray

FINITE = "finite:"  # before an array's name: which images have finite tokens, where its numbers cannot say so
TRIES = 16  # rows of a block that are looked at for one whose file is still good


class Lane:
    """One set, prepared on disk, and its network on a device; `number` is that of its plan."""

    def __init__(self, plan: Plan, run: RunConfig, device: str, backbone: Backbone, *, number: int = 0):
        self.number = number
        self.plan, self.run, self.device, self.backbone = plan, run, device, backbone
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

    def arrays(self, groups: tuple[str, ...]) -> list[ArraySpec]:
        """Arrays of some array groups."""
        return [array for group in groups for array in self.blocks.groups[group]]

    def trial(self) -> None:
        """One forward pass over nothing at the run's shape, so that what does not fit shows before the first image."""
        spec = self.plan.preprocess
        nothing = np.zeros(
            (self.batch_size, 1, spec.height, spec.width), np.uint8 if spec.quantise == "uint8" else "f4"
        )
        self._compute(nothing, list(self.plan.arrays)).wait()  # its rows must live as long as they are copied

    def notes(self) -> list[str]:
        """What there is to say about how the network ran."""
        failure = compilation_of(self.backbone).failure
        return self.pieces.notes + ([f"not compiled, the network ran as it is: {failure}"] if failure else [])

    def start(self, batch: Batch, arrays: list[ArraySpec]) -> "Rows":
        """Set the device to work on one batch; where an image failed its rows are NaN, or zero in integer arrays."""
        failed = np.array([state.reason is not None for state in batch.states])
        rows = [int(self.row_index[row]) for row in batch.job.rows]
        if failed.all():
            landing = Landing({array.name: _empty_rows(array, len(rows)) for array in arrays}, {})
        else:
            landing = self._compute(batch.pixels, arrays)
        return Rows(landing, self.empty, arrays, rows, failed)

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
            # Another process may be replacing one just now, which is then left out.
            held_commits = commits.read_commits(self.plan.folder, group, blocks[:1] + blocks[-1:])
            for commit in held_commits.values():
                good = [row for row in range(commit.start, commit.stop) if row not in commit.failed and row in position]
                # One row of each, or two of the only one; each stands before those that may take its place.
                candidates += [good] if len(held_commits) > 1 else [good[::2], good[1::2]]
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


@dataclass(frozen=True, slots=True)
class Rows:
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
