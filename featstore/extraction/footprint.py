"""What a plan will leave on the disk, file by file, before anything is computed; no torch.

Shards are arithmetic (`ShardLayout`), metadata is made here as it will be written, and so are the mapping of rows and
the markers with placeholders for what only the data can tell: checksums and content hashes have a known length.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Int64

from featstore import files, records
from featstore.configs import RunConfig
from featstore.datasets.manifest import Manifest
from featstore.extraction.plan import Plan, failed_blocks
from featstore.inputs import HASH_HEX
from featstore.objects import Place, as_object
from featstore.store import commits, compact, ledger, reductions
from featstore.store.layout import ITEMSIZE, ArraySpec
from featstore.store.ledger import Ledger, Segment
from featstore.store.shards import ShardLayout, array_metadata, chunk_rows_for, shard_rows_for

COMPACT_BYTES = 16 * 2**20  # smaller arrays load at once however they are cut
MAPPED_ROWS = 300_000  # of a larger manifest the mapping's size follows from its first rows
CRC, HEX64, HEX16 = 4_000_000_000, "0" * 64, "0" * 16  # as long as nearly all checksums, digests and attempts are
SUMMARY_BYTES = 2600  # of a run's file, beside its options, versions and machine: rates, notes, the prediction
PRECISION_BYTES = 900  # of a spec, beside each array, for what the precision gate measured
PRECISION_ARRAY_BYTES = 560


@dataclass(frozen=True, slots=True)
class Footprint:
    """Files, folders and bytes of files; on most file systems a file and a folder take one inode each."""

    files: int = 0
    folders: int = 0
    bytes: int = 0

    def __add__(self, other: "Footprint") -> "Footprint":
        return Footprint(self.files + other.files, self.folders + other.folders, self.bytes + other.bytes)

    def __sub__(self, other: "Footprint") -> "Footprint":
        return Footprint(self.files - other.files, self.folders - other.folders, self.bytes - other.bytes)

    @property
    def inodes(self) -> int:
        return self.files + self.folders


def measure_folder(folder: Place) -> Footprint:
    """What stands in the folder of a set, what writers have open left out; nothing where it is not there."""
    held = as_object(folder)
    if held is not None:
        found = [facts.st_size for path, facts in held.walk() if not _is_passing(str(path))]
        return Footprint(len(found), 0, sum(found))
    total = Footprint()
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("attempts", "claims")]
        sizes = [os.lstat(os.path.join(place, name)).st_size for name in names if not _is_passing(name)]
        total += Footprint(len(sizes), 1, sum(sizes))
    return total


def _is_passing(name: str) -> bool:
    return name.endswith((".partial", ".intent")) or "/attempts/" in name or "/claims/" in name


@dataclass(frozen=True, slots=True)
class Outlook:
    """A set as it will be when a plan is done.

    `todo` are its blocks to compute, (first row, one past the last, array groups); `rows_here` are those rows of them
    that belong to the manifest; `final` is the whole folder, `added` what is new in it; `arrays` bytes of each array.
    """

    book: Ledger
    rows_per_block: int
    todo: dict[int, tuple[int, int, tuple[str, ...]]]
    rows_here: int
    failed: int
    final: Footprint
    added: Footprint
    arrays: dict[str, int] = field(default_factory=dict)

    @property
    def shard_files(self) -> int:
        """Shards to write."""
        return sum(
            len(shards_of(array, self.rows_per_block, start, stop))
            for start, stop, groups in self.todo.values()
            for group in groups
            for array in self.book.groups[group]
        )

    def passes(self, batch_size: int) -> int:
        """Batches that go through the network."""
        return sum(-(-(stop - start) // batch_size) for start, stop, _ in self.todo.values())


def look_ahead(plan: Plan, run: RunConfig) -> Outlook:
    """The set as this plan will leave it, nothing of it being written; failures are not foreseen."""
    size = int(plan.spec["layout"]["block_rows"])
    exists = (plan.folder / "spec.json").is_file()
    held = ledger.read_ledger(plan.folder) if exists else Ledger()
    book, rows = _grown(plan, held, size)
    done = {group: commits.committed_blocks(plan.folder, group) if exists else set() for group in book.groups}
    names = {array.name for array in plan.arrays}
    here = dict(Counter((rows // size).tolist()))
    todo: dict[int, tuple[int, int, tuple[str, ...]]] = {}
    wanted = [group for group, arrays in book.groups.items() if names & {array.name for array in arrays}]
    again = {group: _failed(plan, group, rows) if run.retry_failed and exists else set() for group in wanted}
    for block, start, stop in book.blocks(size):
        groups = tuple(group for group in wanted if block not in done[group] or block in again[group])
        if groups and block in here:
            todo[block] = (start, stop, groups)
    after = {
        group: done[group] | {block for block, (_, _, groups) in todo.items() if group in groups}
        for group in book.groups
    }
    spec = _spec_after(plan, exists=exists)
    now = _standing(plan.folder) if exists else {}
    then = _static(plan, spec, book, now)
    if todo:
        then["runs/" + "0" * 32 + ".json"] = run_file_bytes(plan, run)
    copies = _copies(plan, book, after, size) if todo else {}
    before = _blocks(book, held.groups, done, size)
    final = _blocks(book, book.groups, after, size)
    kept = {name: size for name, size in now.items() if not name.startswith("compact.zarr/")} if copies else now
    return Outlook(
        book=book,
        rows_per_block=size,
        todo=todo,
        rows_here=sum(here[block] for block in todo),
        failed=_num_failed(plan, held, rows) if exists else 0,
        final=_of_files({**kept, **then, **copies}) + final,
        added=_of_files({**kept, **then, **copies}) + final - (_of_files(now) + before),
        arrays={
            array.name: sum(
                sum(shards_of(array, size, start, stop)) for start, stop, groups in todo.values() if group in groups
            )
            for group, arrays in book.groups.items()
            for array in arrays
            if group in wanted
        },
    )


def _grown(plan: Plan, book: Ledger, size: int) -> tuple[Ledger, Int64[np.ndarray, " N"]]:
    """The ledger with the rows and arrays that this plan adds, and the row of every sample (see `ledger.add_rows`)."""
    new_arrays = [array.fixed(size) for array in plan.arrays if array.name not in book.arrays]
    groups = dict(book.groups)
    if new_arrays:
        groups[ledger.group_name([array.name for array in new_arrays])] = new_arrays
    rows, segments = plan.rows.copy(), list(book.segments)
    new = np.flatnonzero(rows < 0)
    if len(new):
        short = plan.manifest.short
        mine = [item for item in segments if item.manifest == short and item.stop - item.start >= len(new)]
        start = mine[-1].start if mine else -(-book.num_rows // size) * size
        if not mine:
            segments.append(Segment(start, start + len(new), short))
        rows[new] = np.arange(start, start + len(new))
    entries = book.num_entries + bool(new_arrays) + (len(segments) - len(book.segments))
    return Ledger(segments, groups, entries), rows


def _failed(plan: Plan, group: str, rows: Int64[np.ndarray, " N"]) -> set[int]:
    return failed_blocks(plan.folder, group, set(rows.tolist()))


def _num_failed(plan: Plan, book: Ledger, rows: Int64[np.ndarray, " N"]) -> int:
    """Samples of the manifest that are marked as failed, in any array."""
    names, known = {array.name for array in plan.arrays}, set(rows.tolist())
    failed: set[int] = set()
    for group, arrays in book.groups.items():
        if names & {array.name for array in arrays}:
            for commit in commits.read_commits(plan.folder, group).values():
                failed |= commit.failed.keys() & known
    return len(failed)


def shards_of(array: ArraySpec, rows_per_block: int, start: int, stop: int) -> list[int]:
    """Bytes of the shards of one block of an array."""
    shard_rows, chunk_rows = array.layout(rows_per_block)
    return _shards(array.row_shape, array.dtype, shard_rows, chunk_rows, start, stop)


def _shards(
    row_shape: tuple[int, ...], dtype: str, shard_rows: int, chunk_rows: int, start: int, stop: int
) -> list[int]:
    layout = ShardLayout(row_shape=row_shape, dtype=dtype, chunk_rows=chunk_rows, shard_rows=shard_rows)
    found = []
    while start < stop:
        end = min((start // shard_rows + 1) * shard_rows, stop)
        found.append(-(-(end - start) // chunk_rows) * layout.stride + layout.index_bytes)
        start = end
    return found


def _blocks(book: Ledger, groups: dict[str, list[ArraySpec]], done: dict[str, set[int]], size: int) -> Footprint:
    """Shards with their folders, and markers, of committed blocks."""
    total = Footprint()
    ranges = book.blocks(size)
    kinds: Counter[tuple[str, int, int, int, int]] = Counter()
    for group in groups:
        for block, start, stop in ranges:
            if block in done[group]:
                kinds[group, stop - start, len(str(block)), len(str(start)), len(str(stop))] += 1
    for (group, rows, digits, first_digits, last_digits), count in kinds.items():
        # Blocks begin at multiples of their size, which shards divide: where they begin changes only digits.
        arrays = tuple(groups[group])
        sizes = {array: shards_of(array, size, 0, rows) for array in arrays}
        shards = sum(len(found) for found in sizes.values())
        folders = sum(len(found) * len(array.row_shape) for array, found in sizes.items())
        marker = _marker_bytes(arrays, size, rows, (digits, first_digits, last_digits))
        num_bytes = sum(sum(found) for found in sizes.values()) + marker
        total += Footprint(count * (shards + 1), count * folders, count * num_bytes)
    for group, held in groups.items():
        if done[group]:
            total += Footprint(folders=1 + len(held))  # commits/<group> and data.zarr/<array>/c
    return total + Footprint(folders=int(any(done[group] for group in groups)))  # commits


@lru_cache(maxsize=256)
def _marker_bytes(arrays: tuple[ArraySpec, ...], size: int, rows: int, digits: tuple[int, int, int]) -> int:
    block, start, stop = (10 ** (count - 1) for count in digits)
    shards = {}
    for array in arrays:
        first = start // array.layout(size)[0]
        found = shards_of(array, size, 0, rows)
        shards[array.name] = {str(first + number): [num, CRC, CRC] for number, num in enumerate(found)}
    marker = {
        "block": block,
        "start": start,
        "stop": stop,
        "attempt": HEX16,
        "shards": shards,
        "failed": {},
        "contents": "0" * (HASH_HEX * rows),
    }
    return len(files.sealed(marker))


def _of_files(sizes: dict[str, int]) -> Footprint:
    """Files by their paths in the set's folder, and the folders that they need, the set's own included."""
    folders = {parent for name in sizes for parent in PurePosixPath(name).parents}
    return Footprint(len(sizes), len(folders), sum(sizes.values()))


def _static(plan: Plan, spec: dict[str, Any], book: Ledger, now: dict[str, int]) -> dict[str, int]:
    """Bytes of everything but blocks, run files and copies that are to be made, by path."""
    found, exists = dict(now), "spec.json" in now
    if not exists:
        found["spec.json"] = len(files.sealed(spec)) + _precision_bytes(plan)
    known = ledger.read_ledger(plan.folder) if exists else Ledger()
    number = known.num_entries
    new_arrays = [array for array in book.arrays.values() if array.name not in known.arrays]
    entries: list[dict[str, Any]] = []
    if new_arrays:
        group = ledger.group_name([array.name for array in new_arrays])
        entries.append({"kind": "arrays", "group": group, "arrays": [array.as_dict() for array in new_arrays]})
    for segment in book.segments[len(known.segments) :]:
        entries.append({"kind": "rows", "start": segment.start, "stop": segment.stop, "manifest": segment.manifest})
    for place, entry in enumerate(entries, number):
        found[f"ledger/{place:06d}.json"] = len(files.sealed(entry))
    for path, data in ledger.wanted_metadata(plan.folder, spec, book).items():
        found[path.relative_to(plan.folder).as_posix()] = len(data)
    mapping = f"rows/{plan.manifest.short}.parquet"
    if mapping not in found:
        found[mapping] = mapping_bytes(plan.manifest)
        seal = {"bytes": found[mapping], "sha256": HEX64}
        found[f"rows/{plan.manifest.short}.json"] = len(files.sealed(seal))
    found |= _parameters(plan, spec, new_arrays, exists=exists)
    return found


def _standing(folder: Place) -> dict[str, int]:
    """Bytes of the files that stand in a set, blocks aside, by path."""
    found = {}
    for pattern in ("spec.json", "ledger/*.json", "rows/*", "runs/*.json", "reductions/*", "data.zarr/**/zarr.json"):
        for path in folder.glob(pattern):
            if not path.name.endswith(".partial"):
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    if isinstance(folder, Path) and (folder / "compact.zarr").is_dir():
        for path in (folder / "compact.zarr").rglob("*"):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def mapping_bytes(manifest: Manifest) -> int:
    """Bytes of the parquet file that maps samples to rows, written here to nowhere."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = min(len(manifest), MAPPED_ROWS)
    part = manifest.table.slice(0, count)
    # Not pa.array(...), which imports pandas: that takes a second.
    numbers = pa.Array.from_buffers(pa.int64(), count, [None, pa.py_buffer(np.arange(count, dtype=np.int64))])
    columns = {"id": part.column("id"), "size": part.column("size"), "row": numbers}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd", write_page_checksum=True)
    return int(sink.tell() * len(manifest) / max(count, 1))


