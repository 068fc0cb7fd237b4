"""A job on many GPUs with a virtual clock: blocks that take their time, ranks that fail and come back.

Until the first rank is done with its stripe nothing depends on the policy, so that part is sums of arrays; from there
on an event queue runs. What a rank takes is what `featstore.extraction.division.take_over` says: it is computed here
from counters that are kept up to date, because that function looks at everything left (a test compares the two).
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from featstore.extraction.division import HELPERS, SLOW, far_end

DAY = 86400.0
ALWAYS = -1  # epoch of events that nothing makes void
Kind = Literal["free", "silent", "help"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """GPUs and what goes wrong with them. Times in seconds."""

    gpus: int
    slow_share: float = 0.01
    slow_factor: float = 5.0
    slow_of: Literal["block", "rank"] = "block"  # slow whoever computes it, or only for the rank that drew it
    failures_per_day: float = 1.0
    restart: float = 120.0
    patience: float = 120.0
    poll: float = 5.0
    survey: float = 0.01  # of looking at everything, and per block
    survey_block: float = 20e-6
    attempt: float = 0.01  # of one claim, won or lost
    machine: int = 8  # ranks that see each other's death at once


@dataclass(frozen=True, slots=True)
class Strategy:
    """Stripes alone; with take-over; or a central queue that costs nothing and knows of every death at once."""

    what: Literal["stripes", "take-over", "central"] = "take-over"
    helping: bool = True
    tries: int = 128  # pieces that are tried from one survey
    spread: bool = True
    notice: float | None = None  # seconds until a rank sees that somebody else committed its block


class Draws:
    """The chance of one run, the same for every strategy: times of the blocks, and when ranks fail."""

    def __init__(self, cluster: Cluster, blocks: int, seconds: float, spread: np.ndarray, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.seconds, self.rng, self.cluster = seconds, np.random.default_rng((seed, 1)), cluster
        self.usual = seconds * rng.choice(spread, blocks)
        self.first = np.where(rng.random(blocks) < cluster.slow_share, cluster.slow_factor, 1.0) * self.usual
        mean = DAY / cluster.failures_per_day if cluster.failures_per_day else np.inf
        expected = self.first.sum() / cluster.gpus / mean
        shape = (cluster.gpus, 20 + int(expected + 10 * np.sqrt(expected)))
        self.gaps = rng.exponential(1.0, shape) * mean
        self.work = float(self.first.sum())

    def again(self, piece: int) -> float:
        """Time of a block that is computed once more."""
        if self.cluster.slow_of == "block":
            return float(self.first[piece])
        slow = self.rng.random() < self.cluster.slow_share
        return float(self.usual[piece]) * (self.cluster.slow_factor if slow else 1.0)

    def gap(self, rank: int, number: int) -> float:
        """Seconds from a start of a rank to its next failure."""
        row = self.gaps[rank]
        return float(row[number % len(row)])


@dataclass(slots=True)
class Stripe:
    """One rank left to itself: when its blocks are committed, and `falls` = (when, block, up again, its new time)."""

    pieces: np.ndarray
    ends: np.ndarray
    falls: list[tuple[float, int, float, float]]


def alone(draws: Draws, rank: int) -> Stripe:
    """A rank that computes its stripe from 0 on and begins a block anew after each failure."""
    cluster = draws.cluster
    pieces = np.arange(rank, len(draws.first), cluster.gpus)
    ends, falls = np.cumsum(draws.first[pieces]), []
    when = draws.gap(rank, 0)
    while len(ends) and when < ends[-1]:
        block = int(np.searchsorted(ends, when, side="right"))
        up, duration = when + cluster.restart, draws.again(int(pieces[block]))
        ends[block:] += up + duration - ends[block]
        falls.append((when, block, up, duration))
        when = up + draws.gap(rank, len(falls))
    return Stripe(pieces, ends, falls)


@dataclass(slots=True)
class Attempt:
    rank: int
    since: float
    dead: float | None = None

    def is_over(self, rank: int, now: float, cluster: Cluster) -> bool:
        near = self.rank // cluster.machine == rank // cluster.machine
        return self.dead is not None and (near or now - self.dead > cluster.patience)


@dataclass(slots=True)
class Outcome:
    """Seconds until the last commit, until the last rank is free, and GPU-seconds of blocks that did not count."""

    makespan: float
    last_exit: float
    wasted: float
    taken: int = 0
    helped: int = 0
    doubled: int = 0  # blocks that were computed to the end twice

    def efficiency(self, draws: Draws, start_up: float = 0.0) -> float:
        return draws.work / draws.cluster.gpus / (self.makespan + start_up)


def run_stripes(draws: Draws) -> Outcome:
    """Every rank its stripe, whatever the others do."""
    last = max(float(found.ends[-1]) for found in _stripes(draws) if len(found.ends))
    return Outcome(last, last, 0.0)


def _stripes(draws: Draws) -> list[Stripe]:
    return [alone(draws, rank) for rank in range(draws.cluster.gpus)]


@dataclass(slots=True)
class _Rank:
    at: int = -1
    since: float = 0.0
    until: float = 0.0
    alive: bool = True
    falls: int = 0
    epoch: int = 0  # events of an earlier one are void
    fallen: list[int] = field(default_factory=list)  # blocks of its stripe that it died at
    plan: list[tuple[int, Kind]] = field(default_factory=list)
    idle: bool = False


class Job:
    """One run of one strategy from the moment at which the first rank is done with its stripe."""

    def __init__(self, draws: Draws, strategy: Strategy) -> None:
        self.draws, self.strategy, self.cluster = draws, strategy, draws.cluster
        world = self.cluster.gpus
        self.events: list[tuple[float, int, str, int, int]] = []
        self.serial = 0
        self.ranks = [_Rank() for _ in range(world)]
        self.free: list[deque[int]] = [deque() for _ in range(world)]
        self.is_free: set[int] = set()
        self.held: dict[int, list[Attempt]] = {}  # blocks that somebody began and nobody committed, oldest first
        self.dead: set[int] = set()  # those of them where somebody died
        self.drawn: set[int] = set()
        self.left = 0
        self.outcome = Outcome(0.0, 0.0, 0.0)
        self._begin()

    def run(self) -> Outcome:
        """Until everything is committed."""
        handlers = {"end": self._end, "fail": self._fail, "up": self._up, "look": self._look, "act": self._act}
        handlers["notice"] = self._notice
        now = self.start
        while self.left:
            now, _, kind, rank, epoch = heapq.heappop(self.events)
            if epoch in (ALWAYS, self.ranks[rank].epoch):
                handlers[kind](rank, now)
        self.outcome.makespan = self.outcome.last_exit = now
        for state in self.ranks:  # who is still at a block that somebody else committed
            if state.alive and state.at >= 0:
                until = state.until if self.strategy.notice is None else min(state.until, now + self.strategy.notice)
                self.outcome.last_exit = max(self.outcome.last_exit, until)
                self.outcome.wasted += until - state.since
        return self.outcome

    def candidates(self, rank: int, now: float, most: int) -> list[tuple[int, Kind]]:
        """What `take_over` tells this rank, and what it would tell next if that were taken by somebody else."""
        if self.is_free:
            return [(piece, "free") for piece in self._free_ones(rank, most)]
        silent = sorted(
            piece for piece in self.dead if all(held.is_over(rank, now, self.cluster) for held in self.held[piece])
        )
        if silent:
            return [(silent[rank % len(silent)], "silent")]
        best: tuple[float, int] | None = None
        for piece, attempts in self.held.items():
            if now - attempts[0].since <= SLOW * self.draws.seconds or not self.strategy.helping:
                break  # the rest began later
            if len(attempts) >= HELPERS and piece not in self.dead:
                continue
            alive = [held.since for held in attempts if not held.is_over(rank, now, self.cluster)]
            if alive and len(alive) < HELPERS and now - min(alive) > SLOW * self.draws.seconds:
                best = min(best or (min(alive), piece), (min(alive), piece))
                if attempts[0].dead is None:
                    break
        return [] if best is None else [(best[1], "help")]

    def _free_ones(self, rank: int, most: int) -> list[int]:
        world, found = len(self.ranks), []
        copies: dict[int, list[int]] = {}
        order = [(-len(pieces), (stripe - rank) % world) for stripe, pieces in enumerate(self.free) if pieces]
        heapq.heapify(order)
        while order and len(found) < most:
            count, near = order[0]
            chosen = (near + rank) % world
            copy = copies.setdefault(chosen, list(self.free[chosen]) if chosen not in copies else [])
            found.append(copy.pop(far_end(len(copy), rank) if self.strategy.spread else -1))
            if count == -1:
                heapq.heappop(order)
            else:
                heapq.heapreplace(order, (count + 1, near))
        return found

    def _begin(self) -> None:
        stripes = _stripes(self.draws)
        self.start = start = min(float(found.ends[-1]) if len(found.ends) else 0.0 for found in stripes)
        for rank, found in enumerate(stripes):
            state = self.ranks[rank]
            done = int(np.searchsorted(found.ends, start, side="right"))
            rest = [int(piece) for piece in found.pieces[done:]]
            self.left += len(rest)
            falls = [fall for fall in found.falls if fall[0] <= start]
            state.falls = len(falls)
            up = falls[-1][2] if falls else 0.0
            if up > start:  # it is down; it was at a block when it fell
                state.alive, piece = False, rest.pop(0)
                self.held[piece] = [Attempt(rank, falls[-1][0], falls[-1][0])]
                self.dead.add(piece)
                self.drawn.add(piece)
                state.fallen.append(piece)
                self._push(up, "up", rank)
            else:
                self._push(up + self.draws.gap(rank, len(falls)), "fail", rank, epoch=ALWAYS)
                if rest:
                    piece = rest.pop(0)
                    began = max(float(found.ends[done - 1]) if done else 0.0, up)
                    redone = bool(falls) and falls[-1][1] == done
                    self._start(rank, piece, began, falls[-1][3] if redone else float(self.draws.first[piece]))
                else:
                    self._push(start, "look", rank)
            self.free[rank].extend(rest)
            self.is_free.update(rest)
        self.held = dict(sorted(self.held.items(), key=lambda item: item[1][0].since))
        if self.strategy.what == "central":
            for piece in list(self.dead):
                self._return(piece, start)

    def _push(self, when: float, kind: str, rank: int, epoch: int | None = None) -> None:
        self.serial += 1
        state = self.ranks[rank]
        heapq.heappush(self.events, (when, self.serial, kind, rank, state.epoch if epoch is None else epoch))

    def _start(self, rank: int, piece: int, now: float, duration: float | None = None) -> None:
        if duration is None:
            duration = self.draws.again(piece) if piece in self.drawn else float(self.draws.first[piece])
        self.drawn.add(piece)
        if piece in self.is_free:
            self.is_free.remove(piece)
            self.free[piece % len(self.ranks)].remove(piece)
        state = self.ranks[rank]
        state.epoch += 1
        state.at, state.since, state.until, state.idle = piece, now, now + duration, False
        self.held.setdefault(piece, []).append(Attempt(rank, now))
        self._push(state.until, "end", rank)

    def _end(self, rank: int, now: float) -> None:
        state = self.ranks[rank]
        piece, state.at = state.at, -1
        if piece not in self.held:  # somebody was faster
            self.outcome.wasted += now - state.since
            self.outcome.doubled += 1
        else:
            attempts = self.held.pop(piece)
            self.dead.discard(piece)
            self.left -= 1
            if self.strategy.notice is not None:
                for held in attempts:
                    if held.rank != rank and self.ranks[held.rank].at == piece:
                        self._push(now + self.strategy.notice, "notice", held.rank)
        self._next(rank, now)

    def _notice(self, rank: int, now: float) -> None:
        state = self.ranks[rank]
        self.outcome.wasted += now - state.since
        state.at = -1
        state.epoch += 1
        self._next(rank, now)

    def _next(self, rank: int, now: float) -> None:
        """What it died at, then its own stripe in ascending order; then what was planned, or another look."""
        state = self.ranks[rank]
        while state.fallen:
            piece = state.fallen.pop()
            attempts = self.held.get(piece, ())
            if attempts and all(held.is_over(rank, now, self.cluster) for held in attempts):
                self._start(rank, piece, now)
                return
        if self.free[rank]:
            self._start(rank, self.free[rank][0], now)
        elif state.plan:
            self._act(rank, now)
        else:
            self._look(rank, now)

    def _look(self, rank: int, now: float) -> None:
        state = self.ranks[rank]
        state.epoch += 1
        if self.strategy.what == "central":
            stripe = max(range(len(self.free)), key=[len(pieces) for pieces in self.free].__getitem__)
            state.idle = not self.free[stripe]
            if not state.idle:
                self._start(rank, self.free[stripe][0], now)
            return
        state.plan = self.candidates(rank, now, self.strategy.tries)
        seen = now + self.cluster.survey + self.cluster.survey_block * len(self.draws.first)
        self._push(seen if state.plan else seen + self.cluster.poll, "act" if state.plan else "look", rank)

    def _act(self, rank: int, now: float) -> None:
        """Claim the first of the planned blocks that can still be had."""
        state = self.ranks[rank]
        while state.plan:
            piece, kind = state.plan.pop(0)
            now += self.cluster.attempt
            if not self._can_be_had(rank, piece, kind, now):
                continue
            self.outcome.taken += 1
            self.outcome.helped += kind == "help"
            self._start(rank, piece, now)
            return
        state.epoch += 1
        self._push(now, "look", rank)

    def _can_be_had(self, rank: int, piece: int, kind: Kind, now: float) -> bool:
        if kind == "free":
            return piece in self.is_free
        attempts = self.held.get(piece)
        alive = [held for held in attempts or () if not held.is_over(rank, now, self.cluster)]
        return attempts is not None and len(alive) < (HELPERS if kind == "help" else 1)

    def _fail(self, rank: int, now: float) -> None:
        state = self.ranks[rank]
        piece, state.at, state.alive, state.plan, state.idle = state.at, -1, False, [], False
        state.epoch += 1
        state.falls += 1
        if piece >= 0:
            self.outcome.wasted += max(0.0, now - state.since)
        if piece in self.held:
            if self.strategy.what == "central":
                self._return(piece, now)
            else:
                next(held for held in self.held[piece] if held.rank == rank and held.dead is None).dead = now
                self.dead.add(piece)
                if piece % len(self.ranks) == rank:
                    state.fallen.append(piece)
        self._push(now + self.cluster.restart, "up", rank)

    def _return(self, piece: int, now: float) -> None:
        """To the central queue; whoever has nothing to do takes it at once."""
        stripe = piece % len(self.ranks)
        del self.held[piece]
        self.dead.discard(piece)
        self.free[stripe].appendleft(piece)
        self.is_free.add(piece)
        for rank, state in enumerate(self.ranks):
            if state.idle and state.alive:
                self._start(rank, piece, now)
                return

    def _up(self, rank: int, now: float) -> None:
        state = self.ranks[rank]
        state.alive = True
        self._push(now + self.draws.gap(rank, state.falls), "fail", rank, epoch=ALWAYS)
        self._next(rank, now)
