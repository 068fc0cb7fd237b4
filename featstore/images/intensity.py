"""Values of any depth -> values in [0, 255]: the step between decoding and geometry."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from featstore.images.decoded import Decoded

Bytes = UInt8[np.ndarray, "*shape"] | Float32[np.ndarray, "*shape"]


def to_byte_range(image: Decoded, rule: str) -> Bytes:
    """The image in [0, 255] by a rule of `INTENSITIES`: uint8 where it was 8 bits and stays so, else float32.

    Where low values are white they are turned round after the rule.
    """
    if rule == "native" and image.display is not None:
        values = linear(image.pixels, *image.display)
    else:
        values = INTENSITIES[rule](image.pixels)
    return values if not image.invert else 255 - values


def linear(image: Shaped[np.ndarray, "*shape"], low: float, high: float) -> Bytes:
    """`low` becomes 0 and `high` 255, what lies beyond is clipped; 8 bits stay as they are where the range is theirs.

    A range without extent becomes a step: 0 up to `low`, 255 above it.
    """
    if image.dtype == np.uint8 and (low, high) == (0, 255):
        return image
    if not low < high:
        return np.where(image > low, np.float32(255), np.float32(0))
    values: np.ndarray = (image.astype(np.float64) - low) * (255 / (high - low))
    return values.clip(0, 255).astype(np.float32)


def native(image: Shaped[np.ndarray, "*shape"]) -> Bytes:
    """8 bits as they are; anything deeper from its own minimum to its own maximum."""
    return image if image.dtype == np.uint8 else minmax(image)


def minmax(image: Shaped[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """The image's minimum (over all channels) becomes 0 and its maximum 255; a constant image becomes 0."""
    # float32 holds 8 and 16 bits exactly; beyond that differences need float64, which also holds float32's whole range.
    values: np.ndarray = image.astype(np.float32 if image.dtype.itemsize <= 2 else np.float64)
    low, high = values.min(), values.max()
    if low == high:
        return np.zeros(image.shape, np.float32)
    values -= low
    values *= 255 / (high - low)
    return np.minimum(values.astype(np.float32, copy=False), np.float32(255))  # rounding may step over 255


INTENSITIES: dict[str, Callable[[Shaped[np.ndarray, "*shape"]], Bytes]] = {"minmax": minmax, "native": native}