def _spec_after(plan: Plan, *, exists: bool) -> dict[str, Any]:
    """The spec with what is measured when the set is created, placeholders for numbers; on disk it stays as it is."""
    steps = reductions.steps_of(plan.spec)
    reduced = [array for array in plan.arrays if reductions.is_reduced(array.name, steps)]
    if exists or not reduced:
        return plan.spec
    entry = {array.name: _described(plan, array) for array in reduced}
    sample = {
        "images": reductions.SAMPLE,
        "fitted_on": reductions.SAMPLE // 2,
        "measured_on": reductions.SAMPLE // 2,
        "same_images": False,
        "split": "train",
        "manifest": plan.manifest.short,
    }
    named = HEX64 if any(step != "pool2" and step != "pool4" for step in steps) else None
    return {**plan.spec, "reduction": {"parameters": named, "sample": sample, "arrays": entry}}


def _described(plan: Plan, array: ArraySpec) -> dict[str, Any]:
    steps = reductions.steps_of(plan.spec)
    grid = plan.source.architecture.grid(plan.preprocess.height, plan.preprocess.width)
    dim = plan.source.architecture.patch_width
    stored = plan.spec["identity"]["stored_dtype"]
    reduction = reductions.Reduction(
        steps=steps, grid=grid, dim=dim, dtype="float16" if stored == "float16" else "float32"
    )
    shares = {"k": 10, "among": 1000, "overlap": 0.999999}
    loss = {
        "bytes_per_row": array.row_bytes,
        "full_bytes_per_row": grid[0] * grid[1] * dim * ITEMSIZE[stored],
        **dict.fromkeys(("relative_error", "cosine_mean", "cosine_worst", "saturated"), 0.999999),
        **dict.fromkeys(("neighbours_images", "neighbours_tokens"), shares),
    }
    return reductions.describe(replace(reduction, loss=loss))


