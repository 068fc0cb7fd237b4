"""Archiving beside kills, damage and everybody else who works on the set."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_archive import flip, loaded, new_set, packed_rows, packed_shards, wanted, words
from tiny_sets import (
    CLS,
    PATCHES,
    KilledError,
    Trap,
    contents,
    fork,
    kill,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    states_of,
    values_of,
    wait,
    write_block,
    write_missing,
    writer_of,
)

from featstore import files
from featstore.datasets import manifest as manifests
from featstore.errors import CorruptError, StoreError
from featstore.store import archive, commits, ledger, packed, shards
from featstore.store.archive import archive_set, archived, check_archive, damaged_shards, unarchive_set
from featstore.store.catalog import Entry, Store
from featstore.store.moving import move_set, rename_set
from featstore.store.packed import Codec, PackedShard
from featstore.store.reader import ShardedArray
from featstore.store.usage import measure
from featstore.store.verify import verify_set

GROUP = "cls+patches"
ROWS = 29  # two blocks of 16, the second with a short shard
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def _several_shards_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_LIMIT_BYTES", 8 * CLS.row_bytes)  # 8 rows of cls, 2 of patches
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here cuts the power, and the page cache outlives a kill


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return new_set(tmp_path / "store")


def test_a_second_process_is_refused(folder: Path) -> None:
    import fcntl

    with open(folder / "archive.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for call in (archive_set, unarchive_set):
            with pytest.raises(StoreError, match="process is archiving, unarchiving or moving this set; let it finish"):
                call(folder)
    archive_set(folder)
    assert not (folder / "archive.lock").exists()


def test_many_processes_at_once(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)

    def work(seed: int) -> None:
        for step in range(4):
            with contextlib.suppress(StoreError):
                (unarchive_set if (seed + step) % 2 else archive_set)(folder)

    children = [fork(lambda seed=seed: work(seed)) for seed in range(3)]  # type: ignore[misc]
    assert [wait(child) for child in children] == [0, 0, 0]
    assert words(wanted(CLS)) == words(
        packed_rows(folder, CLS).gather(np.arange(ROWS), None, False) if archived(folder) else loaded(folder, CLS)
    )
    with contextlib.suppress(StoreError):
        unarchive_set(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("codec", packed.CODECS)
def test_every_flipped_bit_of_a_compressed_shard_is_found(folder: Path, codec: str) -> None:
    rng = np.random.default_rng(3)
    archive_set(folder, codec=codec)
    for path in packed_shards(folder)[1::5]:
        held = path.read_bytes()
        for bit in rng.integers(len(held) * 8, size=4).tolist():
            flip(path, bit)
            place = path.relative_to(folder).as_posix()
            assert [where for where, _ in check_archive(folder, deep=True)] == [place]
            array = CLS if "/cls/" in place else PATCHES
            with pytest.raises(CorruptError, match=r"is damaged; restore it"):
                packed_rows(folder, array).gather(np.arange(ROWS), None, False)
            after = contents(folder)
            with pytest.raises(CorruptError, match=r"is damaged; restore it"):
                unarchive_set(folder)
            assert {name: data for name, data in contents(folder).items() if "/c/" not in name} == after | {}
            shutil.rmtree(folder / "data.zarr" / "cls" / "c", ignore_errors=True)
            shutil.rmtree(folder / "data.zarr" / "patches" / "c", ignore_errors=True)
            path.write_bytes(held)
    unarchive_set(folder)
    np.testing.assert_array_equal(loaded(folder, CLS), wanted(CLS))


def test_missing_and_exchanged_shards(folder: Path) -> None:
    archive_set(folder)
    first, second = packed_shards(folder)[:2]
    held = first.read_bytes()
    first.unlink()
    assert list(check_archive(folder)) == [("data.zarr/cls/c.0.0", "the compressed shard is missing")]
    with pytest.raises(CorruptError, match=r"c\.0\.0 is missing; restore it from a copy; nothing was removed"):
        unarchive_set(folder)
    with pytest.raises(CorruptError, match=r"c\.0\.0 is missing; open the set again if it was unarchived"):
        packed_rows(folder, CLS).gather(np.arange(2), None, False)
    first.write_bytes(second.read_bytes())  # whole, but another's
    assert list(check_archive(folder)) == [("data.zarr/cls/c.0.0", "size or checksum differs from what was archived")]
    with pytest.raises(CorruptError, match="does not decode to what was committed; nothing was removed"):
        unarchive_set(folder)
    first.write_bytes(held[:7])
    assert "the index of this compressed shard is damaged" in next(iter(check_archive(folder)))[1]
    first.write_bytes(held)
    unarchive_set(folder)
    np.testing.assert_array_equal(loaded(folder, CLS), wanted(CLS))


def test_chunks_that_decode_to_something_else(folder: Path) -> None:
    archive_set(folder)
    with contextlib.closing(PackedShard(packed_shards(folder)[0], 1)) as shard:
        with pytest.raises(CorruptError, match="chunk 0 decodes to 128 bytes, not 64"):
            shard.decode(0, Codec("zstd", 5).coder("float16"), 64)
        with pytest.raises(CorruptError, match="chunk 0 cannot be decoded"):
            shard.decode(0, Codec("pcodec", 8).coder("float16"), 128)
    rows = packed_rows(folder, CLS)
    with (
        contextlib.closing(PackedShard(packed_shards(folder)[0], 1)) as shard,
        pytest.raises(CorruptError, match="holds 1 chunks only, chunk 1 was asked for"),
    ):
        rows._decoded(shard, 1)
    rows.close()
    with pytest.raises(StoreError, match="is closed; open it again"):
        rows.gather(np.arange(2), None, False)


@pytest.mark.parametrize("damage", ["bit", "missing"])
def test_damaged_raw_shards_are_not_archived(folder: Path, damage: str) -> None:
    path = folder / "data.zarr" / "patches" / "c" / "5" / "0" / "0"
    before = contents(folder)
    held = path.read_bytes()
    if damage == "bit":
        flip(path, 100)
    else:
        path.unlink()
    with pytest.raises(CorruptError, match="checksum is" if damage == "bit" else "is missing; `featstore verify"):
        archive_set(folder)
    path.write_bytes(held)
    unarchive_set(folder)
    assert contents(folder) == before


def test_a_block_taken_back_needs_no_shard(folder: Path) -> None:
    """The way out of a damaged archive: its block is taken back, the others return, and it is extracted again."""
    archive_set(folder)
    flip(folder / "data.zarr" / "cls" / "c.0.0", 50)
    book = ledger.read_ledger(folder)
    commits.take_back(folder, GROUP, book.groups[GROUP], 0, 16, archived=True)
    unarchive_set(folder)
    np.testing.assert_array_equal(ShardedArray(folder / "data.zarr" / "cls").read(16, ROWS), wanted(CLS)[16:])
    write_missing(folder, 1, block_rows=16)
    np.testing.assert_array_equal(loaded(folder, CLS), wanted(CLS))


def readable(folder: Path, count: int) -> None:
    """A reader that opens the set now gets the right values."""
    for array in (CLS, PATCHES):
        home = folder / "data.zarr" / array.name
        separator = files.json.loads((home / "zarr.json").read_bytes())["chunk_key_encoding"]["configuration"][
            "separator"
        ]
        rows = (
            packed_rows(folder, array).gather(np.arange(count), None, False)
            if separator == "."
            else loaded(folder, array)
        )
        np.testing.assert_array_equal(rows, wanted(array, count))


Step = Callable[[Path], object]


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize(("first", "then"), [("a", "a"), ("a", "u"), ("u", "u"), ("u", "a")])
def test_a_kill_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, then: str, after: bool
) -> None:
    steps: dict[str, Step] = {"a": archive_set, "u": unarchive_set}
    raw = new_set(tmp_path / "raw", rows=12)
    packed_copy = tmp_path / "packed" / "sets" / "demo" / raw.name
    shutil.copytree(raw, packed_copy)
    archive_set(packed_copy)
    ends = {"a": contents(packed_copy), "u": contents(raw)}
    start = raw if first == "a" else packed_copy
    with monkeypatch.context() as patch:
        trap = Trap(at=-1, then=kill)
        trap.install(patch)
        shutil.copytree(start, tmp_path / "whole" / "set")
        trap.count = 0
        steps[first](tmp_path / "whole" / "set")
    assert trap.count > 20
    # The quick round takes every third call.
    for at in range(1, trap.count + 1, 1 if after else 3):
        folder = tmp_path / f"trial{at}" / "set"
        shutil.copytree(start, folder)
        with monkeypatch.context() as patch:
            Trap(at=at, then=kill, after=after).install(patch)
            with contextlib.suppress(KilledError):
                steps[first](folder)
        readable(folder, 12)
        with contextlib.suppress(StoreError):  # unarchiving what was not begun, or is done
            steps[then](folder)
        readable(folder, 12)
        commits.sweep_attempts(folder, older_than=0.0)
        assert contents(folder) == ends[then]
        shutil.rmtree(folder.parent)


def opened(root: Path) -> tuple[Store, Entry]:
    store = Store(root)
    (entry,) = store.entries()
    return store, entry


def check_rows(root: Path, rows: int, *, seed: int = 1) -> None:
    """The one set of a store verifies, and holds these rows in every array."""
    store, entry = opened(root)
    assert verify_set(store, entry, deep=True).ok
    features = store.open(entry)
    for array in features.ledger.arrays.values():
        np.testing.assert_array_equal(features.load(array.name), values_of(array, 0, rows, seed))


def test_a_writer_at_work_is_not_overtaken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks extracted again count for the set, not for the archive that was made meanwhile."""
    with writer_of(folder, GROUP, 1):
        before = contents(folder)
        with pytest.raises(StoreError, match=r"a writer is at work here \(1 attempts\); wait for it, or stop it"):
            archive_set(folder)
        assert contents(folder) == before
        # Not seen at first, only after the announcement.
        calm = iter([lambda _: None, archive.require_calm])
        with monkeypatch.context() as patch:
            patch.setattr(archive, "require_calm", lambda place: next(calm)(place))
            with pytest.raises(StoreError, match="a writer is at work here"):
                archive_set(folder)
        assert contents(folder) == before
    archive_set(folder)


