"""Commits: a block of rows exists when, and only when, its marker does.

An attempt writes and syncs all shards of a block, and the marker, in a folder of its own. Then it creates the block's
intent, a file that appears once: whose intent it is, that attempt is the block. Anyone can now finish it: shards linked
under the zarr keys and read back, marker linked, attempt folder renamed away, intent removed. So a writer that dies or
freezes loses nothing, and one that wakes up late changes nothing: all it could still do starts from its attempt's
folder, which is gone once the block is marked. All arrays of a block come from one attempt. An attempt can also be
decided in the place of a committed one: the old marker goes only when the intent stands.
"""

import contextlib
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from featstore import files
from featstore.errors import CorruptError, StoreError
from featstore.inputs import HASH_HEX as HASH_HEX
from featstore.objects import Place, ReplacedError, as_object
from featstore.store import remote
from featstore.store.bucket import enter, renew
from featstore.store.decisions import (
    decide,
    decided,
    decided_attempts,
    drop_damaged,
    holds,
    is_marked,
    is_outdated,
    mark,
    markers,
    move_marker,
    open_intents,
    read_marker,
    settle,
    stands,
    unmark,
)
from featstore.store.decisions import group_folder as group_folder
from featstore.store.decisions import intent_path as intent_path
from featstore.store.decisions import marker_path as marker_path
from featstore.store.layout import ArraySpec
from featstore.store.ledger import Ledger
from featstore.store.packed import check_not_archived
from featstore.store.publication import MISSING, Finisher
from featstore.store.publication import attempt_file as attempt_file
from featstore.store.scratch import Scratch
from featstore.store.shards import ShardSummary, ShardWriter

MARKER = "marker.json"
REPLACED = "replaced.json"  # in an attempt's folder: the marker that stood there before
READERS = 16  # markers read at once from a bucket
STALE_SECONDS = 3600.0  # an attempt untouched for an hour has no living writer


@dataclass(frozen=True, slots=True)
class RowState:
    """What became of one row: the SHA-256 prefix of the bytes read, and why it failed, if it did."""

    content: str
    reason: str | None = None


@dataclass(slots=True)
class Commit:
    """A marker as read from disk."""

    block: int
    start: int
    stop: int
    attempt: str
    shards: dict[str, dict[str, list[int]]]
    failed: dict[int, str]
    contents: str

    def content(self, row: int) -> str:
        """Content hash of a row (set row index)."""
        offset = (row - self.start) * HASH_HEX
        return self.contents[offset : offset + HASH_HEX]


def read_commit(folder: Place, group: str, block: int) -> Commit:
    """Read and check one marker.

    Raises:
        CorruptError: it is damaged.
    """
    return parse_commit(read_marker(folder, group, block), marker_path(folder, group, block))


def read_commits(folder: Place, group: str, blocks: Iterable[int] | None = None) -> dict[int, Commit]:
    """The markers of these blocks, or of all that are committed; those taken back just now are left out.

    In a bucket they are read many at once, and each only the first time: after that the local read cache has it.

    Raises:
        CorruptError: one is damaged.
    """
    held = markers(folder, group)
    wanted = sorted(held if blocks is None else held.keys() & set(blocks))

    def one(block: int) -> Commit | None:
        path = marker_path(folder, group, block)
        try:
            if as_object(path) is None:
                return read_commit(folder, group, block)
            with contextlib.suppress(CorruptError):  # damage in the cache is no damage in the bucket
                return parse_commit(remote.cached_bytes(path, held[block]), path)
            return read_commit(folder, group, block)
        except (FileNotFoundError, ReplacedError):
            return None

    if as_object(folder) is None:
        return {block: commit for block in wanted if (commit := one(block)) is not None}
    with ThreadPoolExecutor(READERS) as pool:
        return {block: commit for block, commit in zip(wanted, pool.map(one, wanted)) if commit is not None}


def parse_commit(data: bytes, path: Place) -> Commit:
    """What the bytes of the marker at `path` say.

    Raises:
        CorruptError: they are damaged.
    """
    value = files.unseal(data, path)
    failed = {int(row): reason for row, reason in value["failed"].items()}
    same = ("block", "start", "stop", "attempt", "shards", "contents")
    return Commit(**{key: value[key] for key in same}, failed=failed)


def committed_blocks(folder: Place, group: str) -> set[int]:
    """Blocks that have a marker, by one listing of a folder."""
    return set(markers(folder, group))


