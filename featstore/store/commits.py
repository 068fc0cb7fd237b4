"""Commits: a block of rows exists when, and only when, its marker does.

An attempt writes and syncs all shards of a block, and the marker, in a folder of its own. Then it creates the block's
intent, a file that appears once: whose intent it is, that attempt is the block. Anyone can now finish it: shards linked
under the zarr keys and read back, marker linked, attempt folder renamed away, intent removed. So a writer that dies or
freezes loses nothing, and one that wakes up late changes nothing: all it could still do starts from its attempt's
folder, which is gone once the block is marked. All arrays of a block come from one attempt.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable
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
    is_marked,
    mark,
    markers,
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
from featstore.store.shards import ShardSummary, ShardWriter, read_summary, shard_key

MARKER = "marker.json"
MISSING = "is not there"
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
    return _parse_commit(read_marker(folder, group, block), marker_path(folder, group, block))


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
                return _parse_commit(remote.cached_bytes(path, held[block]), path)
            return read_commit(folder, group, block)
        except (FileNotFoundError, ReplacedError):
            return None

    if as_object(folder) is None:
        return {block: commit for block in wanted if (commit := one(block)) is not None}
    with ThreadPoolExecutor(READERS) as pool:
        return {block: commit for block, commit in zip(wanted, pool.map(one, wanted)) if commit is not None}


def _parse_commit(data: bytes, path: Place) -> Commit:
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
    array. For a bucket the block's shards, all arrays of the group, stand in the user's cache folder until `commit`.
    """

    folder: Place
    group: str
    arrays: list[ArraySpec]
    block: int
    start: int
    stop: int
    rows_per_block: int
    attempt: str = field(default_factory=files.own_name)
    _writers: dict[tuple[str, int], ShardWriter] = field(default_factory=dict)
    _summaries: dict[tuple[str, int], ShardSummary] = field(default_factory=dict)
    _position: int = 0
    _states: list[RowState] = field(default_factory=list)
    _scratch: Path | None = None

    def __enter__(self) -> "BlockWriter":
        check_not_archived(self.folder)
        enter(self.folder.parents[2])
        if as_object(self.folder) is not None:
            with files.writing(files.user_cache()):
                self._scratch = files.scratch_folder()
        with files.writing(self.home):
            files.make_folder(self.home)
        return self

    def __exit__(self, *_: object) -> None:
        # On a full or vanished disk this fails like the write before it; what stays is swept by a later run.
        with contextlib.suppress(OSError):
            for writer in self._writers.values():
                writer.discard()
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
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
            with files.writing(self._scratch or self.home):
                self._append_array(array, values)
        self._position += len(states)
        self._states += states

    def _append_array(self, array: ArraySpec, values: np.ndarray) -> None:
        shard_rows, chunk_rows = array.layout(self.rows_per_block)
        done = 0
        while done < len(values):
            position = self.start + self._position + done
            shard = position // shard_rows
            take = min(len(values) - done, (shard + 1) * shard_rows - position)
            key = (array.name, shard)
            if key not in self._writers:
                self._writers[key] = ShardWriter(
                    (self._scratch or self.home) / attempt_file(array.name, shard),
                    row_shape=array.row_shape,
                    dtype=array.dtype,
                    chunk_rows=chunk_rows,
                    shard_rows=shard_rows,
                )
            self._writers[key].append(values[done : done + take])
            done += take
            if position + take in ((shard + 1) * shard_rows, self.stop):
                self._summaries[key] = self._writers.pop(key).close()

    def commit(self) -> bool:
        """Decide the block for this attempt and publish it; True if this attempt is the one that counts.

        Raises:
            StoreError: rows are missing, the attempt's files or the set were removed meanwhile, or the disk refuses.
        """
        if not self.done or self._writers:
            total = self.stop - self.start
            raise StoreError(f"block {self.block}: {self._position} of {total} rows written; not committed")
        place = self.folder, self.group, self.block
        renew(self.folder.parents[2])
        with files.writing(self.home):
            self._upload()
            own = self._write_marker()
            while not is_marked(*place):
                self._check_present()
                check_not_archived(self.folder)
                decide(*place, self.attempt)
                if finish_block(self.folder, self.group, self.arrays, self.block, self.rows_per_block):
                    break
            try:
                return read_marker(*place) == own
            except FileNotFoundError:  # taken back just now
                return False

    def _upload(self) -> None:
        """Bring the shards to the bucket; each local file goes when it is there."""
        if self._scratch is None:
            return
        for name, shard in sorted(self._summaries):
            local = self._scratch / attempt_file(name, shard)
            if local.exists():  # not at a second call
                files.upload(local, self.home / local.name)
                local.unlink()

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


