"""Decoding whole files: against the arrays that were written, and against Pillow."""

import base64
import gzip
import io
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from image_files import FILES, chunk, colour, encode, png, smooth, tiff
from PIL import Image, ImageOps

from featstore.errors import DecodeError
from featstore.images import decode

# Depth and colour


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF", "PPM"])
def test_grey_of_8_bits_stays_one_channel(kind: str) -> None:
    decoded = decode(encode(smooth(), kind))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, smooth())
    assert decoded.flags.writeable
    assert decoded.flags.c_contiguous


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_colour_is_red_green_blue(kind: str) -> None:
    np.testing.assert_array_equal(decode(encode(colour(), kind)), colour())


def test_jpeg_equals_pillow() -> None:
    for name in ("jpeg colour", "jpeg progressive", "webp"):
        np.testing.assert_array_equal(decode(FILES[name]), np.asarray(Image.open(io.BytesIO(FILES[name]))))
    assert decode(FILES["jpeg restart"]).shape == smooth().shape


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (3, 2), (2, 4), (4, 6)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_of_every_colour_type_keeps_its_depth(dtype: type, channels: int, colour_type: int, filtered: bool) -> None:
    generator = np.random.default_rng(0)
    samples: np.ndarray = generator.integers(0, np.iinfo(dtype).max + 1, (9, 7, channels)).astype(dtype)
    decoded = decode(png(samples, colour_type, filtered=filtered))
    assert decoded.dtype == dtype
    expected = samples[..., 0] if channels < 3 else samples[..., :3]
    np.testing.assert_array_equal(decoded, expected)


def test_12_bits_in_16_are_not_stretched() -> None:
    image = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    np.testing.assert_array_equal(decode(encode(image, "PNG")), image)
    np.testing.assert_array_equal(decode(b"P5 64 64 65535\n" + image.astype(">u2").tobytes()), image)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32])
def test_tiff_keeps_type_and_byte_order(dtype: type, order: Literal["<", ">"]) -> None:
    low, high = (-1e3, 1e3) if dtype == np.float32 else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    samples: np.ndarray = np.random.default_rng(1).uniform(low, high, (5, 6)).astype(dtype)
    decoded = decode(tiff(samples, order=order))
    assert decoded.dtype == (np.int32 if dtype == np.int16 else dtype)
    np.testing.assert_array_equal(decoded, samples)


def test_tiff_samples_that_pillow_takes_for_others() -> None:
    signed = np.array([[-128, -1, 0, 127]], np.int8)
    np.testing.assert_array_equal(decode(tiff(signed)), signed.astype(np.int32))
    unsigned = np.array([[0, 5, 2**31, 2**32 - 1]], np.uint32)
    decoded = decode(tiff(unsigned))
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, unsigned.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_is_turned_round(dtype: type) -> None:
    samples: np.ndarray = np.array([[0, 1, np.iinfo(dtype).max]], dtype)
    np.testing.assert_array_equal(decode(tiff(samples, photometric=0)), np.iinfo(dtype).max - samples)


def test_white_is_zero_without_a_white_is_refused() -> None:
    with pytest.raises(DecodeError, match="white is zero has signed or float samples"):
        decode(tiff(np.ones((3, 3), np.float32), photometric=0))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint64])
def test_tiff_of_64_bits_becomes_float32(dtype: type, order: Literal["<", ">"]) -> None:
    samples: np.ndarray = np.array([[0, 1, 1000], [77, 2**24 + 1, 2**40]], dtype)
    decoded = decode(tiff(samples, order=order))
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, samples.astype(np.float32))


@pytest.mark.parametrize("changes", [{"t259": 32946}, {"photometric": 0}, {"t322": 16}, {"drop": (279,)}])
def test_other_tiffs_of_64_bits_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DecodeError, match="unsupported TIFF data"):
        decode(tiff(np.ones((3, 3)), **changes))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_in_tiff(channels: int, order: Literal["<", ">"]) -> None:
    samples = np.random.default_rng(2).integers(0, 65536, (6, 5, channels)).astype(np.uint16)
    extra: dict[str, Any] = {"t338": 2} if channels == 4 else {}
    decoded = decode(tiff(samples, photometric=2, order=order, **extra))
    np.testing.assert_array_equal(decoded, samples[..., :3])


def test_16_bit_colour_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(DecodeError, match="16-bit samples as RGB in PNM are not read"):
        decode(b"P6 2 1 65535\n" + bytes(12))
    with pytest.raises(DecodeError, match="16-bit samples as RGB in PNM are not read"):
        decode(b"P3 1 1 4095\n 1 2 3\n")
    with pytest.raises(DecodeError, match="16-bit samples as CMYK in TIFF are not read"):
        decode(tiff(np.zeros((2, 2, 4), np.uint16), photometric=5))


