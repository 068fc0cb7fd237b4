"""Files inside archives, read in place: zip, plain tar (WebDataset shards too) and image columns of parquet files.

An archive is indexed once per process, and the index of one with many members is kept in the user's cache folder. Then
a member is one positioned read of one open file, from any number of threads.
"""

import bisect
import os
import threading
import weakref
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from featstore.errors import DecodeError, ManifestError
from featstore.pack_index import NO_BYTES, STORED, Index, index_tar, index_zip, is_zip, keep_index, kept_index

if TYPE_CHECKING:
    import pyarrow as pa

SEPARATOR = "!/"
MAX_PACKS = 64  # open at once; a data set may have thousands of shards
MAX_RATIO = 1040  # deflate makes at most 1032 bytes of one
MAX_GROUPS = 4
MAX_GROUP_BYTES = 2**30
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@runtime_checkable
class Pack(Protocol):
    """An open archive."""

    index: Index

    def read(self, name: str, first: int = -1) -> bytes:
        """The bytes of a member, or only the first ones."""
        ...


def split_member(path: str) -> tuple[str, str] | None:
    """(archive, member) of a path such as `cxr.zip!/train/a.jpg`; None for the path of a file."""
    outer, mark, inner = path.partition(SEPARATOR)
    return (outer, inner) if mark else None


def list_members(path: Path) -> list[str]:
    """Names of all files in an archive, in its order, also of those that `Inputs.stat` then refuses with a reason.

    An image column of a parquet file gives `COLUMN/ROW`, rows counted from 0.

    Raises:
        ManifestError: no archive of a known kind, damaged, or compressed as a whole. FileNotFoundError: no such file.
    """
    return list(open_pack(path).index.names)


