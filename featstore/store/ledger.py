"""The ledger of a set: numbered entries that each appear once, whole, first writer wins.

Two things may be added to a set after its creation: rows (a grown data set) and arrays (more tokens or layers). Both
change what others must agree on, so both are entries with a running number. A writer that loses the race for a number
reads the winner's entry and plans again.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from featstore import files
from featstore.errors import CorruptError, IncompleteError
from featstore.objects import Place
from featstore.store.layout import ArraySpec, read_spec
from featstore.store.packed import Codec, archived, check_not_archived
from featstore.store.reductions import reduction_attributes
from featstore.store.shards import array_metadata, chunk_rows_for, group_metadata, shard_rows_for

if TYPE_CHECKING:
    import pyarrow as pa

    from featstore.datasets.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows added at once; starts at a block boundary. `stop` is exclusive."""

    start: int
    stop: int
    manifest: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the entries of a set add up to."""

    segments: list[Segment] = field(default_factory=list)
    groups: dict[str, list[ArraySpec]] = field(default_factory=dict)
    num_entries: int = 0

    @property
    def num_rows(self) -> int:
        """One past the highest row index (gaps before a block boundary included)."""
        return max((segment.stop for segment in self.segments), default=0)

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        return {array.name: array for arrays in self.groups.values() for array in arrays}

    def group_of(self, array: str) -> str:
        """The array group, whose arrays are committed together, that holds this array."""
        return next(name for name, arrays in self.groups.items() if any(item.name == array for item in arrays))

    def blocks(self, rows_per_block: int) -> list[tuple[int, int, int]]:
        """(block, first row, one past its last row) of every block, in order."""
        found = []
        for segment in self.segments:
            for start in range(segment.start, segment.stop, rows_per_block):
                found.append((start // rows_per_block, start, min(start + rows_per_block, segment.stop)))
        return found


def entry_path(folder: Place, number: int) -> Place:
    return folder / "ledger" / f"{number:06d}.json"


def read_ledger(folder: Place) -> Ledger:
    """Add up all entries.

    Raises:
        CorruptError: an entry is damaged, or missing though later ones exist.
    """
    segments: list[Segment] = []
    groups: dict[str, list[ArraySpec]] = {}
    number = 0
    while True:
        path = entry_path(folder, number)
        try:
            entry = files.unseal(path.read_bytes(), path)
        except FileNotFoundError:
            if not any(int(later.stem) > number for later in path.parent.glob("[0-9]" * 6 + ".json")):
                break
            if path.exists():
                continue  # it and the next were written just now
            raise CorruptError(
                f"{path}: this entry is missing though later ones are there; restore it from a copy"
            ) from None
        _check_names(entry, path)
        if entry["kind"] == "rows":
            segments.append(Segment(entry["start"], entry["stop"], entry["manifest"]))
        else:
            groups[entry["group"]] = [_array(folder, item) for item in entry["arrays"]]
        number += 1
    return Ledger(segments, groups, number)


def _check_names(entry: dict[str, Any], path: Place) -> None:
    """Names of an entry become paths below the set, and must stay there whoever wrote it."""
    if entry["kind"] == "rows":
        names, pattern = [entry["manifest"]], r"[0-9a-f]{8}"
    else:
        names, pattern = [item["name"] for item in entry["arrays"]], r"(layers/\d+/)?[a-z][a-z0-9_]*"
        if entry["group"] != group_name(names):
            names.append(entry["group"])
    wrong = [name for name in names if not re.fullmatch(pattern, name)]
    if wrong:
        raise CorruptError(f"{path}: {wrong[0]!r} is no name of this format; do not use a store from this source")


# Schema 1 left the layout to be derived from the block size, with shards of at most this size.
_SCHEMA_1_SHARD_BYTES = 128 * 2**20


def _array(folder: Place, item: dict[str, Any]) -> ArraySpec:
    array = ArraySpec.from_dict(item)
    if not array.shard_rows:
        rows = int(read_spec(folder)["layout"]["block_rows"])
        shard = shard_rows_for(array.row_bytes, rows, _SCHEMA_1_SHARD_BYTES)
        array = replace(array, shard_rows=shard, chunk_rows=chunk_rows_for(array.row_bytes, shard))
    return array


def group_name(arrays: list[str]) -> str:
    """Folder name of an array group: the arrays' names, shortened where many layers would exceed a file name."""
    joined = "+".join(name.replace("/", ".") for name in arrays)
    return joined if len(joined) <= 120 else f"{joined[:100]}+{files.digest(joined)[:8]}"


