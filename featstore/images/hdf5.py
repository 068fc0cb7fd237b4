"""The arrays of an HDF5 file, found without following anything that leaves it."""

import io
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, BinaryIO

import numpy as np

from featstore.errors import ConfigError, DecodeError
from featstore.images.arrayfile import Array, Header, decode_errors
from featstore.images.volume import MAX_VOLUME_BYTES

_MAX_OBJECTS = 20_000
_MATLAB_OWN = ("#refs#", "#subsystem#")  # groups of MATLAB itself: contents of cells, objects


def hdf5_arrays(
    file: io.BytesIO | BinaryIO | io.BufferedReader, *, matlab: bool
) -> tuple[dict[str, Array], Callable[[], None]]:
    """(arrays by their paths, function that closes them); with `matlab` axes are turned to the order MATLAB shows.

    Raises:
        DecodeError: damaged. ConfigError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise ConfigError("HDF5 and MATLAB 7.3 files need h5py: pip install 'featstore[medical]'") from None
    with decode_errors("HDF5"):
        opened = h5py.File(file, "r")
        try:
            arrays: dict[str, Array] = {}
            _walk(opened, "", arrays, set(), matlab)
        except BaseException:
            opened.close()
            raise
    return arrays, opened.close


def _walk(group: Any, prefix: str, arrays: dict[str, Array], seen: set[Any], matlab: bool) -> None:
    import h5py

    for name in group:
        link = group.get(name, getlink=True)
        path = f"{prefix}{name}"
        if not isinstance(link, h5py.HardLink):  # by name, to another file, or to what lies anywhere in this one
            arrays[path] = Array(Header((), np.dtype(np.uint8)), _refused, outside=True)
            continue
        found = group[name]
        if len(seen) > _MAX_OBJECTS:
            raise DecodeError(f"the HDF5 file has more than {_MAX_OBJECTS} objects")
        if isinstance(found, h5py.Dataset):
            seen.add(path)
            if (array := _array(found, matlab)) is not None:
                arrays[path] = array
        elif isinstance(found, h5py.Group) and not (matlab and path in _MATLAB_OWN):
            place = h5py.h5o.get_info(found.id).addr  # a group may hold itself
            if place not in seen:
                seen.add(place)
                _walk(found, f"{path}/", arrays, seen, matlab)


def _refused() -> np.ndarray:
    raise DecodeError("the array named is a link, or its samples lie in another file")


def _array(dataset: Any, matlab: bool) -> Array | None:
    """None for what holds no numbers."""
    if dataset.shape is None or dataset.dtype.kind not in "biuf":  # text, references, records
        return None
    if matlab and bytes(dataset.attrs.get("MATLAB_class", b"")) == b"char":
        return None
    if dataset.is_virtual or dataset.external is not None:
        return Array(Header((), np.dtype(np.uint8)), _refused, outside=True)
    if dataset.chunks is not None and prod(dataset.chunks) * dataset.dtype.itemsize > MAX_VOLUME_BYTES:
        raise DecodeError("the HDF5 file has chunks above the limit of 2 GiB")
    shape = dataset.shape[::-1] if matlab else dataset.shape
    header = Header(tuple(int(side) for side in shape), dataset.dtype)
    return Array(header, partial(_load, dataset, matlab), partial(_slice, dataset, matlab))


def _load(dataset: Any, matlab: bool) -> np.ndarray:
    with decode_errors("HDF5"):
        values: np.ndarray = dataset[()]
    return values.T if matlab else values


def _slice(dataset: Any, matlab: bool, axis: int, index: int) -> np.ndarray:
    """Only this slice is read."""
    with decode_errors("HDF5"):
        at = len(dataset.shape) - 1 - axis if matlab else axis
        values: np.ndarray = dataset[(*(slice(None),) * at, index)]
    return values.T if matlab else values