class BytesPack:
    """A zip or tar: members lie in the file as they are or deflated."""

    def __init__(self, path: Path, index: Index):
        self.index = index
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Not by hand: another thread may be reading when the pool gives this archive up.
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, name: str, first: int = -1) -> bytes:
        row = self.index.row(name)
        size, packed = int(self.index.size[row]), int(self.index.packed[row])
        wanted = size if first < 0 else min(first, size)
        start = self._start(row, name)
        if self.index.state[row] == STORED:
            data = self._pread(wanted, start)
        else:
            if size > MAX_RATIO * (packed + 64):
                raise DecodeError(f"archive member says it holds {size} bytes, more than {packed} bytes can inflate to")
            # Deflate adds far less than a fifth even to noise, so this much holds the first bytes.
            enough = packed if wanted == size else min(packed, wanted + wanted // 5 + 65536)
            data = self._inflate(self._pread(enough, start), wanted, whole=wanted == size)
        if len(data) != wanted:
            raise DecodeError(f"archive member holds {len(data)} bytes where the archive says {wanted}")
        if wanted == size and self.index.checked and zlib.crc32(data) != self.index.crc[row]:
            raise DecodeError("archive member does not match its checksum")
        return data

    def _start(self, row: int, name: str) -> int:
        at = int(self.index.offset[row])
        if not self.index.checked:  # of a tar the index says where the data is
            return at
        head = self._pread(30, at)
        if head[:4] != b"PK\x03\x04" or len(head) < 30:
            raise DecodeError("archive member has no header where the archive's directory says")
        return at + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")

    def _inflate(self, data: bytes, wanted: int, *, whole: bool) -> bytes:
        inflater = zlib.decompressobj(wbits=-15)
        try:
            result = inflater.decompress(data, max(1, wanted))  # 0 would mean: without a limit
            if whole and (len(result) > wanted or inflater.decompress(inflater.unconsumed_tail, 1)):
                raise DecodeError(f"archive member inflates to more than the {wanted} bytes that the archive says")
        except zlib.error as error:
            raise DecodeError("archive member is damaged: its compressed bytes cannot be inflated") from error
        return result if whole else result[:wanted]

    def _pread(self, count: int, start: int) -> bytes:
        pieces = []
        while count > 0 and (piece := os.pread(self._descriptor, min(count, 2**30), start)):
            pieces.append(piece)
            count, start = count - len(piece), start + len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class ParquetPack:
    """Image bytes in columns of a parquet file, plain or as the struct of `bytes` and `path` that hubs write."""

    def __init__(self, path: Path, index: Index | None):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(str(path))
        except (pa.ArrowException, ValueError) as error:
            raise ManifestError(f"{path}: not a readable Parquet file ({type(error).__name__})") from error
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()
        self._columns = dict(self._image_columns())
        self._starts = [0]
        for group in range(self._file.num_row_groups):
            self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
        self.index = index if index is not None else self._make_index()

    def _image_columns(self) -> "list[tuple[str, str]]":
        """(name, leaf that holds the bytes)."""
        import pyarrow as pa

        found = []
        for field in self._file.schema_arrow:
            kind = field.type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                found.append((field.name, field.name))
            elif pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                found.append((field.name, f"{field.name}.bytes"))
        return found

    def _make_index(self) -> Index:
        # Nothing in the file says how long a value is, so the columns are read once.
        import pyarrow.compute as pc

        names, sizes, states = [], [], []
        for column in self._columns:
            for group, start in enumerate(self._starts[:-1]):
                lengths = pc.binary_length(self._read(column, group)).to_pylist()
                names += [f"{column}/{start + row}" for row in range(len(lengths))]
                sizes += [length or 0 for length in lengths]
                states += [NO_BYTES if length is None else STORED for length in lengths]
        return Index.make(names, sizes=sizes, states=states)

    def _read(self, column: str, group: int) -> "pa.ChunkedArray":
        import pyarrow as pa

        try:
            table = self._file.read_row_group(group, columns=[self._columns[column]], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DecodeError(f"row group {group} of the parquet file is damaged ({type(error).__name__})") from error
        values = table.column(0)
        if pa.types.is_struct(values.type):
            values = pa.chunked_array([chunk.field("bytes") for chunk in values.chunks] or [pa.array([], pa.binary())])
        return values

    def read(self, name: str, first: int = -1) -> bytes:
        self.index.row(name)
        column, _, number = name.rpartition("/")
        group = bisect.bisect_right(self._starts, int(number)) - 1
        with self._lock:  # the reader is one stream
            values = self._groups.get((column, group))
            if values is None:
                values = self._groups[column, group] = self._read(column, group)
            self._groups.move_to_end((column, group))
            total = sum(held.nbytes for held in self._groups.values())
            while len(self._groups) > 1 and (len(self._groups) > MAX_GROUPS or total > MAX_GROUP_BYTES):
                total -= self._groups.popitem(last=False)[1].nbytes
        data: bytes = values[int(number) - self._starts[group]].as_buffer().to_pybytes()
        return data if first < 0 else data[:first]


class _Slot:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.key: tuple[int, int] | None = None
        self.pack: Pack | None = None


_slots: OrderedDict[str, _Slot] = OrderedDict()
_slots_lock = threading.Lock()


def _forget() -> None:
    # A child of a fork has no threads that could give back what they hold.
    global _slots_lock
    _slots_lock = threading.Lock()
    _slots.clear()


os.register_at_fork(after_in_child=_forget)


def open_pack(path: Path, facts: os.stat_result | None = None) -> Pack:
    """The archive at `path`, opened once per process while its size and time stay.

    Raises:
        ManifestError: no archive of a known kind, damaged, or compressed as a whole. FileNotFoundError: no such file.
    """
    facts = facts or os.stat(path)
    key = facts.st_size, facts.st_mtime_ns
    with _slots_lock:
        slot = _slots.setdefault(str(path), _Slot())
        _slots.move_to_end(str(path))
        while len(_slots) > MAX_PACKS:
            _slots.popitem(last=False)
    if slot.key == key and slot.pack is not None:
        return slot.pack
    with slot.lock:
        if slot.key != key or slot.pack is None:
            slot.pack = _open(path, key)
            slot.key = key
        return slot.pack


def _open(path: Path, key: tuple[int, int]) -> Pack:
    with open(path, "rb") as file:
        head = file.read(512)
    squeezed = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
    if squeezed:
        raise ManifestError(
            f"{path}: compressed as a whole ({squeezed}), so no member can be read without all before it; repack it as "
            "a zip or as a plain tar"
        )
    kept = kept_index(path, key)
    if head[:4] == b"PAR1":
        pack: Pack = ParquetPack(path, kept)
    else:
        if (index := kept) is None:
            index = index_zip(path) if is_zip(path, head) else index_tar(path)
        pack = BytesPack(path, index)
    if kept is None:
        keep_index(path, key, pack.index)
    return pack
