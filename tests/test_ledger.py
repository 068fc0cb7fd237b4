"""Rows and arrays that are added to a set: numbered, first wins, block-aligned, the same whoever does it."""

from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_sets import (
    CLS,
    PATCHES,
    KilledError,
    Trap,
    check_blocks,
    contents,
    fork,
    kill,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    values_of,
    wait,
    write_missing,
)

from featstore import files
from featstore.errors import CorruptError, IncompleteError
from featstore.store import ledger
from featstore.store.features import FeatureSet
from featstore.store.layout import ArraySpec
from featstore.store.ledger import Ledger, Segment
from featstore.store.reader import ShardedArray

SPEC = make_spec_of(block_rows=16)


@given(st.lists(st.integers(1, 70), max_size=5), st.sampled_from([1, 16, 32]))
def test_blocks_cover_every_segment_once_and_cross_none(sizes: list[int], rows_per_block: int) -> None:
    segments: list[Segment] = []
    for number, size in enumerate(sizes):
        start = -(-(segments[-1].stop if segments else 0) // rows_per_block) * rows_per_block
        segments.append(Segment(start, start + size, str(number)))
    blocks = Ledger(segments).blocks(rows_per_block)
    rows = [row for _, start, stop in blocks for row in range(start, stop)]
    assert rows == [row for segment in segments for row in range(segment.start, segment.stop)]
    assert all(start // rows_per_block == (stop - 1) // rows_per_block == block for block, start, stop in blocks)
    assert len({block for block, _, _ in blocks}) == len(blocks)


def test_growth_starts_a_block_and_old_manifests_stay_readable(tmp_path: Path) -> None:
    first, grown = make_manifest(named(20)), make_manifest(named(10, 30) + named(20))
    grown_sizes = make_manifest(named(10, 30) + named(20), sizes=[*range(500, 510), *range(100, 120)])
    folder = prepare(tmp_path, SPEC, first, [CLS])
    write_missing(folder, 1, block_rows=16)
    before = contents(folder)
    assert grown.digest != grown_sizes.digest
    assert prepare(tmp_path, SPEC, grown_sizes, [CLS]) == folder
    write_missing(folder, 1, block_rows=16)
    assert ledger.read_rows(folder, grown_sizes.short).tolist() == [*range(32, 42), *range(20)]
    assert ledger.read_ledger(folder).segments == [Segment(0, 20, first.short), Segment(32, 42, grown_sizes.short)]
    after = contents(folder)
    assert {name for name in before if before[name] != after[name]} == {"data.zarr/cls/zarr.json"}
    for manifest, rows in ((first, range(20)), (grown_sizes, [*range(32, 42), *range(20)])):
        held = FeatureSet(folder, manifest).load("cls")
        np.testing.assert_array_equal(held, values_of(CLS, 0, 42, 1)[list(rows)])


def test_plain_zarr_and_tensorstore_read_a_grown_set_with_its_gap(tmp_path: Path) -> None:
    import tensorstore
    import zarr

    layers = ArraySpec(name="layers/3/cls", row_shape=(8,), dtype="float32")
    folder = prepare(tmp_path, SPEC, make_manifest(named(20)), [CLS, PATCHES, layers])
    write_missing(folder, 1, block_rows=16)
    prepare(tmp_path, SPEC, make_manifest(named(25)), [CLS])
    write_missing(folder, 1, block_rows=16)
    group = zarr.open_group(folder / "data.zarr", mode="r")
    assert group.attrs["featstore"] == {"schema": 2, "fingerprint": SPEC["fingerprint"]}
    for array in (CLS, PATCHES, layers):
        wanted = values_of(array, 0, 37, 1).copy()
        wanted[20:32] = np.nan
        by_zarr = group[array.name]
        assert isinstance(by_zarr, zarr.Array)
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "data.zarr" / array.name)}}
        by_tensorstore = tensorstore.open(store, read=True).result().read().result()
        ours = ShardedArray(folder / "data.zarr" / array.name)
        np.testing.assert_array_equal(by_zarr[:], wanted)
        np.testing.assert_array_equal(by_tensorstore, wanted)
        assert ours.is_mapped
        np.testing.assert_array_equal(ours.read(0, 20), wanted[:20])
        np.testing.assert_array_equal(ours.read(32, 37), wanted[32:])