def attempt_file(array: str, shard: int) -> str:
    return f"{array.replace('/', '.')}.{shard}"


def _retire(home: Place) -> None:
    """Take an attempt's folder away in one step, then empty it; in a bucket its marker goes first.

    Without the marker nobody begins to finish the attempt; who has begun is stopped by the block's object.
    """
    if as_object(home) is not None:
        files.remove_tree(home, first=MARKER)
        return
    gone = home.with_name(f".gone-{files.own_name()}")
    with contextlib.suppress(FileNotFoundError):
        home.rename(gone)
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
    if not is_marked(*place):
        try:
            data = (home / MARKER).read_bytes()
            shards = files.unseal(data, home / MARKER)["shards"]
            for array in arrays:
                for shard, checksums in shards[array.name].items():
                    finisher = _Finisher(folder, array, home, rows_per_block, lambda: stands(*place, intent))
                    finisher.publish(int(shard), checksums)
            mark(*place, intent, home / MARKER, data)
        except FileNotFoundError:
            pass  # another process finished and took the folder away, or it was removed by hand
        except CorruptError as error:
            damage = error
    _retire(home)
    settle(*place, intent)
    if damage is not None and not is_marked(*place):
        raise damage
    return is_marked(*place)


@dataclass(frozen=True, slots=True)
class _Finisher:
    """Publishes shards of the decided attempt in `home`; `stands` tells whether that decision still does."""

    folder: Place
    array: ArraySpec
    home: Place
    rows_per_block: int
    stands: Callable[[], bool]

    def publish(self, shard: int, checksums: list[int]) -> None:
        """Link one shard under its zarr key and read it back.

        Raises:
            FileNotFoundError: its file is gone.
            StoreError: nothing stays under the key; the decision stands.
            CorruptError: what stands under the key is not what the attempt's marker names.
        """
        source = self.home / attempt_file(self.array.name, shard)
        final = self.folder / "data.zarr" / self.array.name / shard_key(shard, 1 + len(self.array.row_shape))
        files.make_folder(final.parent)
        for last_try in (False, True):
            files.link_kept(source, final)
            seen = files.version(final)
            what = self._fault(final, checksums)
            if not what:
                return
            if last_try:
                break
            if not self.stands():
                raise FileNotFoundError(2, "this attempt is not the block any more", str(self.home))
            # No marker names this file, so nobody counts on it.
            files.replace_kept(source, final, seen)
        kind = StoreError if what == MISSING else CorruptError
        raise kind(f"{final}: the shard just published {what}; not committed; check the disk, then run again")

    def _fault(self, final: Place, checksums: list[int]) -> str:
        shard_rows, chunk_rows = self.array.layout(self.rows_per_block)
        try:
            found = read_summary(
                final,
                row_shape=self.array.row_shape,
                dtype=self.array.dtype,
                chunk_rows=chunk_rows,
                shard_rows=shard_rows,
                deep=True,
            )
        except CorruptError as error:
            return f"is damaged ({error})"
        except FileNotFoundError:
            return MISSING
        except ReplacedError:
            return "was replaced meanwhile"
        same = [found.size, found.index_crc, found.data_crc] == checksums
        return "" if same else "holds other content than its marker names"


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
