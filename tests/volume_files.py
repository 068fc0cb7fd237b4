"""Volumes written for tests: NIfTI in any orientation, MetaImage by hand, MATLAB 7.3 as MATLAB lays it out."""

import io
import itertools
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np

SHAPE = (5, 6, 7)  # to the right, to the front, to the head


def orientations() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All 48: which anatomical axis each stored axis is, and whether it is flipped."""
    return [
        (axes, signs) for axes in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
    ]


def stored_as(anatomy: np.ndarray, axes: tuple[int, ...], signs: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(array, affine) of an array (right, front, head, ...) stored in another order of axes, some of them flipped."""
    stored = anatomy.transpose(*axes, *range(3, anatomy.ndim))
    stored = stored[tuple(slice(None, None, sign) for sign in signs)]
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for at, (axis, sign) in enumerate(zip(axes, signs)):
        affine[axis, at] = sign
        affine[axis, 3] += 0 if sign > 0 else anatomy.shape[axis] - 1
    return stored, affine


def nifti_bytes(array: np.ndarray, affine: np.ndarray | None = None, *, second: bool = False, **fields: Any) -> bytes:
    """An uncompressed .nii; `fields` are set in its header."""
    kind: Any = nib.Nifti2Image if second else nib.Nifti1Image
    image = kind(array, np.eye(4) if affine is None else affine, dtype=array.dtype)
    data = bytearray(image.to_bytes())
    header = kind.header_class(bytes(data[: 540 if second else 348]), check=False)
    for name, value in fields.items():
        header[name] = value
    data[: len(header.binaryblock)] = header.binaryblock
    return bytes(data)


def metaimage_text(shape: tuple[int, ...], kind: str, file: str, **more: str) -> bytes:
    """The header of a MetaImage."""
    lines = {"ObjectType": "Image", "NDims": str(len(shape)), "BinaryData": "True", "BinaryDataByteOrderMSB": "False"}
    lines |= {"DimSize": " ".join(map(str, shape)), "ElementType": kind, **more, "ElementDataFile": file}
    return "".join(f"{name} = {value}\n" for name, value in lines.items()).encode()


def metaimage_bytes(array: np.ndarray, *, compressed: bool = False, **more: str) -> bytes:
    """A .mha of int16 (x, y, z)."""
    samples = array.astype("<i2").tobytes(order="F")
    if compressed:
        samples = zlib.compress(samples)
        more |= {"CompressedData": "True", "CompressedDataSize": str(len(samples))}
    return metaimage_text(array.shape, "MET_SHORT", "LOCAL", **more) + samples


def hdf5_bytes(arrays: Mapping[str, Any], **options: Any) -> bytes:
    """An HDF5 file of these data sets."""
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        for name, array in arrays.items():
            opened.create_dataset(name, data=array, **options)
    return file.getvalue()


def matlab73_bytes(path: Path, arrays: Mapping[str, Any], chars: dict[str, str] | None = None) -> bytes:
    """A MATLAB 7.3 file: 512 bytes of its own, then HDF5 with the axes turned round and text as numbers."""
    with h5py.File(path, "w", userblock_size=512) as opened:
        for name, array in arrays.items():
            opened.create_dataset(name, data=array.T)
        for name, text in (chars or {}).items():
            made = opened.create_dataset(name, data=np.array([[ord(letter)] for letter in text], np.uint16))
            made.attrs["MATLAB_class"] = np.bytes_("char")
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Mon Jan  1 00:00:00 2024 HDF5 schema 1.00 .")
    return path.read_bytes()
