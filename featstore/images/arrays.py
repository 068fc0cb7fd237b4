"""Arrays without an orientation: HDF5, MATLAB (5 to 7.3), .npy and .npz -> pictures and slices."""

import io
import re
import zipfile
from functools import partial
from pathlib import Path

import numpy as np

from featstore.errors import DecodeError
from featstore.images.arrayfile import Array, ArrayFile, Header, decode_errors, layout
from featstore.images.content import recognise
from featstore.images.hdf5 import hdf5_arrays
from featstore.images.matlab import matlab_arrays
from featstore.images.part import Part
from featstore.images.volume import MAX_VOLUME_BYTES

__all__ = ["ArrayFile", "list_parts", "open_hdf5", "open_matlab", "open_npy", "open_npz"]

HEAD = 1024
_MAX_NPY_HEADER = 2**16  # bytes
# The literal that describes a .npy array is read here: NumPy hands it to Python's own parser, which fails at random
# where several threads parse at once (Python 3.11).
_NPY_ITEMS = {
    "descr": re.compile(r"""['"]descr['"]\s*:\s*(?:['"]([<>|=]?[?A-Za-z][A-Za-z0-9]*(?:\[\w+\])?)['"]|\[)"""),
    "fortran_order": re.compile(r"""['"]fortran_order['"]\s*:\s*(True|False)"""),
    "shape": re.compile(r"""['"]shape['"]\s*:\s*\(((?:\s*[0-9]+L?\s*,)*(?:\s*[0-9]+L?)?)\s*\)"""),
}


def open_hdf5(data: bytes, path: Path | None) -> ArrayFile:
    """An HDF5 file from its bytes; slices are read when they are asked for.

    The arrays of a MATLAB 7.3 file have the axes that MATLAB shows. Nothing outside the file is followed: external
    links, external storage and virtual data sets are refused where they are named.

    Raises:
        DecodeError: damaged. ConfigError: h5py is not installed.
    """
    arrays, close = hdf5_arrays(io.BytesIO(data), matlab=data[:10] == b"MATLAB 7.3")
    return ArrayFile(arrays, close=close, held=len(data))


def open_matlab(data: bytes, path: Path | None) -> ArrayFile:
    """A MATLAB 5 file (up to v7) from its bytes.

    Raises:
        DecodeError: damaged, or more than 2 GiB once inflated.
    """
    return ArrayFile(matlab_arrays(data))


def open_npy(data: bytes, path: Path | None) -> ArrayFile:
    """A .npy file from its bytes; pickled objects are refused.

    Raises:
        DecodeError: damaged or truncated.
    """
    with decode_errors("NPY"):
        file = io.BytesIO(data)
        header = _npy_header(file)
        start = file.tell()
    return ArrayFile({"": Array(header, partial(_view, data, start, header), view=True)}, held=len(data))


def npy_header(head: bytes) -> Header:
    """Shape and sample type of a .npy file from its first bytes.

    Raises:
        DecodeError: damaged or truncated.
    """
    with decode_errors("NPY"):
        return _npy_header(io.BytesIO(head))


def open_npz(data: bytes, path: Path | None) -> ArrayFile:
    """A .npz file from its bytes; a member is inflated when it is first asked for, and kept.

    Raises:
        DecodeError: damaged.
    """
    with decode_errors("NPZ"):
        return ArrayFile(_members(io.BytesIO(data)), held=len(data))


def list_parts(path: Path) -> list[Part]:
    """Every slice along the first axis of the one array that a file holds, or the one picture that it is.

    Raises:
        DecodeError: damaged, no array that could be an image, or several: the message lists their keys.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
        kind = recognise(head)
        file.seek(0)
        if kind == "HDF5":
            arrays, close = hdf5_arrays(file, matlab=head[:10] == b"MATLAB 7.3")
            opened = ArrayFile(arrays, close=close)
        elif kind == "NPY":
            with decode_errors("NPY"):
                opened = ArrayFile({"": Array(_npy_header(file), _unread)})
        elif kind == "NPZ":
            with decode_errors("NPZ"):
                opened = ArrayFile(_members(file))
        elif kind == "MATLAB":
            opened = open_matlab(file.read(), path)
        else:
            raise DecodeError(f"this is a {kind} file and holds no arrays")
        try:
            return _parts(opened.header(None))
        finally:
            opened.close()


def _parts(header: Header) -> list[Part]:
    shape = layout(header, Part())
    pictures = [Part()] if not shape.sliced else [Part(index=index) for index in range(header.shape[0])]
    if shape.channels == 0 or shape.colour:
        return pictures
    return [Part(index=part.index, channel=str(channel)) for channel in range(shape.channels) for part in pictures]


def _npy_header(file: io.BufferedIOBase) -> Header:
    """Shape and type from the front of a .npy stream, which is left at the first sample; records count as objects."""
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise DecodeError("a .npy file of another version than 1.0, 2.0 and 3.0 is not read")
    size = int.from_bytes(file.read(2 if magic[6] == 1 else 4), "little")
    if size > _MAX_NPY_HEADER:
        raise DecodeError(f"the header of an NPY array takes {size} bytes, above the limit of {_MAX_NPY_HEADER}")
    text = file.read(size).decode("latin-1")
    found = {name: pattern.findall(text) for name, pattern in _NPY_ITEMS.items()}
    if len(text) < size or not text.strip().endswith("}") or any(len(items) != 1 for items in found.values()):
        raise DecodeError("damaged or truncated NPY data: its header does not describe an array")
    [descr], [order], [sides] = found["descr"], found["fortran_order"], found["shape"]
    shape = tuple(int(side) for side in re.findall("[0-9]+", sides))
    return Header(shape, np.dtype(descr or object), order == "True")


def _view(data: bytes, start: int, header: Header) -> np.ndarray:
    if len(data) - start < header.num_bytes:
        raise DecodeError("truncated NPY data")
    samples = np.frombuffer(data, header.dtype, count=header.num_bytes // header.dtype.itemsize, offset=start)
    return samples.reshape(header.shape, order="F" if header.fortran else "C")


def _unread() -> np.ndarray:
    raise DecodeError("only the header of this file is open")


def _members(file: io.BufferedIOBase | io.BytesIO) -> dict[str, Array]:
    archive = zipfile.ZipFile(file)
    arrays = {}
    for info in archive.infolist():
        if info.filename.endswith(".npy"):
            with archive.open(info) as stream:
                header = _npy_header(stream)  # type: ignore[arg-type]
            arrays[info.filename.removesuffix(".npy")] = Array(header, partial(_member, archive, info))
    return arrays


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with decode_errors("NPZ"), archive.open(info) as stream:
        header = _npy_header(stream)  # type: ignore[arg-type]
        if header.num_bytes > MAX_VOLUME_BYTES:
            raise DecodeError(f"the array takes {header.num_bytes} bytes, above the limit of {MAX_VOLUME_BYTES}")
        data = stream.read(header.num_bytes)  # the checksum is compared where the member ends with it
        stream.read(1)
    return _view(data, 0, header)
