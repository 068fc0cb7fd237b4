"""Masks that are kept as outlines: COCO JSON, the XML of ASAP, and plain JSON polygons."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Bool, Float, Int64

from featstore.errors import DecodeError, ManifestError
from featstore.images.arrayfile import decode_errors
from featstore.images.decoded import Decoded, DecodeOptions
from featstore.images.part import Part
from featstore.images.sizes import MAX_PIXELS

_CUT_OUT = ("_2", "exclusion", "normal")  # groups of ASAP files that are no tumour, drawn last
_KEYS = ("positive", "negative", "polygons", "vertices")
_GUESSED_BYTES = 8  # that a parsed file takes for each of its own


@dataclass(frozen=True, slots=True)
class Shape:
    """An outline of (x, y) vertices in pixels, pixel 0 reaching from 0 to 1, and the class inside it."""

    vertices: Float[np.ndarray, "n 2"]
    value: int


class Outlines:
    """A file of outlines, parsed once; a part says what is drawn of it.

    `draw=coco:IMAGE_ID` draws the annotations of one image in the order of the file, a later one over an earlier one,
    at the size that the file gives. Its categories, sorted by id, are classes 1, 2, ...

    `draw=asap` and `draw=polygons` draw the tile x, y, width, height. x and y count pixels of the finest level; a
    pixel of the tile is `scale` of them, or 2 to the power of `level`. Tumour is 1; what is excluded (groups `_2`,
    `Exclusion` and `normal`; the key `negative`) is cut out of it.
    """

    def __init__(self, data: bytes):
        self._data = data
        self._parsed: Any = None

    @property
    def num_bytes(self) -> int:
        return len(self._data) * (1 if self._parsed is None else _GUESSED_BYTES)

    def pixels(self, part: Part, options: DecodeOptions) -> Decoded:
        return Decoded(self.labels(part))

    def labels(self, part: Part) -> Int64[np.ndarray, "H W"]:
        """The classes that a part with `draw` names.

        Raises:
            ManifestError: `draw` is not understood. DecodeError: the file is damaged or has no such image.
        """
        form, _, rest = (part.draw or "").partition(":")
        if form == "coco" and rest:
            return self._coco(rest)
        if form not in ("asap", "polygons") or rest:
            raise ManifestError(f"draw is coco:IMAGE_ID, asap or polygons, got {part.draw!r}")
        if part.x is None or part.y is None or part.width is None or part.height is None:
            raise ManifestError(f"draw={form} needs the tile: x, y, width and height")
        scale = _scale(part)
        _check_size(part.height, part.width)
        if self._parsed is None:
            self._parsed = list(_asap(self._data) if form == "asap" else _polygons(self._data))
        mask = np.zeros((part.height, part.width), np.int64)
        for shape in self._parsed:
            fill(mask, (shape.vertices - (part.x, part.y)) / scale, shape.value)
        return mask

    def close(self) -> None:
        self._data, self._parsed = b"", None

    def _coco(self, image: str) -> Int64[np.ndarray, "H W"]:
        with decode_errors("COCO"):
            if self._parsed is None:
                self._parsed = _read_coco(self._data)
            images, annotations, classes = self._parsed
            if image not in images:
                raise DecodeError("the COCO file has no image of the id named")
            height, width = images[image]
            _check_size(height, width)
            mask = np.zeros((height, width), np.int64)
            for annotation in annotations.get(image, ()):
                value = classes[annotation["category_id"]]
                drawn = annotation["segmentation"]
                if isinstance(drawn, dict):
                    mask[rle_mask(drawn, height, width)] = value
                else:
                    for polygon in drawn:
                        fill(mask, np.asarray(polygon, np.float64).reshape(-1, 2), value)
            return mask


def _read_coco(data: bytes) -> tuple[dict[str, tuple[int, int]], dict[str, list[Any]], dict[Any, int]]:
    """(size of each image, its annotations, class number of each category)."""
    table = json.loads(data)
    images = {str(image["id"]): (int(image["height"]), int(image["width"])) for image in table["images"]}
    annotations: dict[str, list[Any]] = {}
    for annotation in table["annotations"]:
        annotations.setdefault(str(annotation["image_id"]), []).append(annotation)
    categories = sorted(category["id"] for category in table["categories"])
    return images, annotations, {category: number for number, category in enumerate(categories, 1)}


def _scale(part: Part) -> float:
    """Pixels of the finest level to one of the tile; outlines know no slide, so a level halves the one before."""
    if part.mpp is not None:
        raise ManifestError("draw: outlines know no micrometres; give the tile's scale (or its level) in place of mpp")
    return part.scale if part.scale is not None else float(2 ** min(part.level or 0, 64))


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise DecodeError(f"a mask of {height}x{width} pixels: there must be 1 to {MAX_PIXELS}")


def rle_mask(rle: dict[str, Any], height: int, width: int) -> Bool[np.ndarray, "H W"]:
    """COCO's run lengths, column by column, the first run outside; as a list, or in COCO's text form.

    Raises:
        DecodeError: the runs do not make a mask of this size.
    """
    counts = rle["counts"]
    runs = np.asarray(_counts(counts) if isinstance(counts, str) else counts, np.int64)
    if list(rle["size"]) != [height, width] or (runs < 0).any() or runs.sum() != height * width:
        raise DecodeError("the runs of a COCO annotation do not make a mask of the image's size")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape((height, width), order="F")


def _counts(text: str) -> list[int]:
    """Numbers of 5 bits a character, the lowest first, bit 6 for one more to come; from the third on differences."""
    counts: list[int] = []
    number = shift = 0
    for character in text.encode("ascii"):
        bits = character - 48
        number |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
    return counts


def fill(mask: Int64[np.ndarray, "H W"], vertices: Float[np.ndarray, "n 2"], value: int) -> None:
    """Set the pixels whose centre lies inside an outline; where it crosses itself, inside is what is inside once."""
    if len(vertices) < 3:
        return
    if not np.isfinite(vertices).all():
        raise DecodeError("an outline has a vertex that is no place")
    height, width = mask.shape
    top, bottom = (int(np.clip(np.ceil(end - 0.5), 0, height)) for end in (vertices[:, 1].min(), vertices[:, 1].max()))
    left, right = (int(np.clip(np.ceil(end - 0.5), 0, width)) for end in (vertices[:, 0].min(), vertices[:, 0].max()))
    if top >= bottom or left >= right:
        return
    (x0, y0), (x1, y1) = vertices.T, np.roll(vertices, -1, axis=0).T
    # Rows whose centre an edge passes, its lower end included and its upper one not, so that a vertex counts once.
    first, last = (
        np.clip(np.ceil(end(y0, y1) - 0.5), top, bottom).astype(np.int64) for end in (np.minimum, np.maximum)
    )
    lengths = last - first
    edge = np.repeat(np.arange(len(vertices)), lengths)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + first[edge]
    slope = (x1 - x0)[edge] / (y1 - y0)[edge]
    crossing = x0[edge] + (row + 0.5 - y0[edge]) * slope
    column = np.clip(np.ceil(crossing - 0.5), left, right).astype(np.int64)
    crossed = np.zeros((bottom - top, right - left + 1), np.uint8)
    np.bitwise_xor.at(crossed, (row - top, column - left), 1)
    inside = np.bitwise_xor.accumulate(crossed, axis=1)[:, :-1].astype(bool)
    mask[top:bottom, left:right][inside] = value


def _asap(data: bytes) -> Iterator[Shape]:
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:  # entities that unfold without end
        raise DecodeError("an XML file of outlines needs no DOCTYPE; one that has it is not read")
    with decode_errors("XML"):
        shapes = []
        for annotation in ElementTree.fromstring(data).iter("Annotation"):
            points = [
                (int(point.get("Order", "0")), float(point.attrib["X"]), float(point.attrib["Y"]))
                for point in annotation.iter("Coordinate")
            ]
            if len(points) >= 3:
                group = annotation.get("PartOfGroup", "").strip().lower()
                vertices = np.array([point[1:] for point in sorted(points, key=lambda point: point[0])])
                shapes.append(Shape(vertices, 0 if group in _CUT_OUT else 1))
    yield from sorted(shapes, key=lambda shape: -shape.value)


def _polygons(data: bytes) -> Iterator[Shape]:
    with decode_errors("JSON"):
        tree = json.loads(data)
        shapes = list(_rings(tree, 1))
        if not shapes and not (isinstance(tree, dict) and any(key in _KEYS for key in tree)):
            raise DecodeError(f"the JSON file has no lists of [x, y], nor one of the keys {', '.join(_KEYS)}")
    yield from sorted(shapes, key=lambda shape: -shape.value)


def _rings(node: Any, value: int) -> Iterator[Shape]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _rings(child, 0 if key.lower() == "negative" else value)
    elif isinstance(node, list):
        if len(node) >= 3 and all(_is_point(point) for point in node):
            yield Shape(np.array(node, np.float64), value)
            return
        for child in node:
            yield from _rings(child, value)


def _is_point(node: Any) -> bool:
    return isinstance(node, list) and len(node) == 2 and all(isinstance(side, int | float) for side in node)
