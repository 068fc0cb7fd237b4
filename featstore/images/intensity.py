"""Values of any depth -> values in [0, 255]: the step between decoding and geometry.

An intensity is a short text of steps joined by "+": the first maps the file's values, the others work on what it made
of them. `parse_intensity` reads it, its canonical form is part of a set's fingerprint.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from featstore.errors import ConfigError, DecodeError
from featstore.images.decoded import Decoded
from featstore.images.equalise import clahe, equalise

Bytes = UInt8[np.ndarray, "*shape"] | Float32[np.ndarray, "*shape"]
Values = Shaped[np.ndarray, "*shape"]

# (value that becomes black, value that becomes white): centre - width / 2 to centre + width / 2, in Hounsfield units
WINDOWS: dict[str, tuple[float, float]] = {
    "lung": (-1350, 150),  # -600/1500
    "mediastinum": (-160, 240),  # 40/400
    "bone": (-500, 1300),  # 400/1800
    "brain": (0, 80),  # 40/80
    "abdomen": (-140, 260),  # 60/400
    "amos": (-1024, 600),  # DINOv2 on radiology, for AMOS
    "ct-clip": (-1000, 1000),  # CT-CLIP, for CT-RATE
}
GRAMMAR: dict[str, str] = {
    "native": "8 bits as they are, a file's own display range (DICOM window), anything else from its minimum to its "
    "maximum; the default",
    "minmax": "the image's minimum becomes 0, its maximum 255, over all channels together",
    "minmax-channels": "the same for each channel of its own",
    "percentile:LOW-HIGH": "clipped to these percentiles of the image, then spread: percentile:1-99",
    "percentile:LOW-HIGH:volume": "percentiles of the whole volume that a slice belongs to; other images fail",
    "window:CENTRE/WIDTH": "values after the modality LUT (Hounsfield units), WIDTH around CENTRE: window:40/400",
    "window:LOW..HIGH": "the same by its ends: window:-160..240",
    "window:NAME": f"a named window: {', '.join(WINDOWS)}",
    "windows:A,B,C": "three windows as red, green, blue: windows:lung,mediastinum,bone; grey images only",
    "bits:N": "0 to 2^N - 1 becomes 0 to 255; bits:16 as torchxrayvision reads 16-bit PNG",
    "bits:stored": "the same by the range that the file states, else that of its type (8 or 16 bits)",
    "brain-c": "clipped at the 95th percentile, 0 at or below the 5th, then minmax (brain tumours, DINOv2 radiology)",
    "equalise": "global histogram equalisation of the rounded grey levels, as OpenCV's equalizeHist; grey images only",
    "clahe[:CLIP/TILES]": "equalisation by tiles with limited contrast, as OpenCV's CLAHE; default 2/8; grey images "
    "only",
}
LATER = ("minmax", "minmax-channels", "percentile", "equalise", "clahe")  # make sense on values in [0, 255]
ROUNDING = ("equalise", "clahe")  # work on whole grey levels
_COUNTED = 2**22  # values counted at a time: a volume is not widened as a whole
NUMBER = r"[-+]?[0-9]{1,9}(?:\.[0-9]{1,6})?"  # ASCII alone; `Step` writes no more decimals
_BEYOND = 1e9  # the ends of a window stay below, so that they are written as a number


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its name, its numbers, and `percentile` of a volume in place of an image. `str` is canonical."""

    name: str
    numbers: tuple[float, ...] = ()
    volume: bool = False

    def __str__(self) -> str:
        texts = [str(int(n)) if n == int(n) else f"{n:.6f}".rstrip("0") for n in self.numbers]
        if self.name in ("window", "windows"):
            pairs = zip(texts[::2], texts[1::2], strict=True)
            return f"{self.name}:{','.join(f'{low}..{high}' for low, high in pairs)}"
        if self.name == "bits":
            return f"bits:{texts[0] if texts else 'stored'}"
        joined = {"percentile": "-", "clahe": "/"}.get(self.name, "").join(texts)
        return self.name + (f":{joined}" if joined else "") + (":volume" if self.volume else "")


