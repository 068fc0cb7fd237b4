"""Values of any depth -> values in [0, 255]: the step between decoding and geometry."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

Bytes = UInt8[np.ndarray, "*shape"] | Float32[np.ndarray, "*shape"]


def to_byte_range(image: Shaped[np.ndarray, "*shape"], rule: str) -> Bytes:
    """The image in [0, 255] by a rule of `INTENSITIES`: uint8 where it was 8 bits and stays so, else float32."""
    return INTENSITIES[rule](image)


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
