"""What decoding a picture will take of memory, told from its header before anything is decoded."""

import io
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from featstore.errors import ConfigError, DecodeError
from featstore.images.content import MAGIC, recognise
from featstore.images.intensity import parse_intensity
from featstore.images.preprocess import PreprocessSpec
from featstore.images.raster import SCALED_MARGIN, open_header
from featstore.images.sizes import MAX_PIXELS

HEAD = 2**16  # bytes that hold the header of most files: a JPEG may put previews and colour profiles before its own
# Bytes of memory to a byte of a file whose header does not tell: packed volumes and arrays hold 2 to 8.
UNKNOWN = 8
FRAME = 128 * 2**20  # of a video: what takes a 4K frame in colour to the network, and the frames it refers to
# Bytes a sample (one pixel of one channel) that a step holds at its worst, on top of three copies of the pixels:
# measured as peaks of resident memory, rounded up.
PLAIN, SPREAD, LINEAR, WINDOWS, BRAIN, LATER, SPLINE = 4, 10, 25, 33, 37, 5, 12
COPIES = 3
MARGIN = 1.1
MOST = 128  # bytes a sample that no preprocessing exceeds
_PNG_CHANNELS = {0: 1, 2: 3, 3: 4, 4: 2, 6: 4}  # by colour type; a palette is looked up
_DICOM_NUMBERS = re.compile(rb"\x28\x00(\x02\x00|\x10\x00|\x11\x00|\x00\x01)(?:US\x02\x00|\x02\x00\x00\x00)(..)", re.S)
_DEFLATED_DICOM = b"1.2.840.10008.1.2.1.99"


@dataclass(frozen=True, slots=True)
class Extent:
    """One picture of a file: sides, channels and bytes of a sample as decoded, and the bytes held of the file itself.

    `volume` is the number of samples of what a slice belongs to. Without sides (0) nothing is known but the file.
    """

    height: int = 0
    width: int = 0
    channels: int = 1
    itemsize: int = 1
    held: int = 0
    volume: int = 0
    kind: str = ""

    @property
    def samples(self) -> int:
        """Of one picture; none of a picture that is refused for its size: a damaged header may claim any."""
        pixels = self.height * self.width
        return pixels * self.channels if pixels <= MAX_PIXELS else 0


def measure(file: io.BufferedIOBase | bytes, size: int) -> Extent:
    """The extent of a file of `size` bytes: of its first picture or largest slice; of bytes, the first are enough.

    One that is damaged or of no known kind takes what its bytes take: its decoder will refuse it. Where the first bytes
    do not tell, it takes `UNKNOWN` times as much.
    """
    if isinstance(file, bytes) and (quick := _quick(file, size)) is not None:
        return quick
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    head = file[:HEAD] if isinstance(file, bytes) else stream.read(HEAD)
    try:
        kind = recognise(head)
        if kind in MAGIC:
            found = _picture(kind, head, stream)
        elif kind == "video":
            return Extent(held=FRAME, kind=kind)
        else:
            found = {"DICOM": _dicom, "NIfTI": _volume, "MetaImage": _volume, "NPY": _array}.get(kind, _unknown)(
                kind, head, size
            )
    except (DecodeError, ConfigError):
        cut = isinstance(file, bytes) and len(file) < size  # a TIFF may have its header at the end
        return Extent(held=UNKNOWN * size if cut else size)
    return replace(found, held=found.held + size, kind=kind)


def at_most(extent: Extent) -> int:
    """A bound on `footprint` that costs nothing to find."""
    return int(MARGIN * (extent.held + MOST * extent.samples + 12 * extent.volume))


def footprint(extent: Extent, specs: Sequence[PreprocessSpec]) -> int:
    """Bytes that reading, decoding and preprocessing one picture take at their peak, one preprocessing after another.

    Only an upper bound is of use: what is decoded several ways is counted each time.
    """
    worst = max((_worst(extent, spec) for spec in specs), default=0)
    kept = (len({spec.decoding for spec in specs}) - 1) * extent.samples * extent.itemsize
    return int(MARGIN * (extent.held + worst + max(kept, 0)))


