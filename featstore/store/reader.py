"""A sharded zarr v3 array on disk, read like a numpy array: any rows in any order, ranges, the whole.

zarr-python costs about 150 us of Python a row in a gather. Arrays that have the layout of `shards.py` are read by
`mapped.py` at the speed of a memory map; any other layout is read through zarr-python: the same rows, slower.
"""

import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from featstore.errors import ConfigError, CorruptError, StoreError
from featstore.objects import Place, as_object, connection
from featstore.store.mapped import MappedRows
from featstore.store.packed import ATTRIBUTE, ArchivedRows
from featstore.store.remote import ObjectCache, RemoteRows, default_cache
from featstore.store.shards import ShardLayout


class ShardedArray:
    """A zarr v3 array on disk, rows along axis 0, read like a numpy array; every read returns a new array.

    Opening reads `zarr.json` only. A shard is opened when first touched, its size and index are checked once then, and
    a bounded number stays open. Threads may share an array; pickling sends the path. Arrays have these attributes:
    `path`, `shape`, `dtype`, `row_shape`, `chunk_rows` (unit of checksums), `shard_rows` (of files), `attributes`.

    Shards in a bucket come by way of a local `cache` (by default 20 GB in the user's cache folder), see `remote.py`.

    Raises:
        StoreError: no zarr v3 array at `path`, or an array without axes.
        CorruptError: its `zarr.json` is damaged.
    """

    def __init__(self, path: Place, cache: ObjectCache | None = None) -> None:
        held = as_object(path)
        self.path: Place = Path(path) if held is None else path
        self._cache = cache
        metadata = _read_metadata(self.path)
        self.shape: tuple[int, ...] = tuple(metadata["shape"])
        self.row_shape = self.shape[1:]
        self.attributes: dict[str, Any] = metadata.get("attributes", {})
        layout = _shard_layout(metadata)
        self._backend: _Backend
        if ATTRIBUTE in self.attributes:
            if held is not None:
                raise StoreError(f"{self.path}: archived arrays are read from a folder; copy the set to a local store")
            self._backend = ArchivedRows(Path(path), metadata)
        elif layout is None:
            self._backend = _ZarrRows(self.path, metadata)
        elif held is None:
            self._backend = MappedRows(self.path, layout, len(self))
        else:
            self._backend = RemoteRows(held, layout, len(self), cache or default_cache())
        self.dtype = self._backend.dtype
        self.chunk_rows = self._backend.chunk_rows
        self.shard_rows = self._backend.shard_rows

    @property
    def is_mapped(self) -> bool:
        """Whether rows come from shards as we write them; else zarr-python reads, and absent chunks are fill values."""
        return not isinstance(self._backend, _ZarrRows | ArchivedRows)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"ShardedArray({str(self.path)!r}, shape={self.shape}, dtype={self.dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        kept = None if self._cache is None else (self._cache.folder, self._cache.limit)
        return _reopen, (self.path, kept)

    def __enter__(self) -> "ShardedArray":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all files; reads after it raise StoreError. Reads under way in other threads still finish."""
        self._backend.close()

    def gather(
        self,
        rows: np.ndarray | Sequence[int],
        out: Shaped[np.ndarray, "..."] | None = None,
        verify: bool = False,
    ) -> Shaped[np.ndarray, "K ..."]:
        """Rows by number, in the order given: duplicates and negative numbers (from the end) allowed, or a mask (N,).

        Args:
            out: where to put them, C-contiguous, of shape (K, *row_shape) and the array's dtype.
            verify: check every chunk touched against its checksum first.

        Raises:
            IndexError: a row is out of range.
            CorruptError: a shard is missing or damaged; with `verify`, also a chunk.
            ConfigError: `out` does not fit, or `verify` of an array without checksums.
        """
        numbers = _row_numbers(rows, len(self))
        if numbers.ndim != 1:
            raise IndexError(f"gather takes one axis of row numbers, got shape {numbers.shape}")
        if out is not None:
            self._check_out(out, len(numbers))
        if not len(numbers):
            return np.empty((0, *self.row_shape), self.dtype) if out is None else out
        return self._backend.gather(numbers, out, verify)

    def prefetch(self, rows: np.ndarray | Sequence[int]) -> None:
        """Ask for rows that are gathered soon, without waiting; nothing happens where none are mapped."""
        numbers = _row_numbers(rows, len(self))
        if numbers.size and isinstance(self._backend, MappedRows | RemoteRows):
            self._backend.prefetch(numbers.ravel())

    def read(
        self, start: int, stop: int, out: Shaped[np.ndarray, "..."] | None = None, verify: bool = False
    ) -> Shaped[np.ndarray, "K ..."]:
        """Rows start to stop - 1, by large reads straight into the result; arguments and errors as in `gather`."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(
                f"rows {start} to {stop} (exclusive) asked of {len(self)}; 0 <= start <= stop <= {len(self)}"
            )
        if out is None:
            out = np.empty((stop - start, *self.row_shape), self.dtype)
        else:
            self._check_out(out, stop - start)
        if stop > start:
            self._backend.read(start, stop, out, verify)
        return out

    def load(self, out: Shaped[np.ndarray, "..."] | None = None, verify: bool = False) -> Shaped[np.ndarray, "N ..."]:
        """The whole array in memory; arguments and errors as in `gather`."""
        return self.read(0, len(self), out, verify)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on disk is always copied into memory; drop copy=False")
        values = self.load()
        return values if dtype is None else values.astype(dtype, copy=False)

    def __getitem__(self, key: Any) -> Any:
        """numpy's indexing. Only axis 0 is cut on disk: `x[:, 0]` reads whole rows and then takes its part."""
        if type(key) is int:
            return self._row(key)
        first, rest = split_key(key, len(self.shape))
        inside: Any
        if isinstance(first, slice):
            start, stop, step = first.indices(len(self))
            if step == 1:
                block = self.read(start, max(start, stop))
            else:
                block = self.gather(np.arange(start, stop, step))
            inside = slice(None)
        elif isinstance(first, int):
            # Kept as an axis of one and an index 0, because numpy lets an integer broadcast with index arrays.
            block, inside = self._row(first)[np.newaxis], 0
        else:
            numbers = _row_numbers(first, len(self))
            block = self.gather(numbers.ravel())
            if not rest:
                return block.reshape(numbers.shape + self.row_shape)
            inside = np.arange(numbers.size).reshape(numbers.shape)
        result = block[(inside, *rest)]
        # A view would keep all the rows that were read in memory for the part that was asked for.
        return result.copy() if rest and isinstance(result, np.ndarray) and result.base is not None else result

    def _row(self, row: int) -> Any:
        found = row + len(self) if row < 0 else row
        if not 0 <= found < len(self):
            raise _out_of_range(row, len(self))
        out = np.empty((1, *self.row_shape), self.dtype)
        self._backend.read(found, found + 1, out, False)
        return out[0]

    def _check_out(self, out: npt.NDArray[Any], num_rows: int) -> None:
        shape = (num_rows, *self.row_shape)
        if out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous or not out.flags.writeable:
            raise ConfigError(
                f"out must be writable, C-contiguous, of shape {shape} and dtype {self.dtype}; got {out.shape}, "
                f"{out.dtype}, C-contiguous {out.flags.c_contiguous}, writable {out.flags.writeable}"
            )