def add_arrays(folder: Place, arrays: list[ArraySpec]) -> Ledger:
    """Make sure that every array exists, as one new group for those that do not; returns the ledger that has them."""
    size = int(read_spec(folder)["layout"]["block_rows"])
    while True:
        ledger = read_ledger(folder)
        new = [array for array in arrays if array.name not in ledger.arrays]
        if not new:
            return ledger
        check_not_archived(folder)
        group = group_name([array.name for array in new])
        entry = {"kind": "arrays", "group": group, "arrays": [array.fixed(size).as_dict() for array in new]}
        files.create_exclusive(entry_path(folder, ledger.num_entries), files.sealed(entry))


def rows_path(folder: Place, manifest: str) -> Place:
    """Mapping of one manifest's samples to row indices."""
    return folder / "rows" / f"{manifest}.parquet"


def read_rows(folder: Place, manifest: str) -> Int64[np.ndarray, " N"]:
    """Row index of each sample of a manifest, in manifest order.

    Raises:
        IncompleteError: this set was never extracted for that manifest.
        CorruptError: the mapping cannot be read.
    """
    path = rows_path(folder, manifest)
    if not path.is_file():
        raise IncompleteError(
            f"{folder.parent.name}/{folder.name}: not extracted for manifest {manifest}; run the same "
            "`featstore extract` again, or read it for an older one (--manifest)"
        )
    # Not arrow's to_numpy, which imports pandas: a second or two that reading a set would cost every command.
    return np.array(np.from_dlpack(read_mapping_table(path, ("row",)).column("row").combine_chunks()))


def read_mapping(path: Place) -> tuple[list[str], list[int], Int64[np.ndarray, " N"]]:
    """(ids, file sizes, row indices) of a mapping.

    Raises:
        CorruptError: it cannot be read.
    """
    ids, sizes, rows = read_mapping_table(path).columns
    return ids.to_pylist(), sizes.to_pylist(), rows.to_numpy()


def read_mapping_table(path: Place, columns: tuple[str, ...] = ("id", "size", "row")) -> "pa.Table":
    """Columns of a mapping as arrow holds them, a fraction of Python's lists.

    Raises:
        CorruptError: it cannot be read.
    """
    import pyarrow as pa

    types = {"id": pa.string(), "size": pa.int64(), "row": pa.int64()}
    try:
        data = path.read_bytes()
        if seal_path(path).is_file():
            seal = files.unseal(seal_path(path).read_bytes(), seal_path(path))
            if (seal["bytes"], seal["sha256"]) != (len(data), files.digest(data)):
                raise ValueError("other bytes than were written")
        table = files.read_parquet(data, list(columns))
        # A flipped bit in the file's own description can give the same bytes another type.
        if table.schema.types != [types[name] for name in columns] or table.column("row").null_count:
            raise pa.ArrowInvalid(f"columns are {table.schema.types}")
        return table
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptError(f"{path}: damaged ({type(error).__name__}); restore it from a copy") from error


def seal_path(path: Place) -> Place:
    """Where the digest of a mapping's bytes stands."""
    return path.with_name(f"{path.stem}.json")


def seal_rows(path: Place) -> None:
    """Write down the digest of a mapping; a writer that died before this left it to the next one."""
    if not seal_path(path).is_file():
        data = path.read_bytes()
        files.create_exclusive(seal_path(path), files.sealed({"bytes": len(data), "sha256": files.digest(data)}))


def _known_rows(folder: Place) -> dict[tuple[str, int], tuple[int, ...]]:
    """(id, size) -> row indices over all manifests seen so far."""
    known: dict[tuple[str, int], tuple[int, ...]] = {}
    for path in sorted((folder / "rows").glob("*.parquet")):
        ids, sizes, rows = read_mapping(path)
        for sample, size, row in zip(ids, sizes, rows.tolist()):
            held = known.get((sample, size), ())
            if row not in held:
                known[sample, size] = (*held, row)
    return known


