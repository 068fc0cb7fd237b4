"""Equalisation: against loops over pixels, and against OpenCV's own results kept in opencv_equalise.npz."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opencv_equalise import CASES

from featstore.images.equalise import clahe, equalise

GOLDEN = Path(__file__).with_name("opencv_equalise.npz")


@pytest.mark.parametrize("number", range(len(CASES)))
def test_both_equal_opencv_to_the_bit(number: int) -> None:
    with np.load(GOLDEN, allow_pickle=False) as known:
        image = known[f"image{number}"]
        np.testing.assert_array_equal(equalise(image), known[f"equalised{number}"])
        _, _, clip, tiles = CASES[number]
        np.testing.assert_array_equal(clahe(image, clip=clip, tiles=tiles), known[f"clahe{number}"])


def brute_equalise(image: np.ndarray) -> np.ndarray:
    """Level -> share of the pixels above the darkest level that are no brighter than it, times 255."""
    levels = image.ravel().tolist()
    darkest = min(levels)
    above = [level for level in levels if level > darkest]
    if not above:
        return image.copy()
    table = [255 * sum(other <= level for other in above) / len(above) for level in range(256)]
    return np.array([table[level] for level in levels]).reshape(image.shape)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 256), st.integers(0, 99))
def test_equalise_by_counting(rows: int, columns: int, levels: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, levels, (rows, columns), dtype=np.uint8)
    found = equalise(image)
    assert found.dtype == np.uint8
    assert np.abs(found - brute_equalise(image)).max() <= 0.5001


def test_equalise_of_one_level_leaves_it() -> None:
    for level in (0, 77, 255):
        image = np.full((3, 4), level, np.uint8)
        np.testing.assert_array_equal(equalise(image), image)


def test_equalise_spans_everything_and_keeps_the_order() -> None:
    image = np.repeat(np.arange(100, 120, dtype=np.uint8), 7).reshape(20, 7)
    found = equalise(image)
    assert (found.min(), found.max()) == (0, 255)
    assert (np.diff(found[:, 0].astype(int)) >= 0).all()
    np.testing.assert_array_equal(equalise(image[::-1]), found[::-1])
    assert (image[0, 0], image[-1, -1]) == (100, 119)  # the input is not touched


def mirrored(place: int, length: int) -> int:
    """Position after mirroring at the ends, the end pixel not repeated."""
    if length == 1:
        return 0
    place %= 2 * length - 2
    return place if place < length else 2 * length - 2 - place


def brute_clahe(image: np.ndarray, clip: float, tiles: int) -> np.ndarray:
    """Pixel by pixel in exact arithmetic; a table entry is rounded before it is blended."""
    rows, columns = image.shape
    uneven = rows % tiles or columns % tiles
    tall, wide = ((side + (tiles - side % tiles if uneven else 0)) // tiles for side in (rows, columns))
    tables = np.zeros((tiles, tiles, 256))
    for a in range(tiles):
        for b in range(tiles):
            counts = [0] * 256
            for y in range(a * tall, (a + 1) * tall):
                for x in range(b * wide, (b + 1) * wide):
                    counts[image[mirrored(y, rows), mirrored(x, columns)]] += 1
            if clip > 0:
                limit = max(int(clip * tall * wide / 256), 1)
                excess = sum(max(count - limit, 0) for count in counts)
                counts = [min(count, limit) + excess // 256 for count in counts]
                rest = excess % 256
                place = 0
                while rest:
                    counts[place] += 1
                    place, rest = place + max(256 // (excess % 256), 1), rest - 1
            tables[a, b] = np.rint(np.cumsum(counts) * 255 / (tall * wide)).clip(0, 255)
    result = np.zeros(image.shape)
    for y in range(rows):
        for x in range(columns):
            down, across = y / tall - 0.5, x / wide - 0.5
            up, left = int(np.floor(down)), int(np.floor(across))
            total = 0.0
            for a, share in ((up, 1 - (down - up)), (up + 1, down - up)):
                for b, part in ((left, 1 - (across - left)), (left + 1, across - left)):
                    total += share * part * tables[min(max(a, 0), tiles - 1), min(max(b, 0), tiles - 1), image[y, x]]
            result[y, x] = total
    return result


@pytest.mark.parametrize(
    ("shape", "clip", "tiles"),
    [((1, 1), 2.0, 2), ((1, 9), 2.0, 2), ((8, 8), 3.0, 2), ((7, 8), 40.0, 3), ((12, 9), 0.0, 3), ((10, 10), 0.5, 1)],
)
def test_clahe_pixel_by_pixel(shape: tuple[int, int], clip: float, tiles: int) -> None:
    image = np.random.default_rng(3).integers(40, 90, shape, dtype=np.uint8)
    assert np.abs(clahe(image, clip=clip, tiles=tiles) - brute_clahe(image, clip, tiles)).max() <= 0.501


def test_clahe_in_strips_is_clahe_at_once() -> None:
    """A strip has 256 rows; an image of identical columns shows every row's blending on its own."""
    image = np.repeat(np.random.default_rng(5).integers(0, 256, (600, 1), dtype=np.uint8), 16, axis=1)
    found = clahe(image, clip=2.0, tiles=2)
    assert np.abs(found[::37, ::5] - brute_clahe(image, 2.0, 2)[::37, ::5]).max() <= 0.501


def test_clahe_limits_the_contrast_that_equalisation_would_make() -> None:
    image = np.random.default_rng(1).integers(120, 124, (64, 64), dtype=np.uint8)
    assert np.ptp(equalise(image)) == 255
    assert np.ptp(clahe(image, clip=2.0, tiles=8)) < 128 < np.ptp(clahe(image, clip=0.0, tiles=8))
