"""Blocks of a set that are to be computed: which images they need, and their rows written and committed in order."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from featstore.configs import RunConfig, parse_share
from featstore.datasets.manifest import Manifest
from featstore.errors import FeatstoreError
from featstore.extraction.kept import Kept, read_kept
from featstore.extraction.loader import GONE, Batch, Job
from featstore.extraction.plan import failed_blocks
from featstore.objects import Place
from featstore.store import commits, ledger
from featstore.store.commits import BlockWriter
from featstore.store.layout import ArraySpec, read_spec


class Blocks:
    """The blocks of a set that is prepared for `manifest`, for the array groups that hold something of `wanted`."""

    def __init__(self, folder: Place, manifest: Manifest, wanted: Iterable[str], *, retry_failed: bool):
        self.folder = folder
        self.retry_failed = retry_failed
        self.rows_per_block = int(read_spec(folder)["layout"]["block_rows"])
        book = ledger.read_ledger(folder)
        names = set(wanted)
        self.groups: dict[str, list[ArraySpec]] = {
            group: arrays for group, arrays in book.groups.items() if names & {array.name for array in arrays}
        }
        self.row_index: Int64[np.ndarray, " N"] = ledger.read_rows(folder, manifest.short)
        self.position = {int(row): i for i, row in enumerate(self.row_index)}
        self.ranges = {block: (start, stop) for block, start, stop in book.blocks(self.rows_per_block)}

    def jobs(self, batch_size: int, *, only: set[int] | None = None) -> dict[tuple[str, ...], list[Job]]:
        """Batches of every block (or of those in `only`) not committed yet, by the array groups that lack the block.

        One pass over the images serves all groups that lack them. Where batches are cut depends on the block alone.
        """
        done = {}
        for group in self.groups:
            done[group] = commits.committed_blocks(self.folder, group)
            if self.retry_failed:
                done[group] -= failed_blocks(self.folder, group, self.position.keys())
        jobs: dict[tuple[str, ...], list[Job]] = {}
        for block, (start, stop) in self.ranges.items():
            lacking = tuple(group for group in done if block not in done[group])
            # Rows that only an older manifest has are not here to be read any more.
            here = any(row in self.position for row in range(start, stop))
            if not lacking or not here or (only is not None and block not in only):
                continue
            for first in range(start, stop, batch_size):
                rows = range(first, min(first + batch_size, stop))
                jobs.setdefault(lacking, []).append(Job(block, tuple(self.position.get(row, GONE) for row in rows)))
        return jobs

    def write(
        self,
        groups: tuple[str, ...],
        batches: Iterable[Batch],
        rows_of: Callable[[Batch, list[ArraySpec]], dict[str, np.ndarray]],
        after: Callable[[Batch], None],
    ) -> int:
        """Commit the blocks that `batches` make up, for some groups; returns their number.

        `rows_of` gives the rows of every array for a batch; `after` is called when they are written.
        """
        arrays = [array for group in groups for array in self.groups[group]]
        writers: list[BlockWriter] = []
        kept: list[Kept] = []
        first = committed = 0
        try:
            for batch in batches:
                if not writers:
                    writers = [self._writer(group, batch.job.block) for group in groups]
                    kept = [read_kept(self.folder, item.group, item.arrays, item.block) for item in writers]
                    first = writers[0].start
                    for writer in writers:
                        writer.__enter__()
                rows = rows_of(batch, arrays)
                for writer, before in zip(writers, kept):
                    own = {array.name: rows[array.name] for array in writer.arrays}
                    writer.append(*before.fill(first, batch.job.rows, own, batch.states))
                first += len(batch.states)
                after(batch)
                while writers and writers[0].done:
                    self._commit(writers[0])
                    writers.pop(0).__exit__()
                    committed += 1
        finally:
            for writer in writers:
                writer.__exit__()
        return committed

    def _writer(self, group: str, block: int) -> BlockWriter:
        start, stop = self.ranges[block]
        return BlockWriter(self.folder, group, self.groups[group], block, start, stop, self.rows_per_block)

    def _commit(self, writer: BlockWriter) -> None:
        if self.retry_failed:  # only now that the new rows are there
            commits.take_back(self.folder, writer.group, writer.arrays, writer.block, self.rows_per_block)
        writer.commit()


@dataclass(slots=True)
class Tally:
    """Images done so far. One counts once, however often it is read; a sample that left the data set does not.

    `allowed` failures of all are too many for `--max-failed`.
    """

    allowed: float
    asked: str
    computed: int = 0
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    _counted: set[int] = field(default_factory=set)

    def add(self, batch: Batch) -> None:
        """Count a batch.

        Raises:
            FeatstoreError: more images failed than `--max-failed` allows.
        """
        for row, state in zip(batch.job.rows, batch.states):
            if row == GONE or row in self._counted:
                continue
            self._counted.add(row)
            self.computed += 1
            if state.reason is not None:
                self.failed += 1
                self.reasons[state.reason] = self.reasons.get(state.reason, 0) + 1
        if self.failed > self.allowed:
            raise FeatstoreError(
                f"{self.failed} images could not be decoded, more than --max-failed {self.asked} allows; "
                f"the last reason: {list(self.reasons)[-1]}; what is committed stays"
            )


def tally_of(jobs: Iterable[Job], run: RunConfig) -> Tally:
    """A tally for all images of some jobs."""
    images = {row for job in jobs for row in job.rows} - {GONE}
    return Tally(parse_share(run.max_failed) * len(images), run.max_failed)


def progress_of(batch: Batch) -> tuple[int, int]:
    """(images, failed ones) of a batch."""
    here = [state for row, state in zip(batch.job.rows, batch.states) if row != GONE]
    return len(here), sum(state.reason is not None for state in here)
