"""The guard of a set: two committed rows are computed again before anything is added."""

from pathlib import Path
from typing import Any

import pytest
from pictures import register_pictures

from featstore.configs import RunConfig, SetConfig
from featstore.errors import ConfigError
from featstore.extraction import creation
from featstore.extraction.lane import Lane
from featstore.extraction.pipeline import Summary, extract
from featstore.extraction.plan import make_plan
from featstore.store import commits
from featstore.store.catalog import Store

TINY = SetConfig(model="tiny", res="42", block_rows=16)
RUN = RunConfig(batch_size=8, workers=2, device="cpu")


def run(store: Path, config: SetConfig = TINY) -> Summary:
    return extract(make_plan(Store(store), "pics", config, RUN), RUN)


@pytest.fixture
def pictures(tmp_path: Path, store_path: Path) -> Path:
    """Root of 50 registered pictures."""
    register_pictures(store_path, tmp_path / "data", 50)
    return tmp_path / "data"


def test_resume_refuses_other_numbers(pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def stop(images: int, failed: int) -> None:
        calls.append(images)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(make_plan(Store(store_path), "pics", TINY, RUN), RUN, advance=stop)
    real = creation.to_pixels
    monkeypatch.setattr(creation, "to_pixels", lambda *args, **options: real(*args, **options) * 1.2)
    with pytest.raises(ConfigError, match=r"recomputing committed rows of cls gives a relative difference of"):
        run(store_path)
    monkeypatch.setattr(creation, "to_pixels", real)
    assert run(store_path).computed == 34


@pytest.mark.parametrize(("block_rows", "looked_at"), [(64, [4, 3]), (8, [3, 48])])
def test_committed_rows_that_are_damaged_give_way_to_the_next(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int, looked_at: list[int]
) -> None:
    """The first rows of a set are looked at when it grows; files that were damaged since must not stop that."""
    config = SetConfig(model="tiny", res="42", block_rows=block_rows)
    run(store_path, config)
    for number in (0, 1, 2):
        path = pictures / f"images/{number:05d}.png"
        path.write_bytes(b"x" * path.stat().st_size)
    more = SetConfig(model="tiny", res="42", block_rows=block_rows, tokens="cls,mean_patch")
    plan = make_plan(Store(store_path), "pics", more, RUN)
    network = plan.source.load(device="cpu", compute_dtype="float32")
    worker = Lane(plan, RUN, "cpu", network)
    seen: list[list[int]] = []
    real_start = worker.start
    monkeypatch.setattr(
        worker, "start", lambda batch, arrays: (seen.append([*batch.job.rows]), real_start(batch, arrays))[1]
    )
    worker.guard()
    real = creation.to_pixels
    monkeypatch.setattr(creation, "to_pixels", lambda *args, **options: real(*args, **options) * 1.2)
    with pytest.raises(ConfigError, match=r"recomputing committed rows of cls gives a relative difference of"):
        worker.guard()
    assert seen == [looked_at] * 2


@pytest.mark.parametrize("gone", [[0], [3], [0, 3]])
def test_blocks_that_another_process_replaces_just_then_are_left_out(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, gone: list[int]
) -> None:
    run(store_path)
    more = SetConfig(model="tiny", res="42", block_rows=16, tokens="cls,mean_patch")
    plan = make_plan(Store(store_path), "pics", more, RUN)
    worker = Lane(plan, RUN, "cpu", plan.source.load(device="cpu", compute_dtype="float32"))
    real_start, real_blocks, seen = worker.start, commits.committed_blocks, []

    def replacing(folder: Path, group: str) -> set[int]:
        found = real_blocks(folder, group)
        for block in gone:
            commits.marker_path(folder, group, block).unlink()
        return found

    def start(batch: Any, arrays: Any) -> Any:
        seen.append([row // 16 for row in batch.job.rows])
        return real_start(batch, arrays)

    monkeypatch.setattr(worker, "start", start)
    monkeypatch.setattr(commits, "committed_blocks", replacing)
    worker.guard()
    assert seen == {(0,): [[3, 3]], (3,): [[0, 0]], (0, 3): []}[tuple(gone)]
