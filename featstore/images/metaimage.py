"""MetaImage: a few lines of text, then samples, in the same file (.mha) or in one beside it (.mhd)."""

import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featstore.errors import DecodeError
from featstore.images.volume import Volume, VolumeHeader

_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",  # 4 bytes in MetaIO, whatever the machine
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_MAX_HEADER = 65536


@dataclass(frozen=True, slots=True)
class MetaHeader:
    """What the text says; `end` is where it ends, `file` where the samples are ("LOCAL": behind it)."""

    volume: VolumeHeader
    file: str
    end: int
    compressed: bool
    skip: int


def read_header(head: bytes) -> MetaHeader:
    """The text in front of a MetaImage.

    Raises:
        DecodeError: it is damaged, or of a form that is not read.
    """
    fields, end = _fields(head[:_MAX_HEADER])
    try:
        sides = [int(side) for side in fields["DimSize"].split()]
        count = int(fields["NDims"])
        channels, skip = int(fields.get("ElementNumberOfChannels", "1")), int(fields.get("HeaderSize", "0"))
        zooms = [float(zoom) for zoom in fields.get("ElementSpacing", " ".join(["1"] * count)).split()]
        matrix = [float(cosine) for cosine in _first(fields, "TransformMatrix", "Rotation", "Orientation").split()]
    except (KeyError, ValueError):
        raise DecodeError("damaged MetaImage header") from None
    if count not in (2, 3, 4) or len(sides) != count or fields.get("BinaryData", "True").lower() != "true":
        raise DecodeError("a MetaImage is read with 2, 3 or 4 axes of binary samples")
    if fields.get("ElementType") not in _TYPES or (count == 4 and channels != 1):
        raise DecodeError("the MetaImage has samples of a type that is not read")
    big = _first(fields, "BinaryDataByteOrderMSB", "ElementByteOrderMSB").lower() == "true"
    volume = VolumeHeader(
        shape=(sides[0], sides[1], sides[2] if count > 2 else 1),
        channels=sides[3] if count == 4 else channels,
        dtype=np.dtype((">" if big else "<") + _TYPES[fields["ElementType"]]),
        affine=_affine(matrix, zooms, count),
        interleaved=channels > 1,
        colour=channels == 3 and fields["ElementType"] == "MET_UCHAR",
    )
    return MetaHeader(volume, fields["ElementDataFile"], end, fields.get("CompressedData", "").lower() == "true", skip)


def open_volume(data: bytes, path: Path | None) -> Volume:
    """The volume of a MetaImage; see `featstore.images.nifti.open_metaimage`."""
    header = read_header(data)
    if header.file == "LOCAL":
        samples = data[header.end :]
    else:
        samples = _beside(header.file, path)
        if header.skip > 0:
            samples = samples[header.skip :]
    size = header.volume.num_bytes
    if header.compressed:
        samples = _inflate(samples, size)
    elif header.skip == -1:  # the samples end the file
        samples = samples[max(0, len(samples) - size) :]
    return Volume(header.volume, header.volume.array(samples, 0))


def _fields(head: bytes) -> tuple[dict[str, str], int]:
    fields: dict[str, str] = {}
    for match in re.finditer(rb"[ \t\r]*(\w+)[ \t]*=[ \t]*([^\n]*?)[ \t\r]*\n", head):
        fields[match[1].decode("latin-1")] = match[2].decode("latin-1")
        if match[1] == b"ElementDataFile":  # always the last one
            return fields, match.end()
    last = re.search(rb"(?m)^ElementDataFile[ \t]*=[ \t]*([^\r\n]+)\Z", head)  # a file that lacks the last line break
    if last is None:
        raise DecodeError("damaged MetaImage header")
    return fields | {"ElementDataFile": last[1].decode("latin-1").strip()}, len(head)


def _first(fields: dict[str, str], *names: str) -> str:
    return next((fields[name] for name in names if name in fields), "")


def _affine(matrix: list[float], zooms: list[float], count: int) -> np.ndarray:
    """To right, front, head: MetaImage counts millimetres to the left, the back and the head."""
    if len(matrix) not in (0, count * count) or len(zooms) != count:
        raise DecodeError("damaged MetaImage header")
    spatial = min(count, 3)
    affine = np.eye(4)
    directions = np.eye(3)  # one row for each axis of the array
    if matrix:
        directions[:spatial, :spatial] = np.reshape(matrix, (count, count))[:spatial, :spatial]
    scale = np.ones(3)
    scale[:spatial] = zooms[:spatial]
    affine[:3, :3] = (directions * scale[:, None]).T
    affine[:2] *= -1
    return affine


def _beside(name: str, path: Path | None) -> bytes:
    if path is None:
        raise DecodeError("a MetaImage whose samples are in a second file is read from a folder, not from an archive")
    if name in ("LIST", ".", "..") or "%" in name or re.search(r"[/\\\0]", name):
        raise DecodeError("the samples of a MetaImage must be in one file, in the same folder as its header")
    file = path.parent / name
    if not file.is_file() or file.resolve().parent != path.parent.resolve():
        raise DecodeError("the file of samples beside the MetaImage's header is missing")
    return file.read_bytes()


def _inflate(data: bytes, size: int) -> bytes:
    stream = zlib.decompressobj(wbits=47)  # zlib or gzip
    try:
        plain = stream.decompress(data, size + 1)
    except zlib.error:
        raise DecodeError("damaged compressed data in the MetaImage") from None
    if len(plain) > size:
        raise DecodeError("the compressed data of the MetaImage holds more than its header says")
    return plain
