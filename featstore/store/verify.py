"""Is every committed byte what its commit says? And, on request, make damaged blocks be computed again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from featstore.datasets import manifest as manifests
from featstore.errors import FeatstoreError
from featstore.objects import Place
from featstore.store import commits, ledger
from featstore.store.catalog import Entry, Store
from featstore.store.layout import ArraySpec, read_spec
from featstore.store.reader import ShardedArray
from featstore.store.shards import read_summary, shard_key

PIECE_BYTES = 64 * 2**20  # values are looked at in pieces of this size


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as committed; `group` and `block` say what to compute again, if that mends it."""

    place: str
    what: str
    group: str | None = None
    block: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome for one set."""

    name: str
    num_blocks: int
    num_bytes: int
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_set(
    store: Store, entry: Entry, *, deep: bool = False, advance: Callable[[int], None] = lambda _: None
) -> Verdict:
    """Check one set: spec, ledger, markers, metadata, shard sizes and index checksums, and the mappings of rows.

    `deep` adds every chunk, that failed rows and no others are NaN, and the manifests. `advance` is told the number of
    bytes checked, as they are.
    """
    try:
        spec = read_spec(entry.folder)
        book = ledger.read_ledger(entry.folder)
    except OSError as error:
        return Verdict(entry.name, 0, 0, [Problem("spec or ledger", str(error))])
    size = int(spec["layout"]["block_rows"])
    problems = _check_metadata(entry.folder, spec, book)
    values = deep and not problems
    count = total = 0
    ranges = {block: (start, stop) for block, start, stop in book.blocks(size)}
    for group, arrays in book.groups.items():
        for block in sorted(commits.committed_blocks(entry.folder, group)):
            place = f"commits/{group}/{block:08d}.json"
            try:
                commit = commits.read_commit(entry.folder, group, block)
            except FileNotFoundError:
                continue  # taken back just now
            except OSError as error:
                problems.append(Problem(place, str(error), group, block))
                continue
            finally:
                count += 1
            if ranges.get(block) != (commit.start, commit.stop):
                problems.append(Problem(place, "its rows are not those of the ledger", group, block))
                continue
            for where, what, num_bytes in _check_block(entry.folder, arrays, commit, size, deep):
                total += num_bytes
                advance(num_bytes)
                if what:
                    problems.append(Problem(where, what, group, block))
            if values and not any((item.group, item.block) == (group, block) for item in problems):
                for array in arrays:
                    what = _check_values(entry.folder, array, commit)
                    if what:
                        problems.append(Problem(f"data.zarr/{array.name}", what, group, block))
    problems += _check_mappings(store, entry, book, deep)
    return Verdict(entry.name, count, total, problems)


def _check_metadata(folder: Place, spec: dict[str, Any], book: ledger.Ledger) -> list[Problem]:
    problems = []
    for path, data in ledger.wanted_metadata(folder, spec, book).items():
        if not path.is_file() or path.read_bytes() != data:
            what = "is missing or not what the ledger asks for; --repair or the next extract writes it again"
            problems.append(Problem(path.relative_to(folder).as_posix(), what))
    return problems


def _check_block(
    folder: Place, arrays: list[ArraySpec], commit: commits.Commit, rows_per_block: int, deep: bool
) -> Iterator[tuple[str, str, int]]:
    """(place, problem or '', bytes) of every shard of one committed block."""
    for array in arrays:
        shard_rows, chunk_rows = array.layout(rows_per_block)
        for shard, (size, index_crc, data_crc) in commit.shards[array.name].items():
            key = f"{array.name}/{shard_key(int(shard), 1 + len(array.row_shape))}"
            try:
                found = read_summary(
                    folder / "data.zarr" / key,
                    row_shape=array.row_shape,
                    dtype=array.dtype,
                    chunk_rows=chunk_rows,
                    shard_rows=shard_rows,
                    deep=deep,
                )
            except FileNotFoundError:
                yield key, "the shard file is missing", 0
            except OSError as error:  # damaged, or a bad sector
                yield key, str(error), 0
            else:
                same = (found.size, found.index_crc, found.data_crc) == (size, index_crc, data_crc)
                yield key, "" if same else "size or checksum differs from what was committed", size


def _check_values(folder: Place, array: ArraySpec, commit: commits.Commit) -> str:
    """Failed rows are NaN, all others finite and not all zero."""
    reader = ShardedArray(folder / "data.zarr" / array.name)
    step = max(1, PIECE_BYTES // array.row_bytes)
    for first in range(commit.start, commit.stop, step):
        stop = min(first + step, commit.stop)
        values = reader.read(first, stop).reshape(stop - first, -1).astype(np.float32)
        failed = np.isin(np.arange(first, stop), list(commit.failed))
        finite = np.isfinite(values).all(1)
        if (finite == failed).any():
            return f"row {first + int((finite == failed).argmax())} is NaN without having failed, or the reverse"
        zero = ~failed & ~values.any(1)
        if zero.any():
            return f"row {first + int(zero.argmax())} is all zero"
    return ""


def _check_mappings(store: Store, entry: Entry, book: ledger.Ledger, deep: bool) -> list[Problem]:
    problems = []
    for path in sorted((entry.folder / "rows").glob("*.parquet")):
        try:
            ids, sizes, rows = ledger.read_mapping(path)
            manifest = store.manifest(entry.dataset, path.stem)
            samples = manifest.column("id"), manifest.column("size")
            digest = manifests.table_digest(manifest.table) if deep else manifest.digest
        except (FeatstoreError, OSError, ValueError) as error:
            problems.append(Problem(f"rows/{path.name}", str(error)))
            continue
        inside = len(rows) == 0 or 0 <= rows.min() <= rows.max() < book.num_rows
        if (ids, sizes) != samples or not inside or len(np.unique(rows)) != len(rows):
            problems.append(
                Problem(f"rows/{path.name}", f"does not map the {len(manifest)} samples of its manifest, each to a row")
            )
        if digest != manifest.digest or manifest.short != path.stem:
            place = f"datasets/{entry.dataset}/{path.stem}"
            problems.append(Problem(place, "the manifest's digest does not match its rows; register it again"))
    return problems


def repair_set(entry: Entry, verdict: Verdict) -> int:
    """Take back the commits of damaged blocks, so that the next extract computes them again; returns their number.

    Metadata of the arrays is written anew. Damage to the spec, the ledger or a mapping cannot be mended.
    """
    book = ledger.read_ledger(entry.folder)
    ledger.write_metadata(entry.folder, entry.spec, book)
    doomed = {
        (item.group, item.block) for item in verdict.problems if item.group is not None and item.block is not None
    }
    for group, block in sorted(doomed):
        commits.take_back(entry.folder, group, book.groups[group], block, int(entry.spec["layout"]["block_rows"]))
    return len(doomed)
