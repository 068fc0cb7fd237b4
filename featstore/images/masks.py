"""Masks: class numbers from any file that images come in, and from outlines; at the pixels the network is fed."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, Shaped

from featstore.errors import ConfigError, DecodeError, ManifestError
from featstore.images.decoded import DecodeOptions, Opened
from featstore.images.hf import resized_size
from featstore.images.masks_draw import Outlines
from featstore.images.opening import OpenFiles, open_path
from featstore.images.part import WHOLE, Part, parse_part
from featstore.images.preprocess import PreprocessSpec
from featstore.inputs import HASH_HEX, Inputs

_NOTHING = 2**64 - 1  # what CREMI's 64-bit labels hold where there is no object
_AS_STORED = DecodeOptions(voi=False)


@runtime_checkable
class Masked(Protocol):
    """What is needed of a manifest."""

    @property
    def root(self) -> Path:
        """Folder that paths are relative to."""

    def column(self, name: str) -> list[Any]:
        """Values of one column."""

    def place(self, name: str) -> list[Any]:
        """Values of one column that may be absent."""


def read_masks(
    manifest: Masked, rows: Int[np.ndarray, " M"], spec: PreprocessSpec
) -> Int32[np.ndarray, "M height width"]:
    """Class numbers of these rows at the pixels that `spec` feeds to the network.

    Raises:
        ManifestError: a row has no mask, or its part cannot be. DecodeError: a mask cannot be read; both name the file.
        OSError: a file is missing. ConfigError: as `fit_mask`.
    """
    paths, parts = manifest.column("mask_path"), manifest.place("mask_part")
    inputs, opened = Inputs(manifest.root), OpenFiles()
    masks = np.zeros((len(rows), spec.height, spec.width), np.int32)
    try:
        for slot, row in zip(masks, rows.tolist(), strict=True):
            if paths[row] is None:
                raise ManifestError(f"row {row} has no mask; ask for rows whose mask_path is not empty")
            try:
                mask = fit_mask(read_mask(inputs, opened, paths[row], parts[row]), spec)
            except DecodeError as error:
                raise DecodeError(f"mask {paths[row]}: {error}") from None
            if mask.size and not 0 <= mask.min() <= mask.max() <= np.iinfo(np.int32).max:
                raise DecodeError(f"mask {paths[row]}: class numbers must be 0 to 2147483647; map them with values=")
            slot[:] = mask
    finally:
        opened.close()
    return masks


def read_mask(inputs: Inputs, opened: OpenFiles, mask_path: str, mask_part: str | None) -> Int64[np.ndarray, "H W"]:
    """Class numbers at the size of the mask's file.

    Several masks are joined by "|" in both texts, and laid over each other in order: where a later one is not 0, it
    wins. `values` of a part maps what is stored to classes (colours are written `rrggbb:1`; every colour but black must
    be named, `ffffff:0` for a white background). Without it whole numbers are classes as they are, but a mask of truth
    values, or of 8 bits and only 0 and 255, is 0 and 1. Colours whose channels are equal count as grey. In 64-bit
    labels 0xffffffffffffffff is 0. A tile of a slide takes the value under the centre of each pixel.

    Raises:
        ManifestError: the texts cannot be. DecodeError: a mask cannot be read, or the sizes differ.
        OSError: a file is missing.
    """
    paths = mask_path.split("|")
    parts = mask_part.split("|") if mask_part else [""] * len(paths)
    if len(parts) != len(paths):
        raise ManifestError(f"mask_part must name a part for each of the {len(paths)} masks, or none; got {len(parts)}")
    classes = np.zeros((0, 0), np.int64)
    for number, (path, text) in enumerate(zip(paths, parts)):
        part = parse_part(text)
        mapping = _mapping(part.values)
        layer = to_classes(_stored(inputs, opened, path, part), mapping)
        if not number:
            classes = layer
        elif layer.shape != classes.shape:
            raise DecodeError(f"masks of one image must have one size, got {classes.shape} and {layer.shape}")
        else:
            classes = np.where(layer != 0, layer, classes)
    return classes


def _stored(inputs: Inputs, opened: OpenFiles, path: str, part: Part) -> Shaped[np.ndarray, "..."]:
    """(H, W) or (H, W, 3) as stored, or as drawn."""

    def read_outlines() -> tuple[str, Opened | DecodeError]:
        data = inputs.read(path)
        return hashlib.sha256(data).hexdigest()[:HASH_HEX], Outlines(data)

    make: Callable[[], tuple[str, Opened | DecodeError]]
    make = read_outlines if part.draw else lambda: open_path(inputs, path, part)
    if replace(part, values=None) == WHOLE:  # a file of its own, that no other row asks for again
        _, found = make()
    else:
        # One file may be read as both a slide and outlines.
        form = part.draw.partition(":")[0] if part.draw else "slide" if part.is_tile else ""
        _, found = opened.get(f"{path}\0{form}", inputs.stat(path), make)
    if isinstance(found, DecodeError):
        raise found
    labels = getattr(found, "labels", None)
    stored: np.ndarray = labels(part) if labels is not None else found.pixels(part, _AS_STORED).pixels
    return stored


def _mapping(text: str | None) -> int | dict[str, int] | None:
    """`values` of a part: one class for all that is not 0, or a class for each value named."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    pairs = re.fullmatch(r"(?:(?:-?[0-9]{1,20}|[0-9a-fA-F]{6}):[0-9]{1,9}(?:,|$))+", text)
    if pairs is None or text.endswith(","):
        raise ManifestError(f"part: values is a class, or VALUE:CLASS joined by commas (rrggbb:1), got {text!r}")
    named = [pair.split(":") for pair in text.lower().split(",")]
    mapping = {value: int(number) for value, number in named}
    if len(mapping) < len(named):
        raise ManifestError(f"part: values names a value twice: {text!r}")
    return mapping