def _parameters(plan: Plan, spec: dict[str, Any], new_arrays: list[ArraySpec], *, exists: bool) -> dict[str, int]:
    """Fitted parameters, and the descriptions of reduced arrays that join a set which is there."""
    steps = reductions.steps_of(plan.spec)
    reduced = [array for array in new_arrays if reductions.is_reduced(array.name, steps)]
    if not reduced:
        return {}
    dim, found, numbers, header = plan.source.architecture.patch_width, {}, 0, 8
    components = next((int(step[4:]) for step in steps if step.startswith("pca:")), None)
    for array in reduced:
        if components is not None:
            numbers += dim + components * dim
            header += 150 + 2 * len(array.name)
        if "int8" in steps:
            numbers += 2 * (components or dim)
            header += 150 + 2 * len(array.name)
        if exists:
            described = {"parameters": HEX64, "sample": {}, "arrays": {array.name: _described(plan, array)}}
            name = reductions.added_path(plan.folder, array.name).name
            found[f"reductions/{name}"] = len(files.sealed(described)) + 120
    if numbers:
        found["reductions/new.safetensors"] = 4 * numbers + header
    return found


def _precision_bytes(plan: Plan) -> int:
    """What the precision gate adds to the spec of a new set in another type than float32."""
    identity = plan.spec["identity"]
    if (identity["compute_dtype"], identity.get("weight_dtype", "same")) == ("float32", "same"):
        return 0
    parts = 2 + (plan.source.architecture.num_registers > 0)
    return PRECISION_BYTES + PRECISION_ARRAY_BYTES * parts * (1 + len(plan.layers))


