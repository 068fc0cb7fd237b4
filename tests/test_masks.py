"""Masks against run lengths and polygons by brute force, and against where the image path puts the same pixels."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from volume_files import hdf5_bytes, nifti_bytes, stored_as

from featstore.errors import ConfigError, DecodeError, ManifestError
from featstore.images import PreprocessSpec, preprocess
from featstore.images.decoded import DecodeOptions
from featstore.images.masks import fit_mask, grid_labels, read_mask, read_masks, to_classes
from featstore.images.masks_draw import Outlines, fill, rle_mask
from featstore.images.opening import OpenFiles
from featstore.images.part import Part
from featstore.images.resize import GEOMETRIES
from featstore.inputs import Inputs

MEAN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def spec_of(geometry: str, height: int = 12, width: int = 12) -> PreprocessSpec:
    return PreprocessSpec(geometry=geometry, height=height, width=width, **MEAN)  # type: ignore[arg-type]


def save(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(path)


def read(root: Path, path: str, part: str | None = None) -> np.ndarray:
    return read_mask(Inputs(root), OpenFiles(), path, part)


# Values


def test_black_and_white_is_0_and_1_and_classes_stay(tmp_path: Path) -> None:
    save(tmp_path / "bw.png", np.array([[0, 255], [255, 0]], np.uint8))
    save(tmp_path / "bit.png", np.array([[False, True]]))
    save(tmp_path / "classes.png", np.array([[0, 1, 255]], np.uint8))
    save(tmp_path / "deep.png", np.array([[0, 255]], np.uint16))
    assert read(tmp_path, "bw.png").tolist() == [[0, 1], [1, 0]]
    assert read(tmp_path, "bit.png").tolist() == [[0, 1]]
    assert read(tmp_path, "classes.png").tolist() == [[0, 1, 255]]
    assert read(tmp_path, "deep.png").tolist() == [[0, 255]]
    assert read(tmp_path, "bw.png", "values=255:255").tolist() == [[0, 255], [255, 0]]


def test_values_map_or_give_one_class() -> None:
    stored = np.array([[0, 3, 255], [128, 3, 7]], np.uint8)
    assert to_classes(stored, 5).tolist() == [[0, 5, 5], [5, 5, 5]]
    assert to_classes(stored, {"3": 1, "255": 2, "0": 9}).tolist() == [[9, 1, 2], [0, 1, 0]]
    assert to_classes(np.array([[-1000, 2]], np.int16), {"-1000": 4}).tolist() == [[4, 0]]
    assert to_classes(np.array([[0.0, 2.0]]), None).tolist() == [[0, 2]]
    assert to_classes(np.array([[True, False]]), None).tolist() == [[1, 0]]
    assert to_classes(stored, {"70000": 1}).max() == 0


def test_colours_are_mapped_by_rrggbb_and_grey_ones_collapse(tmp_path: Path) -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 0], [16, 32, 255]]], np.uint8)
    save(tmp_path / "c.png", colours)
    save(tmp_path / "black.png", colours * 0)
    save(tmp_path / "alpha.png", np.dstack([colours, np.full((2, 2), 7, np.uint8)]))
    save(tmp_path / "grey.png", np.stack([np.array([[0, 3]], np.uint8)] * 3, -1))
    mapping = "values=ff0000:1,00FF00:2,1020ff:3"
    for name in ("c.png", "alpha.png"):
        assert read(tmp_path, name, mapping).tolist() == [[1, 2], [0, 3]]
    assert read(tmp_path, "black.png", mapping).max() == 0
    assert read(tmp_path, "black.png", "values=000000:6").min() == 6
    assert read(tmp_path, "c.png", "values=4").tolist() == [[4, 4], [0, 4]]
    assert read(tmp_path, "grey.png").tolist() == [[0, 3]]
    with pytest.raises(DecodeError, match=r"the mask has colours; map them with values=rrggbb:1"):
        read(tmp_path, "c.png")
    with pytest.raises(DecodeError, match="values= names colours, but the mask has none"):
        to_classes(np.array([[1, 2]], np.int32), {"ff0000": 1})


def test_colours_that_are_not_named_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "grey.png", np.array([[0, 3], [255, 3]], np.uint8))
    with pytest.raises(DecodeError, match="values= names colours, but the mask is grey and has none of them"):
        read(tmp_path, "grey.png", "values=ff0000:1")
    save(tmp_path / "zero.png", np.zeros((2, 2), np.uint8))
    assert read(tmp_path, "zero.png", "values=ff0000:1").max() == 0
    save(tmp_path / "c.png", np.array([[[255, 0, 0], [254, 0, 0]], [[0, 0, 0], [9, 9, 9]]], np.uint8))
    with pytest.raises(DecodeError, match="2 pixels of the mask have a colour other than black that values= does not"):
        read(tmp_path, "c.png", "values=ff0000:1")
    assert read(tmp_path, "c.png", "values=ff0000:1,fe0000:2,090909:0").tolist() == [[1, 2], [0, 0]]
    with pytest.raises(DecodeError, match="2 pixels of the mask have a colour"):
        read(tmp_path, "grey.png", "values=ffffff:1")


def test_cremi_background_of_64_bits_is_0_and_large_ids_stay() -> None:
    stored = np.array([[2**64 - 1, 2**60 + 1, 7]], np.uint64)
    assert to_classes(stored, None).tolist() == [[0, 2**60 + 1, 7]]
    assert to_classes(stored, 1).tolist() == [[0, 1, 1]]
    huge = np.array([[2**63 + 5, 1]], np.uint64)
    assert to_classes(huge, {str(2**63 + 5): 3}).tolist() == [[3, 0]]
    with pytest.raises(DecodeError, match="numbers above 63 bits; map them with values="):
        to_classes(huge, None)


@pytest.mark.parametrize("bad", [0.5, np.nan, np.inf, -np.inf])
def test_values_that_are_no_classes_are_refused(bad: float) -> None:
    with pytest.raises(DecodeError, match="values that are no whole numbers; it is not a mask of classes"):
        to_classes(np.array([[0.0, bad]]), None)


@pytest.mark.parametrize("text", ["a", "1:2,", "1:2,x:3", "-3", "1:-2", "", "1:2;3:4"])
def test_values_that_cannot_be(text: str, tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(ManifestError, match="part: values is a class, or VALUE:CLASS joined by commas"):
        read(tmp_path, "a.png", f"values={text}")
    with pytest.raises(ManifestError, match="part: values names a value twice"):
        read(tmp_path, "a.png", "values=1:2,1:3")


def test_masks_of_one_image_lie_over_each_other_in_order(tmp_path: Path) -> None:
    save(tmp_path / "left.png", np.array([[255, 255, 0]], np.uint8))
    save(tmp_path / "right.png", np.array([[0, 255, 255]], np.uint8))
    save(tmp_path / "small.png", np.array([[0, 255]], np.uint8))
    assert read(tmp_path, "left.png|right.png", "values=1|values=2").tolist() == [[1, 2, 2]]
    assert read(tmp_path, "right.png|left.png", "values=2|values=1").tolist() == [[1, 1, 2]]
    assert read(tmp_path, "left.png|right.png").tolist() == [[1, 1, 1]]
    with pytest.raises(DecodeError, match=r"masks of one image must have one size, got \(1, 3\) and \(1, 2\)"):
        read(tmp_path, "left.png|small.png")
    with pytest.raises(ManifestError, match="mask_part must name a part for each of the 2 masks, or none; got 3"):
        read(tmp_path, "left.png|right.png", "values=1|values=2|values=3")


def test_masks_in_volumes_are_turned_as_the_image(tmp_path: Path) -> None:
    anatomy = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.float64)
    (tmp_path / "m.nii").write_bytes(nifti_bytes(*stored_as(anatomy, (2, 0, 1), (1, -1, 1))))
    (tmp_path / "m.h5").write_bytes(hdf5_bytes({"a/ids": anatomy.astype(np.uint64), "raw": anatomy}))
    np.save(tmp_path / "m.npy", anatomy.astype(np.int8))
    found = read(tmp_path, "m.nii", "axis=axial&index=2&values=2:1")
    assert np.array_equal(found, (anatomy[:, :, 2] == 2).T[::-1, ::-1])
    assert np.array_equal(read(tmp_path, "m.h5", "key=a/ids&index=3"), anatomy[3])
    assert np.array_equal(read(tmp_path, "m.npy", "axis=2&index=3"), anatomy[:, :, 3])
    (tmp_path / "text").write_text("nothing")
    with pytest.raises(DecodeError, match="not an image file of a known kind"):
        read(tmp_path, "text")


# Outlines


def inside(vertices: np.ndarray, height: int, width: int) -> np.ndarray:
    """Even-odd rule at pixel centres, one pixel and one edge at a time."""
    mask = np.zeros((height, width), bool)
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5, row + 0.5
            for (x0, y0), (x1, y1) in zip(vertices, np.roll(vertices, -1, axis=0)):
                if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
                    mask[row, column] ^= True
    return mask


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), corners=st.integers(0, 9), whole=st.booleans())
def test_filled_polygons_are_point_in_polygon(seed: int, corners: int, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 14, 2))
    vertices = rng.uniform(-6, 18, (corners, 2))
    vertices = np.round(vertices * 2) / 2 if whole else vertices  # on pixel edges and on centres
    mask = np.zeros((height, width), np.int64)
    fill(mask, vertices, 3)
    expected = inside(vertices, height, width) if corners > 2 else np.zeros((height, width), bool)
    assert np.array_equal(mask, expected * 3)


def runs_of(mask: np.ndarray) -> list[int]:
    """COCO's run lengths, one pixel at a time."""
    counts, current, length = [], False, 0
    for value in mask.T.ravel().tolist():
        if value == current:
            length += 1
        else:
            counts.append(length)
            current, length = value, 1
    return [*counts, length]


