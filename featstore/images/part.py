"""Which part of a file a sample is: a frame, a slice of a volume, a tile of a slide; written as one short text.

A manifest keeps it in the columns `part` and `mask_part`: `frame=3`, `axis=axial&index=12`, `x=512&y=0&width=224&...`.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal, get_args
from urllib.parse import quote, unquote

from featstore.errors import ManifestError

Axis = Literal["axial", "coronal", "sagittal", "0", "1", "2"]
Orientation = Literal["canonical", "stored"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of a file; what is not given is None, and `Part()` is the whole file (its first frame).

    `frame` counts pages, frames of a DICOM file or pictures of a video, from 0. `index` counts slices along `axis`
    ("axial" where a volume has an orientation, else "0"); with `orientation` "stored" nothing is turned. `channel` is
    one number, or three for red, green, blue: "0" or "1,2,3". `key` names a data set of HDF5 or MATLAB, or a member of
    .npz. `x`, `y` are the upper left corner of a tile in pixels of the slide's finest level, `width`, `height` its
    size in pixels as read at `level`, at `scale` pixels of the finest level to one, or at `mpp` micrometres a pixel.
    `values` belongs to masks: `7` makes class 7 of everything that is not 0, `255:1,128:2` maps, numbers it does not
    name become 0; with colours (`ff0000:1,ffffff:0`) all but black must be named. `draw` names what is drawn from a
    file of outlines (see `featstore.images.masks`).

    Raises:
        ManifestError: values that cannot be.
    """

    frame: int | None = None
    axis: Axis | None = None
    index: int | None = None
    channel: str | None = None
    orientation: Orientation | None = None
    key: str | None = None
    x: int | None = None
    y: int | None = None
    width: int | None = None
    height: int | None = None
    level: int | None = None
    mpp: float | None = None
    scale: float | None = None
    values: str | None = None
    draw: str | None = None

    def __post_init__(self) -> None:
        for name in ("frame", "index", "level"):
            if (number := getattr(self, name)) is not None and number < 0:
                raise ManifestError(f"part: {name} counts from 0, got {number}")
        if self.axis not in (None, *get_args(Axis)) or self.orientation not in (None, *get_args(Orientation)):
            raise ManifestError(
                f"part: axis is one of {', '.join(get_args(Axis))} and orientation one of "
                f"{', '.join(get_args(Orientation))}, got {self.axis!r} and {self.orientation!r}"
            )
        tile = (self.x, self.y, self.width, self.height)
        if any(side is not None for side in tile) and (None in tile or min(self.width or 0, self.height or 0) < 1):
            raise ManifestError(f"part: a tile has x, y, width and height (at least 1 pixel), got {tile}")
        sizes = [size for size in (self.mpp, self.scale) if size is not None]
        if len(sizes) + (self.level is not None) > 1 or not all(0 < size < math.inf for size in sizes):
            raise ManifestError(
                f"part: mpp and scale are above 0, and only one of level, mpp and scale is given; got {self.level}, "
                f"{self.mpp}, {self.scale}"
            )
        if self.channel is not None and not _is_channels(self.channel):
            raise ManifestError(f"part: channel is one number, or three such as 1,2,3; got {self.channel!r}")

    @property
    def is_tile(self) -> bool:
        """Whether it is a tile of a slide."""
        return self.x is not None

    @property
    def channels(self) -> tuple[int, ...]:
        """The channel or channels as numbers; empty where none is named."""
        return () if self.channel is None else tuple(int(text) for text in self.channel.split(","))

    def __str__(self) -> str:
        given = ((item.name, getattr(self, item.name)) for item in fields(self))
        return "&".join(f"{name}={quote(str(value), safe='/:,.+ -')}" for name, value in given if value is not None)


WHOLE = Part()
_READ: dict[str, type] = dict.fromkeys(("frame", "index", "x", "y", "width", "height", "level"), int) | {
    "mpp": float,
    "scale": float,
}
_NAMES = tuple(item.name for item in fields(Part))


def _is_channels(text: str) -> bool:
    parts = text.split(",")
    return len(parts) in (1, 3) and all(part.isascii() and part.isdigit() for part in parts)


@lru_cache(maxsize=4096)
def parse_part(text: str | None) -> Part:
    """The `Part` that a manifest's text names; null and "" are the whole file.

    Raises:
        ManifestError: an unknown name, a name given twice, or a value that cannot be.
    """
    if not text:
        return WHOLE
    values: dict[str, int | float | str] = {}
    for piece in text.split("&"):
        name, equals, value = piece.partition("=")
        if not equals or name not in _NAMES or name in values:
            raise ManifestError(f"part {text!r}: NAME=VALUE joined by &, each name once of {', '.join(_NAMES)}")
        try:
            values[name] = _READ.get(name, str)(unquote(value))
        except ValueError:
            raise ManifestError(f"part {text!r}: {name} must be a number") from None
    return Part(**values)  # type: ignore[arg-type]
