"""One frame of a DICOM file, as stored: which library decodes it, and what is checked before and after.

Decoders are asked by name. `pylibjpeg-libjpeg` (GPL) is never one of them, even where it is installed.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Shaped

from featstore.errors import DecodeError
from featstore.images import raster
from featstore.images.dicom_reading import dicom_errors, import_pydicom
from featstore.images.sizes import MAX_PIXELS

NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2")
RLE = "1.2.840.10008.1.2.5"
_JPEG, _JPEG_LS, _JPEG_2000 = "JPEG", "JPEG-LS", "JPEG 2000"
BASELINE, EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
# transfer syntax -> (family, pydicom's plugins in the order they are asked); "pylibjpeg" is openjpeg for these alone
_COMPRESSED = {
    BASELINE: (_JPEG, ("pillow",)),
    EXTENDED: (_JPEG, ("pillow",)),
    "1.2.840.10008.1.2.4.57": (_JPEG, ("gdcm",)),
    "1.2.840.10008.1.2.4.70": (_JPEG, ("gdcm",)),
    "1.2.840.10008.1.2.4.80": (_JPEG_LS, ("gdcm",)),
    "1.2.840.10008.1.2.4.81": (_JPEG_LS, ("gdcm",)),
    "1.2.840.10008.1.2.4.90": (_JPEG_2000, ("pylibjpeg", "gdcm")),
    "1.2.840.10008.1.2.4.91": (_JPEG_2000, ("pylibjpeg", "gdcm")),
    "1.2.840.10008.1.2.4.201": (_JPEG_2000, ("pylibjpeg",)),
    "1.2.840.10008.1.2.4.202": (_JPEG_2000, ("pylibjpeg",)),
    "1.2.840.10008.1.2.4.203": (_JPEG_2000, ("pylibjpeg",)),
    RLE: ("RLE", ("pydicom",)),
}
_GPL_ONLY = "is read by the GPL plugin pylibjpeg-libjpeg alone, which featstore does not use"
_SAMPLES = {
    "MONOCHROME1": 1,
    "MONOCHROME2": 1,
    "PALETTE COLOR": 1,
    "RGB": 3,
    "YBR_FULL": 3,
    "YBR_FULL_422": 3,
    "YBR_ICT": 3,
    "YBR_RCT": 3,
}
_FLAT = 2  # grey levels: what takes the place of a missing end is even up to the rounding of YBR to RGB
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # of JPEG and, 0xF7, of JPEG-LS
_END, _PADDING = b"\xff\xd9", b"\0\xff "


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """The pixel data of a file and what describes it; `options` is handed to pydicom's decoder.

    `shift`: unused bits below a sample that is not compressed, as HighBit says.
    """

    data: bytes = field(repr=False)
    syntax: str
    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    shift: int = 0
    signed: bool
    num_frames: int
    photometric: str
    options: dict[str, Any] = field(repr=False)

    @property
    def is_native(self) -> bool:
        """Whether the pixels are not compressed."""
        return self.syntax in NATIVE

    @property
    def frame_bits(self) -> int:
        """Bits of one frame as decoded, or as stored where it is not compressed."""
        bits = self.rows * self.columns * self.samples * self.bits_allocated
        return bits // 3 * 2 if self.is_native and self.photometric == "YBR_FULL_422" else bits


def check_stored(stored: Stored) -> None:
    """What can be told before anything is decoded.

    Raises:
        DecodeError: sizes above `MAX_PIXELS`, kinds that are not read, pixel data shorter than its frames.
    """
    if stored.rows < 1 or stored.columns < 1:
        raise DecodeError(f"a DICOM image of {stored.rows}x{stored.columns} pixels")
    if stored.rows * stored.columns > MAX_PIXELS:
        raise DecodeError(f"{stored.rows}x{stored.columns} pixels are above the limit of {MAX_PIXELS} for one image")
    if _SAMPLES.get(stored.photometric) != stored.samples:
        raise DecodeError(
            f"this DICOM photometric interpretation with {stored.samples} samples a pixel is not read; "
            f"read are {', '.join(_SAMPLES)}"
        )
    if stored.bits_allocated not in (1, 8, 16, 32, 64) or not 1 <= stored.bits_stored <= stored.bits_allocated:
        raise DecodeError(
            f"{stored.bits_stored} bits stored in {stored.bits_allocated} allocated are not read; "
            "allocated may be 1, 8, 16, 32 or 64"
        )
    if stored.is_native:
        needed = -(-stored.frame_bits * stored.num_frames // 8)
    elif stored.syntax in _COMPRESSED:
        needed = 8 * stored.num_frames  # the head of an item
        _check_gpl(stored)
    else:
        raise DecodeError(f"the transfer syntax {_syntax_name(stored.syntax)} is not read")
    if needed > len(stored.data):
        raise DecodeError(
            f"truncated DICOM pixel data: {len(stored.data)} bytes, {stored.num_frames} frame(s) need {needed}"
        )


def _check_gpl(stored: Stored) -> None:
    family, _ = _COMPRESSED[stored.syntax]
    if stored.syntax == EXTENDED and stored.bits_stored != 8:
        raise DecodeError(f"JPEG Extended of {stored.bits_stored} bits {_GPL_ONLY}")
    if family == _JPEG_LS and stored.bits_stored in (6, 7):
        raise DecodeError(f"JPEG-LS of {stored.bits_stored} bits {_GPL_ONLY}")


def _syntax_name(syntax: str) -> str:
    from pydicom.config import IGNORE
    from pydicom.uid import UID

    known = UID(syntax, IGNORE)
    return str(known.name) if known.is_transfer_syntax and not known.is_private else "of this file"


def decode_frame(stored: Stored, frame: int) -> Shaped[np.ndarray, "H W"] | Shaped[np.ndarray, "H W 3"]:
    """One frame in the byte order of this machine: YBR as RGB, a palette's indices as they are.

    Raises:
        DecodeError: no such frame, damaged, truncated, or no decoder.
    """
    if frame >= stored.num_frames:
        raise DecodeError(f"the DICOM file has {stored.num_frames} frame(s) and no frame {frame}; they count from 0")
    import_pydicom()
    with dicom_errors("pixel data"):
        pixels = _native(stored, frame) if stored.is_native else _compressed(stored, frame)
    shape = (stored.rows, stored.columns) + ((3,) if stored.samples == 3 else ())
    if pixels.shape != shape:
        raise DecodeError(f"the decoder gave {pixels.shape} pixels, the DICOM header has {shape}")
    if stored.shift:
        pixels = _right_justified(pixels, stored)
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise DecodeError("the DICOM image has NaN or infinite values")
    return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))


def _right_justified(pixels: np.ndarray, stored: Stored) -> np.ndarray:
    """Samples moved down to bit 0, what lies above them cut off, the sign extended where there is one.

    They lie at bit 0 already, whatever HighBit says, where bits below its range are set and none above theirs.
    """
    bits = pixels.view(f"u{pixels.dtype.itemsize}")
    moved = (bits >> stored.bits_stored).any() or not (bits & (2**stored.shift - 1)).any()
    unused = stored.bits_allocated - stored.bits_stored
    above = unused - stored.shift if moved else unused
    return (pixels << above) >> unused


def _native(stored: Stored, frame: int) -> np.ndarray:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    pixels, _ = get_decoder(UID(stored.syntax)).as_array(stored.data, index=frame, **stored.options)
    return pixels


def _compressed(stored: Stored, frame: int) -> np.ndarray:
    from pydicom.encaps import get_frame
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    extended = stored.options.get("extended_offsets")
    code = get_frame(stored.data, frame, number_of_frames=stored.num_frames, extended_offsets=extended)
    family, plugins = _COMPRESSED[stored.syntax]
    _CHECKS[family](code, stored)
    decoder, tried = get_decoder(UID(stored.syntax)), []
    for plugin in plugins:
        try:
            pixels, _ = decoder.as_array(stored.data, index=frame, decoding_plugin=plugin, **stored.options)
        except (MemoryError, SystemError):
            raise
        except Exception as error:  # the next one may read it
            tried.append(f"{plugin}: {type(error).__name__}")
            continue
        if plugin == "pillow" and np.ptp(pixels[-1, -8:].astype(np.int16)) <= _FLAT:
            _check_not_cut(code)
        return pixels
    raise DecodeError(f"damaged or unsupported {family} data in a DICOM file ({', '.join(tried)})")


def _check_not_cut(code: bytes) -> None:
    """A JPEG stream cut and closed again decodes with grey in place of its end; a picture file has the same check."""
    raster.decode(code[: code.rfind(_END) + 2])


def _check_jpeg(code: bytes, stored: Stored) -> None:
    """The frame header of a JPEG or JPEG-LS stream must agree with the DICOM header, and the stream must have an end.

    A decoder fills up a stream that is cut, and reports nothing. GDCM ends the process where its JPEG library warns of
    the header, so whatever that library warns of is refused here.
    """
    at, start = 2, 0
    while code[:2] == b"\xff\xd8" and code[at : at + 1] == b"\xff" and at + 10 <= len(code):
        marker, length = code[at + 1], int.from_bytes(code[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        body = code[at + 4 : at + 2 + length]
        if marker in _FRAME_HEADERS:
            rows, columns = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            _agree(stored, rows=rows, columns=columns, samples=body[5], bits=body[0])
            start = at
        if (marker == 0xE0 and body[:5] == b"JFIF\0" and body[5:6] != b"\1") or (
            marker == 0xEE and body[:5] == b"Adobe" and body[11:12] not in (b"\0", b"\1", b"\2")
        ):
            break
        if marker == 0xDA and start:
            _check_end(code, at)
            return
        at += 2 + length
    raise DecodeError("damaged JPEG data in a DICOM file: its headers cannot be followed to the pixels")


def _check_jpeg_2000(code: bytes, stored: Stored) -> None:
    at = code.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(code) < at + 44:
        raise DecodeError("damaged JPEG 2000 data in a DICOM file: it has no size marker")
    right, lower, left, upper, tile_width, tile_height, tile_left, tile_upper = (
        int.from_bytes(code[at + 8 + 4 * n : at + 12 + 4 * n], "big") for n in range(8)
    )
    samples = int.from_bytes(code[at + 40 : at + 42], "big")
    bits = (code[at + 42] & 0x7F) + 1
    _agree(stored, rows=lower - upper, columns=right - left, samples=samples, bits=bits)
    across = -(-(right - tile_left) // max(tile_width, 1))
    down = -(-(lower - tile_upper) // max(tile_height, 1))
    if across * down * 14 > len(code):  # every tile has a start marker of 12 bytes and a data marker of 2
        raise DecodeError("damaged JPEG 2000 data in a DICOM file: more tiles than it has bytes for")
    _check_end(code, at)


def _check_rle(code: bytes, stored: Stored) -> None:
    planes = stored.samples * max(stored.bits_allocated // 8, 1)
    if int.from_bytes(code[:4], "little") != planes or len(code) < 64:
        raise DecodeError("damaged RLE data in a DICOM file: its header has another number of byte planes")
    if len(code) > 2 * stored.rows * stored.columns * planes + 64 + 2 * planes:  # no run takes more
        raise DecodeError("damaged RLE data in a DICOM file: longer than its pixels can be")


def _agree(stored: Stored, *, rows: int, columns: int, samples: int, bits: int) -> None:
    if (rows, columns, samples) != (stored.rows, stored.columns, stored.samples):
        raise DecodeError(
            f"the compressed image is {rows}x{columns} with {samples} sample(s), the DICOM header has "
            f"{stored.rows}x{stored.columns} with {stored.samples}"
        )
    if not 1 <= bits <= stored.bits_allocated and stored.bits_allocated != 1:
        raise DecodeError(f"the compressed image has {bits} bits, the DICOM header allocates {stored.bits_allocated}")


def _check_end(code: bytes, start: int) -> None:
    if not code.rstrip(_PADDING).endswith(_END) or code.rfind(_END) < start:
        raise DecodeError("truncated pixel data in a DICOM file: the compressed image has no end marker")


_CHECKS = {_JPEG: _check_jpeg, _JPEG_LS: _check_jpeg, _JPEG_2000: _check_jpeg_2000, "RLE": _check_rle}