@lru_cache(maxsize=256)
def parse_intensity(text: str) -> tuple[Step, ...]:
    """The steps of an intensity; `equalise` alone means `native+equalise`.

    Raises:
        ConfigError: no such step, numbers that cannot be, or an order that makes no sense; it lists the grammar.
    """
    steps = tuple(_parse_step(part.strip()) for part in text.split("+"))
    if steps[0].name in ROUNDING:
        steps = (Step("native"), *steps)
    for step in steps[1:]:
        if step.name not in LATER or step.volume:
            raise ConfigError(
                f"intensity {text!r}: {step} can only come first; after the first step come {', '.join(LATER)}"
            )
    if steps[0].name == "windows" and any(step.name in ROUNDING for step in steps):
        raise ConfigError(
            f"intensity {text!r}: equalise and clahe need grey, three windows make colour; use one window"
        )
    return steps


def canonical_intensity(text: str) -> str:
    """The one spelling of an intensity: equal pixels by equal texts.

    Raises:
        ConfigError: as `parse_intensity`.
    """
    return "+".join(map(str, parse_intensity(text)))


def _parse_step(text: str) -> Step:
    name, _, rest = text.partition(":")
    if text in ("native", "minmax", "minmax-channels", "brain-c", "equalise"):
        return Step(text)
    if text == "clahe":
        return Step("clahe", (2.0, 8.0))
    if text == "bits:stored":
        return Step("bits")
    if name == "bits" and re.fullmatch(r"[0-9]{1,2}", rest) and 1 <= int(rest) <= 32:
        return Step(name, (float(rest),))
    if name == "percentile" and (match := re.fullmatch(rf"({NUMBER})-({NUMBER})(:volume)?", rest)):
        low, high = float(match[1]), float(match[2])
        if 0 <= low < high <= 100:
            return Step(name, (low, high), volume=bool(match[3]))
    if name == "clahe" and (match := re.fullmatch(rf"({NUMBER})/([0-9]{{1,2}})", rest)):
        clip, tiles = float(match[1]), float(match[2])
        if clip >= 0 and tiles >= 1:
            return Step(name, (clip, tiles))
    if name in ("window", "windows"):
        ranges = [_parse_window(part.strip()) for part in rest.split(",")]
        if len(ranges) == (1 if name == "window" else 3):
            return Step(name, tuple(end for found in ranges for end in found))
    raise _no_intensity(text)


def _parse_window(text: str) -> tuple[float, float]:
    if text in WINDOWS:
        low, high = WINDOWS[text]
        return float(low), float(high)
    if match := re.fullmatch(rf"({NUMBER})/({NUMBER})", text):
        centre, width = float(match[1]), float(match[2])
        low, high = round(centre - width / 2, 6), round(centre + width / 2, 6)
    elif match := re.fullmatch(rf"({NUMBER})\.\.({NUMBER})", text):
        low, high = float(match[1]), float(match[2])
    else:
        raise _no_intensity(text)
    if max(abs(low), abs(high)) >= _BEYOND:
        raise ConfigError(f"intensity: the ends of a window lie within 999999999 of 0; got {text!r}")
    if not low < high:
        raise ConfigError(f"intensity: a window needs a width above 0, its low end below its high one; got {text!r}")
    return low, high


def _no_intensity(text: str) -> ConfigError:
    return ConfigError(
        f"intensity must be steps joined by '+' out of {', '.join(GRAMMAR)}; got {text!r} "
        "(`featstore intensities` explains them)"
    )


