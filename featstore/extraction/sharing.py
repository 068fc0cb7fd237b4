"""The units of a pass that this process does, one after another, decided when there is room for the next.

First those of its own stripe, then, when that is done, what `division.take_over` says. Units are claimed while they are
being done, so that processes that know nothing of each other divide the work too.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from featstore.configs import RunConfig
from featstore.extraction.claims import CLAIMS, Claims
from featstore.extraction.distributed import ranks_of
from featstore.extraction.division import Claim, stripe, take_over
from featstore.extraction.loader import Job
from featstore.extraction.stopping import Stop
from featstore.objects import Place

FIRST_LOOK, LAST_LOOK = 0.05, 5.0  # seconds between two looks at what others are at: longer and longer
SHORTEST = 1.0  # seconds: work of less is not worth doing twice
TAKES = 128  # free units that are taken, if they can, after one look at all markers and claims


class Sharing:
    """Iterates over the batches of one unit after another; None: give out what waits, others are still at theirs.

    `left` gives the units that are not committed by now, `jobs` the batches of one (none: somebody has done it). A
    context, which gives the claims up; `committed(unit)` is to be called with every unit that is.
    """

    def __init__(
        self,
        folder: Place,
        units: Sequence[int],
        left: Callable[[], list[int]],
        jobs: Callable[[int], list[Job]],
        run: RunConfig,
        stop: Stop | None = None,
    ):
        self.units = list(units)
        self.ranks = ranks_of(run)
        self.claims = Claims(folder / CLAIMS, patience=run.patience)
        self.helped = 0  # units that somebody else was at, done once more
        self.taken_over = 0  # units of other stripes
        self._left, self._jobs = left, jobs
        self._run, self._stop = run, stop or Stop()
        self._started: dict[int, float] = {}
        self._ended = 0.0  # when the last unit of this process was committed
        self._seconds: list[float] = []
        self._broken = False

    def __enter__(self) -> "Sharing":
        self.claims.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._broken = True
        self.claims.__exit__()

    def committed(self, unit: int) -> None:
        """A unit of this process is on the disk."""
        now = time.monotonic()
        # Units overlap: one begins to be decoded while the one before is being computed.
        self._seconds.append(now - max(self._ended, self._started.get(unit, now)))
        self._ended = now
        self.claims.release(unit)

    def give_up(self) -> None:
        """Whoever takes the batches has ended: wait for nothing any more."""
        self._broken = True

    @property
    def pace(self) -> float | None:
        """Usual seconds of a unit, by those of this process; None before the first is committed."""
        return statistics.median(self._seconds) if self._seconds else None

    def __iter__(self) -> Iterator[list[Job] | None]:
        for unit in stripe(self.units, self.ranks.rank, self.ranks.world):
            if not self._stop.may_begin(self.pace):
                return
            # Who tries again asks nobody: a claim may be that of a run which did not.
            yield from self._do(unit, self.claims.is_free(unit) or self._run.retry_failed)
        if self._run.retry_failed:  # a marker does not say who tried again: every rank sees to its own
            return
        yield from self._take_over()

    def _do(self, unit: int, is_free: bool, *, helping: bool = False) -> Iterator[list[Job]]:
        """The batches of a unit, if it is to be done and the claim on it succeeds."""
        if not is_free or not self.claims.take(unit):
            return
        jobs = self._jobs(unit)
        if not jobs:
            self.claims.release(unit)
            return
        self._started[unit] = time.monotonic()
        self.helped += helping
        self.taken_over += unit % self.ranks.world != self.ranks.rank
        yield jobs

    def _take_over(self) -> Iterator[list[Job] | None]:
        pause, looks = FIRST_LOOK, 0
        left: list[int] = []
        claims: dict[int, list[Claim]] = {}
        while not self._broken and not self._stop.asked:
            if not looks:  # what was free at the last look mostly still is, and a claim on what is not fails
                left, claims = self._left(), self.claims.survey()
                if not self._run.take_over:
                    left = stripe(left, self.ranks.rank, self.ranks.world)
                looks = TAKES
            mine = self.claims.mine
            others = [unit for unit in left if unit not in mine]
            if not others:
                return  # the rest, if any, is this process's own, on its way to the disk
            decision = take_over(
                others,
                claims,
                owner=self.claims.owner,
                ranks=(self.ranks.rank, self.ranks.world),
                now=self.claims.now(),
                patience=self._run.patience,
                pace=None if self.pace is None else max(self.pace, SHORTEST),
            )
            if decision.what == "take":
                if not self._stop.may_begin(self.pace):
                    return
                yield from self._do(decision.piece, True, helping=decision.helping)
                left = [unit for unit in left if unit != decision.piece]
                is_free = decision.piece not in claims
                looks, pause = (looks - 1 if is_free and left else 0), FIRST_LOOK
                continue
            if looks == TAKES:  # that was a fresh look
                yield None
                time.sleep(pause)
                pause = min(LAST_LOOK, pause * 1.5)
            looks = 0
