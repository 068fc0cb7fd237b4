"""Rows of arrays in a bucket, and the local cache of what was read from there.

Much of a shard wanted: the whole shard comes into the cache, every chunk checked, and is mapped like a local one. Few
rows: exactly their chunks are asked for, each checked. A file of the cache is named by the object's address and tag, so
a changed object is another file and nothing stale is served; what was not used for longest goes when space runs out.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from featstore import files
from featstore.errors import CorruptError, StoreError
from featstore.objects import PARALLEL, PIECE_BYTES, ObjectPath, ObjectStat, Place, ReplacedError, as_object
from featstore.store.mapped import MappedRows, _Shard
from featstore.store.shards import ShardLayout, read_summary

T = TypeVar("T")

CACHE_BYTES = 20 * 10**9
WHOLE_BYTES = 2**20  # shards up to this size are not worth several requests
WHOLE_SHARE = 0.25  # of a shard wanted, now or in all gathers so far: the whole is fetched
EVICT_SHARE = 1 / 64  # of the cache written between two looks at its size


class ObjectCache:
    """A folder of whole objects, named by address and tag; `limit` bounds its bytes, by least recent use.

    Several processes may share it. The limit can be passed by 1/64, and by one object larger than the limit.
    """

    def __init__(self, folder: Path | None = None, limit: int = CACHE_BYTES):
        self.folder = folder or files.user_cache() / "objects"
        self.limit = limit
        self._written = float("inf")  # since the last look; the first file is followed by one

    def find(self, place: ObjectPath, e_tag: str) -> Path | None:
        """The file that holds the object with this tag, marked as used just now; None if there is none."""
        path = self._file(place, e_tag)
        try:
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return path

    def fetch(self, place: ObjectPath, facts: ObjectStat, check: Callable[[Path], None] = lambda _: None) -> Path:
        """`find`, else download; `check` looks at the new file before it counts.

        Raises:
            FileNotFoundError, ReplacedError: the object went or changed meanwhile.
            StoreError: the bucket does not answer, or the folder cannot be written.
        """
        found = self.find(place, facts.e_tag or "")
        if found is not None and found.stat().st_size == facts.st_size:
            return found
        path = self._file(place, facts.e_tag or "")
        temporary = path.with_name(f"{path.name}.{files.own_name()}.partial")
        try:
            with self._told():
                self.folder.mkdir(parents=True, exist_ok=True)
                file = open(temporary, "xb")  # noqa: SIM115 - closed by the `with` below
            with file:
                for piece in place.pieces(facts):
                    with self._told():
                        file.write(piece)
            check(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        self._written += facts.st_size
        if self._written > self.limit * EVICT_SHARE:
            self._evict(path)
        return path

    def read(self, place: ObjectPath, e_tag: str) -> bytes:
        """A small object's bytes by way of the cache, as they were when it had this tag."""
        found = self.find(place, e_tag)
        return (found or self.fetch(place, ObjectStat(place.stat().st_size, 0.0, e_tag))).read_bytes()

    def drop(self, place: ObjectPath, e_tag: str) -> None:
        """Forget a file that turned out to be damaged."""
        self._file(place, e_tag).unlink(missing_ok=True)

    def _file(self, place: ObjectPath, e_tag: str) -> Path:
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        return self.folder / files.digest([endpoint, str(place), e_tag])[:40]

    def _evict(self, kept: Path) -> None:
        self._written = 0.0
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.name.endswith(".partial"):
                    if files.is_dead(path.name):
                        path.unlink()
                    continue
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                break
            if path != kept:
                path.unlink(missing_ok=True)  # who has it mapped goes on reading it
                total -= size

    @contextlib.contextmanager
    def _told(self) -> Any:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self.folder}: the read cache cannot be written ({error.strerror}); free space there, or set "
                "XDG_CACHE_HOME to another folder"
            ) from error


@functools.cache
def _cache_in(folder: Path) -> ObjectCache:
    return ObjectCache(folder)


def default_cache() -> ObjectCache:
    """The cache in the user's cache folder, shared by all arrays of this process."""
    return _cache_in(files.user_cache() / "objects")


