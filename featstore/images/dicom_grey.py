"""What a DICOM file says of its stored values: modality LUT or rescaling, VOI LUT or window, palette.

Sources: DICOM PS3.3 C.11.1 (modality LUT), C.11.2 (VOI LUT and windows), C.7.6.3.1.5 and C.7.9 (palettes), C.7.5.1.1.2
(padding).
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, Float64, Shaped

from featstore.errors import DecodeError
from featstore.images.dicom_reading import dicom_errors, numbers, text

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

WindowFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]
_MAX_ENTRIES = 2**16
_DISCRETE, _LINEAR_SEGMENT = 0, 1  # kinds of segment of a palette


@dataclass(frozen=True, slots=True)
class Lut:
    """A table: stored value `first` becomes `entries[0]`; what lies outside takes the nearest end."""

    entries: Shaped[np.ndarray, "N ..."] = field(repr=False)
    first: int
    bits: int

    def __call__(self, values: Shaped[np.ndarray, "H W"]) -> Shaped[np.ndarray, "..."]:
        """The entries of integer values; others are rounded first."""
        whole = values if values.dtype.kind in "iu" else np.rint(values)
        # Clipped before the subtraction: it may neither leave the dtype nor wrap around.
        index = np.clip(whole.astype(np.float64), self.first, self.first + len(self.entries) - 1) - self.first
        found: np.ndarray = self.entries[index.astype(np.intp)]
        return found

    @property
    def top(self) -> float:
        """What is shown white: the largest number of its bits, of which some files declare more than they use."""
        used = max(8, int(self.entries.max()).bit_length())
        return float(2 ** (min(self.bits, used)) - 1)


@dataclass(frozen=True, slots=True)
class Window:
    """The first window of a file, in units of the values after the modality step."""

    center: float
    width: float
    function: WindowFunction = "LINEAR"

    @property
    def bounds(self) -> tuple[float, float]:
        """Where black ends and white begins, for the two linear functions."""
        if self.function == "LINEAR":
            return self.center - 0.5 - (self.width - 1) / 2, self.center - 0.5 + (self.width - 1) / 2
        return self.center - self.width / 2, self.center + self.width / 2

    def __call__(self, values: Shaped[np.ndarray, "H W"], low: float, high: float) -> Float64[np.ndarray, "H W"]:
        """Values from `low` (black) to `high` (white)."""
        wide = values.astype(np.float64)
        if self.function == "SIGMOID":
            exponent = np.clip(-4 * (wide - self.center) / self.width, -700, 700)  # exp() holds to about 709
            return (high - low) / (1 + np.exp(exponent)) + low
        start, end = self.bounds
        if start == end:  # a LINEAR width of 1 is a step
            return np.where(wide > start, high, low)
        return ((wide - start) / (end - start)).clip(0, 1) * (high - low) + low


@dataclass(frozen=True, kw_only=True, slots=True)
class Grey:
    """How the stored values of one frame become what is shown; None where the file does not say."""

    rescale: tuple[float, float] | None = None
    modality_lut: Lut | None = None
    voi_lut: Lut | None = None
    window: Window | None = None

    def modality(self, stored: Shaped[np.ndarray, "H W"]) -> Shaped[np.ndarray, "H W"]:
        """Values in the unit of the modality (Hounsfield units of a CT); the stored ones where there is no step.

        Raises:
            DecodeError: beyond float32.
        """
        if self.modality_lut is not None:
            return self.modality_lut(stored)
        if self.rescale in (None, (1.0, 0.0)):
            return stored
        return _float32(self._rescaled(stored))

    def range(self, bits: int, signed: bool) -> tuple[float, float]:
        """What values of so many stored bits can become by the modality step, low before high."""
        if self.modality_lut is not None:
            return 0.0, float(2**self.modality_lut.bits - 1)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        ends = self._rescaled(np.array([low, high]))
        return float(ends.min()), float(ends.max())

    def _rescaled(self, values: np.ndarray) -> np.ndarray:
        slope, intercept = self.rescale or (1.0, 0.0)
        with np.errstate(over="ignore", invalid="ignore"):  # `_float32` refuses what comes of it
            rescaled: np.ndarray = values.astype(np.float64) * slope + intercept
        return rescaled


def _float32(values: Float64[np.ndarray, "H W"]) -> Float32[np.ndarray, "H W"]:
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise DecodeError("the rescaled DICOM values are beyond float32")
    return narrow


def read_grey(dataset: "Dataset", num_frames: int, *, bits: int, signed: bool) -> list[Grey]:
    """One for every frame, or one for all of them; an enhanced object keeps windows and slopes with its frames.

    `bits` and `signed` describe the stored values.

    Raises:
        DecodeError: a table or number that cannot be used.
    """
    with dicom_errors("intensity tables"):
        shared = _items(dataset, "SharedFunctionalGroupsSequence")[:1]
        frames = _items(dataset, "PerFrameFunctionalGroupsSequence")[:num_frames]
        whole = Grey(
            rescale=_first(_rescale, "PixelValueTransformationSequence", shared, dataset),
            modality_lut=_sequence_lut(dataset, "ModalityLUTSequence", negative=signed),
            window=_first(_window, "FrameVOILUTSequence", shared, dataset),
        )
        found = [whole]
        if len(frames) == num_frames:
            found = [
                replace(
                    whole,
                    rescale=_first(_rescale, "PixelValueTransformationSequence", [frame], None) or whole.rescale,
                    window=_first(_window, "FrameVOILUTSequence", [frame], None) or whole.window,
                )
                for frame in frames
            ]
        negative = any(grey.range(bits, signed)[0] < 0 for grey in found)
        voi_lut = _sequence_lut(dataset, "VOILUTSequence", negative=negative)
        return [replace(grey, voi_lut=voi_lut) for grey in found]


def _items(dataset: "Dataset", keyword: str) -> list[Any]:
    return list(dataset.get(keyword) or [])


def _first(read: Any, keyword: str, groups: list[Any], dataset: "Dataset | None") -> Any:
    """What `read` finds in the functional group of that name, else in the data set itself."""
    places = [item for group in groups for item in _items(group, keyword)[:1]]
    found = (read(place) for place in places + ([] if dataset is None else [dataset]))
    return next((value for value in found if value is not None), None)


def _rescale(dataset: "Dataset") -> tuple[float, float] | None:
    slope, intercept = numbers(dataset, "RescaleSlope"), numbers(dataset, "RescaleIntercept")
    if not slope and not intercept:
        return None
    if slope and slope[0] == 0:
        raise DecodeError("the DICOM element RescaleSlope is 0")
    return (slope or [1.0])[0], (intercept or [0.0])[0]


def _window(dataset: "Dataset") -> Window | None:
    """None also where the width is none: a file without a usable window is shown as one without any."""
    center, width = numbers(dataset, "WindowCenter"), numbers(dataset, "WindowWidth")
    function = text(dataset, "VOILUTFunction") or "LINEAR"
    if not center or not width:
        return None
    if function not in get_args(WindowFunction):
        raise DecodeError(f"this VOI LUT function is not read; read are {', '.join(get_args(WindowFunction))}")
    least = 1.0 if function == "LINEAR" else np.nextafter(0, 1)
    return Window(center[0], width[0], function) if width[0] >= least else None  # type: ignore[arg-type]


def _sequence_lut(dataset: "Dataset", keyword: str, *, negative: bool) -> Lut | None:
    """`negative`: the values it is applied to may be, so a large first value is one below 0 read as unsigned."""
    items = _items(dataset, keyword)
    if not items or not items[0].get("LUTDescriptor") or not items[0].get("LUTData"):
        return None  # some files have an empty item
    count, first, bits = _descriptor(items[0], "LUTDescriptor")
    if negative and first >= 2**15:
        first -= 2**16
    data = items[0]["LUTData"].value
    big = not _is_little(dataset)
    entries = _from_bytes(data, count, bits, big=big) if isinstance(data, bytes) else np.array(data, ndmin=1)
    if len(entries) < count or entries.min() < 0 or entries.max() >= 2**16:
        raise DecodeError("a DICOM look-up table is shorter than its descriptor says, or damaged")
    return Lut(entries[:count].astype(np.uint8 if bits <= 8 else np.uint16), first, bits)


def read_padding(dataset: "Dataset", signed: bool) -> tuple[int, int] | None:
    """The stored values, from the first to the last, that stand where there is no image; None where none are named."""
    try:
        found = [numbers(dataset, keyword)[:1] for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    except DecodeError:  # the image itself can be read without
        return None
    if not found[0]:
        return None
    # Written with or without a sign, whatever the pixels have.
    ends = [int(end) % 2**16 for end in found[0] + found[1]]
    ends = [end - 2**16 if signed and end >= 2**15 else end for end in ends]
    return min(ends), max(ends)


def fill_padding(
    values: Shaped[np.ndarray, "H W"], stored: Shaped[np.ndarray, "H W"], padding: tuple[int, int], *, high: bool
) -> Shaped[np.ndarray, "H W"]:
    """`values` with the smallest (or, `high`, the largest) of the others where `stored` is padding."""
    padded = (stored >= padding[0]) & (stored <= padding[1])
    if not padded.any() or padded.all():
        return values
    others = values[~padded]
    filled: np.ndarray = np.where(padded, others.max() if high else others.min(), values)
    return filled


def read_palette(dataset: "Dataset", signed: bool) -> Lut:
    """The colours of a `PALETTE COLOR` image, (N, 3) of uint8 or uint16.

    Raises:
        DecodeError: tables that cannot be used.
    """
    with dicom_errors("palette"):
        colours = [_palette(dataset, name) for name in ("Red", "Green", "Blue")]
        count, first, bits = _descriptor(dataset, "RedPaletteColorLookupTableDescriptor")
        if signed and first >= 2**15:
            first -= 2**16
        if any(len(colour) != count for colour in colours):
            raise DecodeError("the colours of a DICOM palette have tables of different lengths")
        table = np.stack(colours, axis=1)  # (N, 3)
        # 8-bit colours written as 16-bit words stay 8 bits deep
        narrow = bits == 8 or table.max() <= 255
        return Lut(table.astype(np.uint8 if narrow else np.uint16), first, 8 if narrow else 16)


def _palette(dataset: "Dataset", colour: str) -> np.ndarray:
    count, _, bits = _descriptor(dataset, f"{colour}PaletteColorLookupTableDescriptor")
    plain = dataset.get(f"{colour}PaletteColorLookupTableData")
    big = not _is_little(dataset)
    if plain:
        return _from_bytes(plain, count, bits, big=big)
    segments = dataset[f"Segmented{colour}PaletteColorLookupTableData"].value
    return _expand(_from_bytes(segments, len(segments) * 8 // bits, bits, big=big).astype(np.int64), count)


def _expand(data: np.ndarray, count: int) -> np.ndarray:
    """Runs of given and of linearly rising values."""
    pieces, at, total = [np.zeros(0, np.int64)], 0, 0
    while total < count:
        kind, length = int(data[at]), int(data[at + 1])
        if kind == _DISCRETE:
            pieces.append(data[at + 2 : at + 2 + length])
            at += 2 + length
        elif kind == _LINEAR_SEGMENT:
            start, end = pieces[-1][-1], data[at + 2]
            pieces.append(np.rint(start + np.arange(1, length + 1) * ((end - start) / max(length, 1))))
            at += 3
        else:
            raise DecodeError("a segmented DICOM palette has segments that refer to others, which are not read")
        total += length
    return np.concatenate(pieces)


def _descriptor(dataset: "Dataset", keyword: str) -> tuple[int, int, int]:
    """(number of entries, first value mapped, bits of an entry)."""
    value = dataset[keyword].value
    count, first, bits = (int(number) for number in value)
    if not 0 <= count <= _MAX_ENTRIES or not 1 <= bits <= 16:
        raise DecodeError(f"a DICOM look-up table of {count} entries with {bits} bits is not read")
    return count or _MAX_ENTRIES, first, bits


def _from_bytes(data: bytes, count: int, bits: int, *, big: bool) -> np.ndarray:
    """Entries of one byte, or of two where there are as many bytes."""
    wide = len(data) >= 2 * count and (bits > 8 or len(data) > count + 1)
    dtype = np.dtype(f"{'>' if big else '<'}u2") if wide else np.dtype(np.uint8)
    if len(data) < count * dtype.itemsize or (bits > 8 and not wide):
        raise DecodeError("a DICOM look-up table is shorter than its descriptor says, or damaged")
    return np.frombuffer(data, dtype, count=count)


def _is_little(dataset: "Dataset") -> bool:
    meta = getattr(dataset, "file_meta", None)
    return meta is None or meta.get("TransferSyntaxUID") != "1.2.840.10008.1.2.2"
