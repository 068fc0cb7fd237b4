"""Ending a run on request: what is begun and finished by an injected clock, and real signals to real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from featstore.errors import Stopped
from featstore.extraction.stopping import REQUEUE, SIGNALS, Stop, signals

ROOT = Path(__file__).resolve().parent.parent


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


# --- decisions


def test_nothing_asks_to_stop_by_itself() -> None:
    stop = Stop(clock=Clock())
    assert not stop.asked
    assert stop.may_begin(None)
    assert stop.may_begin(1e9)
    assert (stop.reason, stop.code) == ("", 0)


def test_a_block_that_does_not_fit_the_budget_is_not_begun() -> None:
    clock = Clock()
    stop = Stop(60.0, clock=clock)
    assert stop.may_begin(60.0)
    clock.now += 50
    assert stop.may_begin(10.0)
    assert stop.may_begin(None)
    assert not stop.may_begin(10.5)
    assert stop.asked
    assert stop.code == REQUEUE == 75
    assert stop.reason == "the next block takes about 10 s, and of the time budget of 60 s 10 s are left"
    assert not stop.may_begin(0.1), "once asked it stays so"


def test_a_budget_that_is_used_up_asks() -> None:
    clock = Clock()
    stop = Stop(60.0, clock=clock)
    clock.now += 60
    assert stop.asked
    assert (stop.reason, stop.code) == ("the time budget of 60 s is used up", 75)


def test_what_is_open_is_finished_within_the_grace() -> None:
    clock = Clock()
    stop = Stop(grace=5.0, clock=clock)
    stop.ask("why", 1)
    stop.ask("another reason", 2)
    assert (stop.reason, stop.code) == ("why", 1)
    assert stop.may_finish(5.0)
    assert not stop.may_finish(5.1)
    assert not stop.may_finish(None), "how long it takes is not known"
    clock.now += 3
    assert stop.may_finish(2.0)
    assert not stop.may_finish(2.1)


def test_a_second_signal_cannot_wait_unless_it_is_the_same_request() -> None:
    clock = Clock()
    stop = Stop(clock=clock)
    assert stop.signal(signal.SIGTERM), "nothing is open"
    stop = Stop(clock=clock)
    stop.is_working = True
    assert not stop.signal(signal.SIGINT)
    clock.now += 0.5
    assert not stop.signal(signal.SIGTERM), "torchrun passes on what the terminal sent too"
    clock.now += 0.6
    assert stop.signal(signal.SIGTERM)
    assert (stop.reason, stop.code) == ("stopped by SIGINT", 130)


def test_a_signal_after_the_budget_is_a_first_one() -> None:
    clock = Clock()
    stop = Stop(60.0, clock=clock)
    stop.is_working = True
    clock.now += 60
    assert stop.asked
    clock.now += 2
    assert not stop.signal(signal.SIGTERM)
    assert stop.code == REQUEUE


# --- handlers


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)]


def test_signals_are_restored_also_after_errors() -> None:
    before = handlers()
    with signals(Stop()):
        assert handlers() != before
    assert handlers() == before
    with pytest.raises(KeyError), signals(Stop()):
        raise KeyError
    assert handlers() == before
    with pytest.raises(KeyboardInterrupt), signals(Stop()):
        raise KeyboardInterrupt  # of somebody else
    assert handlers() == before
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


@pytest.mark.parametrize("number", sorted(SIGNALS))
def test_outside_the_working_loop_a_signal_ends_at_once(number: int) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background begins with it ignored
    try:
        ends_at_once(number)
    finally:
        signal.signal(signal.SIGINT, before)


def ends_at_once(number: int) -> None:
    def work() -> None:
        with signals(Stop()):
            os.kill(os.getpid(), number)
            time.sleep(20)

    started = time.monotonic()
    with pytest.raises(Stopped, match=rf"stopped by {signal.Signals(number).name}; what is committed stays") as caught:
        work()
    assert caught.value.code == SIGNALS[signal.Signals(number)]
    assert time.monotonic() - started < 5
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)


def test_in_the_working_loop_a_signal_asks() -> None:
    with signals(Stop()) as stop:
        stop.is_working = True
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0)
        assert stop.asked
        assert stop.code == 75


def test_no_end_within_the_grace_ends_where_it_waits() -> None:
    def work() -> None:
        with signals(Stop(grace=-0.8)) as stop:
            stop.is_working = True
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(20)

    started = time.monotonic()
    with pytest.raises(Stopped, match="stopped by SIGTERM") as caught:
        work()
    assert caught.value.code == 143
    assert 0.15 < time.monotonic() - started < 5


def test_the_alarm_of_others_goes_on() -> None:
    rung: list[int] = []

    def ring(number: int, frame: FrameType | None) -> None:
        rung.append(number)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with signals(Stop(grace=30.0)) as stop, signals(Stop(grace=30.0)) as inner:
            stop.is_working = inner.is_working = True
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.4)
            assert rung == [signal.SIGALRM]
            assert inner.asked
            assert not stop.asked, "the innermost one answers"
        assert signal.getsignal(signal.SIGALRM) is ring
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals(Stop()):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing() -> None:
    before, found = handlers(), []

    def work() -> None:
        with signals(Stop()) as stop:
            found.append((handlers() == before, stop.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(True, False)]


# --- processes

SCRIPT = """
import sys, time
from featstore.errors import Stopped
from featstore.extraction.stopping import Stop, signals

