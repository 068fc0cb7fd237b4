"""Image files -> arrays at full bit depth: PNG, JPEG, TIFF, WebP, BMP, GIF and PNM, told apart by content.

Pillow parses. What it would do silently is refused or mended: colour of 16 bits cut to 8, samples of a TIFF misread,
damaged PNG data that still inflates, a cut JPEG filled up with grey. Decoding runs in threads and changes no setting of
Pillow. Grey pictures come as one channel however they are stored: what follows is then three times cheaper.
"""

import io
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8, UInt16
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from featstore.errors import DecodeError
from featstore.images import tiff
from featstore.images.content import check_jpeg, check_png, recognise
from featstore.images.decoded import DecodeOptions
from featstore.images.gray import channels_of, collapse, samples
from featstore.images.part import WHOLE, Part
from featstore.images.sizes import MAX_PIXELS

Pixels = Shaped[np.ndarray, "H W"] | Shaped[np.ndarray, "H W 3"]

# Named here, not found by Image.open: that one also tries formats which start programs (EPS), and checks the size
# against a setting of the whole process.
_READERS: dict[str, Callable[[Any], ImageFile.ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "TIFF": TiffImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "PNM": PpmImageFile,
}
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by EXIF orientation
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
_ORIENTATION = 274  # tag of EXIF
SCALED_MARGIN = (
    2  # a JPEG decoded smaller keeps twice the target, or the antialiased resize has too little to work with
)
_OTHER_ORDER = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}


def decode(data: bytes, *, name: str = "", frame: int = 0, options: DecodeOptions | None = None) -> Pixels:
    """The pixels of an image file as (H, W), or as (H, W, 3) in the order red, green, blue.

    uint8, uint16, int32 or float32, as deep as the file; uint32 beyond int32 becomes float32. What is grey is (H, W),
    also where the file keeps it as three equal channels or a palette; 1 bit becomes 0 and 255. Alpha is dropped, not
    composited. EXIF orientation is applied. `frame` counts the pages of a TIFF and the pictures of an animation. `name`
    is put before the reason of an error. Where `options` ask for it, a JPEG comes at 1/2, 1/4 or 1/8 of its size, its
    short side at least twice the larger side of the target.

    Raises:
        DecodeError: with a short reason that quotes nothing from the file.
    """
    try:
        kind = recognise(data)
        if kind not in _READERS:
            raise DecodeError(f"this is a {kind} file and no raster image")
        if kind == "PNG":
            check_png(data)
        elif kind == "JPEG":
            check_jpeg(data)
        with _pillow_errors(kind):
            pixels, orientation = _read(kind, data, frame, target := _scaled_target(kind, options))
            if kind == "JPEG" and _ran_dry(data, pixels, target):
                raise DecodeError("truncated JPEG data: the end of the image is missing")
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise DecodeError("the image has NaN or infinite values")
    except DecodeError as error:
        raise DecodeError(f"{name}: {error}" if name else str(error)) from None
    return np.ascontiguousarray(_UPRIGHT[orientation](pixels) if orientation in _UPRIGHT else pixels)


def list_parts(path: Path) -> list[Part]:
    """Every page of a TIFF, or picture of a GIF, in order; `[WHOLE]` where there is one.

    Raises:
        DecodeError: damaged, or no raster image. OSError: it cannot be read.
    """
    data = path.read_bytes()
    kind = recognise(data)
    if kind not in _READERS:
        raise DecodeError(f"this is a {kind} file and no raster image")
    with _pillow_errors(kind):
        if kind == "TIFF":
            count = _count_pages(data)
        else:
            count = int(getattr(_READERS[kind](io.BytesIO(data)), "n_frames", 1))
    return [Part(frame=frame) for frame in range(count)] if count > 1 else [WHOLE]


def _count_pages(data: bytes) -> int:
    """Pages of a TIFF by its chain of directories, also where Pillow does not read their samples."""
    tags, file = ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8]), io.BytesIO(data)
    seen: set[int] = set()
    while tags.next and tags.next not in seen:  # a damaged chain may run in a circle
        seen.add(tags.next)
        file.seek(tags.next)
        tags.load(file)
    return len(seen)


