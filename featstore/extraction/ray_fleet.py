"""The actors of a Ray cluster as the driver sees them: started, fed, counted, replaced when they die, and let go."""

import contextlib
import pickle
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from featstore.errors import ConfigError, FeatstoreError
from featstore.extraction.blocks import Tally
from featstore.extraction.pipeline import Hooks, Summary
from featstore.extraction.ray_actor import Actor, Count, Opened, Order, Report, SetFacts
from featstore.extraction.ray_queue import Handout, Piece
from featstore.extraction.stages import Stages
from featstore.extraction.stopping import Stop
from featstore.store import commits

TICK = 0.2  # seconds between two looks at whether to end
GROW_SECONDS = 10.0  # between two looks at whether the cluster has grown
TELL_SECONDS = 20.0  # without any actor, after which that is said
DEATHS = 3  # of each actor's place in a row, with nothing committed in between
NOT_IMPORTED = "failed to import on the worker"  # of Ray's message about a class that it cannot load
FAREWELL = 10.0  # seconds that actors have to end by themselves when all is done


@dataclass(frozen=True, slots=True)
class Shape:
    """`count` actors, each with so many processor cores and GPUs."""

    device: str
    count: int
    cpus: int
    gpus: int


@dataclass(slots=True)
class Member:
    """One actor; `opening`, `running` and `syncing` are its calls that are under way."""

    slot: int
    handle: Any
    opening: Any = None
    running: Any = None
    syncing: Any = None
    heard: float = 0.0
    report: Report | None = None
    has_run: bool = False
    is_last: bool = False  # the sync under way was sent when it had run


@dataclass(slots=True)
class Total:
    """What all actors did of one set."""

    tally: Tally
    blocks: int = 0
    facts: SetFacts | None = None
    notes: dict[str, None] = field(default_factory=dict)
    micro_batch: int = 0


