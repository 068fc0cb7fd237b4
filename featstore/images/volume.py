"""A volume that knows where the patient's right, front and head are, read slice by slice."""

import threading
from dataclasses import dataclass, fields
from functools import cached_property, partial

import numpy as np
from jaxtyping import Float, Shaped

from featstore.errors import DecodeError
from featstore.images.decoded import Decoded, DecodeOptions
from featstore.images.intensity import percentiles
from featstore.images.part import Part
from featstore.images.sizes import MAX_PIXELS

MAX_VOLUME_BYTES = 2 * 2**30  # of one volume's array; more is refused before memory is taken
_MASKS = {"values"}  # what a part says of a mask, after its pixels are read
_SLICED = {"axial": 2, "coronal": 1, "sagittal": 0}  # the array axis that an axis name counts along


def check_part(part: Part, known: set[str], what: str) -> None:
    """Refuse a part that names what a file of this kind does not have, rather than pass it over.

    Raises:
        DecodeError: it does.
    """
    named = {item.name for item in fields(part) if getattr(part, item.name) is not None}
    if other := named - known - _MASKS:
        raise DecodeError(
            f"{what} has no {', '.join(sorted(other))}; its parts are named by {', '.join(sorted(known))}"
        )


def as_pixels(stored: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Stored samples as pixels: truth values become 0 and 255, integers stay, floats become float32.

    Raises:
        DecodeError: NaN, infinite, or beyond float32.
    """
    if stored.dtype == np.bool_:
        return stored.astype(np.uint8) * np.uint8(255)
    if stored.dtype.kind != "f":
        return stored
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused
        values = stored.astype(np.float32)
    if not np.isfinite(values).all():
        raise DecodeError("the slice has NaN or infinite values")
    return values


@dataclass(frozen=True, kw_only=True, eq=False)
class VolumeHeader:
    """What a file says of its array: `shape` (x, y, z) and `channels` as stored, `dtype` of one sample.

    `affine` (4, 4) takes indices to millimetres to the patient's right, front and head. `interleaved`: the channels of
    a voxel lie side by side; `colour`: they are red, green, blue. Values are stored * `slope` + `intercept`.

    Raises:
        DecodeError: a side below 1, more bytes than are read, samples that are no numbers.
    """

    shape: tuple[int, int, int]
    channels: int
    dtype: np.dtype
    affine: Float[np.ndarray, "4 4"]
    slope: float = 1.0
    intercept: float = 0.0
    interleaved: bool = False
    colour: bool = False

    def __post_init__(self) -> None:
        if min(*self.shape, self.channels) < 1:
            raise DecodeError("the volume has a side without extent")
        if self.dtype.kind not in "iuf" or self.dtype.itemsize > 8:
            raise DecodeError(f"a volume of {self.dtype} samples is not read; store integers or floats")
        if self.num_bytes > MAX_VOLUME_BYTES:
            raise DecodeError(f"the volume takes {self.num_bytes} bytes, above the limit of {MAX_VOLUME_BYTES}")

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        x, y, z = self.shape
        return x * y * z * self.channels * int(self.dtype.itemsize)

    @property
    def scaled(self) -> bool:
        """Whether values are others than the stored ones."""
        return (self.slope, self.intercept) != (1.0, 0.0)

    @cached_property
    def turn(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """(axes, steps): stored axes that become x, y, z of the closest canonical orientation, and -1 where flipped.

        Raises:
            DecodeError: the file does not say where an axis points.
        """
        from nibabel import orientations

        if np.isfinite(self.affine).all():
            try:
                ends = orientations.io_orientation(self.affine)  # type: ignore[no-untyped-call]
            except np.linalg.LinAlgError:
                ends = np.full((3, 2), np.nan)
            if np.isfinite(ends).all():
                axes = np.argsort(ends[:, 0])
                first, second, third = (int(axis) for axis in axes)
                right, front, up = (int(ends[axis, 1]) for axis in axes)
                return (first, second, third), (right, front, up)
        raise DecodeError("the file does not say where its axes point; name orientation=stored to read it as it lies")

    def canonical_shape(self) -> tuple[int, int, int]:
        """(x, y, z) after turning."""
        x, y, z = (self.shape[axis] for axis in self.turn[0])
        return x, y, z

    def parts(self) -> list[Part]:
        """Every axial slice from the feet up, and of each every channel where there are several that are no colour."""
        indices = range(self.canonical_shape()[2])
        if self.channels == 1 or self.colour:
            return [Part(axis="axial", index=index) for index in indices]
        channels = range(self.channels)
        return [Part(axis="axial", index=index, channel=str(channel)) for channel in channels for index in indices]

    def array(self, data: bytes, offset: int) -> Shaped[np.ndarray, "x y z c"]:
        """The samples in `data` from `offset` on, without a copy.

        Raises:
            DecodeError: there are fewer than the header says.
        """
        if offset < 0 or len(data) - offset < self.num_bytes:
            raise DecodeError("truncated volume: there are fewer samples than its header says")
        samples = np.frombuffer(data, self.dtype, count=self.num_bytes // self.dtype.itemsize, offset=offset)
        if self.interleaved:
            return np.moveaxis(samples.reshape((self.channels, *self.shape), order="F"), 0, -1)
        return samples.reshape((*self.shape, self.channels), order="F")


class Volume:
    """The slices of one volume, kept as stored.

    Axial slices count from the feet up and show the patient's front at the top; coronal ones count from back to front
    and sagittal ones from left to right, the head at the top. The patient's right is on the left, his front on the
    left in sagittal slices. With orientation=stored, or along axis 0, 1 or 2, a slice is the array's as it lies: rows
    are the first axis left.
    """

    def __init__(self, header: VolumeHeader, samples: Shaped[np.ndarray, "x y z c"]):
        self._header = header
        self._samples = samples
        self._lock = threading.Lock()
        self._percentiles: dict[tuple[tuple[int, ...], float, float], tuple[float, float]] = {}

    @property
    def num_bytes(self) -> int:
        return self._header.num_bytes

    def pixels(self, part: Part, options: DecodeOptions) -> Decoded:
        channels = self._channels(part)
        values = as_pixels(self._scale(self._slice(part, channels)))
        return Decoded(values, percentiles=partial(self.percentiles, channels))

    def labels(self, part: Part) -> Shaped[np.ndarray, "..."]:
        """A slice as stored, never through another type; float only where the file scales its integers."""
        stored = self._slice(part, self._channels(part))
        return self._scale(stored) if self._header.scaled else stored

    def percentiles(self, channels: tuple[int, ...], low: float, high: float) -> tuple[float, float]:
        """These percentiles of the whole volume, kept once found.

        Raises:
            DecodeError: the volume has NaN or infinite values.
        """
        with self._lock:
            key = channels, low, high
            if key not in self._percentiles:
                stored = self._samples[..., channels[0] if len(channels) == 1 else list(channels)]
                if stored.dtype.kind == "f" and not np.isfinite(stored).all():
                    raise DecodeError("the volume has NaN or infinite values")
                slope, intercept = self._header.slope, self._header.intercept
                ends = (low, high) if slope > 0 else (100 - low, 100 - high)
                first, second = percentiles(stored, *ends)
                self._percentiles[key] = first * slope + intercept, second * slope + intercept
            return self._percentiles[key]

    def close(self) -> None:
        self._samples = self._samples[:0]

    def _channels(self, part: Part) -> tuple[int, ...]:
        check_part(part, {"axis", "index", "channel", "orientation"}, "a volume")
        count = self._header.channels
        channels = part.channels or ((0, 1, 2) if self._header.colour else ())
        if not channels and count == 1:
            channels = (0,)
        if not channels:
            raise DecodeError(f"the volume has {count} channels; name one with channel=, or three for red, green, blue")
        if max(channels) >= count:
            raise DecodeError(f"the volume has no channel {max(channels)}; it has {count}, counted from 0")
        return channels

    def _slice(self, part: Part, channels: tuple[int, ...]) -> np.ndarray:
        named = part.axis in (None, *_SLICED)
        if not named and part.orientation == "canonical":
            raise DecodeError("axes 0, 1 and 2 are those of the array as stored; name axial, coronal or sagittal")
        axis = _SLICED[part.axis or "axial"] if named else int(part.axis or 0)
        samples, turned = self._samples, named and part.orientation != "stored"
        if turned:
            axes, steps = self._header.turn
            samples = samples.transpose(*axes, 3)[tuple(slice(None, None, step) for step in steps)]
        count = samples.shape[axis]
        if part.index is None and count > 1:
            raise DecodeError(f"the volume has {count} slices along this axis; name one with index=")
        if (part.index or 0) >= count:
            raise DecodeError(f"the volume has no slice {part.index} along this axis; it has {count}, counted from 0")
        plane = samples.take(part.index or 0, axis)
        if turned:
            plane = plane.swapaxes(0, 1)[::-1, ::-1]
        if plane.shape[0] * plane.shape[1] > MAX_PIXELS:
            raise DecodeError(f"a slice has more than the limit of {MAX_PIXELS} pixels")
        picked = plane[..., channels[0] if len(channels) == 1 else list(channels)]
        return np.ascontiguousarray(picked, picked.dtype.newbyteorder("="))

    def _scale(self, stored: np.ndarray) -> np.ndarray:
        if not self._header.scaled:
            return stored
        return stored.astype(np.float64) * self._header.slope + self._header.intercept
