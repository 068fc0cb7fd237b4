"""A pass over images that the processes of a team share: how far it is, and whether it is to end.

Looking images through, computing frozen features and measuring take minutes to hours on large data sets: each tells its
rate, and ends between two batches where it is asked to.
"""

import logging
import time

from featstore.errors import Stopped
from featstore.extraction.stopping import AGAIN, Stop
from probes.tuning_ranks import Team

SHOWN_SECONDS = 5.0  # between two lines

log = logging.getLogger(__name__)


class Rate:
    """Tells of a pass every few seconds: images done of all, images/s, time left."""

    def __init__(self, what: str, total: int, *, speaks: bool) -> None:
        self._what, self._total, self._speaks = what, total, speaks
        self._began = self._shown = time.monotonic()
        self._done = 0

    def add(self, images: int) -> None:
        """So many more are done."""
        self._done += images
        now = time.monotonic()
        if not self._speaks or now - self._shown < SHOWN_SECONDS:
            return
        self._shown = now
        rate = self._done / max(now - self._began, 1e-9)
        left = said_time(max(0, self._total - self._done) / max(rate, 1e-9))
        log.info("%s %d/%d, %.*f images/s, %s left", self._what, self._done, self._total, rate < 10, rate, left)


class Watch:
    """A pass that the processes of a team share; `what` begins its lines, `total` are the images of all of them.

    Every process makes the same number of calls of `step`. A context: within it a signal asks the pass to end, which is
    seen at the next step; elsewhere it ends the process at once.
    """

    def __init__(self, what: str, total: int, team: Team, stop: Stop | None = None) -> None:
        self._rate = Rate(what, total, speaks=team.writes)
        self._team, self._stop = team, stop
        self._was = False

    def __enter__(self) -> "Watch":
        if self._stop is not None:
            self._was, self._stop.is_working = self._stop.is_working, True
        return self

    def __exit__(self, *_: object) -> None:
        if self._stop is not None:
            self._stop.is_working = self._was

    def kept(self) -> None:
        """What was done since the last time stays, whatever comes."""
        if self._stop is not None:
            self._stop.has_kept = True

    def step(self, images: int, failed: int = 0) -> tuple[bool, int]:
        """Count what this process has done since the last step.

        Returns:
            Whether any process is asked to end, and the failed images of all of them in this step.
        """
        is_asked = self._stop is not None and self._stop.asked
        asked, done, bad = self._team.sum([float(is_asked), float(images), float(failed)])
        self._rate.add(int(done))
        return asked > 0, int(bad)


def check_asked(asked: bool, stop: Stop | None) -> None:
    """Raise `Stopped` where a process of the team was asked to end."""
    if asked:
        reason = stop.reason if stop is not None and stop.reason else "stopped on another process"
        raise Stopped(f"{reason}; {AGAIN}", 0 if stop is None else stop.code)


def said_time(seconds: float) -> str:
    """`40 s`, `4.5 min`, `3.1 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
