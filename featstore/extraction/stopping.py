"""Ending a run on request: by Ctrl-C, by the signals of a scheduler, or because the time it was given is nearly up.

What is open is finished where that takes a few seconds, and dropped where it takes longer; nothing new is begun.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from featstore.errors import Stopped

GRACE = 5.0  # seconds for finishing what is open after a signal
SAME = 1.0  # seconds within which signals are one request: a terminal signals torchrun's children, and so does torchrun
REQUEUE = 75  # exit status: not done, run the same command again (EX_TEMPFAIL of sysexits.h)
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: REQUEUE}
AGAIN = "what is committed stays, the same command goes on from there"


class Stop:
    """Whether a run is to end, and how long what is open may take. `budget`: seconds from now for the whole run.

    `clock` counts seconds. `is_working` is set by the loop that looks here: elsewhere a signal ends the run at once.
    `has_kept`: something that stays was done, so that ending in what has to be done again is no standstill.
    """

    def __init__(
        self, budget: float | None = None, *, grace: float = GRACE, clock: Callable[[], float] = time.monotonic
    ):
        self.grace = grace
        self.reason = ""
        self.code = 0
        self.is_working = False
        self.has_kept = False
        self._clock = clock
        self._budget = budget
        self._end = None if budget is None else clock() + budget
        self._until = float("inf")
        self._signalled: float | None = None

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        if not self.reason and self._end is not None and self._clock() >= self._end:
            self.ask(f"the time budget of {self._budget:g} s is used up", REQUEUE)
        return bool(self.reason)

    def ask(self, reason: str, code: int, *, until: float = 0.0) -> None:
        """End the run; the first reason stands. What is open may take the grace, or until a time that is later."""
        if not self.reason:
            self.reason, self.code = reason, code
            self._until = max(until, self._clock() + self.grace)

    def signal(self, number: int) -> bool:
        """End the run because a signal came; True where that cannot wait: nothing is open, or it is the second one."""
        now, before = self._clock(), self._signalled
        self.ask(f"stopped by {signal.Signals(number).name}", SIGNALS[signal.Signals(number)])
        if before is None:
            self._signalled = now
            self._until = min(self._until, now + self.grace)
        return not self.is_working or (before is not None and now - before > SAME)

    def may_begin(self, seconds: float | None) -> bool:
        """Whether a block that takes so long (None: not known yet) may be begun."""
        if self.asked:
            return False
        if self._end is None or seconds is None or self._clock() + seconds <= self._end:
            return True
        self.ask(
            f"the next block takes about {seconds:.0f} s, and of the time budget of {self._budget:g} s "
            f"{self._end - self._clock():.0f} s are left",
            REQUEUE,
            until=self._end,
        )
        return False

    def may_finish(self, seconds: float | None) -> bool:
        """Once asked: whether what is open, and takes `seconds` more, may be finished."""
        return seconds is not None and self._clock() + seconds <= self._until


class Interrupt(KeyboardInterrupt):
    """Raised by the handlers: KeyboardInterrupt itself ends `python -m` by SIGINT if it passes through an `exec`."""


@contextmanager
def signals(stop: Stop) -> Iterator[Stop]:
    """Within it SIGINT, SIGTERM and SIGUSR1 ask `stop`; a second one, or no end within the grace, ends at once.

    Ending at once is a KeyboardInterrupt in here, and leaves here as `Stopped` with the exit status of the signal.
    Afterwards every signal does what it did before. One that was ignored stays so: a shell without job control starts
    what runs in its background that way. In other threads than the main one, which get no signals, nothing is changed.

    Raises:
        Stopped: a signal ended what ran in here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    watch = _Watch(stop)
    watch.install()
    try:
        yield stop
    except KeyboardInterrupt as error:
        if not stop.reason:
            raise
        raise Stopped(f"{stop.reason}; {AGAIN}", stop.code) from error
    finally:
        watch.remove()


class _Watch:
    """The handlers while they are in place, and a thread that sends a signal again when the grace is over.

    No alarm does that: there is one of them, and it may be somebody else's. The thread is there from the start, since
    the handler may have interrupted the start of another one, which holds a lock.
    """

    def __init__(self, stop: Stop):
        self._stop = stop
        self._before: dict[int, Any] = {}
        self._number: int | None = None
        self._came, self._over = threading.Event(), threading.Event()
        self._is_late = False
        self._is_over = False
        self._missed: list[int] = []
        self._thread = threading.Thread(target=self._wait, name="signals", daemon=True)

    def install(self) -> None:
        self._thread.start()
        for number in SIGNALS:
            # None: a handler that was not set from Python, and could not be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._handle)

    def remove(self) -> None:
        self._is_over = True
        self._over.set()
        self._came.set()
        self._thread.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for number in self._missed:
            signal.raise_signal(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_late:  # sent by the thread
            self._is_late = False
            if not self._is_over:
                raise Interrupt
            return
        if self._is_over:
            self._missed.append(number)
            return
        if self._stop.signal(number):
            raise Interrupt
        if self._number is None:
            self._number = number
            self._came.set()

    def _wait(self) -> None:
        self._came.wait()
        if not self._over.wait(self._stop.grace + 1):
            self._is_late = True
            signal.pthread_kill(threading.main_thread().ident or 0, self._number or 0)  # wakes it where it waits
