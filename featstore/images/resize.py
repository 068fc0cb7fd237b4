"""Antialiased resizing with torch, and the geometries that are built on it.

Not antialiased, a 2048-pixel image sampled down to 224 is off by 30 to 50 grey levels in places; every resize here is,
but for `spline`, which is there to repeat what was published, and for masks, whose values must not be mixed.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float32, Shaped, UInt8

from featstore.errors import DecodeError
from featstore.images.sizes import MAX_PIXELS

Gray = UInt8[np.ndarray, "H W"] | Float32[np.ndarray, "H W"]
Colour = UInt8[np.ndarray, "H W 3"] | Float32[np.ndarray, "H W 3"]
Planes = UInt8[np.ndarray, "C h w"] | Float32[np.ndarray, "C h w"]
Pixels = Shaped[np.ndarray, "H W"] | Shaped[np.ndarray, "H W 3"]
AnyPlanes = Shaped[np.ndarray, "C h w"]
NEAREST = "nearest-exact"


def resize(image: Gray | Colour, height: int, width: int, *, mode: str = "bicubic") -> Planes:
    """The whole image at another size, in the image's own type; the same bits where the size is that already.

    8-bit values stay within one grey level of Pillow's filter of the same name (two at 20 pixels in a million) if it
    runs its horizontal pass first; from version 13 on Pillow starts with the cheaper one. A grey image and its copy in
    three channels give the same values. Floats may overshoot the range of the input.
    """
    # torch takes no negative strides, and warns of read-only memory.
    writable = np.require(image, requirements=["C", "W"])
    planes = torch.from_numpy(writable)
    planes = planes[None] if planes.ndim == 2 else planes.permute(2, 0, 1)
    if planes.shape[1:] == (height, width):
        return planes.contiguous().numpy()
    # torch 2.13 fills a float column of width 1 with its first value; a row of height 1 it resizes as it should.
    turned = width == 1 and planes.dtype == torch.float32
    size = (width, height) if turned else (height, width)
    # The strides of (H, W, 3) are kept: interleaved channels are resized three times faster than separate planes.
    source = planes.mT if turned else planes
    resized = torch.nn.functional.interpolate(source[None], size, mode=mode, antialias=True)[0]
    return (resized.mT if turned else resized).contiguous().numpy()


def nearest(image: Pixels, height: int, width: int) -> AnyPlanes:
    """The pixel whose area holds the centre of each new one; any type, no value that was not there.

    torch's `nearest-exact` and Pillow's NEAREST, in whole numbers.
    """
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip((height, width), image.shape[:2], strict=True)
    )
    return _planes(image[rows[:, None], columns])


def _planes(image: Pixels) -> AnyPlanes:
    return np.ascontiguousarray(image[None] if image.ndim == 2 else image.transpose(2, 0, 1))


def _resized(image: Pixels, height: int, width: int, mode: str) -> AnyPlanes:
    return nearest(image, height, width) if mode == NEAREST else resize(image, height, width, mode=mode)


def squash(image: Pixels, height: int, width: int, *, mode: str = "bicubic") -> AnyPlanes:
    """The whole field of view; the aspect ratio changes."""
    return _resized(image, height, width, mode)


def letterbox(image: Pixels, height: int, width: int, *, mode: str = "bicubic") -> AnyPlanes:
    """The whole field of view at its aspect ratio, centred on black."""
    rows, columns = image.shape[:2]
    if rows * width >= columns * height:
        inner = height, max(1, (2 * columns * height + rows) // (2 * rows))
    else:
        inner = max(1, (2 * rows * width + columns) // (2 * columns)), width
    resized = _resized(image, *inner, mode)
    planes = np.zeros((resized.shape[0], height, width), resized.dtype)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    planes[:, top : top + inner[0], left : left + inner[1]] = resized
    return planes


def dino(image: Pixels, height: int, width: int, *, mode: str = "bicubic") -> AnyPlanes:
    """DINO's evaluation transform: the short side to 256/224 of the target, then the centre of that.

    Raises:
        DecodeError: an image so long that its resized form would be absurdly large.
    """
    high, wide = ((2 * side * 256 + 224) // (2 * 224) for side in (height, width))
    return _centre(_cover(image, high, wide, "dino", mode), height, width)


def short(image: Pixels, height: int, width: int, *, mode: str = "bicubic") -> AnyPlanes:
    """The short side to the target, then the centre of that: the largest centred part of the target's shape.

    Odd margins are smaller by one at the top and left, as image processors of transformers and torchxrayvision cut.

    Raises:
        DecodeError: as `dino`.
    """
    planes = _cover(image, height, width, "short", mode)
    top, left = (planes.shape[1] - height) // 2, (planes.shape[2] - width) // 2
    return np.ascontiguousarray(planes[:, top : top + height, left : left + width])


def _cover(image: Pixels, height: int, width: int, name: str, mode: str) -> AnyPlanes:
    """The image at its aspect ratio, just large enough to cover both sides.

    The longer side is cut to whole pixels, as torchvision's Resize does.
    """
    rows, columns = image.shape[:2]
    if rows * width >= columns * height:
        covering = rows * width // columns, width
    else:
        covering = height, columns * height // rows
    if covering[0] * covering[1] > MAX_PIXELS:
        raise DecodeError(
            f"{rows}x{columns} pixels are too long a shape for the geometry {name}; use squash or letterbox"
        )
    return _resized(image, covering[0], covering[1], mode)


def _centre(planes: Shaped[np.ndarray, "C H W"], height: int, width: int) -> AnyPlanes:
    """Odd margins are halved to the even neighbour, as torchvision's CenterCrop does."""
    top, left = round((planes.shape[1] - height) / 2), round((planes.shape[2] - width) / 2)
    return np.ascontiguousarray(planes[:, top : top + height, left : left + width])


def spline(image: Pixels, height: int, width: int, *, mode: str = "bicubic") -> AnyPlanes:
    """The whole field of view by a quadratic spline through the stored values, in their own type; not antialiased.

    The centres of the corner pixels stay where they are. `mode` counts only where it is nearest.
    Source: image preparation of DINOv3 on chest radiographs, scipy's zoom of order 2.
    """
    from scipy.ndimage import zoom

    factors = (height / image.shape[0], width / image.shape[1]) + (1,) * (image.ndim - 2)
    return _planes(zoom(image, factors, order=0 if mode == NEAREST else 2))


GEOMETRIES: dict[str, Callable[..., AnyPlanes]] = {
    "squash": squash,
    "letterbox": letterbox,
    "dino": dino,
    "short": short,
    "spline": spline,
}
