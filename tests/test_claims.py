"""Claims: who is at which piece, told beside the data; hints that must never stand in anybody's way."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from featstore import files
from featstore.configs import RunConfig
from featstore.extraction import claims as module
from featstore.extraction.claims import Claims
from featstore.extraction.loader import Job
from featstore.extraction.sharing import Sharing
from featstore.extraction.stopping import REQUEUE, Stop


def test_a_claim_keeps_others_away_until_it_is_released(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims", patience=60.0) as mine, Claims(tmp_path / "claims", patience=60.0) as other:
        assert mine.is_free(3)
        assert mine.take(3)
        assert mine.take(3)  # again: it is held
        assert not other.take(3)  # it had not looked
        assert not other.is_free(3)
        assert mine.is_free(3)  # of its own claim
        assert other.take(4)
        found = mine.survey()
        assert {piece: [claim.owner for claim in held] for piece, held in found.items()} == {
            3: [mine.owner],
            4: [other.owner],
        }
        assert all(abs(claim.since - mine.now()) < 60 and not claim.dead for held in found.values() for claim in held)
        assert other.take(3)  # behind the one it has seen
        assert sorted(path.name for path in (tmp_path / "claims").iterdir()) == [
            "00000003.0",
            "00000003.1",
            "00000004.0",
        ]
        mine.release(3)
        assert mine.mine == frozenset()
        assert other.mine == {3, 4}
    assert not (tmp_path / "claims").exists()


def test_a_silent_claim_is_over(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims", patience=60.0) as mine, Claims(tmp_path / "claims", patience=60.0) as other:
        mine.take(1)
        [path] = (tmp_path / "claims").iterdir()
        past = time.time() - 61
        os.utime(path, (past, past))
        assert other.is_free(1)
        [claim] = other.survey()[1]
        assert claim.is_over(other.now(), 60.0)
        assert not claim.is_over(other.now(), 90.0)


def test_signs_of_life(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims", patience=0.4) as mine:
        mine.take(1)
        [path] = (tmp_path / "claims").iterdir()
        past = time.time() - 100
        os.utime(path, (past, past))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime < past + 50:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextlib.contextmanager
def ended(process: "subprocess.Popen[str]") -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_cannot_go_on_has_no_claim(tmp_path: Path, number: signal.Signals) -> None:
    script = (
        "import sys, time; from pathlib import Path; from featstore.extraction.claims import Claims\n"
        "with Claims(Path(sys.argv[1]), patience=60.0) as claims:\n"
        "    claims.take(7); print(claims.owner, flush=True); time.sleep(600)"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "claims")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process, ended(process):
        assert process.stdout is not None
        owner = process.stdout.readline().strip()
        with Claims(tmp_path / "claims", patience=60.0) as mine:
            assert not mine.is_free(7)
            os.kill(process.pid, number)
            deadline = time.monotonic() + 20
            while not mine.is_free(7):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            [claim] = mine.survey()[7]
            assert (claim.owner, claim.dead) == (owner, True)
            assert files.is_dead(owner) == (number == signal.SIGKILL)
            process.kill()
            process.wait()  # a child that nobody has waited for is dead too
            mine.sweep_dead(3600.0)
            assert mine.survey() == {}


def test_what_cannot_be_written_stands_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("no folder")
    with Claims(tmp_path / "claims", patience=60.0) as mine:
        assert mine.take(1)
        assert mine.is_free(1)
        assert mine.survey() == {}
        assert mine.mine == {1}  # it is being done all the same
        mine.release(1)
        assert mine.mine == frozenset()


def test_a_claim_that_is_damaged_is_somebodys(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims/00000005.0").write_bytes(b"")
    with Claims(tmp_path / "claims", patience=60.0) as mine:
        assert not mine.is_free(5)
        assert mine.take(5)  # behind it
        mine.sweep({5})  # not while it is its own
        assert sorted(path.suffix for path in (tmp_path / "claims").iterdir()) == [".0", ".1"]
        mine.release(5)
        mine.sweep({4})
        assert [path.name for path in (tmp_path / "claims").iterdir()] == ["00000005.0"]
        mine.sweep()
    assert not (tmp_path / "claims").exists()


def test_nobody_claims_a_piece_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOTS", 2)
    (tmp_path / "claims").mkdir()
    for slot in range(2):
        (tmp_path / f"claims/00000005.{slot}").write_bytes(b"")
    with Claims(tmp_path / "claims", patience=60.0) as mine:
        assert not mine.is_free(5)
        assert mine.take(5)
        assert mine.mine == {5}
        assert len(list((tmp_path / "claims").iterdir())) == 2


class Work:
    """Twelve units of one batch each; those done are told to `sharing` at once."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def left(self) -> list[int]:
        return [unit for unit in range(12) if unit not in self.done]

    def jobs(self, unit: int) -> list[Job]:
        return [Job(unit, (unit,))] if unit not in self.done else []