def test_a_mode_without_grey_or_rgb_is_refused() -> None:
    with pytest.raises(DecodeError, match="pixels of mode LAB are not read"):
        decode(tiff(np.zeros((2, 2, 3), np.uint8), photometric=8))


def test_alpha_is_dropped_and_not_composited() -> None:
    rgba = np.dstack([colour(), np.zeros((24, 31), np.uint8)])  # fully transparent
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        np.testing.assert_array_equal(decode(encode(rgba, kind, **options)), colour())
    la = encode(Image.fromarray(np.dstack([smooth(), np.zeros_like(smooth())]), "LA"), "PNG")
    np.testing.assert_array_equal(decode(la), smooth())


def test_premultiplied_grey_is_divided_again() -> None:
    samples = np.dstack([np.full((4, 4), 50, np.uint8), np.full((4, 4), 128, np.uint8)])
    np.testing.assert_allclose(decode(tiff(samples, t338=1)), 100, atol=1)


def test_palettes() -> None:
    gray = Image.fromarray(smooth() // 16)
    gray.putpalette(bytes(v for level in range(16) for v in (level * 17,) * 3))
    for kind in ("PNG", "GIF", "BMP"):
        np.testing.assert_array_equal(decode(encode(gray, kind)), smooth() // 16 * 17)
    quantised = Image.fromarray(colour()).quantize(16)
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        np.testing.assert_array_equal(decode(encode(quantised, kind)), np.asarray(quantised.convert("RGB")))
    transparent = encode(quantised, "PNG", transparency=bytes(range(16)))
    np.testing.assert_array_equal(decode(transparent), np.asarray(quantised.convert("RGB")))


def test_indices_beyond_the_palette_are_black() -> None:
    index = np.array([[0, 1, 9]], np.uint8)
    data = png(index, 3).replace(chunk(b"IEND", b""), b"")
    at = data.index(b"IDAT") - 4
    palette = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255]))
    decoded = decode(data[:at] + palette + data[at:] + chunk(b"IEND", b""))
    np.testing.assert_array_equal(decoded, [[[255, 0, 0], [0, 0, 255], [0, 0, 0]]])


def test_one_bit_becomes_0_and_255() -> None:
    mask = smooth() > 100
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        decoded = decode(encode(Image.fromarray(mask), kind))
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, mask * 255)


