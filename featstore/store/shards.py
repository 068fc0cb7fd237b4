"""One shard file of a sharded zarr v3 array: its metadata, its streaming writer, its check.

Only axis 0 is divided. A shard holds chunk 0 | chunk 1 | ... | index, every chunk being its little-endian rows followed
by their crc32c, the index being (offset, length) of every chunk followed by its own crc32c. All chunks have one
length, so a file's size says how many it holds and its index is known in advance: `ShardLayout` is that arithmetic,
and nothing else in the package knows about bytes. zarr-python, tensorstore and zarrs read these files as they are.
"""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped, UInt8

from featstore import files
from featstore.errors import ConfigError, CorruptError, StoreError
from featstore.objects import Place

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16  # offset and length, uint64 each
ABSENT = 2**64 - 1  # zarr's mark for a chunk that a shard does not hold
CHUNK_TARGET_BYTES = 384 * 1024  # smaller chunks slow stock readers down, larger ones make a checked gather dear
# Cold full loads gain up to 128 MiB; what decides here is the number of files: patches of 7B at 512 take 8.4 MB a row.
SHARD_LIMIT_BYTES = 2**30

# Storage type of each zarr data type and its fill value: NaN for floats, so that a row that was never
# written cannot pass for a feature, and 0 for integers. bfloat16 is handled as its bit pattern; numpy has no such type.
_DTYPES: dict[str, tuple[str, Any]] = {
    "bfloat16": ("<u2", 0x7FC0),
    "float16": ("<f2", np.nan),
    "float32": ("<f4", np.nan),
    "float64": ("<f8", np.nan),
    "int8": ("|i1", 0),
    "int16": ("<i2", 0),
    "int32": ("<i4", 0),
    "int64": ("<i8", 0),
    "uint8": ("|u1", 0),
    "uint16": ("<u2", 0),
    "uint32": ("<u4", 0),
    "uint64": ("<u8", 0),
}


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """Where every row of a shard lies. Rows have shape `row_shape` and the zarr data type `dtype`."""

    row_shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    shard_rows: int

    def __post_init__(self) -> None:
        _storage(self.dtype)
        if not all(size > 0 for size in self.row_shape):
            raise ConfigError(f"every axis of a row needs at least one element, row shape is {self.row_shape}")
        if self.chunk_rows < 1 or self.shard_rows < 1 or self.shard_rows % self.chunk_rows:
            raise ConfigError(
                f"shard rows must be a positive multiple of chunk rows, got {self.shard_rows} and {self.chunk_rows}"
            )

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """Little-endian numpy type of the bytes on disk (uint16 for bfloat16)."""
        return _storage(self.dtype)[0]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.storage_dtype.itemsize

    @property
    def stride(self) -> int:
        """Bytes from one chunk to the next: its rows and their checksum."""
        return self.chunk_rows * self.row_bytes + CRC_BYTES

    @property
    def num_chunks(self) -> int:
        """Chunks of a full shard."""
        return self.shard_rows // self.chunk_rows

    @property
    def index_bytes(self) -> int:
        return self.num_chunks * INDEX_ENTRY_BYTES + CRC_BYTES

    def index(self, num_chunks: int) -> bytes:
        """The index, checksum included, of a shard that holds its first `num_chunks` chunks."""
        return _index(self.num_chunks, self.stride, num_chunks)

    def check(self, tail: bytes, size: int, name: str) -> int:
        """Number of chunks in the shard file `name` of `size` bytes that ends in `tail` (at least its index).

        Raises:
            CorruptError: the size fits no number of chunks, the index fails its checksum, or it puts chunks elsewhere.
        """
        num_chunks, rest = divmod(size - self.index_bytes, self.stride)
        if rest or not 1 <= num_chunks <= self.num_chunks:
            raise CorruptError(
                f"shard {name} has {size} bytes, which no whole number of chunks from 1 to {self.num_chunks} gives: "
                f"truncated or of another layout ({self.stride} bytes a chunk); restore it or extract its rows again"
            )
        index = tail[-self.index_bytes :]
        if index != self.index(num_chunks):
            raise CorruptError(f"shard {name}: {self._index_fault(index, num_chunks)}; restore or extract it again")
        return num_chunks

    def _index_fault(self, index: bytes, num_chunks: int) -> str:
        stored, computed = int.from_bytes(index[-CRC_BYTES:], "little"), crc32c(index[:-CRC_BYTES])
        if stored != computed:
            return f"index checksum is {stored:#010x}, its bytes give {computed:#010x}"
        entries = np.frombuffer(index[:-CRC_BYTES], "<u8").reshape(-1, 2)
        wanted = np.frombuffer(self.index(num_chunks)[:-CRC_BYTES], "<u8").reshape(-1, 2)
        chunk = int((entries != wanted).any(axis=1).argmax())
        if entries[chunk, 0] == ABSENT:
            return f"chunk {chunk} is absent though a later one is present"
        offset, length = entries[chunk].tolist()
        return f"chunk {chunk} lies at byte {offset} with {length} bytes, not in order at a constant stride"

    def check_chunk(self, chunk: UInt8[np.ndarray, " stride"], number: int, name: str) -> int:
        """The checksum of one chunk, given with the checksum stored behind it; CorruptError where they differ."""
        stored, computed = int.from_bytes(chunk[-CRC_BYTES:].tobytes(), "little"), crc32c(chunk[:-CRC_BYTES])
        if stored != computed:
            raise CorruptError(
                f"shard {name}, chunk {number} (from its row {number * self.chunk_rows}): checksum is {stored:#010x}, "
                f"its bytes give {computed:#010x}; restore or extract it again"
            )
        return stored