def cached_bytes(path: Place, e_tag: str) -> bytes:
    """A small object that never changes under its tag, such as a marker."""
    held = as_object(path)
    assert held is not None, f"{path} is no object"
    return default_cache().read(held, e_tag)


class _Shards:
    """The shards of an array that the bucket holds, by one listing; a missing one is looked for once more."""

    def __init__(self, path: ObjectPath):
        self.path = path
        self._known: dict[int, ObjectStat] | None = None
        self._lock = threading.Lock()

    def find(self, number: int) -> ObjectStat | None:
        with self._lock:
            if self._known is None or number not in self._known:
                self._list()
            assert self._known is not None, "listed just now"
            return self._known.get(number)

    def forget(self) -> None:
        """Have everything listed again: an object was replaced."""
        with self._lock:
            self._known = None

    def _list(self) -> None:
        self._known = {}
        home = self.path / "c"
        for path, facts in home.walk():
            first = path.relative_to(home).parts[0]
            if first.isdecimal():
                self._known[int(first)] = facts


class _StaleMapError(CorruptError):
    """The cache's file of a shard was damaged since it came, and is forgotten."""

    def __init__(self, number: int, error: CorruptError) -> None:
        super().__init__(str(error))
        self.number = number


class _CachedRows(MappedRows):
    """Maps the cached files of shards; they are fetched, and checked, when they are first opened.

    What checksums or sizes later say against such a file speaks against this machine's disk, not against the bucket:
    `retried` reads on from a fresh one.
    """

    def __init__(self, path: ObjectPath, layout: ShardLayout, num_rows: int, shards: _Shards, cache: ObjectCache):
        super().__init__(Path(), layout, num_rows)
        place: Any = path  # what messages name
        self.path = place
        self.home, self.shards, self.cache = path, shards, cache
        self._tags: dict[int, str] = {}  # of the shards opened

    def retried(self, read: Callable[[], T]) -> T:
        """What `read` gives, begun again each time that the cache's file of another shard proves damaged.

        Raises:
            CorruptError: a file was damaged again as soon as it came.
        """
        seen: set[int] = set()
        while True:
            try:
                return read()
            except _StaleMapError as error:
                if error.number in seen:
                    raise CorruptError(
                        f"{self.object(error.number)}: its copy in the read cache was damaged twice, and came whole "
                        f"both times; check the disk of {self.cache.folder}, or set XDG_CACHE_HOME to another one"
                    ) from error
                seen.add(error.number)

    def is_here(self, number: int, e_tag: str) -> bool:
        """Whether this shard can be read without the bucket."""
        return number in self._opened.shards or self.cache.find(self.object(number), e_tag) is not None

    def object(self, number: int) -> ObjectPath:
        return self.home / self._key(number)

    def _file(self, number: int) -> Place:
        place: Any = self.object(number)
        found: Place = place
        return found

    def facts(self, number: int) -> ObjectStat:
        """What is known of a shard.

        Raises:
            CorruptError: it is missing.
        """
        found = self.shards.find(number)
        if found is None:
            first = number * self.shard_rows
            last = min(first + self.shard_rows, self.num_rows) - 1
            raise CorruptError(
                f"rows {first} to {last} of {self.home} are not on disk: shard {self._key(number)} is missing; "
                "restore it or extract them again"
            )
        return found

    def _open_shard(self, number: int) -> _Shard:
        num_rows = min(self.shard_rows, self.num_rows - number * self.shard_rows)
        for last_try in (False, True):
            facts = self.facts(number)
            try:
                path = self.cache.fetch(self.object(number), facts, lambda new: self._check(new, number))
                self._tags[number] = facts.e_tag or ""
                try:
                    return _Shard(path, self.layout, -(-num_rows // self.chunk_rows))
                except CorruptError:  # checked when it came, so it is the cache's file that was damaged since
                    self.cache.drop(self.object(number), facts.e_tag or "")
                    if last_try:
                        raise
            except (FileNotFoundError, ReplacedError):
                self.shards.forget()
                if last_try:
                    raise
        raise AssertionError("unreachable: the last try returns or raises")

    def _verify(self, shard: _Shard, number: int, chunks: Sequence[int]) -> None:
        try:
            super()._verify(shard, number, chunks)
        except CorruptError as error:
            raise self._forgotten(number, error, shard) from error

    def _truncated(self, number: int) -> CorruptError:
        return self._forgotten(number, super()._truncated(number), self._opened.shards.get(number))

    def _forgotten(self, number: int, error: CorruptError, damaged: _Shard | None) -> _StaleMapError:
        with self._lock:
            if damaged is not None and self._opened.shards.get(number) is damaged:
                others = {other: shard for other, shard in self._opened.shards.items() if other != number}
                self._opened = self._snapshot(others)
            held = self.cache.find(self.object(number), self._tags[number])
            with contextlib.suppress(FileNotFoundError):
                # Unless another thread or process put a new one there.
                if held and damaged is not None and os.path.samestat(held.stat(), os.fstat(damaged.descriptor)):
                    held.unlink()
        return _StaleMapError(number, error)

    def _check(self, path: Path, number: int) -> None:
        layout = self.layout
        try:
            read_summary(
                path,
                row_shape=layout.row_shape,
                dtype=layout.dtype,
                chunk_rows=layout.chunk_rows,
                shard_rows=layout.shard_rows,
                deep=True,
            )
        except CorruptError as error:
            raise CorruptError(str(error).replace(str(path), str(self.object(number)))) from error


class RemoteRows:
    """The rows of one array in the layout of `shards.py` in a bucket; row numbers come checked, as in `mapped.py`."""

    def __init__(self, path: ObjectPath, layout: ShardLayout, num_rows: int, cache: ObjectCache) -> None:
        self.path, self.layout, self.num_rows = path, layout, num_rows
        self._shards = _Shards(path)
        self._local = _CachedRows(path, layout, num_rows, self._shards, cache)
        self.dtype = self._local.dtype
        self.chunk_rows, self.shard_rows = layout.chunk_rows, layout.shard_rows
        self._chunks_held: dict[tuple[int, str], int] = {}  # of shards whose index was checked
        self._fetched: dict[int, int] = {}  # bytes of each shard that came chunk by chunk
        self._closed = False

    def close(self) -> None:
        self._closed = True
        self._local.close()

    def gather(self, rows: npt.NDArray[np.int64], out: np.ndarray | None, verify: bool) -> np.ndarray:
        self._require_open()
        shard_of = rows // self.shard_rows
        whole: list[int] = []
        parts: list[int] = []
        for shard in np.unique(shard_of).tolist():
            chunks = len(np.unique(rows[shard_of == shard] // self.chunk_rows))
            (whole if self._want_whole(shard, chunks) else parts).append(shard)
        if not parts:
            return self._local.retried(lambda: self._local.gather(rows, out, verify))
        if out is None:
            out = np.empty((len(rows), *self.layout.row_shape), self.dtype)
        if whole:
            positions = np.flatnonzero(np.isin(shard_of, whole))
            out[positions] = self._local.retried(lambda: self._local.gather(rows[positions], None, verify))
        for shard in parts:
            positions = np.flatnonzero(shard_of == shard)
            out[positions] = self._fetch_rows(shard, rows[positions] - shard * self.shard_rows)
        return out

    def read(self, start: int, stop: int, out: np.ndarray, verify: bool) -> None:
        self._require_open()
        for shard in range(start // self.shard_rows, (stop - 1) // self.shard_rows + 1):
            base = shard * self.shard_rows
            low, high = max(start, base), min(stop, base + self.shard_rows)
            part = out[low - start : high - start]
            chunks = (high - 1 - base) // self.chunk_rows + 1 - (low - base) // self.chunk_rows
            if self._want_whole(shard, chunks):
                self._local.retried(partial(self._local.read, low, high, part, verify))
            else:
                part[...] = self._fetch_rows(shard, np.arange(low - base, high - base))

    def prefetch(self, rows: npt.NDArray[np.int64]) -> None:
        """Rows in mapped files are asked of the disk; what is still in the bucket is waited for when it is read."""
        shard_of = rows // self.shard_rows
        here = [shard for shard in np.unique(shard_of).tolist() if self._local.is_here(shard, self._tag(shard))]
        inside = np.isin(shard_of, here)
        if inside.any():
            self._local.retried(lambda: self._local.prefetch(rows[inside]))

    def _tag(self, shard: int) -> str:
        return self._local.facts(shard).e_tag or ""

    def _require_open(self) -> None:
        if self._closed:
            raise StoreError(f"array {self.path} is closed; open it again")

    def _want_whole(self, shard: int, num_chunks: int) -> bool:
        facts = self._local.facts(shard)
        wanted = num_chunks * self.layout.stride + self._fetched.get(shard, 0)
        return (
            facts.st_size <= WHOLE_BYTES
            or wanted >= WHOLE_SHARE * facts.st_size
            or self._local.is_here(shard, facts.e_tag or "")
        )

    def _fetch_rows(self, shard: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows of one shard (numbered from its first) by exactly their chunks."""
        try:
            return self._fetch_chunks(shard, rows)
        except (ReplacedError, FileNotFoundError):
            self._shards.forget()
            return self._fetch_chunks(shard, rows)

    def _fetch_chunks(self, shard: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        facts, layout = self._local.facts(shard), self.layout
        place = self._local.object(shard)
        held = self._num_chunks(shard, facts)
        chunk_of = rows // layout.chunk_rows
        if chunk_of.max() >= held:
            end = shard * layout.shard_rows + held * layout.chunk_rows
            last = min((shard + 1) * layout.shard_rows, self.num_rows) - 1
            raise CorruptError(
                f"rows {end} to {last} of {self.path} are not on disk: shard {self._local._key(shard)} holds {held} "
                "chunks only; extract them, or leave them out"
            )
        spans = _spans(np.unique(chunk_of), max(1, PIECE_BYTES // layout.stride))

        def one(span: tuple[int, int]) -> npt.NDArray[np.uint8]:
            data = place.read_range(span[0] * layout.stride, span[1] * layout.stride, facts.e_tag)
            chunks = np.frombuffer(data, np.uint8).reshape(-1, layout.stride)
            for number, chunk in enumerate(chunks, span[0]):
                layout.check_chunk(chunk, number, str(place))
            return chunks

        result = np.empty((len(rows), layout.row_bytes), np.uint8)
        with ThreadPoolExecutor(PARALLEL) as pool:
            for (first, end), chunks in zip(spans, pool.map(one, spans)):
                positions = np.flatnonzero((chunk_of >= first) & (chunk_of < end))
                inside = chunks[:, : layout.chunk_rows * layout.row_bytes].reshape(end - first, layout.chunk_rows, -1)
                result[positions] = inside[chunk_of[positions] - first, rows[positions] % layout.chunk_rows]
                self._fetched[shard] = self._fetched.get(shard, 0) + chunks.size
        return result.view(self.dtype).reshape(len(rows), *layout.row_shape)

    def _num_chunks(self, shard: int, facts: ObjectStat) -> int:
        """Chunks in a shard, by its index, which is read and checked once."""
        key = (shard, facts.e_tag or "")
        if key not in self._chunks_held:
            place = self._local.object(shard)
            tail = place.read_range(max(0, facts.st_size - self.layout.index_bytes), facts.st_size, facts.e_tag)
            self._chunks_held[key] = self.layout.check(tail, facts.st_size, str(place))
        return self._chunks_held[key]


def _spans(chunks: npt.NDArray[np.int64], longest: int) -> list[tuple[int, int]]:
    """Sorted chunk numbers as (first, one past the last) of runs of neighbours, none longer than `longest`."""
    spans: list[tuple[int, int]] = []
    for chunk in chunks.tolist():
        if spans and spans[-1][1] == chunk and chunk - spans[-1][0] < longest:
            spans[-1] = (spans[-1][0], chunk + 1)
        else:
            spans.append((chunk, chunk + 1))
    return spans
