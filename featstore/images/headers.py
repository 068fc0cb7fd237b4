"""What a file's header says of a sample: kind, size, bits and colour; pixels are decoded only where it must be."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from featstore.errors import DecodeError
from featstore.images.content import MAGIC
from featstore.images.decoded import Decoded, DecodeOptions
from featstore.images.dicom_reading import dicom_errors, integer, read_elements, text
from featstore.images.opening import OpenFiles, open_path, recognise_head
from featstore.images.part import Part
from featstore.inputs import Inputs

_PILLOW = {"PNM": "PPM", "WebP": "WEBP"}  # where Pillow's name is not ours
_COLOURS = {
    "1": "grey", "L": "grey", "LA": "grey with alpha", "I": "grey", "F": "grey", "P": "palette", "PA": "palette",
    "RGB": "RGB", "RGBA": "RGB with alpha", "CMYK": "CMYK", "YCbCr": "YCbCr",
}  # fmt: skip
_BITS = {"1": 1, "I": 32, "F": 32}
_PLANES = {"axial": (1, 0), "coronal": (2, 0), "sagittal": (2, 1)}  # (rows, columns) as axes x, y, z


@dataclass(frozen=True, slots=True)
class Header:
    """Height and width in pixels as stored, bits of one sample of one channel, and the colours of one picture."""

    kind: str
    height: int
    width: int
    bits: int
    photometric: str
    compression: str = ""


def read_header(inputs: Inputs, path: str, part: Part, opened: OpenFiles) -> Header:
    """The header behind one sample; a format without a readable one is opened and the sample decoded.

    Raises:
        DecodeError: no image, or damaged. OSError: it cannot be read.
    """
    if part.is_tile:
        return Header("slide", part.height or 0, part.width or 0, 8, "RGB")
    kind = recognise_head(inputs, path)
    if kind in MAGIC:
        return _raster(kind, inputs.read(path), part.frame or 0)
    if kind == "DICOM":
        return _dicom(inputs.read(path))
    if kind in ("NIfTI", "MetaImage"):
        return _volume(kind, inputs.local(path), part)
    _, found = opened.get(path, inputs.stat(path), lambda: open_path(inputs, path, part))
    if isinstance(found, DecodeError):
        raise found
    return _decoded(kind, found.pixels(part, DecodeOptions()))


def _raster(kind: str, data: bytes, frame: int) -> Header:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes: nothing is decoded
            image = Image.open(io.BytesIO(data), formats=(_PILLOW.get(kind, kind.upper()),))
            if frame:
                image.seek(frame)
            mode, bits, compression = image.mode, _BITS.get(image.mode, 8), ""
            if mode.startswith("I;16"):
                mode, bits = "L", 16
            if kind == "TIFF":
                bits = int(image.tag_v2.get(258, (bits,))[0])  # type: ignore[attr-defined]
                compression = str(image.info.get("compression", ""))
            return Header(kind, image.height, image.width, _png_bits(kind, data, bits), _COLOURS[mode], compression)
    except Exception as error:  # Pillow raises a dozen types, and its words may quote metadata
        raise DecodeError(f"damaged or unsupported {kind} header ({type(error).__name__})") from None


def _png_bits(kind: str, data: bytes, bits: int) -> int:
    return data[24] if kind == "PNG" else bits  # the header chunk comes first, with the bits at this place


def _dicom(data: bytes) -> Header:
    dataset = read_elements(data, header_only=True)
    with dicom_errors("header"):
        syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
        return Header(
            "DICOM",
            integer(dataset, "Rows"),
            integer(dataset, "Columns"),
            integer(dataset, "BitsStored", integer(dataset, "BitsAllocated")),
            text(dataset, "PhotometricInterpretation") or "not stated",
            str(getattr(syntax, "name", "") or ""),
        )


def _volume(kind: str, path: Path, part: Part) -> Header:
    from featstore.images.nifti import volume_shape

    shape = volume_shape(path)
    rows, columns = _PLANES.get(part.axis or "axial", _PLANES["axial"])
    bits = 0  # not told
    if kind == "NIfTI":
        import nibabel

        bits = 8 * int(nibabel.load(path).get_data_dtype().itemsize)  # type: ignore[attr-defined]
    return Header(kind, shape[rows], shape[columns], bits, "grey" if shape[3] == 1 else f"{shape[3]} channels")


def _decoded(kind: str, decoded: Decoded) -> Header:
    pixels = decoded.pixels
    colour = "grey" if pixels.ndim == 2 else "RGB"
    return Header(kind, pixels.shape[0], pixels.shape[1], 8 * pixels.dtype.itemsize, colour)
