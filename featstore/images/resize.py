"""Antialiased resizing with torch, and the geometries that are built on it.

Not antialiased, a 2048-pixel image sampled down to 224 is off by 30 to 50 grey levels in places; every resize here is.
"""

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from featstore.errors import DecodeError
from featstore.images.sizes import MAX_PIXELS

Gray = UInt8[np.ndarray, "H W"] | Float32[np.ndarray, "H W"]
Colour = UInt8[np.ndarray, "H W 3"] | Float32[np.ndarray, "H W 3"]
Planes = UInt8[np.ndarray, "C h w"] | Float32[np.ndarray, "C h w"]


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


def squash(image: Gray | Colour, height: int, width: int) -> Planes:
    """The whole field of view; the aspect ratio changes."""
    return resize(image, height, width)


def letterbox(image: Gray | Colour, height: int, width: int) -> Planes:
    """The whole field of view at its aspect ratio, centred on black."""
    rows, columns = image.shape[:2]
    if rows * width >= columns * height:
        inner = height, max(1, (2 * columns * height + rows) // (2 * rows))
    else:
        inner = max(1, (2 * rows * width + columns) // (2 * columns)), width
    resized = resize(image, *inner)
    planes = np.zeros((resized.shape[0], height, width), resized.dtype)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    planes[:, top : top + inner[0], left : left + inner[1]] = resized
    return planes


def dino(image: Gray | Colour, height: int, width: int) -> Planes:
    """DINO's evaluation transform: the short side to 256/224 of the target, then the centre of that.

    For a target that is not square, the image is made just large enough to cover 256/224 of both sides. The longer side
    is cut to whole pixels and odd margins are halved to the even neighbour, as torchvision's Resize and CenterCrop do.

    Raises:
        DecodeError: an image so long that its resized form would be absurdly large.
    """
    rows, columns = image.shape[:2]
    high, wide = ((2 * side * 256 + 224) // (2 * 224) for side in (height, width))
    if rows * wide >= columns * high:
        covering = rows * wide // columns, wide
    else:
        covering = high, columns * high // rows
    if covering[0] * covering[1] > MAX_PIXELS:
        raise DecodeError(
            f"{rows}x{columns} pixels are too long a shape for the geometry dino; use squash or letterbox"
        )
    resized = resize(image, *covering)
    top, left = round((covering[0] - height) / 2), round((covering[1] - width) / 2)
    return np.ascontiguousarray(resized[:, top : top + height, left : left + width])


GEOMETRIES = {"squash": squash, "letterbox": letterbox, "dino": dino}