def to_byte_range(image: Decoded, intensity: str) -> Bytes:
    """The image in [0, 255]: uint8 where it was 8 bits and stays so, or was equalised, else float32.

    Where low values are white they are turned round after the first step, before the later ones.

    Raises:
        DecodeError: what the intensity cannot be done on: colour, an image of no volume, a depth that is not stated.
        ConfigError: as `parse_intensity`.
    """
    first, *later = parse_intensity(intensity)
    if image.pixels.dtype.kind == "f" and not np.isfinite(image.pixels).all():
        raise DecodeError("the image has NaN or infinite values")
    if later and later[0].name in ROUNDING and first.name == "minmax":
        values: np.ndarray = rounded_minmax(image.pixels)
    else:
        values = MAPPINGS[first.name](image, first)
        if later and later[0].name in ROUNDING:
            values = rounded(values)
    if image.invert:
        values = 255 - values
    for step in later:
        if step.name == "equalise":
            values = equalise(as_grey(rounded(values), "equalise"))
        elif step.name == "clahe":
            clip, tiles = step.numbers
            values = clahe(as_grey(rounded(values), "clahe"), clip=clip, tiles=int(tiles))
        else:
            values = MAPPINGS[step.name](Decoded(values), step)
    return values


def as_grey(image: Shaped[np.ndarray, "..."], what: str) -> Shaped[np.ndarray, "H W"]:
    """(H, W) of an image that has no colour: three equal channels are one.

    Raises:
        DecodeError: it has colour.
    """
    if image.ndim == 2:
        return image
    if not (image == image[..., :1]).all():
        raise DecodeError(f"intensity {what} works on grey images, and this one has colour")
    return np.ascontiguousarray(image[..., 0])


def rounded(values: Values) -> UInt8[np.ndarray, "*shape"]:
    """Whole grey levels, halves to the even one."""
    return values if values.dtype == np.uint8 else np.rint(values).clip(0, 255).astype(np.uint8)


def linear(image: Values, low: float, high: float) -> Bytes:
    """`low` becomes 0 and `high` 255, what lies beyond is clipped; 8 bits stay as they are where the range is theirs.

    A range without extent becomes a step: 0 up to `low`, 255 above it.
    """
    if image.dtype == np.uint8 and (low, high) == (0, 255):
        return image
    if not low < high:
        return np.where(image > low, np.float32(255), np.float32(0))
    values: np.ndarray = (image.astype(np.float64) - low) * (255 / (high - low))
    return values.clip(0, 255).astype(np.float32)


def native(image: Decoded) -> Bytes:
    """The range that the file shows; else 8 bits as they are, anything deeper from its minimum to its maximum."""
    if image.display is not None:
        return linear(image.pixels, *image.display)
    return image.pixels if image.pixels.dtype == np.uint8 else minmax(image.pixels)


def minmax(image: Values) -> Float32[np.ndarray, "*shape"]:
    """The image's minimum (over all channels) becomes 0 and its maximum 255; a constant image becomes 0."""
    # float32 holds 8 and 16 bits exactly; beyond that differences need float64, which also holds float32's whole range.
    values: np.ndarray = image.astype(np.float32 if image.dtype.itemsize <= 2 else np.float64)
    low, high = values.min(), values.max()
    if low == high:
        return np.zeros(image.shape, np.float32)
    values -= low
    values *= 255 / (high - low)
    return np.minimum(values.astype(np.float32, copy=False), np.float32(255))  # rounding may step over 255


def rounded_minmax(image: Values) -> UInt8[np.ndarray, "*shape"]:
    """`minmax` in whole levels, in the order of operations of (image - min) / (max - min) and skimage's img_as_ubyte.

    A level that falls on a half goes where theirs goes, and equalisation may make much of one level.
    """
    low, high = image.min(), image.max()
    if low == high:
        return np.zeros(image.shape, np.uint8)
    if _is_short(image):  # few values: a table is five times faster
        steps = np.arange(int(high) - int(low) + 1)
        table: np.ndarray = rounded(steps / (int(high) - int(low)) * 255)
        levels: np.ndarray = table[image.astype(np.int32) - int(low)]
        return levels
    values = image.astype(np.float64) - float(low)
    return rounded(values / (float(high) - float(low)) * 255)


def _is_short(image: Values) -> bool:
    return image.dtype.kind in "ui" and image.dtype.itemsize <= 2


