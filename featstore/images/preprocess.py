"""From a decoded image to what the network is fed, short of normalisation: intensity, geometry, quantisation.

The specification imports no torch: identity and plans are made from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from featstore.configs import DecodeMode, DicomMode, Geometry
from featstore.errors import ConfigError
from featstore.images.augment import Augment, draw, mirrored_and_turned
from featstore.images.decoded import Decoded, DecodeOptions
from featstore.images.hf import PILLOW_FILTERS, RESCALE_FIRST, canonical_processor, hf_size, pillow_pixels
from featstore.images.intensity import canonical_intensity, parse_intensity, to_byte_range

__all__ = ["IMPLEMENTATION", "PreprocessSpec", "hf_size", "preprocess", "preprocess_each", "stack"]

IMPLEMENTATION = 1  # raised whenever the same file and specification would give other pixels; part of every fingerprint

Quantise = Literal["auto", "uint8", "none"]
Planes = UInt8[np.ndarray, "C H W"] | Float32[np.ndarray, "C H W"]
EXACT = ("hf", "spline")  # repeat somebody's pixels; nothing may come before their resize


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessSpec:
    """How every image of a set becomes pixels; `as_dict` is the part of the set's fingerprint that covers this.

    `height` and `width` are pixels fed to the network. `mean` and `std` are per channel, of values in [0, 1].
    `processor` is a `preprocessor_config.json`, for `hf` alone: it settles what is left open and must not be
    contradicted. `quantise` "auto" becomes "uint8", or "none" where the processor resizes floats. `intensity` is a text
    of the grammar in `featstore.images.intensity`, kept in its canonical spelling. `augment`: not the images themselves
    but a copy of each; where that is a crop of the source, it takes the place of the geometry.

    Raises:
        ConfigError: values that cannot be used, or that contradict the processor.
    """

    geometry: Geometry
    height: int
    width: int
    intensity: str = "native"
    quantise: Quantise = "auto"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    processor: dict[str, Any] | None = field(default=None, hash=False)
    dicom_mode: DicomMode = "standard"
    decode: DecodeMode = "full"
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if self.geometry not in get_args(Geometry):
            raise ConfigError(f"geometry must be one of {', '.join(get_args(Geometry))}, got {self.geometry!r}")
        if self.height < 1 or self.width < 1:
            raise ConfigError(f"height and width must be at least 1 pixel, got {self.height}x{self.width}")
        object.__setattr__(self, "intensity", canonical_intensity(self.intensity))
        if self.quantise not in get_args(Quantise):
            raise ConfigError(f"quantise must be one of {', '.join(get_args(Quantise))}, got {self.quantise!r}")
        if self.dicom_mode not in get_args(DicomMode) or self.decode not in get_args(DecodeMode):
            raise ConfigError(
                f"dicom_mode is one of {', '.join(get_args(DicomMode))} and decode one of "
                f"{', '.join(get_args(DecodeMode))}, got {self.dicom_mode!r} and {self.decode!r}"
            )
        if self.decode != "full" and self.geometry in EXACT:
            raise ConfigError(
                f"decode {self.decode} changes pixels, and geometry {self.geometry} repeats those of others exactly; "
                "use one of them"
            )
        if self.augment is not None and self.augment.crops and (self.geometry in EXACT or self.decode != "full"):
            raise ConfigError(
                f"--augment {self.augment.recipe} cuts its crops from the source at its full size, before any resize: "
                f"geometry {self.geometry} with decode {self.decode} has none to cut from; take geometry squash or "
                "dino, and decode full"
            )
        if (self.geometry == "hf") != (self.processor is not None):
            raise ConfigError(
                "geometry hf needs the checkpoint's preprocessor_config.json, and no other geometry takes one"
            )
        if self.processor is not None:
            self._follow(canonical_processor(self.processor))
        elif self.quantise == "auto":
            object.__setattr__(self, "quantise", "uint8")
        if (
            len(self.mean) != 3
            or len(self.std) != 3
            or not all(isfinite(v) for v in self.mean + self.std)
            or min(self.std) <= 0
        ):
            raise ConfigError(
                f"mean and std must be three finite numbers each, std above 0; got {self.mean} and {self.std}"
            )

    def _follow(self, processor: dict[str, Any]) -> None:
        """Take from the processor what is left open; refuse what contradicts it."""
        height, width = hf_size(processor)
        if (self.height, self.width) != (height, width):
            raise ConfigError(
                f"geometry hf: the checkpoint's processor makes {height}x{width} images, asked are "
                f"{self.height}x{self.width}; leave the resolution out"
            )
        settled = {
            "quantise": "none" if processor["image_processor_type"] in RESCALE_FIRST else "uint8",
            "mean": tuple(processor["image_mean"]),
            "std": tuple(processor["image_std"]),
        }
        for name, value in settled.items():
            asked = getattr(self, name)
            if asked not in (value, "auto", ()):
                raise ConfigError(f"geometry hf: the processor has {name} {value}, asked is {asked}; leave it out")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "processor", processor)

    @property
    def unit_range(self) -> bool:
        """Whether `preprocess` gives values in [0, 1], as DINOv3's processor resizes them, and not in [0, 255]."""
        return self.processor is not None and self.quantise == "none"

    @property
    def _resizing(self) -> dict[str, Any]:
        """The filter and whose it is."""
        if self.geometry == "spline":
            return {"resample": "quadratic spline", "antialias": False, "resize_with": "scipy"}
        if self.processor is None:
            return {"resample": "bicubic", "antialias": True, "resize_with": "torch"}
        whose = "pillow" if self.quantise == "uint8" else "torch"
        return {"resample": PILLOW_FILTERS[self.processor["resample"]], "antialias": True, "resize_with": whose}

    @property
    def decoding(self) -> DecodeOptions:
        """What the decoders must know."""
        return DecodeOptions(
            dicom_mode=self.dicom_mode,
            voi=parse_intensity(self.intensity)[0].name == "native",
            decode=self.decode,
            target=(self.height, self.width),
        )

    def as_dict(self) -> dict[str, Any]:
        """Canonical and ready for JSON; two specifications with equal dictionaries give equal pixels."""
        # What came later is stated where it is not the default, so that sets made before keep their fingerprint.
        later = {"dicom_mode": self.dicom_mode, "decode": self.decode}
        cut = {"crop": "floor"} if self.geometry == "short" else {}  # it once halved odd margins to the even neighbour
        return {
            **cut,
            **{name: value for name, value in later.items() if value not in ("standard", "full")},
            **({} if self.augment is None else {"augment": self.augment.as_dict()}),
            "implementation": IMPLEMENTATION,
            "geometry": self.geometry,
            "height": self.height,
            "width": self.width,
            "intensity": self.intensity,
            "quantise": self.quantise,
            **self._resizing,
            "mean": [float(value) for value in self.mean],
            "std": [float(value) for value in self.std],
            "processor": None if self.processor is None else canonical_processor(self.processor),
        }


