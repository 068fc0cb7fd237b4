"""Pixels out of Pillow with few copies, and grey pictures that are stored as colour brought back to one channel."""

import sys
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

_BAND = 64  # rows compared at once: they stay in the processor's cache
_STEP = 37  # pixels between those looked at first; coprime to the sizes of blocks and tiles
# Red, green and blue of a pixel that Pillow keeps in four bytes, as bits of one number
_SECOND, _EQUAL = (8, 0x0000FFFF) if sys.byteorder == "little" else (8, 0x00FFFF00)


def _memory(image: Image.Image) -> Any:
    """Pillow's own memory of a loaded image as a flat array that is only read; None where it lies in pieces."""
    import pyarrow as pa

    if Image.core.get_alignment() != 1:  # type: ignore[attr-defined]  # rows may then end in bytes that are no pixels
        return None
    try:
        held = pa.array(image)
    except ValueError:
        return None  # above Pillow's size of a block, 16 MiB
    return np.asarray(held.values if hasattr(held, "values") else held)


def samples(image: Image.Image) -> Shaped[np.ndarray, "H W"]:
    """A loaded image of one channel (`L`, `I;16`, `I;16B`): numpy's own way copies it three times."""
    if image.mode == "L" or (image.mode == "I;16" and sys.byteorder == "little"):
        flat = _memory(image)
        if flat is not None:
            copied: np.ndarray = np.array(flat).view(np.uint8 if image.mode == "L" else np.uint16)
            return copied.reshape(image.height, image.width)
    return np.array(image)


def channels_of(image: Image.Image) -> UInt8[np.ndarray, "H W"] | UInt8[np.ndarray, "H W 3"]:
    """A loaded `RGB` or `RGBA` image without its alpha; one channel where all three are equal."""
    flat = _memory(image)
    if flat is None:
        return collapse(np.array(image)[..., :3])
    pixels = flat.view(np.uint32).reshape(image.height, image.width)
    if not _is_gray(pixels):
        return np.ascontiguousarray(np.array(image)[..., :3])
    gray: np.ndarray = pixels.view(np.uint8).reshape(*pixels.shape, 4)[..., 0].copy()  # Pillow's memory is only read
    return gray


def _is_gray(pixels: Shaped[np.ndarray, "H W"]) -> bool:
    def equal(part: np.ndarray) -> bool:
        return not ((part ^ part >> _SECOND) & _EQUAL).any()

    return equal(pixels.reshape(-1)[::_STEP]) and all(
        equal(pixels[first : first + _BAND]) for first in range(0, len(pixels), _BAND)
    )


def collapse(pixels: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """(H, W) where an (H, W, 3) image has three equal channels; anything else as it is."""
    if pixels.ndim != 3:
        return pixels

    def equal(part: np.ndarray) -> bool:
        red, green, blue = part[..., 0], part[..., 1], part[..., 2]
        return bool((red == green).all() and (red == blue).all())

    if equal(pixels[::_STEP, ::_STEP]) and all(
        equal(pixels[first : first + _BAND]) for first in range(0, len(pixels), _BAND)
    ):
        return np.ascontiguousarray(pixels[..., 0])
    return pixels
