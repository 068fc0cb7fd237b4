"""Compact copies: small arrays that their blocks cut into many small shards, once more in few large ones.

A block of a large network holds few rows, so its `cls` shards are small, and a load from a cold disk pays for every
file. The copy `compact.zarr/<array>` is a plain zarr array over the rows [0, stop) up to the first block that is not
committed; its record beside it names the commits that it was made of. It is derived data: committed shards are never
touched, and the copy may be deleted at any time.

A copy is used only while every marker that it was made of still stands with the same content: a marker begins with
its attempt, which is a digest of its shards' checksums, so that the first bytes of each marker decide, not times. What
is copied are bytes that were checked against those very markers. Local stores only; object stores are left alone.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from featstore import files
from featstore.errors import CorruptError, StoreError, UnknownNameError
from featstore.objects import Place
from featstore.store import commits, ledger
from featstore.store.decisions import marker_path
from featstore.store.layout import ArraySpec, check_current, read_spec
from featstore.store.packed import BEGUN, SEALED
from featstore.store.reader import ShardedArray
from featstore.store.shards import (
    CRC_BYTES,
    ShardLayout,
    ShardWriter,
    array_metadata,
    chunk_rows_for,
    read_summary,
    shard_key,
    shard_rows_for,
)

log = logging.getLogger(__name__)

ROW_LIMIT_BYTES = 64 * 1024  # larger rows fill large shards by themselves
SMALL_SHARD_BYTES = 16 * 2**20  # from here on a cold load gains little
COPY_SHARD_BYTES = 128 * 2**20  # up to here cold loads gain
COPY, RECORD = "array", "record.json"  # in the folder of an attempt
_HEAD = re.compile(rb'\{\s*"attempt": "([^"]+)"')
_HEAD_BYTES = 256


@dataclass(frozen=True, slots=True)
class Copy:
    """A compact copy: its array, the rows [0, stop) in it, and whether it was made just now."""

    array: str
    stop: int
    made: bool


def copy_path(folder: Place, name: str) -> Place:
    """Where the copy of an array stands: a zarr v3 array."""
    return folder / "compact.zarr" / name


def record_path(folder: Place, name: str) -> Place:
    """The sealed record of a copy, written last."""
    return folder / "compact.zarr" / f"{name.replace('/', '.')}.json"


def compactable(folder: Place, arrays: Sequence[str] | None = None) -> list[tuple[ArraySpec, int]]:
    """(array, stop) of those that gain: rows up to 64 KiB in several shards under 16 MiB.

    None in an object store, and none of an archived set, whose shards are compressed.

    Raises:
        UnknownNameError: the set has no such array.
    """
    if not isinstance(folder, Path) or (folder / BEGUN).exists() or (folder / SEALED).exists():
        return []
    book = ledger.read_ledger(folder)
    unknown = sorted(set(arrays or ()) - set(book.arrays))
    if unknown:
        raise UnknownNameError(f"{folder.name} has no {unknown[0]!r} to compact; it has {', '.join(book.arrays)}")
    size = int(read_spec(folder)["layout"]["block_rows"])
    found = []
    of_one_vector = [name for name, array in book.arrays.items() if len(array.row_shape) == 1]
    for name in of_one_vector if arrays is None else arrays:
        array = book.arrays[name]
        blocks = _prefix(folder, book, book.group_of(name), size)
        stop = blocks[-1][2] if blocks else 0
        shard_rows = array.layout(size)[0]
        small = array.row_bytes <= ROW_LIMIT_BYTES and shard_rows * array.row_bytes < SMALL_SHARD_BYTES
        if small and stop > shard_rows:
            found.append((array, stop))
    return found


def compact(
    folder: Place, *, arrays: Sequence[str] | None = None, progress: Callable[[int], None] = lambda _: None
) -> list[Copy]:
    """Make the compact copies that a set can use; those that are there and current stay.

    Every row is checked against the checksums of its commit while it is copied, and the copy is read back. A copy that
    was interrupted leaves nothing that is read; of two at the same time one counts. In an object store nothing is done
    and nothing returned.

    Args:
        arrays: names; default: all that gain (see `compactable`).
        progress: told the number of bytes copied, as they are.

    Raises:
        UnknownNameError: the set has no such array.
        CorruptError: a committed shard is damaged or missing; no copy is made.
        StoreError: the copy cannot be written.
    """
    if isinstance(folder, Path):
        check_current(int(read_spec(folder)["schema"]), f"{folder}: this set")
    copies = []
    for array, stop in compactable(folder, arrays):
        reader = open_compact(folder, array.name, stop)
        if reader is not None:
            reader.close()
        elif not _make(folder, array, progress):
            continue
        copies.append(Copy(array.name, stop, reader is None))
    return copies


def open_compact(folder: Place, name: str, rows_needed: int) -> ShardedArray | None:
    """The copy of an array, all its shards open, if it holds the rows [0, rows_needed) as they are committed now.

    None if there is no such copy, its record or files are damaged, or a commit that it was made of was taken back.
    """
    if not isinstance(folder, Path):
        return None
    path, record_file = copy_path(folder, name), record_path(folder, name)
    try:
        sealed = record_file.read_bytes()
        record = files.unseal(sealed, record_file)
        if record["stop"] < rows_needed or not _is_current(folder, record):
            return None
        inode = path.stat().st_ino
        reader = CompactArray(folder, name, rows_needed)
        reader.open_all(record)
        # A copy is replaced by moving its folder away: then these shards may be of two copies.
        if (path.stat().st_ino, record_file.read_bytes()) == (inode, sealed):
            return reader
        reader.close()
    except FileNotFoundError:
        return None
    except (StoreError, KeyError, TypeError) as error:
        log.warning("%s: the compact copy is damaged (%s) and not used; make it again", path, error)
    return None


class CompactArray(ShardedArray):
    """A compact copy; where it is gone or outdated when it is unpickled, the array itself takes its place."""

    def __init__(self, folder: Path, name: str, rows_needed: int) -> None:
        super().__init__(copy_path(folder, name))
        self._origin = folder, name, rows_needed

    def open_all(self, record: dict[str, Any]) -> None:
        """Open every shard, so that deleting the copy takes nothing from this reader.

        Raises:
            CorruptError: the array is not the one of the record, or a shard is missing or of another size.
        """
        if self.attributes.get("featstore") != _facts(record) or len(self) != record["stop"]:
            raise CorruptError("it is not the copy that its record describes")
        for number, (size, _, _) in record["shards"].items():
            found = (self.path / shard_key(int(number), len(self.shape))).stat().st_size
            if found != size:
                raise CorruptError(f"shard {number} has {found} bytes instead of {size}")
        starts = np.arange(0, len(self), self.shard_rows)
        self.gather(starts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, self._origin


def _reopen(folder: Path, name: str, rows_needed: int) -> ShardedArray:
    return open_compact(folder, name, rows_needed) or ShardedArray(folder / "data.zarr" / name)


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    """What the copy's own `zarr.json` says of it."""
    return {key: record[key] for key in ("array", "stop", "source")}