class _QuietPillow:
    """Keeps warnings of Pillow about odd metadata from showing, or raising, while any thread decodes.

    `warnings.catch_warnings` would restore the filters of one thread over those of another. Here one entry, for
    Pillow's modules alone, stands in front of the list as long as somebody is inside.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters: Any = []
        self._entry: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self._filters = warnings.filters
                self._entry = self._filters[0]

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._entry in self._filters:
                self._filters.remove(self._entry)


_quiet_pillow = _QuietPillow()


@contextmanager
def _pillow_errors(kind: str) -> Iterator[None]:
    """Whatever Pillow meets in bad content becomes a DecodeError, without Pillow's words: they may quote metadata."""
    with _quiet_pillow:
        try:
            yield
        except DecodeError:
            raise
        except Image.DecompressionBombError:
            raise DecodeError(f"the {kind} image has more pixels than Pillow opens") from None
        except Exception as error:  # a dozen types, and a closed list would let one bad file stop a run
            raise DecodeError(f"damaged, truncated or unsupported {kind} data ({type(error).__name__})") from None


def _scaled_target(kind: str, options: DecodeOptions | None) -> int | None:
    """Pixels that both sides must keep if a JPEG may be decoded smaller; None for its full size."""
    if kind != "JPEG" or options is None or options.decode != "scaled" or options.target is None:
        return None
    return SCALED_MARGIN * max(options.target)


def _open(kind: str, data: bytes, frame: int, target: int | None = None) -> ImageFile.ImageFile:
    image = _READERS[kind](io.BytesIO(data))
    if target is not None and image.mode in ("L", "RGB"):  # ink (CMYK) is not linear, and rare
        image.draft(None, (target, target))  # both sides alike, so an orientation applied later changes nothing
    if frame:
        try:
            image.seek(frame)
        except EOFError:
            raise DecodeError(f"the {kind} file has no frame {frame}; frames are counted from 0") from None
    if image.width * image.height > MAX_PIXELS:
        raise DecodeError(f"{image.height}x{image.width} pixels are above the limit of {MAX_PIXELS} for one image")
    return image


def open_header(kind: str, file: io.BufferedIOBase) -> tuple[int, int, int, int]:
    """(height, width, channels, bytes of a sample) of the first picture of a file; nothing is decoded.

    Raises:
        DecodeError: the header is damaged, or of a TIFF that is not read by Pillow.
    """
    with _pillow_errors(kind):
        image = _READERS[kind](file)
        bits = max(image.tag_v2.get(tiff.BITS, (8,))) if isinstance(image, TiffImageFile) else 8
        deep = bits > 8 or _sample_layout(image).find(";16") >= 0
        itemsize = {"I": 4, "F": 4, "1": 2}.get(image.mode, 1 + deep)
        return image.height, image.width, len(image.getbands()), itemsize


def _read(kind: str, data: bytes, frame: int, target: int | None = None) -> tuple[np.ndarray, int]:
    """Pixels as stored, and the orientation that is still to be applied."""
    try:
        image = _open(kind, data, frame, target)
    except SyntaxError:
        wide = tiff.read_wide(data, frame) if kind == "TIFF" else None
        if wide is None:
            raise
        return wide, 1
    if isinstance(image, TiffImageFile):
        tiff.check_strips(image)
    if image.mode in ("RGB", "RGBA", "CMYK"):
        layout, _, order = _sample_layout(image).partition(";16")
        if order:
            pixels = _deep_colour(kind, data, frame, image, layout, "16" + order)
            return collapse(pixels), 1 if kind == "TIFF" else _orientation(image)
    pixels = _array(image)
    if isinstance(image, TiffImageFile):
        return tiff.mend(pixels, image.tag_v2), 1  # Pillow turns a TIFF itself
    return pixels, _orientation(image)


def _orientation(image: ImageFile.ImageFile) -> int:
    return int(image.getexif().get(_ORIENTATION, 1))


