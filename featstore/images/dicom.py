"""DICOM files -> pixels at full depth, one frame at a time, in one of three readings (`dicom_mode`).

Pixel data is decoded by pydicom with gdcm, openjpeg and Pillow. Overlays and ICC profiles are not applied.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped

from featstore.errors import DecodeError
from featstore.images.decoded import Decoded, DecodeOptions
from featstore.images.dicom_frames import NATIVE, RLE, Stored, check_stored, decode_frame
from featstore.images.dicom_grey import Grey, Lut, fill_padding, read_grey, read_padding, read_palette
from featstore.images.dicom_reading import (
    DEFLATED,
    HEAD_BYTES,
    BoundedFile,
    dicom_errors,
    import_pydicom,
    integer,
    modality_named,
    numbers,
    read_elements,
    text,
)
from featstore.images.intensity import minmax
from featstore.images.part import WHOLE, Part

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_BYTE = (0.0, 255.0)


class DicomFile:
    """A DICOM file whose elements are parsed; frames are decoded one by one when they are asked for."""

    def __init__(
        self, stored: Stored, *, grey: list[Grey], palette: Lut | None, padding: tuple[int, int] | None = None
    ):
        self._stored = stored
        self._grey = grey
        self._palette = palette
        self._padding = padding

    @property
    def num_bytes(self) -> int:
        return len(self._stored.data)

    def pixels(self, part: Part, options: DecodeOptions) -> Decoded:
        if part.index is not None or part.axis is not None or part.key is not None:
            raise DecodeError("a DICOM file holds frames (frame=3), no slices along an axis and no keys")
        frame = part.frame or 0
        values = decode_frame(self._stored, frame)
        grey = self._grey[frame if len(self._grey) > 1 else 0]
        if options.dicom_mode == "raw_minmax":
            if not options.voi:  # another intensity maps the values, and the turning round comes after it
                return Decoded(values, invert=self._stored.photometric == "MONOCHROME1")
            return _raw_minmax(values, self._stored)
        if options.dicom_mode == "xrv":
            return _xrv(values, self._stored, grey)
        if self._stored.samples == 3:
            return Decoded(values, display=self._shown(None))
        if self._palette is not None:
            return Decoded(self._palette(values), display=(0.0, float(2**self._palette.bits - 1)))
        return self._standard(values, grey, voi=options.voi)

    def raw(self, frame: int) -> Shaped[np.ndarray, "H W"] | Shaped[np.ndarray, "H W 3"]:
        """Stored values; YBR as RGB, a palette's indices as they are."""
        return decode_frame(self._stored, frame)

    def close(self) -> None:
        """Nothing is held open."""

    def _standard(self, values: Shaped[np.ndarray, "H W"], grey: Grey, *, voi: bool) -> Decoded:
        """Modality step, then VOI LUT or window, then the turning round that MONOCHROME1 asks for.

        Where the file has no range to be shown in, padding takes the smallest value of the other pixels, for
        MONOCHROME1 the largest: it is black, and no end of the range that the intensity finds. Elsewhere it is left.
        """
        invert = self._stored.photometric == "MONOCHROME1"
        stored, values = values, grey.modality(values)
        if not voi or (grey.voi_lut is None and grey.window is None):
            display = self._shown(grey) if voi else None
            if display is None and self._padding is not None:
                values = fill_padding(values, stored, self._padding, high=invert)
            return Decoded(values, display=display, invert=invert)
        if grey.voi_lut is not None:
            return Decoded(grey.voi_lut(values), display=(0.0, grey.voi_lut.top), invert=invert)
        assert grey.window is not None
        if grey.window.function == "SIGMOID":
            return Decoded(grey.window(values, *_BYTE).astype(np.float32), display=_BYTE, invert=invert)
        return Decoded(values, display=grey.window.bounds, invert=invert)  # `native` maps linearly between them

    def _shown(self, grey: Grey | None) -> tuple[float, float] | None:
        """The whole range of what is stored in up to 8 bits; anything deeper has no range of its own."""
        stored = self._stored
        if grey is not None and grey.modality_lut is not None and grey.modality_lut.bits <= 8:
            return _BYTE
        if stored.bits_stored > 8 or stored.options["pixel_keyword"] != _PIXELS[0]:
            return None
        return (grey or Grey()).range(stored.bits_stored, stored.signed)


def open_dicom(data: bytes, path: Path | None) -> DicomFile:
    """Parse the bytes of a DICOM file; one without preamble or file meta information is tried too.

    Raises:
        DecodeError: no DICOM, no pixel data, no transfer syntax, a kind that is not read, or damaged.
    """
    dataset = read_elements(data)
    keyword = next((name for name in _PIXELS if name in dataset), None)
    if keyword is None:
        raise DecodeError(f"DICOM object without pixel data{modality_named(dataset)}")
    with dicom_errors("header"):
        syntax = str(getattr(dataset, "file_meta", {}).get("TransferSyntaxUID") or "")
        if not syntax:
            raise DecodeError("the DICOM file names no transfer syntax, so its pixel data cannot be read")
        floats = keyword != _PIXELS[0]
        bits = integer(dataset, "BitsAllocated")
        num_frames = _num_frames(dataset)
        samples = integer(dataset, "SamplesPerPixel")
        stored = Stored(
            data=bytes(dataset[keyword].value or b""),
            syntax=syntax,
            rows=integer(dataset, "Rows"),
            columns=integer(dataset, "Columns"),
            samples=samples,
            bits_allocated=bits,
            bits_stored=integer(dataset, "BitsStored", bits if floats else None),
            shift=0 if floats else _shift(dataset, syntax, bits),
            signed=not floats and integer(dataset, "PixelRepresentation") == 1,
            num_frames=num_frames,
            photometric=text(dataset, "PhotometricInterpretation"),
            options={},
        )
        stored.options.update(_decoder_options(stored, dataset, keyword))
    check_stored(stored)
    colour = stored.photometric not in ("MONOCHROME1", "MONOCHROME2")
    return DicomFile(
        stored,
        grey=[Grey()]
        if colour
        else read_grey(dataset, num_frames, bits=stored.bits_stored, signed=stored.signed or floats),
        palette=read_palette(dataset, stored.signed) if stored.photometric == "PALETTE COLOR" else None,
        padding=None if colour or floats else read_padding(dataset, stored.signed),
    )


