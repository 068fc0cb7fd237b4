"""The numeric arrays of a MATLAB 5 file (versions 5 to 7).

Read here: SciPy's reader takes the sizes in a file at their word, and a damaged one can end the process.
"""

import zlib
from functools import partial
from math import prod

import numpy as np

from featstore.errors import DecodeError
from featstore.images.arrayfile import Array, Header
from featstore.images.volume import MAX_VOLUME_BYTES

# What the format (MAT-File Format, level 5) calls array classes and, below, types of stored data.
_CLASSES = dict(zip(range(6, 16), ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")))
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_FRONT = 128  # bytes before the first element
_MATRIX, _COMPRESSED = 14, 15
_LOGICAL, _COMPLEX = 0x200, 0x800


def matlab_arrays(data: bytes) -> dict[str, Array]:
    """The real numeric and logical arrays by their names; structures, cells, text and sparse arrays are passed over.

    Raises:
        DecodeError: damaged, or more than 2 GiB once inflated.
    """
    order = ">" if data[126:128] == b"MI" else "<"
    arrays: dict[str, Array] = {}
    at, total = _FRONT, 0
    while at + 8 <= len(data):
        kind, body, at = _element(memoryview(data), at, order)
        if kind == _COMPRESSED:
            plain = _inflate(bytes(body), MAX_VOLUME_BYTES - total)
            total += len(plain)
            kind, body, _ = _element(memoryview(plain), 0, order)
        if kind == _MATRIX and len(body):
            arrays |= _matrix(body, order)
    return arrays


def _element(data: memoryview, at: int, order: str) -> tuple[int, memoryview, int]:
    """(type, content, where the next one starts)."""
    if at + 8 > len(data):
        raise DecodeError("truncated MATLAB data")
    kind, size = (int(word) for word in np.frombuffer(data[at : at + 8], f"{order}u4"))
    if kind >> 16:  # a short one: its size stands in the upper half, and up to 4 bytes follow at once
        size, kind, start, end = kind >> 16, kind & 0xFFFF, at + 4, at + 8
    else:
        start = at + 8
        end = start + (size if kind == _COMPRESSED else -(-size // 8) * 8)
    if start + size > min(end, len(data)):
        raise DecodeError("truncated MATLAB data")
    return kind, data[start : start + size], end


def _inflate(packed: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(packed, limit + 1)
    except zlib.error:
        raise DecodeError("damaged MATLAB data") from None
    if len(plain) > limit:
        raise DecodeError(f"the MATLAB file holds more than the limit of {MAX_VOLUME_BYTES} bytes")
    if not stream.eof:
        raise DecodeError("truncated MATLAB data")
    return plain


def _matrix(body: memoryview, order: str) -> dict[str, Array]:
    """One array by its name, or nothing where it is of another class."""
    _, flags, at = _element(body, 0, order)
    if len(flags) != 8:
        return {}  # an object of a form that the format does not describe
    bits = int(np.frombuffer(flags, f"{order}u4")[0])
    if bits & 0xFF not in _CLASSES or bits & _COMPLEX:
        return {}
    _, sides, at = _element(body, at, order)
    _, name, at = _element(body, at, order)
    kind, samples, _ = _element(body, at, order)
    shape = tuple(int(side) for side in np.frombuffer(sides, f"{order}i4")) if len(sides) % 4 == 0 else ()
    # Numbers are often stored in a smaller type than their class.
    stored = np.dtype(order + _TYPES[kind]) if kind in _TYPES else None
    if stored is None or min(shape, default=-1) < 0 or prod(shape) * stored.itemsize != len(samples):
        raise DecodeError("damaged MATLAB data")
    dtype = np.dtype(np.bool_ if bits & _LOGICAL else _CLASSES[bits & 0xFF])
    return {bytes(name).decode("latin-1"): Array(Header(shape, dtype), partial(_load, samples, stored, shape, dtype))}


def _load(samples: memoryview, stored: np.dtype, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(samples, stored).reshape(shape, order="F").astype(dtype)