def _reopen(path: Place, cache: tuple[Path, int] | None) -> ShardedArray:
    return ShardedArray(path, None if cache is None else ObjectCache(*cache))


class _Backend(Protocol):
    """How rows come from disk. Row numbers arrive checked: at least one, within the array, not negative."""

    dtype: np.dtype[Any]
    chunk_rows: int
    shard_rows: int

    def gather(self, rows: npt.NDArray[np.int64], out: np.ndarray | None, verify: bool) -> np.ndarray: ...
    def read(self, start: int, stop: int, out: np.ndarray, verify: bool) -> None: ...
    def close(self) -> None: ...


class _ZarrRows:
    """Arrays that are not mapped: compressed, unsharded, cut along other axes, index first."""

    def __init__(self, path: Place, metadata: dict[str, Any]) -> None:
        import zarr

        try:
            if metadata["data_type"] == "bfloat16":
                from featstore.store.bfloat16 import register

                register()
            held = as_object(path)
            if held is None:
                array: zarr.Array[Any] = zarr.open_array(path, mode="r")
            else:
                from zarr.storage import ObjectStore

                bucket = ObjectStore(connection(held.bucket).requests, read_only=True)
                array = zarr.open_array(bucket, path=str(held.key), mode="r")
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path}: zarr-python cannot open this array ({error}); convert it with a tool that can"
            ) from error
        self.path = path
        self._array: zarr.Array[Any] | None = array
        self._has_checksums = _names_crc32c(metadata["codecs"])
        self.dtype: np.dtype[Any] = array.dtype
        self.chunk_rows: int = array.chunks[0]
        self.shard_rows: int = (array.shards or array.chunks)[0]

    def close(self) -> None:
        self._array = None

    def gather(self, rows: npt.NDArray[np.int64], out: np.ndarray | None, verify: bool) -> np.ndarray:
        """One read per chunk touched; zarr's own gather costs far more than the rows between that this one reads."""
        array = self._open_array()
        if out is None:
            out = np.empty((len(rows), *array.shape[1:]), self.dtype)
        chunk_of = rows // self.chunk_rows
        order = np.argsort(chunk_of, kind="stable")
        for positions in np.split(order, np.flatnonzero(np.diff(chunk_of[order])) + 1):
            wanted = rows[positions]
            first, last = int(wanted.min()), int(wanted.max())
            block = np.empty((last + 1 - first, *array.shape[1:]), self.dtype)
            self.read(first, last + 1, block, verify)
            out[positions] = block[wanted - first]
        return out

    def read(self, start: int, stop: int, out: np.ndarray, verify: bool) -> None:
        """zarr checks checksums at every read, so `verify` only asks that there are any."""
        array = self._open_array()
        if verify and not self._has_checksums:
            raise ConfigError(f"array {self.path} was written without checksums, nothing can be verified; drop verify")
        try:
            out[...] = array[start:stop]
        except (ValueError, RuntimeError) as error:
            raise CorruptError(f"rows {start} to {stop - 1} of {self.path} cannot be decoded: {error}") from error

    def _open_array(self) -> Any:
        if self._array is None:
            raise StoreError(f"array {self.path} is closed; open it again")
        return self._array


