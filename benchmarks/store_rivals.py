"""Other ways to keep rows of features on disk, each at its best settings, behind the same five calls.

`write` leaves the bytes on disk for good (fsync), `open` takes what a reader holds on to, `gather` returns rows by
number in the order given, `read` a range, `load` everything. `settings` says what was chosen; where an interface has
several ways to read rows, each is a rival of its own.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from featstore.store.reader import ShardedArray
from featstore.store.shards import ShardWriter, array_metadata, chunk_rows_for, shard_key, shard_rows_for

APPEND_ROWS = 512  # rows that a writer of batches gets at a time
WIDE_BYTES = 16 * 1024
FILE_ROWS = 1024  # rows kept as one file each
THREADS = 8


def sync(folder: Path) -> None:
    """fsync of every file below, for writers that leave it to the system."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


class Rival:
    """One way to keep rows; `folder` is its own."""

    name: ClassVar[str]
    settings: ClassVar[str]
    calls: ClassVar[int] = 1  # gathers that are timed together; 10 where one takes less than some milliseconds
    write_rows: ClassVar[int | None] = None  # of a timed write, where a file a row would take minutes
    kinds: ClassVar[tuple[str, ...]] = ("gather_warm", "gather_cold", "load", "slice", "write")  # its cases

    def __init__(self, folder: Path, block_rows: int) -> None:
        self.folder, self.block_rows = folder / self.name, block_rows
        self.held: Any = None  # what a reader holds open
        self.num_rows = 0  # rows on disk; a rival that keeps fewer than it was given has its load scaled

    def write(self, rows: np.ndarray) -> None:
        """All rows, on disk when it returns."""
        raise NotImplementedError

    def open(self) -> None:
        raise NotImplementedError

    def gather(self, rows: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.held[start:stop])

    def load(self) -> np.ndarray:
        return np.asarray(self.held[...])

    def close(self) -> None:
        """Let go of maps and handles: a page that is mapped stays in the cache."""
        self.held = None

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def is_wide(self) -> bool:
        """Whether a row is so large that one call a row costs little."""
        return int(np.prod(self.held.shape[1:])) * 2 > WIDE_BYTES

    def start(self) -> Path:
        """An empty folder."""
        self.folder.mkdir(parents=True)
        return self.folder

    def evict(self) -> None:
        """Drop the files from the page cache (what a folder lists stays known)."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


class Numpy(Rival):
    """The practical limit: one .npy file, no checksums, no resuming, one writer."""

    name, settings, calls = "numpy", "np.memmap for rows, np.load for everything, write() of 512 rows and fsync", 10

    def write(self, rows: np.ndarray) -> None:
        with open(self.start() / "rows.npy", "wb", buffering=0) as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(rows))
            for first in range(0, len(rows), APPEND_ROWS):
                file.write(rows[first : first + APPEND_ROWS].view(np.uint8).data)
            os.fsync(file.fileno())

    def open(self) -> None:
        self.held = np.asarray(np.load(self.folder / "rows.npy", mmap_mode="r"))

    def gather(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.held[rows])

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.array(self.held[start:stop])

    def load(self) -> np.ndarray:
        return np.asarray(np.load(self.folder / "rows.npy"))


class Ours(Rival):
    name, settings, calls = "ours", "featstore: shards with checksums, written from batches of 512 rows", 10

    def write(self, rows: np.ndarray) -> None:
        shard_rows = shard_rows_for(rows[0].nbytes, self.block_rows)
        layout: dict[str, Any] = {
            "row_shape": rows.shape[1:],
            "dtype": "float16",
            "chunk_rows": chunk_rows_for(rows[0].nbytes, shard_rows),
            "shard_rows": shard_rows,
        }
        metadata = array_metadata(num_rows=len(rows), attributes={}, **layout)
        (self.start() / "zarr.json").write_text(json.dumps(metadata))
        for first in range(0, len(rows), shard_rows):
            stop = min(first + shard_rows, len(rows))
            with ShardWriter(self.folder / shard_key(first // shard_rows, rows.ndim), **layout) as writer:
                for start in range(first, stop, APPEND_ROWS):
                    writer.append(rows[start : min(start + APPEND_ROWS, stop)])

    def open(self) -> None:
        self.held = ShardedArray(self.folder)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.held.gather(rows))

    def load(self) -> np.ndarray:
        return np.asarray(self.held.load())

    def close(self) -> None:
        if self.held is not None:
            self.held.close()
        self.held = None


class OursVerified(Ours):
    name, settings, calls = "ours_verified", "featstore, every chunk touched checked against its checksum", 1
    kinds: ClassVar[tuple[str, ...]] = ("gather_warm", "load")

    def gather(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.held.gather(rows, verify=True))

    def load(self) -> np.ndarray:
        return np.asarray(self.held.load(verify=True))


class ZarrOindex(Rival):
    """zarr-python on the same layout, written whole shards at a time."""

    name, settings = "zarr_oindex", "zarr-python, shards and chunks as ours, no compression, oindex of sorted rows"

    def write(self, rows: np.ndarray) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec

        shard_rows = shard_rows_for(rows[0].nbytes, self.block_rows)
        chunk_rows = chunk_rows_for(rows[0].nbytes, shard_rows)
        array = zarr.create_array(
            self.folder,
            shape=rows.shape,
            dtype=rows.dtype,
            chunks=(chunk_rows, *rows.shape[1:]),
            # No larger than the array: it would be padded to a whole shard.
            shards=(min(shard_rows, -(-len(rows) // chunk_rows) * chunk_rows), *rows.shape[1:]),
            compressors=[Crc32cCodec()],
            config={"write_empty_chunks": True},  # spares the look for empty chunks
        )
        array[...] = rows
        sync(self.folder)

    def open(self) -> None:
        import zarr

        self.held = zarr.open_array(self.folder, mode="r")

    def gather(self, rows: np.ndarray) -> np.ndarray:
        order = np.argsort(rows)
        found = np.empty((len(rows), *self.held.shape[1:]), self.held.dtype)
        found[order] = self.held.oindex[rows[order]]
        return found


class ZarrSlices(ZarrOindex):
    name, settings = "zarr_slices", f"zarr-python, one z[i] a row; rows below 16 KiB in {THREADS} threads"
    kinds: ClassVar[tuple[str, ...]] = ("gather_warm", "gather_cold")

    def gather(self, rows: np.ndarray) -> np.ndarray:
        if self.is_wide:  # threads only get in each other's way
            return np.stack([self.held[row] for row in rows.tolist()])
        with ThreadPoolExecutor(THREADS) as pool:
            return np.stack(list(pool.map(self.held.__getitem__, rows.tolist())))


class TensorStore(Rival):
    name, settings, calls = "tensorstore", "zarr3 driver, files as zarr-python's, metadata not checked again", 1
    cache_bytes = 0

    def _spec(self) -> dict[str, Any]:
        return {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self.folder}/"},
            "context": {"cache_pool": {"total_bytes_limit": self.cache_bytes}},
            "recheck_cached_metadata": False,
            "recheck_cached_data": "open",
        }

    def write(self, rows: np.ndarray) -> None:
        import tensorstore

        shard_rows = shard_rows_for(rows[0].nbytes, self.block_rows)
        metadata = array_metadata(
            num_rows=len(rows),
            row_shape=rows.shape[1:],
            dtype="float16",
            chunk_rows=chunk_rows_for(rows[0].nbytes, shard_rows),
            shard_rows=shard_rows,
            attributes={},
        )
        self.start()
        opened = tensorstore.open({**self._spec(), "metadata": metadata, "create": True}).result()
        opened.write(rows).result()
        sync(self.folder)

    def open(self) -> None:
        import tensorstore

        self.held = tensorstore.open(self._spec()).result()

    def gather(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.held[rows].read().result())

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.held[start:stop].read().result())

    def load(self) -> np.ndarray:
        return np.asarray(self.held.read().result())


class TensorStoreCached(TensorStore):
    name, settings = "tensorstore_cached", "tensorstore with a cache of 4 GiB, which holds all chunks decoded in memory"
    kinds: ClassVar[tuple[str, ...]] = ("gather_warm",)
    cache_bytes = 4 * 2**30


class Hdf5(Rival):
    """h5py reads sorted, unique rows only; the caller's order is restored afterwards."""

    name, settings = "hdf5_contiguous", "h5py, contiguous, fancy indexing of sorted unique rows"
    chunk_bytes = 0

    def write(self, rows: np.ndarray) -> None:
        import h5py

        chunk = max(1, min(len(rows), self.chunk_bytes // rows[0].nbytes))
        chunks = (chunk, *rows.shape[1:]) if self.chunk_bytes else None
        with h5py.File(self.start() / "rows.h5", "w", libver="latest") as file:
            file.create_dataset("rows", data=rows, chunks=chunks)
        sync(self.folder)

    def open(self) -> None:
        import h5py

        self.file = h5py.File(self.folder / "rows.h5", "r", rdcc_nbytes=64 * 2**20)
        self.held = self.file["rows"]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        if not self.chunk_bytes or not self.is_wide:
            unique, inverse = np.unique(rows, return_inverse=True)
            return np.asarray(self.held[unique][inverse])
        out = np.empty((len(rows), *self.held.shape[1:]), self.held.dtype)
        for position in np.argsort(rows).tolist():
            self.held.read_direct(out, np.s_[int(rows[position])], np.s_[position])
        return out

    def load(self) -> np.ndarray:
        out = np.empty(self.held.shape, self.held.dtype)
        self.held.read_direct(out)
        return out

    def close(self) -> None:
        if self.held is not None:
            self.file.close()
        self.held = None


class Hdf5Chunked(Hdf5):
    name, settings = (
        "hdf5_chunked",
        "h5py, chunks of 384 KiB, cache of 64 MiB; fancy indexing, wide rows by read_direct",
    )
    chunk_bytes = 384 * 1024


class Lance(Rival):
    name, settings = "lance", "pylance, one fixed-size list a row, one file, take of rows"

    def write(self, rows: np.ndarray) -> None:
        import lance
        import pyarrow as pa

        values = pa.array(rows.reshape(-1))
        table = pa.table({"x": pa.FixedSizeListArray.from_arrays(values, int(np.prod(rows.shape[1:])))})
        self.start()
        lance.write_dataset(table, self.folder / "rows.lance", max_rows_per_file=len(rows))
        sync(self.folder)
        self.row_shape = rows.shape[1:]

    def open(self) -> None:
        import lance

        self.held = lance.dataset(self.folder / "rows.lance")

    def _values(self, table: Any) -> np.ndarray:
        pieces = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table.column("x").chunks]
        return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).reshape(-1, *self.row_shape)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        return self._values(self.held.take(rows))

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._values(self.held.to_table(offset=start, limit=stop - start))

    def load(self) -> np.ndarray:
        return self._values(self.held.to_table())


