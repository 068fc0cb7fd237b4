"""Camelyon16, Camelyon17 and BCNB: tiles, labels of slides and patients, and the known errors of the releases."""

import json
import sys
from pathlib import Path

import openpyxl
import pytest
from miniatures import pathology
from PIL import Image
from slide_files import draw_slide, write_slide

from featstore.datasets import bcnb, camelyon, tiles
from featstore.datasets.progress import watched
from featstore.datasets.source import Source
from featstore.errors import ConfigError, ManifestError
from featstore.images.part import parse_part
from probes.known.pathology import TASKS


def rows_of(source: Source) -> dict[str, dict[str, object]]:
    """The first tile of every slide."""
    rows: dict[str, dict[str, object]] = {}
    for row in source.table.to_pylist():
        rows.setdefault(row["volume"], row)
    return rows


def test_camelyon16_known_errors_are_left_out(tmp_path: Path) -> None:
    pathology.camelyon16(tmp_path)
    source = camelyon.read_16(tmp_path, tile=40, max_tiles=1)
    slides = rows_of(source)
    assert "normal_086" not in slides
    assert "test_049" not in slides
    assert "left out as errors of the release: normal_086, test_049" in source.notes
    assert {"normal_086", "test_049"} <= set(rows_of(camelyon.read_16(tmp_path, tile=40, max_tiles=1, exclude=False)))


def test_camelyon16_labels_and_split(tmp_path: Path) -> None:
    pathology.camelyon16(tmp_path)
    slides = rows_of(camelyon.read_16(tmp_path, tile=40, max_tiles=1))
    assert slides["normal_001"]["path"] == "training/normal/Normal_001.tif"
    assert [slides[name]["label"] for name in ("normal_001", "tumor_001", "test_001", "test_002")] == [
        "0",
        "1",
        "1",
        "0",
    ]
    assert [slides[name]["split"] for name in ("normal_001", "tumor_001", "test_001")] == ["train", "train", "test"]
    (tmp_path / "testing/reference.csv").unlink()
    source = camelyon.read_16(tmp_path, tile=40, max_tiles=1)
    assert rows_of(source)["test_001"]["label"] is None
    assert "4 test slides have no label (reference.csv)" in source.notes


def test_camelyon16_slides_without_all_outlines_are_marked(tmp_path: Path) -> None:
    for number in (14, 15, 61):
        write_slide(tmp_path / f"tumor_{number:03d}.tif", draw_slide(200, 160, [(80, 80, 60)]), levels=1)
    slides = rows_of(camelyon.read_16(tmp_path, tile=40, max_tiles=1))
    assert [row["exhaustive"] for row in slides.values()] == ["1", "0", "0"]


def test_camelyon16_tiles_lie_on_a_grid_and_carry_their_mask(tmp_path: Path) -> None:
    pathology.camelyon16(tmp_path)
    source = camelyon.read_16(tmp_path, tile=40)
    row = next(row for row in source.table.to_pylist() if row["volume"] == "tumor_001")
    part = parse_part(row["part"])
    assert (part.x, part.y, part.width, part.level) == (row["x"], row["y"], 40, 0)
    assert row["x"] % 40 == 0
    assert row["y"] % 40 == 0
    assert row["mask_part"] == f"{row['part']}&draw=asap"
    assert row["id"] == f"tumor_001_{row['x']}_{row['y']}"
    coarse = camelyon.read_16(tmp_path, tile=40, mpp=0.5)
    assert parse_part(coarse.table["part"].to_pylist()[0]).scale == 2.0
    assert any("tiles of 40 pixels at 0.5 um a pixel" in note for note in coarse.notes)


def test_camelyon17_rows_of_patients_and_slides_are_told_apart(tmp_path: Path) -> None:
    pathology.camelyon17(tmp_path)
    slides = rows_of(camelyon.read_17(tmp_path, tile=40, max_tiles=1))
    first, second = slides["patient_000_node_1"], slides["patient_005_node_1"]
    assert (first["slide_class"], first["pn_stage"], first["label"]) == ("itc", "pN0", "1")
    assert (second["slide_class"], second["pn_stage"], second["centre"]) == ("macro", "pN1", "0")
    assert first["group"] == "patient_000"
    assert (slides["patient_150_node_0"]["label"], slides["patient_150_node_0"]["split"]) == (None, "")


def test_camelyon17_patients_never_cross_splits(tmp_path: Path) -> None:
    pathology.camelyon17(tmp_path)
    source = camelyon.read_17(tmp_path, tile=40, max_tiles=1)
    pairs = {(row["group"], row["split"]) for row in source.table.to_pylist()}
    assert len(pairs) == len({group for group, _ in pairs})
    unseen = {row["centre"] for row in source.table.to_pylist() if row["split_centre"] == "test"}
    assert unseen == {"3", "4"}


