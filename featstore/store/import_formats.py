"""Files that features can be imported from: npy, npz, parquet, safetensors, HDF5. Nothing is ever unpickled.

Arrays that lie in a file as they are (npy, safetensors) are mapped; those that must be decoded (parquet, HDF5) pass in
pieces through an unnamed temporary file, so that memory stays bounded. npz files are read into memory.
"""

import json
import math
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore import files
from featstore.datasets.source import read_csv
from featstore.errors import ManifestError, StoreError
from featstore.store.shards import numpy_dtype

if TYPE_CHECKING:
    import pyarrow as pa

Arrays = dict[str, np.ndarray]

PIECE_ROWS = 4096
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
        ManifestError: no such file, not of its format, objects in it, or it would grow beyond measure.
        StoreError: HDF5 without h5py.
    """
    reader = READERS.get(path.suffix.lower(), _npz)
    if not path.is_file():
        raise ManifestError(f"{path}: no such file; import takes an {path.suffix or '.npz'} with features and ids")
    arrays = reader(path, features_key)
    if ids_file is not None:
        table = read_ids(ids_file)
        arrays = {name: value for name, value in arrays.items() if name not in ("id", "ids", "path", "paths")} | table
    return arrays


def read_ids(path: Path) -> Arrays:
    """Columns of a table with one row for each row of the features; a text file has one id a line.

    Raises:
        ManifestError: no such file, or no table.
    """
    import pyarrow as pa

    if not path.is_file():
        raise ManifestError(f"{path}: no such file; --ids takes a csv, tsv, txt or parquet file with one id a row")
    suffix = path.suffix.lower()
    if suffix == ".txt":
        try:
            return {"id": np.array(path.read_text(encoding="utf-8").splitlines())}
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: not UTF-8 text ({error}); save it as UTF-8, one id a line") from error
    if suffix == ".parquet":
        try:
            table = files.read_parquet(path.read_bytes())
        except (pa.ArrowException, OSError) as error:
            raise ManifestError(f"{path}: not a parquet file ({error}); write it again") from error
    elif suffix in (".csv", ".tsv"):
        table = read_csv(path, delimiter="\t" if suffix == ".tsv" else ",")
    else:
        raise ManifestError(f"{path}: --ids takes a csv, tsv, txt or parquet file, by its ending; rename or convert it")
    arrays = _columns(table)
    if len(arrays) == 1:  # one column is the ids, whatever it is called
        return {"id": next(iter(arrays.values()))} | arrays
    return arrays


def _columns(table: "pa.Table") -> Arrays:
    """Columns of plain values; integers stay, all else becomes text, null the empty text."""
    import pyarrow as pa

    found: Arrays = {}
    for name in table.column_names:
        column = table.column(name)
        if pa.types.is_nested(column.type):
            continue
        if pa.types.is_integer(column.type) and not column.null_count:
            found[name] = column.to_numpy()
        else:
            found[name] = np.array(["" if value is None else str(value) for value in column.to_pylist()], dtype=np.str_)
    return found


def _check_growth(path: Path, what: str, decoded: int, held: int) -> None:
    if decoded > max(BOMB_BYTES, BOMB_RATIO * held):
        raise ManifestError(
            f"{path}: {what} takes {decoded} bytes when read, from {held} in the file; features do not compress like "
            "that; write the file again without compression"
        )


def read_npz(path: Path) -> Arrays:
    """Arrays of an `.npz` file, never unpickling.

    Raises:
        ManifestError: no such file, not an npz, or it holds Python objects.
    """
    if not path.is_file():
        raise ManifestError(f"{path}: no such file; import takes an .npz with features and ids")
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            for item in archive.infolist():
                _check_growth(path, item.filename, item.file_size, item.compress_size)
                with archive.open(item) as member:
                    _check_npy(member, item.file_size)
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except ManifestError:
        raise
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ManifestError(f"{path}: not an .npz of plain arrays ({error}); objects are never unpickled") from error
    foreign = [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]
    if foreign:
        raise ManifestError(
            f"{path}: not an .npz of plain arrays (it holds the file {foreign[0]!r}); save it by numpy.savez"
        )
    return arrays


def _npz(path: Path, _: str) -> Arrays:
    return read_npz(path)


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
    """Rows that come in pieces as one array on disk, in a temporary file without a name; gone with the array."""
    with tempfile.TemporaryFile() as file:
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).data)
        file.flush()
        return np.memmap(file, dtype, "r+", shape=shape)


def _parquet(path: Path, features_key: str) -> Arrays:
    """A list column, or columns `features_key` + number (`feature_0`, `feature_1`, ...); the other columns beside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, count = file.schema_arrow, int(file.metadata.num_rows)
            columns, width = _feature_columns(path, file, features_key)
            others = [name for name in schema.names if name not in columns]
            arrays = _columns(file.read(columns=others)) if others else {}
            if not columns or not count:
                return arrays
            kind = schema.field(columns[0]).type
            dtype = np.dtype(
                (kind if len(columns) > 1 or not pa.types.is_nested(kind) else kind.value_type).to_pandas_dtype()
            )
            _check_growth(path, "the features", count * width * dtype.itemsize, path.stat().st_size)
            batches = file.iter_batches(batch_size=PIECE_ROWS, columns=columns)
            rows = (_batch_rows(path, batch, columns, width, dtype) for batch in batches)
            return arrays | {features_key: spool((count, width), dtype, rows)}
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
        with h5py.File(path, "r") as file:
            arrays: Arrays = {}
            for name in dict.fromkeys([features_key, *file]):
                item = file.get(name)
                if isinstance(item, h5py.Dataset):
                    arrays[name] = _dataset(path, file, name, item)
            return arrays
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{path}: not an HDF5 file that can be read ({error}); write it again") from error


def _dataset(path: Path, file: Any, name: str, item: Any) -> np.ndarray:
    import h5py

    if item.file.filename != file.filename or item.is_virtual or item.external:
        raise ManifestError(
            f"{path}: {name!r} lies in another file, which is not followed; copy its values into this one"
        )
    if h5py.check_string_dtype(item.dtype) is not None:
        return np.array([text or "" for text in item.asstr()[...].reshape(-1).tolist()]).reshape(item.shape)
    if item.dtype.hasobject:
        raise ManifestError(f"{path}: {name!r} holds objects, which are never read; store plain numbers or text")
    _check_growth(path, repr(name), item.size * item.dtype.itemsize, item.id.get_storage_size())
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