@lru_cache(maxsize=64)
def _index(capacity: int, stride: int, num_chunks: int) -> bytes:
    entries = np.full((capacity, 2), ABSENT, "<u8")
    entries[:num_chunks, 0] = np.arange(num_chunks, dtype="<u8") * np.uint64(stride)
    entries[:num_chunks, 1] = stride
    raw = entries.tobytes()
    return raw + crc32c(raw).to_bytes(CRC_BYTES, "little")


def crc32c(data: bytes | UInt8[np.ndarray, " n"]) -> int:
    """Checksum of contiguous bytes, without a copy of them (the extension refuses writable memoryviews, not arrays)."""
    return int(google_crc32c.value(data))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The in-memory numpy type of a zarr data type; bfloat16 is the type that ml_dtypes adds to numpy.

    Raises:
        StoreError: bfloat16 without ml_dtypes.
        ConfigError: an unknown name.
    """
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise StoreError(
                "bfloat16 rows need the package ml_dtypes, which is not installed: pip install ml_dtypes, "
                "or store float16"
            ) from error
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return _storage(name)[0]


def _storage(name: str) -> tuple[np.dtype[Any], Any]:
    """Little-endian type on disk and fill value."""
    if name not in _DTYPES:
        raise ConfigError(f"unknown stored dtype {name!r}; known: {', '.join(sorted(_DTYPES))}")
    code, fill = _DTYPES[name]
    return np.dtype(code), fill


def chunk_rows_for(row_bytes: int, shard_rows: int) -> int:
    """Rows of a chunk: the power of two nearest 384 KiB (on a log scale), at least 1, at most the shard."""
    _require_positive(row_bytes=row_bytes, shard_rows=shard_rows)
    return min(1 << max(0, round(math.log2(CHUNK_TARGET_BYTES / row_bytes))), _power_of_two_below(shard_rows))


def shard_rows_for(row_bytes: int, block_rows: int, limit: int | None = None) -> int:
    """Rows of a shard: the largest power of two within block and limit (1 GiB), at least 1; it divides the block.

    Raises:
        ConfigError: block_rows is not a power of two.
    """
    _require_positive(row_bytes=row_bytes, block_rows=block_rows)
    if block_rows & (block_rows - 1):
        raise ConfigError(f"block rows must be a power of two, got {block_rows}; try {_power_of_two_below(block_rows)}")
    return min(block_rows, _power_of_two_below(max(1, (limit or SHARD_LIMIT_BYTES) // row_bytes)))


def _power_of_two_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}")


def shard_key(index: int, ndim: int) -> str:
    """Path of a shard below its array's folder: `c/3/0` for shard 3 of a 2-d array."""
    return "/".join(["c", str(index), *["0"] * (ndim - 1)])


