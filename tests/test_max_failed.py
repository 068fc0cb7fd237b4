"""`--max-failed`: a share of the images of the set, whenever and by whomever they were read."""

from pathlib import Path
from typing import Any

import pytest
from pictures import CONFIG, register_pictures, write_pictures, write_table

from featstore.configs import RunConfig, SetConfig
from featstore.errors import FeatstoreError
from featstore.extraction.pipeline import Summary, extract
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store

TINY = SetConfig(model="tiny", res="42", block_rows=16)


def run(store: Path, share: str = "100%", **options: Any) -> Summary:
    settings = RunConfig(batch_size=8, workers=1, device="cpu", max_failed=share, **options)
    return extract(make_plan(Store(store), "pics", TINY, settings), settings)


def pending(store: Path) -> int:
    return int(Store(store)["pics", "tiny@42"].pending().sum())


@pytest.fixture
def pictures(tmp_path: Path, store_path: Path) -> Path:
    """Root of 50 registered pictures: three full blocks of 16 and one of 2."""
    register_pictures(store_path, tmp_path / "data", 50)
    return tmp_path / "data"


def damage(root: Path, store: Path, numbers: range) -> None:
    for path in sorted((root / "images").iterdir())[numbers.start : numbers.stop]:
        path.write_bytes(b"broken")
    register(store, "pics", root, CONFIG)


def grow(root: Path, store: Path, count: int) -> None:
    """More pictures, of which the last is broken."""
    names = [f"images/{number:05d}.png" for number in range(50)] + write_pictures(root, count, start=50)
    (root / names[-1]).write_bytes(b"broken too")
    write_table(root, names)
    register(store, "pics", root, CONFIG)


def test_too_many_failures_stop_but_what_is_committed_stays(pictures: Path, store_path: Path) -> None:
    damage(pictures, store_path, range(20, 24))
    with pytest.raises(FeatstoreError, match=r"more than --max-failed 4% allows"):
        run(store_path, "4%")
    assert pending(store_path) == 34
    assert run(store_path).computed == 34


def test_failures_of_earlier_runs_count(pictures: Path, store_path: Path) -> None:
    damage(pictures, store_path, range(20, 24))
    assert run(store_path).failed == 4
    grow(pictures, store_path, 10)
    said = r"4 images could not be decoded, more than --max-failed 6% .* not an image file .* give --retry-failed"
    with pytest.raises(FeatstoreError, match=said):  # before anything is read: 4 of 60 are too many already
        run(store_path, "6%")
    assert pending(store_path) == 10
    for retry in (False, True):
        with pytest.raises(FeatstoreError, match=r"5 images could not be decoded, more than --max-failed 8% allows"):
            run(store_path, "8%", retry_failed=retry)


def test_one_bad_image_of_the_few_that_a_run_has_left_is_not_too_much(pictures: Path, store_path: Path) -> None:
    run(store_path)
    grow(pictures, store_path, 4)
    summary = run(store_path, "2%")
    assert (summary.computed, summary.failed) == (4, 1)
