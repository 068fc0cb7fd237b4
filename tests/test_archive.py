"""Archived sets: the same rows in less space, and the same bytes back, whatever is killed or damaged on the way."""

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sets import (
    CLS,
    PATCHES,
    contents,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    states_of,
    values_of,
    write_block,
    write_missing,
    writer_of,
)

from featstore import files
from featstore.errors import ConfigError, CorruptError, StoreError
from featstore.objects import ObjectPath
from featstore.store import decisions, ledger, packed, shards
from featstore.store.archive import archive_set, archived, check_archive, unarchive_set
from featstore.store.commits import RowState
from featstore.store.layout import ArraySpec
from featstore.store.packed import ArchivedRows, check_not_archived
from featstore.store.reader import ShardedArray

GROUP = "cls+patches"
ROWS = 29  # two blocks of 16, the second with a short shard
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def _several_shards_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_LIMIT_BYTES", 8 * CLS.row_bytes)  # 8 rows of cls, 2 of patches
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here cuts the power, and the page cache outlives a kill


def new_set(root: Path, arrays: list[ArraySpec] | None = None, rows: int = ROWS) -> Path:
    folder = prepare(root, make_spec_of(block_rows=16), make_manifest(named(rows)), arrays or [CLS, PATCHES])
    write_missing(folder, 1, block_rows=16)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return new_set(tmp_path / "store")


def loaded(folder: Path, array: ArraySpec) -> np.ndarray:
    """Rows by way of ShardedArray, which reads what `zarr.json` says."""
    return ShardedArray(folder / "data.zarr" / array.name).load()


def packed_rows(folder: Path, array: ArraySpec) -> ArchivedRows:
    import json

    home = folder / "data.zarr" / array.name
    return ArchivedRows(home, json.loads((home / "zarr.json").read_bytes()))


def wanted(array: ArraySpec, rows: int = ROWS) -> np.ndarray:
    return values_of(array, 0, rows, 1)


def words(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values).tobytes()


def raw_shards(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "data.zarr").rglob("c/**/*") if path.is_file())


def packed_shards(folder: Path) -> list[Path]:
    return sorted((folder / "data.zarr").rglob("c.[0-9]*"))


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


KINDS = [
    ("zstd", "float16"),
    ("zstd", "float32"),
    ("zstd", "bfloat16"),
    ("zstd", "int8"),
    ("pcodec", "float16"),
    ("pcodec", "float32"),
    ("pcodec", "bfloat16"),
]


@pytest.mark.parametrize(("codec", "dtype"), KINDS)
def test_there_and_back_gives_the_same_bytes(tmp_path: Path, codec: str, dtype: str) -> None:
    import ml_dtypes  # noqa: F401 - makes numpy know bfloat16

    arrays = [replace(CLS, dtype=dtype), replace(PATCHES, dtype=dtype), replace(CLS, name="layers/3/cls", dtype=dtype)]
    folder = new_set(tmp_path, arrays)
    before = contents(folder)
    seen: list[int] = []
    facts = archive_set(folder, codec=codec, advance=seen.append)
    assert raw_shards(folder) == []
    sizes = [path.stat().st_size for path in packed_shards(folder)]
    assert (facts["codec"], facts["bytes"]) == (codec, sum(sizes))
    assert facts["raw_bytes"] == sum(len(data) for name, data in before.items() if "/c/" in name)
    assert facts["ratio"] == facts["raw_bytes"] / facts["bytes"]
    assert 0 < sum(seen) <= facts["raw_bytes"]
    assert archived(folder) is not None
    assert list(check_archive(folder, deep=True)) == []
    for array in arrays:
        rows = packed_rows(folder, array)
        out = np.empty((ROWS, *array.row_shape), rows.dtype)
        rows.read(0, ROWS, out, True)
        assert words(out) == words(wanted(array))
        picked = np.array([28, 0, 3, 28, 17])
        assert words(rows.gather(picked, None, False)) == words(wanted(array)[picked])
    unarchive_set(folder, advance=seen.append)
    assert contents(folder) == before
    assert archived(folder) is None


