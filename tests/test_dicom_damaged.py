"""DICOM files that cannot be read: a clear reason, never a wrong image, and no trace in warnings or logs."""

import contextlib
import io
import logging
import struct
import sys
import threading
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import (
    CT,
    LOSSLESS,
    dataset,
    encode,
    parsed,
    patched,
    phantom,
    read,
    saved,
    with_palette,
)
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
)

from featstore.errors import ConfigError, DecodeError
from featstore.images import dicom_frames, dicom_reading
from featstore.images.decoded import DecodeOptions
from featstore.images.dicom import list_parts, open_dicom, raw_frame
from featstore.images.opening import decode_bytes, open_bytes
from featstore.images.part import Part

VALUES = DecodeOptions(voi=False)


@pytest.mark.parametrize("syntax", [*LOSSLESS, JPEGBaseline8Bit], ids=lambda uid: UID(uid).name)
def test_a_file_cut_anywhere_fails_or_gives_the_whole_image(syntax: str) -> None:
    bits = 8 if syntax == JPEGBaseline8Bit else 12
    data = encode(dataset(phantom(bits=bits), bits=bits), syntax)
    whole = raw_frame(data, 0)
    failed = 0
    for end in [*range(0, len(data), 7), len(data) - 1, len(data) - 2]:
        try:
            found = raw_frame(data[:end], 0)
        except DecodeError:
            failed += 1
        else:
            np.testing.assert_array_equal(found, whole)
    assert failed >= len(data) // 7 - 8