def _write_rows(folder: Place, manifest: "Manifest", rows: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    columns = {"id": manifest.table.column("id"), "size": manifest.table.column("size"), "row": pa.array(rows)}
    pq.write_table(pa.table(columns), sink, compression="zstd", write_page_checksum=True)
    path = rows_path(folder, manifest.short)
    files.create_exclusive(path, sink.getvalue().to_pybytes())
    seal_rows(path)
    return read_rows(folder, manifest.short)


def preview_rows(
    folder: Place, manifest: "Manifest", contents: Callable[[], dict[int, str]]
) -> Int64[np.ndarray, " N"]:
    """Row index of every sample that the set has already, -1 for the others; see `add_rows`."""
    samples, sizes, stated = (manifest.column(name) for name in ("id", "size", "content"))
    held = contents() if any(content is not None for content in stated) else {}
    known = _known_rows(folder)
    rows = np.full(len(samples), -1, np.int64)
    for position, (sample, size, content) in enumerate(zip(samples, sizes, stated)):
        # A file that was changed back has an older row.
        fitting = [row for row in known.get((sample, size), ()) if content is None or held.get(row) == content]
        rows[position] = max(fitting, default=-1)
    return rows


def add_rows(folder: Place, manifest: "Manifest", contents: Callable[[], dict[int, str]]) -> Int64[np.ndarray, " N"]:
    """Row index of every sample of the manifest; samples that the set does not have get rows in a new block.

    A sample is known by id and file size; where the manifest states a content hash (a file rewritten in place), that
    must match too. `contents` gives the hash that the commits hold for each row, and is called only then.
    """
    if rows_path(folder, manifest.short).is_file():
        seal_rows(rows_path(folder, manifest.short))
        return read_rows(folder, manifest.short)
    rows_per_block = int(read_spec(folder)["layout"]["block_rows"])
    while True:
        ledger = read_ledger(folder)
        rows = preview_rows(folder, manifest, contents)
        new = np.flatnonzero(rows < 0)
        if len(new) == 0:
            return _write_rows(folder, manifest, rows)
        # An entry of ours without a mapping is left by a writer that was killed in between. It can be too large or too
        # small when other manifests were mapped since; rows of it that nobody maps stay unused.
        mine = [
            item for item in ledger.segments if item.manifest == manifest.short and item.stop - item.start >= len(new)
        ]
        if mine:
            rows[new] = np.arange(mine[-1].start, mine[-1].start + len(new))
            return _write_rows(folder, manifest, rows)
        check_not_archived(folder)
        start = -(-ledger.num_rows // rows_per_block) * rows_per_block
        entry = {"kind": "rows", "start": start, "stop": start + len(new), "manifest": manifest.short}
        files.create_exclusive(entry_path(folder, ledger.num_entries), files.sealed(entry))


def wanted_metadata(folder: Place, spec: dict[str, Any], ledger: Ledger) -> dict[Place, bytes]:
    """Every `zarr.json` that the ledger asks for, and its bytes; of the compressed arrays where the set is archived."""
    root = folder / "data.zarr"
    wanted = {root: group_metadata({"featstore": {"schema": spec["schema"], "fingerprint": spec["fingerprint"]}})}
    rows_per_block = int(spec["layout"]["block_rows"])
    sealed = archived(folder)
    for array in ledger.arrays.values():
        shard, chunk = array.layout(rows_per_block)
        wanted[root / array.name] = array_metadata(
            num_rows=ledger.num_rows,
            row_shape=array.row_shape,
            dtype=array.dtype,
            chunk_rows=chunk,
            shard_rows=shard,
            attributes=reduction_attributes(folder, spec, array.name),
            dimension_names=array.axes if spec["schema"] > 1 else None,
        )
        if sealed is not None:
            codec = Codec(sealed["codec"], sealed["level"])
            wanted[root / array.name] = codec.metadata(wanted[root / array.name], array.dtype)
        for parent in PurePosixPath(array.name).parents:  # layers/3/cls: `layers` and `layers/3` are groups
            if parent != PurePosixPath("."):
                wanted[root / parent] = group_metadata({})
    return {path / "zarr.json": json.dumps(metadata, indent=2).encode() for path, metadata in wanted.items()}


def write_metadata(folder: Place, spec: dict[str, Any], ledger: Ledger) -> None:
    """Bring every `zarr.json` up to the ledger, so that plain zarr opens the arrays at their present length."""
    while True:
        form = archived(folder)
        for path, data in wanted_metadata(folder, spec, ledger).items():
            if not path.is_file() or path.read_bytes() != data:
                files.write_atomic(path, data)
        # Somebody who grew or archived the set meanwhile may have written a larger shape, or that of compressed shards,
        # which this call then put back.
        latest = read_ledger(folder)
        if latest.num_entries == ledger.num_entries and archived(folder) == form:
            return
        ledger = latest