def _prefix(folder: Path, book: ledger.Ledger, group: str, size: int) -> list[tuple[int, int, int]]:
    """Blocks (number, start, stop) up to the first one that is not committed."""
    done = commits.committed_blocks(folder, group)
    found = []
    for block in book.blocks(size):
        if block[0] not in done:
            break
        found.append(block)
    return found


def _attempt(folder: Path, group: str, block: int) -> str:
    """The attempt that a marker names, from its first bytes."""
    with open(marker_path(folder, group, block), "rb", buffering=0) as file:
        found = _HEAD.match(file.read(_HEAD_BYTES))
    return found[1].decode() if found else commits.read_commit(folder, group, block).attempt


def _source(group: str, attempts: list[tuple[int, str]]) -> str:
    return files.digest({"group": group, "attempts": [list(item) for item in attempts]})


def _is_current(folder: Path, record: dict[str, Any]) -> bool:
    """Whether the markers that the copy was made of all stand as they did."""
    try:
        attempts = [(block, _attempt(folder, record["group"], block)) for block in record["blocks"]]
    except FileNotFoundError:
        return False
    return _source(record["group"], attempts) == str(record["source"])


def _make(folder: Path, array: ArraySpec, progress: Callable[[int], None]) -> bool:
    """Copy one array; False if another process was first, or a commit was taken back meanwhile."""
    book = ledger.read_ledger(folder)
    group = book.group_of(array.name)
    blocks = _prefix(folder, book, group, int(read_spec(folder)["layout"]["block_rows"]))
    home = folder / "attempts" / files.own_name()
    try:
        markers = [commits.read_commit(folder, group, block) for block, _, _ in blocks]
    except FileNotFoundError:
        return False
    record: dict[str, Any] = {
        "array": array.name,
        "group": group,
        "stop": blocks[-1][2],
        "blocks": [block for block, _, _ in blocks],
        "source": _source(group, [(marker.block, marker.attempt) for marker in markers]),
    }
    with files.writing(copy_path(folder, array.name)):
        try:
            files.make_folder(home / COPY)
            record["shards"] = _write_copy(folder, home / COPY, array, markers, record, progress)
            files.write_atomic(home / RECORD, files.sealed(record))
            return _publish(folder, home, record)
        except (FileNotFoundError, CorruptError) as error:
            if not _is_current(folder, record):
                return False  # the block was committed anew, and its shards replaced
            if isinstance(error, CorruptError):
                raise
            raise CorruptError(
                f"{error.filename}: a committed shard is missing, so {array.name} cannot be compacted; "
                "`featstore verify --repair` makes the next extract compute it again"
            ) from error
        finally:
            _remove(home)