def test_camelyon17_itc_slides_can_be_left_out(tmp_path: Path) -> None:
    pathology.camelyon17(tmp_path)
    slides = rows_of(camelyon.read_17(tmp_path, tile=40, max_tiles=1, itc=False))
    assert "itc" not in {row["slide_class"] for row in slides.values()}


def test_camelyon17_mpp_may_be_missing_in_the_file(tmp_path: Path) -> None:
    pathology.camelyon17(tmp_path)
    with pytest.raises(
        ConfigError, match=r"does not state its micrometres a pixel, so --option mpp=0\.5 cannot be met"
    ):
        camelyon.read_17(tmp_path, mpp=0.5)
    source = camelyon.read_17(tmp_path, tile=20, max_tiles=1, mpp=0.5, slide_mpp=0.25)
    assert parse_part(source.table["part"].to_pylist()[0]).scale == 2.0


def test_camelyon_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no slide such as normal_001\.tif"):
        camelyon.read_16(tmp_path)
    with pytest.raises(ManifestError, match=r"has no slide such as patient_000_node_0\.tif"):
        camelyon.read_17(tmp_path)
    write_slide(tmp_path / "patient_000_node_0.tif", draw_slide(100, 100, [(50, 50, 40)]), levels=1)
    (tmp_path / "stages.csv").write_text("name,stage\n")
    with pytest.raises(ManifestError, match=r"must have the columns patient and stage, got \['name', 'stage'\]"):
        camelyon.read_17(tmp_path)
    with pytest.raises(ConfigError, match="options of slides: tile at least 1"):
        tiles.Tiling(tile=0)


def test_slides_that_cannot_be_read_keep_a_row(tmp_path: Path) -> None:
    write_slide(tmp_path / "normal_001.tif", draw_slide(100, 100, []), levels=1)
    (tmp_path / "normal_002.tif").write_bytes(b"broken")
    seen: list[tuple[str, int, int]] = []
    with watched(lambda what, done, total: seen.append((what, done, total))):
        source = camelyon.read_16(tmp_path)
    assert source.table["volume"].to_pylist() == ["normal_002"]
    assert "1 slides cannot be read; extraction says why" in source.notes
    assert "1 slides show no tissue and have no tiles" in source.notes
    assert seen == [("slides", 1, 2), ("slides", 2, 2)]


def test_bcnb_markers_come_from_the_clinical_table(tmp_path: Path) -> None:
    pathology.bcnb(tmp_path)
    source = bcnb.read(tmp_path, tile=40, max_tiles=1)
    rows = rows_of(source)
    positive = next(row for row in rows.values() if row["ER"] == "Positive")
    assert [positive[name] for name in ("er", "pr", "her2", "ki67")] == ["1", "0", "1", "1"]
    assert {row["ALN status"]: row["aln"] for row in rows.values()} == {"N0": "0", "N+(1-2)": "1"}
    assert source.tasks == ("bcnb-aln", "bcnb-er", "bcnb-pr", "bcnb-her2", "bcnb-ki67")
    assert positive["mask_part"] == f"{positive['part']}&draw=polygons"


def test_bcnb_official_split(tmp_path: Path) -> None:
    pathology.bcnb(tmp_path)
    for split, names in (("train", range(1, 30)), ("val", range(30, 35)), ("test", range(35, 50))):
        (tmp_path / f"{split}-type-0.json").write_text(json.dumps([{"id": str(name), "label": 0} for name in names]))
    source = bcnb.read(tmp_path, tile=40, max_tiles=1)
    assert source.split_origin == "official (type 0)"
    rows = rows_of(source)
    assert [rows[name]["split"] for name in ("1", "30", "49", "50")] == ["train", "val", "test", ""]
    (tmp_path / "val-type-0.json").write_text("{}x")
    with pytest.raises(ManifestError, match=r"val-type-0\.json must be a list of objects with an id"):
        bcnb.read(tmp_path, tile=40, max_tiles=1)


def test_bcnb_ki67_shares() -> None:
    assert flags_of("ki67", ["14", "15%", "20", "1", "0", "", "unknown"]) == ["0", "1", "1", "0", "0", None, None]


def flags_of(key: str, texts: list[str]) -> list[str | None]:
    return bcnb._flags(key, [{"Ki67 or HER2": text} for text in texts], ["Ki67 or HER2"])


