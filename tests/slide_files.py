"""Pyramidal slides as files: tiled TIFF as the ASAP converter writes it, small."""

from pathlib import Path

import numpy as np
import tifffile


def draw_slide(
    width: int, height: int, blobs: list[tuple[int, int, int]], *, seed: int = 0, red: int = 150
) -> np.ndarray:
    """White background, and discs (x, y, radius) of pink tissue whose grain differs from pixel to pixel."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 242, np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for x, y, radius in blobs:
        disc = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
        noise = rng.integers(0, 30, (int(disc.sum()), 1))
        picture[disc] = (np.array([[red, 60, 120]]) + noise).clip(0, 255)
    return picture


def write_slide(
    path: Path, picture: np.ndarray, *, levels: int = 3, mpp: float | None = 0.5, tile: int = 64, tiled: bool = True
) -> list[np.ndarray]:
    """A pyramid of `levels`, each half of the one before (mean of 2x2); returns the levels."""
    pyramid = [picture]
    for _ in range(levels - 1):
        last = pyramid[-1]
        high, wide = last.shape[0] // 2, last.shape[1] // 2
        blocks = last[: high * 2, : wide * 2].reshape(high, 2, wide, 2, 3)
        pyramid.append(blocks.astype(np.uint16).mean((1, 3)).round().astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for number, level in enumerate(pyramid):
            density = (
                {} if mpp is None else {"resolution": (1e4 / mpp / 2**number,) * 2, "resolutionunit": "CENTIMETER"}
            )
            writer.write(
                level,
                tile=(tile, tile) if tiled else None,
                photometric="rgb",
                compression="deflate",
                subfiletype=1 if number else 0,
                metadata=None,
                **density,
            )
    return pyramid


def asap_xml(polygons: list[tuple[str, list[tuple[float, float]]]]) -> str:
    """Outlines as ASAP writes them: (group, corners) each."""
    items = []
    for number, (group, corners) in enumerate(polygons):
        points = "".join(f'<Coordinate Order="{order}" X="{x}" Y="{y}" />' for order, (x, y) in enumerate(corners))
        items.append(
            f'<Annotation Name="Annotation {number}" Type="Polygon" PartOfGroup="{group}" Color="#F4FA58">'
            f"<Coordinates>{points}</Coordinates></Annotation>"
        )
    return (
        f'<?xml version="1.0"?>\n<ASAP_Annotations>\n<Annotations>{"".join(items)}</Annotations>\n'
        "<AnnotationGroups></AnnotationGroups>\n</ASAP_Annotations>\n"
    )
