"""Whole slides as tiles: one row for each tile that shows tissue, shared by the pathology data sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.datasets.progress import told
from featstore.errors import ConfigError, DecodeError
from featstore.images.part import Part
from featstore.images.slide import SlideFile, open_slide, tissue_tiles

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How slides are cut: `tile` pixels a side, at `mpp` micrometres a pixel (0: the slide's finest level).

    `slide_mpp` is taken for slides that do not state theirs. `min_tissue` is the share of tissue a tile must show,
    `max_tiles` keeps evenly spaced ones of a slide (0: all).

    Raises:
        ConfigError: a value that cannot be.
    """

    tile: int = 224
    mpp: float = 0.0
    slide_mpp: float = 0.0
    min_tissue: float = 0.25
    max_tiles: int = 0

    def __post_init__(self) -> None:
        if self.tile < 1 or self.mpp < 0 or self.slide_mpp < 0 or not 0 <= self.min_tissue <= 1 or self.max_tiles < 0:
            raise ConfigError(
                "options of slides: tile at least 1, mpp, slide_mpp and max_tiles at least 0, min_tissue 0 to 1; got "
                f"{self.tile}, {self.mpp}, {self.slide_mpp}, {self.max_tiles}, {self.min_tissue}"
            )


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of tiles: number of the slide, part, x and y in pixels of the finest level; and what to note."""

    slides: list[int]
    parts: list[str]
    x: list[int]
    y: list[int]
    notes: list[str]

    def places(self, ids: Sequence[str]) -> dict[str, "pa.Array"]:
        """Columns `part`, `volume` (the slide's id), `y` and `x`."""
        import pyarrow as pa

        return {
            "part": pa.array(self.parts, pa.string()),
            "volume": pa.array([ids[slide] for slide in self.slides], pa.string()),
            "y": pa.array(self.y, pa.int64()),
            "x": pa.array(self.x, pa.int64()),
        }

    def ids(self, ids: Sequence[str]) -> list[str]:
        """`slide_x_y` for every tile."""
        return [f"{ids[slide]}_{x}_{y}" for slide, x, y in zip(self.slides, self.x, self.y)]


def cut_slides(root: Path, paths: Sequence[str], tiling: Tiling) -> Tiles:
    """Open every slide, find its tissue on a thumbnail, and list its tiles.

    A slide that cannot be read keeps one row, the tile at its upper left corner.

    Raises:
        ConfigError: an `mpp` is asked for, and a slide does not state its own and `slide_mpp` is not given.
    """
    tiles = Tiles([], [], [], [], [])
    unread = empty = 0
    for number, path in enumerate(told(paths, "slides", len(paths))):
        try:
            scale, found = _find_tissue(root, path, tiling)
        except DecodeError:
            unread += 1
            _add(tiles, number, Part(x=0, y=0, width=tiling.tile, height=tiling.tile, level=0))
            continue
        empty += not found
        if tiling.max_tiles and len(found) > tiling.max_tiles:
            found = [found[at * len(found) // tiling.max_tiles] for at in range(tiling.max_tiles)]
        for x, y in found:
            size = {"level": 0} if scale == 1 else {"scale": scale}
            _add(tiles, number, Part(x=x, y=y, width=tiling.tile, height=tiling.tile, **size))
    tiles.notes.append(
        f"{len(tiles.parts)} tiles of {tiling.tile} pixels "
        + (f"at {tiling.mpp:g} um a pixel" if tiling.mpp else "at the finest level")
        + f", tissue share at least {tiling.min_tissue:g}"
    )
    tiles.notes.extend([f"{unread} slides cannot be read; extraction says why"] if unread else [])
    tiles.notes.extend([f"{empty} slides show no tissue and have no tiles"] if empty else [])
    return tiles


def _find_tissue(root: Path, path: str, tiling: Tiling) -> tuple[float, list[tuple[int, int]]]:
    """Pixels of the finest level to one of a tile, and (x, y) of the tiles with tissue."""
    slide = open_slide(root / path)
    try:
        scale = _scale(slide, path, tiling)
        return scale, tissue_tiles(slide, tile=tiling.tile, scale=scale, min_tissue=tiling.min_tissue)
    finally:
        slide.close()


def _add(tiles: Tiles, slide: int, part: Part) -> None:
    tiles.slides.append(slide)
    tiles.parts.append(str(part))
    tiles.x.append(part.x or 0)
    tiles.y.append(part.y or 0)


def _scale(slide: SlideFile, path: str, tiling: Tiling) -> float:
    """Pixels of the finest level to one pixel of a tile."""
    if not tiling.mpp:
        return 1.0
    own = slide.facts.mpp or tiling.slide_mpp
    if not own:
        raise ConfigError(
            f"{path} does not state its micrometres a pixel, so --option mpp={tiling.mpp:g} cannot be met; give them "
            "by --option slide_mpp=..., or leave mpp out"
        )
    return 1.0 if abs(tiling.mpp / own - 1) < 0.01 else round(tiling.mpp / own, 6)