def packed(counts: list[int]) -> str:
    """COCO's text form of run lengths, written after its definition."""
    text = ""
    for at, count in enumerate(counts):
        number, more = count - (counts[at - 2] if at > 2 else 0), True
        while more:
            bits = number & 0x1F
            number >>= 5
            more = number != (-1 if bits & 0x10 else 0)
            text += chr(bits + (0x20 if more else 0) + 48)
    return text


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_run_lengths_as_list_and_as_text(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 60, 2))
    mask = rng.random((height, width)) < rng.choice([0.0, 0.02, 0.5, 1.0])
    counts = runs_of(mask)
    for form in (counts, packed(counts)):
        assert np.array_equal(rle_mask({"counts": form, "size": [height, width]}, height, width), mask)


def coco(**more: Any) -> dict[str, Any]:
    blob = np.zeros((6, 8), bool)
    blob[4:, 5:] = True
    square = [1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0]
    return {
        "images": [{"id": 7, "height": 6, "width": 8, "file_name": "a.jpg"}, {"id": 8, "height": 2, "width": 2}],
        "categories": [{"id": 30, "name": "b"}, {"id": 4, "name": "a"}],
        "annotations": [
            {"image_id": 7, "category_id": 30, "segmentation": [square, [6, 0, 8, 0, 8, 2, 6, 2]]},
            {"image_id": 7, "category_id": 4, "segmentation": {"counts": runs_of(blob), "size": [6, 8]}},
        ],
        **more,
    }


