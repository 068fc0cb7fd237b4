"""Is every committed byte what its commit says? And, on request, make damaged blocks be computed again."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from featstore import files
from featstore.datasets import manifest as manifests
from featstore.datasets.manifest import Manifest
from featstore.errors import CorruptError, FeatstoreError
from featstore.objects import Place
from featstore.store import commits, ledger, reductions
from featstore.store.catalog import Entry, Store
from featstore.store.layout import ArraySpec, check_current, read_spec, set_name
from featstore.store.reader import ShardedArray
from featstore.store.shards import read_summary, shard_key
from featstore.store.values import check_values

T = TypeVar("T")

THREADS = min(4, os.cpu_count() or 1)  # waiting for the disk and looking at values overlap; checksums hold the GIL
SEALED = (
    *("spec.json", "ledger/*.json", "rows/*.json", "runs/*.json", "commits/*/*.json"),
    *("reductions/*.json", "compact.zarr/*.json", "archive.json", "archiving.json"),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as committed.

    `group` and `block` say what to compute again, if that mends it; `rewrite` that the file follows from others.
    """

    place: str
    what: str
    group: str | None = None
    block: int | None = None
    rewrite: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome for one set, or for all registered data sets; `notes` is what lies about and harms nobody."""

    name: str
    num_blocks: int
    num_bytes: int
    problems: list[Problem]
    folder: Place
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class Repair:
    """What was mended: blocks taken back, files written again; and the problems that only a person can solve."""

    num_blocks: int
    num_files: int
    left: list[Problem]


class _Manifests:
    """Manifests read so far; each is read, and its digest computed, once for all sets."""

    def __init__(self, store: Store, deep: bool):
        self.store, self.deep = store, deep
        self._known: dict[tuple[str, str], tuple[Manifest | None, str]] = {}

    def get(self, dataset: str, short: str) -> tuple[Manifest | None, str]:
        """(the manifest if it can be read, what is wrong with it or '')."""
        if (dataset, short) not in self._known:
            self._known[dataset, short] = self._read(dataset, short)
        return self._known[dataset, short]

    def _read(self, dataset: str, short: str) -> tuple[Manifest | None, str]:
        try:
            manifest = manifests.load(self.store.datasets_folder, dataset, short)
        except (FeatstoreError, OSError, ValueError) as error:
            return None, str(error)
        last = (self.store.datasets_folder / dataset / short / "source.toml").read_bytes().splitlines()[-1:]
        if last and not last[0].startswith((b'seal = "', b'digest = "', b'sha256 = "')):  # schema 1 has no seal
            return manifest, "source.toml has lost its seal; register the data set again"
        digest = manifests.table_digest(manifest.table) if self.deep else manifest.digest
        if digest != manifest.digest or manifest.short != short:
            return manifest, "the manifest's digest does not match its rows; register it again"
        return manifest, ""


def set_folders(store: Store) -> list[Place]:
    """Every folder that holds a set or what is left of one, in alphabetical order."""
    home = store.path / "sets"
    if not home.is_dir():
        return []
    found = [folder for dataset in home.iterdir() if dataset.is_dir() for folder in dataset.iterdir()]
    return sorted(path for path in found if not path.name.startswith(".") and any(path.rglob("*.*")))


def verify_store(
    store: Store, *, deep: bool = False, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Verdict]:
    """Check the registered data sets, then every set; arguments as in `verify_set`. Damage to one stops no other."""
    known = _Manifests(store, deep)
    yield _verify_datasets(store, known)
    for folder in set_folders(store):
        yield _verify_folder(folder, known, deep, advance)


def verify_set(
    store: Store, entry: Entry, *, deep: bool = False, advance: Callable[[int], None] = lambda _: None
) -> Verdict:
    """Check one set: spec, ledger, markers, metadata, shard sizes and index checksums, and the mappings of rows.

    `deep` adds every chunk, that failed rows and no others are NaN (zero for int8), the manifests, the records of runs
    and that every sealed file is written as featstore writes it. `advance` is told the number of bytes checked, as
    they are. Memory is bounded: a chunk and a piece of values for each thread.
    """
    return _verify_folder(entry.folder, _Manifests(store, deep), deep, advance)


def expected_bytes(folder: Place) -> int:
    """Bytes that checking a set deeply will read, for a progress line; 0 where its ledger cannot be read."""
    try:
        size = int(read_spec(folder)["layout"]["block_rows"])
        book = ledger.read_ledger(folder)
    except (OSError, ValueError, KeyError):
        return 0
    rows = {block: stop - start for block, start, stop in book.blocks(size)}
    total = 0
    for group, arrays in book.groups.items():
        count = sum(rows.get(block, 0) for block in commits.committed_blocks(folder, group))
        total += count * sum(array.row_bytes for array in arrays)
    return total


def _verify_datasets(store: Store, known: _Manifests) -> Verdict:
    """Every registered manifest, current or older."""
    problems: list[Problem] = []
    home = store.datasets_folder
    mark = store.path / "store.json"
    try:
        if files.sealed(files.unseal(mark.read_bytes(), mark)) != mark.read_bytes():
            problems.append(Problem("store.json", "is not as it was written; restore it from a copy"))
    except OSError as error:
        if home.is_dir():  # an empty folder is no store yet
            problems.append(Problem("store.json", f"missing or damaged ({error}); restore it from a copy"))
    count = 0
    for folder in sorted(home.iterdir()) if home.is_dir() else []:
        shorts = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        try:
            data = (folder / "current").read_bytes()
        except OSError as error:
            if shorts:
                what = f"which manifest is current cannot be told ({error.strerror or error}); register it again"
                problems.append(Problem(f"datasets/{folder.name}/current", what))
            continue
        if data.decode("ascii", "replace") not in {f"{short}\n" for short in shorts}:
            what = "does not name a manifest of this data set; register it again"
            problems.append(Problem(f"datasets/{folder.name}/current", what))
        for short in shorts:
            count += 1
            what = known.get(folder.name, short)[1]
            if what:
                problems.append(Problem(f"datasets/{folder.name}/{short}", what))
    return Verdict("data sets", count, 0, problems, home)


def _verify_folder(folder: Place, known: _Manifests, deep: bool, advance: Callable[[int], None]) -> Verdict:
    name = f"{folder.parent.name}/{folder.name}"
    try:
        spec = read_spec(folder)
        book = ledger.read_ledger(folder)
    except FileNotFoundError:
        what = "spec.json is missing; restore it from a copy, or remove the folder"
        return Verdict(name, 0, 0, [Problem("spec or ledger", what)], folder)
    except OSError as error:
        return Verdict(name, 0, 0, [Problem("spec or ledger", str(error))], folder)
    archived = (folder / "archive.json").is_file()
    problems = [*_check_names(folder, spec, book), *_check_metadata(folder, spec, book)]
    whole = not any(item.rewrite for item in problems)
    readers = {}
    if deep and whole and not archived:
        readers = {array: ShardedArray(folder / "data.zarr" / array) for array in book.arrays}
    size = int(spec["layout"]["block_rows"])
    ranges = {block: (start, stop) for block, start, stop in book.blocks(size)}
    count = total = 0
    shards: list[_Shard] = []
    for group, arrays in book.groups.items():
        for block in sorted(commits.committed_blocks(folder, group)):
            count += 1
            found = _read_marker(folder, (group, arrays), block, ranges, size)
            if isinstance(found, Problem):
                problems.append(found)
            elif found is not None and not archived:
                shards += _shards_of(arrays, found, group, size)
    tasks = (partial(_check_shard, folder, shard, readers.get(shard.array.name), deep) for shard in shards)
    for shard, (what, num_bytes) in zip(shards, _in_threads(tasks, deep or not isinstance(folder, os.PathLike))):
        total += num_bytes
        advance(num_bytes)
        if what:
            problems.append(Problem(shard.place(what), what, shard.group, shard.commit.block))
    problems += _check_mappings(folder, spec, book, known)

    def tell(num_bytes: int) -> None:
        nonlocal total
        total += num_bytes
        advance(num_bytes)

    problems += _check_extras(folder, spec, book, deep, tell)
    if deep:
        problems += _check_seals(folder)
    return Verdict(name, count, total, problems, folder, _leftovers(folder, shards) if deep else [])


def _check_names(folder: Place, spec: dict[str, Any], book: ledger.Ledger) -> Iterator[Problem]:
    """What the spec and the ledger say of the folder they stand in."""
    stated = spec["dataset"], f"{set_name(spec)}-{spec['fingerprint'][:8]}"
    if (folder.parent.name, folder.name) != stated:
        what = f"says that this folder is {'/'.join(stated)}; `featstore mv` was stopped, or the folder was renamed"
        yield Problem("spec.json", f"{what}: run the same `featstore mv` again")
    if files.digest(spec["identity"]) != spec["fingerprint"]:
        yield Problem("spec.json", "its fingerprint is not that of its identity; restore it from a copy")
    home = folder / "commits"
    for path in sorted(home.iterdir()) if home.is_dir() else []:
        if path.name not in book.groups and commits.committed_blocks(folder, path.name):
            what = "holds commits of arrays that the ledger does not know: its last entry is lost"
            yield Problem(f"commits/{path.name}", f"{what}; restore the folder `ledger` from a copy")


def _check_metadata(folder: Place, spec: dict[str, Any], book: ledger.Ledger) -> list[Problem]:
    try:
        wanted = ledger.wanted_metadata(folder, spec, book)
    except CorruptError:
        return []  # of archive.json, which is reported elsewhere
    problems = []
    for path, data in wanted.items():
        if not path.is_file() or path.read_bytes() != data:
            what = "is missing or not what the ledger asks for; --repair or the next extract writes it again"
            problems.append(Problem(path.relative_to(folder).as_posix(), what, rewrite=True))
    return problems


def _read_marker(
    folder: Place,
    named: tuple[str, list[ArraySpec]],
    block: int,
    ranges: dict[int, tuple[int, int]],
    size: int,
) -> commits.Commit | Problem | None:
    """The marker of a block, what is wrong with it, or None if it was taken back just now."""
    group, arrays = named
    place = f"commits/{group}/{block:08d}.json"
    try:
        commit = commits.read_commit(folder, group, block)
    except FileNotFoundError:
        return None
    except OSError as error:
        return Problem(place, str(error), group, block)
    if ranges.get(block) != (commit.start, commit.stop):
        return Problem(place, "its rows are not those of the ledger", group, block)
    wanted = {array.name: {str(number) for number in _numbers(array, commit, size)} for array in arrays}
    if {name: set(held) for name, held in commit.shards.items()} != wanted:
        return Problem(place, "its shards are not those of the ledger", group, block)
    return commit


@dataclass(frozen=True, slots=True)
class _Shard:
    """One committed shard: rows [start, stop) of an array."""

    array: ArraySpec
    group: str
    commit: commits.Commit
    number: int
    size: int

    @property
    def layout(self) -> tuple[int, int]:
        return self.array.layout(self.size)

    @property
    def key(self) -> str:
        return f"{self.array.name}/{shard_key(self.number, 1 + len(self.array.row_shape))}"

    @property
    def rows(self) -> tuple[int, int]:
        rows = self.layout[0]
        return max(self.commit.start, self.number * rows), min(self.commit.stop, (self.number + 1) * rows)

    def place(self, what: str) -> str:
        """Values are a matter of the array, bytes of the file."""
        return f"data.zarr/{self.array.name}" if what.startswith("row ") else self.key


def _numbers(array: ArraySpec, commit: commits.Commit, size: int) -> range:
    """Shards that hold the rows of a block."""
    rows = array.layout(size)[0]
    return range(commit.start // rows, (commit.stop - 1) // rows + 1)


def _shards_of(arrays: list[ArraySpec], commit: commits.Commit, group: str, size: int) -> list[_Shard]:
    return [_Shard(array, group, commit, number, size) for array in arrays for number in _numbers(array, commit, size)]


def _in_threads(tasks: Iterator[Callable[[], T]], threads: bool) -> Iterator[T]:
    """Results in order; a few tasks are under way at a time, so that memory stays bounded and an interrupt is quick."""
    if not threads:
        yield from (task() for task in tasks)
        return
    pool = ThreadPoolExecutor(THREADS)
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > 2 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_shard(folder: Place, shard: _Shard, reader: ShardedArray | None, deep: bool) -> tuple[str, int]:
    """(what is wrong or '', bytes checked) of one committed shard."""
    array = shard.array
    shard_rows, chunk_rows = shard.layout
    try:
        found = read_summary(
            folder / "data.zarr" / shard.key,
            row_shape=array.row_shape,
            dtype=array.dtype,
            chunk_rows=chunk_rows,
            shard_rows=shard_rows,
            deep=deep,
        )
        if [found.size, found.index_crc, found.data_crc] != shard.commit.shards[array.name][str(shard.number)]:
            return "size or checksum differs from what was committed", found.size
        fault = "" if reader is None else check_values(shard.array, shard.rows, shard.commit.failed, reader)
        return fault, found.size
    except FileNotFoundError:
        return "the shard file is missing", 0
    except OSError as error:  # damaged, or a bad sector
        return str(error), 0


def _check_mappings(folder: Place, spec: dict[str, Any], book: ledger.Ledger, known: _Manifests) -> Iterator[Problem]:
    paths = sorted((folder / "rows").glob("*.parquet"))
    for path in paths:
        place = f"rows/{path.name}"
        try:
            mapping = ledger.read_mapping_table(path)
            rows = mapping.column("row").to_numpy()
        except (FeatstoreError, OSError, ValueError) as error:
            yield Problem(place, str(error))
            continue
        manifest, what = known.get(spec["dataset"], path.stem)
        if what:
            yield Problem(f"datasets/{spec['dataset']}/{path.stem}", what)
        if manifest is None:
            continue
        inside = len(rows) == 0 or 0 <= rows.min() <= rows.max() < book.num_rows
        same = mapping.select(["id", "size"]).equals(manifest.table.select(["id", "size"]))
        if not same or not inside or len(np.unique(rows)) != len(rows):
            yield Problem(place, f"does not map the {len(manifest)} samples of its manifest, each to a row")
        elif spec["schema"] > 1 and not ledger.seal_path(path).is_file():
            what = "agrees with its manifest and is not sealed; --repair or the next extract does it"
            yield Problem(place, what, rewrite=True)
    mapped = {path.stem for path in paths}
    size = int(spec["layout"]["block_rows"])
    done = set[int]().union(*(commits.committed_blocks(folder, group) for group in book.groups))
    for segment in book.segments:
        if segment.manifest not in mapped and done & set(range(segment.start // size, -(-segment.stop // size))):
            what = "is missing though rows of its manifest are committed; the next extract writes it again"
            yield Problem(f"rows/{segment.manifest}.parquet", what)


def _check_extras(
    folder: Place, spec: dict[str, Any], book: ledger.Ledger, deep: bool, advance: Callable[[int], None]
) -> Iterator[Problem]:
    """Parameters of reductions, compact copies, archives."""
    from featstore.store.archive import damaged_shards
    from featstore.store.compact import check_copies

    for name in book.arrays:
        try:
            reductions.read_reduction(folder, spec, name)
        except OSError as error:
            yield Problem(f"reductions of {name}", str(error))
    for path in sorted((folder / "reductions").glob("*.safetensors")):
        if not files.digest(path.read_bytes()).startswith(path.stem):
            yield Problem(f"reductions/{path.name}", "other bytes than its name says; restore it from a copy")
    for place, what in check_copies(folder, deep=deep):
        yield Problem(place, f"{what}; --repair removes this copy, `featstore compact` makes it again", rewrite=True)
    try:
        for place, what, group, block in damaged_shards(folder, deep=deep, advance=advance):
            yield Problem(place, what, group, block)
    except OSError as error:
        yield Problem("archive.json", str(error))


def _check_seals(folder: Place) -> Iterator[Problem]:
    """Sealed files byte for byte: a flipped bit can leave a number what it was (1e-06 and 1E-06)."""
    for path in (found for pattern in SEALED for found in sorted(folder.glob(pattern))):
        place = path.relative_to(folder).as_posix()
        try:
            data = path.read_bytes()
            if files.sealed(files.unseal(data, path)) != data:
                yield Problem(place, "says what was sealed, in other bytes than were written; restore it from a copy")
        except FileNotFoundError:
            continue  # taken back just now
        except OSError as error:
            if place.startswith("runs/"):  # the others are read and reported elsewhere
                yield Problem(place, f"{error}, or remove it: it only tells how a run was made")


def _leftovers(folder: Place, shards: list[_Shard]) -> list[str]:
    """Files that harm nobody, counted."""
    named = {shard.key for shard in shards}
    root = folder / "data.zarr"
    unnamed = [path for path in root.rglob("*") if "/c/" in path.relative_to(root).as_posix() and path.is_file()]
    counts = {
        "files of unfinished attempts": sum(path.is_file() for path in (folder / "attempts").rglob("*")),
        "decided blocks without a marker": len(list((folder / "commits").glob("*/*.intent"))),
        "partial files": len(list(folder.rglob("*.partial"))),
        "shards that no commit names": sum(path.relative_to(root).as_posix() not in named for path in unnamed),
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


def repair_set(verdict: Verdict) -> Repair:
    """Take back the commits of damaged blocks, so that the next extract computes them again; write again what follows
    from other files (zarr.json, seals). Damage to the spec, the ledger, a mapping or a manifest cannot be mended.

    Raises:
        SchemaError: an older version made the set, so it is not written.
        StoreError: the store cannot be written.
    """
    from featstore.store.compact import remove_copy

    blocks = sorted({(item.group, item.block) for item in verdict.problems if item.group and item.block is not None})
    rewrite = [item for item in verdict.problems if item.rewrite]
    left = [item for item in verdict.problems if not item.rewrite and item.block is None]
    if blocks or rewrite:
        folder = verdict.folder
        spec = read_spec(folder)
        check_current(int(spec["schema"]), f"{folder}: this set")
        book = ledger.read_ledger(folder)
        ledger.write_metadata(folder, spec, book)
        for item in rewrite:
            if item.place.endswith(".parquet"):
                ledger.seal_rows(folder / item.place)
            elif item.place.startswith("compact.zarr/"):
                remove_copy(folder, item.place.removeprefix("compact.zarr/"))
        size = int(spec["layout"]["block_rows"])
        blocks = [item for item in blocks if _is_still_damaged(folder, book, size, *item)]
        for group, block in blocks:
            commits.take_back(folder, group, book.groups[group], block, size, archived=True)
    return Repair(len(blocks), len(rewrite), left)


def _is_still_damaged(folder: Place, book: ledger.Ledger, size: int, group: str, block: int) -> bool:
    """Looked at once more: what verify saw may have been committed anew since."""
    ranges = {number: (start, stop) for number, start, stop in book.blocks(size)}
    arrays = book.groups[group]
    found = _read_marker(folder, (group, arrays), block, ranges, size)
    if found is None or isinstance(found, Problem) or (folder / "archive.json").is_file():
        return found is not None
    readers = {array.name: ShardedArray(folder / "data.zarr" / array.name) for array in arrays}
    shards = _shards_of(arrays, found, group, size)
    return any(_check_shard(folder, shard, readers[shard.array.name], True)[0] for shard in shards)
