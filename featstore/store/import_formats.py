"""Files that features can be imported from: npy, npz, parquet, safetensors, HDF5. Nothing is ever unpickled.

Arrays that lie in a file as they are (npy, safetensors) are mapped; those that must be decoded (parquet, HDF5) pass in
pieces through an unnamed temporary file, so that memory stays bounded. npz files are read into memory. Texts are
arrays of Python's `str`, equal ones shared: an array of numpy's would have the longest text's length in every row.
Arrays beside the features that are no column are not read at all; of those only the shape is true.
"""

import contextlib
import json
import math
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.datasets.source import read_csv
from featstore.errors import FeatstoreError, ManifestError, StoreError
from featstore.store.shards import numpy_dtype

if TYPE_CHECKING:
    import pyarrow as pa

Arrays = dict[str, np.ndarray]

PIECE_ROWS = 4096
PIECE_BYTES = 16 * 2**20  # of texts of fixed length
TEXT_BYTES = 64  # that a Python string takes beside its characters
# A file that would grow beyond both of these on reading is taken for a trap: features hardly compress.
BOMB_BYTES, BOMB_RATIO = 64 * 2**20, 100
HEADER_LIMIT = 100 * 2**20  # of a safetensors file, as its own library has it
SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"} | {
    f"{sign}{bits}": f"{name}{bits}" for sign, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


def read_arrays(path: Path, features_key: str, ids_file: Path | None) -> Arrays:
    """Arrays of a file by name: the features (N, D) and what stands beside them, one value a row.

    The format follows from the name's ending, npz where it is none of ours. `ids_file` (csv, tsv, txt, parquet) adds
    its columns, in place of arrays of the same name and of other ids.

    Raises:
        ManifestError: no such file, not of its format, objects in it, or it would grow beyond measure or memory.
        StoreError: HDF5 without h5py, or no space for temporary files.
    """
    reader = READERS.get(path.suffix.lower(), _npz)
    if not path.is_file():
        raise ManifestError(f"{path}: no such file; import takes an {path.suffix or '.npz'} with features and ids")
    with _enough_memory(path):
        arrays = reader(path, features_key)
    if ids_file is not None:
        table = read_ids(ids_file)
        arrays = {name: value for name, value in arrays.items() if name not in ("id", "ids", "path", "paths")} | table
    return arrays


