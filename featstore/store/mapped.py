"""Rows out of mapped shards: positioned reads for ranges, one numpy indexing over all maps for scattered rows.

A row's place is its byte if all shards stood one behind the other without their indices; everything follows from that
number by arithmetic. Which pages are fetched when rows are not in memory decides the speed there: the kernel's
read-ahead around each fault fetches megabytes for one row, no read-ahead at all splits a large row into single pages.
So maps are advised as random, and the pages of exactly the wanted rows are asked for before the first is touched.

Touching a map behind the end of a file that was truncated after mapping kills the process (SIGBUS). Committed shards
are never truncated, replaced ones keep their old bytes for those who mapped them; against other programs, the sizes of
all open shards are looked at every half second, and those of the shards of the rows probed at every gather. A
truncation within that time of a gather is not caught; `read` without `verify` is immune.
"""

import ctypes
import errno
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import CorruptError, StoreError
from featstore.store.shards import CRC_BYTES, ShardLayout, numpy_dtype, shard_key

# What the operating system offers; without it (Windows: all three, macOS: the last) reads are right and less clever.
HAVE_PREADV = hasattr(os, "preadv")
HAVE_ADVICE = hasattr(mmap.mmap, "madvise") and hasattr(mmap, "MADV_RANDOM")
HAVE_NOWAIT = hasattr(os, "RWF_NOWAIT")
# Linux knows of each page of a map whether it is in memory, on every file system; of the files of others, which this
# process may not write either, it says so of all pages.
_MINCORE = getattr(ctypes.CDLL(None), "mincore", None) if sys.platform == "linux" else None
# Errors of a file system (tmpfs, NFS, FUSE) or kernel that cannot read without waiting: the same for every read.
REFUSALS = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM)

# Rows up to this size are gathered by one numpy indexing, larger ones by one copy each: their Python cost drowns in
# the copy, and numpy cannot describe a window of many overlapping large rows (their total would pass 2**63 bytes).
WINDOW_ROW_BYTES = 16 * 1024
DENSE_BYTES = 64 * 2**20  # from here on a filter that keeps much of an array is read through instead of mapped
BLOCK_BYTES = 2**20  # a gather into a given array goes through pieces that stay in the processor's cache
READ_BUFFERS = 1000  # of one preadv; POSIX systems allow 1024
READ_BYTES = 2**30  # of one preadv; Linux stops at 2 GiB
AHEAD_BYTES = 32 * 2**20  # of the next shard asked for while this one is read; the kernel's read-ahead stops at a file
OPEN_AHEAD = 6  # further shards opened at once by a long read
# Rows probed for being in the page cache: many while batches still miss it, few after a run of batches in memory.
PROBES_COLD, PROBES_WARM, BATCHES_TO_WARM = 16, 2, 32
SIZES_SECONDS = 0.5  # between looks at the sizes of the open shards, about a microsecond each
NOT_OPEN = -(2**62)