def run_file_bytes(plan: Plan, run: RunConfig) -> int:
    """Bytes of the file that a run leaves about itself, estimated."""
    held = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(run).items()}
    record = {"run": held, "versions": records.versions(), "machine": records.machine(), "weights": plan.source.origin}
    return len(files.sealed(record)) + SUMMARY_BYTES


def _copies(plan: Plan, book: Ledger, after: dict[str, set[int]], size: int) -> dict[str, int]:
    """Compact copies (`store.compact`) that the end of the run makes, once no block is missing."""
    blocks = [block for block, _, _ in book.blocks(size)]
    if not isinstance(plan.folder, Path) or any(set(blocks) - after[group] for group in book.groups):
        return {}
    found: dict[str, int] = {}
    stop = book.blocks(size)[-1][2]
    for array in book.arrays.values():
        shard_rows = array.layout(size)[0]
        small = array.row_bytes <= compact.ROW_LIMIT_BYTES and shard_rows * array.row_bytes < compact.SMALL_SHARD_BYTES
        if len(array.row_shape) != 1 or not small or stop <= shard_rows or stop * array.row_bytes < COMPACT_BYTES:
            continue
        rows = shard_rows_for(array.row_bytes, 1 << 62, compact.COPY_SHARD_BYTES)
        chunk = chunk_rows_for(array.row_bytes, rows)
        sizes = _shards(array.row_shape, array.dtype, rows, chunk, 0, stop)
        home = f"compact.zarr/{array.name}"
        facts = {"array": array.name, "stop": stop, "source": HEX64}
        metadata = array_metadata(
            num_rows=stop,
            row_shape=array.row_shape,
            dtype=array.dtype,
            chunk_rows=chunk,
            shard_rows=rows,
            attributes={"featstore": facts},
            dimension_names=array.axes,
        )
        found[f"{home}/zarr.json"] = _json_bytes(metadata)
        shards = {str(number): [num, CRC, CRC] for number, num in enumerate(sizes)}
        record = {**facts, "group": book.group_of(array.name), "blocks": blocks, "shards": shards}
        found[f"compact.zarr/{array.name.replace('/', '.')}.json"] = len(files.sealed(record))
        for number, num_bytes in enumerate(sizes):
            found[f"{home}/c/{number}/0"] = num_bytes
    return found


def _json_bytes(value: dict[str, Any]) -> int:
    import json

    return len(json.dumps(value, indent=2).encode())


def token_choices(plan: Plan) -> dict[str, int]:
    """Bytes that each choice of `--tokens` takes for the whole data set, and one more layer of `--layers`."""
    architecture = plan.source.architecture
    rows, columns = architecture.grid(plan.preprocess.height, plan.preprocess.width)
    item, count = ITEMSIZE[plan.spec["identity"]["stored_dtype"]], len(plan.manifest)
    widths = {
        "cls": architecture.embed_dim,
        "mean_patch": architecture.patch_width,
        "registers": architecture.num_registers * architecture.embed_dim,
        "patches": rows * columns * architecture.patch_width,
    }
    found = {name: count * item * width for name, width in widths.items() if width}
    held = {array.name: array for array in plan.arrays}
    steps = reductions.steps_of(plan.spec)
    if steps and "patches" in held:
        found[f"patches ({','.join(steps)})"] = count * held["patches"].row_bytes
    if architecture.depth:
        kept: Iterable[ArraySpec] = [array for array in plan.arrays if "/" not in array.name]
        found["each of --layers"] = count * sum(array.row_bytes for array in kept)
    return found