def test_a_block_is_neither_taken_back_nor_decided_once_a_set_is_archived(folder: Path) -> None:
    arrays = ledger.read_ledger(folder).groups[GROUP]
    refusal = "is archived .* run `featstore unarchive` on it first"
    with writer_of(folder, GROUP, 1) as writer:
        writer.append({array.name: values_of(array, 16, ROWS, 2) for array in arrays}, states_of(ROWS - 16, 2))
        aside = folder.parent / "aside"  # an attempt that archiving cannot see
        (folder / "attempts").rename(aside)
        archive_set(folder)
        aside.rename(folder / "attempts")
        with pytest.raises(StoreError, match=refusal):
            commits.take_back(folder, GROUP, arrays, 1, 16)
        marker = commits.marker_path(folder, GROUP, 1)
        held = marker.read_bytes()
        marker.unlink()
        with pytest.raises(StoreError, match=refusal):
            writer.commit()
        files.write_atomic(marker, held)
    check_rows(folder.parents[2], ROWS)


def test_blocks_that_no_sample_needs_may_be_missing(tmp_path: Path) -> None:
    """Killed after the first block; then the other samples left the data set, and no extract computes their blocks."""
    folder = prepare(tmp_path, make_spec_of(block_rows=16), make_manifest(named(40)), [CLS])
    write_block(folder, "cls", 0, 1)
    with pytest.raises(StoreError, match="only complete sets are archived, and this one lacks 2 blocks; run the same"):
        archive_set(folder)
    smaller = make_manifest(named(14))
    manifests.save(tmp_path / "datasets", smaller)
    with pytest.raises(StoreError, match="lacks 2 blocks"):  # not extracted for it
        archive_set(folder)
    prepare(tmp_path, make_spec_of(block_rows=16), smaller, [CLS])
    before = contents(folder)
    archive_set(folder)
    check_rows(tmp_path, 14)
    unarchive_set(folder)
    assert contents(folder) == before
    check_rows(tmp_path, 14)