class Fleet:
    """As many actors as the cluster has room for, up to `most`; `order` is what each is told."""

    def __init__(self, ray: Any, order: Order, shape: Shape, hooks: Hooks, *, most: int):
        run = order.run
        self.plans, self.shape, self.run, self.hooks, self.most = order.plans, shape, run, hooks, most
        self.handout = Handout(patience=run.patience, double=run.take_over and not run.retry_failed)
        self.died = 0
        self._ray = ray
        self._order = ray.put(pickle.dumps(order))
        self._class = ray.remote(concurrency_groups={"control": 1})(Actor)
        self._members: dict[int, Member] = {}
        self._numbers = 0
        self._slots = 0
        self._deaths = 0  # since something was committed
        self._counts: dict[Piece, dict[int, Count]] = {}
        self._totals: dict[int, Total] = {}
        self._blocks: dict[Piece, list[tuple[int, int, str]]] = {}
        self._past: list[Report] = []  # the last ones of actors that are gone
        self._stop = hooks.stop or Stop()
        self._ending: str | None = None
        self._known = False
        self._began = self._grown = time.monotonic()
        self._told = False

    def work(self) -> None:
        """Until everything is committed or the run is asked to end.

        Raises:
            FeatstoreError: what any actor said, too many failed images, or actors that do nothing but die.
        """
        self._stop.is_working = True
        try:
            self._enlarge(self.shape.count)
            end = float("inf")
            while self._members and time.monotonic() < end:
                self._look()
                if self._ending is None:
                    self._tend()
                    self._ending = self._reason()
                    if self._ending is not None:
                        end = time.monotonic() + (FAREWELL if self._ending == "done" else self._stop.grace + 1)
        finally:
            self._stop.is_working = False

    def disband(self) -> None:
        """End every actor now; what they have not committed is dropped."""
        for number in list(self._members):
            self._let_go(number)

    def units(self) -> list[int]:
        """Numbers of all units of the run."""
        return sorted({unit for _, unit in self.handout.known})

    def summary(self, number: int, name: str) -> Summary:
        """What was done of one set."""
        total = self._totals.get(number)
        if total is None or total.facts is None:
            return Summary(name, notes=list(total.notes) if total else [])
        tally, facts = total.tally, total.facts
        summary = Summary(name, tally.computed, tally.failed, total.blocks, reasons=tally.reasons)
        summary.device, summary.batch_size, summary.micro_batch = facts.device, facts.batch_size, total.micro_batch
        summary.how = facts.how | {
            "engine": "ray",
            "actors": self._slots,
            "actors_died": self.died,
            "units_returned": self.handout.returned,
        }
        summary.stages = self.stages().facts()
        summary.helped = self.handout.doubled
        summary.notes = list(total.notes)
        return summary

    def stages(self) -> Stages:
        """Rates of all actors together."""
        found = Stages()
        living = [member.report for member in self._members.values() if member.report is not None]
        workers: dict[str, int] = defaultdict(int)
        for number, report in enumerate([*self._past, *living]):
            for stage in (found.decode, found.device, found.write):
                seconds, images, count = report.stages.get(stage.name, (0.0, 0, 0))
                stage.add(seconds, images)
                workers[stage.name] += count if number >= len(self._past) or not living else 0
            found.starved += report.waits[0]
            found.blocked += report.waits[1]
        for stage in (found.decode, found.device, found.write):
            stage.workers = max(1, workers[stage.name])
        return found

    def _reason(self) -> str | None:
        """Why to end, if so."""
        if self._known and self.handout.is_done:
            return "done"
        return self._stop.reason if self._stop.asked else None

    def _enlarge(self, count: int) -> None:
        while self._slots < count:
            self._start(self._slots)
            self._slots += 1

    def _start(self, slot: int) -> None:
        options: dict[str, Any] = {"num_cpus": self.shape.cpus, "num_gpus": self.shape.gpus, "max_restarts": 0}
        handle = self._class.options(**options).remote(
            self._order, slot, self.shape.cpus, self.shape.device, [path for path in sys.path if path]
        )
        self._members[self._numbers] = Member(slot, handle, opening=handle.open.remote())
        self._numbers += 1

    def _look(self) -> None:
        """Wait a little for calls that have come back and see to them."""
        calls = {}
        for number, member in self._members.items():
            for call in (member.opening, member.syncing, member.running):
                if call is not None:
                    calls[call] = number
        ready, _ = self._ray.wait(list(calls), num_returns=1, timeout=TICK)
        if ready:
            ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for call in ready:
            number = calls[call]
            if number in self._members:
                self._answer(number, self._members[number], call)

    def _answer(self, number: int, member: Member, call: Any) -> None:
        errors = self._ray.exceptions
        deaths = (
            errors.RayActorError,
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
        )
        try:
            value = self._ray.get(call)
        except deaths as error:
            if NOT_IMPORTED in str(error):
                raise ConfigError(
                    "featstore cannot be imported on a machine of the Ray cluster; install the version of this machine "
                    f"there: {error}"
                ) from error
            self._bury(number, error)
            return
        except errors.RuntimeEnvSetupError as error:
            raise ConfigError(f"the Ray cluster could not take over the code of this checkout: {error}") from error
        if isinstance(value, FeatstoreError):
            raise value
        member.heard = time.monotonic()
        if call is member.opening:
            member.opening = None
            self._open(number, member, value)
        elif call is member.running:
            member.running, member.has_run = None, True
        else:
            member.syncing = None
            self._count(number, member, value)
            if member.is_last:
                self._let_go(number)
            else:
                self._sync(number, member)

    def _open(self, number: int, member: Member, opened: Opened) -> None:
        for index, (plans, tallies, units) in enumerate(opened.passes):
            self.handout.add((index, unit) for unit in units)
            self._blocks = {(index, unit): blocks for unit, blocks in units.items()} | self._blocks
            for plan, tally in zip(plans, tallies):
                if plan not in self._totals:
                    self._totals[plan] = Total(tally)
        for plan, facts in opened.sets.items():
            total = self._totals[plan]
            total.facts = total.facts or facts
            total.notes.update(dict.fromkeys([*opened.notes.get(plan, []), *facts.notes]))
        self._known = True
        self.handout.join(number)
        member.running = member.handle.run.remote()
        self._sync(number, member)

    def _sync(self, number: int, member: Member) -> None:
        """Tell an actor what there is to do; it answers when something is done."""
        given: list[Piece] = []
        back: list[Piece] = []
        if self._ending is None and self._stop.may_begin(self.handout.usual):
            given = self.handout.next_for(number, time.monotonic())
            back = [] if given else self.handout.wanted_back(number)
        member.is_last = member.has_run
        control = member.handle.sync.options(concurrency_group="control")
        member.syncing = control.remote(given, back, self._ending)

    def _count(self, number: int, member: Member, report: Report) -> None:
        member.report = report
        self.handout.hear(number)
        for piece, counts in report.counts.items():
            self._see(piece, counts)
        self.handout.hand_back(number, report.handed_back)
        for piece in report.committed:
            if not self.handout.is_committed(piece):
                self._see(piece, self._read_counts(piece))
        new = self.handout.commit(number, report.committed, time.monotonic())
        for piece in new:
            self._deaths = 0
            for plan, count in self._counts.pop(piece, {}).items():
                self._totals[plan].blocks += count.blocks
        for plan, size in report.micro_batch.items():
            total = self._totals[plan]
            total.micro_batch = min(total.micro_batch or size, size)
            total.notes.update(dict.fromkeys(report.notes.get(plan, [])))

    def _see(self, piece: Piece, counts: dict[int, Count]) -> None:
        """Count what is done of a unit beyond what anybody had done of it before."""
        if self.handout.is_committed(piece):
            return
        seen = self._counts.setdefault(piece, {})
        images = failed = 0
        for plan, count in counts.items():
            before = seen.get(plan, Count())
            if count.images < before.images:
                continue
            seen[plan] = count
            tally = self._totals[plan].tally
            tally.computed += count.images - before.images
            tally.failed += count.failed - before.failed
            for reason in count.reasons.keys() | before.reasons.keys():
                more = count.reasons.get(reason, 0) - before.reasons.get(reason, 0)
                tally.reasons[reason] = tally.reasons.get(reason, 0) + more
            images += count.images - before.images
            failed += count.failed - before.failed
            tally.check()
        if images or failed:
            self.hooks.advance(images, failed)

    def _read_counts(self, piece: Piece) -> dict[int, Count]:
        """What the markers of a committed unit say of the sets that no actor has reported: it died before it could."""
        seen = self._counts.get(piece, {})
        found: dict[int, Count] = {}
        for plan, block, group in self._blocks.get(piece, ()):
            if plan in seen and seen[plan].blocks:
                continue
            commit = commits.read_commit(self.plans[plan].folder, group, block)
            count = found.setdefault(plan, Count())
            count.images += commit.stop - commit.start
            count.failed += len(commit.failed)
            count.blocks += 1
            for reason in commit.failed.values():
                count.reasons[reason] = count.reasons.get(reason, 0) + 1
        return found

    def _bury(self, number: int, error: Exception) -> None:
        """An actor is dead: its units go back, and another one takes its place."""
        member = self._members[number]
        self.died += 1
        self._deaths += 1
        self.handout.lose(number)
        self._let_go(number)
        if self._ending is not None:
            return
        if self._deaths > DEATHS * max(2, self._slots):
            raise FeatstoreError(
                f"{self._deaths} Ray actors died one after another with nothing committed in between; the last one: "
                f"{str(error).strip().splitlines()[0]}; if they ran out of memory give them more or lower "
                "--tokens-per-batch; --worker-type process survives a decoder that crashes"
            )
        self._start(member.slot)

    def _let_go(self, number: int) -> None:
        member = self._members.pop(number)
        if member.report is not None:
            self._past.append(member.report)
        with contextlib.suppress(Exception):  # it is gone already
            self._ray.kill(member.handle)

    def _tend(self) -> None:
        """See who is silent, whether the cluster has grown, and whether there is anybody at all."""
        now = time.monotonic()
        for number, member in self._members.items():
            if member.syncing is not None and now - member.heard > self.run.patience:
                self.handout.silence(number)
        if self.run.actors is None and now - self._grown > GROW_SECONDS:
            self._grown = now
            resources = self._ray.cluster_resources()
            room = resources.get("GPU", 0) if self.shape.gpus else resources.get("CPU", 0) // self.shape.cpus
            self._enlarge(min(int(room), self.most))
        if not self._known and not self._told and now - self._began > TELL_SECONDS:
            self._told = True
            wants = "a GPU" if self.shape.gpus else f"{self.shape.cpus} processor cores"
            self.hooks.say(f"no Ray actor is ready yet: each waits for {wants}, or is loading its network")
