"""One command at a time in the folder of a run: others wait, are told for whom, and can be asked to end."""

import errno
import fcntl
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from featstore.errors import Stopped, StoreError
from featstore.extraction.stopping import Stop
from probes import tuning_hold
from probes.tuning_hold import LOCK, alone
from probes.tuning_ranks import Team


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_hold, "PAUSE", 0.01)


def test_the_second_one_waits_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    order: list[str] = []

    def second() -> None:
        with alone(tmp_path, Team()):
            order.append("second")

    with alone(tmp_path, Team()):
        thread = threading.Thread(target=second)
        thread.start()
        while not caplog.messages:
            time.sleep(0.005)
        time.sleep(0.1)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]
    (message,) = caplog.messages  # once, however often it looks
    assert message.startswith(f"another process ({os.getpid()} on ")
    assert message.endswith(f"trains in {tmp_path}; waiting for its end")
    assert not list(tmp_path.iterdir())


def test_many_at_once_are_never_two(tmp_path: Path) -> None:
    """Who ends removes the lock: one who had it open already must not take it for his."""
    inside, most = [], []

    def work() -> None:
        for _ in range(10):
            with alone(tmp_path, Team()):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(most) == 40
    assert max(most) == 1


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with alone(tmp_path, Team()):
            os.write(writing, b"x")
            time.sleep(60)
    os.read(reading, 1)
    stop = Stop()
    stop.ask("the time budget of 1 s is used up", 75)
    with (
        pytest.raises(Stopped, match="the time budget of 1 s is used up; what is committed stays") as raised,
        alone(tmp_path, Team(), stop),
    ):
        pass
    assert raised.value.code == 75
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).is_file()
    with alone(tmp_path, Team(), stop):  # nobody is waited for, so that nothing has to end here
        pass
    assert not (tmp_path / LOCK).exists()
    os.close(reading)
    os.close(writing)


def test_a_file_system_without_locks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone(tmp_path, Team()):
        pass
    assert caplog.messages == [
        f"{tmp_path}: no locks on this file system (No locks available); never start the same command twice at once "
        "here"
    ]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot write"), alone(tmp_path / "file" / "run", Team()):
        pass


def test_only_the_first_process_of_a_team_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team()
    monkeypatch.setattr(team, "rank", 1)
    with alone(tmp_path, Team()), alone(tmp_path, team):
        pass