seconds, grace = float(sys.argv[1]), float(sys.argv[2])
try:
    with signals(Stop(grace=grace)) as stop:
        print("up", flush=True)
        if seconds < 0:
            time.sleep(60)
        stop.is_working = True
        while stop.may_begin(seconds):
            print("begun", flush=True)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                left = end - time.monotonic()
                if stop.asked and not stop.may_finish(left):
                    print("dropped", flush=True)
                    break
                time.sleep(min(0.02, max(left, 0)) if grace < 50 else max(left, 0))
            else:
                print("finished", flush=True)
        stop.is_working = False
        if stop.asked:
            raise Stopped(stop.reason, stop.code)
except Stopped as error:
    print(error, flush=True)
    sys.exit(error.code)
finally:
    print("cleaned", flush=True)
"""


def run(seconds: float, grace: float, act: Callable[["subprocess.Popen[str]"], object]) -> tuple[int, list[str], float]:
    """(exit status, lines, seconds from the first act to the end) of a loop whose blocks take so long."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(seconds), str(grace)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().strip()]
    if seconds > 0:
        lines.append(process.stdout.readline().strip())
    started = time.monotonic()
    act(process)
    lines += process.communicate(timeout=60)[0].split("\n")[:-1]
    return process.returncode, lines, time.monotonic() - started


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_short_block_is_finished(number: int, code: int) -> None:
    status, lines, _ = run(0.5, 5.0, lambda process: process.send_signal(number))
    assert status == code
    assert lines == ["up", "begun", "finished", f"stopped by {signal.Signals(number).name}", "cleaned"]


def test_a_long_block_is_dropped() -> None:
    status, lines, took = run(60, 5.0, lambda process: process.send_signal(signal.SIGTERM))
    assert (status, lines[1:]) == (143, ["begun", "dropped", "stopped by SIGTERM", "cleaned"])
    assert took < 5


def test_a_second_signal_ends_at_once() -> None:
    def twice(process: "subprocess.Popen[str]") -> None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(1.2)
        process.send_signal(signal.SIGTERM)

    status, lines, took = run(30, 60.0, twice)
    assert status == 75, "the first one says why"
    assert lines[:2] + lines[-1:] == ["up", "begun", "cleaned"]
    assert lines[2].startswith("stopped by SIGUSR1; what is committed stays")
    assert took < 10


def test_before_the_loop_it_ends_at_once() -> None:
    status, lines, took = run(-1, 60.0, lambda process: process.send_signal(signal.SIGTERM))
    assert (status, lines[0], lines[-1]) == (143, "up", "cleaned")
    assert took < 10