def test_coco_categories_are_classes_in_the_order_of_their_ids(tmp_path: Path) -> None:
    (tmp_path / "coco.json").write_text(json.dumps(coco()))
    expected = np.zeros((6, 8), np.int64)
    expected[1:3, 1:4] = 2
    expected[:2, 6:] = 2
    expected[4:, 5:] = 1
    assert np.array_equal(read(tmp_path, "coco.json", "draw=coco:7"), expected)
    assert np.array_equal(read(tmp_path, "coco.json", "draw=coco:7&values=2:5"), np.where(expected == 2, 5, 0))
    assert read(tmp_path, "coco.json", "draw=coco:8").tolist() == [[0, 0], [0, 0]]


def test_coco_files_that_cannot_be_read() -> None:
    def draw(table: object, image: str = "7") -> None:
        Outlines(json.dumps(table).encode()).labels(Part(draw=f"coco:{image}"))

    with pytest.raises(DecodeError, match="the COCO file has no image of the id named"):
        draw(coco(), "9")
    for counts in ([1, 2], [-1, 49], "1"):
        bad = [{"image_id": 7, "category_id": 4, "segmentation": {"counts": counts, "size": [6, 8]}}]
        with pytest.raises(DecodeError, match="do not make a mask of the image's size"):
            draw(coco(annotations=bad))
    broken: list[Any] = [[], {}, coco(annotations=[{"image_id": 7}]), coco(images=[{"id": 7}])]
    for table in broken:
        with pytest.raises(DecodeError, match="damaged, truncated or unsupported COCO data"):
            draw(table)
    for height in (0, 2**20):
        with pytest.raises(DecodeError, match=r"a mask of \w+ pixels: there must be 1 to 268435456"):
            draw(coco(images=[{"id": 7, "height": height, "width": 2**20}]))
    with pytest.raises(DecodeError, match="an outline has a vertex that is no place"):
        draw(coco(annotations=[{"image_id": 7, "category_id": 4, "segmentation": [[0, 0, 1, 1, 1e999, 3]]}]))