def _read_metadata(path: Place) -> dict[str, Any]:
    file = path / "zarr.json"
    try:
        metadata = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"no zarr v3 array at {path}: it has no zarr.json; give the folder of one array") from error
    except ValueError as error:
        raise CorruptError(f"{file} is not valid JSON ({error}); restore it from a copy") from error
    node = metadata.get("node_type") if isinstance(metadata, dict) else None
    if node == "group":
        raise StoreError(f"{path} is a zarr group; give the folder of one of its arrays")
    if node != "array" or not isinstance(metadata.get("shape"), list):
        raise CorruptError(f"{file} does not describe an array (node_type {node!r}); restore it from a copy")
    if not metadata["shape"]:
        raise StoreError(f"the array at {path} has no axis, so it has no rows; only arrays of rows can be opened")
    return dict(metadata)


def _shard_layout(metadata: dict[str, Any]) -> ShardLayout | None:
    """The layout, if it is that of `shards.py` but for the sizes; None otherwise."""
    try:
        (codec,) = metadata["codecs"]
        grid, keys, sharding = metadata["chunk_grid"], metadata["chunk_key_encoding"], codec["configuration"]
        shape, shard = metadata["shape"], grid["configuration"]["chunk_shape"]
        chunk = sharding["chunk_shape"]
        is_ours = (
            codec["name"] == "sharding_indexed"
            and grid["name"] == "regular"
            and keys["name"] == "default"
            and keys.get("configuration", {}).get("separator", "/") == "/"
            and not metadata.get("storage_transformers")
            and sharding.get("index_location", "end") == "end"
            and _is_plain(sharding["codecs"])
            and _is_plain(sharding["index_codecs"])
            and shape[1:] == shard[1:] == chunk[1:]
        )
        if is_ours:
            return ShardLayout(
                row_shape=tuple(shape[1:]), dtype=metadata["data_type"], chunk_rows=chunk[0], shard_rows=shard[0]
            )
    except (KeyError, TypeError, ValueError):
        return None  # fields of another kind of array, or a dtype that shards.py does not write: zarr-python knows them
    return None


