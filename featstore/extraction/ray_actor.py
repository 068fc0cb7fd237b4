"""One of the processes of a Ray cluster that compute: it keeps its networks and is fed units of work while it runs.

It needs nothing of Ray but the cores of its machine: `ray_fleet` makes an actor of it. `open` and `run` are called once
and one after the other, `sync` all the time beside `run`. Errors that end the run are returned, not raised, so that
they keep class and message.
"""

import importlib
import os
import pickle
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from featstore import records
from featstore.configs import RunConfig
from featstore.errors import ConfigError, FeatstoreError, ManifestError, StoreError
from featstore.extraction.blocks import Tally
from featstore.extraction.creation import create_set, load_backbone
from featstore.extraction.decoded_cache import Cache, fill_cache
from featstore.extraction.device import facts_of
from featstore.extraction.lane import Lane
from featstore.extraction.loader import GONE, Batch, Job, check_files
from featstore.extraction.passes import Pass, in_step
from featstore.extraction.pipeline import choose_device
from featstore.extraction.plan import Plan
from featstore.extraction.ray_queue import Piece
from featstore.extraction.stopping import Stop
from featstore.objects import Place
from featstore.store.layout import network_of

MATTER = ("featstore", "python", "torch", "transformers", "numpy", "pillow")  # must be one version on all machines
VISIBLE_SECONDS = 10.0  # in which a shared file system shows a file that another machine wrote
LOOK_SECONDS = 0.5  # that a report is waited for when there is nothing new
SETTLE_SECONDS = 0.02  # in which more may be committed: tiny units come in one report


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What every actor is told: the plans and options, where the store is, and what the driver's machine has.

    `token` is a file that the driver wrote into the store; `world` is how many actors there are to be.
    """

    plans: list[Plan]
    run: RunConfig
    token: Place
    world: int
    versions: dict[str, str]


@dataclass(slots=True)
class Count:
    """Images of one set in one unit that an actor has done, and the blocks that it committed of it."""

    images: int = 0
    failed: int = 0
    blocks: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class SetFacts:
    """How an actor computes one set."""

    device: str
    batch_size: int
    how: dict[str, Any]
    notes: list[str]


@dataclass(slots=True)
class Opened:
    """What an actor found to do: for every pass its plans, a tally of each for the driver, and its units.

    Of each unit the blocks as (plan number, block, an array group that lacks it).
    """

    passes: list[tuple[list[int], list[Tally], dict[int, list[tuple[int, int, str]]]]]
    sets: dict[int, SetFacts]
    notes: dict[int, list[str]]


@dataclass(slots=True)
class Report:
    """What an actor did since its last report; `counts` are totals of the units that it is at, by plan number.

    The others are of all its time: for each plan the images that go through the network at once and what there is to
    say; for each stage seconds, images and workers; and how long the device waited for images and for writing.
    """

    committed: list[Piece]
    handed_back: list[Piece]
    counts: dict[Piece, dict[int, Count]]
    micro_batch: dict[int, int]
    notes: dict[int, list[str]]
    stages: dict[str, tuple[float, int, int]]
    waits: tuple[float, float]


class Actor:
    """The actor number `slot` on `cores` processor cores, or on a GPU with its share of its machine's cores.

    `path` is where the driver imports from: what is there too can be imported here.
    """

    def __init__(self, order: bytes, slot: int, cores: int, device: str, path: list[str]):
        self._order, self._path = order, path
        self._slot, self._cores, self._device = slot, cores, device
        self._passes: list[Pass] = []
        self._stop = Stop()
        self._ended = False
        self._given: deque[Piece] = deque()
        self._committed: list[Piece] = []
        self._counts: dict[Piece, dict[int, Count]] = {}
        self._touched: set[Piece] = set()
        self._closing: set[Piece] = set()
        self._over = False
        self._news = threading.Condition()

    def open(self) -> Opened | FeatstoreError:
        """Check this machine, open or make the sets and load their networks."""
        sys.path += [entry for entry in self._path if entry not in sys.path and os.path.exists(entry)]
        try:
            if self._device != "cpu":
                self._cores = cores_of_gpu()
            return self._open(pickle.loads(self._order))
        except FeatstoreError as error:
            return error
        finally:
            self._order = b""

    def _open(self, order: Order) -> Opened:
        check_machine(order)
        run = replace(
            order.run,
            engine="local",
            address=None,
            actors=None,
            workers=order.run.workers or self._cores,
            device=self._device,
        )
        device = choose_device(run.device)
        notes: dict[int, list[str]] = {}
        lanes: list[Lane] = []
        caches: dict[int, Cache] = {}
        for number, plan in enumerate(order.plans):
            if run.decoded_cache:  # its share; the last one to come finds it complete
                shared = replace(run, rank=self._slot % order.world, world=order.world)
                caches[number], notes[number] = fill_cache(plan, shared, stop=self._stop)
            if len(plan.todo) == 0:
                continue
            same = [lane.backbone for lane in lanes[-1:] if network_of(lane.plan.spec) == network_of(plan.spec)]
            made, backbone, lines = create_set(plan, run, device, same[0] if same else None, lambda _: None)
            notes[number] = lines + notes.get(number, [])
            lanes.append(Lane(made, run, device, backbone or load_backbone(made, run, device), number=number))
            lanes[-1].guard()
        for group in in_step(lanes):
            own = [caches[lane.number] for lane in group] if run.decoded_cache else []
            self._passes.append(Pass(group, run, caches=own))
        sets = {
            lane.number: SetFacts(lane.device, lane.batch_size, facts_of(lane.backbone), lane.notes()) for lane in lanes
        }
        return Opened([_contents(work) for work in self._passes], sets, notes)

    def run(self) -> FeatstoreError | None:
        """Compute what `sync` gives until that says that there is no more; what ended it, if that was an error."""
        try:
            while (number := self._next_pass()) is not None:
                work = self._passes[number]
                work.compute(
                    self._jobs(number),
                    [Tally(1.0, float("inf"), "100%") for _ in work.lanes],  # the driver counts for all
                    stop=self._stop,
                    advance=partial(self._advance, number),
                    committed=partial(self._commit_unit, number),
                    failed=self._end,
                )
        except FeatstoreError as error:
            return error
        finally:
            with self._news:
                self._over = True
                self._news.notify_all()
        return None

    def sync(self, given: list[Piece], wanted_back: list[Piece], ending: str | None) -> Report:
        """Take pieces and hand some back; say what happened since, as soon as something did.

        `ending`: `done` where no more is to come, else why the run ends before that; None: go on.
        """
        with self._news:
            back = [piece for piece in wanted_back if piece in self._given]
            for piece in back:
                self._given.remove(piece)
            self._given.extend(given)
            if ending is not None:
                self._ended = True
                if ending != "done":
                    self._given.clear()
                    self._stop.ask(ending, 1)
            self._news.notify_all()
            if not back:
                self._news.wait_for(lambda: bool(self._committed) or self._over, LOOK_SECONDS)
        time.sleep(SETTLE_SECONDS)
        with self._news:
            return self._report(back)

    def _report(self, back: list[Piece]) -> Report:
        committed, self._committed = self._committed, []
        counts = {
            piece: {
                number: replace(count, reasons=dict(count.reasons)) for number, count in self._counts[piece].items()
            }
            for piece in self._touched
        }
        self._touched.clear()
        for piece in committed:
            self._counts.pop(piece, None)
        lanes = [lane for work in self._passes for lane in work.lanes]
        stages: dict[str, tuple[float, int, int]] = {}
        for work in self._passes:
            for stage in (work.stages.decode, work.stages.device, work.stages.write):
                seconds, images, _ = stages.get(stage.name, (0.0, 0, 0))
                stages[stage.name] = (seconds + stage.seconds, images + stage.images, stage.workers)
        return Report(
            committed=committed,
            handed_back=back,
            counts=counts,
            micro_batch={lane.number: lane.pieces.size for lane in lanes},
            notes={lane.number: [*work.notes, *lane.notes()] for work in self._passes for lane in work.lanes},
            stages=stages,
            waits=(sum(work.stages.starved for work in self._passes), sum(w.stages.blocked for w in self._passes)),
        )

    def _next_pass(self) -> int | None:
        """The pass of the next piece, when there is one; None: the end."""
        with self._news:
            self._news.wait_for(lambda: bool(self._given) or self._ended)
            return self._given[0][0] if self._given and not self._stop.asked else None

    def _jobs(self, number: int) -> Iterator[list[Job] | None]:
        """The batches of the pieces given for one pass; None: give out what waits."""
        work = self._passes[number]
        flushed = False
        while not self._stop.asked:
            with self._news:
                if not self._given and flushed:
                    self._news.wait_for(lambda: bool(self._given) or self._ended, LOOK_SECONDS)
                if self._given and self._given[0][0] != number:
                    return
                piece = self._given.popleft() if self._given else None
                if piece is None and self._ended:
                    return
            flushed = piece is None
            if piece is None:
                yield None
                continue
            jobs = work.jobs(piece[1]) if piece[1] in work.units else []
            if not jobs:  # somebody else has committed it
                self._commit(piece)
                continue
            if not work.caches:
                rows = np.unique([row for job in jobs for row in job.rows if row != GONE]).astype(np.int64)
                check_files(work.lanes[0].plan.manifest, rows)
            yield jobs

    def _advance(self, number: int, batch: Batch) -> None:
        work = self._passes[number]
        lane = work.lanes[batch.job.lane]
        piece = (number, lane.blocks.ranges[batch.job.block][0] // work.rows)
        with self._news:
            count = self._counts.setdefault(piece, {}).setdefault(lane.number, Count())
            for row, state in zip(batch.job.rows, batch.states):
                if row == GONE:
                    continue
                count.images += 1
                if state.reason is not None:
                    count.failed += 1
                    count.reasons[state.reason] = count.reasons.get(state.reason, 0) + 1
            self._touched.add(piece)
        if piece in self._closing:
            self._closing.discard(piece)
            self._commit(piece)

    def _commit_unit(self, number: int, unit: int) -> None:
        self._closing.add((number, unit))  # said when its last batch is counted too, which comes next

    def _commit(self, piece: Piece) -> None:
        work = self._passes[piece[0]]
        with self._news:
            counts = self._counts.get(piece, {})
            for lane, _, _ in work.units[piece[1]].blocks if counts else ():
                number = work.lanes[lane].number
                if number in counts:
                    counts[number].blocks += 1
                    self._touched.add(piece)
            self._committed.append(piece)
            self._news.notify_all()

    def _end(self) -> None:
        """Whoever takes the batches has failed: wait for nothing any more."""
        with self._news:
            self._ended = True
            self._given.clear()
            self._news.notify_all()


def _contents(work: Pass) -> tuple[list[int], list[Tally], dict[int, list[tuple[int, int, str]]]]:
    numbers = [lane.number for lane in work.lanes]
    units = {
        unit.number: [(numbers[lane], block, groups[0]) for lane, block, groups in unit.blocks]
        for unit in work.units.values()
    }
    return numbers, work.tallies(), units


def check_machine(order: Order) -> None:
    """Whether this machine has the driver's versions, the store and the images.

    Raises:
        ConfigError: another version of something that the numbers depend on.
        StoreError: the store is not the driver's one.
        ManifestError: the images are not here.
    """
    host = socket.gethostname()
    own = records.versions()
    other = [name for name in MATTER if order.versions.get(name) != own.get(name)]
    if other:
        told = ", ".join(f"{name} {own.get(name, 'missing')} (driver: {order.versions.get(name)})" for name in other)
        raise ConfigError(
            f"the machines of a Ray run must have the driver's versions; {host} has {told}; install the same there, "
            "or give the cluster one image"
        )
    end = time.monotonic() + VISIBLE_SECONDS
    while not order.token.is_file():
        if time.monotonic() > end:
            raise StoreError(
                f"{order.token.parents[2]}: {host} sees another store here than the driver, so that what it computes "
                "would be lost; --engine ray needs a store that all machines share: a shared folder, or s3://"
            )
        time.sleep(0.2)
    for plan in order.plans:
        root = plan.manifest.root
        if len(plan.todo) and not root.exists():
            raise ManifestError(
                f"data set {plan.manifest.name!r}: {host} has no {root}, where the images are; --engine ray needs them "
                "at the same place on all machines"
            )


def cores_of_gpu() -> int:
    """Processor cores of the machine of this actor for each of its GPUs."""
    ray: Any = importlib.import_module("ray")
    own = ray.get_runtime_context().get_node_id()
    [resources] = [node["Resources"] for node in ray.nodes() if node["NodeID"] == own]
    return max(1, int(resources.get("CPU", 1) // max(1, resources.get("GPU", 1))))
