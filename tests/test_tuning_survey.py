"""Images looked through before training: kept, ended, gone on with, counted, told of, the same for every process."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuning_runs import LABELS, After, image_set, pictures

from featstore.errors import CorruptError, FeatstoreError, ManifestError, Stopped, StoreError
from featstore.extraction.loader import Loader
from featstore.extraction.stopping import Stop
from featstore.store.catalog import Store
from probes import tuning_survey, tuning_watch
from probes.tasks import make_task
from probes.tuning_images import ImageSet, make_image_task
from probes.tuning_ranks import Team
from probes.tuning_watch import Rate, Watch, check_asked, said_time

ROWS = np.arange(48)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that a loader gives out from now on."""
    rows: list[int] = []
    real = Loader.__iter__

    def counted(self: Loader) -> Any:
        for batch in real(self):
            rows.extend(batch.job.rows)
            yield batch

    monkeypatch.setattr(Loader, "__iter__", counted)
    return rows


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning_survey, "SIZE", 8)
    return pictures(tmp_path)


def damage(store: Path, *numbers: int) -> None:
    """Make files undecodable, with the size and the time that they were registered with."""
    table = Store(store).manifest("pics").table
    for number in numbers:
        path = store.parent / "pics" / table.column("path")[number].as_py()
        path.write_bytes(bytes(path.stat().st_size))
        time = table.column("mtime_ns")[number].as_py()
        os.utime(path, ns=(time, time))


def test_an_ended_survey_goes_on_and_a_finished_one_decodes_nothing(
    store: Path, tmp_path: Path, decoded: list[int]
) -> None:
    with pytest.raises(Stopped, match="stopped by the test; what is committed stays, the same command goes on") as end:
        image_set(store).survey(ROWS, stop=After(2), folder=tmp_path / "kept")
    assert end.value.code == 75
    first = list(dict.fromkeys(decoded))
    assert 24 <= len(first) < 48
    decoded.clear()
    whole = image_set(store)
    whole.survey(ROWS, folder=tmp_path / "kept")
    assert len(decoded) == 24
    assert sorted({*decoded, *range(24)}) == ROWS.tolist()
    decoded.clear()
    again, plain = image_set(store), image_set(store)
    again.survey(ROWS, folder=tmp_path / "kept")
    assert decoded == []
    plain.survey(ROWS)
    for found in (whole, again):
        assert found.manifest.column("content") == plain.manifest.column("content")
        assert None not in found.manifest.column("content")
        assert found.failures == plain.failures == {}


def test_every_attempt_looks_at_one_batch_at_least(store: Path, tmp_path: Path) -> None:
    attempts = 1
    while True:
        try:
            image_set(store).survey(ROWS, stop=After(0), folder=tmp_path)
        except Stopped:
            attempts += 1
            continue
        break
    assert attempts == 6  # batches


def test_images_of_a_kept_survey_are_held_as_they_come(store: Path, tmp_path: Path, decoded: list[int]) -> None:
    image_set(store).survey(ROWS, folder=tmp_path)
    images = image_set(store)
    images.survey(ROWS, folder=tmp_path)
    decoded.clear()
    passes = []
    for _ in range(2):
        with images.open([ROWS[:20], ROWS[20:]]) as batches:
            passes.append(np.concatenate([batch.pixels for batch in batches]))
    assert len(decoded) == 48
    np.testing.assert_array_equal(*passes)


def test_failed_images_are_tried_again_and_changed_files_are_noticed(store: Path, tmp_path: Path) -> None:
    damage(store, 3, 30)
    first, second = image_set(store), image_set(store)
    first.survey(ROWS, folder=tmp_path)
    assert sorted(first.failures) == [3, 30]
    with pytest.MonkeyPatch.context() as patch:
        looked: list[int] = []
        real = Watch.step
        patch.setattr(Watch, "step", lambda self, images, failed=0: looked.append(images) or real(self, images, failed))
        second.survey(ROWS, folder=tmp_path)
    assert sum(looked) == 2
    assert second.failures == first.failures
    path = store.parent / "pics" / Store(store).manifest("pics").table.column("path")[7].as_py()
    os.utime(path)
    with pytest.raises(ManifestError, match="00007"):
        image_set(store).survey(ROWS, folder=tmp_path)