def asap(*outlines: tuple[str, list[tuple[float, float]]]) -> str:
    rows = []
    for group, points in outlines:
        ordered = list(enumerate(points))[::-1]  # the order stands in the file, not in its lines
        spots = "".join(f'<Coordinate Order="{at}" X="{x}" Y="{y}" />' for at, (x, y) in ordered)
        rows.append(
            f'<Annotation Name="A" Type="Polygon" PartOfGroup="{group}"><Coordinates>{spots}</Coordinates></Annotation>'
        )
    return f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{"".join(rows)}</Annotations></ASAP_Annotations>'


def box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


@pytest.mark.parametrize("hole", ["_2", "Exclusion", "normal"])
def test_asap_tumour_is_1_and_exclusions_are_cut_out_whatever_their_order(hole: str, tmp_path: Path) -> None:
    (tmp_path / "t.xml").write_text(
        asap((hole, box(1020, 2020, 1030, 2030)), ("Tumor", box(1010, 2010, 1040, 2040)), ("_0", [(0, 0), (5, 5)]))
    )
    expected = np.zeros((60, 50), np.int64)
    expected[10:40, 10:40] = 1
    expected[20:30, 20:30] = 0
    tile = "draw=asap&x=1000&y=2000&width=50&height=60"
    assert np.array_equal(read(tmp_path, "t.xml", tile), expected)
    half = read(tmp_path, "t.xml", "draw=asap&x=1000&y=2000&width=25&height=30&level=1")
    assert np.array_equal(half, expected[::2, ::2])
    fifth = read(tmp_path, "t.xml", "draw=asap&x=1000&y=2000&width=10&height=12&scale=5.0")
    assert np.array_equal(fifth, expected[2::5, 2::5])
    assert read(tmp_path, "t.xml", "draw=asap&x=9000&y=9000&width=5&height=5").max() == 0


def test_bcnb_polygons_at_any_depth_and_negative_ones_are_cut_out(tmp_path: Path) -> None:
    ring = [list(point) for point in box(2, 3, 6, 7)]
    hole = [list(point) for point in box(3, 4, 5, 6)]
    expected = np.zeros((8, 9), np.int64)
    expected[3:7, 2:6] = 1
    tile = "draw=polygons&x=0&y=0&width=9&height=8"
    for tree in (
        {"positive": [{"name": "A", "vertices": ring}], "negative": []},
        {"polygons": [ring]},
        {"vertices": ring},
        [[ring]],
    ):
        (tmp_path / "p.json").write_text(json.dumps(tree))
        assert np.array_equal(read(tmp_path, "p.json", tile), expected)
    (tmp_path / "p.json").write_text(json.dumps({"negative": [{"vertices": hole}], "positive": [{"vertices": ring}]}))
    expected[4:6, 3:5] = 0
    assert np.array_equal(read(tmp_path, "p.json", tile), expected)
    (tmp_path / "p.json").write_text(json.dumps({"positive": [], "negative": []}))
    assert read(tmp_path, "p.json", tile).max() == 0


def test_outlines_that_cannot_be_drawn() -> None:
    tile: dict[str, Any] = {"x": 0, "y": 0, "width": 4, "height": 4}
    xml = Outlines(asap(("_0", box(0, 0, 2, 2))).encode())
    for draw in ("coco", "coco:", "svg", "asap:2"):
        with pytest.raises(ManifestError, match="draw is coco:IMAGE_ID, asap or polygons"):
            xml.labels(Part(draw=draw, **tile))
    with pytest.raises(ManifestError, match="draw=asap needs the tile: x, y, width and height"):
        xml.labels(Part(draw="asap"))
    with pytest.raises(ManifestError, match="outlines know no micrometres; give the tile's scale"):
        xml.labels(Part(draw="asap", mpp=0.5, **tile))
    bomb = b'<!DOCTYPE a [<!ENTITY b "b">]><a>&b;</a>'
    with pytest.raises(DecodeError, match="needs no DOCTYPE"):
        Outlines(bomb).labels(Part(draw="asap", **tile))
    with pytest.raises(DecodeError, match="damaged, truncated or unsupported XML data"):
        Outlines(b"<a>").labels(Part(draw="asap", **tile))
    with pytest.raises(DecodeError, match="damaged, truncated or unsupported JSON data"):
        Outlines(b"[" * 100_000).labels(Part(draw="polygons", **tile))
    with pytest.raises(DecodeError, match=r"the JSON file has no lists of \[x, y\], nor one of the keys positive"):
        Outlines(b'{"a": 1}').labels(Part(draw="polygons", **tile))
    assert xml.num_bytes > 0
    xml.close()
    assert xml.num_bytes == 0
    drawn = Outlines(asap(("_0", box(0, 0, 2, 2))).encode()).pixels(Part(draw="asap", **tile), DecodeOptions())
    assert drawn.pixels.sum() == 4