def to_classes(stored: Shaped[np.ndarray, "..."], mapping: int | dict[str, int] | None) -> Int64[np.ndarray, "H W"]:
    """Class numbers of a mask as stored; the rules are those of `read_mask`.

    Raises:
        DecodeError: values that are no classes.
    """
    colours = isinstance(mapping, dict) and all(re.fullmatch("[0-9a-f]{6}", value) for value in mapping)
    if stored.ndim == 3 and not colours and (stored == stored[..., :1]).all():
        stored = stored[..., 0]
    if colours and stored.dtype == np.uint8:
        return _by_colour(stored, mapping)  # type: ignore[arg-type]
    if isinstance(mapping, int):
        whole = _whole(stored)
        return np.where(whole.any(axis=-1) if whole.ndim == 3 else whole != 0, np.int64(mapping), np.int64(0))
    if stored.ndim == 3:
        raise DecodeError("the mask has colours; map them with values=rrggbb:1 or give one class with values=1")
    whole = _whole(stored)
    if mapping is None:
        if whole.dtype == np.uint64 and whole.max(initial=0) > np.iinfo(np.int64).max:
            raise DecodeError("the mask has numbers above 63 bits; map them with values=")
        return (whole if not _is_black_and_white(stored) else whole != 0).astype(np.int64)
    if not all(re.fullmatch("-?[0-9]+", value) for value in mapping):
        raise DecodeError("values= names colours, but the mask has none")
    classes = np.zeros(whole.shape, np.int64)
    for value, number in mapping.items():
        classes[whole == int(value)] = number
    return classes


def _by_colour(stored: Shaped[np.ndarray, "..."], mapping: dict[str, int]) -> Int64[np.ndarray, "H W"]:
    wide = np.broadcast_to(stored[..., None], (*stored.shape, 3)) if stored.ndim == 2 else stored
    red, green, blue = (wide[..., channel].astype(np.int64) for channel in range(3))
    packed = red << 16 | green << 8 | blue
    classes = np.zeros(packed.shape, np.int64)
    unnamed = packed != 0
    for value, number in mapping.items():
        found = packed == int(value, 16)
        classes[found] = number
        unnamed &= ~found
    count = int(unnamed.sum())
    if stored.ndim == 2 and count and count == np.count_nonzero(packed):
        raise DecodeError("values= names colours, but the mask is grey and has none of them")
    if count:
        raise DecodeError(
            f"{count} pixels of the mask have a colour other than black that values= does not name; name it too, with "
            "class 0 if it is background"
        )
    return classes