def test_another_preprocessing_or_a_damaged_piece(store: Path, tmp_path: Path, decoded: list[int]) -> None:
    image_set(store).survey(ROWS, folder=tmp_path)
    decoded.clear()
    image_set(store, res="56").survey(ROWS, folder=tmp_path)
    assert len(decoded) == 48
    for path in tmp_path.glob("*/*.json"):
        path.write_bytes(path.read_bytes().replace(b"0", b"1"))
    with pytest.raises(CorruptError):
        image_set(store).survey(ROWS, folder=tmp_path)


@pytest.mark.parametrize("cache", [False, True])
def test_too_many_failures(cache: bool, store: Path, tmp_path: Path) -> None:
    damage(store, 3, 30)
    with pytest.raises(
        FeatstoreError,
        match=r"^2 .*images.* could not be decoded, more than --max-failed 4% allows;",
    ):
        image_set(store, cache=cache, max_failed="4%").survey(ROWS, folder=tmp_path)
    allowed = image_set(store, cache=cache, max_failed="4.2%")  # 2 of 48
    allowed.survey(ROWS, folder=tmp_path)
    assert sorted(allowed.failures) == [3, 30]
    with pytest.raises(
        FeatstoreError, match=r"^1 of the \d+ images of the task .*, more than --max-failed 4\.2% allows"
    ):
        image_set(store, max_failed="4.2%").survey(ROWS[:20], folder=tmp_path)  # 1 of the 20 that are used


def test_a_stopped_cache_is_told(store: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="stopped by the test"):
        image_set(store, cache=True).survey(ROWS, stop=After(0))
    images = image_set(store, cache=True)
    images.survey(ROWS)
    assert len(images.failures) == 0


def test_what_is_used_alone_is_looked_at(store: Path, decoded: list[int]) -> None:
    images = image_set(store)
    task = make_image_task(images, LABELS, splits=("test",))
    assert sorted(decoded) == task.index("test").tolist()


# Lines


def test_lines_say_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(tuning_watch.time, "monotonic", lambda: clock[0])
    rate = Rate("images looked at", 224000, speaks=True)
    with caplog.at_level(logging.INFO, "probes.tuning_watch"):
        for second in (1, 2, 4, 6, 7, 10.9, 11.5):
            clock[0] = second
            rate.add(830 if second == 1 else 0)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "images looked at 830/224000, 138 images/s, 26.9 min left",
        "images looked at 830/224000, 72 images/s, 51.5 min left",
    ]


def test_a_silent_rate(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(tuning_watch, "SHOWN_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "probes.tuning_watch"):
        Rate("x", 10, speaks=False).add(1)
        assert not caplog.records
        Rate("x", 10, speaks=True).add(1)
    assert caplog.records


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (89.0, "89 s"), (270.0, "4.5 min"), (5399.0, "90.0 min"), (11160.0, "3.1 h")]
)
def test_times(seconds: float, said: str) -> None:
    assert said_time(seconds) == said


def test_a_signal_waits_within_a_watch_alone() -> None:
    stop = Stop()
    with Watch("x", 1, Team(), stop):
        assert stop.is_working
    assert not stop.is_working
    with pytest.raises(Stopped, match="stopped on another process"):
        check_asked(True, stop)
    check_asked(False, stop)


# Several processes, here threads