# Geometry


# The published spline leaves the corner pixels where they are, and overshoots: it has a test of its own.
@pytest.mark.parametrize("geometry", sorted(set(GEOMETRIES) - {"spline"}))
@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 64), (91, 40), (7, 5), (12, 12), (1, 9)])
@pytest.mark.parametrize("target", [(12, 12), (24, 36), (9, 5)])
def test_masks_lie_where_the_image_lies(geometry: str, height: int, width: int, target: tuple[int, int]) -> None:
    spec = spec_of(geometry, *target)
    mask = np.zeros((height, width), np.int64)
    mask[: (height + 1) // 2, : (width + 1) // 2] = 1
    mask[(height + 1) // 2 :, (width + 1) // 2 :] = 1
    board = preprocess(mask.astype(np.uint8) * np.uint8(255), spec)[0].astype(float) / 255
    fitted = fit_mask(mask, spec)
    assert fitted.shape == target
    # Away from the edge of a class, where the filter mixes, both must say the same.
    clear = (board < 0.02) | (board > 0.98)
    assert np.array_equal(fitted[clear], board[clear].round())
    # And the filter mixes but a few pixels around an edge: the edges lie at the same place to half a pixel.
    assert np.abs(fitted - board).max() <= 0.75


def test_masks_lie_where_the_published_spline_puts_the_image() -> None:
    mask = np.zeros((40, 64), np.int64)
    mask[9:30, 20:50] = 2**60 + 1  # beyond what float64 holds
    board = preprocess((mask > 0).astype(np.uint8) * np.uint8(255), spec_of("spline", 80, 96))[0] / 255
    fitted = fit_mask(mask, spec_of("spline", 80, 96))
    assert set(np.unique(fitted).tolist()) == {0, 2**60 + 1}
    assert ((fitted > 0) == (board > 0.5)).mean() > 0.97


@pytest.mark.parametrize("geometry", sorted(GEOMETRIES))
def test_masks_of_the_network_size_stay_and_classes_are_never_mixed(geometry: str) -> None:
    mask = np.random.default_rng(0).integers(0, 2**40, (30, 50)) * 2
    fitted = fit_mask(mask, spec_of(geometry, 12, 12))
    assert set(np.unique(fitted)) <= {0, *np.unique(mask)}
    if geometry in ("squash", "letterbox"):
        assert np.array_equal(fit_mask(mask, spec_of(geometry, 30, 50)), mask)


@pytest.mark.parametrize(("side", "target"), [(7, 3), (3, 7), (100, 13), (13, 100), (5, 5), (1, 4), (4, 1)])
def test_squashed_masks_are_torchs_nearest_exact(side: int, target: int) -> None:
    mask = np.arange(side * 6).reshape(side, 6)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(mask)[None, None].double(), (target, 4), mode="nearest-exact"
    )
    assert np.array_equal(fit_mask(mask, spec_of("squash", target, 4)), expected[0, 0].numpy())


def test_beside_a_letterboxed_mask_is_0() -> None:
    fitted = fit_mask(np.full((10, 20), 3), spec_of("letterbox", 12, 12))
    assert (fitted[3:9] == 3).all()
    assert not fitted[:3].any()
    assert not fitted[9:].any()


@pytest.mark.parametrize("kind", ["crop", "square", "floats"])
def test_hf_masks_follow_the_processor(kind: str) -> None:
    processor: dict[str, Any] = {
        "crop": {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 28, "width": 28},
        },
        "square": {"image_processor_type": "ViTImageProcessor", "size": {"height": 28, "width": 28}},
        "floats": {"image_processor_type": "DINOv3ViTImageProcessor", "size": {"height": 28, "width": 28}},
    }[kind]
    spec = PreprocessSpec(geometry="hf", height=28, width=28, processor=processor)
    for shape in ((64, 80), (90, 61), (28, 28)):
        mask = np.zeros(shape, np.int64)
        mask[shape[0] // 2 :, : shape[1] // 3] = 1
        board = preprocess(mask.astype(np.uint8) * np.uint8(255), spec)[0].astype(float)
        board /= 1 if spec.unit_range else 255
        clear = (board < 0.02) | (board > 0.98)
        assert clear.mean() > 0.8
        assert np.array_equal(fit_mask(mask, spec)[clear], board[clear].round())


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(DecodeError, match="the mask has no pixels"):
        fit_mask(np.zeros((0, 4), np.int64), spec_of("squash"))


# Rows of a manifest


@dataclass
class Rows:
    """As much of a manifest as masks need."""

    root: Path
    paths: list[str | None]
    parts: list[str | None]

    def column(self, name: str) -> list[Any]:
        assert name == "mask_path"
        return self.paths

    def place(self, name: str) -> list[Any]:
        assert name == "mask_part"
        return self.parts


def test_masks_of_manifest_rows_in_the_order_asked(tmp_path: Path) -> None:
    volume = np.zeros((8, 8, 3), np.uint8)
    volume[..., 1], volume[..., 2] = 1, 2
    (tmp_path / "v.nii").write_bytes(nifti_bytes(volume))
    rows = Rows(tmp_path, ["v.nii", "v.nii", None, "v.nii"], ["index=0", "index=1", None, "index=2"])
    masks = read_masks(rows, np.array([3, 0, 1]), spec_of("squash"))
    assert masks.dtype == np.int32
    assert masks.shape == (3, 12, 12)
    assert [set(np.unique(mask).tolist()) for mask in masks] == [{2}, {0}, {1}]
    assert read_masks(rows, np.array([], np.int64), spec_of("squash")).shape == (0, 12, 12)
    with pytest.raises(ManifestError, match="row 2 has no mask"):
        read_masks(rows, np.array([2]), spec_of("squash"))


def test_errors_name_the_mask(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with h5py.File(tmp_path / "big.h5", "w") as file:
        file["main"] = np.full((4, 4), 2**40)
    rows = Rows(tmp_path, ["bad.png", "big.h5", "absent.png"], [None, None, None])
    with pytest.raises(DecodeError, match=r"mask bad\.png: "):
        read_masks(rows, np.array([0]), spec_of("squash"))
    with pytest.raises(DecodeError, match=r"mask big\.h5: class numbers must be 0 to 2147483647"):
        read_masks(rows, np.array([1]), spec_of("squash"))
    with pytest.raises(FileNotFoundError):
        read_masks(rows, np.array([2]), spec_of("squash"))


# Shares in patches


def test_shares_of_classes_are_counted_exactly() -> None:
    masks = np.random.default_rng(1).integers(0, 4, (2, 6, 9)).astype(np.int32)
    shares = grid_labels(masks, 3, 4)
    assert shares.shape == (2, 2, 3, 4)
    for m, row, column, number in np.ndindex(shares.shape):
        patch = masks[m, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert shares[m, row, column, number] == np.float32((patch == number).sum() / 9)
    assert np.allclose(shares.sum(axis=-1), 1)
    assert grid_labels(masks[:0], 3, 4).shape == (0, 2, 3, 4)
    with pytest.raises(ConfigError, match="masks of 6x9 pixels are not divided by patches of 4"):
        grid_labels(masks, 4, 4)
    with pytest.raises(ConfigError, match="classes must be 0 to 2, got 0 to 3"):
        grid_labels(masks, 3, 3)


@pytest.mark.realdata
def test_lung_masks_read_as_0_and_1(shared_data: Path) -> None:
    paths = sorted(path for path in (shared_data / "seg").rglob("*.png") if "mask" in str(path.parent))[:12]
    assert paths
    for path in paths:
        mask = read(shared_data, str(path.relative_to(shared_data)))
        assert set(np.unique(mask).tolist()) == {0, 1}
        assert np.array_equal(mask == 1, np.array(Image.open(io.BytesIO(path.read_bytes())).convert("L")) == 255)