def _ran_dry(data: bytes, pixels: np.ndarray, target: int | None) -> bool:
    """Whether a JPEG was cut and closed with an end marker: libjpeg fills the rest with mid-grey, and reports nothing.

    More bits in front of the marker then change the picture, and only then: in a whole image nobody reads them.
    """
    if not (pixels[-1, -8:] == 128).all():
        return False
    end = data.rfind(b"\xff\xd9")
    longer, _ = _read("JPEG", data[:end] + b"\x55" * 64 + data[end:], 0, target)
    return not np.array_equal(longer, pixels)


def _array(image: Image.Image) -> np.ndarray:
    """Load the image; its pixels in the dtype that holds its mode."""
    image.load()
    mode = image.mode
    if mode == "L":
        return samples(image)
    if mode in ("I", "F"):
        return np.array(image)
    if mode in ("RGB", "RGBA"):
        return channels_of(image)
    if mode == "1":
        return np.array(image).astype(np.uint8) * np.uint8(255)
    if mode.startswith("I;16"):
        return samples(image).astype(np.uint16, copy=False)  # also from the other byte order
    if mode in ("P", "PA"):
        return _palette_colours(image)
    if mode == "La":  # grey multiplied by alpha
        return np.array(image.convert("LA"))[..., 0]
    if mode == "LA":
        return np.array(image)[..., 0]
    if mode in ("CMYK", "YCbCr"):
        return channels_of(image.convert("RGB"))
    raise DecodeError(f"pixels of mode {mode} are not read; store them as grey or RGB")


def _palette_colours(image: Image.Image) -> UInt8[np.ndarray, "H W"] | UInt8[np.ndarray, "H W 3"]:
    index = np.array(image.getchannel(0))
    palette = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    colours = np.zeros((256, 3), np.uint8)  # indices beyond the palette are black
    colours[: len(palette)] = palette
    gray = bool((palette == palette[:, :1]).all())
    pixels: np.ndarray = (colours[:, 0] if gray else colours)[index]
    return collapse(pixels)  # a palette may hold colours that no pixel has


def _sample_layout(image: ImageFile.ImageFile) -> str:
    """How the file lays out its samples, in Pillow's words: `RGB`, or `RGB;16B` for 16 bits, high byte first."""
    codec, _, _, arguments = image.tile[0] if image.tile else ("", None, 0, "")
    layout = str(arguments[0] if isinstance(arguments, tuple) else arguments)
    deep_pnm = codec.startswith("ppm") and isinstance(arguments, tuple) and int(arguments[1]) > 255
    return f"{layout};16 in PNM" if deep_pnm else layout


def _deep_colour(
    kind: str, data: bytes, frame: int, image: ImageFile.ImageFile, layout: str, order: str
) -> UInt16[np.ndarray, "H W"] | UInt16[np.ndarray, "H W 3"]:
    """16-bit colour, of which Pillow keeps the high bytes; a second pass in the other byte order gives the low ones."""
    if layout == "LA":  # a PNG whose four bytes per pixel also pass for 8-bit RGBA: high, low, alpha, alpha
        header = data[12:24] + b"\x08\x06" + data[26:29]
        image = _open(kind, data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:], frame)
        image.load()
        both = np.array(image)
        return _join(both[..., 0], both[..., 1])
    if layout not in ("RGB", "RGBA", "RGBX") or order not in _OTHER_ORDER:
        raise DecodeError(
            f"16-bit samples as {layout} in {kind} are not read; store them as grey, or as RGB in PNG or TIFF"
        )
    low = _open(kind, data, frame)
    low.tile = [tile._replace(args=_in_other_order(tile.args, order)) for tile in low.tile]
    image.load()
    low.load()
    return _join(np.array(image)[..., :3], np.array(low)[..., :3])


def _join(high: UInt8[np.ndarray, "*shape"], low: UInt8[np.ndarray, "*shape"]) -> UInt16[np.ndarray, "*shape"]:
    joined: np.ndarray = high.astype(np.uint16) << 8 | low
    return joined


def _in_other_order(arguments: Any, order: str) -> Any:
    if isinstance(arguments, tuple):
        return (_in_other_order(arguments[0], order), *arguments[1:])
    return str(arguments).replace(order, _OTHER_ORDER[order])