@pytest.mark.parametrize(("codec", "dtype"), KINDS)
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
def test_stock_readers_open_archives(tmp_path: Path, codec: str, dtype: str) -> None:
    import tensorstore
    import zarr

    from featstore.store.bfloat16 import register

    register()
    array = replace(CLS, dtype=dtype)
    folder = new_set(tmp_path, [array])
    archive_set(folder, codec=codec)
    opened: Any = zarr.open_group(folder / "data.zarr", mode="r")["cls"]
    # pcodec does not know bfloat16: other readers see its bit patterns.
    assert opened.dtype.name == ("uint16" if (codec, dtype) == ("pcodec", "bfloat16") else dtype)
    assert words(opened[:]) == words(wanted(array))
    if codec == "zstd":
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "data.zarr" / "cls")}}
        assert words(tensorstore.open(store).result().read().result()) == words(wanted(array))


def test_our_chunks_are_what_zarr_writes(tmp_path: Path) -> None:
    """zarr-python, told to write the same array, makes the same metadata and the same shards."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    folder = new_set(tmp_path / "ours", [CLS])
    archive_set(folder, level=3)
    theirs: Any = zarr.create_array(
        tmp_path / "theirs",
        shape=(ROWS, 8),
        chunks=(8, 8),
        shards=(8, 8),
        dtype="float16",
        fill_value=np.nan,
        compressors=[BloscCodec(cname="zstd", clevel=3, shuffle="shuffle", typesize=2), Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("row", "dim"),
        attributes={packed.ATTRIBUTE: {"codec": "zstd", "level": 3, "dtype": "float16"}},
    )
    theirs[:] = wanted(CLS)
    ours = folder / "data.zarr" / "cls"
    assert files.json.loads((ours / "zarr.json").read_bytes()) == files.json.loads(
        (tmp_path / "theirs" / "zarr.json").read_bytes()
    )
    names = [f"c.{shard}.0" for shard in range(4)]
    assert sorted(path.name for path in ours.glob("c*")) == names
    for name in names[:3]:  # the last one is padded with what was there, by zarr with the fill value's bits
        assert (ours / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_failed_rows_keep_their_bits(tmp_path: Path) -> None:
    folder = prepare(tmp_path, make_spec_of(block_rows=16), make_manifest(named(3)), [CLS])
    values = np.array(values_of(CLS, 0, 3, 1))
    values[1] = np.frombuffer(b"\x01\x7e", np.float16)[0]  # a NaN with a payload
    with writer_of(folder, "cls", 0) as writer:
        writer.append({"cls": values}, [*states_of(1, 1), RowState("0" * 32, "unreadable"), *states_of(1, 1)])
        assert writer.commit()
    before = contents(folder)
    for codec in packed.CODECS:
        archive_set(folder, codec=codec)
        assert words(packed_rows(folder, CLS).gather(np.arange(3), None, False)) == words(values)
        unarchive_set(folder)
        assert contents(folder) == before


def test_archiving_twice_is_harmless_and_keeps_the_codec(folder: Path) -> None:
    facts = archive_set(folder, codec="pcodec", level=4)
    after = contents(folder)
    assert archive_set(folder) == facts
    assert archive_set(folder, codec="pcodec") == facts
    assert contents(folder) == after
    with pytest.raises(ConfigError, match="with pcodec level 4; leave --codec and --level out"):
        archive_set(folder, codec="zstd")
    with pytest.raises(ConfigError, match="with pcodec level 4"):
        archive_set(folder, level=5)


def test_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    with pytest.raises(StoreError, match="is not archived; there is nothing to bring back"):
        unarchive_set(folder)
    with pytest.raises(ConfigError, match="unknown codec 'lz4'; known: zstd, pcodec"):
        archive_set(folder, codec="lz4")
    with pytest.raises(ConfigError, match="--level of pcodec is 1 to 12, got 13"):
        archive_set(folder, codec="pcodec", level=13)
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "numcodecs.pcodec", None)
        with pytest.raises(StoreError, match="needs the package pcodec: pip install pcodec"):
            archive_set(folder, codec="pcodec")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))  # type: ignore[attr-defined]
        with pytest.raises(StoreError, match=r"archiving needs about .* GB beside what is there, 1e-07 GB are free"):
            archive_set(folder)
    remote: Any = ObjectPath.parse("s3://bucket/set")
    with pytest.raises(StoreError, match="sets of an object store cannot change their form in place"):
        archive_set(remote)
    assert contents(folder) == before
    integers = new_set(tmp_path / "integers", [replace(CLS, dtype="int8")])
    with pytest.raises(ConfigError, match=r"pcodec does not compress int8 \(array cls\); use --codec zstd"):
        archive_set(integers, codec="pcodec")


def test_unarchiving_checks_the_room_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive_set(folder)
    after = contents(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="unarchiving needs about"):
        unarchive_set(folder)
    assert contents(folder) == after


@pytest.mark.parametrize("state", ["none", "half", "intent", "no rows"])
def test_only_complete_sets_are_archived(tmp_path: Path, state: str) -> None:
    folder = prepare(tmp_path, make_spec_of(block_rows=16), make_manifest(named(ROWS)), [CLS])
    if state != "none":
        write_block(folder, "cls", 0, 1)
    if state == "intent":
        write_block(folder, "cls", 1, 1)
        decisions.decide(folder, "cls", 1, "attempt")
    if state == "no rows":
        shutil.rmtree(folder / "ledger")
        ledger.add_arrays(folder, [CLS])
    before = contents(folder)
    with pytest.raises(StoreError, match="only complete sets are archived, and this one lacks"):
        archive_set(folder)
    assert contents(folder) == before


def test_writers_are_kept_away_from_the_first_step_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_not_archived(folder)
    monkeypatch.setattr("featstore.store.archive._pack", lambda *_: pytest.fail("reached"))
    with contextlib.suppress(pytest.fail.Exception):
        archive_set(folder)
    with pytest.raises(StoreError, match=r"is archived .* run `featstore unarchive` on it first"):
        check_not_archived(folder)
    monkeypatch.undo()
    unarchive_set(folder)  # gives up what was begun
    check_not_archived(folder)


def test_metadata_of_both_forms_is_what_the_ledger_asks_for(folder: Path) -> None:
    spec, book = ledger.read_spec(folder), ledger.read_ledger(folder)
    raw = ledger.wanted_metadata(folder, spec, book)
    archive_set(folder)
    wanted = ledger.wanted_metadata(folder, spec, book)
    assert [path for path in wanted if wanted[path] != raw[path]] == [
        folder / "data.zarr" / array.name / "zarr.json" for array in (CLS, PATCHES)
    ]
    for path, data in wanted.items():
        assert path.read_bytes() == data


@pytest.mark.realdata
def test_ratio_of_real_features(shared_data: Path, tmp_path: Path) -> None:
    with np.load(shared_data / "features" / "cxr_mobilenetv2.npz", allow_pickle=False) as data:
        values = data["features"][:512].astype(np.float16)
    array = ArraySpec(name="cls", row_shape=(values.shape[1],), dtype="float16", shard_rows=256, chunk_rows=128)
    folder = prepare(tmp_path, make_spec_of(block_rows=256), make_manifest(named(512)), [array])
    for block in range(2):
        with writer_of(folder, "cls", block) as writer:
            writer.append({"cls": values[block * 256 : block * 256 + 256]}, states_of(256, 1))
            assert writer.commit()
    assert archive_set(folder)["ratio"] > 1.2
    np.testing.assert_array_equal(packed_rows(folder, array).gather(np.arange(512), None, False), values)
    unarchive_set(folder)
    assert archive_set(folder, codec="pcodec")["ratio"] > 1.35


def test_the_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_upgrade import run

    root, before = folder.parents[2], contents(folder)
    assert "times smaller (pcodec, level 3)" in run(
        capsys, root, "archive", "demo/tiny", "--codec", "pcodec", "--level", "3"
    )
    assert "leave --codec and --level out" in run(capsys, root, "archive", "demo/tiny", "--codec", "zstd", code=2)
    assert "of raw shards are back, as they were committed" in run(capsys, root, "unarchive", "demo/tiny")
    facts = files.json.loads(run(capsys, root, "archive", "demo/tiny", "--json"))
    assert (facts["codec"], facts["level"]) == ("zstd", 5)
    (folder / "archive.json").unlink()  # by hand; what was begun still says how to decode
    assert files.json.loads(run(capsys, root, "unarchive", "demo/tiny", "--json"))["codec"] is None
    files.create_exclusive(folder / "archiving.json", files.sealed({"codec": "zstd", "level": 5}))
    assert "the unfinished archiving is given up" in run(capsys, root, "unarchive", "demo/tiny")
    assert contents(folder) == before


def test_compact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_upgrade import run

    root = folder.parents[2]
    said = run(capsys, root, "compact", "demo/tiny", "--arrays", "cls")
    assert f"cls copied ({ROWS} rows)" in said
    assert "cls is current" in run(capsys, root, "compact")
    rows = files.json.loads(run(capsys, root, "compact", "--json"))
    assert [copy["array"] for copy in rows[0]["arrays"]] == ["cls"]
    archive_set(folder)
    assert not (folder / "compact.zarr").exists()
    assert "nothing gains by a copy" in run(capsys, root, "compact")


def test_the_set_as_a_whole_while_it_is_archived(folder: Path) -> None:
    """Readers, `verify` and writers, by way of the store."""
    from featstore.store.catalog import Store
    from featstore.store.verify import repair_set, verify_set

    store = Store(folder.parents[2])
    before = contents(folder)
    for codec in packed.CODECS:
        archive_set(folder, codec=codec)
        fs = store["demo", "tiny"]
        for array in (CLS, PATCHES):
            np.testing.assert_array_equal(fs.array(array.name).load(verify=True), wanted(array))
            np.testing.assert_array_equal(fs.array(array.name)[[28, 0, 3, 3]], wanted(array)[[28, 0, 3, 3]])
        reader = ShardedArray(folder / "data.zarr" / "cls")
        assert not reader.is_mapped
        assert verify_set(store, store.entry("demo/tiny"), deep=True).ok
        flip(folder / "archive.json", 200)
        assert "archive.json" in [item.place for item in verify_set(store, store.entry("demo/tiny")).problems]
        flip(folder / "archive.json", 200)
        flip(folder / "data.zarr" / "cls" / "c.2.0", 50)
        verdict = verify_set(store, store.entry("demo/tiny"), deep=True)
        assert [(item.place, item.group, item.block) for item in verdict.problems] == [
            ("data.zarr/cls/c.2.0", GROUP, 1)
        ]
        assert repair_set(verdict).num_blocks == 1
        unarchive_set(folder)
        with pytest.raises(CorruptError, match=r"c\.0\.0 is missing; open the set again if it was unarchived"):
            reader.load()
        write_missing(folder, 1, block_rows=16)
        assert contents(folder) == before


def test_archived_sets_do_not_grow(folder: Path) -> None:
    archive_set(folder)
    after = contents(folder)
    manifest = make_manifest(named(ROWS))
    assert len(ledger.add_rows(folder, manifest, dict)) == ROWS  # nothing new: nothing is written
    ledger.add_arrays(folder, [CLS])
    ledger.write_metadata(folder, ledger.read_spec(folder), ledger.read_ledger(folder))
    refusal = "run `featstore unarchive` on it first"
    with pytest.raises(StoreError, match=refusal):
        ledger.add_rows(folder, make_manifest(named(ROWS + 1)), dict)
    with pytest.raises(StoreError, match=refusal):
        ledger.add_arrays(folder, [replace(CLS, name="mean_patch")])
    with pytest.raises(StoreError, match=refusal), writer_of(folder, GROUP, 0):
        pass
    assert contents(folder) == after


def test_bfloat16_by_pcodec_is_bfloat16_to_us(tmp_path: Path) -> None:
    import ml_dtypes

    array = replace(CLS, dtype="bfloat16")
    folder = new_set(tmp_path, [array])
    archive_set(folder, codec="pcodec")
    rows = ShardedArray(folder / "data.zarr" / "cls").load()
    assert rows.dtype == ml_dtypes.bfloat16
    assert words(rows) == words(wanted(array))