def preprocess(
    image: Shaped[np.ndarray, "h w"] | Shaped[np.ndarray, "h w 3"] | Decoded,
    spec: PreprocessSpec,
    sample: str | None = None,
) -> Planes:
    """One decoded image of any depth as (C, height, width); C is 1 for grey and 3 for colour.

    uint8 where the specification quantises, else float32; in [0, 255], or in [0, 1] where `spec.unit_range`. The
    geometry `spline` resizes the stored values before the intensity, every other one what the intensity gives. `sample`
    is the image's id, from which an augmented copy is drawn; nothing else needs it.

    Raises:
        DecodeError: an image so long that the geometry would make it absurdly large, or one that the intensity cannot
            be done on.
        ConfigError: an augmented copy of an image without an id.
    """
    return preprocess_each(image if isinstance(image, Decoded) else Decoded(image), [spec], sample)[0]


def preprocess_each(image: Decoded, specs: Sequence[PreprocessSpec], sample: str | None = None) -> list[Planes]:
    """`preprocess` in several ways; those of one intensity share its result, and one is held at a time.

    Raises:
        DecodeError, ConfigError: as `preprocess`.
    """
    found: dict[int, Planes] = {}
    for intensity in dict.fromkeys(spec.intensity for spec in specs):
        values: np.ndarray | None = None
        for number, spec in enumerate(specs):
            if spec.intensity != intensity:
                continue
            if spec.geometry != "spline" and values is None:
                values = to_byte_range(image, intensity)
            found[number] = _augmented(image, values, spec, sample)
    return [found[number] for number in range(len(specs))]