def test_running_again_adds_nothing(tmp_path: Path) -> None:
    manifest = make_manifest(named(20))
    folder = prepare(tmp_path, SPEC, manifest, [CLS, PATCHES])
    write_missing(folder, 1, block_rows=16)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    prepare(tmp_path, SPEC, manifest, [PATCHES, CLS])
    write_missing(folder, 2, block_rows=16)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_equal_steps_give_equal_bytes(tmp_path: Path) -> None:
    found = []
    for place in ("a", "b"):
        for count in (20, 25):
            folder = prepare(tmp_path / place, SPEC, make_manifest(named(count)), [CLS, PATCHES])
            write_missing(folder, 1, block_rows=16)
        found.append(contents(folder))
    assert found[0] == found[1]


def test_vanished_and_reordered_samples_keep_their_rows(tmp_path: Path) -> None:
    folder = prepare(tmp_path, SPEC, make_manifest(named(5)), [CLS])
    fewer = make_manifest(["s0004", "s0001"], sizes=[104, 101])
    prepare(tmp_path, SPEC, fewer, [CLS])
    assert ledger.read_rows(folder, fewer.short).tolist() == [4, 1]
    assert ledger.read_ledger(folder).num_entries == 2


def test_a_sample_of_another_size_or_content_gets_a_new_row(tmp_path: Path) -> None:
    folder = prepare(tmp_path, SPEC, make_manifest(["a", "b", "c"]), [CLS])
    held = {0: "same", 1: "old"}
    changed = make_manifest(["a", "b", "c"], sizes=[100, 101, 999], contents=["same", "new", None])
    preview = ledger.preview_rows(folder, changed, lambda: held)
    assert preview.tolist() == [0, -1, -1]
    assert ledger.add_rows(folder, changed, lambda: held).tolist() == [0, 16, 17]
    again = make_manifest(["c", "b"], sizes=[999, 101])
    assert ledger.preview_rows(folder, again, dict).tolist() == [17, 16]


def test_a_file_that_was_changed_back_gets_its_old_row_back(tmp_path: Path) -> None:
    folder = prepare(tmp_path, SPEC, make_manifest(["a", "b"]), [CLS])
    edited, back = (make_manifest(["a", "b"], contents=[content, None]) for content in ("new", "old"))
    assert ledger.add_rows(folder, edited, lambda: {0: "old"}).tolist() == [16, 1]
    assert ledger.preview_rows(folder, back, lambda: {0: "other", 16: "new"}).tolist() == [-1, 1]
    assert ledger.add_rows(folder, back, lambda: {0: "old", 16: "new"}).tolist() == [0, 1]
    both = {0: "old", 16: "old"}
    assert ledger.preview_rows(folder, back, lambda: both).tolist() == [16, 1], "of equal ones the latest"


def test_contents_are_asked_for_only_where_the_manifest_states_one(tmp_path: Path) -> None:
    folder = prepare(tmp_path, SPEC, make_manifest(["a"]), [CLS])

    def never() -> dict[int, str]:
        raise AssertionError

    assert ledger.add_rows(folder, make_manifest(["a", "b"]), never).tolist() == [0, 16]


def test_a_writer_that_dies_while_growing_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, grown = make_manifest(named(5)), make_manifest(named(9))
    calm = prepare(tmp_path / "calm", SPEC, first, [CLS])
    prepare(tmp_path / "calm", SPEC, grown, [CLS, PATCHES])
    for at in range(1, 500):
        root = tmp_path / str(at)
        folder = prepare(root, SPEC, first, [CLS])
        with monkeypatch.context() as patch:
            trap = Trap(at=at, then=kill)
            trap.install(patch)
            with suppress(KilledError):
                prepare(root, SPEC, grown, [CLS, PATCHES])
        prepare(root, SPEC, grown, [CLS, PATCHES])
        here = {name: data for name, data in contents(folder).items() if not name.endswith(".partial")}
        assert here == contents(calm)
        if not trap.sprung:
            break
    assert 10 < at < 499


def test_an_entry_without_mapping_serves_also_when_others_were_mapped_meanwhile(tmp_path: Path) -> None:
    folder = prepare(tmp_path, SPEC, make_manifest(["a"]), [CLS])
    killed = make_manifest(["a", "b", "c"])
    entry = {"kind": "rows", "start": 16, "stop": 18, "manifest": killed.short}
    files.create_exclusive(ledger.entry_path(folder, 2), files.sealed(entry))
    assert ledger.add_rows(folder, make_manifest(["a", "b", "d"]), dict).tolist() == [0, 32, 33]
    assert ledger.add_rows(folder, killed, dict).tolist() == [0, 32, 16]
    assert ledger.read_ledger(folder).num_rows == 34