@dataclass(slots=True)
class BlockWriter:
    """Streams the rows of one block into shards and commits them.

    Use as a context manager: leaving it without a decision removes everything this attempt wrote. Memory is a chunk an
    array. `stage`: a folder on a local disk where the block's shards, all arrays of the group, stand until `commit`;
    for a bucket they stand in the user's cache folder without it. `notes` says why they do not.
    """

    folder: Place
    group: str
    arrays: list[ArraySpec]
    block: int
    start: int
    stop: int
    rows_per_block: int
    attempt: str = field(default_factory=files.own_name)
    stage: Path | None = None
    _writers: dict[tuple[str, int], ShardWriter] = field(default_factory=dict)
    _summaries: dict[tuple[str, int], ShardSummary] = field(default_factory=dict)
    _position: int = 0
    _states: list[RowState] = field(default_factory=list)
    _scratch: Scratch = field(init=False)

    def __post_init__(self) -> None:
        self._scratch = Scratch(self.home, self.stage)

    def __enter__(self) -> "BlockWriter":
        check_not_archived(self.folder)
        enter(self.folder.parents[2])
        self._scratch.__enter__()
        with self._scratch.writing():
            files.make_folder(self.home)
        return self

    def __exit__(self, *_: object) -> None:
        # On a full or vanished disk this fails like the write before it; what stays is swept by a later run.
        with contextlib.suppress(OSError):
            for writer in self._writers.values():
                writer.discard()
            self._scratch.__exit__()
            if not self._holds_intent():
                _retire(self.home)

    def _holds_intent(self) -> bool:
        try:
            intent = decided(self.folder, self.group, self.block)
            return intent is not None and intent.attempt == self.attempt
        except OSError:
            return True  # whose it is cannot be told, so nothing is removed

    @property
    def done(self) -> bool:
        """All rows of the block are written."""
        return self._position == self.stop - self.start

    @property
    def home(self) -> Place:
        """Folder of this attempt's unpublished files."""
        return self.folder / "attempts" / self.attempt

    def append(self, rows: dict[str, np.ndarray], states: list[RowState]) -> None:
        """Write the next rows of every array of the group; failed rows must hold NaN, and only they may.

        Raises:
            StoreError: a row is not finite although it did not fail, or the disk refuses; nothing of the block is
                committed.
        """
        assert all(len(state.content) == HASH_HEX for state in states), "content hashes are read back by position"
        failed = np.array([state.reason is not None for state in states], dtype=bool)
        for array in self.arrays:
            values = rows[array.name]
            assert len(values) == len(states), f"{array.name}: {len(values)} rows and {len(states)} states"
            check_finite(array, values, failed, self.start + self._position)
            self._append_array(array, values)
        self._position += len(states)
        self._states += states

    def _append_array(self, array: ArraySpec, values: np.ndarray) -> None:
        shard_rows, _ = array.layout(self.rows_per_block)
        done = 0
        while done < len(values):
            position = self.start + self._position + done
            shard = position // shard_rows
            take = min(len(values) - done, (shard + 1) * shard_rows - position)
            key = (array.name, shard)
            with self._scratch.writing():
                writer = self._writers.get(key)
                if writer is None:
                    rows = min((shard + 1) * shard_rows, self.stop) - max(shard * shard_rows, self.start)
                    name = attempt_file(array.name, shard)
                    writer = self._scratch.begin(array, name, rows, self.rows_per_block)
                    self._writers[key] = writer
            with self._scratch.writing(writer.path):
                writer.append(values[done : done + take])
                done += take
                if position + take in ((shard + 1) * shard_rows, self.stop):
                    self._summaries[key] = self._writers.pop(key).close()

    @property
    def notes(self) -> list[str]:
        """Lines about a stage that was not used."""
        return self._scratch.notes

    def commit(self, *, over: bytes | None = None) -> bool:
        """Decide the block for this attempt and publish it; True if this attempt is the one that counts.

        `over`: the marker that this attempt takes the place of, as it was read; it stands until all of the attempt is
        there and decided. Where the block has another marker by then, that one counts.

        Raises:
            StoreError: rows are missing, the attempt's files or the set were removed meanwhile, or the disk refuses.
        """
        if not self.done or self._writers:
            total = self.stop - self.start
            raise StoreError(f"block {self.block}: {self._position} of {total} rows written; not committed")
        place = self.folder, self.group, self.block
        renew(self.folder.parents[2])
        with files.writing(self.home):
            for name, shard in sorted(self._summaries):
                self._scratch.deliver(attempt_file(name, shard))
            own = self._write_marker()
            if over == own:
                over = None
            if over is not None:
                self._check_readable()
            while not is_marked(*place) or (over is not None and holds(*place, over)):
                self._check_present()
                check_not_archived(self.folder)
                decide(*place, self.attempt, over)
                if finish_block(self.folder, self.group, self.arrays, self.block, self.rows_per_block) and (
                    over is None or not holds(*place, over)
                ):
                    break
            return holds(*place, own)  # not where it was taken back just now

    def _write_marker(self) -> bytes:
        """Put the marker beside the shards; the published marker holds these bytes if this attempt counts."""
        shards: dict[str, dict[str, list[int]]] = {array.name: {} for array in self.arrays}
        for (name, shard), summary in sorted(self._summaries.items()):
            shards[name][str(shard)] = [summary.size, summary.index_crc, summary.data_crc]
        marker = {
            "block": self.block,
            "start": self.start,
            "stop": self.stop,
            # Named by content, so that equal bytes give equal markers whoever wrote them.
            "attempt": files.digest(shards)[:16],
            "shards": shards,
            "failed": {str(self.start + i): state.reason for i, state in enumerate(self._states) if state.reason},
            "contents": "".join(state.content for state in self._states),
        }
        data = files.sealed(marker)
        files.write_atomic(self.home / MARKER, data)
        return data

    def _check_readable(self) -> None:
        """What an attempt takes the place of cannot be had again: its own shards must be good before that goes."""
        arrays = {array.name: array for array in self.arrays}
        for (name, shard), summary in sorted(self._summaries.items()):
            finisher = Finisher(self.folder, arrays[name], self.home, self.rows_per_block, lambda: True)
            path = self.home / attempt_file(name, shard)
            what = finisher.fault(path, [summary.size, summary.index_crc, summary.data_crc])
            if what and what != MISSING:  # which `_check_present` tells
                raise StoreError(
                    f"{path}: the shard just written {what}; not committed; check the disk, then run again"
                )

    def _check_present(self) -> None:
        """A decision for files that are not there could never be carried out."""
        for (name, shard), summary in self._summaries.items():
            path = self.home / attempt_file(name, shard)
            if not path.is_file() or path.stat().st_size != summary.size:
                raise StoreError(
                    f"block {self.block}: {path} was removed before its commit (an attempt that stands still for an "
                    "hour counts as dead); run the same command again"
                )
        if not (self.folder / "spec.json").is_file():
            raise StoreError(f"{self.folder}: the set was removed while block {self.block} was computed; not committed")