class Threads:
    """What threads that stand for processes share."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world, timeout=30)
        self.places: list[Any] = [None] * world

    def exchange(self, rank: int, mine: Any) -> list[Any]:
        self.places[rank] = mine
        self.barrier.wait()
        found = list(self.places)
        self.barrier.wait()
        return found


class Member(Team):
    def __init__(self, rank: int, shared: Threads) -> None:
        self.rank, self.world, self.device, self._shared = rank, shared.world, "cpu", shared

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(sum(each)) for each in zip(*self._shared.exchange(self.rank, list(values)))]

    def objects(self, mine: Any) -> list[Any]:
        return self._shared.exchange(self.rank, mine)

    def wait(self) -> None:
        self._shared.exchange(self.rank, None)


def together(work: Callable[[Member], Any], world: int = 2) -> list[Any]:
    """What each member's work gives, or raises."""
    shared = Threads(world)
    found: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            found[rank] = work(Member(rank, shared))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_processes_share_a_survey_and_end_together(store: Path, tmp_path: Path) -> None:
    damage(store, 5)
    kept = tmp_path / "kept"

    def survey(member: Member, stop: Stop | None = None, **run: Any) -> ImageSet:
        images = image_set(store, **run)
        images.survey(ROWS[:47], member, stop=stop, folder=kept)  # 24 rows and 23
        return images

    ended = together(lambda member: survey(member, After(1) if member.rank else Stop()))
    assert [type(each) for each in ended] == [Stopped, Stopped]
    assert str(ended[0]).startswith("stopped on another process")
    assert sum(len(path.read_bytes()) > 0 for path in kept.glob("*/found-*.json")) == 2  # a piece of each
    one, two = together(survey)
    assert one.failures.keys() == two.failures.keys() == {5}
    assert one.manifest.column("content") == two.manifest.column("content")
    expected = image_set(store)
    expected.survey(ROWS[:47])
    assert one.manifest.column("content") == expected.manifest.column("content")
    many = together(lambda member: survey(member, max_failed="1%"))
    assert [str(each).partition(";")[0] for each in many] == [
        "1 of the 47 images of the task could not be decoded, more than --max-failed 1% allows"
    ] * 2


def test_only_what_is_new_counts_as_kept(store: Path, tmp_path: Path) -> None:
    damage(store, 5)
    first, second = Stop(), Stop()
    image_set(store).survey(ROWS, stop=first, folder=tmp_path / "kept")
    image_set(store).survey(ROWS, stop=second, folder=tmp_path / "kept")  # the failed one again, in vain
    assert (first.has_kept, second.has_kept) == (True, False)


def test_a_damaged_piece_is_looked_at_again(store: Path, tmp_path: Path, decoded: list[int]) -> None:
    image_set(store).survey(ROWS, folder=tmp_path / "kept")
    (piece,) = (tmp_path / "kept").glob("*/*.json")
    whole = piece.read_bytes()
    piece.write_bytes(whole[:-9])
    decoded.clear()
    image_set(store).survey(ROWS, folder=tmp_path / "kept")
    assert sorted(set(decoded)) == ROWS.tolist()
    assert piece.read_bytes() == whole


def test_a_folder_that_cannot_be(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file"):
        image_set(store).survey(ROWS, folder=tmp_path / "file" / "kept")


def test_a_cache_is_asked_about_its_own_images(store: Path, tmp_path: Path) -> None:
    table = Store(store).manifest("pics").table
    path = store.parent / "pics" / table.column("path")[3].as_py()
    data, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    damage(store, 3)
    image_set(store, cache=True).survey(ROWS, folder=tmp_path / "kept")  # the cache holds it as failed
    path.write_bytes(data)
    os.utime(path, ns=times)
    image_set(store).survey(ROWS, folder=tmp_path / "kept")  # and a survey without it as good
    images = image_set(store, cache=True)
    images.survey(ROWS, folder=tmp_path / "kept")
    assert images.failures.keys() == {3}


def test_a_task_of_test_rows_alone(store: Path) -> None:
    images = image_set(store)
    task = make_task(images, LABELS, splits=("test",))
    assert len(task.index("test")) == 12
