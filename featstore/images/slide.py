"""Whole slides: tiles at a level or at micrometres a pixel, and where there is tissue, read in place.

OpenSlide reads pyramids (TIFF of the scanners and of ASAP, SVS, NDPI, MRXS, ...); what it does not know is read by
tifffile (tiled TIFF without JPEG) or, as a picture that is decoded once, by Pillow (slides that were stored as JPEG).
"""

import weakref
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt8

from featstore.errors import DecodeError
from featstore.images.decoded import Decoded, DecodeOptions
from featstore.images.part import Part
from featstore.images.sizes import MAX_PIXELS

MAX_PICTURE = 2**31  # pixels of a slide that is one JPEG or PNG: 6 GiB while it is decoded
WHITE = 255
STRIP = 2**24  # pixels that are read at a time where only a smaller picture of them is kept


@dataclass(frozen=True, slots=True)
class SlideFacts:
    """Width and height in pixels of the finest level, micrometres a pixel (None if not stated), and downsampling of
    every level, the first being 1."""

    width: int
    height: int
    mpp: float | None
    downsamples: tuple[float, ...]


@runtime_checkable
class _Pyramid(Protocol):
    """A reader of slides; `region` is (height, width, 3) at a level, from x, y of level 0.

    `beyond` is the value of all channels beyond the edges and where there is no scan.
    """

    facts: SlideFacts

    def region(self, x: int, y: int, level: int, width: int, height: int, *, beyond: int = WHITE) -> np.ndarray: ...

    def close(self) -> None: ...