def _is_plain(codecs: list[dict[str, Any]]) -> bool:
    first, second = codecs
    endian = first.get("configuration", {}).get("endian", "little")
    return (first["name"], endian, second["name"]) == ("bytes", "little", "crc32c")


def _names_crc32c(codecs: list[dict[str, Any]]) -> bool:
    return any(
        codec["name"] == "crc32c" or _names_crc32c(codec.get("configuration", {}).get("codecs", [])) for codec in codecs
    )


def _row_numbers(rows: Any, num_rows: int) -> npt.NDArray[np.int64]:
    """Integers or a mask as checked row numbers from 0 on, in the shape they came in."""
    array = np.asarray(rows)
    if array.dtype == np.bool_:
        if array.shape != (num_rows,):
            raise IndexError(f"a mask of shape ({num_rows},) must come, got {array.shape}")
        return np.flatnonzero(array)
    if not array.size:
        return np.zeros(array.shape, np.int64)
    if array.dtype.kind not in "iu":
        raise IndexError(f"rows are picked by integers, slices, integer lists or a mask, got {array.dtype}")
    if array.dtype.kind == "u" and array.max() >= num_rows:
        raise _out_of_range(int(array.max()), num_rows)
    numbers = array.astype(np.int64, copy=False)
    # As unsigned numbers negative ones are huge, so one pass finds both kinds that need a second look.
    if numbers.view(np.uint64).max() >= num_rows:
        numbers = np.where(numbers < 0, numbers + num_rows, numbers)
        wrong = (numbers < 0) | (numbers >= num_rows)
        if wrong.any():
            raise _out_of_range(int(array[wrong][0]), num_rows)
    return numbers


def _out_of_range(row: int, num_rows: int) -> IndexError:
    valid = f"give {-num_rows} to {num_rows - 1}" if num_rows else "it has none"
    return IndexError(f"row {row} is out of range for an array of {num_rows} rows; {valid}")


def split_key(key: Any, ndim: int) -> tuple[Any, tuple[Any, ...]]:
    """(what picks rows: an int, a slice or something like an array; what is left for numpy)."""
    parts = list(key) if isinstance(key, tuple) else [key]
    if any(part is None for part in parts):
        raise IndexError("new axes cannot be made while reading; index first, then add them")
    if not parts or parts[0] is Ellipsis:
        # An Ellipsis stands for the axes that nothing else takes; a mask takes as many as it has.
        taken = sum(np.ndim(part) if np.asarray(part).dtype == np.bool_ else 1 for part in parts[1:])
        parts = [*parts[1:], Ellipsis] if taken >= ndim else [slice(None), *parts]
    first = parts[0]
    if not isinstance(first, slice) and np.ndim(first) == 0:
        if isinstance(first, (bool, np.bool_)):
            raise IndexError("one truth value picks no rows; give a mask with one for each row")
        try:
            first = operator.index(first)
        except TypeError as error:
            raise IndexError(
                f"rows are picked by integers, slices, integer lists or a mask, got {type(first).__name__}"
            ) from error
    return first, tuple(parts[1:])
