"""Several preprocessings of one decoded file, and work that is asked for late."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import register_pictures

from featstore.datasets.manifest import Manifest
from featstore.extraction import loader as module
from featstore.extraction.loader import AHEAD, GONE, Batch, Job, Loader, Work
from featstore.images import PreprocessSpec
from featstore.images.opening import RasterFile


def spec(side: int, **options: Any) -> PreprocessSpec:
    options = {"geometry": "squash", **options}
    return PreprocessSpec(height=side, width=side, mean=(0.5,) * 3, std=(0.5,) * 3, **options)


SPECS = (spec(28), spec(14, intensity="clahe"), spec(28, geometry="dino"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("several")
    return register_pictures(folder / "store", folder / "data", 20)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of the decoder."""
    calls: list[int] = []
    original = RasterFile.pixels

    def counted(self: RasterFile, *given: Any) -> Any:
        calls.append(1)
        return original(self, *given)

    monkeypatch.setattr(RasterFile, "pixels", counted)
    return calls


def together(rows: tuple[int, ...], kinds: tuple[int, ...], block: int = 0) -> list[Job]:
    return [Job(block, rows, lane=lane, kind=kind) for lane, kind in enumerate(kinds)]


def test_batches_are_those_of_a_loader_for_each(manifest: Manifest, decoded: list[int]) -> None:
    """Sets that lack other rows, and blocks of other sizes, share what they can."""
    rows = tuple(range(8))
    given: list[Work] = [
        together(rows, (0, 1, 2)),
        [Job(1, (8, 9, GONE, 8), lane=0, kind=0), Job(1, (9, 10), lane=1, kind=1)],
        [Job(2, (11,), lane=2, kind=2)],
    ]
    with Loader(manifest, SPECS, given, workers=2) as loader:
        batches = list(loader)
    # `voi` of the options differs between native and clahe only by the first step, which is native in both; sizes are
    # part of the options, so 28 and 14 decode for themselves.
    options = {one.decoding for one in SPECS}
    assert len(decoded) == len(options) * len(rows) + 1 + 2 + 1 + 1
    assert [batch.job for batch in batches] == [job for jobs in given if jobs for job in jobs]
    for batch in batches:
        with Loader(manifest, SPECS[batch.job.kind], [Job(0, batch.job.rows)], workers=1) as alone:
            (expected,) = alone
        assert batch.states == expected.states
        np.testing.assert_array_equal(batch.pixels, expected.pixels)


def test_one_decoding_serves_preprocessings_that_read_alike(manifest: Manifest, decoded: list[int]) -> None:
    with Loader(manifest, SPECS, [together((0, 1, 2), (0, 2, 0, 2))], workers=1) as loader:
        assert len(list(loader)) == 4
    assert len(decoded) == 3


def test_work_is_asked_for_when_there_is_room(manifest: Manifest) -> None:
    """`AHEAD` + 1 batches are held; None gives out what waits before more is asked for."""
    asked: list[int] = []

    def work(stop: int | None) -> Iterator[Work]:
        for number in range(12):
            if number == stop:
                yield None
            asked.append(number)
            yield [Job(number, (number,))]

    with Loader(manifest, SPECS[:1], work(None), workers=2) as loader:
        for number, batch in enumerate(loader):
            assert batch.job.block == number
            assert len(asked) == min(12, number + AHEAD + 1)
    asked.clear()
    with Loader(manifest, SPECS[:1], work(2), workers=2) as loader:
        batches = iter(loader)
        assert [next(batches).job.block, len(asked)] == [0, 2]
        assert [next(batches).job.block, len(asked)] == [1, 2]
        assert [next(batches).job.block, len(asked)] == [2, 2 + AHEAD + 1]
        assert [batch.job.block for batch in batches] == list(range(3, 12))


def test_images_are_let_go_with_their_last_use(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = module._Image

    def kept(*given: Any) -> Any:
        made.append(original(*given))
        return made[-1]

    monkeypatch.setattr(module, "_Image", kept)
    with Loader(manifest, SPECS, [together((0, 1), (0, 1)), together((2, 3), (2,))], workers=1) as loader:
        batches: Iterator[Batch] = iter(loader)
        next(batches)
        assert [image.future is None for image in made] == [False, False, False, False]
        next(batches)
        assert [image.future is None for image in made] == [True, True, False, False]
        list(batches)
    assert all(image.future is None for image in made)


@pytest.mark.slow
def test_worker_processes_do_the_same(manifest: Manifest) -> None:
    given = [together((0, 1, 2), (0, 1, 2))]
    with Loader(manifest, SPECS, given, workers=1) as threads:
        expected = list(threads)
    with Loader(manifest, SPECS, given, workers=1, worker_type="process") as processes:
        for batch, wanted in zip(processes, expected, strict=True):
            assert (batch.job, batch.states) == (wanted.job, wanted.states)
            np.testing.assert_array_equal(batch.pixels, wanted.pixels)


def test_a_failure_is_told_to_every_set(tmp_path: Path) -> None:
    found = register_pictures(tmp_path / "store", tmp_path / "data", 3)
    path = tmp_path / "data/images/00001.png"
    path.write_bytes(path.read_bytes()[:50].ljust(path.stat().st_size, b"\0"))
    with Loader(found, SPECS, [together((0, 1, 2), (0, 1))], workers=1) as loader:
        first, second = loader
    assert first.states == second.states
    assert [state.reason is None for state in first.states] == [True, False, True]
    assert not first.pixels[1].any()
