"""Samples that left the data set: what is committed of them stays, whatever is computed anew around them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import CONFIG, register_pictures, write_pictures, write_table
from tiny_sets import KilledError

from featstore.configs import RunConfig, SetConfig
from featstore.extraction.pipeline import Summary, extract
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store import commits
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from featstore.store.layout import LEFT
from featstore.store.publication import Finisher
from featstore.store.scratch import Scratch
from featstore.store.verify import verify_set

TINY = SetConfig(model="tiny", res="42", block_rows=16)
RUN = RunConfig(batch_size=8, workers=2, device="cpu")


def run(store: Path, config: SetConfig = TINY, settings: RunConfig = RUN) -> Summary:
    return extract(make_plan(Store(store), "pics", config, settings), settings)


@pytest.fixture
def shrunk(tmp_path: Path, store_path: Path) -> tuple[FeatureSet, np.ndarray, dict[int, str]]:
    """A set of 40 pictures, two of them damaged, and its rows; then every fifth sample leaves and one is mended."""
    root = tmp_path / "data"
    register_pictures(store_path, root, 40)
    whole = {number: (root / f"images/{number:05d}.png").read_bytes() for number in (3, 21)}
    for number in whole:
        (root / f"images/{number:05d}.png").write_bytes(b"no picture")
    register(store_path, "pics", root, CONFIG)
    run(store_path)
    old = Store(store_path)["pics", "tiny@42"]
    held, failures = old.load("cls"), old.failures
    assert sorted(failures) == [3, 21]
    (root / "images/00021.png").write_bytes(whole[21])
    names = [f"images/{number:05d}.png" for number in range(40) if number % 5]
    write_table(root, names + write_pictures(root, 3, start=40))
    register(store_path, "pics", root, CONFIG)
    return old, held, failures


def same_as_before(
    store_path: Path, before: tuple[FeatureSet, np.ndarray, dict[int, str]], mended: tuple[int, ...] = ()
) -> FeatureSet:
    old, held, failures = before
    now = Store(store_path).set("pics/tiny@42", manifest=old.manifest.short)
    kept = np.setdiff1d(np.arange(40), mended)
    np.testing.assert_array_equal(now.load("cls", verify=True)[kept], held[kept])
    assert {row: why for row, why in now.failures.items() if row not in mended} == {
        row: why for row, why in failures.items() if row not in mended
    }
    assert verify_set(Store(store_path), Store(store_path).entry("pics/tiny@42"), deep=True).ok
    return now


def test_a_retry_keeps_their_rows(store_path: Path, shrunk: tuple[FeatureSet, np.ndarray, dict[int, str]]) -> None:
    retry = replace(RUN, retry_failed=True)
    run(store_path)
    run(store_path, settings=retry)
    same_as_before(store_path, shrunk)
    current = Store(store_path)["pics", "tiny@42"]
    assert len(current.failures) == 1  # the mended picture is another file, and so another row
    # A second retry does the block of the picture that still fails, and nothing for those that left.
    again = make_plan(Store(store_path), "pics", TINY, retry)
    blocks = {int(row) // 16 for row in current.row_index[list(current.failures)]}
    assert {int(current.row_index[row]) // 16 for row in again.todo} == blocks


def test_new_arrays_do_not_take_the_old_ones_from_them(
    store_path: Path, shrunk: tuple[FeatureSet, np.ndarray, dict[int, str]]
) -> None:
    run(store_path)
    run(store_path, replace(TINY, layers="2"))
    now = same_as_before(store_path, shrunk)
    layer = now.array("layers/2/cls").load()
    gone = list(range(0, 40, 5))
    assert np.isnan(layer[gone]).all()
    assert np.isfinite(layer[[1, 2, 4]]).all()
    assert now.ok.sum() == 38
    assert LEFT in {why for group in now.ledger.groups for why in now._failures_of(group).values()}


@pytest.mark.parametrize(
    "step",
    [
        "publication",
        *(pytest.param(step, marks=pytest.mark.slow) for step in ("delivery", "marker of the attempt", "marker")),
    ],
)
def test_a_retry_that_is_killed_in_a_commit_keeps_their_rows(
    store_path: Path,
    shrunk: tuple[FeatureSet, np.ndarray, dict[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    step: str,
) -> None:
    retry = replace(RUN, retry_failed=True, stage=tmp_path / "stage")
    run(store_path)

    def die(*_: object) -> None:
        raise KilledError

    target, name = {
        "delivery": (Scratch, "deliver"),
        "marker of the attempt": (commits.BlockWriter, "_write_marker"),
        "publication": (Finisher, "publish"),
        "marker": (commits, "mark"),
    }[step]
    append = commits.BlockWriter.append

    def otherwise(writer: commits.BlockWriter, rows: dict[str, np.ndarray], states: list[commits.RowState]) -> None:
        append(writer, rows, [replace(state, reason=state.reason and "another reason") for state in states])

    with monkeypatch.context() as patch:
        patch.setattr(commits.BlockWriter, "append", otherwise)  # else it would be what is committed, byte for byte
        patch.setattr(target, name, die)
        with pytest.raises(KilledError):
            run(store_path, settings=retry)
    run(store_path, settings=retry)
    same_as_before(store_path, shrunk)
