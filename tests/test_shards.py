"""Shard files against zarr-python and tensorstore: equal bytes, equal metadata, every damage found."""

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from featstore.errors import ConfigError, CorruptError, StoreError
from featstore.store.bfloat16 import BFloat16, register
from featstore.store.shards import (
    ShardSummary,
    ShardWriter,
    array_metadata,
    chunk_rows_for,
    group_metadata,
    numpy_dtype,
    read_summary,
    shard_key,
    shard_rows_for,
)

DTYPES = ["float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64"] + [
    "uint8",
    "uint16",
    "uint32",
    "uint64",
]
LAYOUT: dict[str, Any] = {"row_shape": (6,), "dtype": "float16", "chunk_rows": 4, "shard_rows": 16}


def values(num_rows: int, row_shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Random bits, NaN payloads and infinities included, so that nothing but a copy of bytes passes."""
    kind = numpy_dtype(dtype)
    count = num_rows * math.prod(row_shape) * kind.itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(count), kind).reshape(num_rows, *row_shape)


def write(path: Path, rows: np.ndarray, **changes: Any) -> ShardSummary:
    with ShardWriter(path, **{**LAYOUT, **changes}) as writer:
        writer.append(rows)
    assert writer.summary is not None
    return writer.summary


def zarr_array(
    path: Path, shape: tuple[int, ...], dtype: str, chunk_rows: int, shard_rows: int, **options: Any
) -> "zarr.Array[Any]":
    register()
    return zarr.create_array(
        path,
        shape=shape,
        dtype=BFloat16() if dtype == "bfloat16" else dtype,
        chunks=(chunk_rows, *shape[1:]),
        shards=(shard_rows, *shape[1:]),
        compressors=[Crc32cCodec()],
        fill_value=float("nan") if "float" in dtype else 0,
        config={"write_empty_chunks": True},
        **options,
    )


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()


class TestBytes:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 15, 16])
    def test_a_shard_has_the_bytes_that_zarr_writes(self, tmp_path: Path, dtype: str, num_rows: int) -> None:
        rows = values(num_rows, (6,), dtype)
        write(tmp_path / "ours", rows, dtype=dtype)
        array = zarr_array(tmp_path / "theirs", rows.shape, dtype, 4, 16)
        array[:] = rows
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs/c/0/0").read_bytes()

    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_any_layout_and_any_batches_give_the_bytes_that_zarr_writes(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        chunk_rows = data.draw(st.integers(1, 5), "chunk rows")
        shard_rows = chunk_rows * data.draw(st.integers(1, 4), "chunks")
        row_shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=3), "row shape"))
        dtype = data.draw(st.sampled_from(DTYPES), "dtype")
        num_rows = data.draw(st.integers(1, 3 * shard_rows), "rows")
        cuts = data.draw(st.lists(st.integers(0, shard_rows), max_size=4).map(sorted), "batches")
        rows = values(num_rows, row_shape, dtype)
        folder = tmp_path_factory.mktemp("property")
        array = zarr_array(folder / "theirs", rows.shape, dtype, chunk_rows, shard_rows)
        array[...] = rows
        for shard in range(-(-num_rows // shard_rows)):  # the last one is partial more often than not
            part = rows[shard * shard_rows : (shard + 1) * shard_rows]
            key = shard_key(shard, rows.ndim)
            layout: dict[str, Any] = {"row_shape": row_shape, "dtype": dtype}
            with ShardWriter(folder / "ours" / key, chunk_rows=chunk_rows, shard_rows=shard_rows, **layout) as writer:
                for batch in np.split(part, cuts):
                    writer.append(batch)
            assert (folder / "ours" / key).read_bytes() == (folder / "theirs" / key).read_bytes()

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
    def test_tensorstore_reads_our_shards_and_writes_the_same_bytes(self, tmp_path: Path, dtype: str) -> None:
        rows = values(22, (3, 2), dtype)
        layout: dict[str, Any] = {"row_shape": (3, 2), "dtype": dtype, "chunk_rows": 4, "shard_rows": 16}
        metadata = array_metadata(num_rows=22, attributes={}, **layout)
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours/zarr.json").write_text(json.dumps(metadata))
        for shard in range(2):
            write(tmp_path / "ours" / shard_key(shard, 3), rows[16 * shard : 16 * shard + 16], **layout)
        read = tensorstore.open(spec(tmp_path / "ours")).result().read().result()
        assert read.dtype == rows.dtype
        assert bits(read) == bits(rows)

        theirs = {**spec(tmp_path / "theirs"), "metadata": metadata, "create": True}
        tensorstore.open(theirs).result()[...] = rows
        for shard in range(2):
            key = shard_key(shard, 3)
            assert (tmp_path / "theirs" / key).read_bytes() == (tmp_path / "ours" / key).read_bytes()

    def test_foreign_byte_order_and_strided_rows_are_stored_as_their_values(self, tmp_path: Path) -> None:
        rows = np.arange(60, dtype=np.float16).reshape(10, 6)
        plain = write(tmp_path / "plain", rows)
        assert write(tmp_path / "swapped", rows.astype(">f2")) == plain
        assert write(tmp_path / "strided", np.asfortranarray(rows)) == plain

    def test_bfloat16_comes_as_its_type_or_as_its_bits(self, tmp_path: Path) -> None:
        rows = values(7, (6,), "bfloat16")
        assert rows.dtype == ml_dtypes.bfloat16
        typed = write(tmp_path / "typed", rows, dtype="bfloat16")
        assert write(tmp_path / "bits", rows.view(np.uint16), dtype="bfloat16") == typed
        padding = np.frombuffer((tmp_path / "typed").read_bytes(), ml_dtypes.bfloat16, 6, offset=4 * 12 + 4 + 3 * 12)
        assert np.isnan(padding.astype(np.float32)).all()

    def test_memory_is_one_chunk_whatever_the_shard(self, tmp_path: Path) -> None:
        batch = np.zeros((100, 768), np.float16)
        chunk_bytes = 256 * 768 * 2
        tracemalloc.start()
        with ShardWriter(tmp_path / "s", row_shape=(768,), dtype="float16", chunk_rows=256, shard_rows=16384) as writer:
            for _ in range(160):
                writer.append(batch)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (tmp_path / "s").stat().st_size > 60 * chunk_bytes
        assert peak < 2 * chunk_bytes


class TestMetadata:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("row_shape", [(), (6,), (3, 2)])
    def test_array_metadata_is_what_zarr_writes(self, tmp_path: Path, dtype: str, row_shape: tuple[int, ...]) -> None:
        attributes = {"model": "tiny", "sizes": [1, 2]}
        zarr_array(tmp_path / "z", (21, *row_shape), dtype, 4, 16, attributes=attributes)
        ours = array_metadata(
            num_rows=21, row_shape=row_shape, dtype=dtype, chunk_rows=4, shard_rows=16, attributes=attributes
        )
        assert ours == json.loads((tmp_path / "z/zarr.json").read_text())

    def test_names_of_axes_and_an_empty_array_are_what_zarr_writes(self, tmp_path: Path) -> None:
        zarr_array(tmp_path / "z", (0, 6), "float16", 4, 16, dimension_names=("row", "channel"))
        ours = array_metadata(num_rows=0, attributes={}, dimension_names=("row", "channel"), **LAYOUT)
        assert ours == json.loads((tmp_path / "z/zarr.json").read_text())

    def test_group_metadata_is_what_zarr_writes(self, tmp_path: Path) -> None:
        zarr.create_group(tmp_path / "g", attributes={"schema": 1})
        assert group_metadata({"schema": 1}) == json.loads((tmp_path / "g/zarr.json").read_text())

    def test_keys_are_those_of_zarr(self) -> None:
        assert [shard_key(3, ndim) for ndim in (1, 2, 3)] == ["c/3", "c/3/0", "c/3/0/0"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"dtype": "float8"}, r"unknown stored dtype 'float8'; known: bfloat16, float16"),
            ({"row_shape": (3, 0)}, r"every axis of a row needs at least one element, row shape is \(3, 0\)"),
            ({"chunk_rows": 5}, "shard rows must be a positive multiple of chunk rows, got 16 and 5"),
            ({"chunk_rows": 0}, "got 16 and 0"),
            ({"num_rows": -1}, "an array has 0 rows or more, got -1"),
            ({"dimension_names": ("row",)}, r"2 axes need as many names, got \('row',\)"),
        ],
    )
    def test_layouts_that_cannot_be(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            array_metadata(**{"num_rows": 5, "attributes": {}, **LAYOUT, **change})


class TestSizes:
    @pytest.mark.parametrize(
        ("row_bytes", "rows"), [(768, 512), (1536, 256), (2048, 256), (8192, 64), (500_000, 1), (10**9, 1), (1, 65536)]
    )
    def test_chunks_are_near_384_kib(self, row_bytes: int, rows: int) -> None:
        assert chunk_rows_for(row_bytes, 65536) == rows
        assert chunk_rows_for(row_bytes, 8) == min(rows, 8)

    @given(row_bytes=st.integers(1, 2**29), log_block=st.integers(0, 14))
    def test_shards_divide_blocks_and_chunks_divide_shards(self, row_bytes: int, log_block: int) -> None:
        block_rows = 2**log_block
        shard_rows = shard_rows_for(row_bytes, block_rows)
        chunk_rows = chunk_rows_for(row_bytes, shard_rows)
        assert block_rows % shard_rows == 0
        assert shard_rows % chunk_rows == 0
        assert shard_rows == 1 or shard_rows * row_bytes <= 2**30
        assert shard_rows == block_rows or 2 * shard_rows * row_bytes > 2**30
        for other in (chunk_rows // 2, chunk_rows * 2):
            if 1 <= other <= shard_rows:
                target = math.log2(384 * 1024)
                nearer = abs(math.log2(chunk_rows * row_bytes) - target) <= abs(math.log2(other * row_bytes) - target)
                assert nearer

    def test_wrong_sizes(self) -> None:
        with pytest.raises(ConfigError, match="block rows must be a power of two, got 3000; try 2048"):
            shard_rows_for(1536, 3000)
        with pytest.raises(ConfigError, match="row_bytes must be at least 1, got 0"):
            chunk_rows_for(0, 16)
        with pytest.raises(ConfigError, match="block_rows must be at least 1, got 0"):
            shard_rows_for(1536, 0)


class TestSummary:
    @pytest.mark.parametrize("num_rows", [1, 4, 5, 16])
    def test_the_summary_is_that_of_the_bytes(self, tmp_path: Path, num_rows: int) -> None:
        summary = write(tmp_path / "s", values(num_rows, (6,), "float16"))
        content = (tmp_path / "s").read_bytes()
        num_chunks = -(-num_rows // 4)
        words = b"".join(content[52 * i + 48 : 52 * i + 52] for i in range(num_chunks))
        assert summary == ShardSummary(
            size=len(content),
            num_rows=num_rows,
            index_crc=google_crc32c.value(content[-68:-4]),
            data_crc=google_crc32c.value(words),
        )
        assert words[:4] == google_crc32c.value(content[:48]).to_bytes(4, "little")
        for deep in (False, True):
            assert read_summary(tmp_path / "s", deep=deep, num_rows=num_rows, **LAYOUT) == summary
            assert read_summary(tmp_path / "s", deep=deep, **LAYOUT).num_rows == 4 * num_chunks

    def test_other_rows_have_another_data_crc(self, tmp_path: Path) -> None:
        one, two = (write(tmp_path / str(seed), values(9, (6,), "float16", seed)) for seed in (1, 2))
        assert one.index_crc == two.index_crc
        assert one.data_crc != two.data_crc

    def test_every_flipped_bit_is_found(self, tmp_path: Path) -> None:
        write(tmp_path / "s", values(6, (6,), "float16"))
        content = (tmp_path / "s").read_bytes()
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            (tmp_path / "s").write_bytes(damaged)
            place = f"chunk {position // 52} " if position < 104 else "index checksum is 0x"
            with pytest.raises(CorruptError, match=f"shard .*s.{{1,2}}{place}"):
                read_summary(tmp_path / "s", deep=True, **LAYOUT)

    def test_without_deep_the_index_is_checked_and_the_rows_are_not(self, tmp_path: Path) -> None:
        summary = write(tmp_path / "s", values(6, (6,), "float16"))
        damage(tmp_path / "s", 0)
        assert read_summary(tmp_path / "s", deep=False, num_rows=6, **LAYOUT) == summary
        damage(tmp_path / "s", -1)
        with pytest.raises(CorruptError, match="index checksum"):
            read_summary(tmp_path / "s", deep=False, **LAYOUT)

    @pytest.mark.parametrize("deep", [False, True])
    def test_every_other_length_is_found(self, tmp_path: Path, deep: bool) -> None:
        write(tmp_path / "s", values(11, (6,), "float16"))
        content = (tmp_path / "s").read_bytes()
        for size in (*range(len(content)), len(content) + 1):
            (tmp_path / "s").write_bytes((content + b"x")[:size])
            message = rf"has {size} bytes, which no whole number of chunks from 1 to 4 gives: truncated|index checksum"
            with pytest.raises(CorruptError, match=message):
                read_summary(tmp_path / "s", deep=deep, **LAYOUT)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda entries: entries[[1, 0, 2, 3]], "chunk 0 lies at byte 52 with 52 bytes, not in order"),
            (
                lambda entries: np.where(np.arange(4)[:, None] == 1, 2**64 - 1, entries),
                "chunk 1 is absent though a later",
            ),
        ],
    )
    def test_a_valid_index_of_another_order_is_refused(
        self, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], message: str
    ) -> None:
        write(tmp_path / "s", values(16, (6,), "float16"))
        content = (tmp_path / "s").read_bytes()
        index = change(np.frombuffer(content[-68:-4], "<u8").reshape(4, 2)).astype("<u8").tobytes()
        (tmp_path / "s").write_bytes(content[:-68] + index + google_crc32c.value(index).to_bytes(4, "little"))
        with pytest.raises(CorruptError, match=message):
            read_summary(tmp_path / "s", deep=False, **LAYOUT)

    def test_another_number_of_rows_and_no_file(self, tmp_path: Path) -> None:
        write(tmp_path / "s", values(6, (6,), "float16"))
        with pytest.raises(CorruptError, match="holds 2 chunks of 4 rows, which 9 rows do not fill"):
            read_summary(tmp_path / "s", deep=False, num_rows=9, **LAYOUT)
        with pytest.raises(FileNotFoundError):
            read_summary(tmp_path / "t", deep=False, **LAYOUT)


class TestWriter:
    def test_wrong_rows_change_nothing(self, tmp_path: Path) -> None:
        rows = values(16, (6,), "float16")
        with ShardWriter(tmp_path / "s", **LAYOUT) as writer:
            writer.append(rows[:3])
            with pytest.raises(ConfigError, match=r"rows of shape \(B, 6,\) must come, got \(3, 5\)"):
                writer.append(rows[:3, :5])
            with pytest.raises(ConfigError, match=r"rows of shape .* must come, got \(\)"):
                writer.append(np.zeros((), np.float16))
            with pytest.raises(ConfigError, match="rows of dtype float16 must come, got float32; cast them first"):
                writer.append(rows[:3].astype(np.float32))
            with pytest.raises(ConfigError, match="14 rows for a shard with 13 of 16 left; start the next"):
                writer.append(rows[:14])
            writer.append(rows[3:3])
            writer.append(rows[3:])
        assert writer.summary == write(tmp_path / "once", rows)

    def test_bits_are_no_rows_of_another_dtype(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path / "s", **LAYOUT) as writer:
            with pytest.raises(ConfigError, match="rows of dtype float16 must come, got uint16"):
                writer.append(np.zeros((1, 6), np.uint16))
            writer.append(np.zeros((1, 6), np.float16))

    def test_an_exception_removes_the_file(self, tmp_path: Path) -> None:
        def fail() -> None:
            with ShardWriter(tmp_path / "s", **LAYOUT) as writer:
                writer.append(values(9, (6,), "float16"))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_write_removes_the_file_and_closes_the_writer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(rows: np.ndarray) -> None:
            raise OSError(28, "No space left on device")

        writer = ShardWriter(tmp_path / "s", **LAYOUT)
        monkeypatch.setattr(writer, "_write_chunk", full)
        with pytest.raises(OSError, match="No space left"):
            writer.append(values(9, (6,), "float16"))
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(StoreError, match=r"the writer of shard .*s is closed; open a new one under another name"):
            writer.append(values(1, (6,), "float16"))
        with pytest.raises(StoreError, match="is closed"):
            writer.close()

    def test_a_failed_sync_removes_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(descriptor: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("featstore.store.shards.os.fsync", broken)
        with pytest.raises(OSError, match="Input/output error"):
            write(tmp_path / "s", values(9, (6,), "float16"))
        assert list(tmp_path.iterdir()) == []

    def test_nothing_is_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "s").write_text("kept")
        with pytest.raises(StoreError, match="s exists, and a shard is never overwritten; write under another name"):
            ShardWriter(tmp_path / "s", **LAYOUT)
        assert (tmp_path / "s").read_text() == "kept"

    def test_an_empty_shard_is_refused_and_removed(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="got no row, and a shard holds at least one"):
            write(tmp_path / "s", values(0, (6,), "float16"))
        assert list(tmp_path.iterdir()) == []

    def test_closing_twice_is_closing_once_and_discarding_then_does_nothing(self, tmp_path: Path) -> None:
        writer = ShardWriter(tmp_path / "c/0/0", **LAYOUT)
        writer.append(values(2, (6,), "float16"))
        assert writer.close() == writer.close()
        writer.discard()
        assert read_summary(tmp_path / "c/0/0", deep=True, num_rows=2, **LAYOUT) == writer.summary


class TestBfloat16:
    def test_registering_again_is_harmless(self) -> None:
        for _ in range(2):
            register()
        assert zarr.dtype.data_type_registry.match_dtype(np.dtype(ml_dtypes.bfloat16)) == BFloat16()

    @pytest.mark.parametrize("shards", [None, (8, 3)])
    def test_zarr_and_tensorstore_agree_on_bytes_and_metadata(
        self, tmp_path: Path, shards: tuple[int, int] | None
    ) -> None:
        register()
        rows = values(8, (3,), "bfloat16")
        array = zarr.create_array(
            tmp_path / "z",
            shape=(8, 3),
            chunks=(4, 3),
            shards=shards,
            dtype=rows.dtype,
            compressors=None,
            fill_value=-1.5,
        )
        array[:] = rows
        reopened = zarr.open_array(tmp_path / "z", mode="r")
        assert reopened.dtype == rows.dtype
        assert float(reopened.fill_value) == -1.5
        assert bits(reopened[:]) == bits(rows)
        assert bits(reopened.oindex[np.array([5, 1])]) == bits(rows[[5, 1]])
        assert bits(tensorstore.open(spec(tmp_path / "z")).result().read().result()) == bits(rows)

    @pytest.mark.parametrize(
        ("fill", "stored"), [("nan", "NaN"), ("inf", "Infinity"), ("-inf", "-Infinity"), ("0.5", 0.5)]
    )
    def test_fill_values_survive_both_ways(self, tmp_path: Path, fill: str, stored: object) -> None:
        register()
        zarr.create_array(tmp_path / "z", shape=(2, 2), dtype=BFloat16(), fill_value=float(fill))
        assert json.loads((tmp_path / "z/zarr.json").read_text())["fill_value"] == stored
        read = np.asarray(zarr.open_array(tmp_path / "z")[:])
        np.testing.assert_array_equal(read.astype(float), np.full((2, 2), float(fill)))

    def test_both_byte_orders_are_stored_as_their_values(self, tmp_path: Path) -> None:
        register()
        rows = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16)
        for name, data in (("little", rows), ("big", rows.astype(rows.dtype.newbyteorder(">")))):
            array = zarr.create_array(
                tmp_path / name, data=data, serializer=zarr.codecs.BytesCodec(endian=name), compressors=None
            )
            assert bits(np.asarray(array[:]).astype(rows.dtype)) == bits(rows)
            assert (tmp_path / name / "c/0").read_bytes() == (
                rows.view(np.uint16).astype(f"{'<>'[name == 'big']}u2")
            ).tobytes()

    def test_fill_values_may_be_bit_patterns(self) -> None:
        scalar = BFloat16().from_json_scalar("0x7fc1", zarr_format=3)
        assert np.asarray(scalar).view(np.uint16) == 0x7FC1

    def test_what_is_not_bfloat16_is_refused(self, tmp_path: Path) -> None:
        register()
        kind = BFloat16()
        with pytest.raises(ValueError, match="bfloat16 exists in zarr v3 only"):
            zarr.create_array(tmp_path / "z", shape=(2,), dtype=kind, zarr_format=2)
        with pytest.raises(TypeError, match="a number must come for a bfloat16 scalar, got 'one'"):
            kind.cast_scalar("one")
        with pytest.raises(zarr.dtype.DataTypeValidationError, match="zarr v2 has no bfloat16"):
            BFloat16.from_json({"name": "bfloat16", "object_codec_id": None}, zarr_format=2)
        with pytest.raises(zarr.dtype.DataTypeValidationError, match="not 'bfloat16': 'float16'"):
            BFloat16.from_json("float16", zarr_format=3)
        with pytest.raises(zarr.dtype.DataTypeValidationError, match="not numpy's bfloat16: float16"):
            BFloat16.from_native_dtype(np.dtype(np.float16))
        assert (kind.item_size, float(kind.default_scalar())) == (2, 0.0)

    def test_without_ml_dtypes_the_message_says_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
        with pytest.raises(
            StoreError, match="bfloat16 rows need the package ml_dtypes, which is not installed: pip install"
        ):
            numpy_dtype("bfloat16")
        write(tmp_path / "s", np.zeros((3, 6), np.uint16), dtype="bfloat16")  # bits need no type

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(ConfigError, match="unknown stored dtype 'half'; known: bfloat16, float16, float32"):
            numpy_dtype("half")


def spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}


def damage(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
