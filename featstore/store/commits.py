"""Commits: a block of rows exists when, and only when, its marker does.

An attempt writes and syncs all shards of a block, and the marker, in a folder of its own. Then it creates the block's
intent, a file that appears once: whose intent it is, that attempt is the block. Anyone can now finish it: shards linked
under the zarr keys and read back, marker linked, attempt folder renamed away, intent removed. So a writer that dies or
freezes loses nothing, and one that wakes up late changes nothing: all it could still do starts from its attempt's
folder, which is gone once the block is marked. All arrays of a block come from one attempt.
"""

import contextlib
import os
import shutil
import time
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from featstore import files
from featstore.errors import CorruptError, StoreError
from featstore.objects import Place
from featstore.store.layout import ArraySpec
from featstore.store.ledger import Ledger
from featstore.store.shards import ShardSummary, ShardWriter, read_summary, shard_key

HASH_HEX = 32  # 128 bits of SHA-256 a row: enough to tell contents apart, small enough to keep in the marker
MARKER = "marker.json"
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


def group_folder(folder: Place, group: str) -> Place:
    return folder / "commits" / group


def marker_path(folder: Place, group: str, block: int) -> Place:
    return group_folder(folder, group) / f"{block:08d}.json"


def committed_blocks(folder: Place, group: str) -> set[int]:
    """Blocks that have a marker, by one listing of a folder."""
    try:
        names = os.listdir(group_folder(folder, group))
    except FileNotFoundError:
        return set()
    return {int(name[:8]) for name in names if len(name) == 13 and name.endswith(".json")}


def read_commit(folder: Place, group: str, block: int) -> Commit:
    """Read and check one marker.

    Raises:
        CorruptError: it is damaged.
    """
    path = marker_path(folder, group, block)
    value = files.unseal(path.read_bytes(), path)
    return Commit(
        block=value["block"],
        start=value["start"],
        stop=value["stop"],
        attempt=value["attempt"],
        shards=value["shards"],
        failed={int(row): reason for row, reason in value["failed"].items()},
        contents=value["contents"],
    )


def intent_path(folder: Place, group: str, block: int) -> Place:
    return group_folder(folder, group) / f"{block:08d}.intent"


def _decided(intent: Place) -> str:
    """The attempt that an intent names."""
    return str(files.unseal(intent.read_bytes(), intent)["files"])


@dataclass(slots=True)
class BlockWriter:
    """Streams the rows of one block into shards and commits them.

    Use as a context manager: leaving it without a decision removes everything this attempt wrote.
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

    def __enter__(self) -> "BlockWriter":
        with files.writing(self.home):
            files.make_folder(self.home)
        return self

    def __exit__(self, *_: object) -> None:
        # On a full or vanished disk this fails like the write before it; what stays is swept by a later run.
        with contextlib.suppress(OSError):
            for writer in self._writers.values():
                writer.discard()
            if not self._holds_intent():
                _retire(self.home)

    def _holds_intent(self) -> bool:
        try:
            return _decided(intent_path(self.folder, self.group, self.block)) == self.attempt
        except FileNotFoundError:
            return False
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
            with files.writing(self.home):
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
                    self.home / attempt_file(array.name, shard),
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
            raise StoreError(
                f"block {self.block}: {self._position} of {self.stop - self.start} rows written; not committed"
            )
        marker = marker_path(self.folder, self.group, self.block)
        with files.writing(self.home):
            own = self._write_marker()
            while not marker.exists():
                self._check_present()
                intent = intent_path(self.folder, self.group, self.block)
                files.create_exclusive(intent, files.sealed({"files": self.attempt}))
                if finish_block(self.folder, self.group, self.arrays, self.block, self.rows_per_block):
                    break
            return marker.exists() and marker.read_bytes() == own

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
    """Take an attempt's folder away in one step, then empty it."""
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
    path, marker = intent_path(folder, group, block), marker_path(folder, group, block)
    try:
        attempt = _decided(path)
    except FileNotFoundError:
        return marker.exists()  # somebody else finished it
    except CorruptError:
        path.unlink(missing_ok=True)
        return marker.exists()
    home = folder / "attempts" / attempt
    damage: CorruptError | None = None
    if not marker.exists():
        try:
            shards = files.unseal((home / MARKER).read_bytes(), home / MARKER)["shards"]
            for array in arrays:
                for shard, checksums in shards[array.name].items():
                    _publish(folder, array, int(shard), home, checksums, rows_per_block)
            files.link_kept(home / MARKER, marker)
        except FileNotFoundError:
            pass  # another process finished and took the folder away, or it was removed by hand
        except CorruptError as error:
            damage = error
    _retire(home)
    with contextlib.suppress(FileNotFoundError, CorruptError):
        if _decided(path) == attempt:
            path.unlink()
            files.sync_folder(path.parent)
    if damage is not None and not marker.exists():
        raise damage
    return marker.exists()