def array_metadata(
    *,
    num_rows: int,
    row_shape: tuple[int, ...],
    dtype: str,
    chunk_rows: int,
    shard_rows: int,
    attributes: Mapping[str, Any],
    dimension_names: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """The `zarr.json` of an array of shape (num_rows, *row_shape), as zarr-python 3 itself would write it."""
    layout = ShardLayout(row_shape=row_shape, dtype=dtype, chunk_rows=chunk_rows, shard_rows=shard_rows)
    if num_rows < 0:
        raise ConfigError(f"an array has 0 rows or more, got {num_rows}")
    little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    # Endianness means nothing for one-byte types, and zarr leaves it out.
    rows_codec: dict[str, Any] = {"name": "bytes"} if layout.storage_dtype.itemsize == 1 else little
    sharding = {
        "chunk_shape": [chunk_rows, *row_shape],
        "codecs": [rows_codec, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    metadata: dict[str, Any] = {
        "shape": [num_rows, *row_shape],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *row_shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if "float" in dtype else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": dict(attributes),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    if dimension_names is not None:
        if len(dimension_names) != len(row_shape) + 1:
            raise ConfigError(f"{len(row_shape) + 1} axes need as many names, got {dimension_names}")
        metadata["dimension_names"] = list(dimension_names)
    return metadata


def group_metadata(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The `zarr.json` of a group, as zarr-python 3 itself would write it."""
    return {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What a commit records of a shard.

    `data_crc` is the crc32c over the chunks' checksums in order: it identifies the rows. `index_crc` depends on the
    layout and the number of chunks only.
    """

    size: int
    num_rows: int
    index_crc: int
    data_crc: int


class ShardWriter:
    """Writes one shard row by row; memory is one chunk, whatever the shard's size.

    The file at `path` is created exclusively and exists half-written until `close`, so give it a name that nobody
    reads and publish it afterwards. A context manager: leaving it normally closes, leaving it by an exception before
    `close` removes the file. `summary` is set by `close`.
    """

    def __init__(self, path: Path, *, row_shape: tuple[int, ...], dtype: str, chunk_rows: int, shard_rows: int) -> None:
        self.layout = ShardLayout(row_shape=row_shape, dtype=dtype, chunk_rows=chunk_rows, shard_rows=shard_rows)
        self.path = path
        self.num_rows = 0
        self.summary: ShardSummary | None = None
        self._num_chunks = 0
        self._data_crc = 0
        self._pending = np.empty((chunk_rows, self.layout.row_bytes), np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by close() or discard()
        except FileExistsError as error:
            raise StoreError(f"{path} exists, and a shard is never overwritten; write under another name") from error

    def append(self, rows: Shaped[np.ndarray, "..."]) -> None:
        """Add rows (B, *row_shape) of the array's dtype; bfloat16 as ml_dtypes.bfloat16 or its uint16 bit pattern.

        Whole chunks go to the file at once. Wrong rows change nothing; a failed write discards the file.

        Raises:
            ConfigError: wrong shape or dtype, or more rows than the shard has left.
            StoreError: the writer is closed.
        """
        data = self._bytes_of(rows)
        chunk_rows = self.layout.chunk_rows
        try:
            done = 0
            while done < len(data):
                held = self.num_rows % chunk_rows
                count = min(chunk_rows - held, len(data) - done)
                part = data[done : done + count]
                if count == chunk_rows:
                    self._write_chunk(part)
                else:
                    self._pending[held : held + count] = part
                    if held + count == chunk_rows:
                        self._write_chunk(self._pending)
                self.num_rows += count
                done += count
        except BaseException:
            self.discard()
            raise

    def close(self) -> ShardSummary:
        """Pad the last chunk with the fill value, write the index and fsync the file (not its folder).

        Raises:
            StoreError: no row was appended, or the file was discarded.
        """
        if self.summary is not None:
            return self.summary
        self._require_open()
        layout = self.layout
        try:
            if not self.num_rows:
                raise StoreError(f"shard {self.path} got no row, and a shard holds at least one; write no file instead")
            held = self.num_rows % layout.chunk_rows
            if held:
                self._pending[held:].view(layout.storage_dtype)[...] = _storage(layout.dtype)[1]
                self._write_chunk(self._pending)
            index = layout.index(self._num_chunks)
            self._file.write(index)
            self._file.flush()
            files.sync(self._file.fileno(), self.path)
            self._file.close()
        except BaseException:
            self.discard()
            raise
        self.summary = ShardSummary(
            size=self._num_chunks * layout.stride + len(index),
            num_rows=self.num_rows,
            index_crc=int.from_bytes(index[-CRC_BYTES:], "little"),
            data_crc=self._data_crc,
        )
        return self.summary

    def discard(self) -> None:
        """Remove the unfinished file; nothing happens after `close`."""
        if not self._file.closed:
            # Closing flushes, which fails again on a full disk; the descriptor is released all the same.
            with suppress(OSError):
                self._file.close()
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _require_open(self) -> None:
        if self._file.closed:
            raise StoreError(f"the writer of shard {self.path} is closed; open a new one under another name")

    def _bytes_of(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        self._require_open()
        layout = self.layout
        if rows.ndim < 1 or rows.shape[1:] != layout.row_shape:
            raise ConfigError(f"rows of shape (B, {str(layout.row_shape)[1:-1]}) must come, got {rows.shape}")
        if layout.dtype == "bfloat16" and rows.dtype.name == "bfloat16":
            rows = rows.view(np.uint16)
        if rows.dtype.newbyteorder("<") != layout.storage_dtype:
            raise ConfigError(f"rows of dtype {layout.dtype} must come, got {rows.dtype}; cast them first")
        left = layout.shard_rows - self.num_rows
        if len(rows) > left:
            raise ConfigError(f"{len(rows)} rows for a shard with {left} of {layout.shard_rows} left; start the next")
        flat = np.ascontiguousarray(rows, layout.storage_dtype).reshape(-1).view(np.uint8)
        return flat.reshape(len(rows), layout.row_bytes)

    def _write_chunk(self, rows: npt.NDArray[np.uint8]) -> None:
        word = crc32c(rows.reshape(-1)).to_bytes(CRC_BYTES, "little")
        # The buffered file passes large writes on without a copy and repeats partial ones.
        self._file.write(rows.data)
        self._file.write(word)
        self._data_crc = int(google_crc32c.extend(self._data_crc, word))
        self._num_chunks += 1


def read_summary(
    path: Place,
    *,
    row_shape: tuple[int, ...],
    dtype: str,
    chunk_rows: int,
    shard_rows: int,
    deep: bool,
    num_rows: int | None = None,
) -> ShardSummary:
    """Read a shard file back: its size, its index and the checksum words; with `deep` every chunk against its word.

    A file does not say where the padding of its last chunk begins. Give `num_rows` to have it checked against the
    number of chunks and returned; without it the summary counts the rows of whole chunks.

    Raises:
        FileNotFoundError: no such file.
        CorruptError: the file is truncated, the index or a chunk fails its checksum, chunks lie elsewhere, or it holds
            another number of chunks than `num_rows` needs.
    """
    layout = ShardLayout(row_shape=row_shape, dtype=dtype, chunk_rows=chunk_rows, shard_rows=shard_rows)
    with files.open_binary(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - layout.index_bytes))
        index = file.read()
        num_chunks = layout.check(index, size, str(path))
        if num_rows is not None and num_chunks != -(-num_rows // chunk_rows):
            raise CorruptError(
                f"shard {path} holds {num_chunks} chunks of {chunk_rows} rows, which {num_rows} rows do not fill"
            )
        data_crc = 0
        chunk = np.empty(layout.stride, np.uint8)
        for number in range(num_chunks):
            if deep:
                file.seek(number * layout.stride)
                file.readinto(chunk.data)
                word = layout.check_chunk(chunk, number, str(path)).to_bytes(CRC_BYTES, "little")
            else:
                file.seek((number + 1) * layout.stride - CRC_BYTES)
                word = file.read(CRC_BYTES)
            data_crc = int(google_crc32c.extend(data_crc, word))
    return ShardSummary(
        size=size,
        num_rows=num_chunks * chunk_rows if num_rows is None else num_rows,
        index_crc=int.from_bytes(index[-CRC_BYTES:], "little"),
        data_crc=data_crc,
    )
