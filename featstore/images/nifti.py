"""NIfTI (1 and 2, .nii, .nii.gz, .hdr with .img) and MetaImage (.mha, .mhd with its data) -> slices."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from featstore.errors import ConfigError, DecodeError
from featstore.images import metaimage
from featstore.images.content import recognise
from featstore.images.part import Part
from featstore.images.volume import Volume, VolumeHeader

HEAD = 4096  # bytes of a file that hold its header, also compressed
_NIFTI_2 = 540  # bytes of the longer header


def open_nifti(data: bytes, path: Path | None) -> Volume:
    """A NIfTI file, plain or gzip, from its bytes; of a pair these are the header's, and `path` tells where it lies.

    Raises:
        DecodeError: damaged or truncated, more than 2 GiB, samples that are no numbers, or half of a pair.
    """
    plain = _inflate(data, limit=_NIFTI_2, whole=False) if _is_gzip(data) else data
    header, offset, single = _nifti_header(plain)
    if not single:
        data = _pair(path)
    end = offset + header.num_bytes
    if _is_gzip(data):
        data = _inflate(data, limit=end, whole=True)
    return Volume(header, header.array(data, offset))


def open_metaimage(data: bytes, path: Path | None) -> Volume:
    """A MetaImage from its bytes; data in a second file is read from the folder of `path`, and from nowhere else.

    Raises:
        DecodeError: as `open_nifti`, or a form of data that is not read.
    """
    return metaimage.open_volume(data, path)


def list_parts(path: Path) -> list[Part]:
    """Every axial slice of a volume, from the header alone.

    Raises:
        DecodeError: the header is damaged. OSError: it cannot be read.
    """
    return _header_of(path).parts()


def volume_shape(path: Path) -> tuple[int, int, int, int]:
    """(x, y, z, channels) in canonical orientation, from the header alone.

    Raises:
        DecodeError: the header is damaged. OSError: it cannot be read.
    """
    header = _header_of(path)
    return *header.canonical_shape(), header.channels


def _header_of(path: Path) -> VolumeHeader:
    with path.open("rb") as file:
        return header_from(file.read(HEAD))


def header_from(head: bytes) -> VolumeHeader:
    """The header of a volume from the first `HEAD` bytes of its file.

    Raises:
        DecodeError: it is damaged, or of another kind of file.
    """
    kind = recognise(head)
    if kind == "MetaImage":
        return metaimage.read_header(head).volume
    if kind != "NIfTI":
        raise DecodeError(f"this is a {kind} file and no volume with an orientation")
    return _nifti_header(_inflate(head, limit=_NIFTI_2, whole=False) if _is_gzip(head) else head)[0]


def _is_gzip(data: bytes) -> bool:
    return data[:2] == b"\x1f\x8b"


def _inflate(data: bytes, *, limit: int, whole: bool) -> bytes:
    """What gzip data holds: up to `limit` bytes, or, where it is wanted `whole`, exactly that many at most."""
    pieces, total = [], 0
    try:
        while data and total < limit + whole:  # members follow each other, as bgzip writes them
            stream = zlib.decompressobj(wbits=31)
            pieces.append(stream.decompress(data, limit + whole - total))
            total += len(pieces[-1])
            # The end of a member and its checksum may still lie ahead when every byte is out.
            if whole and not stream.eof and stream.decompress(stream.unconsumed_tail, 1):
                total = limit + 1
            if whole and not stream.eof and total <= limit:
                raise DecodeError("truncated gzip data")
            data = stream.unused_data
            if not data.startswith(b"\x1f\x8b"):
                break  # padding
    except zlib.error:
        raise DecodeError("damaged gzip data") from None
    if whole and total > limit:
        raise DecodeError("the gzip data holds more than the volume's header says")
    return b"".join(pieces)


@contextmanager
def _nibabel_errors() -> Iterator[None]:
    """What nibabel meets in a bad header becomes a DecodeError, without its words."""
    try:
        yield
    except (DecodeError, MemoryError, SystemError):  # the latter two say nothing of the file
        raise
    except Exception as error:  # it raises a dozen types, and one bad file must not stop a run
        raise DecodeError(f"damaged or unsupported NIfTI header ({type(error).__name__})") from None


def _nifti_header(head: bytes) -> tuple[VolumeHeader, int, bool]:
    """(what it says, where the samples start, whether they are in the same file)."""
    try:
        from nibabel.nifti1 import Nifti1Header
        from nibabel.nifti2 import Nifti2Header
    except ImportError:
        raise ConfigError("NIfTI files need nibabel: pip install 'featstore[medical]'") from None
    second = _NIFTI_2 in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
    kind: Any = Nifti2Header if second else Nifti1Header
    size = _NIFTI_2 if second else 348
    if len(head) < size:
        raise DecodeError("truncated NIfTI header")
    with _nibabel_errors():
        header = kind(head[:size], check=False)
        # The two mends that nibabel makes when it loads a file; its check would also write to the log.
        header["pixdim"][0] = 1 if header["pixdim"][0] not in (-1, 1) else header["pixdim"][0]
        header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
        slope, intercept = header.get_slope_inter()
        single = header["magic"].item()[:2] == b"n+"
        offset = int(header.get_data_offset())
        shape = [int(side) for side in header.get_data_shape()]
        volume = VolumeHeader(
            affine=np.asarray(header.get_best_affine(), np.float64),
            slope=1.0 if slope is None else float(slope),
            intercept=0.0 if intercept is None else float(intercept),
            **_layout(shape, header.get_data_dtype()),
        )
    return volume, max(offset, size + 4) if single else offset, single


def _layout(shape: list[int], dtype: np.dtype) -> dict[str, Any]:
    """Sides, channels and sample type; a fifth axis takes the place of a fourth without extent."""
    sides = [*shape, 1, 1, 1][: max(3, len(shape))]
    more = [side for side in sides[3:] if side != 1] or [1]
    if len(more) > 1:
        raise DecodeError(f"a volume has 3 axes and one of channels, this one has {len(shape)}")
    layout: dict[str, Any] = {"shape": tuple(sides[:3]), "channels": more[0], "dtype": dtype}
    if dtype.fields:  # red, green, blue and perhaps alpha, a byte each
        if more[0] != 1:
            raise DecodeError("a volume of coloured voxels has 3 axes, this one has more")
        layout |= {"channels": len(dtype.fields), "dtype": np.dtype(np.uint8), "interleaved": True, "colour": True}
    return layout


def _pair(path: Path | None) -> bytes:
    """The bytes of the .img beside a .hdr."""
    if path is None:
        raise DecodeError("the header of a NIfTI pair is read from a file of its own, beside its .img")
    stem = path.name.removesuffix(".gz").removesuffix(".hdr")
    for name in (f"{stem}.img", f"{stem}.img.gz"):
        if (path.parent / name).is_file():
            return (path.parent / name).read_bytes()
    raise DecodeError("the .img beside the header of a NIfTI pair is missing")