def minmax_channels(image: Values) -> Float32[np.ndarray, "*shape"]:
    """`minmax` of each channel of its own."""
    if image.ndim == 2:
        return minmax(image)
    return np.stack([minmax(image[..., channel]) for channel in range(image.shape[2])], axis=-1)


def percentile(image: Decoded, step: Step) -> Bytes:
    """Clipped to two percentiles (linear between neighbours), then spread.

    Raises:
        DecodeError: percentiles of a volume are asked for, and the image belongs to none.
    """
    low, high = step.numbers
    if not step.volume:
        return linear(image.pixels, *percentiles(image.pixels, low, high))
    if image.percentiles is None:
        raise DecodeError(
            f"intensity {step} needs a slice of a volume, and this image stands alone; "
            f"percentile:{str(step).split(':')[1]} takes the image's own"
        )
    return linear(image.pixels, *image.percentiles(low, high))


def percentiles(image: Values, low: float, high: float) -> tuple[float, float]:
    """Two percentiles over all values, linear between neighbours, as numpy's."""
    if not _is_short(image):
        wide = image.astype(np.float64)  # of integers numpy takes differences that overflow
        ends = np.percentile(wide, (low, high), overwrite_input=True)
        return float(ends[0]), float(ends[1])
    # Counting 16-bit values is ten times faster than numpy's partial sorting of them.
    least = int(image.min())
    flat, counts = image.ravel(), np.zeros(int(image.max()) - least + 1, np.int64)
    for start in range(0, flat.size, _COUNTED):
        counts += np.bincount(flat[start : start + _COUNTED].astype(np.int64) - least, minlength=len(counts))
    reached = counts.cumsum()

    def at(percent: float) -> float:
        place = percent / 100 * (image.size - 1)
        below = int(place)
        first, second = np.searchsorted(reached, [below, min(below + 1, image.size - 1)], side="right")
        return float(least + first + (second - first) * (place - below))

    return at(low), at(high)


def windows(image: Decoded, step: Step) -> Bytes:
    """Three windows of one grey image as (H, W, 3).

    Raises:
        DecodeError: the image has colour.
    """
    grey = as_grey(image.pixels, "windows")
    low, high = step.numbers[::2], step.numbers[1::2]
    return np.stack([linear(grey, *ends).astype(np.float32) for ends in zip(low, high, strict=True)], axis=-1)


def bits(image: Decoded, step: Step) -> Bytes:
    """By a depth in bits, the file's own where the step names none.

    Raises:
        DecodeError: the file states none, and its type is neither 8 nor 16 bits.
    """
    if step.numbers:
        return linear(image.pixels, 0.0, 2.0 ** step.numbers[0] - 1)
    if image.display is not None:
        return linear(image.pixels, *image.display)
    if image.pixels.dtype not in (np.uint8, np.uint16):
        raise DecodeError(
            f"intensity bits:stored needs a file that states its depth, or 8 or 16 bits, got {image.pixels.dtype}; "
            "name the depth, such as bits:12"
        )
    return linear(image.pixels, 0.0, float(np.iinfo(image.pixels.dtype).max))


def brain_c(image: Values) -> Float32[np.ndarray, "*shape"]:
    """Above the 95th percentile that percentile, at or below the 5th 0, then `minmax`.

    Source: code of Baharoon et al. 2023 (DINOv2 on radiology) for the brain tumours of figshare.
    """
    low, high = percentiles(image, 5.0, 95.0)
    clipped = np.minimum(image.astype(np.float64), high)
    return minmax(np.where(clipped <= low, 0.0, clipped))


MAPPINGS: dict[str, Callable[[Decoded, Step], Bytes]] = {
    "native": lambda image, _: native(image),
    "minmax": lambda image, _: minmax(image.pixels),
    "minmax-channels": lambda image, _: minmax_channels(image.pixels),
    "percentile": percentile,
    "window": lambda image, step: linear(image.pixels, *step.numbers),
    "windows": windows,
    "bits": bits,
    "brain-c": lambda image, _: brain_c(image.pixels),
}