def _write_copy(
    folder: Path,
    home: Path,
    array: ArraySpec,
    markers: list[commits.Commit],
    record: dict[str, Any],
    progress: Callable[[int], None],
) -> dict[str, list[int]]:
    """Metadata and shards of the copy below `home`, synced and read back; size and checksums of each shard."""
    shard_rows = shard_rows_for(array.row_bytes, 1 << 62, COPY_SHARD_BYTES)
    layout: dict[str, Any] = {
        "row_shape": array.row_shape,
        "dtype": array.dtype,
        "chunk_rows": chunk_rows_for(array.row_bytes, shard_rows),
        "shard_rows": shard_rows,
    }
    metadata = array_metadata(
        num_rows=record["stop"],
        **layout,
        attributes={"featstore": _facts(record)},
        dimension_names=array.axes,
    )
    files.write_atomic(home / "zarr.json", json.dumps(metadata, indent=2).encode())
    shards: dict[str, list[int]] = {}
    position = 0
    writer: ShardWriter | None = None
    try:
        for rows in _committed_rows(folder, array, markers):
            done = 0
            while done < len(rows):
                if writer is None:
                    path = home / shard_key(position // shard_rows, 1 + len(array.row_shape))
                    files.make_folder(path.parent)
                    writer = ShardWriter(path, **layout)
                take = min(len(rows) - done, shard_rows - position % shard_rows)
                writer.append(rows[done : done + take])
                position, done = position + take, done + take
                if position % shard_rows == 0 or position == record["stop"]:
                    shards[str((position - 1) // shard_rows)] = _close(writer, layout)
                    writer = None
            progress(rows.nbytes)
    finally:
        if writer is not None:
            writer.discard()
    return shards


def _close(writer: ShardWriter, layout: dict[str, Any]) -> list[int]:
    written = writer.close()
    files.sync_folder(writer.path.parent)
    found = read_summary(writer.path, **layout, deep=True, num_rows=written.num_rows)
    if found != written:
        raise CorruptError(f"{writer.path}: the copy does not read back as it was written; check the disk")
    return [written.size, written.index_crc, written.data_crc]


def _committed_rows(folder: Path, array: ArraySpec, markers: list[commits.Commit]) -> Iterator[np.ndarray]:
    """All rows from 0 on, shard by shard, each checked against its marker; rows that belong to nobody are fill values.

    Raises:
        CorruptError: a shard is not what its marker says.
    """
    size = int(read_spec(folder)["layout"]["block_rows"])
    shard_rows, chunk_rows = array.layout(size)
    layout = ShardLayout(row_shape=array.row_shape, dtype=array.dtype, chunk_rows=chunk_rows, shard_rows=shard_rows)
    position = 0
    for marker in markers:
        if marker.start > position:  # a grown set begins a new block
            count = (marker.start - position, *array.row_shape)
            yield np.full(count, *_fill(layout))
            position = marker.start
        for shard, checksums in sorted(marker.shards[array.name].items(), key=lambda item: int(item[0])):
            stop = min((int(shard) + 1) * shard_rows, marker.stop)
            path = folder / "data.zarr" / array.name / shard_key(int(shard), 1 + len(array.row_shape))
            yield _checked_rows(path, layout, checksums, stop - position)
            position = stop


def _fill(layout: ShardLayout) -> tuple[Any, np.dtype[Any]]:
    """Fill value and type as the writer takes them."""
    if layout.dtype == "bfloat16":
        return 0x7FC0, layout.storage_dtype
    return (np.nan if layout.storage_dtype.kind == "f" else 0), layout.storage_dtype


def _checked_rows(path: Path, layout: ShardLayout, checksums: list[int], num_rows: int) -> np.ndarray:
    """The rows of one shard, from the same bytes that are checked."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    index = data[-layout.index_bytes :].tobytes()
    num_chunks = layout.check(index, len(data), str(path))
    chunks = data[: num_chunks * layout.stride].reshape(num_chunks, layout.stride)
    data_crc = 0
    for number, chunk in enumerate(chunks):
        word = layout.check_chunk(chunk, number, str(path)).to_bytes(CRC_BYTES, "little")
        data_crc = int(google_crc32c.extend(data_crc, word))
    if [len(data), int.from_bytes(index[-CRC_BYTES:], "little"), data_crc] != checksums:
        raise CorruptError(
            f"shard {path} is whole but not the one that was committed; `featstore verify --repair` makes the next "
            "extract compute it again"
        )
    flat = np.ascontiguousarray(chunks[:, :-CRC_BYTES]).reshape(-1)[: num_rows * layout.row_bytes]
    return flat.view(layout.storage_dtype).reshape(num_rows, *layout.row_shape)


def _publish(folder: Path, home: Path, record: dict[str, Any]) -> bool:
    """Put a finished copy in place of an outdated one; True if it counts."""
    name = record["array"]
    path, record_file = copy_path(folder, name), record_path(folder, name)
    files.make_folder(path.parent)
    remove_copy(folder, name)
    try:
        os.rename(home / COPY, path)
    except OSError:
        if path.exists():
            return False  # another process was first
        raise
    files.sync_folder(path.parent)
    files.link_kept(home / RECORD, record_file)
    found = open_compact(folder, name, record["stop"])
    if found is not None:
        found.close()
    return found is not None


def remove_copy(folder: Place, name: str) -> None:
    """Delete the copy of an array and its record; readers that have it open keep it."""
    record_path(folder, name).unlink(missing_ok=True)
    _remove(copy_path(folder, name))


def _remove(path: Path) -> None:
    """Take a folder away in one step, then empty it where a later run sweeps up if this one dies."""
    home = next(parent for parent in path.parents if parent.name in ("attempts", "compact.zarr")).parent / "attempts"
    if not path.exists():
        return
    files.make_folder(home)
    gone = home / f".gone-{files.own_name()}"
    with contextlib.suppress(FileNotFoundError):
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def check_copies(folder: Place, *, deep: bool = False) -> list[tuple[str, str]]:
    """(place, what is wrong) of every copy that is outdated, unfinished or damaged; `deep` checks every chunk.

    All of them can be removed (`remove_copy`) and made again.
    """
    if not isinstance(folder, Path):
        return []
    problems = []
    arrays = ledger.read_ledger(folder).arrays
    for name in arrays:
        path, record_file = copy_path(folder, name), record_path(folder, name)
        place = path.relative_to(folder).as_posix()
        if not path.exists() and not record_file.exists():
            continue
        try:
            record = files.unseal(record_file.read_bytes(), record_file)
            if not _is_current(folder, record):
                problems.append((place, "is outdated: a block that it was made of was committed anew"))
                continue
            reader = CompactArray(folder, name, record["stop"])
            reader.open_all(record)
            for number, checksums in record["shards"].items() if deep else ():
                found = read_summary(
                    path / shard_key(int(number), len(reader.shape)),
                    row_shape=reader.row_shape,
                    dtype=arrays[name].dtype,
                    chunk_rows=reader.chunk_rows,
                    shard_rows=reader.shard_rows,
                    deep=True,
                )
                if [found.size, found.index_crc, found.data_crc] != checksums:
                    raise CorruptError(f"shard {number} is not the one of the record")
        except FileNotFoundError:
            problems.append((place, "is unfinished: its record or a file is missing"))
        except StoreError as error:
            problems.append((place, f"is damaged: {error}"))
    return problems
