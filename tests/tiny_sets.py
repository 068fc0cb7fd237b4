"""Small sets for the store tests: rows that follow from (seed, array, row), so that any mixture of attempts shows."""

import hashlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featstore import files
from featstore.datasets import manifest as manifests
from featstore.datasets.manifest import Manifest
from featstore.store import commits, ledger
from featstore.store.commits import BlockWriter, RowState
from featstore.store.layout import ArraySpec, check_store, make_spec, read_spec, set_folder
from featstore.store.reader import ShardedArray

CLS = ArraySpec(name="cls", row_shape=(8,), dtype="float16")
PATCHES = ArraySpec(name="patches", row_shape=(3, 8), dtype="float16")


def make_manifest(
    ids: list[str], *, sizes: list[int] | None = None, contents: list[str | None] | None = None, name: str = "demo"
) -> Manifest:
    """A manifest of samples that have no files."""
    count = len(ids)
    text, number = pa.string(), pa.int64()
    columns = {
        "id": pa.array(ids, text),
        "path": pa.array(ids, text),
        "size": pa.array(sizes or [100 + i for i in range(count)], number),
        "split": pa.array(["train"] * count, text),
        "group": pa.nulls(count, text),
        "study": pa.nulls(count, text),
        "mask_path": pa.nulls(count, text),
        "content": pa.array(contents or [None] * count, text),
        "mtime_ns": pa.array([1] * count, number),
    }
    table = pa.table(columns)
    meta = {"root": "/nowhere", "adapter": "table"}
    return Manifest(name=name, table=table, digest=manifests.table_digest(table), meta=meta)


def named(count: int, start: int = 0) -> list[str]:
    return [f"s{number:04d}" for number in range(start, start + count)]


def make_spec_of(
    *, block_rows: int = 16, dataset: str = "demo", model: str = "tiny", **identity: Any
) -> dict[str, Any]:
    return make_spec(
        dataset=dataset,
        model=model,
        resolution="42",
        identity={"weights": "w", "stored_dtype": "float16", "compute_dtype": "float32", "reductions": {}, **identity},
        rows_per_block=block_rows,
        weights={"kind": "random", "seed": 0},
        random=False,
    )


def prepare(root: Path, spec: dict[str, Any], manifest: Manifest, arrays: list[ArraySpec]) -> Path:
    """Everything that a writer does before its first row, in the order of the extraction."""
    check_store(root, create=True)
    if not (root / "datasets" / manifest.name / manifest.short).is_dir():
        manifests.save(root / "datasets", manifest)
    folder = set_folder(root, spec)
    files.create_exclusive(folder / "spec.json", files.sealed(spec))
    ledger.add_arrays(folder, arrays)
    ledger.add_rows(folder, manifest, dict)
    book = ledger.read_ledger(folder)
    ledger.write_metadata(folder, spec, book)
    commits.finish_intents(folder, book, spec["layout"]["block_rows"])
    commits.sweep_attempts(folder, older_than=3600.0)
    return folder


@lru_cache
def values_of(array: ArraySpec, start: int, stop: int, seed: int) -> np.ndarray:
    """Rows [start, stop) of an array, each from its own generator."""
    key = int(hashlib.sha256(array.name.encode()).hexdigest()[:8], 16)
    rows = [np.random.default_rng([seed, key, row]).standard_normal(array.row_shape) for row in range(start, stop)]
    return np.array(rows).astype(array.dtype).reshape(stop - start, *array.row_shape)


def states_of(count: int, seed: int) -> list[RowState]:
    return [RowState(f"{seed:032x}") for _ in range(count)]


def writer_of(folder: Path, group: str, block: int) -> BlockWriter:
    book = ledger.read_ledger(folder)
    size = read_spec(folder)["layout"]["block_rows"]
    start, stop = next((start, stop) for number, start, stop in book.blocks(size) if number == block)
    return BlockWriter(folder, group, book.groups[group], block, start, stop, size)


def write_block(folder: Path, group: str, block: int, seed: int, *, step: int = 5) -> bool:
    """Compute and commit one block in appends of `step` rows."""
    with writer_of(folder, group, block) as writer:
        for first in range(writer.start, writer.stop, step):
            last = min(first + step, writer.stop)
            rows = {array.name: values_of(array, first, last, seed) for array in writer.arrays}
            writer.append(rows, states_of(last - first, seed))
        return writer.commit()