def test_rows_that_nobody_maps_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the ledger entry and the mapping; then the data set grew beyond that entry."""

    def die(*_: Any) -> None:
        raise KilledError

    spec = make_spec_of(block_rows=16)
    folder = prepare(tmp_path, spec, make_manifest(named(16)), [CLS])
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_write_rows", die)
        with pytest.raises(KilledError):
            ledger.add_rows(folder, make_manifest(named(20)), dict)
    last = make_manifest(named(24))
    manifests.save(tmp_path / "datasets", last)
    prepare(tmp_path, spec, last, [CLS])
    assert ledger.read_rows(folder, last.short)[16:].tolist() == [*range(32, 40)]
    write_block(folder, "cls", 0, 1)
    with pytest.raises(StoreError, match="lacks 1 blocks"):
        archive_set(folder)
    write_block(folder, "cls", 2, 1)
    archive_set(folder)
    store, entry = opened(tmp_path)
    assert verify_set(store, entry, deep=True).ok
    mapped = np.concatenate([values_of(CLS, 0, 16, 1), values_of(CLS, 32, 40, 1)])
    np.testing.assert_array_equal(store.open(entry).load("cls"), mapped)


def test_what_was_begun_is_looked_at_again(folder: Path) -> None:
    """A block is gone since an archiving was killed: the way on is named."""
    files.create_exclusive(folder / "archiving.json", files.sealed({"codec": "zstd", "level": 5}))
    commits.take_back(folder, GROUP, ledger.read_ledger(folder).groups[GROUP], 0, 16, archived=True)
    with pytest.raises(StoreError, match="lacks 1 blocks; `featstore unarchive` gives up what was begun; then run the"):
        archive_set(folder)
    unarchive_set(folder)
    write_missing(folder, 1, block_rows=16)
    archive_set(folder)
    check_rows(folder.parents[2], ROWS)


def test_what_is_added_before_the_announcement_is_archived_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_set(tmp_path, [CLS], 16)
    real = archive._begin

    def late(*args: Any) -> Codec:
        grown = make_manifest(named(30))
        manifests.save(tmp_path / "datasets", grown)
        prepare(tmp_path, make_spec_of(block_rows=16), grown, [CLS, PATCHES])
        write_missing(folder, 1, block_rows=16)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(archive, "_begin", late)
        archive_set(folder)
    check_rows(tmp_path, 30)
    unarchive_set(folder)
    check_rows(tmp_path, 30)


def test_shards_that_the_seal_does_not_know_are_reported(folder: Path) -> None:
    archive_set(folder)
    path = folder / "archive.json"
    sealed = {key: value for key, value in (archived(folder) or {}).items() if key != "digest"}
    del sealed["shards"]["patches"]
    files.write_atomic(path, files.sealed(sealed))
    found = list(damaged_shards(folder))
    assert {(what, group) for _, what, group, _ in found} == {
        ("size or checksum differs from what was archived", GROUP)
    }
    assert len(found) == len(packed_shards(folder)) - 4


def test_a_writer_that_wakes_up_does_not_undo_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_set(tmp_path, [CLS], 16)
    spec, grown = ledger.read_spec(folder), make_manifest(named(30))
    manifests.save(tmp_path / "datasets", grown)
    ledger.add_rows(folder, grown, dict)
    real, asleep = os.replace, [True]

    def late(source: Any, target: Any) -> None:
        if Path(target).parent.name == "cls" and asleep:
            asleep.clear()
            ledger.write_metadata(folder, spec, ledger.read_ledger(folder))
            write_missing(folder, 1, block_rows=16)
            archive_set(folder)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", late)
        ledger.write_metadata(folder, spec, ledger.read_ledger(folder))
    assert not asleep
    check_rows(tmp_path, 30)


@pytest.mark.parametrize("how", ["rename", "move"])
def test_a_set_is_not_moved_while_it_is_archived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    folder = new_set(tmp_path / "a")
    real, refused = archive._pack, []

    def away() -> Path:
        store, entry = opened(tmp_path / "a")
        return rename_set(entry, "demo/new") if how == "rename" else move_set(store, entry, tmp_path / "b")

    def pack(*args: Any) -> Any:
        with pytest.raises(StoreError, match="another process is archiving, unarchiving or moving this set") as error:
            away()
        refused.append(error)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(archive, "_pack", pack)
        archive_set(folder)
    assert len(refused) == len(packed_shards(folder))
    check_rows(tmp_path / "a", ROWS)
    root = tmp_path / ("a" if how == "rename" else "b")
    moved = away()
    assert not (moved / "archive.lock").exists()
    check_rows(root, ROWS)
    unarchive_set(moved)
    check_rows(root, ROWS)


def test_a_set_that_is_gone_is_not_sealed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = archive._pack

    def pack(*args: Any) -> Any:
        (folder / "spec.json").unlink(missing_ok=True)
        return real(*args)

    monkeypatch.setattr(archive, "_pack", pack)
    with pytest.raises(StoreError, match="the set was removed while it was archived; nothing is sealed"):
        archive_set(folder)
    assert not (folder / "archive.json").exists()


def test_compressed_shards_count_as_their_array(folder: Path) -> None:
    archive_set(folder)
    counted = {row.part: (row.num_files, row.num_bytes) for row in measure(folder.parents[2], "demo")}
    for array, files_wanted in ((CLS, 4), (PATCHES, 15)):
        sizes = [path.stat().st_size for path in (folder / "data.zarr" / array.name).glob("c.*")]
        assert len(sizes) == files_wanted
        assert counted[f"array {array.name}"] == (files_wanted, sum(sizes))
    assert counted["array metadata"][0] == 3


@pytest.mark.parametrize("deep", [False, True])
def test_the_bytes_looked_at_are_told(folder: Path, deep: bool) -> None:
    seen: list[int] = []
    assert list(damaged_shards(folder, deep=deep, advance=seen.append)) == []
    assert not seen
    archive_set(folder)
    assert list(damaged_shards(folder, deep=deep, advance=seen.append)) == []
    assert sorted(seen) == sorted(path.stat().st_size for path in packed_shards(folder))
