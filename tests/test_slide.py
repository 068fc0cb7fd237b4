"""Whole slides: the right pixels at every level and scale, and tissue where there is some."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_files import draw_slide, write_slide

from featstore.datasets.tiles import Tiling, cut_slides
from featstore.errors import DecodeError, ManifestError
from featstore.images import slide as slides
from featstore.images.decoded import DecodeOptions
from featstore.images.masks import read_mask
from featstore.images.opening import OpenFiles
from featstore.images.part import Part, parse_part
from featstore.images.slide import open_slide, tissue_mask, tissue_tiles
from featstore.inputs import Inputs

BLOBS = [(120, 100, 60), (300, 220, 50)]


@pytest.fixture
def slide(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    path = tmp_path / "slide.tif"
    return path, write_slide(path, draw_slide(420, 300, BLOBS))


def read(path: Path, **part: float) -> np.ndarray:
    opened = open_slide(path)
    pixels = opened.pixels(Part(**part), DecodeOptions()).pixels  # type: ignore[arg-type]
    opened.close()
    return pixels


def test_facts(slide: tuple[Path, list[np.ndarray]]) -> None:
    opened = open_slide(slide[0])
    assert (opened.facts.width, opened.facts.height) == (420, 300)
    assert opened.facts.mpp == pytest.approx(0.5)
    assert opened.facts.downsamples == pytest.approx((1, 2, 4))
    assert opened.num_bytes > 0
    opened.close()


def test_tiles_are_the_pixels_of_their_level(slide: tuple[Path, list[np.ndarray]]) -> None:
    path, levels = slide
    np.testing.assert_array_equal(read(path, x=100, y=60, width=50, height=40), levels[0][60:100, 100:150])
    np.testing.assert_array_equal(read(path, x=100, y=60, width=30, height=20, level=1), levels[1][30:50, 50:80])
    np.testing.assert_array_equal(read(path, x=100, y=60, width=30, height=20, level=2), levels[2][15:35, 25:55])


def test_beyond_the_edge_is_white(slide: tuple[Path, list[np.ndarray]]) -> None:
    path, levels = slide
    tile = read(path, x=400, y=290, width=30, height=30)
    np.testing.assert_array_equal(tile[:10, :20], levels[0][290:, 400:])
    assert (tile[10:] == 255).all()
    assert (tile[:, 20:] == 255).all()


def test_scale_and_mpp_take_the_next_finer_level(slide: tuple[Path, list[np.ndarray]]) -> None:
    path, levels = slide
    np.testing.assert_array_equal(read(path, x=40, y=40, width=60, height=50, mpp=1.0), levels[1][20:70, 20:80])
    np.testing.assert_array_equal(read(path, x=40, y=40, width=60, height=50, scale=2.0), levels[1][20:70, 20:80])
    half = read(path, x=0, y=0, width=70, height=50, scale=3.0)  # from level 1, shrunk by 1.5
    expected = np.asarray(Image.fromarray(levels[1][:75, :105]).resize((70, 50), Image.Resampling.BICUBIC))
    assert np.abs(half.astype(int) - expected).max() <= 2
    finer = read(path, x=100, y=60, width=40, height=40, scale=0.5)
    assert finer.shape == (40, 40, 3)


def test_threads_read_one_slide(slide: tuple[Path, list[np.ndarray]]) -> None:
    path, levels = slide
    opened = open_slide(path)
    places = [(x, y) for x in range(0, 380, 40) for y in range(0, 260, 40)]
    with ThreadPoolExecutor(4) as pool:
        tiles = pool.map(
            lambda at: opened.pixels(Part(x=at[0], y=at[1], width=40, height=40), DecodeOptions()).pixels, places
        )
        for (x, y), tile in zip(places, tiles, strict=True):
            np.testing.assert_array_equal(tile, levels[0][y : y + 40, x : x + 40])
    opened.close()


def test_a_slide_stored_as_jpeg_or_untiled_tiff(tmp_path: Path) -> None:
    picture = draw_slide(200, 120, [(60, 60, 30)])
    Image.fromarray(picture).save(tmp_path / "1.jpg", quality=95)
    expected = np.asarray(Image.open(tmp_path / "1.jpg"))
    np.testing.assert_array_equal(read(tmp_path / "1.jpg", x=30, y=20, width=60, height=50), expected[20:70, 30:90])
    write_slide(tmp_path / "2.tif", picture, levels=1, tiled=False)
    np.testing.assert_array_equal(read(tmp_path / "2.tif", x=30, y=20, width=60, height=50), picture[20:70, 30:90])
    tifffile.imwrite(tmp_path / "3.tif", picture[..., 0])
    np.testing.assert_array_equal(
        read(tmp_path / "3.tif", x=190, y=20, width=20, height=9)[:, :10, 1], picture[20:29, 190:, 0]
    )


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({}, "a slide is read in tiles: x, y, width and height must be given"),
        ({"x": 420, "y": 0, "width": 8, "height": 8}, "the tile at 420, 0 begins outside of the slide"),
        ({"x": -1, "y": 0, "width": 8, "height": 8}, "the tile at -1, 0 begins outside of the slide"),
        ({"x": 0, "y": 0, "width": 8, "height": 8, "level": 3}, "has 3 levels, counted from 0; there is no 3"),
        ({"x": 0, "y": 0, "width": 2**15, "height": 2**15}, "32768x32768 pixels is above the limit of"),
        ({"x": 0, "y": 0, "width": 2**14, "height": 2**14, "scale": 3.0}, r"takes .* of the slide, above the limit"),
    ],
)
def test_tiles_that_cannot_be(slide: tuple[Path, list[np.ndarray]], part: dict[str, float], reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        read(slide[0], **part)


def test_mpp_of_a_slide_that_states_none(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tif", draw_slide(200, 120, []), mpp=None)
    with pytest.raises(DecodeError, match="does not state its micrometres a pixel; tile it by level"):
        read(tmp_path / "a.tif", x=0, y=0, width=8, height=8, mpp=1.0)


def test_damaged_and_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slide(tmp_path / "a.tif", draw_slide(300, 200, BLOBS))
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "b.tif").write_bytes(data[: len(data) // 3])
    with pytest.raises(DecodeError, match=r"damaged slide|cannot be read"):
        read(tmp_path / "b.tif", x=0, y=0, width=290, height=190)
    (tmp_path / "c.tif").write_bytes(b"no slide at all")
    with pytest.raises(DecodeError, match="not a slide of a known kind"):
        open_slide(tmp_path / "c.tif")
    (tmp_path / "d.jpg").write_bytes(b"\xff\xd8\xff\xe0broken")
    with pytest.raises(DecodeError, match="damaged slide"):
        open_slide(tmp_path / "d.jpg")
    tifffile.imwrite(tmp_path / "e.tif", np.zeros((8, 8), np.uint16))
    with pytest.raises(DecodeError, match="a slide must have 8-bit grey or RGB pixels"):
        open_slide(tmp_path / "e.tif")
    Image.new("RGB", (40, 30)).save(tmp_path / "f.png")
    tifffile.imwrite(tmp_path / "g.tif", np.zeros((40, 300, 3), np.uint8))
    monkeypatch.setattr(slides, "MAX_PICTURE", 1000)
    with pytest.raises(DecodeError, match="30x40 pixels are above the limit of 1000 for a slide"):
        open_slide(tmp_path / "f.png")
    with pytest.raises(DecodeError, match="too large to be read without OpenSlide"):
        open_slide(tmp_path / "g.tif")


def test_slides_need_an_extra(slide: tuple[Path, list[np.ndarray]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(DecodeError, match=r"need OpenSlide and tifffile: pip install 'featstore\[slides\]'"):
        open_slide(slide[0])


def test_tissue_is_where_the_discs_are() -> None:
    picture = draw_slide(420, 300, BLOBS)
    mask = tissue_mask(picture)
    rows, columns = np.mgrid[:300, :420]
    truth = np.zeros((300, 420), bool)
    for x, y, radius in BLOBS:
        truth |= (columns - x) ** 2 + (rows - y) ** 2 < radius**2
    assert (mask == truth).mean() > 0.99
    assert not tissue_mask(np.full((50, 60, 3), 240, np.uint8)).any()
    assert not tissue_mask(np.zeros((50, 60, 3), np.uint8)).any()  # black has no saturation


def test_tiles_cover_the_tissue_and_nothing_else(slide: tuple[Path, list[np.ndarray]]) -> None:
    opened = open_slide(slide[0])
    tiles = tissue_tiles(opened, tile=20, scale=1.0, min_tissue=0.5, longest=420)
    mask = tissue_mask(slide[1][0])
    brute = [(x, y) for y in range(0, 281, 20) for x in range(0, 401, 20) if mask[y : y + 20, x : x + 20].mean() >= 0.5]
    assert tiles == brute
    coarse = tissue_tiles(opened, tile=20, scale=2.0, min_tissue=0.5, longest=210)
    assert all(x % 40 == 0 and y % 40 == 0 for x, y in coarse)
    assert tissue_tiles(opened, tile=500, scale=1.0) == []
    opened.close()


def labels(path: Path, **part: float) -> np.ndarray:
    opened = open_slide(path)
    found = opened.labels(Part(**part))  # type: ignore[arg-type]
    opened.close()
    return found


def write_classes(path: Path) -> np.ndarray:
    """Discs of classes 2 and 5 on 0, with sides that no level divides."""
    rows, columns = np.mgrid[:301, :421]
    mask = np.zeros((301, 421), np.uint8)
    for value, radius in ((5, 120), (2, 60)):
        mask[(columns - 300) ** 2 + (rows - 180) ** 2 < radius**2] = value
    if path.suffix == ".png":
        Image.fromarray(mask).save(path)
    else:
        write_slide(path, np.repeat(mask[..., None], 3, 2), tiled="untiled" not in path.name)  # levels of means
    return mask


@pytest.mark.parametrize("name", ["m.tif", "untiled.tif", "m.png"])
@pytest.mark.parametrize("strip", [2**24, 700])
def test_labels_are_never_mixed_and_0_beyond_the_edge(
    tmp_path: Path, name: str, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slides, "STRIP", strip)
    mask = write_classes(tmp_path / name)
    for x, y, scale in ((0, 0, 2.5), (30, 41, 2.5), (401, 290, 1.0), (201, 101, 1.7), (13, 7, 0.5)):
        at_x, at_y = (x + np.floor((np.arange(90) + 0.5) * scale).astype(int) for x in (x, y))
        at_y = at_y[:70]
        inside = (at_y[:, None] < 301) & (at_x < 421)
        expected = np.where(inside, mask[np.minimum(at_y, 300)[:, None], np.minimum(at_x, 420)], 0)
        np.testing.assert_array_equal(labels(tmp_path / name, x=x, y=y, width=90, height=70, scale=scale), expected)
    assert set(np.unique(labels(tmp_path / name, x=0, y=0, width=160, height=120, scale=2.5)).tolist()) == {0, 2, 5}


@pytest.mark.parametrize("name", ["m.tif", "m.png"])
def test_tiles_of_a_mask_keep_its_classes_and_end_in_0(tmp_path: Path, name: str) -> None:
    rows, columns = np.mgrid[:300, :400]
    mask = np.zeros((300, 400), np.uint8)
    mask[(rows - 150) ** 2 + (columns - 200) ** 2 < 110**2] = 5
    mask[(rows - 150) ** 2 + (columns - 200) ** 2 < 40**2] = 2
    if name == "m.tif":
        tifffile.imwrite(tmp_path / name, mask, tile=(64, 64), photometric="minisblack", compression="zlib")
    else:
        Image.fromarray(mask).save(tmp_path / name)
    found = read_mask(Inputs(tmp_path), OpenFiles(), name, "x=0&y=0&width=160&height=120&scale=2.5")
    places = ((np.arange(160) + 0.5) * 2.5).astype(int)
    assert np.array_equal(found, mask[places[:120, None], places])
    edge = read_mask(Inputs(tmp_path), OpenFiles(), name, "x=300&y=100&width=128&height=128&level=0")
    assert np.array_equal(edge[:, :100], mask[100:228, 300:])
    assert not edge[:, 100:].any()


def test_labels_of_a_level_and_in_colour(slide: tuple[Path, list[np.ndarray]]) -> None:
    path, levels = slide
    np.testing.assert_array_equal(labels(path, x=100, y=60, width=30, height=20, level=1), levels[1][30:50, 50:80])
    # The tile begins between two pixels of that level.
    np.testing.assert_array_equal(
        labels(path, x=101, y=61, width=30, height=20, level=1), levels[0][62:102:2, 102:162:2]
    )
    edge = labels(path, x=400, y=280, width=20, height=20, level=1)
    np.testing.assert_array_equal(edge[:10, :10], levels[1][140:, 200:, 0])
    assert not edge[10:].any()
    assert not edge[:, 10:].any()
    with pytest.raises(DecodeError, match="has 3 levels, counted from 0; there is no 3"):
        labels(path, x=0, y=0, width=8, height=8, level=3)


def test_a_deep_picture_is_no_slide(tmp_path: Path) -> None:
    Image.fromarray(np.full((30, 40), 300, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DecodeError, match="a slide must have 8-bit grey or RGB pixels"):
        open_slide(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_a_large_slide_of_one_level_is_tiled(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = draw_slide(840, 603, [(x * 2, y * 2, r * 2) for x, y, r in BLOBS])
    if name.endswith("png"):
        Image.fromarray(picture).save(tmp_path / name)
    else:
        write_slide(tmp_path / name, picture, levels=1)
    opened = open_slide(tmp_path / name)
    whole = opened.thumbnail(210)
    tiles = tissue_tiles(opened, tile=40, scale=1.0, min_tissue=0.5, longest=210)
    assert tiles
    largest = 0
    region = opened._pyramid.region

    def watched(x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        nonlocal largest
        largest = max(largest, width * height)
        return region(x, y, level, width, height)

    monkeypatch.setattr(opened._pyramid, "region", watched)
    monkeypatch.setattr(slides, "MAX_PIXELS", 100_000)
    monkeypatch.setattr(slides, "STRIP", 20_000)
    thumbnail = opened.thumbnail(210)
    assert largest <= 20_000
    assert thumbnail.shape == whole.shape == (150, 210, 3)
    exact = picture[:600].reshape(150, 4, 210, 4, 3).mean((1, 3))
    assert np.abs(thumbnail - exact).max() <= 1
    assert tissue_tiles(opened, tile=40, scale=1.0, min_tissue=0.5, longest=210) == tiles
    small = opened.thumbnail(150)  # blocks of 5, then shrunk by 1.12
    assert small.shape == (107, 150, 3)
    assert np.abs(small.astype(int) - np.asarray(Image.fromarray(picture).resize((150, 107)))).mean() < 3
    opened.close()


def test_a_slide_that_is_damaged_inside_keeps_a_row(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tif", draw_slide(300, 200, BLOBS), levels=1)
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    (tmp_path / "b.tif").write_bytes(data)
    open_slide(tmp_path / "b.tif").close()  # opens, and fails only where it is read
    tiles = cut_slides(tmp_path, ["a.tif", "b.tif"], Tiling(tile=50, min_tissue=0.5))
    assert tiles.slides.count(0) > 1
    assert tiles.slides.count(1) == 1
    assert tiles.notes[-1] == "1 slides cannot be read; extraction says why"


def test_parts_of_slides() -> None:
    part = parse_part("x=3&y=4&width=5&height=6&scale=1.5")
    assert (part.is_tile, part.scale, str(part)) == (True, 1.5, "x=3&y=4&width=5&height=6&scale=1.5")
    with pytest.raises(ManifestError, match="only one of level, mpp and scale is given"):
        parse_part("x=3&y=4&width=5&height=6&scale=1.5&level=1")
    with pytest.raises(ManifestError, match="mpp and scale are above 0"):
        parse_part("x=3&y=4&width=5&height=6&mpp=0")
    with pytest.raises(ManifestError, match=r"a tile has x, y, width and height \(at least 1 pixel\)"):
        parse_part("x=3&y=4&width=0&height=6")
