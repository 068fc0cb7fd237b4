"""Archived sets: the same rows, compressed, for sets that are kept but seldom read; and the way back, bit for bit.

Compressed shards lie beside the raw ones under keys of their own (`c.3.0` where the raw shard is `c/3/0`), and the
`zarr.json` of an array says which of the two it means. So an array changes its form by the replacement of one small
file: whoever opens it finds all of one form. Raw shards go only after everything compressed was decoded again and
matched the commits' checksums and was sealed in `archive.json`; compressed ones only after the raw ones were rebuilt
and matched. `archiving.json` stands from the first step to the last and keeps writers away.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from featstore import files
from featstore.errors import ConfigError, CorruptError, StoreError
from featstore.objects import Place
from featstore.store import commits, decisions, ledger
from featstore.store.layout import ArraySpec, check_current, read_spec
from featstore.store.packed import BEGUN, SEALED, Advance, Codec, PackedShard, Sums, archived, packed_key
from featstore.store.shards import ABSENT, CRC_BYTES, ShardLayout, ShardWriter, crc32c, read_summary, shard_key

LOCK = "archive.lock"
SAMPLED = 4  # shards of an array of which a chunk is compressed to foresee the size


@dataclass(frozen=True, slots=True)
class _Shard:
    """One committed shard in both its forms."""

    array: ArraySpec
    number: int
    sums: Sums  # of the raw form, from the marker
    layout: ShardLayout
    raw: Path
    packed: Path

    @property
    def partial(self) -> Path:
        return self.packed.with_name(f"{self.packed.name}.{files.own_name()}.partial")

    def raw_is_whole(self) -> bool:
        try:
            found = read_summary(
                self.raw,
                row_shape=self.layout.row_shape,
                dtype=self.layout.dtype,
                chunk_rows=self.layout.chunk_rows,
                shard_rows=self.layout.shard_rows,
                deep=True,
            )
        except (FileNotFoundError, CorruptError):
            return False
        return [found.size, found.index_crc, found.data_crc] == self.sums


def _shard(folder: Path, array: ArraySpec, number: int, sums: Sums) -> _Shard:
    layout = ShardLayout(
        row_shape=array.row_shape, dtype=array.dtype, chunk_rows=array.chunk_rows, shard_rows=array.shard_rows
    )
    home, ndim = folder / "data.zarr" / array.name, 1 + len(array.row_shape)
    return _Shard(array, number, sums, layout, home / shard_key(number, ndim), home / packed_key(number, ndim))


def _committed(folder: Path, book: ledger.Ledger) -> Iterator[_Shard]:
    """Every shard that a marker names."""
    for group, arrays in book.groups.items():
        for block in sorted(commits.committed_blocks(folder, group)):
            try:
                marker = commits.read_commit(folder, group, block)
            except FileNotFoundError:
                continue  # taken back just now
            for array in arrays:
                for number, sums in marker.shards[array.name].items():
                    yield _shard(folder, array, int(number), sums)


@contextlib.contextmanager
def exclusive(folder: Place, lock: str, doing: str) -> Iterator[None]:
    """One process at a time. The system's own lock: it ends with its process and outlives its sleep.

    Raises:
        StoreError: another process is `doing` this.
    """
    import fcntl

    path = folder / lock
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StoreError(f"{folder}: another process is {doing}; let it finish") from None
        if _names(path, descriptor):
            break
        os.close(descriptor)  # of a file that its last holder has removed
    try:
        yield
    finally:
        try:
            if _names(path, descriptor):  # not once the folder was moved away and another one has its name
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _names(path: Path, descriptor: int) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def exclusively(folder: Place) -> contextlib.AbstractContextManager[None]:
    """Hold the lock that a set is archived, unarchived and moved under.

    Raises:
        StoreError: another process holds it.
    """
    return exclusive(folder, LOCK, "archiving, unarchiving or moving this set")


def require_calm(folder: Place) -> None:
    """Nobody is at work on a block, as far as can be told; what dead writers left is removed.

    Raises:
        StoreError: a writer is, or may be, at work.
    """
    with files.writing(folder):
        commits.sweep_attempts(folder, older_than=commits.STALE_SECONDS)
        home = folder / "attempts"
        living = [path.name for path in home.iterdir() if not files.is_dead(path.name)] if home.is_dir() else []
    if living:
        raise StoreError(
            f"{folder}: a writer is at work here ({len(living)} attempts); wait for it, or stop it and run this "
            "again (one of another machine counts as dead after an hour)"
        )


@contextlib.contextmanager
def _converting(folder: Place) -> Iterator[None]:
    if not isinstance(folder, Path):
        raise StoreError(f"{folder}: sets of an object store cannot change their form in place; copy it to a local one")
    with files.writing(folder), exclusively(folder):
        for path in (folder / "data.zarr").rglob("c.[0-9]*.partial"):
            path.unlink()  # of a killed call: nobody else writes such files
        yield


def archive_set(
    folder: Place, *, codec: str | None = None, level: int | None = None, advance: Advance = lambda _: None
) -> dict[str, Any]:
    """Compress a complete set in place. A call after a kill goes on where the killed one was.

    `codec` is one of `CODECS` (default `zstd`, or what a killed call began with). `advance` is told raw bytes as they
    are done. Returns codec, level, raw_bytes, bytes and ratio.

    Raises:
        ConfigError: an unknown codec or level, or another than was begun with.
        StoreError: rows are missing, a writer is at work, the disk has no room, another process converts or moves the
            set.
        CorruptError: a raw shard is not what was committed; nothing is removed.
    """
    with _converting(folder):
        spec = read_spec(folder)
        check_current(spec["schema"], f"{folder}: this set")
        chosen = _begin(folder, ledger.read_ledger(folder), codec, level)
        book = ledger.read_ledger(folder)  # with what was added before writers were kept away
        sealed = archived(folder)
        if sealed is None:
            sums: dict[str, dict[str, Sums]] = {name: {} for name in book.arrays}
            raw_bytes = num_bytes = 0
            for shard in list(_committed(folder, book)):
                found = _pack(shard, chosen, advance)
                sums[shard.array.name][str(shard.number)] = found
                raw_bytes, num_bytes = raw_bytes + shard.sums[0], num_bytes + found[0]
            made = {"codec": chosen.name, "level": chosen.level, "raw_bytes": raw_bytes, "bytes": num_bytes}
            if not (folder / "spec.json").is_file():
                raise StoreError(f"{folder}: the set was removed while it was archived; nothing is sealed")
            files.create_exclusive(folder / SEALED, files.sealed({**made, "shards": sums}))
            sealed = archived(folder)
            assert sealed is not None, "just written, and the lock is ours"
        ledger.write_metadata(folder, spec, book)
        for name in book.arrays:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder / "data.zarr" / name / "c")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder / "compact.zarr")  # copies that `featstore compact` makes again
    facts: dict[str, Any] = {key: sealed[key] for key in ("codec", "level", "raw_bytes", "bytes")}
    return {**facts, "ratio": facts["raw_bytes"] / facts["bytes"]}


def _begin(folder: Place, book: ledger.Ledger, codec: str | None, level: int | None) -> Codec:
    """Announce the conversion, which keeps writers away, and then look once more whether the set is complete."""
    path = folder / BEGUN
    chosen = Codec.choose(codec or "zstd", level)
    begun = path.is_file()
    if begun:
        held = files.unseal(path.read_bytes(), path)
        if (codec or held["codec"], level or held["level"]) != (held["codec"], held["level"]):
            raise ConfigError(
                f"{folder}: archived, or begun to be, with {held['codec']} level {held['level']}; leave --codec and "
                "--level out to go on with that, or run `featstore unarchive` first"
            )
        chosen = Codec(held["codec"], held["level"])
        if archived(folder) is not None:
            return chosen
    _require_ready(folder, book, chosen)  # before it is announced, so that a running extract is not stopped
    files.create_exclusive(path, files.sealed({"codec": chosen.name, "level": chosen.level}))
    try:
        book = ledger.read_ledger(folder)
        _require_ready(folder, book, chosen)
        if not begun:
            _require_room(folder, _foreseen(list(_committed(folder, book)), chosen), "archiving")
    except BaseException:
        if not begun:
            path.unlink(missing_ok=True)
        raise
    return chosen


def _require_ready(folder: Place, book: ledger.Ledger, codec: Codec) -> None:
    for array in book.arrays.values():
        codec.check(array)
    require_calm(folder)
    wanted = _mapped_blocks(folder, book)
    missing = sum(len(wanted - commits.committed_blocks(folder, group)) for group in book.groups)
    undecided = any(decisions.open_intents(folder, group) for group in book.groups)
    if missing or not wanted or not book.groups or undecided:
        first = "`featstore unarchive` gives up what was begun; then " if (folder / BEGUN).is_file() else ""
        raise StoreError(
            f"{folder}: only complete sets are archived, and this one lacks {missing or 'all'} blocks; {first}run the "
            "same `featstore extract` again first"
        )


def _mapped_blocks(folder: Place, book: ledger.Ledger) -> set[int]:
    """Blocks that an extract for the current manifest computes, or for any where the set was not extracted for it.

    Others, which hold only samples that left the data set or rows that nobody maps, may stay uncommitted for ever.
    """
    spec = read_spec(folder)
    size = int(spec["layout"]["block_rows"])
    current = folder.parents[2] / "datasets" / spec["dataset"] / "current"
    short = current.read_bytes().decode("ascii", "replace").strip() if current.is_file() else ""
    own = ledger.rows_path(folder, short)
    mapped = set[int]()
    for path in [own] if own.is_file() else sorted((folder / "rows").glob("*.parquet")):
        rows = ledger.read_mapping_table(path, ("row",)).column("row").to_numpy()
        mapped.update(np.unique(rows // size).tolist())
    return mapped & {block for block, _, _ in book.blocks(size)}


def _foreseen(shards: list[_Shard], codec: Codec) -> int:
    """Bytes that the compressed shards will take, from the first chunk of some shards of each array, plus 5 %."""
    total = 0.0
    for name in {shard.array.name for shard in shards}:
        mine = [shard for shard in shards if shard.array.name == name]
        raw = packed = 0
        coder = codec.coder(mine[0].array.dtype)
        for shard in mine[:: -(-len(mine) // SAMPLED)]:
            chunk = next(_chunks(shard))
            raw, packed = raw + chunk.nbytes, packed + len(coder.encode(chunk))
        total += packed / raw * sum(shard.sums[0] for shard in mine)
    return int(1.05 * total)


def _require_room(folder: Place, need: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise StoreError(
            f"{folder}: {what} needs about {need / 1e9:.3g} GB beside what is there, {free / 1e9:.3g} GB "
            "are free; free space first"
        )


def _chunks(shard: _Shard) -> Iterator[Shaped[np.ndarray, " n"]]:
    """The checked rows of every chunk of a raw shard, in storage type; one chunk is held."""
    layout = shard.layout
    try:
        file = open(shard.raw, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError as error:
        raise CorruptError(f"{shard.raw} is missing; `featstore verify --repair`, then extract again") from error
    with file:
        for number in range((shard.sums[0] - layout.index_bytes) // layout.stride):
            chunk = np.zeros(layout.stride, np.uint8)
            file.readinto(chunk.data)
            layout.check_chunk(chunk, number, str(shard.raw))
            yield chunk[:-CRC_BYTES].view(layout.storage_dtype)


def _pack(shard: _Shard, codec: Codec, advance: Advance) -> Sums:
    """Make sure that the compressed form of a shard stands under its name and decodes to what was committed."""
    coder = codec.coder(shard.array.dtype)
    if shard.packed.is_file():  # by a call that was killed
        with contextlib.suppress(CorruptError):
            return _checked(shard, shard.packed, coder, advance)
    partial = shard.partial
    try:
        with open(partial, "xb") as file:
            _write_packed(file, shard, coder)
        sums = _checked(shard, partial, coder, advance)
        os.replace(partial, shard.packed)
    finally:
        partial.unlink(missing_ok=True)
    files.sync_folder(shard.packed.parent)
    return sums


def _write_packed(file: BinaryIO, shard: _Shard, coder: Any) -> None:
    layout = shard.layout
    entries = np.full((layout.num_chunks, 2), ABSENT, "<u8")
    offset = 0
    for number, chunk in enumerate(_chunks(shard)):
        data = bytes(coder.encode(chunk))
        file.write(data + crc32c(data).to_bytes(CRC_BYTES, "little"))
        entries[number] = offset, len(data) + CRC_BYTES
        offset += len(data) + CRC_BYTES
    index = entries.tobytes()
    file.write(index + crc32c(index).to_bytes(CRC_BYTES, "little"))
    file.flush()
    os.fsync(file.fileno())


def _checked(shard: _Shard, path: Path, coder: Any, advance: Advance = lambda _: None) -> Sums:
    """Checksums of a compressed shard that decodes to what its marker says."""
    with contextlib.closing(PackedShard(path, shard.layout.num_chunks)) as packed:
        if packed.raw_summary(shard.layout, coder, advance) != shard.sums:
            raise CorruptError(f"{path} does not decode to what {shard.raw} was committed as; nothing was removed")
        return packed.summary()


def unarchive_set(folder: Place, *, advance: Advance = lambda _: None) -> dict[str, Any]:
    """Bring back the very bytes that were committed; also gives up an archiving that was killed.

    Returns raw_bytes (of the rebuilt shards) and codec; a call after a kill goes on where the killed one was.

    Raises:
        StoreError: the set is not archived, the disk has no room, another process converts or moves the set.
        CorruptError: a compressed shard is damaged; nothing is removed.
    """
    with _converting(folder):
        spec, book = read_spec(folder), ledger.read_ledger(folder)
        sealed = archived(folder)
        if sealed is None and not (folder / BEGUN).is_file():
            raise StoreError(f"{folder}: this set is not archived; there is nothing to bring back")
        path = folder / BEGUN
        held = sealed or files.unseal(path.read_bytes(), path)
        shards = list(_committed(folder, book))
        if sealed is None:  # begun only, so the raw shards are there, unless somebody removed the seal
            shards = [item for item in shards if not item.raw.is_file() or item.raw.stat().st_size != item.sums[0]]
        _require_room(folder, sum(item.sums[0] for item in shards if not item.raw.is_file()), "unarchiving")
        for shard in shards:
            _unpack(shard, Codec(held["codec"], held["level"]).coder(shard.array.dtype), advance)
        (folder / SEALED).unlink(missing_ok=True)
        files.sync_folder(folder)
        # Without the seal the raw shards are the set: they are all there whether it was never written or just removed.
        ledger.write_metadata(folder, spec, book)
        for name in book.arrays:
            for path in (folder / "data.zarr" / name).glob("c.[0-9]*"):
                path.unlink()
        (folder / BEGUN).unlink(missing_ok=True)
        files.sync_folder(folder)
    return {"raw_bytes": sum(shard.sums[0] for shard in shards), "codec": None if sealed is None else sealed["codec"]}


def _unpack(shard: _Shard, coder: Any, advance: Advance) -> None:
    """Make sure that a raw shard stands under its name, byte for byte as committed."""
    layout = shard.layout
    if not shard.raw_is_whole():
        partial = shard.partial
        try:
            with (
                contextlib.closing(PackedShard(shard.packed, layout.num_chunks)) as packed,
                _writer(shard, partial) as to,
            ):
                for number in range(len(packed)):
                    raw = packed.decode(number, coder, layout.stride - CRC_BYTES)
                    to.append(raw.view(layout.storage_dtype).reshape(layout.chunk_rows, *layout.row_shape))
                found = to.close()
            if [found.size, found.index_crc, found.data_crc] != shard.sums:
                raise CorruptError(f"{shard.packed} does not decode to what was committed; nothing was removed")
            files.make_folder(shard.raw.parent)
            os.replace(partial, shard.raw)
        except FileNotFoundError as error:
            raise CorruptError(f"{shard.packed} is missing; restore it from a copy; nothing was removed") from error
        finally:
            partial.unlink(missing_ok=True)
        files.sync_folder(shard.raw.parent)
    advance(shard.sums[0])


def _writer(shard: _Shard, path: Path) -> ShardWriter:
    layout = shard.layout
    return ShardWriter(
        path,
        row_shape=layout.row_shape,
        dtype=layout.dtype,
        chunk_rows=layout.chunk_rows,
        shard_rows=layout.shard_rows,
    )


def damaged_shards(
    folder: Place, *, deep: bool = False, advance: Advance = lambda _: None
) -> Iterator[tuple[str, str, str, int]]:
    """(place, problem, group, block) of every compressed shard that is not as it was sealed; `deep` decodes all.

    `advance` is told the size of each shard file that was looked at. Nothing comes of a set that is not archived. A
    damaged `archive.json` or marker raises CorruptError.
    """
    sealed = archived(folder)
    if sealed is None:
        return
    for group, arrays in ledger.read_ledger(folder).groups.items():
        for block in sorted(commits.committed_blocks(folder, group)):
            try:
                marker = commits.read_commit(folder, group, block)
            except FileNotFoundError:
                continue  # taken back just now
            for array in arrays:
                for number, sums in marker.shards[array.name].items():
                    shard = _shard(folder, array, int(number), sums)
                    what, num_bytes = _damage(shard, sealed, sealed["shards"].get(array.name, {}).get(number), deep)
                    advance(num_bytes)
                    if what:
                        yield shard.packed.relative_to(folder).as_posix(), what, group, block


def _damage(shard: _Shard, sealed: dict[str, Any], sums: Sums | None, deep: bool) -> tuple[str, int]:
    """(what is wrong or '', bytes of the file) of one compressed shard."""
    try:
        with contextlib.closing(PackedShard(shard.packed, shard.layout.num_chunks)) as packed:
            size = packed.size
            if packed.summary() != sums:
                return "size or checksum differs from what was archived", size
        if deep:
            _checked(shard, shard.packed, Codec(sealed["codec"], sealed["level"]).coder(shard.array.dtype))
    except FileNotFoundError:
        return "the compressed shard is missing", 0
    except OSError as error:  # damaged, or a bad sector
        return str(error), 0
    return "", size


def check_archive(folder: Place, *, deep: bool = False) -> Iterator[tuple[str, str]]:
    """(place, problem) of every compressed shard that is not as it was sealed; see `damaged_shards`."""
    for place, what, _, _ in damaged_shards(folder, deep=deep):
        yield place, what
