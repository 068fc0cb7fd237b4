"""Blocks of a set that are to be computed: which images they need, and their rows written and committed in order."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

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
from featstore.store.decisions import is_marked
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

    def lacking(self) -> dict[int, tuple[str, ...]]:
        """Blocks with rows of the manifest that are not committed yet, and the array groups that lack each of them.

        With `retry_failed` also those that hold failed images.
        """
        done = self.committed()
        found = {}
        for block, (start, stop) in self.ranges.items():
            groups = tuple(group for group in done if block not in done[group])
            # Rows that only an older manifest has are not here to be read any more.
            if groups and any(row in self.position for row in range(start, stop)):
                found[block] = groups
        return found

    def committed(self) -> dict[str, set[int]]:
        """Committed blocks of every array group."""
        done = {}
        for group in self.groups:
            done[group] = commits.committed_blocks(self.folder, group)
            if self.retry_failed:
                done[group] -= failed_blocks(self.folder, group, self.position.keys())
        return done

    def still_lacking(self, block: int, groups: tuple[str, ...]) -> tuple[str, ...]:
        """Those of some array groups of a block that nobody has committed by now."""
        if self.retry_failed:  # a marker says nothing about who tried again
            return groups
        return tuple(group for group in groups if not is_marked(self.folder, group, block))

    def cut(self, block: int, groups: tuple[str, ...], batch_size: int, *, lane: int = 0, kind: int = 0) -> list[Job]:
        """The batches of a block. Where they are cut depends on the block alone; one pass serves all array groups."""
        start, stop = self.ranges[block]
        return [
            Job(
                block,
                tuple(self.position.get(row, GONE) for row in range(first, min(first + batch_size, stop))),
                lane,
                kind,
                groups,
            )
            for first in range(start, stop, batch_size)
        ]


class Writing:
    """Blocks of one set on their way to the disk: rows are added batch by batch, a whole block is committed.

    A context: what is not whole when it is left is dropped. `committed` is called with each block that is committed by
    then; `count` are those, an array group each, that are what was written here and not by somebody else.
    """

    def __init__(
        self, blocks: Blocks, *, stage: Path | None = None, committed: Callable[[int], None] = lambda _: None
    ) -> None:
        self.blocks = blocks
        self.count = 0
        self.notes: dict[str, None] = {}  # what there is to say about how blocks were written, each once
        self._stage = stage
        self._committed = committed
        self._writers: list[BlockWriter] = []
        self._kept: list[Kept] = []
        self._first = 0

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, *_: object) -> None:
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.__exit__()

    def add(self, batch: Batch, rows: dict[str, np.ndarray]) -> None:
        """Write the next batch of a block, `rows` of every array of its groups; the last one commits it."""
        if not self._writers:
            self._begin(batch.job)
        for writer, before in zip(self._writers, self._kept):
            own = {array.name: rows[array.name] for array in writer.arrays}
            writer.append(*before.fill(self._first, batch.job.rows, own, batch.states))
        self._first += len(batch.states)
        if self._writers[0].done:
            for writer, before in zip(list(self._writers), self._kept):
                # What was tried again takes the place of what is committed, which stands until then.
                self.count += writer.commit(over=before.marker if self.blocks.retry_failed else None)
                self._writers.remove(writer)
                writer.__exit__()
                self.notes.update(dict.fromkeys(writer.notes))
            self._committed(batch.job.block)

    def _begin(self, job: Job) -> None:
        start, stop = self.blocks.ranges[job.block]
        size = self.blocks.rows_per_block
        made = [
            BlockWriter(
                self.blocks.folder, group, self.blocks.groups[group], job.block, start, stop, size, stage=self._stage
            )
            for group in job.groups
        ]
        self._kept = [read_kept(self.blocks.folder, item.group, item.arrays, item.block) for item in made]
        self._first = start
        for writer in made:
            writer.__enter__()
            self._writers.append(writer)


@dataclass(slots=True)
class Tally:
    """Images done so far. One counts once, however often it is read; a sample that left the data set does not.

    More failures than `share` of `total`, the images of the set, are too many, whoever meets them and when: `before`
    are those that were committed already, by their reasons. One process alone ends when there are so many, and
    `check_failures` counts those of all.
    """

    share: float
    total: float
    asked: str
    computed: int = 0
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    _counted: bytearray = field(default_factory=bytearray)  # a byte a row: a set of numbers takes a hundred

    def add(self, batch: Batch) -> None:
        """Count a batch.

        Raises:
            FeatstoreError: more images failed than `--max-failed` allows.
        """
        for row, state in zip(batch.job.rows, batch.states):
            if row == GONE:
                continue
            if row >= len(self._counted):
                self._counted.extend(bytes(max(row + 1, 2 * len(self._counted)) - len(self._counted)))
            if self._counted[row]:
                continue
            self._counted[row] = 1
            self.computed += 1
            if state.reason is not None:
                self.failed += 1
                self.reasons[state.reason] = self.reasons.get(state.reason, 0) + 1
        self.check()

    def check(self) -> None:
        """Raise `FeatstoreError` where more images have failed than `--max-failed` allows."""
        failed = self.failed + sum(self.before.values())
        if failed > self.share * self.total:
            raise FeatstoreError(
                f"{failed} images could not be decoded, more than --max-failed {self.asked} allows; "
                f"the last reason: {[*self.before, *self.reasons][-1]}; what is committed stays; allow more, or see "
                "to the cause and give --retry-failed"
            )


def tally_of(blocks: Blocks, doing: Iterable[int], run: RunConfig) -> Tally:
    """A tally for a pass over the blocks `doing` of a set, by one process or by several.

    Raises:
        FeatstoreError: what is committed of the other blocks holds more failures than `--max-failed` allows.
    """
    share = parse_share(run.max_failed)
    before = {} if share >= 1 else _failures(blocks, set(doing))
    found = Tally(share, float(len(blocks.position)), run.max_failed, before=before)
    found.check()
    return found


def check_failures(blocks: Blocks, own: Tally) -> None:
    """Judge a set by the markers of all its blocks, whoever wrote them; `own` is what this process did of it.

    Raises:
        FeatstoreError: more images failed in all than `--max-failed` allows.
    """
    if own.share < 1:  # else none can be too many
        Tally(own.share, own.total, own.asked, before=_failures(blocks, set())).check()


def _failures(blocks: Blocks, but: set[int]) -> dict[str, int]:
    """Failed images of the manifest that are committed, by reason, blocks `but` left out."""
    failed: dict[int, str] = {}
    for group in blocks.groups:
        numbers = commits.committed_blocks(blocks.folder, group) - but
        for _, commit in sorted(commits.read_commits(blocks.folder, group, numbers).items()):
            failed.update((row, why) for row, why in commit.failed.items() if row in blocks.position)
    return dict(Counter(failed.values()))


def progress_of(batch: Batch) -> tuple[int, int]:
    """(images, failed ones) of a batch."""
    here = [state for row, state in zip(batch.job.rows, batch.states) if row != GONE]
    return len(here), sum(state.reason is not None for state in here)
