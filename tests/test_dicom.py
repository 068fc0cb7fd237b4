"""DICOM reading against pydicom's own pipeline and closed forms, for files written here."""

import itertools
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pydicom
import pytest
from dicom_files import (
    CT,
    LOSSLESS,
    NATIVE,
    dataset,
    encode,
    lut_item,
    parsed,
    patched,
    phantom,
    read,
    saved,
    with_palette,
    with_tables,
)
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut, apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    RLELossless,
)

from featstore.configs import DicomMode
from featstore.errors import DecodeError
from featstore.images.decoded import DecodeOptions
from featstore.images.dicom import list_parts, open_dicom, raw_frame
from featstore.images.intensity import to_byte_range
from featstore.images.opening import open_bytes
from featstore.images.part import WHOLE, Part

VALUES = DecodeOptions(voi=False)


def shown(made: pydicom.FileDataset | bytes) -> np.ndarray:
    """What `native` shows, in [0, 255]."""
    return to_byte_range(read(made), "native")


# --- pixels as stored


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda uid: UID(uid).name)
def test_every_lossless_syntax_gives_the_pixels_that_were_written(syntax: str, bits: int, signed: bool) -> None:
    if signed and bits == 8:
        pytest.skip("8 bits are written unsigned")
    pixels = phantom(bits=bits, signed=signed)
    found = raw_frame(encode(dataset(pixels, bits=bits), syntax), 0)
    assert found.dtype == pixels.dtype
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda uid: UID(uid).name)
def test_colour_of_every_lossless_syntax(syntax: str) -> None:
    colour = np.stack([phantom(bits=8, seed=n) for n in range(3)], axis=-1)
    np.testing.assert_array_equal(raw_frame(encode(dataset(colour), syntax), 0), colour)


def test_baseline_jpeg_is_close_to_what_was_written() -> None:
    smooth = np.add.outer(np.arange(40), np.arange(48)).astype(np.uint8) * 2
    found = raw_frame(encode(dataset(smooth), JPEGBaseline8Bit), 0)
    assert abs(found.astype(int) - smooth).max() <= 4


def test_planar_colour_is_gathered_by_pixel() -> None:
    colour = np.stack([phantom(bits=8, seed=n) for n in range(3)], axis=-1)
    made = dataset(colour)
    made.PlanarConfiguration = 1
    made.PixelData = colour.transpose(2, 0, 1).tobytes()
    np.testing.assert_array_equal(raw_frame(encode(made), 0), colour)


def test_ybr_becomes_rgb() -> None:
    made = dataset(np.full((2, 2, 3), (76, 85, 255), np.uint8), PhotometricInterpretation="YBR_FULL")
    assert abs(read(made).pixels.astype(int) - (254, 0, 0)).max() <= 1  # pure red, by ITU-R BT.601