@contextlib.contextmanager
def _enough_memory(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise ManifestError(
            f"{path}: what it holds does not fit into memory ({error}); leave out what is neither features, ids nor "
            "labels, or save the features as .npy, which is read from disk, and the rest as --ids"
        ) from error


class _Budget:
    """How much a file may grow on reading, all its parts together. Asked before anything is decoded."""

    def __init__(self, path: Path):
        self.path, self.size, self.spent = path, path.stat().st_size, 0

    def charge(self, what: str, num_bytes: int) -> None:
        """Raises ManifestError beyond the limit."""
        self.spent += num_bytes
        if self.spent > max(BOMB_BYTES, BOMB_RATIO * self.size):
            raise ManifestError(
                f"{self.path}: with {what}, {self.spent} bytes would be read from the {self.size} of the file; "
                "features do not compress like that; write the file again without compression, or leave out "
                "what is not needed"
            )


class _Texts:
    """A column of texts that come in pieces; equal ones are held once."""

    def __init__(self, name: str, count: int, budget: _Budget):
        self.name, self.budget, self.known = name, budget, dict[str, str]()
        budget.charge(repr(name), 8 * count)
        self.values, self.filled = np.empty(count, object), 0

    def append(self, texts: Iterable[str]) -> None:
        for text in texts:
            if text not in self.known:
                self.budget.charge(repr(self.name), TEXT_BYTES + len(text))
            self.values[self.filled] = self.known.setdefault(text, text)
            self.filled += 1


def _unread(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array in place of one that nobody needs, of its shape and without its memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def read_ids(path: Path) -> Arrays:
    """Columns of a table with one row for each row of the features; a text file has one id a line.

    Raises:
        ManifestError: no such file, no table, or it would grow beyond measure or memory.
    """
    if not path.is_file():
        raise ManifestError(f"{path}: no such file; --ids takes a csv, tsv, txt or parquet file with one id a row")
    with _enough_memory(path):
        arrays = _read_ids(path)
    if len(arrays) == 1:  # one column is the ids, whatever it is called
        return {"id": next(iter(arrays.values()))} | arrays
    return arrays


def _read_ids(path: Path) -> Arrays:
    import pyarrow as pa
    import pyarrow.parquet as pq

    suffix, budget = path.suffix.lower(), _Budget(path)
    if suffix == ".txt":
        try:
            return {"id": np.array(path.read_text(encoding="utf-8").splitlines(), dtype=object)}
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: not UTF-8 text ({error}); save it as UTF-8, one id a line") from error
    if suffix == ".parquet":
        try:
            return _parquet_columns(path, pq.read_schema(path).names, budget)
        except MemoryError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise ManifestError(f"{path}: not a parquet file ({error}); write it again") from error
    if suffix in (".csv", ".tsv"):
        return _columns(read_csv(path, delimiter="\t" if suffix == ".tsv" else ","), budget)
    raise ManifestError(f"{path}: --ids takes a csv, tsv, txt or parquet file, by its ending; rename or convert it")


def _parquet_columns(path: Path, names: list[str], budget: _Budget) -> Arrays:
    """Those columns of a parquet file that hold one value a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    plain = [name for name in names if not pa.types.is_nested(schema.field(name).type)]
    # Dictionaries stay what they are: one long text may stand in millions of rows.
    with pq.ParquetFile(path, read_dictionary=plain, page_checksum_verification=True) as file:
        count, places = int(file.metadata.num_rows), _places(file)
        for name in plain:
            kind = schema.field(name).type
            width = kind.byte_width if pa.types.is_fixed_size_binary(kind) else 8
            held = sum(chunk.total_uncompressed_size for chunk in places.get(name, []))
            budget.charge(repr(name), held + count * width)
        return _columns(file.read(columns=plain), budget) if plain else {}


def _places(file: Any) -> dict[str, list[Any]]:
    """What the metadata says of the pieces of each column, by the name of its head."""
    found: dict[str, list[Any]] = {}
    for group in (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)):
        for chunk in (group.column(number) for number in range(group.num_columns)):
            found.setdefault(chunk.path_in_schema, []).append(chunk)
            head = chunk.path_in_schema.partition(".")[0]
            if head != chunk.path_in_schema:
                found.setdefault(head, []).append(chunk)
    return found


def _columns(table: "pa.Table", budget: _Budget) -> Arrays:
    """Columns of plain values; integers stay, all else becomes text, null the empty text."""
    import pyarrow as pa

    found: Arrays = {}
    for name in table.column_names:
        column = table.column(name)
        if pa.types.is_integer(column.type) and not column.null_count:
            found[name] = column.to_numpy()
            continue
        texts = _Texts(name, len(column), budget)
        for chunk in column.chunks:
            if not pa.types.is_dictionary(chunk.type):
                chunk = chunk.dictionary_encode()
            different = ["" if value is None else str(value) for value in chunk.dictionary.to_pylist()]
            texts.append(
                "" if index is None else different[index]
                for first in range(0, len(chunk), PIECE_ROWS)
                for index in chunk.indices[first : first + PIECE_ROWS].to_pylist()
            )
        found[name] = texts.values
    return found


def _npz(path: Path, features_key: str) -> Arrays:
    """Arrays of an `.npz` file, never unpickling."""
    try:
        budget = _Budget(path)
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            return {
                item.filename.removesuffix(".npy"): _member(path, archive, item, features_key, budget)
                for item in archive.infolist()
            }
    except ManifestError:
        raise
    except (ValueError, OSError, EOFError, TypeError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
        raise ManifestError(f"{path}: not an .npz of plain arrays ({error}); objects are never unpickled") from error


def _member(
    path: Path, archive: zipfile.ZipFile, item: zipfile.ZipInfo, features_key: str, budget: _Budget
) -> np.ndarray:
    name = item.filename.removesuffix(".npy")
    with archive.open(item) as member:
        found = _check_npy(member, item.file_size)
        if found is None:
            raise ManifestError(
                f"{path}: not an .npz of plain arrays (it holds the file {item.filename!r}); save it by numpy.savez"
            )
        _, shape, _, dtype = found
        if len(shape) != (2 if name == features_key else 1):
            return _unread(shape, dtype)
        budget.charge(repr(name), item.file_size)
        if dtype.kind in "US":
            texts = _Texts(name, shape[0], budget)
            step = max(1, PIECE_BYTES // max(1, dtype.itemsize))
            for first in range(0, len(texts.values), step):
                count = min(step, len(texts.values) - first)
                piece = np.ndarray((count,), dtype, member.read(count * dtype.itemsize)).tolist()
                texts.append(text.decode(errors="replace") if isinstance(text, bytes) else str(text) for text in piece)
            return texts.values
    with archive.open(item) as member:
        return np.asarray(np.lib.format.read_array(member, allow_pickle=False))


def _check_npy(file: Any, size: int) -> tuple[int, tuple[int, ...], bool, np.dtype[Any]] | None:
    """(offset of the data, shape, Fortran order, dtype) of an npy file of `size` bytes; None if it is no npy file.

    Raises:
        ValueError: objects, or another amount of data than the shape asks for.
    """
    if file.read(6) != np.lib.format.MAGIC_PREFIX:
        return None
    version = tuple(file.read(2))
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of npy is not known")
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    offset = int(file.tell())
    wanted = math.prod(shape) * dtype.itemsize
    if wanted != size - offset:
        raise ValueError(f"its header declares {wanted} bytes of data, the file has {size - offset}")
    return offset, shape, fortran, dtype


def _npy(path: Path, features_key: str) -> Arrays:
    try:
        with open(path, "rb") as file:
            found = _check_npy(file, path.stat().st_size)
        if found is None:
            raise ValueError("it does not begin like one")
        offset, shape, fortran, dtype = found
        # numpy cannot map nothing; the shape is refused later, with its own words.
        if 0 in shape:
            return {features_key: np.empty(shape, dtype)}
        # In Fortran order the bytes are those of the transpose.
        mapped = np.memmap(path, dtype, "r", offset=offset, shape=shape[::-1] if fortran else shape)
        return {features_key: mapped.T if fortran else mapped}
    except (ValueError, OSError, EOFError, TypeError, SyntaxError) as error:
        raise ManifestError(f"{path}: not an .npy of a plain array ({error}); objects are never unpickled") from error


def _safetensors(path: Path, _: str) -> Arrays:
    """Mapped tensors; the header is checked here, since the library has no bfloat16 for numpy."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ValueError(f"its header declares {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        arrays: Arrays = {}
        for name, facts in header.items():
            if name != "__metadata__":
                arrays[name] = _tensor(path, 8 + length, size, facts)
        return arrays
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{path}: not a safetensors file ({error}); write it again") from error


def _tensor(path: Path, base: int, size: int, facts: dict[str, Any]) -> np.ndarray:
    if facts["dtype"] not in SAFETENSORS:
        return np.empty(0)  # of a kind that no features or ids have
    name, shape = SAFETENSORS[facts["dtype"]], tuple(int(axis) for axis in facts["shape"])
    begin, end = facts["data_offsets"]
    stored = np.dtype(np.uint16 if name == "bfloat16" else name)
    wanted = math.prod(shape) * stored.itemsize
    if min(shape, default=0) < 0 or not 0 <= begin <= end <= size - base or wanted != end - begin:
        raise ValueError(
            f"a tensor of shape {shape} takes {wanted} bytes, its place has {end - begin} of {size - base}"
        )
    if not wanted:
        return np.empty(shape, numpy_dtype(name))
    return np.memmap(path, stored, "r", offset=base + begin, shape=shape).view(numpy_dtype(name))


def spool(shape: tuple[int, int], dtype: np.dtype[Any], pieces: Iterator[np.ndarray]) -> np.ndarray:
    """Rows that come in pieces as one array on disk, in a temporary file without a name; gone with the array.

    Raises:
        StoreError: the temporary folder refuses.
    """
    with _temporary():
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below, where what fails is the input
    with file:
        for piece in pieces:
            with _temporary():
                file.write(np.ascontiguousarray(piece, dtype).data)
        with _temporary():
            file.flush()
            return np.memmap(file, dtype, "r+", shape=shape)


@contextlib.contextmanager
def _temporary() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{tempfile.gettempdir()}: cannot keep decoded features there ({error.strerror or error}); free space, or "
            "name another folder by the environment variable TMPDIR, then import again"
        ) from error


def _parquet(path: Path, features_key: str) -> Arrays:
    """A list column, or columns `features_key` + number (`feature_0`, `feature_1`, ...); the other columns beside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        budget = _Budget(path)
        with pq.ParquetFile(path) as file:
            schema, count = file.schema_arrow, int(file.metadata.num_rows)
            places = _places(file)
            for name in (name for name in schema.names if name.startswith(features_key)):
                if name == features_key or name[len(features_key) :].isdecimal():
                    budget.charge(repr(name), sum(chunk.num_values for chunk in places.get(name, [])) * 8)
            columns, width = _feature_columns(path, file, features_key)
            arrays = _parquet_columns(path, [name for name in schema.names if name not in columns], budget)
            if not columns or not count:
                return arrays
            kind = schema.field(columns[0]).type
            kind = kind if len(columns) > 1 or not pa.types.is_nested(kind) else kind.value_type
            if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
                raise ManifestError(f"{path}: features must be numbers, {columns[0]!r} holds {kind}; convert them")
            dtype = np.dtype(kind.to_pandas_dtype())
            batches = file.iter_batches(batch_size=PIECE_ROWS, columns=columns)
            rows = (_batch_rows(path, batch, columns, width, dtype) for batch in batches)
            return arrays | {features_key: spool((count, width), dtype, rows)}
    except (FeatstoreError, MemoryError):
        raise
    except (pa.ArrowException, OSError, NotImplementedError) as error:
        raise ManifestError(f"{path}: not a parquet file that can be read ({error}); write it again") from error


def _feature_columns(path: Path, file: Any, key: str) -> tuple[list[str], int]:
    """(columns that hold the features, D)."""
    import pyarrow as pa

    schema = file.schema_arrow
    if key in schema.names:
        kind = schema.field(key).type
        if pa.types.is_fixed_size_list(kind):
            return [key], int(kind.list_size)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            first = next(file.iter_batches(batch_size=1, columns=[key]), None)
            return [key], len(first.column(0)[0] or []) if first is not None and len(first) else 0
    numbered = {
        int(name.removeprefix(key)): name
        for name in schema.names
        if name[len(key) :].isdecimal() and name.startswith(key)
    }
    return [numbered[number] for number in sorted(numbered)], len(numbered)


def _batch_rows(path: Path, batch: Any, columns: list[str], width: int, dtype: np.dtype[Any]) -> np.ndarray:
    import pyarrow as pa

    held = [batch.column(name) for name in columns]
    if any(column.null_count for column in held):
        raise ManifestError(f"{path}: rows of the features are null; leave such samples out of the file")
    if not pa.types.is_nested(held[0].type):
        return np.stack([column.to_numpy(zero_copy_only=False).astype(dtype, copy=False) for column in held], axis=1)
    (column,) = held
    values = column.flatten()
    lengths = np.asarray(column.value_lengths()) if not pa.types.is_fixed_size_list(column.type) else np.array([width])
    if (lengths != width).any() or values.null_count or len(values) != len(batch) * width:
        raise ManifestError(f"{path}: every row of the features must hold {width} numbers, and no null; some do not")
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(len(batch), width)


def _hdf5(path: Path, features_key: str) -> Arrays:
    try:
        import h5py
    except ImportError as error:
        raise StoreError(f"{path}: HDF5 files need the package h5py: pip install 'featstore[medical]'") from error
    try:
        budget = _Budget(path)
        with h5py.File(path, "r") as file:
            arrays: Arrays = {}
            for name in dict.fromkeys([features_key, *file]):
                item = file.get(name)
                if isinstance(item, h5py.Dataset):
                    arrays[name] = _dataset(file, name, item, features_key, budget)
            return arrays
    except (FeatstoreError, MemoryError):
        raise
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ManifestError(f"{path}: not an HDF5 file that can be read ({error}); write it again") from error


def _dataset(file: Any, name: str, item: Any, features_key: str, budget: _Budget) -> np.ndarray:
    import h5py

    path = budget.path
    if item.file.filename != file.filename or item.is_virtual or item.external:
        raise ManifestError(
            f"{path}: {name!r} lies in another file, which is not followed; copy its values into this one"
        )
    is_text = h5py.check_string_dtype(item.dtype) is not None
    if item.dtype.hasobject and not is_text:
        raise ManifestError(f"{path}: {name!r} holds objects, which are never read; store plain numbers or text")
    if name != features_key and item.ndim != 1:
        return _unread(item.shape, item.dtype)
    # Chunks are decoded whole.
    chunk = math.prod(item.chunks or (0,)) * item.dtype.itemsize
    budget.charge(repr(name), chunk if is_text else max(chunk, item.size * item.dtype.itemsize))
    if is_text:
        if item.ndim != 1:
            return _unread(item.shape, np.dtype(object))
        texts = _Texts(name, len(item), budget)
        # Rows may share one text, which is at most as long as the file.
        longest = item.dtype.itemsize if item.dtype.kind == "S" else budget.size
        step = min(max(BOMB_RATIO, PIECE_BYTES // max(1, longest)), PIECE_ROWS)
        for first in range(0, len(item), step):
            texts.append(text or "" for text in item.asstr(errors="replace")[first : first + step].tolist())
        return texts.values
    if item.ndim != 2 or 0 in item.shape:
        return np.asarray(item[...])
    step = max(PIECE_ROWS, (item.chunks or (0,))[0])
    return spool(item.shape, item.dtype, (item[first : first + step] for first in range(0, len(item), step)))


READERS: dict[str, Callable[[Path, str], Arrays]] = {
    ".npz": _npz,
    ".npy": _npy,
    ".parquet": _parquet,
    ".safetensors": _safetensors,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
}