@pytest.mark.parametrize(
    "syntax", [JPEGBaseline8Bit, JPEGLossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: UID(uid).name
)
def test_a_compressed_image_without_its_end_marker_is_refused(syntax: str) -> None:
    data = encode(dataset(phantom(bits=8)), syntax)
    at = data.rindex(b"\xff\xd9")
    with pytest.raises(DecodeError, match="truncated pixel data in a DICOM file: the compressed image has no end mark"):
        raw_frame(data[:at] + b"\0\0" + data[at + 2 :], 0)


def test_a_baseline_jpeg_cut_and_closed_again_is_refused() -> None:
    data = encode(dataset(phantom(bits=8)), JPEGBaseline8Bit)
    at, scan = data.rindex(b"\xff\xd9"), data.rindex(b"\xff\xda")
    cut = (scan + at) // 2
    with pytest.raises(DecodeError, match="truncated JPEG data: the end of the image is missing"):
        raw_frame(data[:cut] + b"\xff\xd9" + bytes(at - cut) + data[at + 2 :], 0)


def test_other_sizes_in_the_compressed_image_are_refused() -> None:
    for syntax in (JPEGLossless, JPEGLSLossless, JPEG2000Lossless, JPEGBaseline8Bit):
        pixels = phantom(bits=8)
        data = encode(dataset(pixels), syntax)
        made = pydicom.dcmread(io.BytesIO(data))
        made.Rows = 41
        with pytest.raises(
            DecodeError, match=r"the compressed image is 40x36 with 1 sample.s., the DICOM header has 41x36"
        ):
            raw_frame(saved(made), 0)
        made.Rows, made.SamplesPerPixel, made.PhotometricInterpretation = 40, 3, "RGB"
        with pytest.raises(DecodeError, match=r"with 1 sample.s., the DICOM header has 40x36 with 3"):
            raw_frame(saved(made), 0)


def test_more_bits_in_the_compressed_image_than_allocated_are_refused() -> None:
    made = parsed(encode(dataset(phantom(), bits=12), JPEG2000Lossless))
    made.BitsAllocated, made.BitsStored, made.HighBit = 8, 8, 7
    with pytest.raises(DecodeError, match="the compressed image has 12 bits, the DICOM header allocates 8"):
        raw_frame(saved(made), 0)


@pytest.mark.parametrize(
    ("syntax", "old", "new", "match"),
    [
        # a JFIF version and lost bytes between segments, at both of which GDCM would end the process
        (
            JPEGLossless,
            b"\xff\xd8",
            b"\xff\xd8\xff\xe0\0\x10JFIF\0\2\1\0\0\1\0\1\0\0",
            "cannot be followed to the pixels",
        ),
        (JPEGLossless, b"\xff\xc4", b"\0\0\xff\xc4", "its headers cannot be followed to the pixels"),
        (JPEGLossless, b"\xff\xc3", b"\xff\xee", "its headers cannot be followed to the pixels"),
        (JPEG2000Lossless, b"\xff\x4f\xff\x51", b"\xff\x4f\xff\x50", "it has no size marker"),
    ],
)
def test_damaged_headers_of_compressed_images(syntax: str, old: bytes, new: bytes, match: str) -> None:
    from pydicom.encaps import encapsulate, get_frame

    made = parsed(encode(dataset(phantom(), bits=12), syntax))
    code = get_frame(made.PixelData, 0, number_of_frames=1)
    made.PixelData = encapsulate([code.replace(old, new, 1)])
    with pytest.raises(DecodeError, match=match):
        raw_frame(saved(made), 0)


def test_a_jpeg_2000_image_of_countless_tiles_is_refused() -> None:
    data = bytearray(encode(dataset(phantom(), bits=12), JPEG2000Lossless))
    at = data.index(b"\xff\x4f\xff\x51") + 24
    data[at : at + 8] = b"\0\0\0\1" * 2  # tiles of one pixel
    with pytest.raises(DecodeError, match="more tiles than it has bytes for"):
        raw_frame(bytes(data), 0)


def test_rle_with_other_byte_planes_or_too_long_is_refused() -> None:
    made = parsed(encode(dataset(phantom(), bits=12), RLELossless))
    made.BitsAllocated = 8
    made.BitsStored, made.HighBit = 8, 7
    with pytest.raises(DecodeError, match="its header has another number of byte planes"):
        raw_frame(saved(made), 0)
    from pydicom.encaps import encapsulate, get_frame

    made = parsed(encode(dataset(phantom(), bits=12), RLELossless))
    made.PixelData = encapsulate([get_frame(made.PixelData, 0, number_of_frames=1) + bytes(20000)])
    with pytest.raises(DecodeError, match="damaged RLE data in a DICOM file: longer than its pixels can be"):
        raw_frame(saved(made), 0)
    made.PixelData = encapsulate([b"\2" + bytes(63)])
    with pytest.raises(DecodeError, match=r"damaged or unsupported RLE data in a DICOM file .pydicom: "):
        raw_frame(saved(made), 0)


@pytest.mark.parametrize(
    ("elements", "match"),
    [
        ({"Rows": 40000, "Columns": 40000}, "40000x40000 pixels are above the limit of 268435456 for one image"),
        ({"Rows": 0}, "a DICOM image of 0x36 pixels"),
        ({"NumberOfFrames": 1000}, r"truncated DICOM pixel data: 2880 bytes, 1000 frame\(s\) need 2880000"),
        ({"NumberOfFrames": -1}, "the DICOM element NumberOfFrames is -1"),
        ({"SamplesPerPixel": 2}, "photometric interpretation with 2 samples a pixel is not read; read are MONOCHROME1"),
        ({"PhotometricInterpretation": "CMYK"}, "photometric interpretation with 1 samples a pixel is not read"),
        ({"BitsAllocated": 12}, "12 bits stored in 12 allocated are not read; allocated may be 1, 8, 16, 32 or 64"),
        ({"BitsStored": 17}, "17 bits stored in 16 allocated are not read"),
    ],
)
def test_headers_that_cannot_be_are_refused(elements: dict[str, Any], match: str) -> None:
    with pytest.raises(DecodeError, match=match):
        raw_frame(encode(dataset(phantom(), bits=12, **elements)), 0)


def test_missing_and_odd_elements_are_named() -> None:
    made = dataset(phantom(), bits=12)
    del made.Columns
    with pytest.raises(DecodeError, match=r"^the DICOM element Columns is missing$"):
        raw_frame(encode(made), 0)
    with pytest.raises(DecodeError, match=r"^the DICOM element NumberOfFrames is no whole number$"):
        raw_frame(patched(dataset(phantom(), bits=12), "NumberOfFrames", b"1.5"), 0)
    colour = dataset(np.zeros((2, 2, 3), np.uint8))
    colour.PlanarConfiguration = 7
    with pytest.raises(DecodeError, match="the DICOM element PlanarConfiguration is 0 or 1, got 7"):
        raw_frame(encode(colour), 0)


def test_objects_without_pixels_are_named_by_modality_and_never_by_patient(tmp_path: Path) -> None:
    made = dataset(phantom(), Modality="RTPLAN")
    for keyword in ("PixelData", "Rows", "Columns"):
        delattr(made, keyword)
    (tmp_path / "a.dcm").write_bytes(encode(made))
    with pytest.raises(DecodeError, match=r"^DICOM object without pixel data \(RTPLAN\)$"):
        open_dicom(encode(made), None)
    with pytest.raises(DecodeError, match=r"^DICOM object without pixel data \(RTPLAN\)$"):
        list_parts(tmp_path / "a.dcm")
    made.Modality = "DOE"
    with pytest.raises(DecodeError, match=r"^DICOM object without pixel data$"):
        open_dicom(encode(made), None)


def test_a_file_without_preamble_or_meta_information_is_tried() -> None:
    data = encode(dataset(phantom(), bits=12))
    np.testing.assert_array_equal(decode_bytes(data[132:], DecodeOptions()).pixels, phantom())
    bare = data[data.index(b"\x08\0\x16\0") :]
    with pytest.raises(DecodeError, match="names no transfer syntax, so its pixel data cannot be read"):
        open_bytes(bare)


@pytest.mark.parametrize("data", [b"", b"plain text, and no more than that" * 20, b"\x89PNG\r\n\x1a\n" + bytes(300)])
def test_what_is_no_dicom_does_not_pass_as_one(data: bytes) -> None:
    with pytest.raises(DecodeError, match=r"^not a DICOM file$|damaged, truncated or unsupported DICOM header"):
        open_dicom(data, None)


def test_a_header_that_ends_early_is_truncated() -> None:
    data = encode(dataset(phantom()))
    with pytest.raises(DecodeError, match="truncated DICOM data: the file ends within its header"):
        open_dicom(data[: data.index(b"\x08\0\x16\0")], None)


@pytest.mark.parametrize(
    ("syntax", "match"),
    [
        ("1.2.840.10008.1.2.4.53", "the transfer syntax JPEG Spectral Selection.* is not read"),
        ("1.2.3.4", "the transfer syntax of this file is not read"),
    ],
)
def test_unknown_transfer_syntaxes_are_refused(syntax: str, match: str) -> None:
    data = encode(dataset(phantom()))
    old = ExplicitVRLittleEndian.encode() + b"\0"
    new = syntax.encode() + b"\0" * (len(syntax) % 2)
    data = data.replace(len(old).to_bytes(2, "little") + old, len(new).to_bytes(2, "little") + new, 1)
    with pytest.raises(DecodeError, match=match):
        raw_frame(data, 0)


def test_a_deflated_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(dataset(phantom()), DeflatedExplicitVRLittleEndian)
    monkeypatch.setattr(dicom_reading, "MAX_INFLATED", 1000)
    with pytest.raises(DecodeError, match="the deflated data set holds more than 1000 bytes"):
        open_dicom(data, None)
    monkeypatch.undo()
    with pytest.raises(DecodeError, match="truncated DICOM data: the deflated data set has no end"):
        open_dicom(data[:-200], None)


def test_a_length_beyond_the_file_takes_no_memory(tmp_path: Path) -> None:
    data = encode(dataset(phantom(), bits=12, ImageComments="x" * 64))
    at = data.index(struct.pack("<HH2sH", 0x20, 0x4000, b"LT", 64))
    long = struct.pack("<HH2sHI", 0x20, 0x4000, b"OB", 0, 2**32 - 2)
    (tmp_path / "a.dcm").write_bytes(data[:at] + long + data[at + 8 :])
    tracemalloc.start()
    with contextlib.suppress(DecodeError):
        list_parts(tmp_path / "a.dcm")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def test_parts_of_a_header_with_impossible_frames_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(encode(dataset(phantom(), NumberOfFrames=10**9)))
    with pytest.raises(DecodeError, match=r"truncated DICOM pixel data: .* bytes cannot hold 1000000000 frames"):
        list_parts(tmp_path / "a.dcm")


def test_the_gpl_plugin_is_not_asked_even_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.pixels.decoders import base

    def forbidden(*_: Any) -> bytes:
        raise AssertionError("asked")

    data = {syntax: encode(dataset(phantom(bits=8)), syntax) for syntax in (JPEGBaseline8Bit, JPEGLossless)}
    for syntax in data:
        monkeypatch.setitem(base.get_decoder(UID(syntax))._available, "pylibjpeg", forbidden)
    for encoded in data.values():
        assert raw_frame(encoded, 0).shape == (40, 36)
    for other, bits in ((UID(JPEGBaseline8Bit.replace(".50", ".51")), 12), (JPEGLSLossless, 7)):
        made = parsed(encode(dataset(phantom(bits=8)), JPEGLSLossless))
        made.file_meta.TransferSyntaxUID, made.BitsStored = other, bits
        made.BitsAllocated = 16
        with pytest.raises(
            DecodeError, match=f"of {bits} bits is read by the GPL plugin pylibjpeg-libjpeg alone, whic"
        ):
            raw_frame(saved(made), 0)


def test_without_pydicom_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(dataset(phantom()))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ConfigError, match=r"DICOM files need pydicom: pip install 'featstore\[medical\]'"):
        open_dicom(data, None)