def _retire(home: Place, marker: Place | None = None) -> None:
    """Take an attempt's folder away in one step, then empty it; in a bucket its marker goes first.

    Without the marker nobody begins to finish the attempt; who has begun is stopped by the block's object. `marker`:
    where that of this attempt stands again if a finisher took it for the one it was to move, too late.
    """
    if as_object(home) is not None:
        files.remove_tree(home, first=MARKER)
        return
    gone = home.with_name(f".gone-{files.own_name()}")
    with contextlib.suppress(FileNotFoundError):
        home.rename(gone)
        if marker is not None:
            with contextlib.suppress(FileNotFoundError):
                if (gone / REPLACED).read_bytes() == (gone / MARKER).read_bytes():
                    files.link_kept(gone / MARKER, marker)
        shutil.rmtree(gone, ignore_errors=True)


def finish_block(folder: Place, group: str, arrays: list[ArraySpec], block: int, rows_per_block: int) -> bool:
    """Publish what the block's intent names; True if the block is committed. Any process may do this.

    An intent that is damaged or whose files are gone is removed, and the block is simply not committed.

    Raises:
        CorruptError: the decided attempt does not read back; it is given up.
    """
    place = folder, group, block
    try:
        intent = decided(*place)
    except CorruptError:
        drop_damaged(*place)
        return is_marked(*place)
    if intent is None:
        return is_marked(*place)  # somebody else finished it
    home = folder / "attempts" / intent.attempt
    damage: CorruptError | None = None
    if not is_marked(*place) or is_outdated(*place, intent):
        try:
            data = (home / MARKER).read_bytes()
            shards = files.unseal(data, home / MARKER)["shards"]
            if is_outdated(*place, intent):
                _make_way(place, home, shards)
            for array in arrays:
                for shard, checksums in shards[array.name].items():
                    finisher = Finisher(folder, array, home, rows_per_block, lambda: stands(*place, intent))
                    finisher.publish(int(shard), checksums)
            mark(*place, intent, home / MARKER, data)
        except FileNotFoundError:
            pass  # another process finished and took the folder away, or it was removed by hand
        except CorruptError as error:
            damage = error
    _retire(home, marker_path(*place) if intent.over else None)
    settle(*place, intent)
    if damage is not None and not is_marked(*place):
        raise damage
    return is_marked(*place)


