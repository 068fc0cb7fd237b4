"""Small DICOM files of every transfer syntax that is read, written in memory."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom import dcmread, dcmwrite
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import compress
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
)

from featstore.images.decoded import Decoded, DecodeOptions
from featstore.images.dicom import open_dicom
from featstore.images.part import WHOLE, Part

CT = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
LOSSLESS = (*NATIVE, RLELossless, JPEG2000Lossless, JPEGLossless, JPEGLSLossless)
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def phantom(rows: int = 40, columns: int = 36, *, bits: int = 12, signed: bool = False, seed: int = 0) -> np.ndarray:
    """A smooth image with some noise that spans most of its bits."""
    y, x = np.mgrid[:rows, :columns]
    grid = (np.sin(y / 5) + np.cos(x / 4) + 2) / 4 + np.random.default_rng(seed).uniform(-0.02, 0.02, (rows, columns))
    values = np.clip(grid, 0, 1) * (2**bits - 1) - (2 ** (bits - 1) if signed else 0)
    dtype = np.dtype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")
    pixels: np.ndarray = values.round().astype(dtype)
    return pixels


def dataset(pixels: np.ndarray, *, bits: int | None = None, frames: int = 1, **elements: Any) -> FileDataset:
    """An uncompressed object around (H, W), (H, W, 3), or with `frames` these behind one more axis."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UID(SECONDARY_CAPTURE)
    meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID, made.Modality = SECONDARY_CAPTURE, "1.2.3.4", "OT"
    made.PatientName = "Doe^Jane"
    shape = pixels.shape[1:] if frames > 1 else pixels.shape
    made.Rows, made.Columns = shape[:2]
    made.SamplesPerPixel = 3 if len(shape) == 3 else 1
    made.PhotometricInterpretation = "RGB" if len(shape) == 3 else "MONOCHROME2"
    if len(shape) == 3:
        made.PlanarConfiguration = 0
    if frames > 1:
        made.NumberOfFrames = frames
    made.BitsAllocated = 8 * pixels.dtype.itemsize
    if pixels.dtype.kind == "f":
        name = "FloatPixelData" if pixels.dtype == np.float32 else "DoubleFloatPixelData"
        setattr(made, name, pixels.tobytes())
    else:
        made.BitsStored = bits or made.BitsAllocated
        made.HighBit = made.BitsStored - 1
        made.PixelRepresentation = int(pixels.dtype.kind == "i")
        data = pixels.tobytes()
        made.PixelData = data + b"\0" * (len(data) % 2)
        made["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def encode(made: FileDataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """The bytes of a file, its pixel data turned into that transfer syntax."""
    syntax = UID(syntax)
    if syntax in (RLELossless, JPEG2000Lossless):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compress(made, syntax, generate_instance_uid=False)
    elif syntax == JPEGBaseline8Bit:
        out = io.BytesIO()
        Image.fromarray(made.pixel_array).save(out, "JPEG", quality=95)
        made.PixelData = encapsulate([out.getvalue()])
        made["PixelData"].is_undefined_length = True
        made.file_meta.TransferSyntaxUID = syntax
        if made.SamplesPerPixel == 3:
            made.PhotometricInterpretation = "YBR_FULL_422"
    elif syntax in (JPEGLossless, JPEGLSLossless):
        return _by_gdcm(encode(made), syntax)
    elif syntax == ExplicitVRBigEndian:
        made.file_meta.TransferSyntaxUID = syntax
        if made.BitsAllocated == 16:
            made.PixelData = np.frombuffer(made.PixelData, "<u2").astype(">u2").tobytes()
        out = io.BytesIO()
        dcmwrite(out, made, implicit_vr=False, little_endian=False, force_encoding=True)
        return out.getvalue()
    else:
        made.file_meta.TransferSyntaxUID = syntax
    out = io.BytesIO()
    made.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _by_gdcm(data: bytes, syntax: str) -> bytes:
    import tempfile

    import gdcm

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.dcm", Path(folder) / "b.dcm"
        source.write_bytes(data)
        reader = gdcm.ImageReader()
        reader.SetFileName(str(source))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(target))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return target.read_bytes()


def lut_item(entries: list[int], *, first: int, bits: int) -> Sequence:
    """A modality or VOI LUT sequence with one table."""
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item.LUTData = entries
    item["LUTData"].VR = "US"
    return Sequence([item])


def with_tables() -> FileDataset:
    """8-bit values with a modality and a VOI LUT."""
    made = dataset(phantom(bits=8), PhotometricInterpretation="MONOCHROME1")
    made.ModalityLUTSequence = lut_item([3 * n for n in range(200)], first=20, bits=16)
    made.ModalityLUTSequence[0].ModalityLUTType = "US"
    made.VOILUTSequence = lut_item([n * n // 64 for n in range(512)], first=40, bits=12)
    return made


def with_palette(bits: int = 16) -> FileDataset:
    """256 indices into red rising, green falling, blue constant."""
    made = dataset(phantom(bits=8), PhotometricInterpretation="PALETTE COLOR")
    dtype, top = ("<u2", 65535) if bits == 16 else ("u1", 255)
    rising = np.linspace(0, top, 256).round().astype(dtype)
    for name, table in {"Red": rising, "Green": rising[::-1], "Blue": np.full(256, top // 3, dtype)}.items():
        setattr(made, f"{name}PaletteColorLookupTableDescriptor", [256, 0, bits])
        made[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        setattr(made, f"{name}PaletteColorLookupTableData", table.tobytes())
    return made


def parsed(data: bytes) -> FileDataset:
    """The file as pydicom reads it."""
    return dcmread(io.BytesIO(data))


def saved(made: FileDataset) -> bytes:
    """The file as it is, nothing corrected."""
    out = io.BytesIO()
    made.save_as(out)
    return out.getvalue()


def patched(made: FileDataset, keyword: str, text: bytes) -> bytes:
    """The file with the text of an element written as it is, however odd."""
    tag = Tag(keyword)
    made[tag] = RawDataElement(tag, "DS", len(text), text, 0, False, True)
    return encode(made)


def read(made: FileDataset | bytes, options: DecodeOptions | None = None, part: Part = WHOLE) -> Decoded:
    """What the reader under test makes of it."""
    data = made if isinstance(made, bytes) else encode(made)
    return open_dicom(data, None).pixels(part, options or DecodeOptions())