def write_missing(folder: Path, seed: int, *, block_rows: int, order: int = 1) -> None:
    """What a run does: every block without a marker, group by group."""
    book = ledger.read_ledger(folder)
    for group in book.groups:
        done = commits.committed_blocks(folder, group)
        for block, _, _ in book.blocks(block_rows)[::order]:
            if block not in done:
                write_block(folder, group, block, seed)


def check_blocks(folder: Path, seeds: set[int]) -> dict[tuple[str, int], int]:
    """Every committed block is whole and from one seed in all arrays; returns which. Asserts otherwise."""
    book = ledger.read_ledger(folder)
    found: dict[tuple[str, int], int] = {}
    for group, arrays in book.groups.items():
        for block in commits.committed_blocks(folder, group):
            commit = commits.read_commit(folder, group, block)
            seed = int(commit.content(commit.start), 16)
            assert seed in seeds
            assert commit.contents == f"{seed:032x}" * (commit.stop - commit.start)
            for array in arrays:
                held = ShardedArray(folder / "data.zarr" / array.name).read(commit.start, commit.stop, verify=True)
                np.testing.assert_array_equal(held, values_of(array, commit.start, commit.stop, seed))
            check_checksums(folder, arrays, commit)
            found[group, block] = seed
    return found


def check_checksums(folder: Path, arrays: list[ArraySpec], commit: commits.Commit) -> None:
    """The marker states what the shard files hold, computed here from the file's bytes alone."""
    import google_crc32c

    size = read_spec(folder)["layout"]["block_rows"]
    for array in arrays:
        shard_rows, chunk_rows = array.layout(size)
        assert len(commit.shards[array.name]) == -(-(commit.stop - commit.start) // shard_rows)
        for shard, (num_bytes, index_crc, data_crc) in commit.shards[array.name].items():
            key = "/".join(["c", shard, *["0"] * len(array.row_shape)])
            data = (folder / "data.zarr" / array.name / key).read_bytes()
            stride = chunk_rows * array.row_bytes + 4
            chunks = (len(data) - 16 * (shard_rows // chunk_rows) - 4) // stride
            words = b"".join(data[(i + 1) * stride - 4 : (i + 1) * stride] for i in range(chunks))
            assert (len(data), int.from_bytes(data[-4:], "little")) == (num_bytes, index_crc)
            assert google_crc32c.value(words) == data_crc


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file of a set."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def committed_files(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, mtime and bytes of all markers and of all shards that they name."""
    found = {}
    for marker in (folder / "commits").glob("*/*.json"):
        commit = commits.read_commit(folder, marker.parent.name, int(marker.stem))
        paths = [marker]
        for name, shards in commit.shards.items():
            depth = len(ledger.read_ledger(folder).arrays[name].row_shape)
            paths += [folder / "data.zarr" / name / "/".join(["c", shard, *["0"] * depth]) for shard in shards]
        for path in paths:
            facts = path.stat()
            found[path.relative_to(folder).as_posix()] = facts.st_ino, facts.st_mtime_ns, path.read_bytes()
    return found


def leftovers(folder: Path) -> list[str]:
    """Files that should not outlive a finished run."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return [name for name in names if name.startswith("attempts/") or name.endswith((".intent", ".partial"))]


class KilledError(BaseException):
    """Stands for a process that is no more; nothing catches it."""


@dataclass
class Trap:
    """Counts the calls that change the disk and does something at the n-th, before or after it takes effect."""

    at: int
    then: Callable[[], None]
    after: bool = False
    count: int = 0
    sprung: bool = False
    active: bool = True
    seen: list[str] = field(default_factory=list)

    NAMES = ("link", "unlink", "rename", "replace", "mkdir", "rmdir", "fsync")

    def install(self, monkeypatch: Any) -> None:
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return None if name == "fsync" else real(*args, **kwargs)
            if self.sprung and self.then is kill:
                raise KilledError  # the dead do not clean up
            self.count += 1
            self.seen.append(name)
            hit = self.count == self.at and not self.sprung
            if hit and not self.after:
                self.spring()
            try:
                return None if name == "fsync" else real(*args, **kwargs)  # no test here cuts the power
            finally:
                if hit and self.after:
                    self.spring()

        return call

    def spring(self) -> None:
        self.sprung = True
        if self.then is kill:
            raise KilledError
        self.active = False
        try:
            self.then()
        finally:
            self.active = True


def kill() -> None:
    """For `Trap.then`: this call and every later one dies."""


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child process and return its id; exit status 0 if it came to its end."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Exit status of a child, -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> int:
    """SIGKILL a child after a time; its exit status."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return wait(child)
