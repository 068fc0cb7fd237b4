"""One pass over images for one set or several: decoded once, through every network, written block by block.

Three stages run at once: threads decode, this thread keeps the device busy, another one fetches rows from it and writes
them. A pass is cut into units: the blocks of all its sets over the same rows, as long as the largest of these blocks.
Batches are cut at fixed positions inside a block, failed images keep their slot and the tail is padded, so the bytes
written do not depend on what was done before, by whom, or how often it was interrupted. (Out of memory a batch goes
through the network in pieces, whose rounding may differ: see `batching`.)
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from featstore.configs import RunConfig
from featstore.extraction.blocks import Tally, Writing, tally_of
from featstore.extraction.decoded_cache import Cache, CachedImages, pixels_of
from featstore.extraction.lane import Lane, Rows
from featstore.extraction.loader import Batch, Images, Job, open_loader
from featstore.extraction.overlap import overlapped
from featstore.extraction.stages import Stages
from featstore.extraction.stopping import Stop
from featstore.images import PreprocessSpec

BEHIND = 2  # batches whose rows wait to be written: the device goes on while a block is committed


@dataclass(slots=True)
class Unit:
    """Blocks that are done together, as (lane, block, array groups that lack it)."""

    number: int
    blocks: list[tuple[int, int, tuple[str, ...]]] = field(default_factory=list)


class Pass:
    """Sets of one data set that have the same rows, and what of them is to be done.

    `units` are those with anything to do when the pass was opened, by their number: first row over rows of a unit.
    `rows` are those of a unit, if not of the largest block. `caches` are the decoded images of every lane, where kept.
    """

    def __init__(self, lanes: Sequence[Lane], run: RunConfig, *, caches: Sequence[Cache] = (), rows: int | None = None):
        self.lanes = list(lanes)
        self.run = run
        self.rows = rows or max(lane.blocks.rows_per_block for lane in lanes)
        self.specs, self.kinds = _kinds(self.lanes)
        self.caches = [caches[self.kinds.index(kind)] for kind in range(len(self.specs))] if caches else []
        self.stages = Stages()
        self.notes: list[str] = []
        self._open: dict[int, int] = {}  # blocks of a unit that this process is to commit
        self.units: dict[int, Unit] = {}
        for number, lane in enumerate(self.lanes):
            for block, groups in lane.blocks.lacking().items():
                unit = lane.blocks.ranges[block][0] // self.rows
                self.units.setdefault(unit, Unit(unit)).blocks.append((number, block, groups))
        self.units = dict(sorted(self.units.items()))

    def tallies(self) -> list[Tally]:
        """For each lane what counts its images, and says when too many have failed.

        Raises:
            FeatstoreError: too many have by now.
        """
        doing: list[list[int]] = [[] for _ in self.lanes]
        for unit in self.units.values():
            for lane, block, _ in unit.blocks:
                doing[lane].append(block)
        return [tally_of(lane.blocks, own, self.run) for lane, own in zip(self.lanes, doing)]

    def left(self) -> list[int]:
        """Units that are not committed as a whole by now, whoever did the others."""
        if self.run.retry_failed:
            return list(self.units)
        done = [lane.blocks.committed() for lane in self.lanes]
        return [
            unit.number
            for unit in self.units.values()
            if any(block not in done[lane][group] for lane, block, groups in unit.blocks for group in groups)
        ]

    def jobs(self, number: int) -> list[Job]:
        """The batches of a unit that nobody has committed by now; the sets take turns as their images come up."""
        found: list[tuple[int, int, Job]] = []
        for lane, block, groups in self.units[number].blocks:
            blocks = self.lanes[lane].blocks
            still = blocks.still_lacking(block, groups)
            if not still:
                continue
            row = blocks.ranges[block][0]
            for job in blocks.cut(block, still, self.lanes[lane].batch_size, lane=lane, kind=self.kinds[lane]):
                row += len(job.rows)
                found.append((row, lane, job))
        self._open[number] = len({(lane, job.block) for _, lane, job in found})
        return [job for _, _, job in sorted(found, key=lambda item: item[:2])]

    def compute(
        self,
        work: Iterable[list[Job] | None],
        tallies: Sequence[Tally],
        *,
        stop: Stop | None = None,
        advance: Callable[[Batch], None] = lambda _: None,
        committed: Callable[[int], None] = lambda _: None,
        failed: Callable[[], None] = lambda: None,
    ) -> list[int]:
        """Extract and commit the batches given one unit after another; returns the blocks committed by each lane.

        `advance(batch)` and `committed(unit)` are called from the thread that writes; what they raise stops the run.
        `failed()` is called there when it ends by an error.
        """
        if self.lanes[0].device.startswith("cuda"):
            for lane in self.lanes:
                lane.trial()
        with self._images(work) as images:
            try:
                counts = self._run(images, tallies, stop or Stop(), advance, committed, failed)
            finally:
                self.notes += [note for note in images.notes if note not in self.notes]
        return counts

    def _run(
        self,
        images: Images,
        tallies: Sequence[Tally],
        stop: Stop,
        advance: Callable[[Batch], None],
        committed: Callable[[int], None],
        failed: Callable[[], None],
    ) -> list[int]:
        def ended(lane: int, block: int) -> None:
            unit = self.lanes[lane].blocks.ranges[block][0] // self.rows
            self._open[unit] -= 1
            if not self._open[unit]:
                committed(unit)

        def write(started: Iterator[tuple[Batch, Rows]]) -> list[int]:
            try:
                with ExitStack() as stack:
                    writings = [
                        stack.enter_context(
                            Writing(lane.blocks, stage=self.run.stage, committed=partial(ended, number))
                        )
                        for number, lane in enumerate(self.lanes)
                    ]
                    for batch, rows in started:
                        self._write(batch, rows, writings[batch.job.lane])
                        del rows
                        tallies[batch.job.lane].add(batch)
                        advance(batch)
                    self.notes += [note for writing in writings for note in writing.notes if note not in self.notes]
                    return [writing.count for writing in writings]
            except BaseException:
                failed()
                raise

        return overlapped(self._started(images, stop), write, ahead=BEHIND)

    def _write(self, batch: Batch, rows: Rows, writing: Writing) -> None:
        fetched = time.perf_counter()
        values = rows.wait()
        if self.lanes[0].device.startswith("cuda"):  # the device's own time is what its rows are waited for
            self.stages.device.add(time.perf_counter() - fetched, len(batch.states))
        with self.stages.write.busy(len(batch.states)):
            writing.add(batch, values)

    def _started(self, images: Images, stop: Stop) -> Iterator[tuple[Batch, Rows]]:
        """Batches that the device is at; once asked to stop only those of open blocks that can still be finished."""
        stop.is_working = True
        is_cuda = self.lanes[0].device.startswith("cuda")
        opened: dict[tuple[int, int], int] = {}  # (lane, block) -> images to come
        began, done = time.perf_counter(), 0
        waiting = iter(images)
        try:
            while True:
                asked = time.perf_counter()
                batch = next(waiting, None)
                self.stages.starved += time.perf_counter() - asked
                if batch is None:
                    return
                key = (batch.job.lane, batch.job.block)
                if stop.asked:
                    pace = (time.perf_counter() - began) / done if done else None
                    left = sum(opened.values())
                    if not left or not stop.may_finish(None if pace is None else pace * left):
                        return
                    if key not in opened:
                        continue
                if key not in opened:
                    start, stop_row = self.lanes[batch.job.lane].blocks.ranges[batch.job.block]
                    opened[key] = stop_row - start
                opened[key] -= len(batch.states)
                if not opened[key]:
                    del opened[key]
                lane = self.lanes[batch.job.lane]
                ran = time.perf_counter()
                rows = lane.start(batch, lane.arrays(batch.job.groups))
                if not is_cuda:
                    self.stages.device.add(time.perf_counter() - ran, len(batch.states))
                done += len(batch.states)
                handed = time.perf_counter()
                yield batch, rows
                del batch, rows
                self.stages.blocked += time.perf_counter() - handed
        finally:
            stop.is_working = False

    def _images(self, work: Iterable[list[Job] | None]) -> Images:
        """Batches: decoded, or out of the decoded caches where these hold them."""
        if self.caches:
            return CachedImages(self.caches, work)
        return open_loader(self.lanes[0].plan.manifest, self.specs, work, self.run, clock=self.stages.decode)


def _kinds(lanes: Sequence[Lane]) -> tuple[list[PreprocessSpec], list[int]]:
    """(the preprocessings that differ in their pixels, which of them each lane has)."""
    specs: list[PreprocessSpec] = []
    keys: list[dict[str, Any]] = []
    kinds = []
    for lane in lanes:
        key = pixels_of(lane.plan.preprocess)
        if key not in keys:
            keys.append(key)
            specs.append(lane.plan.preprocess)
        kinds.append(keys.index(key))
    return specs, kinds


def in_step(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Lanes that can go through images together: same rows, and blocks that lie within the blocks of the largest."""
    groups: list[list[Lane]] = []
    for lane in lanes:
        for group in groups:
            size = max(item.blocks.rows_per_block for item in (*group, lane))
            ranges = [item.blocks.ranges.values() for item in (*group, lane)]
            nested = all(start // size == (stop - 1) // size for found in ranges for start, stop in found)
            if nested and np.array_equal(group[0].row_index, lane.row_index):
                group.append(lane)
                break
        else:
            groups.append([lane])
    return groups