class TorchFiles(Rival):
    """One file a row, as many projects keep features; only the first 1024 rows are kept so."""

    name = "pt_files"
    settings = f"one torch.save file a row, torch.load(weights_only) in {THREADS} threads"
    kinds: ClassVar[tuple[str, ...]] = ("gather_warm", "gather_cold", "load", "write")
    write_rows = 128

    def write(self, rows: np.ndarray) -> None:
        import torch

        self.start()
        self.num_rows = min(FILE_ROWS, len(rows))
        for row in range(self.num_rows):
            with open(self.folder / f"{row}.pt", "wb") as file:
                torch.save(torch.from_numpy(rows[row].copy()), file)
                file.flush()
                os.fsync(file.fileno())

    def open(self) -> None:
        import torch

        def get(row: int) -> np.ndarray:
            return np.asarray(torch.load(self.folder / f"{row}.pt", weights_only=True).numpy())

        self.held = get

    def gather(self, rows: np.ndarray) -> np.ndarray:
        with ThreadPoolExecutor(THREADS) as pool:
            return np.stack(list(pool.map(self.held, (rows % self.num_rows).tolist())))

    def load(self) -> np.ndarray:
        return self.gather(np.arange(self.num_rows))


class TorchFilesLoop(TorchFiles):
    name, settings = "pt_files_loop", "the same files read one after the other"
    kinds: ClassVar[tuple[str, ...]] = ("gather_warm", "gather_cold", "load")

    def gather(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([self.held(row) for row in (rows % self.num_rows).tolist()])


RIVALS: list[type[Rival]] = [
    Numpy,
    Ours,
    OursVerified,
    ZarrOindex,
    ZarrSlices,
    TensorStore,
    TensorStoreCached,
    Hdf5,
    Hdf5Chunked,
    Lance,
    TorchFiles,
    TorchFilesLoop,
]
NEEDS = {Hdf5: "h5py", Hdf5Chunked: "h5py", Lance: "lance", TorchFiles: "torch", TorchFilesLoop: "torch"}


def available(wanted: list[str] | None = None) -> tuple[list[type[Rival]], list[str]]:
    """Rivals whose package is installed, and a note on each that is left out; by default all, else `wanted` and ours.

    Raises:
        SystemExit: an unknown name.
    """
    known = [rival.name for rival in RIVALS]
    unknown = [name for name in wanted or [] if name not in known]
    if unknown:
        raise SystemExit(f"unknown rival {unknown[0]!r}; known: {', '.join(known)}")
    chosen = [rival for rival in RIVALS if wanted is None or rival.name in (*wanted, *known[:2])]
    missing = {rival: package for rival, package in NEEDS.items() if rival in chosen and find_spec(package) is None}
    notes = [f"{rival.name} left out: package {package} is not installed" for rival, package in missing.items()]
    return [rival for rival in chosen if rival not in missing], notes
