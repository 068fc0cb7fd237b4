"""Traps of slides, endoscopy, small sets and DICOM; expectations are typed from the releases and papers."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import PIL.Image
import pytest
from dicom_files import dataset, phantom, read
from miniatures import WRITERS
from miniatures.chest import write_csv
from PIL import Image
from pydicom.pixels.processing import apply_windowing
from slide_files import draw_slide

from featstore.configs import RegisterConfig
from featstore.datasets import bcnb, camelyon, explain, kvasir, read_source, tuberculosis
from featstore.datasets.source import Source
from featstore.images.decoded import DecodeOptions
from featstore.images.intensity import to_byte_range
from featstore.images.part import Part
from featstore.images.slide import open_slide
from featstore.register import register
from featstore.store.importer import import_features
from probes.known import TASKS
from probes.tasks import make_task

KVASIR_11 = [
    "Angiectasia", "Blood", "Erosion", "Erythematous", "Foreign Bodies", "Ileo-cecal valve", "Lymphangiectasia",
    "Normal", "Pylorus", "Reduced Mucosal View", "Ulcer",
]  # fmt: skip
PHASES_7 = [
    "Preparation", "Dividing Ligament and Peritoneum", "Dividing Uterine Vessels and Ligament",
    "Transecting the Vagina", "Specimen Removal", "Suturing", "Washing",
]  # fmt: skip
NOT_EXHAUSTIVE = [
    "015", "018", "020", "029", "033", "044", "046", "051", "054", "055", "079", "092", "095", "061", "082",
]  # fmt: skip


def touch(path: Path) -> None:
    """A file that is no image: slides that cannot be read keep one row, and other adapters open none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def by_slide(source: Source, column: str) -> dict[str, Any]:
    return dict(zip(source.table["volume"].to_pylist(), source.table[column].to_pylist()))


# ---- Camelyon


def test_camelyon16_leaves_out_all_three_known_errors(tmp_path: Path) -> None:
    for name in ("normal_085", "Normal_086", "test_048", "test_049", "test_050", "Test_114", "test_115"):
        touch(tmp_path / f"{name}.tif")
    kept = set(by_slide(camelyon.read_16(tmp_path), "split"))
    assert kept == {"normal_085", "test_048", "test_050", "test_115"}
    everything = set(by_slide(camelyon.read_16(tmp_path, exclude=False), "split"))
    assert everything - kept == {"normal_086", "test_049", "test_114"}


def test_camelyon16_slides_whose_tumour_is_not_all_outlined(tmp_path: Path) -> None:
    for number in range(1, 112):
        touch(tmp_path / f"training/tumor/tumor_{number:03d}.tif")
    touch(tmp_path / "training/normal/normal_015.tif")
    found = by_slide(camelyon.read_16(tmp_path), "exhaustive")
    assert len(NOT_EXHAUSTIVE) == 13 + 2
    assert {name for name, flag in found.items() if flag == "0"} == {f"tumor_{number}" for number in NOT_EXHAUSTIVE}
    assert found["tumor_001"] == found["tumor_111"] == found["normal_015"] == "1"


@pytest.mark.parametrize("table", ["stage_labels.csv", "stages.csv", "Stage_Labels.csv"])
def test_camelyon17_table_of_stages_has_two_names(table: str, tmp_path: Path) -> None:
    touch(tmp_path / "patient_000_node_0.tif")
    touch(tmp_path / "patient_000_node_1.tif")
    lines = [["patient_000.zip", "pN0(i+)"], ["patient_000_node_0.tif", "itc"], ["patient_000_node_1.tif", "negative"]]
    write_csv(tmp_path / table, ["patient", "stage"], lines)
    source = camelyon.read_17(tmp_path)
    assert by_slide(source, "slide_class") == {"patient_000_node_0": "itc", "patient_000_node_1": "negative"}
    assert set(source.table["pn_stage"].to_pylist()) == {"pN0(i+)"}


@pytest.mark.parametrize(
    "spelling", ["centre_{}", "Centre_{}", "center_{}", "CENTER_{}", "centre{}", "training/center{}"]
)
def test_camelyon17_centre_folders_are_spelt_in_many_ways(spelling: str, tmp_path: Path) -> None:
    for centre in range(5):
        # The folder counts, not the number of the patient (0 to 19 would be centre 0).
        touch(tmp_path / spelling.format(centre) / f"patient_{centre:03d}_node_0.tif")
    found = by_slide(camelyon.read_17(tmp_path), "centre")
    assert found == {f"patient_{centre:03d}_node_0": str(centre) for centre in range(5)}


def test_camelyon17_centre_without_folder_is_told_by_the_patient(tmp_path: Path) -> None:
    for patient in (0, 19, 20, 39, 40, 79, 80, 99):
        touch(tmp_path / f"patient_{patient:03d}_node_4.tif")
    assert list(by_slide(camelyon.read_17(tmp_path), "centre").values()) == ["0", "0", "1", "1", "2", "3", "4", "4"]