def _augmented(image: Decoded, values: np.ndarray | None, spec: PreprocessSpec, sample: str | None) -> Planes:
    """One image as the specification has it, or its augmented copy."""
    if spec.augment is None:
        return _fitted(image, values, spec)
    if sample is None:
        raise ConfigError("an augmented copy is drawn from the id of a sample, and this image has none; give it one")
    drawn = draw(spec.augment, sample, *image.pixels.shape[:2])
    if drawn.box is None:
        return mirrored_and_turned(_fitted(image, values, spec), drawn)
    assert values is not None  # crops exclude the spline
    top, left, height, width = drawn.box
    return mirrored_and_turned(_resized(values[top : top + height, left : left + width], spec, "squash"), drawn)


def _fitted(image: Decoded, values: np.ndarray | None, spec: PreprocessSpec) -> Planes:
    if spec.geometry == "spline" or values is None:
        return _resized_first(image, spec)
    return _hf(values, spec.processor, spec) if spec.processor is not None else _resized(values, spec, spec.geometry)


def _resized(values: np.ndarray, spec: PreprocessSpec, geometry: Geometry) -> Planes:
    from featstore.images.resize import GEOMETRIES

    if spec.quantise == "none":
        return _clamp(GEOMETRIES[geometry](values.astype(np.float32, copy=False), spec.height, spec.width))
    planes = GEOMETRIES[geometry](values, spec.height, spec.width)
    return planes if planes.dtype == np.uint8 else _round(planes)


def _hf(values: np.ndarray, processor: dict[str, Any], spec: PreprocessSpec) -> Planes:
    if not spec.unit_range:
        return pillow_pixels(values if values.dtype == np.uint8 else _round(values), processor)
    from featstore.images.resize import resize

    mode = PILLOW_FILTERS[processor["resample"]]
    return resize(values * np.float32(processor["rescale_factor"]), spec.height, spec.width, mode=mode)


def _resized_first(decoded: Decoded, spec: PreprocessSpec) -> Planes:
    from featstore.images.resize import spline

    planes = spline(decoded.pixels, spec.height, spec.width)
    small = planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0)
    values = to_byte_range(replace(decoded, pixels=small), spec.intensity)
    values = np.ascontiguousarray(values[None] if values.ndim == 2 else values.transpose(2, 0, 1))
    if spec.quantise == "none":
        return _clamp(values.astype(np.float32, copy=False))
    return values if values.dtype == np.uint8 else _round(values)


def _clamp(values: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Bicubic filters overshoot at edges; values outside [0, 255] are no intensities."""
    return values.clip(0, 255)


def _round(values: Float32[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    return _clamp(values).round().astype(np.uint8)


def stack(
    images: Sequence[np.ndarray | None], spec: PreprocessSpec
) -> UInt8[np.ndarray, "B C H W"] | Float32[np.ndarray, "B C H W"]:
    """Preprocessed images as one batch; three channels if any has them, else one. `None` (failed) becomes zeros."""
    channels = max((image.shape[0] for image in images if image is not None), default=1)
    batch = np.zeros(
        (len(images), channels, spec.height, spec.width), np.uint8 if spec.quantise == "uint8" else np.float32
    )
    for slot, image in zip(batch, images, strict=True):
        if image is not None:
            slot[:] = image  # one channel fills all three
    return batch