def test_warnings_and_log_lines_of_pydicom_do_not_escape(caplog: pytest.LogCaptureFixture) -> None:
    made = dataset(phantom(), bits=12)
    made.PixelData += bytes(100)
    with pytest.warns(UserWarning, match="100 bytes of excess padding"):
        parsed(encode(made)).pixel_array  # noqa: B018  it does warn
    config = {name: getattr(pydicom.config, name) for name in dir(pydicom.config) if name.islower()}
    filters = list(warnings.filters)
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        np.testing.assert_array_equal(raw_frame(encode(made), 0), phantom())
        with pytest.raises(DecodeError):
            raw_frame(encode(dataset(phantom()), JPEGLossless).replace(b"\xff\xc4", b"\xff\xc5"), 0)
    assert not caplog.records
    assert warnings.filters == filters
    assert logging.getLogger("pydicom").propagate
    assert config == {name: getattr(pydicom.config, name) for name in config}


@pytest.mark.parametrize("error", [MemoryError, SystemError])
def test_want_of_memory_and_interpreter_errors_are_no_damage(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*_: Any, **__: Any) -> None:
        raise error

    for syntax in (ExplicitVRLittleEndian, JPEG2000Lossless):
        opened = open_dicom(encode(dataset(phantom(), bits=12), syntax), None)
        with monkeypatch.context() as patch:
            patch.setattr("pydicom.pixels.decoders.base.Decoder.as_array", raising)
            with pytest.raises(error):
                opened.pixels(Part(), VALUES)


