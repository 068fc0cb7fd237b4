"""Which axes of an array make a picture, and the slices, channels and labels read from it."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
from jaxtyping import Shaped

from featstore.errors import ConfigError, DecodeError
from featstore.images.decoded import Decoded, DecodeOptions
from featstore.images.intensity import percentiles
from featstore.images.part import Part
from featstore.images.sizes import MAX_PIXELS
from featstore.images.volume import MAX_VOLUME_BYTES, as_pixels, check_part

_LISTED = 20  # keys that an error shows
_MAX_IMPLIED = 16  # channels that an axis is taken for without being named


@dataclass(frozen=True, slots=True)
class Header:
    """Shape and sample type of an array, before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool = False

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * int(self.dtype.itemsize)


@dataclass(slots=True)
class Array:
    """One array of a file: all of it by `load`, or one index of one axis by `slice_` where that is cheaper.

    `outside` marks one whose samples do not lie in the file: it is refused where it is named. `view`: what is loaded
    takes no memory of its own.
    """

    header: Header
    load: Callable[[], np.ndarray]
    slice_: Callable[[int, int], np.ndarray] | None = None
    outside: bool = False
    view: bool = False
    kept: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Whether an array is cut into slices, and how many channels its last axis holds (0: it is no channel axis)."""

    sliced: bool
    channels: int
    colour: bool


@contextmanager
def decode_errors(kind: str) -> Iterator[None]:
    """Whatever a library meets in bad content becomes a DecodeError without its words: they may quote the file.

    Want of memory and errors of the interpreter say nothing of the file and pass.
    """
    try:
        yield
    except (DecodeError, ConfigError, MemoryError, SystemError):
        raise
    except Exception as error:  # a dozen types, and a closed list would let one bad file stop a run
        raise DecodeError(f"damaged, truncated or unsupported {kind} data ({type(error).__name__})") from None


def is_picture(header: Header) -> bool:
    """Whether an array could be an image or a stack of images: numbers on 2 to 4 axes, two of them longer than 1."""
    return _is_numbers(header) and 2 <= len(header.shape) <= 4 and sum(side > 1 for side in header.shape) >= 2


def _is_numbers(header: Header) -> bool:
    return header.dtype.kind in "biuf" and header.dtype.itemsize <= 8


def layout(header: Header, part: Part) -> Layout:
    """How a part reads an array: (H, W), (H, W, C), (slices, H, W) or (slices, H, W, C).

    Three axes are a picture in colour where the last is 3 or 4 long and no slice is named, of 8 bits or with sides of
    at least 8 and more than 4 times the last axis; and a picture with channels where one of them is named and no slice
    is. Four axes without a named channel must end in channels: at most 16, fewer than the sides of the picture.

    Raises:
        DecodeError: other axes or samples, or axes whose meaning is not clear.
    """
    shape = header.shape
    if not _is_numbers(header) or not 2 <= len(shape) <= 4 or not prod(shape):
        raise DecodeError("the array is no image: it must have 2 to 4 axes with extent, of numbers or truth values")
    sides = shape[-3:-1]
    colour = shape[-1] in (3, 4) and (header.dtype == np.uint8 or min(sides) >= max(8, 4 * shape[-1] + 1))
    if len(shape) == 4 and part.channel is None and not colour and not shape[-1] <= min(*sides, _MAX_IMPLIED):
        raise DecodeError(
            f"an array of 4 axes is read as slices, height, width, channels, and {shape[-1]} channels of "
            f"{sides[0]}x{sides[1]} pixels are not clear: name axis= and index= of the slice and channel="
        )
    whole = part.index is None and part.axis is None
    if len(shape) == 4 or (len(shape) == 3 and whole and (colour or shape[-1] == 1 or part.channel is not None)):
        return Layout(len(shape) == 4, shape[-1], colour)
    return Layout(len(shape) == 3, 0, False)


class ArrayFile:
    """The arrays of one file by their keys."""

    def __init__(self, arrays: Mapping[str, Array], *, close: Callable[[], None] | None = None, held: int = 0):
        self._arrays = dict(arrays)
        self._close = close
        self._held = held
        self._lock = threading.Lock()
        self._percentiles: dict[tuple[str, tuple[int, ...], float, float], tuple[float, float]] = {}

    @property
    def num_bytes(self) -> int:
        arrays = list(self._arrays.values())
        return self._held + sum(array.header.num_bytes for array in arrays if array.kept is not None and not array.view)

    def header(self, key: str | None) -> Header:
        """Shape and type of the array of this key, or of the only one that could be an image."""
        return self._arrays[self._key(key)].header

    def pixels(self, part: Part, options: DecodeOptions) -> Decoded:
        key, shape, channels, values = self._read(part)
        pixels = as_pixels(values)
        return Decoded(pixels, percentiles=partial(self._over_all, key, channels) if shape.sliced else None)

    def labels(self, part: Part) -> Shaped[np.ndarray, "..."]:
        """A picture or slice as stored, never through another type."""
        return self._read(part)[3]

    def close(self) -> None:
        with self._lock:
            self._arrays.clear()
            if self._close is not None:
                self._close()

    def _key(self, key: str | None) -> str:
        if key is not None:
            name = key.strip("/")
            if name not in self._arrays:
                raise DecodeError(f"the file has no array of the key named; it has {self._listed(self._arrays)}")
            if self._arrays[name].outside:
                raise DecodeError("the array named is a link, or its samples lie in another file; name an array itself")
            return name
        found = [name for name, array in self._arrays.items() if not array.outside and is_picture(array.header)]
        if len(found) != 1:
            why = "no array that could be an image" if not found else "several arrays that could be an image"
            raise DecodeError(f"the file has {why}; name one with key=: {self._listed(found or self._arrays)}")
        return found[0]

    @staticmethod
    def _listed(names: Mapping[str, Array] | list[str]) -> str:
        shown = ", ".join(sorted(names)[:_LISTED])
        return f"{shown} and {len(names) - _LISTED} more" if len(names) > _LISTED else shown or "none"

    def _read(self, part: Part) -> tuple[str, Layout, tuple[int, ...], np.ndarray]:
        check_part(part, {"axis", "index", "channel", "key", "orientation"}, "an array")
        if part.axis not in (None, "0", "1", "2") or part.orientation == "canonical":
            raise DecodeError("an array has no orientation; count its slices along axis 0, 1 or 2")
        key = self._key(part.key)
        array = self._arrays[key]
        shape = layout(array.header, part)
        channels = _channels(shape, part)
        values = self._plane(array, shape, part)
        if shape.channels:
            values = values[..., channels[0] if len(channels) == 1 else list(channels)]
        return key, shape, channels, np.ascontiguousarray(values, values.dtype.newbyteorder("="))

    def _plane(self, array: Array, shape: Layout, part: Part) -> np.ndarray:
        axis, sides = int(part.axis or 0), array.header.shape
        if not shape.sliced:
            if part.index or part.axis:
                raise DecodeError("the array is one picture; leave index and axis out")
            _check_pixels(sides[:2])
            return self._all(array)
        count = sides[axis]
        if part.index is None and count > 1:
            raise DecodeError(f"the array has {count} slices along this axis; name one with index=")
        if (part.index or 0) >= count:
            raise DecodeError(f"the array has no slice {part.index} along this axis; it has {count}, counted from 0")
        _check_pixels([side for at, side in enumerate(sides[:3]) if at != axis])
        if array.slice_ is None or array.kept is not None:
            held: np.ndarray = self._all(array).take(part.index or 0, axis)
            return held
        with self._lock:
            return array.slice_(axis, part.index or 0)

    def _all(self, array: Array) -> np.ndarray:
        with self._lock:
            if array.kept is not None:
                return array.kept
            if array.header.num_bytes > MAX_VOLUME_BYTES:
                raise DecodeError(
                    f"the array takes {array.header.num_bytes} bytes, above the limit of {MAX_VOLUME_BYTES}"
                )
            values = array.load()
            if array.slice_ is None:  # what can be read again piece by piece is not kept
                array.kept = values
            return values

    def _over_all(self, key: str, channels: tuple[int, ...], low: float, high: float) -> tuple[float, float]:
        """These percentiles of all slices together, kept once found."""
        place = key, channels, low, high
        if place not in self._percentiles:
            values = self._all(self._arrays[key])
            if channels:
                values = values[..., channels[0] if len(channels) == 1 else list(channels)]
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise DecodeError("the array has NaN or infinite values")
            scale = 255.0 if values.dtype == np.bool_ else 1.0
            ends = percentiles(values.view(np.uint8) if values.dtype == np.bool_ else values, low, high)
            self._percentiles[place] = ends[0] * scale, ends[1] * scale
        return self._percentiles[place]


def _channels(shape: Layout, part: Part) -> tuple[int, ...]:
    if not shape.channels:
        if part.channels:
            raise DecodeError("the array has no axis of channels; leave channel out")
        return ()
    channels = part.channels or ((0, 1, 2) if shape.colour else (0,) if shape.channels == 1 else ())
    if not channels:
        raise DecodeError(
            f"the array has {shape.channels} channels; name one with channel=, or three for red, green, blue"
        )
    if max(channels) >= shape.channels:
        raise DecodeError(f"the array has no channel {max(channels)}; it has {shape.channels}, counted from 0")
    return channels


def _check_pixels(sides: tuple[int, ...] | list[int]) -> None:
    if prod(sides) > MAX_PIXELS:
        raise DecodeError(f"a picture has more than the limit of {MAX_PIXELS} pixels")
