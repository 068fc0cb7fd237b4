"""Boxes that readers drew, as one JSON text for each image: the derived column `boxes`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.errors import ManifestError

if TYPE_CHECKING:
    import pyarrow as pa


def collect_boxes(
    images: "pa.ChunkedArray",
    corners: "tuple[pa.ChunkedArray, pa.ChunkedArray, pa.ChunkedArray, pa.ChunkedArray]",
    path: Path,
    *,
    sizes: bool,
    labels: "pa.ChunkedArray | None" = None,
    readers: "pa.ChunkedArray | None" = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Image -> `[{"box": [x0, y0, x1, y1], "label": ..., "reader": ...}, ...]` in the order of the file.

    Boxes are in pixels of the original image, from its top left corner. With `sizes` the last two columns are width
    and height, else the lower right corner. A row whose four fields are blank draws nothing. `names` renames labels.

    Raises:
        ManifestError: a box is not four finite numbers; the message names the row of `path`.
    """
    rows = images.to_pylist()
    fields = zip(*(column.to_pylist() for column in corners))
    texts = labels.to_pylist() if labels is not None else [None] * len(rows)
    drawn_by = readers.to_pylist() if readers is not None else [None] * len(rows)
    found: dict[str, list[dict[str, object]]] = {}
    for row, (image, four, label, reader) in enumerate(zip(rows, fields, texts, drawn_by), 1):
        if all(field is None for field in four):
            continue
        box: dict[str, object] = {"box": _corners(four, sizes, path, row)}
        if label is not None:
            box["label"] = (names or {}).get(label, label)
        if reader is not None:
            box["reader"] = reader
        found.setdefault(image, []).append(box)
    return {image: json.dumps(boxes) for image, boxes in found.items()}


def _corners(four: "tuple[str | None, ...]", sizes: bool, path: Path, row: int) -> list[float]:
    try:
        x0, y0, third, fourth = (float(field) for field in four if field is not None)
    except ValueError:
        third = math.nan
        x0 = y0 = fourth = 0.0
    if not all(map(math.isfinite, (x0, y0, third, fourth))):
        raise ManifestError(f"{path} row {row}: a box must be four numbers, or four blank fields")
    if sizes:
        third, fourth = round(x0 + third, 6), round(y0 + fourth, 6)
    return [x0, y0, third, fourth]
