"""Geometries: against Pillow, scipy and exact arithmetic; and the way of masks beside their images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pixel_specs import make_spec, noise, photo, pillow_resize, planes

from featstore.images import preprocess
from featstore.images.decoded import Decoded
from featstore.images.equalise import equalise
from featstore.images.resize import GEOMETRIES, nearest, resize


@pytest.mark.parametrize("shape", [(300, 400), (400, 301, 3), (224, 224), (1000, 999), (97, 613), (31, 40)])
@pytest.mark.parametrize("size", [(224, 224), (98, 98), (99, 99)])
def test_short_equals_resize_and_centre_crop_with_pillow(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    """torchvision's Resize(side), then the centre with odd margins smaller at the top left, written out with Pillow."""
    image = photo(shape[0], shape[1], 3 if len(shape) == 3 else 0)
    side, (rows, columns) = size[0], shape[:2]
    full = (side, int(side * columns / rows)) if rows <= columns else (int(side * rows / columns), side)
    resized = pillow_resize(image, *full)
    top, left = ((length - side) // 2 for length in full)
    expected = resized[:, top : top + side, left : left + side].astype(int)
    difference = np.abs(preprocess(image, make_spec("short", *size)).astype(int) - expected)
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-3


@settings(deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 60), st.integers(1, 60))
def test_short_fills_any_target_and_keeps_the_short_side_whole(
    rows: int, columns: int, height: int, width: int
) -> None:
    """Along the side that is not cut the image is squashed: a ramp shows from its first to its last value."""
    box = preprocess(np.full((rows, columns), 90, np.uint8), make_spec("short", height, width))
    assert (box.shape, box.min(), box.max()) == ((1, height, width), 90, 90)
    if rows * width >= columns * height:  # the whole width stays
        image = np.repeat(np.linspace(0, 255, columns)[None], rows, 0).astype(np.uint8)
        expected = resize(image, height, width)
    else:
        image = np.repeat(np.linspace(0, 255, rows)[:, None], columns, 1).astype(np.uint8)
        expected = resize(image, height, width)
    difference = preprocess(image, make_spec("short", height, width)).astype(int) - expected
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("shape", [(40, 30), (30, 41), (33, 29, 3), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_spline_is_scipys_zoom_of_the_stored_values(shape: tuple[int, ...], dtype: type) -> None:
    from scipy.ndimage import zoom

    image: np.ndarray = (np.random.default_rng(0).integers(0, 250, shape) * (1 if dtype == np.uint8 else 130)).astype(
        dtype
    )
    channels = [image] if image.ndim == 2 else [image[..., channel] for channel in range(3)]
    small = np.stack([zoom(one, (14 / shape[0], 18 / shape[1]), order=2) for one in channels])
    np.testing.assert_array_equal(GEOMETRIES["spline"](image, 14, 18), small)
    spec = make_spec("spline", 14, 18, intensity="minmax", quantise="none")
    low, high = float(small.min()), float(small.max())
    expected = (small.astype(float) - low) / (high - low) * 255 if high > low else np.zeros(small.shape)
    np.testing.assert_allclose(preprocess(image, spec), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(
        preprocess(image, make_spec("spline", 14, 18, intensity="minmax")), np.rint(preprocess(image, spec))
    )


def test_chest_radiographs_are_prepared_as_by_the_authors_of_dinov3_cxr() -> None:
    """Zoom of order 2, min-max, 8 bits, inversion, equalisation: in this order."""
    from scipy.ndimage import zoom

    image = (photo(300, 260).astype(np.uint16) * 13 + noise(300, 260)) * 3
    for low_is_white in (False, True):
        values = zoom(image, (224 / 300, 224 / 260), order=2)
        unit = (values - values.min()) / (values.max() - values.min())
        levels = np.rint(unit * 255).astype(np.uint8)
        expected = equalise(np.invert(levels) if low_is_white else levels)
        spec = make_spec("spline", 224, 224, intensity="minmax+equalise")
        np.testing.assert_array_equal(preprocess(Decoded(image, invert=low_is_white), spec)[0], expected)


# Masks


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
def test_nearest_takes_the_pixel_under_each_centre(rows: int, columns: int, height: int, width: int) -> None:
    from fractions import Fraction

    image = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    ys = [int(Fraction(2 * y + 1, 2) * Fraction(rows, height)) for y in range(height)]
    xs = [int(Fraction(2 * x + 1, 2) * Fraction(columns, width)) for x in range(width)]
    np.testing.assert_array_equal(nearest(image, height, width)[0], image[np.ix_(ys, xs)])


@pytest.mark.parametrize(("rows", "columns"), [(100, 75), (33, 64), (20, 20), (7, 90)])
def test_nearest_is_torchs_nearest_exact(rows: int, columns: int) -> None:
    image = noise(rows, columns, 3)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(planes(image).copy())[None], (28, 40), mode="nearest-exact"
    )[0].numpy()
    np.testing.assert_array_equal(nearest(image, 28, 40), theirs)


@pytest.mark.parametrize("geometry", sorted(GEOMETRIES))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_masks_go_the_way_of_their_images_without_new_values(geometry: str, dtype: type) -> None:
    image = np.zeros((90, 61), np.uint8)
    image[20:70, 15:50] = 200
    mask: np.ndarray = np.where(image > 0, 7, 3).astype(dtype)
    resized = GEOMETRIES[geometry](image, 40, 48)[0]
    found = GEOMETRIES[geometry](mask, 40, 48, mode="nearest-exact")[0]
    assert (found.shape, found.dtype) == ((40, 48), dtype)
    assert set(np.unique(found)) <= {0, 3, 7} if geometry == "letterbox" else set(np.unique(found)) == {3, 7}
    assert ((found == 7) != (resized > 100)).mean() < 0.03


def test_letterbox_of_one_pixel_and_of_odd_margins() -> None:
    for width, row in ((3, [9, 9, 9]), (4, [9, 9, 9, 0]), (6, [0, 9, 9, 9, 0, 0])):
        box = preprocess(np.full((1, 1), 9, np.uint8), make_spec("letterbox", 3, width))[0]
        np.testing.assert_array_equal(box, [row] * 3)
