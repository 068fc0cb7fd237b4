"""Grey that is stored as colour, JPEGs decoded smaller, and the parts of files that hold several pictures."""

import io
from pathlib import Path

import numpy as np
import pytest
from image_files import colour, smooth
from PIL import Image

from featstore.errors import DecodeError
from featstore.images import PreprocessSpec, decode, preprocess
from featstore.images.decoded import DecodeOptions
from featstore.images.gray import channels_of, collapse, samples
from featstore.images.part import WHOLE, Part
from featstore.images.raster import list_parts

HALF = (0.5, 0.5, 0.5)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth grey picture."""
    coarse = np.random.default_rng(seed).integers(0, 255, (max(2, height // 16), max(2, width // 16)), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (64, 64), (129, 77)])
def test_grey_stored_as_colour_is_one_channel(mode: str, size: tuple[int, int]) -> None:
    gray = picture(*size)
    decoded = decode(stored(Image.fromarray(gray).convert(mode), "PNG"))
    np.testing.assert_array_equal(decoded, gray)
    assert decoded.flags.writeable
    assert decoded.flags.c_contiguous


@pytest.mark.parametrize("channel", [0, 1, 2])
@pytest.mark.parametrize("place", [(0, 0), (64, 33), (128, 76)])
def test_one_coloured_pixel_keeps_three_channels(channel: int, place: tuple[int, int]) -> None:
    rgb = np.repeat(picture(129, 77)[..., None], 3, 2)
    rgb[(*place, channel)] ^= 1
    for mode in ("RGB", "RGBA"):
        np.testing.assert_array_equal(decode(stored(Image.fromarray(rgb).convert(mode), "PNG")), rgb)
    np.testing.assert_array_equal(collapse(rgb), rgb)


def test_16_bit_grey_stored_as_colour_is_one_channel() -> None:
    gray = np.random.default_rng(0).integers(0, 65536, (70, 50), dtype=np.uint16)
    assert collapse(np.repeat(gray[..., None], 3, 2)).shape == (70, 50)
    np.testing.assert_array_equal(collapse(np.repeat(gray[..., None], 3, 2)), gray)


def test_ink_without_colour_is_one_channel() -> None:
    gray = Image.fromarray(picture(40, 40))
    inks = Image.merge("CMYK", [Image.new("L", gray.size)] * 3 + [gray])
    assert decode(stored(inks, "TIFF")).ndim == 2


@pytest.mark.parametrize("geometry", ["squash", "letterbox", "dino"])
def test_collapsed_pixels_are_those_of_three_channels(geometry: str) -> None:
    gray = picture(150, 110)
    spec = PreprocessSpec(geometry=geometry, height=42, width=42, mean=HALF, std=HALF)  # type: ignore[arg-type]
    one, three = preprocess(gray, spec), preprocess(np.repeat(gray[..., None], 3, 2), spec)
    np.testing.assert_array_equal(np.broadcast_to(one, three.shape), three)


def test_collapsed_pixels_are_those_of_three_channels_by_a_checkpoints_processor() -> None:
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 64},
        "do_center_crop": True,
        "crop_size": {"height": 56, "width": 56},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(HALF),
        "image_std": list(HALF),
        "resample": 3,
    }
    gray = picture(150, 110)
    spec = PreprocessSpec(geometry="hf", height=56, width=56, processor=processor)
    one, three = preprocess(gray, spec), preprocess(np.repeat(gray[..., None], 3, 2), spec)
    np.testing.assert_array_equal(np.broadcast_to(one, three.shape), three)


@pytest.mark.parametrize("mode", ["L", "I;16", "I;16B", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (33, 7), (4096, 4100)])
def test_samples_are_those_of_numpy(mode: str, size: tuple[int, int]) -> None:
    """The last size lies in several pieces of memory."""
    generator = np.random.default_rng(0)
    if mode.startswith("I"):
        values = generator.integers(0, 65536, size).astype("<u2" if mode == "I;16" else ">u2")
        image = Image.frombytes(mode, size[::-1], values.tobytes())
        np.testing.assert_array_equal(samples(image).astype(np.uint16), values)
        return
    deep = generator.integers(0, 256, (*size, 4), dtype=np.uint8)
    image = Image.fromarray(deep, "RGBA").convert(mode)
    if mode == "L":
        np.testing.assert_array_equal(samples(image), np.array(image))
    else:
        found = channels_of(image)
        np.testing.assert_array_equal(found, collapse(np.array(image)[..., :3]))
        assert found.flags.writeable


def scaled(target: int) -> DecodeOptions:
    return DecodeOptions(decode="scaled", target=(target, target))


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((1024, 1024), 224, (512, 512)),
        ((1024, 2048), 128, (256, 512)),
        ((2048, 2048), 64, (256, 256)),
        ((447, 900), 224, (447, 900)),
        ((448, 900), 224, (448, 900)),
        ((895, 2000), 224, (895, 2000)),
        ((897, 2000), 224, (449, 1000)),
    ],
)
def test_a_scaled_jpeg_keeps_twice_the_target(size: tuple[int, int], target: int, expected: tuple[int, int]) -> None:
    data = stored(Image.fromarray(picture(*size)), "JPEG", quality=92)
    assert decode(data, options=scaled(target)).shape == expected
    assert decode(data).shape == size


def test_scaled_decoding_turns_as_full_decoding_does() -> None:
    exif = Image.Exif()
    exif[274] = 6
    data = stored(Image.fromarray(picture(1024, 512)), "JPEG", quality=95, exif=exif)
    full, small = decode(data), decode(data, options=scaled(64))
    assert (full.shape, small.shape) == ((512, 1024), (128, 256))
    shrunk = np.asarray(Image.fromarray(full).resize((256, 128), Image.Resampling.BOX)).astype(int)
    assert np.abs(shrunk - small).mean() < 1


def test_only_jpegs_of_light_are_scaled() -> None:
    gray = Image.fromarray(picture(512, 512))
    assert decode(stored(gray, "PNG"), options=scaled(32)).shape == (512, 512)
    inks = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 4), dtype=np.uint8), "CMYK")
    assert decode(stored(inks, "JPEG"), options=scaled(32)).shape == (512, 512, 3)


def test_scaled_pixels_are_near_those_of_full_decoding() -> None:
    """Measured on these pictures, whose detail is of the size of a target pixel: mean 0.75, at most 4 grey levels."""
    full, small = (
        PreprocessSpec(geometry="squash", height=112, width=112, mean=HALF, std=HALF, decode=mode)
        for mode in ("full", "scaled")
    )
    assert full.as_dict() != small.as_dict()
    for seed in range(3):
        data = stored(Image.fromarray(picture(1024, 1024, seed)), "JPEG", quality=92)
        a, b = (preprocess(decode(data, options=spec.decoding), spec).astype(int) for spec in (full, small))
        assert 0 < np.abs(a - b).mean() < 0.8
        assert np.abs(a - b).max() <= 5


def test_a_cut_scaled_jpeg_is_noticed() -> None:
    data = stored(Image.fromarray(picture(1024, 1024)), "JPEG", quality=92)
    with pytest.raises(DecodeError, match="truncated"):
        decode(data[: len(data) // 2] + b"\xff\xd9", options=scaled(64))


@pytest.mark.parametrize("kind", ["TIFF", "GIF"])
@pytest.mark.parametrize("pages", [1, 2, 5])
def test_parts_are_the_pages(tmp_path: Path, kind: str, pages: int) -> None:
    images = [Image.fromarray(picture(20, 30, page)) for page in range(pages)]
    images[0].save(tmp_path / "a", kind, save_all=True, append_images=images[1:])
    expected = [WHOLE] if pages == 1 else [Part(frame=page) for page in range(pages)]
    assert list_parts(tmp_path / "a") == expected
    data = (tmp_path / "a").read_bytes()
    assert all(decode(data, frame=page).shape[:2] == (20, 30) for page in range(pages))
    if pages > 1:
        with pytest.raises(DecodeError, match="has no frame"):
            decode(data, frame=pages)


@pytest.mark.parametrize("big", [False, True])
def test_parts_of_a_tiff_that_pillow_does_not_read(tmp_path: Path, big: bool) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 8, 8)), photometric="minisblack", bigtiff=big)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(list_parts(tmp_path / "a.tif")) == len(file.pages) == 3


def test_parts_of_other_and_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(stored(Image.fromarray(smooth()), "PNG"))
    assert list_parts(tmp_path / "a.png") == [WHOLE]
    (tmp_path / "a.tif").write_bytes(stored(Image.fromarray(colour()), "TIFF")[:6])
    with pytest.raises(DecodeError):
        list_parts(tmp_path / "a.tif")