def test_camelyon17_unseen_gives_no_itc_slide_a_role(tmp_path: Path, store_path: Path) -> None:
    lines, kinds = [], ("negative", "itc", "micro", "macro", "itc")
    for patient in range(100):
        for node, kind in enumerate(kinds):
            name = f"patient_{patient:03d}_node_{node}.tif"
            touch(tmp_path / f"centre_{patient // 20}" / name)
            lines.append([name, kind])
    write_csv(tmp_path / "stages.csv", ["patient", "stage"], lines)
    manifest, _ = register(store_path, "camelyon17", tmp_path, RegisterConfig(adapter="camelyon17"))
    ids = manifest.column("id")
    np.savez(tmp_path / "f.npz", features=np.arange(len(ids), dtype=np.float32)[:, None], id=np.array(ids))
    store, _, _ = import_features(store_path, tmp_path / "f.npz", dataset="camelyon17", model="m")
    task = make_task(store["camelyon17", "m"], TASKS["camelyon17-unseen-b"])
    roles: dict[tuple[str, str], set[str]] = {}
    for kind, centre, role in zip(manifest.column("slide_class"), manifest.column("centre"), task.role):
        roles.setdefault((kind, centre), set()).add(str(role))
    for (kind, centre), found in roles.items():
        expected = {""} if kind == "itc" else {"train", "val"} if centre in "012" else {"test"}
        assert found == expected, (kind, centre)
    assert set(manifest.column("slide_class")) == set(TASKS["camelyon17-stage4"].classes)


# ---- BCNB


def write_bcnb(root: Path, statuses: list[str], size: tuple[int, int] = (160, 120)) -> None:
    book = openpyxl.Workbook()
    book.active.append(["Patient ID", "ALN status"])
    (root / "WSIs").mkdir()
    for number, status in enumerate(statuses, 1):
        picture = draw_slide(*size, [(80, 60, 45)], seed=number)
        Image.fromarray(picture).save(root / "WSIs" / f"{number}.jpg", quality=95)
        book.active.append([number, status])
    book.save(root / "patient-clinical-data.xlsx")


def test_bcnb_aln_is_n0_or_any_number_of_nodes(tmp_path: Path) -> None:
    write_bcnb(tmp_path, ["N0", "N+(1-2)", "N+(>2)"])
    source = bcnb.read(tmp_path, tile=40, max_tiles=1)
    assert by_slide(source, "aln") == {"1": "0", "2": "1", "3": "1"}
    assert by_slide(source, "ALN status") == {"1": "N0", "2": "N+(1-2)", "3": "N+(>2)"}


def test_bcnb_jpeg_slide_above_the_pixel_limit_of_pillow_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bcnb(tmp_path, ["N0"])
    path = tmp_path / "WSIs/1.jpg"
    truth = np.asarray(Image.open(path).convert("RGB"))
    # More than twice the limit is an error in Pillow, more than the limit a warning.
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    source = bcnb.read(tmp_path, tile=40)
    assert source.table.num_rows > 1
    assert not any("cannot be read" in note for note in source.notes)
    slide = open_slide(path)
    try:
        found = slide.pixels(Part(x=40, y=20, width=50, height=40, level=0), DecodeOptions()).pixels
    finally:
        slide.close()
    np.testing.assert_array_equal(found, truth[20:60, 40:90])


# ---- classes by name


def test_kvasir_has_the_eleven_names_of_the_split_files(tmp_path: Path) -> None:
    folders = [
        "Angiectasia", "Blood - fresh", "Erosion", "Erythema", "Foreign body", "Ileocecal valve", "Lymphangiectasia",
        "Normal clean mucosa", "Pylorus", "Reduced mucosal view", "Ulcer",
    ]  # fmt: skip
    rows: dict[int, list[list[str]]] = {0: [], 1: []}
    for number, (label, folder) in enumerate(zip(KVASIR_11, folders)):
        for part in (0, 1):
            touch(tmp_path / f"labelled_images/{folder}/{part}{number}_7.jpg")
            rows[part].append([f"{part}{number}_7.jpg", label])
    for part, lines in rows.items():
        write_csv(tmp_path / f"official_splits/split_{part}.csv", ["filename", "label"], lines)
    table = kvasir.read(tmp_path).table
    assert set(table["label"].to_pylist()) == set(KVASIR_11)
    assert set(table["folder"].to_pylist()) == set(folders)
    assert dict(zip(table["folder"].to_pylist(), table["label"].to_pylist())) == dict(zip(folders, KVASIR_11))
    assert list(TASKS["kvasir-capsule-11"].classes) == KVASIR_11
    for split in ("train", "test"):
        labels = [label for label, part in zip(table["label"].to_pylist(), table["split"].to_pylist()) if part == split]
        assert sorted(labels) == sorted(KVASIR_11), split