def test_growers_that_race_agree(tmp_path: Path) -> None:
    for number in range(5):
        root = tmp_path / str(number)
        folder = prepare(root, SPEC, make_manifest(named(5)), [CLS])
        manifests = [make_manifest(named(5 + extra)) for extra in (3, 4, 4, 20)]
        arrays = [[CLS, PATCHES], [PATCHES], [CLS], [ArraySpec(name="layers/1/cls", row_shape=(8,), dtype="float16")]]
        children = [fork(partial(prepare, root, SPEC, *job)) for job in zip(manifests, arrays)]
        assert [wait(child) for child in children] == [0] * 4
        book = ledger.read_ledger(folder)
        assert set(book.arrays) == {"cls", "patches", "layers/1/cls"}
        assert len(book.groups) == 3
        assert all(segment.start % 16 == 0 for segment in book.segments)
        rows = [row for segment in book.segments for row in range(segment.start, segment.stop)]
        assert len(rows) == len(set(rows))
        for manifest in manifests:
            mapped = ledger.read_rows(folder, manifest.short)
            assert len(set(mapped.tolist())) == len(manifest)
            assert set(mapped.tolist()) <= set(rows)
        write_missing(folder, 1, block_rows=16)
        check_blocks(folder, {1})
        for name in book.arrays:
            assert ShardedArray(folder / "data.zarr" / name).shape[0] == book.num_rows


def test_metadata_that_an_old_reader_of_the_ledger_wrote_is_brought_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(tmp_path, SPEC, make_manifest(named(5)), [CLS])
    late = ledger.read_ledger(folder)
    prepare(tmp_path, SPEC, make_manifest(named(40)), [CLS])
    ledger.write_metadata(folder, SPEC, late)
    assert ShardedArray(folder / "data.zarr" / "cls").shape == (51, 8)


def test_groups_hold_what_was_new_and_long_names_are_shortened(tmp_path: Path) -> None:
    folder = prepare(tmp_path, SPEC, make_manifest(named(3)), [CLS])
    many = [ArraySpec(name=f"layers/{k}/mean_patch", row_shape=(8,), dtype="float16") for k in range(1, 41)]
    prepare(tmp_path, SPEC, make_manifest(named(3)), [CLS, *many])
    book = ledger.read_ledger(folder)
    short = next(name for name in book.groups if name != "cls")
    assert len(short) < 120
    assert "/" not in short
    assert book.group_of("layers/40/mean_patch") == short
    assert [array.name for array in book.groups[short]] == [array.name for array in many]
    write_missing(folder, 1, block_rows=16)
    assert len(check_blocks(folder, {1})) == 2
    assert ledger.group_name(["cls", "layers/3/cls"]) == "cls+layers.3.cls"


def test_a_manifest_that_was_never_extracted_is_told(tmp_path: Path) -> None:
    folder = prepare(tmp_path, SPEC, make_manifest(named(3)), [CLS])
    with pytest.raises(
        IncompleteError, match="not extracted for manifest 12345678; run the same `featstore extract` again"
    ):
        ledger.read_rows(folder, "12345678")


def test_missing_and_damaged_entries_are_told(tmp_path: Path) -> None:
    folder = prepare(tmp_path, SPEC, make_manifest(named(3)), [CLS])
    entry = ledger.entry_path(folder, 1)
    data = entry.read_bytes()
    entry.write_bytes(data.replace(b'"stop": 3', b'"stop": 4'))
    with pytest.raises(CorruptError, match=r"000001.json: content does not match its digest"):
        ledger.read_ledger(folder)
    entry.write_bytes(data)
    ledger.entry_path(folder, 0).unlink()
    with pytest.raises(
        CorruptError, match=r"000000.json: this entry is missing though later ones are there; restore it"
    ):
        ledger.read_ledger(folder)


def test_a_damaged_mapping_is_told(tmp_path: Path) -> None:
    manifest = make_manifest(named(3))
    folder = prepare(tmp_path, SPEC, manifest, [CLS])
    path = ledger.rows_path(folder, manifest.short)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptError, match=r"parquet: damaged \(\w+\); restore it from a copy"):
        ledger.read_rows(folder, manifest.short)
    with pytest.raises(CorruptError, match="parquet: damaged"):
        ledger.preview_rows(folder, make_manifest(named(4)), dict)
