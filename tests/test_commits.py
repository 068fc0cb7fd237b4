"""One block from rows to marker: what is accepted, what is refused, what a marker says, and what is swept."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import (
    CLS,
    PATCHES,
    check_blocks,
    check_checksums,
    committed_files,
    leftovers,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    states_of,
    values_of,
    write_block,
    writer_of,
)

from featstore.errors import CorruptError, StoreError
from featstore.store import commits, ledger, shards
from featstore.store.commits import RowState
from featstore.store.layout import ArraySpec
from featstore.store.reader import ShardedArray

GROUP = "cls+patches"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path, make_spec_of(block_rows=16), make_manifest(named(20)), [CLS, PATCHES])


@pytest.mark.parametrize("step", [1, 3, 7, 16])
@pytest.mark.parametrize("limit", [1, 48, 200, 10**9])
def test_bytes_do_not_depend_on_how_rows_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, limit: int
) -> None:
    monkeypatch.setattr(shards, "SHARD_LIMIT_BYTES", limit)
    folder = prepare(tmp_path / "limited", make_spec_of(block_rows=16), make_manifest(named(20)), [CLS, PATCHES])
    for block in (1, 0):
        assert write_block(folder, GROUP, block, 5, step=step)
        check_checksums(folder, [CLS, PATCHES], commits.read_commit(folder, GROUP, block))
    assert check_blocks(folder, {5}) == {(GROUP, 0): 5, (GROUP, 1): 5}
    assert leftovers(folder) == []


def test_the_first_commit_counts_and_the_second_leaves_it_alone(folder: Path) -> None:
    assert write_block(folder, GROUP, 0, 1)
    held = committed_files(folder)
    assert not write_block(folder, GROUP, 0, 2)
    assert committed_files(folder) == held
    assert commits.committed_blocks(folder, GROUP) == {0}
    assert commits.committed_blocks(folder, "absent") == set()


def test_a_marker_says_what_became_of_each_row(folder: Path) -> None:
    states = [RowState(f"{row:032d}", "not an image" if row in (17, 19) else None) for row in range(16, 20)]
    with writer_of(folder, GROUP, 1) as writer:
        rows = {array.name: values_of(array, 16, 20, 1).copy() for array in writer.arrays}
        for values in rows.values():
            values[[1, 3]] = np.nan
        writer.append(rows, states)
        assert writer.commit()
    commit = commits.read_commit(folder, GROUP, 1)
    assert (commit.block, commit.start, commit.stop) == (1, 16, 20)
    assert commit.failed == {17: "not an image", 19: "not an image"}
    assert [commit.content(row) for row in range(16, 20)] == [state.content for state in states]


def test_equal_bytes_give_equal_markers_whoever_wrote_them(folder: Path) -> None:
    write_block(folder, GROUP, 0, 1)
    first = commits.marker_path(folder, GROUP, 0).read_bytes()
    commits.take_back(folder, GROUP, [CLS, PATCHES], 0, 16)
    assert commits.committed_blocks(folder, GROUP) == set()
    commits.take_back(folder, GROUP, [CLS, PATCHES], 0, 16)
    write_block(folder, GROUP, 0, 1, step=2)
    assert commits.marker_path(folder, GROUP, 0).read_bytes() == first
    commits.take_back(folder, GROUP, [CLS, PATCHES], 0, 16)
    write_block(folder, GROUP, 0, 2)
    assert check_blocks(folder, {2}) == {(GROUP, 0): 2}


def test_a_valid_unmarked_shard_is_adopted(folder: Path) -> None:
    write_block(folder, GROUP, 0, 1)
    shard = folder / "data.zarr" / "cls" / "c" / "0" / "0"
    held = shard.stat()
    commits.take_back(folder, GROUP, [CLS, PATCHES], 0, 16)
    write_block(folder, GROUP, 0, 1)
    assert (shard.stat().st_ino, shard.stat().st_mtime_ns) == (held.st_ino, held.st_mtime_ns)


def test_missing_and_surplus_rows_are_refused(folder: Path) -> None:
    with writer_of(folder, GROUP, 1) as writer:
        writer.append({array.name: values_of(array, 16, 19, 1) for array in writer.arrays}, states_of(3, 1))
        with pytest.raises(StoreError, match="block 1: 3 of 4 rows written; not committed"):
            writer.commit()
        writer.append({array.name: values_of(array, 19, 21, 1) for array in writer.arrays}, states_of(2, 1))
        with pytest.raises(StoreError, match="block 1: 5 of 4 rows written; not committed"):
            writer.commit()
    assert commits.committed_blocks(folder, GROUP) == set()
    assert leftovers(folder) == []


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    ("dtype", "hint"),
    [("float16", "store them as float32"), ("float32", "check the weights"), ("bfloat16", "check the weights")],
)
def test_a_row_that_does_not_fit_stops_the_block(folder: Path, bad: float, dtype: str, hint: str) -> None:
    array = ArraySpec(name="x", row_shape=(8,), dtype=dtype)
    values = np.ones((4, 8), np.float32)
    values[0], values[2, 7] = np.nan, bad
    stored = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)
    failed = np.array([True, False, False, False])
    said = f"does not fit {dtype}: it holds infinity"
    if np.isnan(bad):  # which float32 would hold too
        said, hint = "holds NaN", "check the weights and the compute dtype"
    with pytest.raises(StoreError, match=rf"x: row 12 {said}; nothing of this block is committed; {hint}"):
        commits.check_finite(array, stored, failed, 10)
    stored[2, 7] = stored[1, 0]
    commits.check_finite(array, stored, failed, 10)
    with pytest.raises(AssertionError, match="a failed row holds numbers"):
        commits.check_finite(array, stored, np.array([True, True, False, False]), 10)


def test_an_overflow_leaves_nothing(folder: Path) -> None:
    rows = {array.name: values_of(array, 16, 20, 1).copy() for array in (CLS, PATCHES)}
    rows["patches"][3, 2, 0] = np.inf
    with writer_of(folder, GROUP, 1) as writer, pytest.raises(StoreError, match="patches: row 19 does not fit float16"):
        writer.append(rows, states_of(4, 1))
    assert leftovers(folder) == []
    assert not list((folder / "data.zarr").rglob("c/*"))


def test_a_damaged_marker_is_told(folder: Path) -> None:
    write_block(folder, GROUP, 0, 1)
    path = commits.marker_path(folder, GROUP, 0)
    path.write_bytes(path.read_bytes().replace(b'"stop": 16', b'"stop": 17'))
    with pytest.raises(CorruptError, match=r"00000000.json: content does not match its digest"):
        commits.read_commit(folder, GROUP, 0)


def test_a_damaged_intent_is_dropped_with_its_attempt(folder: Path) -> None:
    intent = commits.intent_path(folder, GROUP, 0)
    intent.parent.mkdir(parents=True)
    intent.write_bytes(b"{")
    (folder / "attempts" / "dead").mkdir(parents=True)
    assert commits.finish_intents(folder, ledger.read_ledger(folder), 16) == 1
    assert commits.sweep_attempts(folder, older_than=0.0) == 1
    assert leftovers(folder) == []
    intent.write_bytes(b"{")
    assert write_block(folder, GROUP, 0, 1)
    assert check_blocks(folder, {1}) == {(GROUP, 0): 1}


def test_an_intent_without_files_does_not_stop_the_block(folder: Path) -> None:
    from featstore import files

    for names in ((), ("cls.0",), ("cls.0", commits.MARKER)):
        home = folder / "attempts" / "lost"
        home.mkdir(parents=True)
        for name in names:
            (home / name).write_bytes(b"half")
        files.create_exclusive(commits.intent_path(folder, GROUP, 1), files.sealed({"files": "lost"}))
        if commits.MARKER in names:
            with pytest.raises(CorruptError, match=r"marker.json: not a sealed JSON file"):
                commits.finish_intents(folder, ledger.read_ledger(folder), 16)
        else:
            assert commits.finish_intents(folder, ledger.read_ledger(folder), 16) == 1
        assert leftovers(folder) == []
    assert write_block(folder, GROUP, 1, 1)


def test_sweeping_spares_the_young_and_the_decided(folder: Path) -> None:
    old = time.time() - 100
    for name in ("attempts/young/cls.0", "attempts/old/cls.0", "ledger/a.partial", "data.zarr/cls/zarr.json.1.partial"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
        if "young" not in name:
            os.utime(folder / name, (old, old))
    os.utime(folder / "attempts" / "old", (old, old))
    assert commits.sweep_attempts(folder, older_than=50.0) == 1
    assert leftovers(folder) == ["attempts/young", "attempts/young/cls.0"]
    assert commits.sweep_attempts(folder, older_than=0.0) == 1
    assert leftovers(folder) == []
    assert commits.sweep_attempts(folder, older_than=0.0) == 0


def test_integer_positions_outside_a_block_keep_nan(folder: Path) -> None:
    """The padding behind a short block's last row is the fill value."""
    write_block(folder, GROUP, 1, 1)
    raw = (folder / "data.zarr" / "cls" / "c" / "1" / "0").read_bytes()[: 16 * CLS.row_bytes]
    held = np.frombuffer(raw, "<f2").reshape(16, 8)
    assert np.isnan(held[4:]).all()
    np.testing.assert_array_equal(held[:4], ShardedArray(folder / "data.zarr" / "cls").read(16, 20))