def test_one_bit_images_are_shown_black_and_white() -> None:
    bits = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1]], np.uint8)
    made = dataset(bits)
    made.BitsAllocated, made.BitsStored, made.HighBit = 1, 1, 0
    made.PixelData = np.packbits(bits.ravel(), bitorder="little").tobytes()
    np.testing.assert_array_equal(shown(made), bits * 255.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_pixel_data(dtype: type) -> None:
    values: np.ndarray = np.linspace(-2.5, 7.25, 12, dtype=dtype).reshape(3, 4)
    found = read(dataset(values))
    np.testing.assert_array_equal(found.pixels, values)
    assert found.display is None


def test_float_pixel_data_with_nan_is_refused() -> None:
    with pytest.raises(DecodeError, match="the DICOM image has NaN or infinite values"):
        read(dataset(np.array([[1, np.nan]], np.float32)))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_frames_are_decoded_one_by_one(syntax: str, tmp_path: Path) -> None:
    frames = np.stack([phantom(seed=n) for n in range(3)])
    data = encode(dataset(frames, frames=3), syntax)
    (tmp_path / "a.dcm").write_bytes(data)
    parts = list_parts(tmp_path / "a.dcm")
    assert parts == [Part(frame=0), Part(frame=1), Part(frame=2)]
    opened = open_bytes(data)
    for part, frame in zip(parts, frames, strict=True):
        np.testing.assert_array_equal(opened.pixels(part, VALUES).pixels, frame)
    np.testing.assert_array_equal(opened.pixels(WHOLE, VALUES).pixels, frames[0])
    with pytest.raises(DecodeError, match=r"the DICOM file has 3 frame\(s\) and no frame 3; they count from 0"):
        opened.pixels(Part(frame=3), VALUES)
    with pytest.raises(DecodeError, match=r"a DICOM file holds frames .frame=3., no slices along an axis and no keys"):
        opened.pixels(Part(axis="axial", index=0), VALUES)


def test_memory_of_a_frame_does_not_grow_with_the_number_of_frames() -> None:
    import tracemalloc

    opened = open_dicom(encode(dataset(np.zeros((64, 256, 256), np.uint16), frames=64)), None)
    tracemalloc.start()
    opened.pixels(Part(frame=5), VALUES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 256 * 256 * 2  # all of them are 64 such frames
    assert opened.num_bytes == 64 * 256 * 256 * 2


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, JPEGLossless])
def test_a_file_of_one_frame_is_one_part(syntax: str, tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(encode(dataset(phantom()), syntax))
    assert list_parts(tmp_path / "a.dcm") == [WHOLE]


# --- standard


def test_standard_window_of_a_ct_equals_pydicom() -> None:
    made = dataset(phantom(), bits=12, **CT)
    truth = apply_windowing(apply_modality_lut(made.pixel_array, made), made)
    low, high = -1024, 4095 - 1024  # pydicom maps onto what 12 bits become by the rescaling
    np.testing.assert_allclose(shown(made), (truth - low) / (high - low) * 255, atol=1e-3)


def test_standard_without_voi_gives_hounsfield_units() -> None:
    made = dataset(phantom(), bits=12, **CT)
    found = read(made, VALUES)
    np.testing.assert_array_equal(found.pixels, phantom().astype(np.float64) - 1024)
    assert found.display is None
    assert not found.invert


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(900, 700), (2000.5, 1), (-50, 4096.5), (5000, 20)])
def test_standard_window_functions_equal_pydicom(function: str, center: float, width: float) -> None:
    made = dataset(phantom(), bits=12, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        truth = apply_windowing(made.pixel_array, made) / 4095 * 255
    np.testing.assert_allclose(shown(made), truth, atol=1e-3)


def test_standard_takes_the_first_of_several_windows() -> None:
    made = dataset(phantom(), bits=12, WindowCenter=[900, 50], WindowWidth=[700, 10])
    assert read(made).display == (900 - 0.5 - 699 / 2, 900 - 0.5 + 699 / 2)


def test_standard_order_is_modality_then_voi_then_invert() -> None:
    made = with_tables()  # MONOCHROME1 with both tables
    truth = apply_voi_lut(apply_modality_lut(made.pixel_array, made), made)
    found = read(made)
    np.testing.assert_array_equal(found.pixels, truth)
    assert found.display == (0, 4095)
    assert found.invert
    np.testing.assert_allclose(shown(made), 255 - truth / 4095 * 255, atol=1e-3)


def test_standard_voi_lut_goes_before_a_window() -> None:
    made = with_tables()
    plain = read(made).pixels
    made.WindowCenter, made.WindowWidth = 40, 400
    np.testing.assert_array_equal(read(made).pixels, plain)


def test_standard_table_that_starts_below_zero() -> None:
    pixels = np.array([[-30, -20, -19], [0, 5, 30]], np.int16)
    made = dataset(pixels, VOILUTSequence=lut_item([10, 11, 12, 200], first=-20, bits=8))
    assert read(made).pixels.tolist() == [[10, 10, 11], [200, 200, 200]]
    assert read(made).display == (0, 255)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("first", [-1024, 64512])
def test_voi_lut_of_hounsfield_units_may_start_below_zero(syntax: str, first: int) -> None:
    pixels = phantom()
    made = dataset(pixels, bits=12, RescaleSlope=1, RescaleIntercept=-1024)
    made.VOILUTSequence = lut_item([n // 16 for n in range(4096)], first=first, bits=8)
    np.testing.assert_array_equal(read(encode(made, syntax)).pixels, pixels // 16)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("first", [-2048, 63488])
@pytest.mark.parametrize("keyword", ["VOILUTSequence", "ModalityLUTSequence"])
def test_tables_of_signed_pixels_may_start_below_zero(syntax: str, first: int, keyword: str) -> None:
    pixels = phantom(signed=True)
    made = dataset(pixels, bits=12)
    setattr(made, keyword, lut_item([n // 16 for n in range(4096)], first=first, bits=8))
    np.testing.assert_array_equal(read(encode(made, syntax)).pixels, (pixels.astype(int) + 2048) // 16)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_tables_of_unsigned_pixels_may_start_above_half_of_16_bits(syntax: str) -> None:
    pixels = np.array([[39_000, 40_001, 65_535]], np.uint16)
    for keyword in ("VOILUTSequence", "ModalityLUTSequence"):
        made = dataset(pixels)
        setattr(made, keyword, lut_item([5, 6, 7], first=40_000, bits=8))
        assert read(encode(made, syntax)).pixels.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize(
    ("bits", "most", "top"), [(16, 4095, 4095), (16, 65535, 65535), (12, 4095, 4095), (16, 100, 255), (8, 100, 255)]
)
def test_voi_lut_is_shown_over_the_bits_that_its_entries_use(bits: int, most: int, top: int) -> None:
    pixels = np.array([[0, 1]], np.uint16)
    found = read(dataset(pixels, bits=12, VOILUTSequence=lut_item([0, most], first=0, bits=bits)))
    assert found.pixels.tolist() == [[0, most]]
    assert found.display == (0, top)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless], ids=lambda uid: UID(uid).name)
@pytest.mark.parametrize("high", [11, 13, 15])
def test_high_bit_says_where_the_samples_lie(high: int, syntax: str, signed: bool) -> None:
    pixels = phantom(signed=signed)
    shifted = (pixels.view(np.uint16) << (high - 11)).view(pixels.dtype)
    made = dataset(shifted, bits=12)
    if syntax == RLELossless:  # the encoder refuses what does not fit into 12 bits at 0
        made.BitsStored, made.HighBit = 16, 15
        made = parsed(encode(made, syntax))
    else:
        made = parsed(encode(made, syntax))
    made.BitsStored, made.HighBit = 12, high
    np.testing.assert_array_equal(raw_frame(saved(made), 0), pixels)


def test_bits_around_left_justified_samples_are_cut_off() -> None:
    pixels = phantom(bits=12)
    noise = np.random.default_rng(7).integers(0, 4, pixels.shape).astype(np.uint16)
    made = dataset((pixels << 2) | noise | (noise << 14), bits=12, HighBit=13)
    np.testing.assert_array_equal(raw_frame(encode(made), 0), pixels)


@pytest.mark.parametrize("high", [0, 7, 15, 16, 40])
def test_a_high_bit_that_cannot_be_is_passed_over(high: int) -> None:
    """15 could be, but the samples lie at bit 0: they set bits that would not be theirs."""
    np.testing.assert_array_equal(raw_frame(saved(dataset(phantom(), bits=12, HighBit=high)), 0), phantom())


def padded_ct(**elements: Any) -> tuple[pydicom.FileDataset, np.ndarray, np.ndarray]:
    """(file, stored values without padding, where it is): a round field of view, -2000 outside of it."""
    pixels = phantom(bits=12, signed=True)
    y, x = np.mgrid[:40, :36]
    outside = (y - 20) ** 2 + (x - 18) ** 2 > 17**2
    stored = np.where(outside, np.int16(-3000), pixels)
    return dataset(stored, RescaleSlope=2, RescaleIntercept=-7, **elements), pixels, outside


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    "elements",
    [
        {"PixelPaddingValue": -3000},
        {"PixelPaddingValue": -2990, "PixelPaddingRangeLimit": -3100},
        {"PixelPaddingValue": -3100, "PixelPaddingRangeLimit": -2990},
    ],
)
def test_padding_is_no_end_of_the_range_of_an_image(elements: dict[str, int], photometric: str) -> None:
    made, pixels, outside = padded_ct(PhotometricInterpretation=photometric, **elements)
    inside = pixels[~outside] * 2.0 - 7
    truth = (inside - inside.min()) / np.ptp(inside) * 255
    for found in (
        shown(made),
        to_byte_range(read(made, VALUES), "minmax"),
        to_byte_range(read(made, VALUES), "native"),
    ):
        turned = 255 - truth if photometric == "MONOCHROME1" else truth
        np.testing.assert_allclose(found[~outside], turned, atol=1e-3)
        np.testing.assert_array_equal(found[outside], 0)  # black
    np.testing.assert_array_equal(raw_frame(encode(made), 0)[outside], -3000)


def test_padding_written_without_the_sign_of_the_pixels() -> None:
    made, pixels, outside = padded_ct()
    made.add_new("PixelPaddingValue", "US", 2**16 - 3000)
    assert read(made, VALUES).pixels[outside].tolist() == [pixels[~outside].min() * 2 - 7] * outside.sum()
    unsigned = dataset(np.array([[65000, 3, 9]], np.uint16))
    unsigned.add_new("PixelPaddingValue", "SS", 65000 - 2**16)
    assert read(unsigned, VALUES).pixels.tolist() == [[3, 3, 9]]
    assert read(unsigned, VALUES).pixels.dtype == np.uint16


def test_padding_is_left_where_a_window_cuts_it_off_or_nothing_else_is_there() -> None:
    made, _, outside = padded_ct(PixelPaddingValue=-3000, WindowCenter=40, WindowWidth=400)
    assert (read(made).pixels[outside] == -6007).all()
    assert (shown(made)[outside] == 0).all()
    flat = dataset(np.full((2, 2), 5, np.uint16), PixelPaddingValue=5)
    np.testing.assert_array_equal(read(flat, VALUES).pixels, 5)
    unreadable = dataset(np.array([[1, 5]], np.uint16))
    unreadable.add_new("PixelPaddingValue", "UN", b"\xff\xfe")
    np.testing.assert_array_equal(read(unreadable, VALUES).pixels, [[1, 5]])


def test_standard_keeps_eight_bits_without_a_window_as_they_are() -> None:
    pixels = phantom(bits=8)
    found = read(dataset(pixels))
    assert found.pixels.dtype == np.uint8
    assert found.display == (0, 255)
    np.testing.assert_array_equal(shown(dataset(pixels)), pixels)
    inverted = shown(dataset(pixels, PhotometricInterpretation="MONOCHROME1"))
    assert inverted.dtype == np.uint8
    np.testing.assert_array_equal(inverted, 255 - pixels)


def test_standard_deeper_than_eight_bits_without_a_window_has_no_range() -> None:
    pixels = phantom()
    assert read(dataset(pixels, bits=12)).display is None
    found = shown(dataset(pixels, bits=12))
    assert found.min() == 0
    assert found.max() == 255


@pytest.mark.parametrize("width", [0, -3, 0.5])
def test_standard_ignores_a_window_without_a_usable_width(width: float) -> None:
    assert read(dataset(phantom(), bits=12, WindowCenter=100, WindowWidth=width)).display is None


@pytest.mark.parametrize(
    ("text", "slope"),
    [(b"1", 1), (b"1.0000 ", 1), (b" 2.5e+00", 2.5), (b"+.5", 0.5), (b"1,5", 1.5), (b"2.0000000000000000000", 2)],
)
def test_rescale_slope_in_several_number_formats(text: bytes, slope: float) -> None:
    data = patched(dataset(phantom(), bits=12, RescaleIntercept=-10), "RescaleSlope", text)
    np.testing.assert_allclose(read(data, VALUES).pixels, phantom() * float(slope) - 10)


@pytest.mark.parametrize("bits", [8, 16])
def test_palette_equals_pydicom(bits: int) -> None:
    made = with_palette(bits)
    found = read(made)
    np.testing.assert_array_equal(found.pixels, apply_color_lut(made.pixel_array, made))
    assert found.display == (0, 2**bits - 1)


def test_segmented_palette_equals_pydicom() -> None:
    made = with_palette()
    segments = np.array([0, 2, 100, 300, 1, 254, 65535], "<u2").tobytes()  # two values, then a rising line
    for name in ("Red", "Green", "Blue"):
        delattr(made, f"{name}PaletteColorLookupTableData")
        setattr(made, f"Segmented{name}PaletteColorLookupTableData", segments)
    truth = apply_color_lut(made.pixel_array, made)
    assert abs(read(made).pixels.astype(int) - truth).max() <= 1
    for name in ("Red", "Green", "Blue"):
        setattr(made, f"Segmented{name}PaletteColorLookupTableData", np.array([2, 1, 0, 0], "<u2").tobytes())
    with pytest.raises(DecodeError, match="segments that refer to others, which are not read"):
        read(made)


def test_palette_of_eight_bit_colours_in_words_is_eight_bits_deep() -> None:
    made = with_palette(8)
    for name in ("Red", "Green", "Blue"):
        table = np.frombuffer(made[f"{name}PaletteColorLookupTableData"].value, np.uint8)
        setattr(made, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(made, f"{name}PaletteColorLookupTableData", table.astype("<u2").tobytes())
    found = read(made)
    assert found.pixels.dtype == np.uint8
    assert found.display == (0, 255)


def test_enhanced_objects_have_slopes_and_windows_of_their_frames() -> None:
    frames = np.stack([phantom(seed=n) for n in range(2)])
    made = dataset(frames, frames=2, bits=12)

    def group(**elements: Any) -> Dataset:
        item = Dataset()
        for name, value in elements.items():
            setattr(item, name, value)
        return item

    made.SharedFunctionalGroupsSequence = Sequence(
        [group(FrameVOILUTSequence=Sequence([group(WindowCenter=40, WindowWidth=401)]))]
    )
    slopes = (2, 3)
    made.PerFrameFunctionalGroupsSequence = Sequence(
        [
            group(PixelValueTransformationSequence=Sequence([group(RescaleSlope=slope, RescaleIntercept=-7)]))
            for slope in slopes
        ]
    )
    for frame, slope in enumerate(slopes):
        found = read(made, part=Part(frame=frame))
        np.testing.assert_array_equal(found.pixels, frames[frame] * float(slope) - 7)
        assert found.display == (40 - 0.5 - 200, 40 - 0.5 + 200)


# --- the other two readings


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_raw_minmax_takes_stored_values_and_inverts_eight_bits(photometric: str) -> None:
    pixels = phantom()
    made = dataset(pixels, bits=12, PhotometricInterpretation=photometric, **CT)
    unit = (pixels - float(pixels.min())) / float(np.ptp(pixels))
    truth = np.rint(unit * 255).astype(np.uint8)
    found = read(made, DecodeOptions(dicom_mode="raw_minmax"))
    assert found.pixels.dtype == np.uint8
    assert not found.invert
    expected = 255 - truth if photometric == "MONOCHROME1" else truth
    assert abs(found.pixels.astype(int) - expected).max() <= 1  # a tie of float32 and float64
    assert (found.pixels == expected).mean() > 0.99
    np.testing.assert_array_equal(to_byte_range(found, "native"), found.pixels)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("bits", [8, 12])
def test_xrv_equals_its_published_steps(photometric: str, bits: int) -> None:
    made = dataset(phantom(bits=bits), bits=bits, PhotometricInterpretation=photometric)
    made.WindowCenter, made.WindowWidth = 2**bits * 0.4, 2**bits * 0.5
    image = apply_windowing(apply_modality_lut(made.pixel_array, made), made)
    depth = 8 if image.max() < 256 else bits
    if photometric == "MONOCHROME1":
        image = -1 * image + 2**depth
    found = read(made, DecodeOptions(dicom_mode="xrv"))
    np.testing.assert_allclose(found.pixels, image / 2**depth * 255, atol=1e-4)
    assert found.display == (0, 255)
    assert not found.invert


def test_xrv_counts_eight_bits_where_nothing_reaches_256_and_inverts_from_256() -> None:
    made = dataset(np.array([[0, 100, 255]], np.uint16), bits=12, PhotometricInterpretation="MONOCHROME1")
    found = read(made, DecodeOptions(dicom_mode="xrv"))
    np.testing.assert_allclose(found.pixels, np.array([[256, 156, 1]]) * 255 / 256)


def test_xrv_refuses_what_torchxrayvision_refuses() -> None:
    with pytest.raises(DecodeError, match="dicom_mode xrv reads MONOCHROME1 and MONOCHROME2 alone"):
        read(with_palette(), DecodeOptions(dicom_mode="xrv"))
    with pytest.raises(DecodeError, match=r"dicom_mode xrv refuses values above 2\^12"):
        read(dataset(phantom(), bits=12, RescaleSlope=4, RescaleIntercept=0), DecodeOptions(dicom_mode="xrv"))


def test_the_three_modes_give_different_images() -> None:
    made = dataset(phantom(), bits=12, WindowCenter=2000, WindowWidth=1500, PhotometricInterpretation="MONOCHROME1")
    data = encode(made)
    modes = [
        to_byte_range(read(data, DecodeOptions(dicom_mode=mode)), "native").astype(np.float64)
        for mode in get_args(DicomMode)
    ]
    for one, other in itertools.combinations(modes, 2):
        assert abs(one - other).max() > 0.05