def _worst(extent: Extent, spec: PreprocessSpec) -> int:
    shown = extent.kind == "DICOM"  # may have a window of its own, which `native` then applies
    first, *later = parse_intensity(spec.intensity)
    deep = extent.itemsize > 1
    each = {
        "native": LINEAR if shown else SPREAD if deep else PLAIN,
        "minmax": SPREAD,
        "minmax-channels": SPREAD,
        "windows": WINDOWS,
        "brain-c": BRAIN,
    }.get(first.name, LINEAR)
    each = max([each, *((LINEAR if step.name == "percentile" else SPREAD) for step in later)]) + (LATER if later else 0)
    if deep and extent.itemsize > 2:
        each += 16  # through float64 in place of float32
    if spec.geometry == "spline" or spec.quantise == "none":
        each = max(each, SPLINE)
    over = 12 * extent.volume if first.volume else 0
    if spec.augment is not None and spec.augment.crops:
        each += 4 if deep else 1  # the crop is a copy, at most of all
    shrunk = _shrunk(extent, spec)
    return int((each + COPIES * extent.itemsize) * extent.samples / shrunk**2) + over


def _shrunk(extent: Extent, spec: PreprocessSpec) -> int:
    """By how much a JPEG is decoded smaller."""
    if spec.decode != "scaled" or extent.kind != "JPEG":
        return 1
    room = min(extent.height, extent.width) // (SCALED_MARGIN * max(spec.height, spec.width))
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(room, 1))


def _quick(data: bytes, size: int) -> Extent | None:
    """The same for the plain forms of the two kinds that most files are of, at a tenth of the time."""
    if data[128:132] == b"DICM":
        return None
    if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) >= 26:
        width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
        return Extent(height, width, _PNG_CHANNELS.get(colour, 4), 1 + (bits == 16) + (bits < 8), size, 0, "PNG")
    return _jpeg(data, size) if data.startswith(b"\xff\xd8\xff") else None


def _picture(kind: str, head: bytes, stream: io.BufferedIOBase) -> Extent:
    if (found := _quick(head, 0)) is not None:
        return found
    stream.seek(0)
    height, width, channels, itemsize = open_header(kind, stream)
    # A picture of an animation is put together with those before it, in colour.
    return Extent(height, width, 4 if kind in ("GIF", "WebP") else channels, itemsize)


def _jpeg(head: bytes, size: int) -> Extent | None:
    """By the marker of its frame; None where that lies behind the bytes given."""
    at = 2
    while head[at : at + 1] == b"\xff" and at + 10 <= len(head):
        marker = head[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, channels = struct.unpack(">BHHB", head[at + 4 : at + 10])
            # A progressive one is held as coefficients of 2 bytes while it is decoded.
            return Extent(height, width, channels, 1 if bits == 8 and marker < 0xC2 else 2, size, 0, "JPEG")
        at += 1 if marker == 0xFF else 2 + int.from_bytes(head[at + 2 : at + 4], "big")
    return None


def _dicom(kind: str, head: bytes, size: int) -> Extent:
    """By the first places where the numbers of rows and columns stand: their tags are searched, nothing is parsed."""
    found: dict[bytes, int] = {}
    for tag, value in _DICOM_NUMBERS.findall(head):
        found[tag] = max(found.get(tag, 0), int.from_bytes(value, "little"))
    rows, columns = found.get(b"\x10\0", 0), found.get(b"\x11\0", 0)
    if not rows or not columns or _DEFLATED_DICOM in head[:4096]:
        return _unknown(kind, head, size)
    colour = found.get(b"\x02\0", 1) == 3
    # Pixel data is copied out of the file; a rescale makes four bytes of two.
    return Extent(rows, columns, 3 if colour else 1, 4 if found.get(b"\0\x01", 16) > 8 else 1, held=size)


def _volume(kind: str, head: bytes, size: int) -> Extent:
    from featstore.images.nifti import header_from

    header = header_from(head)
    x, y, z = header.shape
    channels = 3 if header.colour else 1
    plane = max(x * y, y * z, x * z)
    samples = prod(header.shape) * header.channels
    itemsize = 8 if header.scaled else int(header.dtype.itemsize)
    return Extent(plane, 1, channels, itemsize, held=header.num_bytes, volume=samples)


def _array(kind: str, head: bytes, size: int) -> Extent:
    from featstore.images.arrays import npy_header

    header = npy_header(head)
    sides = sorted(header.shape)[-2:]
    return Extent(prod(sides), 1, 3, int(header.dtype.itemsize), volume=prod(header.shape))


def _unknown(kind: str, head: bytes, size: int) -> Extent:
    return Extent(held=(UNKNOWN - 1) * size, kind=kind)
