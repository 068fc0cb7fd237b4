"""What Pillow leaves undone in a TIFF: samples taken for others, and the 64-bit samples that scientific tools write."""

import io

import numpy as np
from jaxtyping import Float32, Shaped
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from featstore.errors import DecodeError
from featstore.images.sizes import MAX_PIXELS

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIPS = 256, 257, 258, 259, 262, 273  # tags of TIFF 6.0
SAMPLES, STRIP_BYTES, TILE_WIDTH, SAMPLE_FORMAT = 277, 279, 322, 339
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3  # sample formats


def check_strips(image: TiffImageFile) -> None:
    """An image not loaded yet must have strips or tiles down to its last row; Pillow would leave the rest black.

    Raises:
        DecodeError: it has fewer.
    """
    if max((extents[3] for _, extents, _, _ in image.tile if extents), default=0) < image.tag_v2[HEIGHT]:
        raise DecodeError("truncated TIFF data: strips are missing")


def mend(pixels: Shaped[np.ndarray, "*shape"], tags: ImageFileDirectory_v2) -> Shaped[np.ndarray, "*shape"]:
    """Signed 8 bits, unsigned 32 bits, and white as zero beyond 8 bits, as they are meant.

    Raises:
        DecodeError: white is zero in signed or float samples, where no value is white.
    """
    bits, sample_format = tags.get(BITS, (1,))[0], tags.get(SAMPLE_FORMAT, (_UNSIGNED,))[0]
    if sample_format == _SIGNED and bits == 8 and pixels.dtype == np.uint8:
        return pixels.view(np.int8).astype(np.int32)
    if sample_format == _UNSIGNED and bits == 32 and pixels.dtype == np.int32 and (pixels < 0).any():
        return pixels.view(np.uint32).astype(np.float32)
    if tags.get(PHOTOMETRIC) != 0 or bits <= 8:
        return pixels
    if pixels.dtype != np.uint16:
        raise DecodeError("a TIFF whose white is zero has signed or float samples; store it with black as zero")
    positive: np.ndarray = np.uint16(2**bits - 1) - pixels
    return positive


def read_wide(data: bytes, frame: int) -> Float32[np.ndarray, "H W"] | None:
    """One channel of uncompressed 64-bit samples in strips, rounded to float32; None for any other TIFF."""
    tags, file = ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8]), io.BytesIO(data)
    for _ in range(frame + 1):
        file.seek(tags.next)
        tags.load(file)
    if tags.get(BITS) != (64,) or tags.get(COMPRESSION, 1) != 1 or tags.get(SAMPLES, 1) != 1 or TILE_WIDTH in tags:
        return None
    height, width = tags[HEIGHT], tags[WIDTH]
    if height * width > MAX_PIXELS or tags.get(PHOTOMETRIC) != 1:
        return None
    kind = {_UNSIGNED: "u8", _SIGNED: "i8", _FLOAT: "f8"}[tags.get(SAMPLE_FORMAT, (_UNSIGNED,))[0]]
    strips = b"".join(data[at : at + size] for at, size in zip(tags[STRIPS], tags[STRIP_BYTES], strict=True))
    samples = np.frombuffer(strips, ("<" if data[:2] == b"II" else ">") + kind, count=height * width)
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which is refused
        return samples.astype(np.float32).reshape(height, width)