def _decoder_options(stored: Stored, dataset: "Dataset", keyword: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "rows": stored.rows,
        "columns": stored.columns,
        "samples_per_pixel": stored.samples,
        "bits_allocated": stored.bits_allocated,
        "bits_stored": stored.bits_allocated if stored.shift else stored.bits_stored,  # else pydicom cuts off the top
        "pixel_representation": int(stored.signed),
        "number_of_frames": stored.num_frames,
        "photometric_interpretation": stored.photometric,
        "pixel_keyword": keyword,
        "pixel_vr": dataset[keyword].VR,
    }
    if stored.samples > 1:
        planar = integer(dataset, "PlanarConfiguration", 0)
        if planar not in (0, 1):
            raise DecodeError(f"the DICOM element PlanarConfiguration is 0 or 1, got {planar}")
        options["planar_configuration"] = planar
    if "ExtendedOffsetTable" in dataset and "ExtendedOffsetTableLengths" in dataset:
        options["extended_offsets"] = (
            dataset["ExtendedOffsetTable"].value,
            dataset["ExtendedOffsetTableLengths"].value,
        )
    return options


def _shift(dataset: "Dataset", syntax: str, allocated: int) -> int:
    """Unused bits below a sample, where they are stored as they are; a HighBit that cannot be is passed over."""
    if syntax not in (*NATIVE, RLE) or text(dataset, "PhotometricInterpretation").startswith("YBR"):
        return 0
    bits = integer(dataset, "BitsStored")
    shift = integer(dataset, "HighBit", bits - 1) + 1 - bits
    return shift if 0 < shift <= allocated - bits else 0


def _num_frames(dataset: "Dataset") -> int:
    num_frames = integer(dataset, "NumberOfFrames", 1)
    if num_frames < 0:
        raise DecodeError(f"the DICOM element NumberOfFrames is {num_frames}")
    return num_frames or 1  # 0 is written for "one" by some devices


def _raw_minmax(values: np.ndarray, stored: Stored) -> Decoded:
    """Stored values without any table or window, from their minimum to their maximum in 8 bits, then turned round.

    A palette's indices stay indices.
    """
    pixels = minmax(values).round().astype(np.uint8)
    return Decoded(255 - pixels if stored.photometric == "MONOCHROME1" else pixels, display=_BYTE)


def _xrv(values: np.ndarray, stored: Stored, grey: Grey) -> Decoded:
    """Modality step and first window as torchxrayvision reads VinDr-CXR, with its quirks, scaled to 0..255.

    The window's output spans the range of the stored bits. If nothing reaches 256, the bits count as 8, whatever the
    header says. MONOCHROME1 is turned round as 2^bits - x, one more than the largest value, and 2^bits is what becomes
    255, so white of MONOCHROME2 stays just below it.

    Source: torchxrayvision (Cohen et al. 2022), datasets.py, the reader of VinBrain's DICOM files.
    """
    if stored.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DecodeError("dicom_mode xrv reads MONOCHROME1 and MONOCHROME2 alone")
    pixels = grey.modality(values).astype(np.float64)
    if grey.window is not None:
        pixels = grey.window(pixels, *grey.range(stored.bits_stored, stored.signed))
    bits = 8 if pixels.max() < 256 else stored.bits_stored
    if stored.photometric == "MONOCHROME1":
        pixels = 2.0**bits - pixels
    if pixels.max() > 2.0**bits:
        raise DecodeError(f"dicom_mode xrv refuses values above 2^{bits}, as torchxrayvision does")
    return Decoded((pixels * (255 / 2.0**bits)).astype(np.float32), display=_BYTE)


def raw_frame(data: bytes, frame: int) -> Shaped[np.ndarray, "H W"] | Shaped[np.ndarray, "H W 3"]:
    """Stored values of one frame: YBR as RGB, a palette's indices as they are, in the byte order of this machine.

    Raises:
        DecodeError: as `open_dicom`, or no such frame.
    """
    return open_dicom(data, None).raw(frame)


def list_parts(path: Path) -> list[Part]:
    """Every frame of a file, from its header alone; `[WHOLE]` where it has one.

    Raises:
        DecodeError: no DICOM, or one without an image.
    """
    import_pydicom()
    with BoundedFile(path) as file:
        size = path.stat().st_size
        deflated = DEFLATED in file.read(HEAD_BYTES)
        file.seek(0)
        dataset = read_elements(file.read() if deflated else file, header_only=True)
    with dicom_errors("header"):
        if not numbers(dataset, "Rows") or not numbers(dataset, "Columns"):
            raise DecodeError(f"DICOM object without pixel data{modality_named(dataset)}")
        num_frames = _num_frames(dataset)
    if num_frames > 8 * size:
        raise DecodeError(f"truncated DICOM pixel data: {size} bytes cannot hold {num_frames} frames")
    return [WHOLE] if num_frames == 1 else [Part(frame=frame) for frame in range(num_frames)]
