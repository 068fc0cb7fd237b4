"""Histogram equalisation of 8-bit grey images, global and by tiles, to the bits of OpenCV's `equalizeHist` and `CLAHE`.

Written out in numpy: these two functions are no reason to depend on OpenCV. Its float32 arithmetic is kept, because a
table entry on the edge between two levels would else come out one off.
"""

import numpy as np
from jaxtyping import Float32, Int64, UInt8

LEVELS = 256


def equalise(image: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """The darkest level becomes 0, the rest follows the cumulative histogram; an image of one level stays as it is.

    No image says whether it was equalised before; a second time is no error, and changes it less.
    Source: the rule of OpenCV's equalizeHist.
    """
    counts = np.bincount(image.ravel(), minlength=LEVELS)
    darkest = int(counts.nonzero()[0][0])
    above = image.size - int(counts[darkest])
    if not above:
        return image
    counts[darkest] = 0
    scale = np.float32(LEVELS - 1) / np.float32(above)
    table: UInt8[np.ndarray, " 256"] = _rounded(counts.cumsum().astype(np.float32) * scale)
    equalised: np.ndarray = table[image]
    return equalised


def clahe(image: UInt8[np.ndarray, "H W"], *, clip: float, tiles: int) -> UInt8[np.ndarray, "H W"]:
    """Contrast-limited adaptive equalisation: one table for each of tiles x tiles areas, blended bilinearly.

    `clip` is the limit of a bin relative to a flat histogram; 0 limits nothing. An image that the tiles do not divide
    is mirrored (edge pixel not repeated) at the bottom and the right for the histograms, as OpenCV does: by a whole row
    of tiles where only the width is uneven.
    Source: the rule of OpenCV's createCLAHE; Zuiderveld 1994.
    """
    tables, (tall, wide) = _tables(image, clip, tiles)
    above, below, down = _neighbours(image.shape[0], tall, tiles)
    left, right, across = _neighbours(image.shape[1], wide, tiles)
    result = np.empty_like(image)
    for start in range(0, image.shape[0], 256):  # a strip at a time: a large image must not need ten times its memory
        strip = slice(start, start + 256)
        values, weight = image[strip], down[strip, None]
        upper, lower = above[strip, None], below[strip, None]
        top = tables[upper, left, values] * (1 - across) + tables[upper, right, values] * across
        bottom = tables[lower, left, values] * (1 - across) + tables[lower, right, values] * across
        result[strip] = _rounded(top * (1 - weight) + bottom * weight)
    return result


def _tables(
    image: UInt8[np.ndarray, "H W"], clip: float, tiles: int
) -> tuple[Float32[np.ndarray, "T T 256"], tuple[int, int]]:
    """(the table of every tile, (height, width) of a tile in pixels)."""
    rows, columns = image.shape
    if rows % tiles or columns % tiles:
        image = np.pad(image, ((0, tiles - rows % tiles), (0, tiles - columns % tiles)), mode="reflect")
    tall, wide = image.shape[0] // tiles, image.shape[1] // tiles
    area = tall * wide
    limit = max(int(clip * area / LEVELS), 1) if clip > 0 else 0
    scale = np.float32(LEVELS - 1) / np.float32(area)
    tables = np.empty((tiles, tiles, LEVELS), np.float32)
    for row in range(tiles):
        for column in range(tiles):
            tile = image[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
            counts = np.bincount(tile.ravel(), minlength=LEVELS)
            if limit:
                counts = _limited(counts, limit)
            tables[row, column] = _rounded(counts.cumsum().astype(np.float32) * scale)
    return tables, (tall, wide)


def _limited(counts: Int64[np.ndarray, " 256"], limit: int) -> Int64[np.ndarray, " 256"]:
    """What stands above the limit is shared out evenly; the rest of the division goes to bins at even steps."""
    excess = int((counts - limit).clip(0).sum())
    each, rest = divmod(excess, LEVELS)
    shared: Int64[np.ndarray, " 256"] = counts.clip(max=limit) + each
    if rest:
        step = max(LEVELS // rest, 1)
        shared[np.arange(0, LEVELS, step)[:rest]] += 1
    return shared


def _neighbours(
    length: int, tile: int, tiles: int
) -> tuple[Int64[np.ndarray, " L"], Int64[np.ndarray, " L"], Float32[np.ndarray, " L"]]:
    """For every pixel along a side: the tiles before and after it, and the weight of the one after."""
    place = np.arange(length, dtype=np.float32) * (np.float32(1) / np.float32(tile)) - np.float32(0.5)
    before = np.floor(place)
    first = before.astype(np.int64)
    return first.clip(0), (first + 1).clip(max=tiles - 1), place - before


def _rounded(values: Float32[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    levels: np.ndarray = np.rint(values).clip(0, LEVELS - 1).astype(np.uint8)
    return levels