def _make_way(place: tuple[Place, str, int], home: Place, shards: dict[str, dict[str, list[int]]]) -> None:
    """Move the marker away that an attempt takes the place of, if the attempt has all its shards.

    Raises:
        FileNotFoundError: one of them is gone.
    """
    for name, numbers in shards.items():
        for shard in numbers:
            (home / attempt_file(name, int(shard))).stat()
    move_marker(*place, Path(str(home), REPLACED))


def finish_intents(folder: Place, ledger: Ledger, rows_per_block: int) -> int:
    """Finish every block that was decided but not marked when its writer died; returns their number."""
    finished = 0
    with files.writing(folder):
        for group, arrays in ledger.groups.items():
            for block in open_intents(folder, group):
                if as_object(folder) is None or decided(folder, group, block) is not None:  # else it was taken back
                    finish_block(folder, group, arrays, block, rows_per_block)
                    finished += 1
    return finished


def take_back(
    folder: Place, group: str, arrays: list[ArraySpec], block: int, rows_per_block: int, *, archived: bool = False
) -> None:
    """Undo one commit, so that the block is computed again; of an archived set only if `archived` (it is damaged).

    Its shards stay until the next commit replaces them: removing them here could hit those of a commit made meanwhile.
    """
    if not archived:
        check_not_archived(folder)
    enter(folder.parents[2])
    with files.writing(folder):
        finish_block(folder, group, arrays, block, rows_per_block)
        unmark(folder, group, block)


def check_finite(array: ArraySpec, values: np.ndarray, failed: Bool[np.ndarray, " B"], first_row: int) -> None:
    """Only failed rows may hold NaN or infinity, and they must.

    Raises:
        StoreError: naming the first offending row and the stored type.
    """
    if array.dtype in ("int8", "uint8"):  # always finite: a failed row is zero, and the marker is its mask
        assert not values[failed].any(), f"{array.name}: a failed row holds numbers"
        return
    if array.dtype == "bfloat16":
        finite = (values.view(np.uint16) & 0x7F80) != 0x7F80  # an all-ones exponent is infinity or NaN
    else:
        finite = np.isfinite(values)
    whole = finite.reshape(len(values), -1).all(1)
    assert not (whole & failed).any(), f"{array.name}: a failed row holds numbers"
    bad = ~whole & ~failed
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        nan = (values[row] & 0x7FFF) > 0x7F80 if array.dtype == "bfloat16" else np.isnan(values[row])
        overflow = array.dtype == "float16" and not nan.any()  # what is no number was none before it was stored
        hint = "store them as float32 (--dtype float32)" if overflow else "check the weights and the compute dtype"
        found = "holds NaN" if nan.any() else f"does not fit {array.dtype}: it holds infinity"
        raise StoreError(f"{array.name}: row {first_row + row} {found}; nothing of this block is committed; {hint}")


# Where killed writers leave files that did not get their name yet; in data.zarr they stand beside zarr.json only.
_PARTIAL = (
    *("", "ledger/", "rows/", "runs/", "reductions/", "compact.zarr/", "commits/*/"),
    *("data.zarr/", "data.zarr/*/", "data.zarr/layers/*/*/"),
)


def sweep_attempts(folder: Place, *, older_than: float) -> int:
    """Remove what killed writers left; returns the number of attempts.

    A writer counts as dead if it was a process of this machine and is gone, or if it has changed nothing for
    `older_than` seconds. Attempts that an intent names are kept: they are the block.
    """
    home, removed = folder / "attempts", 0
    kept = decided_attempts(folder)
    with files.writing(folder):
        for attempt in list(home.iterdir()) if home.is_dir() else []:
            if attempt.name not in kept and (files.is_dead(attempt.name) or _age(attempt) >= older_than):
                _retire(attempt)
                removed += 1
        if as_object(folder) is not None:
            return removed  # objects are whole or absent, and prefixes need not be removed
        with contextlib.suppress(OSError):
            home.rmdir()  # only when empty
        for place in _PARTIAL:
            for path in folder.glob(f"{place}*.partial"):
                if files.is_dead(path.name) or _age(path) >= older_than:
                    path.unlink(missing_ok=True)
    return removed


def _age(path: Place) -> float:
    """Seconds since the last change of a file, or of any in a folder; minus infinity where one just went."""
    try:
        return time.time() - max(files.modified(path).values(), default=float("inf"))
    except FileNotFoundError:
        return -float("inf")