def test_threads_share_one_file() -> None:
    frames = np.stack([phantom(seed=n) for n in range(4)])
    opened = open_dicom(encode(dataset(frames, frames=4, bits=12, **CT), RLELossless), None)
    wrong: list[object] = []

    def decode() -> None:
        try:
            for n in range(12):
                found = opened.pixels(Part(frame=n % 4), VALUES).pixels
                if not np.array_equal(found, frames[n % 4].astype(np.float32) - 1024):
                    wrong.append(n)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=decode) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    opened.close()


@pytest.mark.parametrize(
    ("keyword", "text", "match"),
    [
        ("RescaleSlope", b"one", "the DICOM element RescaleSlope is no number"),
        ("RescaleSlope", b"nan", "the DICOM element RescaleSlope is not finite"),
        ("RescaleSlope", b"0", "the DICOM element RescaleSlope is 0"),
        ("RescaleSlope", b"1e300", "the rescaled DICOM values are beyond float32"),
        ("WindowCenter", b"40\\x", "the DICOM element WindowCenter is no number"),
    ],
)
def test_numbers_that_are_none(keyword: str, text: bytes, match: str) -> None:
    with pytest.raises(DecodeError, match=match):
        read(patched(dataset(phantom(), bits=12), keyword, text))


def test_palettes_and_tables_that_do_not_fit_are_refused() -> None:
    made = with_palette()
    made.GreenPaletteColorLookupTableData = b"\0" * 100
    with pytest.raises(DecodeError, match="a DICOM look-up table is shorter than its descriptor says, or damaged"):
        read(made)
    made.GreenPaletteColorLookupTableDescriptor = [50, 0, 16]
    with pytest.raises(DecodeError, match="the colours of a DICOM palette have tables of different lengths"):
        read(made)
    made.GreenPaletteColorLookupTableDescriptor = [50, 0, 40]
    with pytest.raises(DecodeError, match="a DICOM look-up table of 50 entries with 40 bits is not read"):
        read(made)
    del made.RedPaletteColorLookupTableDescriptor
    with pytest.raises(DecodeError, match=r"damaged, truncated or unsupported DICOM palette .KeyError."):
        read(made)
    with pytest.raises(DecodeError, match="this VOI LUT function is not read; read are LINEAR, LINEAR_EXACT, SIGMOID"):
        read(dataset(phantom(), WindowCenter=1, WindowWidth=2, VOILUTFunction="CUBIC"))


def test_a_decoder_that_gives_other_sizes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_frames, "_native", lambda *_: np.zeros((1, 1), np.uint16))
    with pytest.raises(DecodeError, match=r"the decoder gave \(1, 1\) pixels, the DICOM header has \(40, 36\)"):
        raw_frame(encode(dataset(phantom())), 0)