def share(folder: Path, work: Work, run: RunConfig, stop: Stop | None = None) -> Sharing:
    with Sharing(folder, list(range(12)), work.left, work.jobs, run, stop) as sharing:
        for jobs in sharing:
            for job in jobs or ():
                assert job.block not in work.done
                work.done.append(job.block)
                sharing.committed(job.block)
    return sharing


def test_the_own_stripe_comes_first_then_the_rest(tmp_path: Path) -> None:
    work = Work()
    sharing = share(tmp_path, work, RunConfig(rank=1, world=4))
    assert work.done[:3] == [1, 5, 9]
    assert sorted(work.done) == list(range(12))
    assert (sharing.taken_over, sharing.helped) == (9, 0)


def test_without_take_over_the_stripe_is_all(tmp_path: Path) -> None:
    work = Work()
    share(tmp_path, work, RunConfig(rank=1, world=4, take_over=False))
    assert work.done == [1, 5, 9]


def test_those_who_try_again_keep_to_their_stripes(tmp_path: Path) -> None:
    work = Work()
    share(tmp_path, work, RunConfig(rank=1, world=4, retry_failed=True))
    assert work.done == [1, 5, 9]


def test_a_unit_that_somebody_else_is_at_is_waited_for(tmp_path: Path) -> None:
    work = Work()
    with Claims(tmp_path / "claims", patience=60.0) as other:
        other.take(0)
        with Sharing(tmp_path, list(range(12)), work.left, work.jobs, RunConfig()) as sharing:
            for number, jobs in enumerate(sharing):
                if jobs is None:
                    assert sorted(work.done) == list(range(1, 12))  # all the others first
                    work.done.append(0)
                    other.release(0)
                else:
                    work.done.append(jobs[0].block)
                    sharing.committed(jobs[0].block)
                assert number < 20
    assert sorted(work.done) == list(range(12))


def test_who_waits_sees_that_its_writer_has_ended(tmp_path: Path) -> None:
    work = Work()
    with (
        Claims(tmp_path / "claims", patience=60.0) as other,
        Sharing(tmp_path, list(range(12)), work.left, work.jobs, RunConfig()) as sharing,
    ):
        other.take(0)
        for jobs in sharing:
            if jobs is None:
                sharing.give_up()  # or this would never end
            else:
                work.done.append(jobs[0].block)
                sharing.committed(jobs[0].block)
    assert work.left() == [0]


def test_nothing_is_begun_that_cannot_be_finished(tmp_path: Path) -> None:
    now = [0.0]
    stop = Stop(100.0, clock=lambda: now[0])
    work = Work()
    with Sharing(tmp_path, list(range(12)), work.left, work.jobs, RunConfig(), stop) as sharing:
        for jobs in sharing:
            assert jobs is not None
            now[0] += 30
            sharing._seconds.append(30.0)
            work.done.append(jobs[0].block)
    assert work.done == [0, 1, 2]  # the fourth would end at 120
    assert stop.code == REQUEUE
    assert "the next block takes about 30 s, and of the time budget of 100 s 10 s are left" in stop.reason


def test_units_are_done_once_though_no_claim_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("no folder")
    given: list[int] = []
    work = Work()
    with Sharing(tmp_path, list(range(12)), work.left, work.jobs, RunConfig()) as sharing:
        for jobs in sharing:  # none is committed before the next one is asked for
            assert jobs is not None
            given.append(jobs[0].block)
    assert given == list(range(12))


def test_the_budget_lets_what_is_open_end(tmp_path: Path) -> None:
    now = [0.0]
    stop = Stop(100.0, clock=lambda: now[0])
    now[0] = 60.0
    assert not stop.may_begin(50.0)
    assert stop.may_finish(39.0)  # there are 40 s left, though no other block fits in them
    assert not stop.may_finish(41.0)
    stop.signal(signal.SIGTERM)  # the scheduler is less patient
    assert stop.may_finish(4.0)
    assert not stop.may_finish(6.0)


def test_who_waits_for_others_has_nothing_to_begin(tmp_path: Path) -> None:
    stop = Stop(100.0)
    work = Work()
    with (
        Claims(tmp_path / "claims", patience=60.0) as other,
        Sharing(tmp_path, list(range(12)), work.left, work.jobs, RunConfig(), stop) as sharing,
    ):
        other.take(0)
        for jobs in sharing:
            if jobs is None:
                work.done.append(0)
            else:
                work.done.append(jobs[0].block)
                sharing.committed(jobs[0].block)
                sharing._seconds[:] = [1000.0] if jobs[0].block == 11 else [0.1]
    assert sorted(work.done) == list(range(12))
    assert not stop.asked


def test_those_who_try_again_mind_no_claim(tmp_path: Path) -> None:
    work = Work()
    with Claims(tmp_path / "claims", patience=60.0) as other:
        other.take(5)
        share(tmp_path, work, RunConfig(rank=1, world=4, retry_failed=True))
    assert work.done == [1, 5, 9]