def _is_black_and_white(stored: Shaped[np.ndarray, "..."]) -> bool:
    return stored.dtype == np.uint8 and bool(((stored == 0) | (stored == 255)).all())


def _whole(stored: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The mask in a type of integers that holds every value; unsigned 64 bits without the mark for nothing."""
    if stored.dtype == np.uint64:
        return np.where(stored == np.uint64(_NOTHING), np.uint64(0), stored)
    if stored.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = stored.astype(np.int64)
        if not (whole == stored).all():
            raise DecodeError("the mask has values that are no whole numbers; it is not a mask of classes")
        return whole
    return stored.astype(np.int64)


def fit_mask(mask: Int[np.ndarray, "H W"], spec: PreprocessSpec) -> Int[np.ndarray, "height width"]:
    """The mask where `spec` puts the image of the same size: each pixel takes the class that lies under its centre.

    Nothing is mixed; beside a letterboxed image it is 0.

    Raises:
        DecodeError: as the geometry.
        ConfigError: the images are augmented copies.
    """
    if spec.augment is not None:
        raise ConfigError("masks lie on the images themselves, not on augmented copies; use the plain set")
    if mask.size == 0:
        raise DecodeError("the mask has no pixels")
    # Pixels are numbered from 1 and the numbers placed: 0 is padding, and no class goes through any arithmetic.
    numbers = np.arange(1, mask.size + 1).reshape(mask.shape)
    placed = _hf(numbers, spec) if spec.processor is not None else _geometry(numbers, spec)
    fitted: np.ndarray = np.where(placed > 0, mask.ravel()[np.maximum(placed, 1) - 1], mask.dtype.type(0))
    return fitted


def _geometry(numbers: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    from featstore.images.resize import GEOMETRIES, NEAREST

    placed: np.ndarray = GEOMETRIES[spec.geometry](numbers, spec.height, spec.width, mode=NEAREST)[0]
    return placed


def _hf(numbers: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """Resized and cropped as `featstore.images.hf.pillow_pixels`, or only resized where the processor does no more."""
    from featstore.images.resize import nearest

    processor: dict[str, Any] = spec.processor or {}
    crops = processor["crop_size"] is not None
    size = resized_size(numbers.shape[0], numbers.shape[1], processor["size"]) if crops else (spec.height, spec.width)
    placed: np.ndarray = nearest(numbers, *size)[0]
    top, left = (size[0] - spec.height) // 2, (size[1] - spec.width) // 2
    return placed[top : top + spec.height, left : left + spec.width]


def grid_labels(
    masks: Int[np.ndarray, "M height width"], patch_size: int, num_classes: int
) -> Float32[np.ndarray, "M rows columns classes"]:
    """Share of each class 0 to `num_classes` - 1 in every patch, counted exactly; the shares of a patch sum to 1.

    Raises:
        ConfigError: sides that the patch does not divide, or a class beyond `num_classes`.
    """
    count, height, width = masks.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ConfigError(f"masks of {height}x{width} pixels are not divided by patches of {patch_size}")
    if masks.size and not 0 <= masks.min() <= masks.max() < num_classes:
        raise ConfigError(f"classes must be 0 to {num_classes - 1}, got {masks.min()} to {masks.max()}")
    rows, columns = height // patch_size, width // patch_size
    patches = masks.reshape(count, rows, patch_size, columns, patch_size)
    shares = np.zeros((count, rows, columns, num_classes), np.float32)
    for number in range(num_classes):
        shares[..., number] = (patches == number).sum(axis=(2, 4)) / patch_size**2
    return shares