class SlideFile:
    """An open slide; `pixels` may be called by several threads."""

    def __init__(self, pyramid: _Pyramid):
        self._pyramid = pyramid
        self.facts = pyramid.facts

    @property
    def num_bytes(self) -> int:
        picture = getattr(self._pyramid, "num_bytes", 0)
        return 64 * 2**20 + int(picture)  # what OpenSlide caches, or the decoded picture

    def pixels(self, part: Part, options: DecodeOptions) -> Decoded:
        """The tile as uint8 (height, width, 3); what lies beyond the slide is white.

        Raises:
            DecodeError: no tile, one that begins outside of the slide, no such level, an `mpp` where the slide does
                not state its own, or damaged data.
        """
        x, y, width, height = self._tile(part)
        if part.scale is None and part.mpp is None:
            return Decoded(self._pyramid.region(x, y, self._level(part), width, height))
        return Decoded(self._scaled(x, y, width, height, self._scale(part)))

    def labels(self, part: Part) -> UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]:
        """The tile of a slide that is a mask: values as stored, 0 beyond the edges.

        They are those of the level asked for where the tile begins with one of its pixels, else those of the finest
        level under the centre of each pixel. One channel where all three are equal.

        Raises:
            DecodeError: as `pixels`.
        """
        x, y, width, height = self._tile(part)
        scale = self._scale(part)
        # A level only as it is, from where its pixels begin: coarser ones may hold means, and between pixels OpenSlide
        # mixes neighbours.
        level = next(
            (
                at
                for at, down in enumerate(self.facts.downsamples)
                if down == scale and down.is_integer() and x % down == y % down == 0
            ),
            0,
        )
        down = self.facts.downsamples[level]
        columns, rows = (((np.arange(side) + 0.5) * (scale / down)).astype(np.int64) for side in (width, height))
        tile = np.zeros((height, width, 3), np.uint8)
        step = max(1, int(STRIP / ((columns[-1] + 1) * max(1.0, scale / down))))
        for top in range(0, height, step):
            taken = rows[top : top + step]
            start = y + int(taken[0]) * int(down)
            strip = self._pyramid.region(x, start, level, int(columns[-1]) + 1, int(taken[-1] - taken[0]) + 1, beyond=0)
            tile[top : top + step] = strip[taken - taken[0]][:, columns]
        return np.ascontiguousarray(tile[..., 0]) if (tile == tile[..., :1]).all() else tile

    def _tile(self, part: Part) -> tuple[int, int, int, int]:
        """x, y, width, height."""
        if part.x is None or part.y is None or part.width is None or part.height is None:
            raise DecodeError("a slide is read in tiles: x, y, width and height must be given")
        if not (0 <= part.x < self.facts.width and 0 <= part.y < self.facts.height):
            raise DecodeError(f"the tile at {part.x}, {part.y} begins outside of the slide")
        if part.width * part.height > MAX_PIXELS:
            raise DecodeError(f"a tile of {part.height}x{part.width} pixels is above the limit of {MAX_PIXELS}")
        return part.x, part.y, part.width, part.height

    def _level(self, part: Part) -> int:
        level, count = part.level or 0, len(self.facts.downsamples)
        if level >= count:
            raise DecodeError(f"the slide has {count} levels, counted from 0; there is no {level}")
        return level

    def _scale(self, part: Part) -> float:
        """Pixels of level 0 to one pixel of the tile."""
        if part.scale is not None:
            return part.scale
        if part.mpp is None:
            return self.facts.downsamples[self._level(part)]
        if self.facts.mpp is None:
            raise DecodeError("the slide does not state its micrometres a pixel; tile it by level, or give its own mpp")
        return part.mpp / self.facts.mpp

    def _scaled(self, x: int, y: int, width: int, height: int, scale: float) -> UInt8[np.ndarray, "h w 3"]:
        """`width` x `height` pixels, each as large as `scale` pixels of level 0, from the level next finer."""
        level, factor = self._next_finer(scale)
        wide, high = max(1, round(width * factor)), max(1, round(height * factor))
        if wide * high > MAX_PIXELS:
            raise DecodeError(
                f"a tile of {height}x{width} pixels at this mpp takes {high}x{wide} of the slide, above the limit of "
                f"{MAX_PIXELS}"
            )
        region = self._pyramid.region(x, y, level, wide, high)
        if (wide, high) == (width, height):
            return region
        from featstore.images.resize import resize

        return np.ascontiguousarray(resize(region, height, width).transpose(1, 2, 0))

    def _next_finer(self, scale: float) -> tuple[int, float]:
        """(level, its pixels to one of `scale`)."""
        downsamples = self.facts.downsamples
        level = max((at for at, down in enumerate(downsamples) if down <= scale * 1.001), default=0)
        return level, scale / downsamples[level]

    def thumbnail(self, longest: int) -> UInt8[np.ndarray, "h w 3"]:
        """The whole slide with its longer side at most `longest` pixels.

        Raises:
            DecodeError: damaged data.
        """
        facts = self.facts
        scale = max(1.0, max(facts.width, facts.height) / longest)
        width, height = max(1, int(facts.width / scale)), max(1, int(facts.height / scale))
        level, factor = self._next_finer(scale)
        if width * factor * height * factor <= min(STRIP, MAX_PIXELS) or factor < 2:
            return self._scaled(0, 0, width, height, scale)
        from featstore.images.resize import resize

        means = self._means(level, round(width * factor), round(height * factor), int(factor))
        return np.ascontiguousarray(resize(means, height, width).transpose(1, 2, 0))

    def _means(self, level: int, width: int, height: int, side: int) -> UInt8[np.ndarray, "h w 3"]:
        """Means of blocks of `side` x `side` pixels of a level, read in strips; a rest at the far edges is left out."""
        rows, columns = max(1, height // side), max(1, width // side)
        means = np.empty((rows, columns, 3), np.uint8)
        step = max(1, STRIP // (columns * side * side))
        for top in range(0, rows, step):
            count = min(step, rows - top)
            start = round(top * side * self.facts.downsamples[level])
            strip = self._pyramid.region(0, start, level, columns * side, count * side)
            sums = strip.reshape(count, side, columns * side, 3).sum(1, dtype=np.uint32)
            sums = sums.reshape(count, columns, side, 3).sum(2, dtype=np.uint32)
            means[top : top + count] = (sums + side * side // 2) // (side * side)
        return means

    def close(self) -> None:
        self._pyramid.close()


class _OpenSlide:
    def __init__(self, slide: Any):
        self._slide = slide
        # A slide that is given up while another thread reads it is closed when that one lets go.
        self._finish = weakref.finalize(self, slide.close)
        width, height = slide.dimensions
        mpp = slide.properties.get("openslide.mpp-x")
        self.facts = SlideFacts(width, height, _positive(mpp), tuple(float(down) for down in slide.level_downsamples))

    def region(self, x: int, y: int, level: int, width: int, height: int, *, beyond: int = WHITE) -> np.ndarray:
        import openslide

        try:
            rgba = np.asarray(self._slide.read_region((x, y), level, (width, height)))
        except openslide.OpenSlideError as error:
            raise DecodeError(f"damaged slide ({type(error).__name__})") from None
        alpha = rgba[..., 3:].astype(np.uint16)
        if (alpha == WHITE).all():
            return np.ascontiguousarray(rgba[..., :3])
        if not beyond:  # values of a mask, that are never mixed
            return np.where(alpha == WHITE, rgba[..., :3], np.uint8(0))
        # Where there is no scan, the background of a slide is white.
        return (rgba[..., :3].astype(np.uint16) * alpha // WHITE + (WHITE - alpha)).astype(np.uint8)

    def close(self) -> None:
        self._finish()


class _Tiff:
    """A TIFF that OpenSlide does not take (no tiles, odd samples); its levels are read whole."""

    def __init__(self, file: Any):
        page = file.pages[0]
        series = file.series[0]
        if sum(level.size for level in series.levels) > 3 * MAX_PICTURE:
            raise DecodeError("the slide is too large to be read without OpenSlide")
        self._levels = [level.asarray() for level in series.levels]
        if any(level.dtype != np.uint8 or level.ndim not in (2, 3) for level in self._levels):
            raise DecodeError("a slide must have 8-bit grey or RGB pixels")
        height, width = self._levels[0].shape[:2]
        downs = tuple(width / level.shape[1] for level in self._levels)
        self.facts = SlideFacts(width, height, _tiff_mpp(page), downs)
        self.num_bytes = sum(level.nbytes for level in self._levels)

    def region(self, x: int, y: int, level: int, width: int, height: int, *, beyond: int = WHITE) -> np.ndarray:
        down = self.facts.downsamples[level]
        return _cut(self._levels[level], int(x / down), int(y / down), (width, height), beyond)

    def close(self) -> None:
        self._levels = []


class _Picture:
    def __init__(self, pixels: np.ndarray):
        self._pixels = pixels
        self.facts = SlideFacts(pixels.shape[1], pixels.shape[0], None, (1.0,))
        self.num_bytes = pixels.nbytes

    def region(self, x: int, y: int, level: int, width: int, height: int, *, beyond: int = WHITE) -> np.ndarray:
        return _cut(self._pixels, x, y, (width, height), beyond)

    def close(self) -> None:
        self._pixels = self._pixels[:0]


def _cut(pixels: np.ndarray, x: int, y: int, size: tuple[int, int], beyond: int) -> UInt8[np.ndarray, "h w 3"]:
    """A window (width, height) of (H, W, 3) or (H, W)."""
    width, height = size
    window = pixels[y : y + height, x : x + width]
    if window.ndim == 2:
        window = np.repeat(window[..., None], 3, axis=2)
    result = np.full((height, width, 3), beyond, np.uint8)
    result[: window.shape[0], : window.shape[1]] = window[..., :3]
    return result


def _positive(text: Any) -> float | None:
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < float("inf") else None


def _tiff_mpp(page: Any) -> float | None:
    """Micrometres a pixel from the resolution tags, where their unit is an inch or a centimetre."""
    unit = {2: 25400.0, 3: 10000.0}.get(int(page.tags["ResolutionUnit"].value) if "ResolutionUnit" in page.tags else 0)
    if unit is None or "XResolution" not in page.tags:
        return None
    pixels, per = page.tags["XResolution"].value
    density = _positive(pixels / per if per else None)
    # 72 or 96 a inch is what programs write who know nothing of it.
    return None if density is None or density < 1000 else unit / density


def open_slide(path: Path) -> SlideFile:
    """Open a slide by the first reader that knows it.

    Raises:
        DecodeError: none does, or the extra is not installed. OSError: the file cannot be read.
    """
    try:
        import openslide
        import tifffile
    except ImportError as error:
        raise DecodeError("whole slides need OpenSlide and tifffile: pip install 'featstore[slides]'") from error
    with path.open("rb") as file:
        head = file.read(16)
    try:
        if openslide.OpenSlide.detect_format(path) is not None:
            return SlideFile(_OpenSlide(openslide.OpenSlide(path)))
    except (openslide.OpenSlideError, OSError) as error:
        raise DecodeError(f"damaged slide ({type(error).__name__})") from None
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        try:
            with tifffile.TiffFile(path) as tiff:
                return SlideFile(_Tiff(tiff))
        except DecodeError:
            raise
        except (tifffile.TiffFileError, ValueError, LookupError, RuntimeError, TypeError, OSError, zlib.error) as error:
            raise DecodeError(f"this TIFF slide cannot be read ({type(error).__name__})") from None
    return SlideFile(_Picture(_decode_picture(path)))


def _decode_picture(path: Path) -> np.ndarray:
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile

    with path.open("rb") as file:
        reader = {b"\xff\xd8": JpegImageFile, b"\x89P": PngImageFile}.get(file.read(2))
        if reader is None:
            raise DecodeError("not a slide of a known kind (what OpenSlide reads, TIFF, JPEG, PNG)")
        file.seek(0)
        try:
            image = reader(file)
            if image.width * image.height > MAX_PICTURE:
                raise DecodeError(
                    f"{image.height}x{image.width} pixels are above the limit of {MAX_PICTURE} for a slide"
                )
            if image.mode.startswith(("I", "F")):  # 16 or 32 bits, which RGB would clip
                raise DecodeError("a slide must have 8-bit grey or RGB pixels")
            pixels = np.asarray(image.convert("RGB"))
        except DecodeError:
            raise
        except (OSError, ValueError, SyntaxError) as error:
            raise DecodeError(f"damaged slide ({type(error).__name__})") from None
    return pixels


def tissue_mask(
    thumbnail: UInt8[np.ndarray, "h w 3"], *, saturation: int = 8, smooth: int = 7, close: int = 4
) -> Bool[np.ndarray, "h w"]:
    """Where a slide shows tissue: colour saturation (0 to 255) above a threshold, median filtered, holes closed.

    The steps and numbers are the defaults of CLAM (Lu et al. 2021): threshold 8, median over 7 pixels, closing with 4.
    """
    from scipy import ndimage

    high, low = thumbnail.max(2).astype(np.int32), thumbnail.min(2).astype(np.int32)
    saturated = np.where(high > 0, (high - low) * 255 // np.maximum(high, 1), 0).astype(np.uint8)
    mask = ndimage.median_filter(saturated, size=smooth) > saturation
    return np.asarray(ndimage.binary_closing(np.pad(mask, close), np.ones((close, close), bool)))[
        close : close + mask.shape[0], close : close + mask.shape[1]
    ]


def tissue_tiles(
    slide: SlideFile, *, tile: int, scale: float, min_tissue: float = 0.25, longest: int = 2048
) -> list[tuple[int, int]]:
    """(x, y) in pixels of level 0 of the tiles without overlap that show tissue, row by row.

    A tile is `tile` x `tile` pixels as read, `scale` pixels of level 0 to each. Kept are those that lie inside the
    slide and whose share of tissue on a thumbnail of `longest` pixels is at least `min_tissue`.
    """
    facts = slide.facts
    mask = tissue_mask(slide.thumbnail(longest))
    shrink_x, shrink_y = mask.shape[1] / facts.width, mask.shape[0] / facts.height
    side = round(tile * scale)
    # Sums over any rectangle of the mask in four look-ups.
    sums = np.pad(mask.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
    kept = []
    for y in range(0, facts.height - side + 1, side):
        top, bottom = int(y * shrink_y), max(int(y * shrink_y) + 1, int((y + side) * shrink_y))
        for x in range(0, facts.width - side + 1, side):
            left, right = int(x * shrink_x), max(int(x * shrink_x) + 1, int((x + side) * shrink_x))
            inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
            if inside >= min_tissue * (bottom - top) * (right - left):
                kept.append((x, y))
    return kept
