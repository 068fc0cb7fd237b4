"""Compact copies: equal to their source, never outdated, and harmless wherever they are interrupted."""

import contextlib
import logging
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_sets
import zarr
from tiny_sets import (
    CLS,
    PATCHES,
    KilledError,
    Trap,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    write_block,
    write_missing,
)

from featstore import files
from featstore.errors import CorruptError, SchemaError, StoreError, UnknownNameError
from featstore.objects import ObjectPath
from featstore.store import commits, compact, ledger
from featstore.store.compact import (
    CompactArray,
    Copy,
    check_copies,
    compactable,
    copy_path,
    open_compact,
    record_path,
    remove_copy,
)
from featstore.store.layout import ArraySpec, read_spec
from featstore.store.reader import ShardedArray
from featstore.store.shards import ShardWriter, shard_key

BLOCK = 16


def make_set(root: Path, count: int = 70, arrays: list[ArraySpec] | None = None, *, blocks: int | None = None) -> Path:
    """A set of `count` rows in blocks of 16, the first `blocks` of them committed with seed 1."""
    spec = tiny_sets.make_spec_of(block_rows=BLOCK)
    folder = prepare(root, spec, tiny_sets.make_manifest(named(count)), arrays or [CLS])
    for group in ledger.read_ledger(folder).groups:
        for block in range(-(-count // BLOCK) if blocks is None else blocks):
            write_block(folder, group, block, 1)
    return folder


def truth(folder: Path, name: str, stop: int) -> np.ndarray:
    return ShardedArray(folder / "data.zarr" / name).read(0, stop)


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert found.tobytes() == wanted.tobytes()


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of 32 rows a shard, so that they have several."""
    monkeypatch.setattr(compact, "COPY_SHARD_BYTES", 32 * CLS.row_bytes)


@pytest.mark.usefixtures("small_shards")
class TestCopy:
    @pytest.mark.parametrize("count", [17, 32, 33, 64, 70])
    def test_the_copy_has_the_rows_of_the_source(self, tmp_path: Path, count: int) -> None:
        folder = make_set(tmp_path, count)
        before = tiny_sets.contents(folder)
        told: list[int] = []
        assert compact.compact(folder, progress=told.append) == [Copy("cls", count, True)]
        assert sum(told) == count * CLS.row_bytes
        copy = open_compact(folder, "cls", count)
        assert copy is not None
        assert copy.is_mapped
        assert copy.shard_rows == 32
        same(copy.load(verify=True), truth(folder, "cls", count))
        rows = np.random.default_rng(0).integers(0, count, 50)
        same(copy.gather(rows), truth(folder, "cls", count)[rows])
        after = tiny_sets.contents(folder)
        assert {name: after[name] for name in before} == before
        assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"compact.zarr"}
        assert compact.compact(folder) == [Copy("cls", count, False)]
        assert tiny_sets.contents(folder) == after
        assert check_copies(folder, deep=True) == []

    def test_zarr_opens_the_copy(self, tmp_path: Path) -> None:
        layer = ArraySpec(name="layers/3/cls", row_shape=(8,), dtype="float16")
        folder = make_set(tmp_path, 70, [CLS, layer])
        assert [copy.array for copy in compact.compact(folder)] == ["cls", "layers/3/cls"]
        for name in ("cls", "layers/3/cls"):
            array: Any = zarr.open_array(copy_path(folder, name), mode="r")
            same(array[...], truth(folder, name, 70))
        assert record_path(folder, "layers/3/cls").name == "layers.3.cls.json"

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float32"])
    def test_stored_types(self, tmp_path: Path, dtype: str) -> None:
        array = ArraySpec(name="cls", row_shape=(16 // ({"int8": 1, "float32": 4}.get(dtype, 2)),), dtype=dtype)
        folder = make_set(tmp_path, 40, [array], blocks=0)
        # Rows 40 to 47 belong to nobody: the second manifest begins a block.
        ledger.add_rows(folder, tiny_sets.make_manifest(named(60)), dict)
        ledger.write_metadata(folder, read_spec(folder), ledger.read_ledger(folder))
        rng = np.random.default_rng(0)
        for block in range(5):
            with tiny_sets.writer_of(folder, "cls", block) as writer:
                count = writer.stop - writer.start
                values = rng.integers(-9, 9, (count, *array.row_shape)).astype(
                    ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
                )
                writer.append({"cls": values}, tiny_sets.states_of(count, 1))
                assert writer.commit()
        assert compact.compact(folder) == [Copy("cls", 68, True)]
        copy = open_compact(folder, "cls", 68)
        assert copy is not None
        owned = np.r_[0:40, 48:68]
        source = ShardedArray(folder / "data.zarr/cls")
        same(copy.gather(owned, verify=True), source.gather(owned, verify=True))
        nobody = copy.read(40, 48).astype(np.float32)
        assert (nobody == 0).all() if dtype == "int8" else np.isnan(nobody).all()

    def test_only_small_rows_in_several_small_shards(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = make_set(tmp_path, 40, [CLS, PATCHES])
        assert [(array.name, stop) for array, stop in compactable(folder)] == [("cls", 40)]
        assert compactable(folder, ["patches"])[0][0].name == "patches"
        with monkeypatch.context() as patch:
            patch.setattr(compact, "ROW_LIMIT_BYTES", PATCHES.row_bytes - 1)
            assert [array.name for array, _ in compactable(folder, ["cls", "patches"])] == ["cls"]
        with monkeypatch.context() as patch:
            patch.setattr(compact, "SMALL_SHARD_BYTES", BLOCK * CLS.row_bytes)
            assert compactable(folder) == []
        assert compactable(make_set(tmp_path / "one", 16)) == []
        assert compact.compact(make_set(tmp_path / "none", 16, blocks=0)) == []
        with pytest.raises(UnknownNameError, match=r"has no 'registers' to compact; it has cls, patches"):
            compact.compact(folder, arrays=["registers"])

    @pytest.mark.parametrize("mark", ["archiving.json", "archive.json"])
    def test_archived_sets_are_left_alone(self, tmp_path: Path, mark: str) -> None:
        folder = make_set(tmp_path)
        (folder / mark).write_text("{}")
        assert compact.compact(folder) == []

    def test_object_stores_are_left_alone(self) -> None:
        folder: Any = ObjectPath.parse("s3://bucket/set")
        assert compact.compact(folder) == []
        assert open_compact(folder, "cls", 1) is None
        assert check_copies(folder) == []

    def test_a_damaged_source_is_not_copied(self, tmp_path: Path) -> None:
        folder = make_set(tmp_path)
        shard = folder / "data.zarr/cls" / shard_key(1, 2)
        whole = shard.read_bytes()
        shard.write_bytes(whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
        with pytest.raises(CorruptError, match=r"c/1/0, chunk 0 .*: checksum is"):
            compact.compact(folder)
        shutil.copy(folder / "data.zarr/cls" / shard_key(0, 2), shard)
        with pytest.raises(CorruptError, match=r"c/1/0 is whole but not the one that was committed; .*--repair"):
            compact.compact(folder)
        shard.unlink()
        with pytest.raises(CorruptError, match=r"c/1/0: a committed shard is missing, so cls cannot be compacted"):
            compact.compact(folder)
        assert not (folder / "compact.zarr").exists()
        assert tiny_sets.leftovers(folder) == []

    def test_a_copy_that_does_not_read_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = make_set(tmp_path)
        monkeypatch.setattr(compact, "read_summary", lambda *_, **__: None)
        with pytest.raises(CorruptError, match="the copy does not read back as it was written; check the disk"):
            compact.compact(folder)
        assert open_compact(folder, "cls", 1) is None

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = make_set(tmp_path)

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(ShardWriter, "append", full)
        with pytest.raises(StoreError, match=r"compact.zarr/cls: cannot write \(No space left on device\); free space"):
            compact.compact(folder)
        assert tiny_sets.leftovers(folder) == []


@pytest.mark.usefixtures("small_shards")
class TestCurrent:
    def test_rows_beyond_the_copy(self, tmp_path: Path) -> None:
        folder = make_set(tmp_path, 70, blocks=3)
        write_block(folder, "cls", 4, 1)  # block 3 is missing
        assert compact.compact(folder) == [Copy("cls", 48, True)]
        assert open_compact(folder, "cls", 48) is not None
        assert open_compact(folder, "cls", 49) is None
        write_missing(folder, 1, block_rows=BLOCK)
        assert compact.compact(folder) == [Copy("cls", 70, True)]
        copy = open_compact(folder, "cls", 70)
        assert copy is not None
        same(copy.load(), truth(folder, "cls", 70))
        assert tiny_sets.leftovers(folder) == []

    def test_growth(self, tmp_path: Path) -> None:
        folder = make_set(tmp_path, 40)
        compact.compact(folder)
        ledger.add_rows(folder, tiny_sets.make_manifest(named(60)), dict)
        ledger.write_metadata(folder, read_spec(folder), ledger.read_ledger(folder))
        write_missing(folder, 1, block_rows=BLOCK)
        short = open_compact(folder, "cls", 40)
        assert short is not None
        assert len(short) == 40
        assert open_compact(folder, "cls", 68) is None
        assert compact.compact(folder) == [Copy("cls", 68, True)]
        long = open_compact(folder, "cls", 68)
        assert long is not None
        same(long.read(48, 68), tiny_sets.values_of(CLS, 48, 68, 1))
        same(short.load(verify=True), tiny_sets.values_of(CLS, 0, 40, 1))  # still open, though its files are gone

    def test_a_block_taken_back(self, tmp_path: Path) -> None:
        folder = make_set(tmp_path)
        compact.compact(folder)
        copy = open_compact(folder, "cls", 70)
        sent = pickle.dumps(copy)
        same(pickle.loads(sent).load(), truth(folder, "cls", 70))
        commits.take_back(folder, "cls", [CLS], 2, BLOCK)
        assert open_compact(folder, "cls", 70) is None
        write_block(folder, "cls", 2, 1)  # the very same bytes
        assert open_compact(folder, "cls", 70) is not None
        commits.take_back(folder, "cls", [CLS], 2, BLOCK)
        write_block(folder, "cls", 2, 7)
        assert open_compact(folder, "cls", 70) is None
        assert check_copies(folder) == [
            ("compact.zarr/cls", "is outdated: a block that it was made of was committed anew")
        ]
        same(pickle.loads(sent).load(), truth(folder, "cls", 70))
        assert compact.compact(folder) == [Copy("cls", 70, True)]
        copy = open_compact(folder, "cls", 70)
        assert copy is not None
        same(copy.read(32, 48), tiny_sets.values_of(CLS, 32, 48, 7))

    def test_neither_times_nor_inodes_of_markers_count(self, tmp_path: Path) -> None:
        """A marker of other content with the old one's size and times, as a clock that goes back could make it."""
        folder = make_set(tmp_path)
        compact.compact(folder)
        marker = commits.marker_path(folder, "cls", 2)
        facts = marker.stat()
        commits.take_back(folder, "cls", [CLS], 2, BLOCK)
        write_block(folder, "cls", 2, 7)
        os.utime(marker, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        assert open_compact(folder, "cls", 70) is None
        moved = tmp_path / "moved"
        shutil.copytree(make_set(tmp_path / "other"), moved)
        compact.compact(moved)
        shutil.copytree(moved, tmp_path / "again", copy_function=shutil.copyfile)
        assert open_compact(tmp_path / "again", "cls", 70) is not None

    def test_markers_that_begin_otherwise_are_read_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = make_set(tmp_path)
        compact.compact(folder)
        monkeypatch.setattr(compact, "_HEAD_BYTES", 5)
        assert open_compact(folder, "cls", 70) is not None

    def test_damage_to_the_copy(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = make_set(tmp_path)
        compact.compact(folder)
        path, record = copy_path(folder, "cls"), record_path(folder, "cls")
        metadata = path / "zarr.json"
        shards = [path / shard_key(number, 2) for number in range(3)]
        wounds = [*[(shard, -3) for shard in shards], *[(shard, None) for shard in shards], (record, 30)]
        wounds += [(metadata, 5), (metadata, metadata.read_text().index("source") + 12), (metadata, None)]
        for file, position in wounds:
            whole = file.read_bytes()
            if position is None:
                file.unlink()
            else:
                content = bytearray(whole)
                content[position] ^= 1
                file.write_bytes(content)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert open_compact(folder, "cls", 70) is None
            if position is not None:
                assert "the compact copy is damaged" in caplog.text
            ((place, what),) = check_copies(folder)
            assert place == "compact.zarr/cls"
            assert "is damaged: " in what or "is unfinished: its record or a file is missing" in what
            file.write_bytes(whole)
        # A truncated shard, and a flipped bit in a row, which a verified read and a deep check find.
        whole = shards[1].read_bytes()
        shards[1].write_bytes(whole[:-1])
        assert open_compact(folder, "cls", 70) is None
        assert check_copies(folder) == [
            ("compact.zarr/cls", f"is damaged: shard 1 has {len(whole) - 1} bytes instead of {len(whole)}")
        ]
        shards[1].write_bytes(whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
        assert check_copies(folder) == []
        ((_, what),) = check_copies(folder, deep=True)
        assert "chunk 0" in what
        remove_copy(folder, "cls")
        assert check_copies(folder, deep=True) == []
        assert compact.compact(folder) == [Copy("cls", 70, True)]
        assert check_copies(folder, deep=True) == []

    def test_shards_of_another_copy(self, tmp_path: Path) -> None:
        """A folder that is not the record's: whole, well-formed, of older commits."""
        folder = make_set(tmp_path)
        compact.compact(folder)
        old = tmp_path / "old"
        shutil.copytree(copy_path(folder, "cls"), old)
        commits.take_back(folder, "cls", [CLS], 2, BLOCK)
        write_block(folder, "cls", 2, 7)
        compact.compact(folder)
        shutil.rmtree(copy_path(folder, "cls"))
        old.rename(copy_path(folder, "cls"))
        assert open_compact(folder, "cls", 70) is None
        assert check_copies(folder) == [
            ("compact.zarr/cls", "is damaged: it is not the copy that its record describes")
        ]

    def test_a_swap_while_it_is_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = make_set(tmp_path)
        compact.compact(folder)
        old = tmp_path / "old"
        shutil.copytree(copy_path(folder, "cls"), old)
        real = CompactArray.open_all

        def swap(self: CompactArray, record: dict[str, Any]) -> None:
            shutil.rmtree(copy_path(folder, "cls"))
            old.rename(copy_path(folder, "cls"))
            real(self, record)

        monkeypatch.setattr(CompactArray, "open_all", swap)
        assert open_compact(folder, "cls", 70) is None

    def test_deleting_it_takes_nothing_from_open_readers(self, tmp_path: Path) -> None:
        folder = make_set(tmp_path)
        compact.compact(folder)
        copy = open_compact(folder, "cls", 70)
        assert copy is not None
        shutil.rmtree(folder / "compact.zarr")
        same(copy.load(), truth(folder, "cls", 70))
        same(pickle.loads(pickle.dumps(copy)).load(), truth(folder, "cls", 70))
        assert open_compact(folder, "cls", 70) is None


def check(folder: Path, before: dict[str, bytes]) -> None:
    """What was committed is untouched, and the copy is right or not used; then another run makes it."""
    held = tiny_sets.contents(folder)
    assert {name: data for name, data in held.items() if not name.startswith(("compact.zarr/", "attempts/"))} == before
    copy = open_compact(folder, "cls", 70)
    if copy is not None:
        same(copy.load(verify=True), truth(folder, "cls", 70))
    compact.compact(folder)
    copy = open_compact(folder, "cls", 70)
    assert copy is not None
    same(copy.load(verify=True), truth(folder, "cls", 70))
    commits.sweep_attempts(folder, older_than=-1.0)
    assert tiny_sets.leftovers(folder) == []
    assert check_copies(folder, deep=True) == []


def interfere(folder: Path, rival: str) -> None:
    """What another process may do in the middle of a compaction."""
    if rival == "removed":
        remove_copy(folder, "cls")
    elif rival != "same":
        commits.take_back(folder, "cls", [CLS], 2, BLOCK)
    if rival == "made again":
        write_block(folder, "cls", 2, 7)
    if rival in ("same", "made again"):
        compact.compact(folder)


@pytest.mark.usefixtures("small_shards")
class TestFaults:
    @pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("after", [False, True])
    @pytest.mark.parametrize("outdated", [False, True])
    def test_killed_anywhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outdated: bool, after: bool, step: int
    ) -> None:
        prepared = make_set(tmp_path / "prepared")
        if outdated:
            compact.compact(prepared)
            commits.take_back(prepared, "cls", [CLS], 2, BLOCK)
            write_block(prepared, "cls", 2, 7)
        before = {name: data for name, data in tiny_sets.contents(prepared).items() if "compact.zarr/" not in name}
        for at in range(1, 1000, step):
            folder = tmp_path / f"at{at}"
            shutil.copytree(prepared, folder)
            with monkeypatch.context() as patch:
                trap = Trap(at=at, then=tiny_sets.kill, after=after)
                trap.install(patch)
                with contextlib.suppress(KilledError):
                    compact.compact(folder)
            if not trap.sprung:
                break
            check(folder, before)
            shutil.rmtree(folder)
        assert at > 25  # every stage was met

    @pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("rival", ["same", "taken back", "made again", "removed"])
    def test_overtaken_anywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rival: str, step: int) -> None:
        """Another process does something, whole, between any two steps of a compaction."""
        prepared = make_set(tmp_path / "prepared")
        for at in range(1, 1000, step):
            folder = tmp_path / f"at{at}"
            shutil.copytree(prepared, folder)
            with monkeypatch.context() as patch:
                trap = Trap(at=at, then=partial(interfere, folder, rival))
                trap.install(patch)
                compact.compact(folder)
            if not trap.sprung:
                break
            copy = open_compact(folder, "cls", 70)
            if rival == "taken back":
                assert copy is None
                write_block(folder, "cls", 2, 7)
                assert open_compact(folder, "cls", 70) is None
            elif copy is not None:
                same(copy.load(verify=True), truth(folder, "cls", 70))
            before = {
                name: data
                for name, data in tiny_sets.contents(folder).items()
                if not name.startswith(("compact.zarr/", "attempts/"))
            }
            check(folder, before)
            shutil.rmtree(folder)
        assert at > 15

    def test_two_processes(self, tmp_path: Path) -> None:
        folder = make_set(tmp_path)
        children = [tiny_sets.fork(lambda: compact.compact(folder)) for _ in range(3)]
        assert [tiny_sets.wait(child) for child in children] == [0, 0, 0]
        copy = open_compact(folder, "cls", 70)
        if copy is not None:
            same(copy.load(verify=True), truth(folder, "cls", 70))
        compact.compact(folder)
        assert open_compact(folder, "cls", 70) is not None

    def test_killed_at_random(self, tmp_path: Path) -> None:
        folder = make_set(tmp_path)
        before = tiny_sets.contents(folder)
        for trial in range(4):
            child = tiny_sets.fork(lambda: compact.compact(folder))
            assert tiny_sets.kill_after(child, 0.002 * trial) in (0, -9)
            check(folder, before)
            remove_copy(folder, "cls")


def test_sets_of_an_older_schema_get_no_copy(tmp_path: Path) -> None:
    folder = prepare(tmp_path, make_spec_of(), make_manifest(named(3)), [CLS])
    spec = files.unseal((folder / "spec.json").read_bytes(), folder / "spec.json")
    (folder / "spec.json").write_bytes(files.sealed({**spec, "schema": 1}))
    with pytest.raises(SchemaError, match="open for reading only"):
        compact.compact(folder)