def test_cmyk_and_ycbcr_become_rgb() -> None:
    np.testing.assert_array_equal(
        decode(FILES["jpeg cmyk"]), np.asarray(Image.open(io.BytesIO(FILES["jpeg cmyk"])).convert("RGB"))
    )
    flat = np.full((16, 16, 3), (200, 60, 30), np.uint8)
    ycbcr = encode(Image.fromarray(flat).convert("YCbCr"), "TIFF")
    np.testing.assert_allclose(decode(ycbcr).astype(int), flat, atol=2)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    for kind, options in (("JPEG", {"quality": 95}), ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        data = encode(colour(), kind, exif=exif, **options)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(decode(data), np.asarray(upright))


def test_orientation_of_deep_colour() -> None:
    samples = np.random.default_rng(3).integers(0, 65536, (4, 6, 3)).astype(np.uint16)
    np.testing.assert_array_equal(decode(tiff(samples, photometric=2, t274=6)), samples[::-1].swapaxes(0, 1))


# Traps of JPEG

# Written by cjpeg -arithmetic: 7 x + 3 y + 20 at 16 rows by 24 columns, which Pillow itself cannot write
ARITHMETIC = (
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00RO70|EjA0|NsD0|NvF2n7WM1O*BQ2L=cX3JeSj3JVJj4iXRz4iOFu3lJ6%5fc;@6%`B*7Z?^47!ni}6#v"
    "Np3kU!Z02l!Q5di<p00saM5C#9*00;pA002J#{{ZKGaf}!$WOgMmC^E-bLePgYOtA#FIzdb2+1EFW|Je"
)
FLAT = (200, 60, 30)
APP14 = b"\xff\xee\0\x0eAdobe"


def inks(planes: tuple[int, ...], *, transform: int) -> bytes:
    """A JPEG of four flat channels, stored as these values, whose Adobe marker names the transform (2: YCCK)."""
    image = Image.merge(
        "CMYK", [Image.new("L", (16, 16), 255 - value) for value in planes]
    )  # Pillow stores them inverted
    data = encode(image, "JPEG", quality=100, subsampling=0)
    at = data.index(APP14) + 15
    return data[:at] + bytes([transform]) + data[at + 1 :]


def test_inverted_inks_of_an_adobe_jpeg_are_turned_round() -> None:
    """Stored are 255 - ink, so with no black the stored channels are red, green and blue themselves."""
    data = inks((*FLAT, 255), transform=0)
    np.testing.assert_allclose(decode(data).astype(int), np.full((16, 16, 3), FLAT), atol=2)


def test_ycck_of_an_adobe_jpeg_is_turned_into_inks() -> None:
    """The inks are in the place of red, green and blue in JFIF's luma and chroma; the fourth channel is 255 - black."""
    cyan, magenta, yellow = FLAT
    luma = 0.299 * cyan + 0.587 * magenta + 0.114 * yellow
    planes = luma, 128 + (yellow - luma) / 1.772, 128 + (cyan - luma) / 1.402
    found = decode(inks((*(round(value) for value in planes), 255), transform=2)).astype(int)
    np.testing.assert_allclose(found, np.full((16, 16, 3), 255 - np.array(FLAT)), atol=3)


def test_an_arithmetic_coded_jpeg_decodes() -> None:
    y, x = np.mgrid[:16, :24]
    decoded = decode(base64.b85decode(ARITHMETIC))
    assert np.abs(decoded.astype(int) - (7 * x + 3 * y + 20)).max() <= 1


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_of_every_subsampling_equals_pillow(subsampling: str, progressive: bool) -> None:
    """31 columns: the last block of chroma is partial."""
    data = encode(colour(), "JPEG", subsampling=subsampling, progressive=progressive)
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("progressive", [False, True])
def test_grey_stored_as_a_colour_jpeg_is_the_grey_jpeg(progressive: bool) -> None:
    gray = Image.fromarray(smooth())
    one, three = (encode(image, "JPEG", quality=90, progressive=progressive) for image in (gray, gray.convert("RGB")))
    np.testing.assert_array_equal(decode(three), decode(one))
    assert decode(three).ndim == 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_orientation_of_a_jpeg_is_that_of_pillow(mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(colour()).convert(mode)
    data = encode(image, "JPEG", quality=95, exif=exif, progressive=orientation % 2 == 0)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data), np.asarray(upright.convert("RGB" if mode == "CMYK" else mode)))


def test_webp_of_a_grey_picture_is_one_channel_and_loses_its_alpha() -> None:
    gray = smooth()
    clear = Image.merge("LA", [Image.fromarray(gray), Image.new("L", gray.shape[::-1], 7)]).convert("RGBA")
    for image in (Image.fromarray(gray), clear):
        np.testing.assert_array_equal(decode(encode(image, "WEBP", lossless=True, exact=True)), gray)


def test_pages_of_a_float_tiff() -> None:
    pages = [smooth(seed=seed).astype(np.float32) / 7 for seed in range(3)]
    images = [Image.fromarray(page) for page in pages]
    data = encode(images[0], "TIFF", save_all=True, append_images=images[1:])
    for frame, page in enumerate(pages):
        np.testing.assert_array_equal(decode(data, frame=frame), page)


# Frames


def test_frames() -> None:
    pages = [Image.fromarray(smooth(seed=seed)) for seed in range(3)]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(decode(data), pages[0])
    for frame in range(3):
        np.testing.assert_array_equal(decode(data, frame=frame), pages[frame])
    assert decode(FILES["gif animated"], frame=1).shape == (24, 31, 3)


@pytest.mark.parametrize(("name", "frame"), [("tiff", 1), ("png", 1), ("jpeg", 2), ("gif animated", 2), ("tiff", -1)])
def test_a_frame_that_is_not_there(name: str, frame: int) -> None:
    with pytest.raises(DecodeError, match=f"has no frame {frame}; frames are counted from 0"):
        decode(FILES[name], frame=frame)


# Files that are refused


def test_no_image() -> None:
    with pytest.raises(DecodeError, match="the file is empty"):
        decode(b"")
    for data in (b"hello, no image", b"\x89PN", b"%PDF-1.7", gzip.compress(b"text"), b"\x1f\x8bbroken", b"\0" * 500):
        with pytest.raises(
            DecodeError, match=r"not an image file of a known kind \(PNG, JPEG, TIFF, DICOM, NIfTI, .*\)"
        ):
            decode(data)


def test_programs_are_never_started_for_postscript() -> None:
    with pytest.raises(DecodeError, match="not an image file of a known kind"):
        decode(encode(colour(), "EPS"))


def test_dicom_is_named() -> None:
    elements = b"\x08\0\x05\0CS\x0a\0ISO_IR 100"
    big = b"\0\x08\0\x05CS\0\x0aISO_IR 100"
    implicit = b"\x08\0\x05\0\x0a\0\0\0ISO_IR 100"
    for data in (bytes(128) + b"DICM" + elements, b"II*\0" + bytes(124) + b"DICM" + elements, elements, big, implicit):
        with pytest.raises(DecodeError, match="a DICOM file and no raster image"):
            decode(data)


@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti_is_named(order: Literal["<", ">"]) -> None:
    first = struct.pack(order + "i", 348) + bytes(340) + b"n+1\0" + bytes(100)
    second = struct.pack(order + "i", 540) + b"n+2\0\r\n\x1a\n" + bytes(600)
    for data in (first, second, gzip.compress(first), gzip.compress(second)):
        with pytest.raises(DecodeError, match="a NIfTI file and no raster image"):
            decode(data)


def test_the_name_stands_before_the_reason() -> None:
    with pytest.raises(DecodeError, match=r"^a/b\.png: the file is empty$"):
        decode(b"", name="a/b.png")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    image = np.ones((4, 4), np.float32)
    image[2, 3] = value
    with pytest.raises(DecodeError, match="NaN or infinite"):
        decode(encode(image, "TIFF"))
    wide = np.full((2, 2), 1e300)
    with pytest.raises(DecodeError, match="NaN or infinite"):
        decode(tiff(wide))


def test_too_many_pixels() -> None:
    """Between Pillow's limits and ours an image is read, above ours it is refused before anything is allocated."""
    header = struct.pack(">IIBBBBB", 2**14 + 1, 2**14, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )
    with pytest.raises(DecodeError, match="16384x16385 pixels are above the limit of 268435456"):
        decode(bomb)
    limit = Image.MAX_IMAGE_PIXELS
    assert limit is not None
    big = Image.new("1", (2**14, 2 * limit // 2**14 + 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode(encode(big, "PNG")).shape == big.size[::-1]
    assert caught == []
    assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.raises(DecodeError, match="the TIFF image has more pixels than Pillow opens"):
        decode(encode(big, "TIFF", compression="group4"))


# The package


def test_the_package_is_light_and_gives_functions() -> None:
    """`preprocess` names a module and a function; the function wins however the package is imported first."""
    program = (
        "import featstore.images.preprocess, sys; from featstore.images import preprocess, fit_size, PreprocessSpec\n"
        "assert callable(preprocess) and not {'torch', 'transformers', 'PIL'} & set(sys.modules)\n"
        "from featstore.images import decode; assert callable(decode) and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)


def test_the_package_has_nothing_else() -> None:
    import featstore.images

    with pytest.raises(AttributeError, match=r"module 'featstore\.images' has no attribute 'load'"):
        featstore.images.load  # noqa: B018


# Real files


@pytest.mark.realdata
def test_every_radiograph_decodes_to_its_listed_size(shared_data: Path) -> None:
    import pyarrow.csv

    table = pyarrow.csv.read_csv(shared_data / "cxr" / "metadata.csv")
    paths, widths, heights = (table[name].to_pylist() for name in ("path", "width", "height"))
    assert len(paths) == 870

    def shape(path: str) -> tuple[int, ...]:
        return decode((shared_data / "cxr" / path).read_bytes()).shape

    with ThreadPoolExecutor(2) as pool:
        for decoded, width, height in zip(pool.map(shape, paths), widths, heights, strict=True):
            assert decoded in ((height, width), (height, width, 3))


@pytest.mark.realdata
def test_kinds_of_real_files(shared_data: Path) -> None:
    cases = {
        "ct/chest_dicom/*.dcm": "DICOM",
        "mri/volumes/**/*.nii.gz": "NIfTI",
        "dicom/corrupt/text_named.dcm": "not an image file",
    }
    for pattern, reason in cases.items():
        paths = sorted(shared_data.glob(pattern))
        assert paths
        for path in paths:
            with pytest.raises(DecodeError, match=reason):
                decode(path.read_bytes())


@pytest.mark.realdata
def test_a_64_bit_tiff_equals_the_dicom_it_was_made_from(shared_data: Path) -> None:
    """The 16-bit pixels stand uncompressed at the end of the DICOM file; the TIFF has its intercept of -1024 added."""
    (path,) = (shared_data / "ct" / "chest_tiff").glob("*.tif")
    dicom = (shared_data / "ct" / "chest_dicom" / path.with_suffix(".dcm").name).read_bytes()
    stored = np.frombuffer(dicom[-512 * 512 * 2 :], "<i2").reshape(512, 512)
    np.testing.assert_array_equal(decode(path.read_bytes()), stored - 1024.0)