class _Shard:
    """One open, mapped and checked shard; its file and map go when the last reference goes, never under a reader."""

    __slots__ = ("address", "content", "descriptor", "is_short", "map", "num_chunks", "tells_pages")

    def __init__(self, path: Path, layout: ShardLayout, needed_chunks: int) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        stat = os.fstat(self.descriptor)
        size = stat.st_size
        if size < layout.index_bytes:
            layout.check(b"", size, str(path))
        self.map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)
        if HAVE_ADVICE:
            # Scattered rows: reading around each fault would fetch megabytes for one row.
            self.map.madvise(mmap.MADV_RANDOM)
        self.num_chunks = layout.check(self.map[-layout.index_bytes :], size, str(path))
        self.is_short = self.num_chunks < needed_chunks
        self.content = np.frombuffer(self.map, np.uint8)
        self.address: int = self.content.__array_interface__["data"][0]
        self.tells_pages = _MINCORE is not None and (stat.st_uid == os.geteuid() or os.access(path, os.W_OK))

    def is_in_memory(self, offset: int) -> bool:
        """Whether the page of this byte is; False where the system does not tell."""
        if not self.tells_pages or _MINCORE is None:
            return False
        found = ctypes.c_ubyte()
        page = ctypes.c_void_p(self.address + offset // mmap.PAGESIZE * mmap.PAGESIZE)
        return _MINCORE(page, ctypes.c_size_t(1), ctypes.byref(found)) == 0 and bool(found.value & 1)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _Window:
    """A read-only numpy array of row-sized items, one every `step` bytes of memory, for `np.asarray`."""

    def __init__(self, address: int, num_bytes: int, row_bytes: int, step: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": ((num_bytes - row_bytes) // step + 1,),
            "typestr": f"|V{row_bytes}",
            "data": (address, True),
            "strides": (step,),
        }


@dataclass(frozen=True, slots=True)
class _Opened:
    """The shards open at one moment. Whoever reads holds this object, so that no map goes away under the reader.

    `window` spans the memory from the first to the last map. `shift[s]` added to a row's place (its byte if all shards
    stood one behind the other) gives its byte in `window`, NOT_OPEN where shard s is not open: so one indexing gathers
    from all shards, and only ever inside maps that this object holds.
    """

    shards: dict[int, _Shard]
    shift: npt.NDArray[np.int64]
    window: npt.NDArray[Any]
    has_gaps: bool


class MappedRows:
    """The rows of one array in the layout of `shards.py`; row numbers come checked, as `reader.py` sends them.

    Threads share it: what is open is an object that is replaced, never changed, and each read holds on to its own.
    """

    def __init__(self, path: Path, layout: ShardLayout, num_rows: int) -> None:
        self.path, self.layout, self.num_rows = path, layout, num_rows
        self.dtype = numpy_dtype(layout.dtype)
        self.chunk_rows, self.shard_rows = layout.chunk_rows, layout.shard_rows
        self._payload = layout.num_chunks * layout.stride
        # Rows begin at multiples of their own size and of the checksum's; the window steps by what divides both.
        self._step = math.gcd(CRC_BYTES, layout.row_bytes)
        self._max_open = _max_open_shards()
        self._lock = threading.Lock()
        self._closed = False
        self._opened = self._snapshot({})
        self._batches_to_warm = BATCHES_TO_WARM
        self._refuses_nowait = False
        self._sizes_due = 0.0

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._opened = self._snapshot({})

    def gather(self, rows: npt.NDArray[np.int64], out: np.ndarray | None, verify: bool) -> np.ndarray:
        if len(rows) * self.layout.row_bytes >= DENSE_BYTES and _is_dense(rows):
            return self._gather_dense(rows, out, verify)
        shard_of = rows // self.shard_rows
        opened = self._opened
        shift = opened.shift[shard_of]
        if shift.min() == NOT_OPEN:
            needed = np.unique(shard_of)
            if len(needed) > self._max_open:
                return self._gather_by_shards(rows, shard_of, out, verify)
            opened = self._open(needed.tolist())
            shift = opened.shift[shard_of]
        if opened.has_gaps:
            self._require_rows(rows, shard_of, opened)
        self._check_sizes(opened)
        chunk_of = rows // self.chunk_rows
        places = rows * self.layout.row_bytes + chunk_of * CRC_BYTES
        if verify:
            for shard in np.unique(shard_of).tolist():
                chunks = np.unique(chunk_of[shard_of == shard]) - shard * self.layout.num_chunks
                self._verify(opened.shards[shard], shard, chunks.tolist())
        elif HAVE_ADVICE and self._is_cold(opened, shard_of, places):
            self._advise(opened, shard_of, places)
        if self.layout.row_bytes <= WINDOW_ROW_BYTES:
            return self._take(opened.window, (places + shift) // self._step, out)
        return self._copy_rows(opened, shard_of, places, out)

    def _gather_dense(self, rows: npt.NDArray[np.int64], out: np.ndarray | None, verify: bool) -> np.ndarray:
        """A large part of the array in its own order (a filter): read through, so that no page of it stays mapped."""
        shape = self.layout.row_shape
        if out is None:
            out = np.empty((len(rows), *shape), self.dtype)
        piece = max(1, DENSE_BYTES // 2 // self.layout.row_bytes)
        buffer = np.empty((piece, *shape), self.dtype)
        done = 0
        while done < len(rows):
            first = int(rows[done])
            end = int(np.searchsorted(rows, first + piece))
            block = buffer[: int(rows[end - 1]) + 1 - first]
            self.read(first, first + len(block), block, verify)
            out[done:end] = block[rows[done:end] - first]
            done = end
        return out

    def prefetch(self, rows: npt.NDArray[np.int64]) -> None:
        """Ask the system to read these rows, without waiting for them; nothing happens if they are in memory already.

        A shard opened for it is checked as in `gather`, and the same errors are raised.
        """
        if not HAVE_ADVICE:
            return
        shard_of = rows // self.shard_rows
        needed = np.unique(shard_of)
        for first in range(0, len(needed), self._max_open):
            group = needed[first : first + self._max_open]
            inside = (shard_of >= group[0]) & (shard_of <= group[-1])
            opened = self._opened
            if (opened.shift[group] == NOT_OPEN).any():
                opened = self._open(group.tolist())
            if opened.has_gaps:
                self._require_rows(rows[inside], shard_of[inside], opened)
            places = rows[inside] * self.layout.row_bytes + rows[inside] // self.chunk_rows * CRC_BYTES
            if self._is_cold(opened, shard_of[inside], places):
                self._advise(opened, shard_of[inside], places)

    def _take(self, window: npt.NDArray[Any], index: npt.NDArray[np.int64], out: np.ndarray | None) -> np.ndarray:
        shape = (len(index), *self.layout.row_shape)
        if out is None:
            return window[index].view(self.dtype).reshape(shape)
        target = out.reshape(len(index), -1).view(window.dtype)[:, 0]
        piece = max(1, BLOCK_BYTES // self.layout.row_bytes)
        for start in range(0, len(index), piece):
            target[start : start + piece] = window[index[start : start + piece]]
        return out

    def _copy_rows(
        self, opened: _Opened, shard_of: npt.NDArray[np.int64], places: npt.NDArray[np.int64], out: np.ndarray | None
    ) -> np.ndarray:
        row_bytes = self.layout.row_bytes
        if out is None:
            out = np.empty((len(places), *self.layout.row_shape), self.dtype)
        flat = out.reshape(len(places), -1).view(np.uint8)  # (K, row_bytes)
        offsets = places - shard_of * self._payload
        for target, shard, offset in zip(flat, shard_of.tolist(), offsets.tolist(), strict=True):
            target[...] = opened.shards[shard].content[offset : offset + row_bytes]
        return out

    def _gather_by_shards(
        self, rows: npt.NDArray[np.int64], shard_of: npt.NDArray[np.int64], out: np.ndarray | None, verify: bool
    ) -> np.ndarray:
        """A gather that touches more shards than may be open at once: a group of shards at a time."""
        if out is None:
            out = np.empty((len(rows), *self.layout.row_shape), self.dtype)
        order = np.argsort(shard_of, kind="stable")
        firsts = np.flatnonzero(np.diff(shard_of[order], prepend=-1))[:: self._max_open]
        for positions in np.split(order, firsts[1:]):
            out[positions] = self.gather(rows[positions], None, verify)
        return out

    def read(self, start: int, stop: int, out: np.ndarray, verify: bool) -> None:
        row_bytes, shard_rows = self.layout.row_bytes, self.shard_rows
        target = out.reshape(-1).view(np.uint8).data
        last = (stop - 1) // shard_rows
        for number in range(start // shard_rows, last + 1):
            following = min(number + 1, last)
            opened = self._opened
            if not (number in opened.shards and following in opened.shards):
                opened = self._open(list(range(number, min(number + OPEN_AHEAD, last) + 1)))
            shard = opened.shards[number]
            low, high = max(start, number * shard_rows), min(stop, (number + 1) * shard_rows)
            if shard.is_short:
                self._require_rows(np.array([high - 1]), np.array([number]), opened)
            if following > number and hasattr(os, "posix_fadvise"):
                descriptor = opened.shards[following].descriptor
                os.posix_fadvise(descriptor, 0, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            first, end = low - number * shard_rows, high - number * shard_rows
            if verify:
                self._check_sizes(opened)
                self._verify(shard, number, range(first // self.chunk_rows, (end - 1) // self.chunk_rows + 1))
            part = target[(low - start) * row_bytes : (high - start) * row_bytes]
            if HAVE_PREADV:
                self._read_positioned(shard, number, first, end, part)
            else:
                self._read_mapped(shard, first, end, part)

    def _read_positioned(self, shard: _Shard, number: int, first: int, end: int, target: memoryview) -> None:
        """Rows first to end - 1 of one shard, by reads that scatter into `target` and drop the checksums between."""
        chunk_rows, row_bytes = self.chunk_rows, self.layout.row_bytes
        dropped = memoryview(bytearray(CRC_BYTES))
        offset = first * row_bytes + first // chunk_rows * CRC_BYTES
        buffers: list[memoryview] = []
        row, done, wanted = first, 0, 0
        while row < end:
            count = min(chunk_rows - row % chunk_rows, end - row)
            num_bytes = count * row_bytes
            buffers.append(target[done : done + num_bytes])
            row, done, wanted = row + count, done + num_bytes, wanted + num_bytes
            if row < end:
                buffers.append(dropped)
                wanted += CRC_BYTES
            if row == end or len(buffers) >= READ_BUFFERS or wanted >= READ_BYTES:
                if not _read_fully(shard.descriptor, buffers, offset, wanted):
                    raise self._truncated(number)
                offset, buffers, wanted = offset + wanted, [], 0

    def _read_mapped(self, shard: _Shard, first: int, end: int, target: memoryview) -> None:
        chunk_rows, row_bytes = self.chunk_rows, self.layout.row_bytes
        row, done = first, 0
        while row < end:
            count = min(chunk_rows - row % chunk_rows, end - row)
            offset = row * row_bytes + row // chunk_rows * CRC_BYTES
            target[done : done + count * row_bytes] = shard.content[offset : offset + count * row_bytes].data
            row, done = row + count, done + count * row_bytes

    def _open(self, needed: list[int]) -> _Opened:
        """The open shards with the needed ones among them; those not needed for longest make room."""
        with self._lock:
            if self._closed:
                raise StoreError(f"array {self.path} is closed; open it again")
            others = {number: shard for number, shard in self._opened.shards.items() if number not in needed}
            for number in list(others)[: max(0, len(others) + len(needed) - self._max_open)]:
                del others[number]
            known = self._opened.shards
            wanted = {number: known[number] if number in known else self._open_shard(number) for number in needed}
            self._opened = self._snapshot(others | wanted)
            return self._opened

    def _open_shard(self, number: int) -> _Shard:
        num_rows = min(self.shard_rows, self.num_rows - number * self.shard_rows)
        try:
            return _Shard(self._file(number), self.layout, -(-num_rows // self.chunk_rows))
        except FileNotFoundError as error:
            first = number * self.shard_rows
            raise CorruptError(
                f"rows {first} to {first + num_rows - 1} of {self.path} are not on disk: shard {self._key(number)} is "
                "missing; restore it or extract them again"
            ) from error

    def _snapshot(self, shards: dict[int, _Shard]) -> _Opened:
        layout = self.layout
        shift = np.full(-(-self.num_rows // self.shard_rows), NOT_OPEN, np.int64)
        window = np.empty(0, f"V{layout.row_bytes}")
        if shards:
            numbers = np.fromiter(shards, np.int64)
            addresses = np.fromiter((shard.address for shard in shards.values()), np.int64)
            low = int(addresses.min())
            shift[numbers] = addresses - low - numbers * self._payload
            if layout.row_bytes <= WINDOW_ROW_BYTES:
                end = max(shard.address + len(shard.content) for shard in shards.values())
                window = np.asarray(_Window(low, end - low, layout.row_bytes, self._step))
        return _Opened(shards, shift, window, any(shard.is_short for shard in shards.values()))

    def _require_rows(self, rows: npt.NDArray[np.int64], shard_of: npt.NDArray[np.int64], opened: _Opened) -> None:
        """Rows between the end of a partly filled shard and the next one were never written."""
        for number in np.unique(shard_of).tolist():
            held = opened.shards[number].num_chunks
            end = number * self.shard_rows + held * self.chunk_rows
            if rows[shard_of == number].max() >= end:
                last = min((number + 1) * self.shard_rows, self.num_rows) - 1
                raise CorruptError(
                    f"rows {end} to {last} of {self.path} are not on disk: shard {self._key(number)} holds {held} "
                    "chunks only; extract them, or leave them out"
                )

    def _check_sizes(self, opened: _Opened) -> None:
        """Look for shards truncated after they were mapped, unless that was done just now."""
        now = time.monotonic()
        if now < self._sizes_due:
            return
        self._sizes_due = now + SIZES_SECONDS
        self._require_sizes(opened, opened.shards)

    def _require_sizes(self, opened: _Opened, numbers: Iterable[int]) -> None:
        for number in numbers:
            shard = opened.shards[number]
            if os.fstat(shard.descriptor).st_size < len(shard.content):
                self._sizes_due = 0.0
                raise self._truncated(number)

    def _truncated(self, number: int) -> CorruptError:
        return CorruptError(f"shard {self._file(number)} was truncated while it was read; restore it, then open again")

    def _is_cold(self, opened: _Opened, shard_of: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> bool:
        """Whether some of a few rows are not in memory, or nobody can tell; never waits for the disk."""
        step = -(-len(places) // (PROBES_COLD if self._batches_to_warm else PROBES_WARM))
        shards = shard_of[::step]
        probes = list(zip(shards.tolist(), (places[::step] - shards * self._payload).tolist(), strict=True))
        is_cold = self._misses_cache(opened, probes) if HAVE_NOWAIT and not self._refuses_nowait else None
        if is_cold is None:
            self._require_sizes(opened, {shard for shard, _ in probes})
            is_cold = not all(opened.shards[shard].is_in_memory(offset) for shard, offset in probes)
        self._batches_to_warm = BATCHES_TO_WARM if is_cold else max(0, self._batches_to_warm - 1)
        return is_cold

    def _misses_cache(self, opened: _Opened, probes: list[tuple[int, int]]) -> bool | None:
        """By a read of one byte that does not wait; None where the file system has none, which is remembered."""
        buffer = [bytearray(1)]
        for shard, offset in probes:
            try:
                got = os.preadv(opened.shards[shard].descriptor, buffer, offset, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno in REFUSALS:
                    self._refuses_nowait = True
                    return None
                self._require_sizes(opened, {number for number, _ in probes})
                return True
            if not got:
                raise self._truncated(shard)
        return False

    def _advise(self, opened: _Opened, shard_of: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> None:
        """Ask for exactly the pages of these rows, in the order of the disk, before the first one is waited for."""
        order = np.argsort(places)
        shard_of, offsets = shard_of[order], places[order] - shard_of[order] * self._payload
        pages = offsets // mmap.PAGESIZE * mmap.PAGESIZE
        ends = offsets + self.layout.row_bytes
        # Rows that follow one another are asked for at once; rows of one size end in the order in which they begin.
        apart = np.flatnonzero((shard_of[1:] != shard_of[:-1]) | (pages[1:] > ends[:-1])) + 1
        first = np.concatenate([[0], apart])
        lengths = ends[np.concatenate([apart - 1, [len(ends) - 1]])] - pages[first]
        for shard, page, length in zip(shard_of[first].tolist(), pages[first].tolist(), lengths.tolist(), strict=True):
            opened.shards[shard].map.madvise(mmap.MADV_WILLNEED, page, length)

    def _verify(self, shard: _Shard, number: int, chunks: Sequence[int]) -> None:
        stride = self.layout.stride
        if HAVE_ADVICE:
            for chunk in chunks:
                page = chunk * stride // mmap.PAGESIZE * mmap.PAGESIZE
                shard.map.madvise(mmap.MADV_WILLNEED, page, (chunk + 1) * stride - page)
        for chunk in chunks:
            self.layout.check_chunk(
                shard.content[chunk * stride : (chunk + 1) * stride], chunk, str(self._file(number))
            )

    def _key(self, number: int) -> str:
        return shard_key(number, 1 + len(self.layout.row_shape))

    def _file(self, number: int) -> Path:
        return self.path / self._key(number)


def _is_dense(rows: npt.NDArray[np.int64]) -> bool:
    """Rows in rising order, at least a quarter of those between the first and the last."""
    return 4 * len(rows) > int(rows[-1] - rows[0]) and bool((rows[1:] > rows[:-1]).all())


def _max_open_shards() -> int:
    """An eighth of the files that this process may open, at most 256: several arrays are open at once, and a shard
    takes two descriptors, because Python's maps keep one of their own."""
    try:
        import resource
    except ImportError:  # Windows, where the limit is in the thousands
        return 256
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 256 if limit == resource.RLIM_INFINITY else max(8, min(256, limit // 8))


def _read_fully(descriptor: int, buffers: list[memoryview], offset: int, wanted: int) -> bool:
    """Fill all buffers (`wanted` bytes) from `offset` on; False if the file ends before."""
    got = os.preadv(descriptor, buffers, offset)
    while got < wanted:
        if not got:
            return False
        offset, wanted = offset + got, wanted - got
        while got >= len(buffers[0]):
            got -= len(buffers.pop(0))
        buffers[0] = buffers[0][got:]
        got = os.preadv(descriptor, buffers, offset)
    return True