def test_autolaparo_phases_1_to_7_have_their_names(tmp_path: Path) -> None:
    made = WRITERS["autolaparo"](tmp_path)
    table = read_source("autolaparo", made.root).table
    pairs = dict(zip(table["phase"].to_pylist(), table["phase_name"].to_pylist()))
    assert pairs == {str(number): name for number, name in enumerate(PHASES_7, 1)}
    assert list(TASKS["autolaparo-7"].classes) == PHASES_7


def test_camelyon17_classes_are_those_of_the_stages(tmp_path: Path) -> None:
    made = WRITERS["camelyon17"](tmp_path)
    classes = TASKS["camelyon17-stage4"].classes
    assert list(classes) == ["negative", "itc", "micro", "macro"]
    found = set(read_source("camelyon17", made.root, tile=40, max_tiles=1).table["slide_class"].to_pylist())
    assert found - {None} <= set(classes)
    assert set(dict(TASKS["camelyon17-unseen-b"].where)["slide_class"]) == {"negative", "micro", "macro"}


def test_every_task_with_classes_is_one_whose_classes_are_tested() -> None:
    assert {name for name, spec in TASKS.items() if spec.classes} == {
        *("kvasir-capsule-11", "autolaparo-7", "camelyon17-stage4"),  # here
        *("acdc-group", "camus-quality", "sars-cov-2-3class", "brain-tumor-3", "brain-tumor-3-c"),  # test_traps_volumes
        *("rsna-3class", "chexpert-sex", "nih-sex"),
    }


# ---- EndoVis


def test_endovis_sequences_of_isinet_train_and_test(tmp_path: Path) -> None:
    for number in range(1, 18):
        touch(tmp_path / f"miccai_challenge_release_{number % 3 + 2}/seq_{number}/left_frames/frame000.png")
    table = read_source("endovis18", tmp_path).table
    found: dict[str, list[int]] = {}
    for sequence, split in zip(table["sequence"].to_pylist(), table["split"].to_pylist()):
        found.setdefault(split, []).append(int(sequence))
    assert found == {"train": [1, 3, 4, 6, 7, 10, 11, 12, 13, 14, 16], "test": [2, 5, 9, 15], "": [8, 17]}


def test_endovis_says_where_uncropped_frames_show_the_picture() -> None:
    text = " ".join(explain("endovis18").split())
    assert "uncropped ones are larger, with the picture from row 28 and column 320 on" in text
    assert "1280 x 1024" in text


# ---- Montgomery and Shenzhen


@pytest.mark.parametrize(
    ("adapter", "images", "masked", "counts"),
    [("montgomery", 138, 138, (69, 23, 46)), ("shenzhen", 662, 566, (361, 91, 114))],
)
def test_tuberculosis_split_of_the_paper_in_any_directory_order(
    adapter: str, images: int, masked: int, counts: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = {"montgomery": "MCUCXR", "shenzhen": "CHNCXR"}[adapter]
    for number in range(1, images + 1):
        stem = f"{prefix}_{number:04d}_{number % 2}"
        touch(tmp_path / f"CXR_png/{stem}.png")
        if number <= masked:
            mask = f"ManualMask/leftMask/{stem}.png" if adapter == "montgomery" else f"masks/{stem}_mask.png"
            touch(tmp_path / mask)
    walk = os.walk

    def shuffled(*given: Any, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for folder, folders, names in walk(*given, **options):
            random.shuffle(folders)
            random.shuffle(names)
            yield folder, folders, names

    reads = []
    for seed in range(3):
        random.seed(seed)
        monkeypatch.setattr(os, "walk", shuffled)
        reads.append(getattr(tuberculosis, f"read_{adapter}")(tmp_path).table)
    assert reads[0].equals(reads[1])
    assert reads[0].equals(reads[2])
    parts = reads[0]["split_c"].to_pylist()
    assert tuple(parts.count(part) for part in ("train", "val", "test")) == counts
    assert parts.count("") == images - masked
    assert reads[0]["id"].to_pylist() == sorted(reads[0]["id"].to_pylist())


# ---- DICOM


@pytest.mark.parametrize("explained", [False, True])
def test_dicom_of_several_windows_is_shown_by_window_0(explained: bool) -> None:
    made = dataset(phantom(), bits=12, WindowCenter=[1200, 300, 2500], WindowWidth=[1000, 200, 400])
    if explained:
        made.WindowCenterWidthExplanation = ["LUNG", "BONE", "SOFT"]
    shown = to_byte_range(read(made), "native")
    truths = [apply_windowing(made.pixel_array, made, index=index) / 4095 * 255 for index in range(3)]
    np.testing.assert_allclose(shown, truths[0], atol=0.1)
    assert all(np.abs(shown - truth).max() > 50 for truth in truths[1:])


def test_docs_say_which_of_several_windows_is_used() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs/inputs.md").read_text()
    assert "own window (the first of several)" in " ".join(text.split())