def test_bcnb_ki67_is_fractions_or_percent_for_the_whole_column() -> None:
    assert flags_of("ki67", ["0.2", "0.1", "1", "0", "9%"]) == ["1", "0", "1", "0", "0"]
    assert flags_of("ki67", ["0.2", "1", "90"]) == ["0", "0", "1"]
    assert flags_of("ki67", ["1", "0"]) == ["0", "0"]  # no yes and no: one percent and none


def test_bcnb_her2_digits_are_grades_not_yes_and_no() -> None:
    grades = ["0", "1", "1+", "2", "2+", "3", "3+", "Positive", "negative", "+"]
    assert flags_of("her2", grades) == ["0", "0", "0", None, None, "1", "1", "1", "0", None]
    # A verdict counts before the grade of another column.
    both = [{"HER2 Expression": "2+", "HER2": "Positive"}, {"HER2 Expression": "3+", "HER2": "Negative"}]
    assert bcnb._flags("her2", both, ["HER2 Expression", "HER2"]) == ["1", "0"]


def test_bcnb_equivocal_her2_is_counted(tmp_path: Path) -> None:
    pathology.bcnb(tmp_path)
    table = tmp_path / "patient-clinical-data.xlsx"
    book = openpyxl.load_workbook(table)
    book.active["E2"], book.active["E3"], book.active["E4"] = "2+", 2, 1
    book.save(table)
    source = bcnb.read(tmp_path, tile=40, max_tiles=1)
    assert [rows_of(source)[name]["her2"] for name in ("1", "2", "3", "4")] == [None, None, "0", "1"]
    assert "2 slides have the equivocal HER2 grade 2+ and no verdict; their her2 is blank" in source.notes


def test_bcnb_patches_named_by_numbers_are_no_slides(tmp_path: Path) -> None:
    pathology.bcnb(tmp_path)
    for name in ("2.jpg", "3.jpg", "99.jpg"):
        (tmp_path / "paper_patches/1").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80)).save(tmp_path / "paper_patches/1" / name)
    slides = rows_of(bcnb.read(tmp_path, tile=40, max_tiles=1))
    assert slides["2"]["path"] == "WSIs/2.jpg"
    assert len(slides) == 50
    (tmp_path / "WSIs").rename(tmp_path / "slides")
    with pytest.raises(ManifestError, match=r"2 names stand for more than one file, such as .*/2\.jpg and .*2\.jpg"):
        bcnb.read(tmp_path, tile=40, max_tiles=1)


def test_camelyon16_mask_of_the_same_name_is_no_slide(tmp_path: Path) -> None:
    write_slide(tmp_path / "training/tumor/tumor_001.tif", draw_slide(200, 160, [(80, 80, 60)]), levels=1)
    write_slide(tmp_path / "masks/tumor/tumor_001.tif", draw_slide(200, 160, []), levels=1)
    slides = rows_of(camelyon.read_16(tmp_path, tile=40, max_tiles=1))
    assert slides["tumor_001"]["path"] == "training/tumor/tumor_001.tif"
    write_slide(tmp_path / "training/other/Tumor_001.tif", draw_slide(200, 160, []), levels=1)
    (tmp_path / "training/tumor/tumor_001.tif").rename(tmp_path / "training/tumor_001.tif")
    with pytest.raises(ManifestError, match=r"training/other/Tumor_001\.tif and training/tumor_001\.tif"):
        camelyon.read_16(tmp_path, tile=40, max_tiles=1)


def test_camelyon17_unseen_states_how_many_slides_it_lacks() -> None:
    task = next(task for task in TASKS if task.name == "camelyon17-unseen-b")
    assert any("at most 200 slides" in text and "324 unseen" in text for text in task.deviations)


def test_bcnb_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ManifestError, match=r"has no slide such as 1\.jpg"):
        bcnb.read(tmp_path)
    pathology.bcnb(tmp_path)
    table = tmp_path / "patient-clinical-data.xlsx"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "openpyxl", None)
        with pytest.raises(ManifestError, match=r"needs openpyxl: pip install 'featstore\[slides\]'"):
            bcnb.read(tmp_path)
    table.write_bytes(b"PK\x03\x04broken")
    with pytest.raises(ManifestError, match=r"cannot be read as \.xlsx \(BadZipFile\)"):
        bcnb.read(tmp_path)
    book = openpyxl.Workbook()
    book.active.append(["name", "ER"])
    book.active.append(["x", "Positive"])
    book.save(table)
    with pytest.raises(ManifestError, match="no column holds the slides' ids, such as 1"):
        bcnb.read(tmp_path)
    table.unlink()
    with pytest.raises(ManifestError, match=r"has no \.xlsx with the clinical data"):
        bcnb.read(tmp_path)