def _publish(
    folder: Place, array: ArraySpec, shard: int, home: Place, checksums: list[int], rows_per_block: int
) -> None:
    """Link one shard of the decided attempt under its zarr key and read it back."""
    shard_rows, chunk_rows = array.layout(rows_per_block)
    source = home / attempt_file(array.name, shard)
    final = folder / "data.zarr" / array.name / shard_key(shard, 1 + len(array.row_shape))
    files.make_folder(final.parent)
    for last_try in (False, True):
        files.link_kept(source, final)
        try:
            found = read_summary(
                final,
                row_shape=array.row_shape,
                dtype=array.dtype,
                chunk_rows=chunk_rows,
                shard_rows=shard_rows,
                deep=True,
            )
            if [found.size, found.index_crc, found.data_crc] == checksums:
                return
            what = "holds other content than its marker names"
        except CorruptError as error:
            what = f"is damaged ({error})"
        if last_try:
            break
        # No marker names this file, so nobody counts on it.
        files.replace_kept(source, final)
    raise CorruptError(f"{final}: the shard just published {what}; not committed; check the disk, then run again")


def finish_intents(folder: Place, ledger: Ledger, rows_per_block: int) -> int:
    """Finish every block that was decided but not marked when its writer died; returns their number."""
    finished = 0
    with files.writing(folder):
        for group, arrays in ledger.groups.items():
            for path in sorted(group_folder(folder, group).glob("*.intent")):
                finish_block(folder, group, arrays, int(path.name[:8]), rows_per_block)
                finished += 1
    return finished


def take_back(folder: Place, group: str, arrays: list[ArraySpec], block: int, rows_per_block: int) -> None:
    """Undo one commit, so that the block is computed again.

    Its shards stay until the next commit replaces them: removing them here could hit those of a commit made meanwhile.
    """
    with files.writing(folder):
        finish_block(folder, group, arrays, block, rows_per_block)
        path = marker_path(folder, group, block)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            files.sync_folder(path.parent)


def check_finite(array: ArraySpec, values: np.ndarray, failed: Bool[np.ndarray, " B"], first_row: int) -> None:
    """Only failed rows may hold NaN or infinity, and they must.

    Raises:
        StoreError: naming the first offending row and the stored type.
    """
    if array.dtype == "int8":  # quantised from finite values: a failed row is zero, and the marker is its mask
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
        fits = array.dtype != "float16"
        hint = "check the weights and the compute dtype" if fits else "store them as float32 (--dtype float32)"
        raise StoreError(
            f"{array.name}: row {first_row + row} does not fit {array.dtype}: it holds infinity or NaN; nothing of "
            f"this block is committed; {hint}"
        )


# Where killed writers leave files that did not get their name yet; in data.zarr they stand beside zarr.json only.
_PARTIAL = ("", "ledger/", "rows/", "runs/", "commits/*/", "data.zarr/", "data.zarr/*/", "data.zarr/layers/*/*/")


def sweep_attempts(folder: Place, *, older_than: float) -> int:
    """Remove what killed writers left; returns the number of attempts.

    A writer counts as dead if it was a process of this machine and is gone, or if it has changed nothing for
    `older_than` seconds.

    Attempts that an intent names are kept: they are the block.
    """
    home = folder / "attempts"
    decided = set()
    for path in (folder / "commits").glob("*/*.intent"):
        with contextlib.suppress(FileNotFoundError, CorruptError):
            decided.add(_decided(path))
    removed = 0
    with files.writing(folder):
        for attempt in list(home.iterdir()) if home.is_dir() else []:
            dead = files.is_dead(attempt.name) or _age(attempt, *attempt.glob("*")) >= older_than
            if attempt.name not in decided and dead:
                _retire(attempt)
                removed += 1
        with contextlib.suppress(OSError):
            home.rmdir()  # only when empty
        for place in _PARTIAL:
            for path in folder.glob(f"{place}*.partial"):
                if files.is_dead(path.name) or _age(path) >= older_than:
                    path.unlink(missing_ok=True)
    return removed


def _age(*paths: Place) -> float:
    """Seconds since the last change of any of these; minus infinity where one just went."""
    try:
        return time.time() - max(path.stat().st_mtime for path in paths)
    except FileNotFoundError:
        return -float("inf")
