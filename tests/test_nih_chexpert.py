"""ChestX-ray14, CheXpert, and how fast large tables are read: what the files say, with their traps."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from miniatures.chest import (
    PADCHEST_CSV,
    write_csv,
)
from standins import write_chexpert, write_nih

from featstore.datasets import mimic, nih, padchest
from featstore.datasets.chexpert import LABELS
from featstore.datasets.chexpert import read as read_chexpert
from featstore.datasets.source import Source
from featstore.errors import ManifestError

CHEST = ("chexpert", "mimic-cxr", "nih", "padchest", "rsna", "vindr-cxr", "vindr-pcxr")


def columns(source: Source) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = source.table.to_pydict()
    return table


def noted(source: Source, text: str) -> bool:
    return any(text in note for note in source.notes)


# ---- ChestX-ray14


@pytest.mark.realdata
def test_nih_real_files_give_the_published_counts(shared_data: Path, tmp_path: Path) -> None:
    for path in (shared_data / "labels" / "nih").glob("*.gz"):
        if "variant" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    source = nih.read(tmp_path)
    table = source.table.to_pydict()
    published = dict(
        zip(
            (
                "No Finding",
                "Infiltration",
                "Effusion",
                "Atelectasis",
                "Nodule",
                "Mass",
                "Pneumothorax",
                "Consolidation",
            ),
            (60_361, 19_894, 13_317, 11_559, 6_331, 5_782, 5_302, 4_667),
        )
    ) | {"Pleural_Thickening": 3_385, "Cardiomegaly": 2_776, "Emphysema": 2_516, "Edema": 2_303}
    published |= {"Fibrosis": 1_686, "Pneumonia": 1_431, "Hernia": 227}
    assert {label: table[label].count("1") for label in nih.LABELS} == published
    assert source.table.num_rows == 112_120
    assert len(set(table["group"])) == 30_805
    assert Counter(table["View Position"]) == {"PA": 67_310, "AP": 44_810}
    assert Counter(table["split"]) == {"train": 86_524, "test": 25_596}
    assert Counter(table["split_c"]) == {"train": 76_522, "val": 10_002, "test": 25_596}
    assert len(set(zip(table["group"], table["split_c"]))) == 30_805  # validation cuts no patient either
    boxes = [box for text in table["boxes"] if text for box in json.loads(text)]
    assert len(boxes) == 984
    assert {box["label"] for box in boxes} <= set(nih.LABELS)
    assert sum(box["label"] == "Infiltration" for box in boxes) == 123
    ages = [float(text) for text in table["Patient Age"]]
    assert table["age_years"] == ages
    assert Counter(table["sex"]) == {"M": 63_340, "F": 48_780}


@pytest.mark.realdata
def test_nih_real_variant_ages_are_numbers(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "Data_Entry_2017.csv.gz").symlink_to(shared_data / "labels/nih/sample_labels_variant.csv.gz")
    table = columns(nih.read(tmp_path))
    assert table["Patient_Age"][0] == "040Y"
    assert table["age_years"] == [float(str(text).removesuffix("Y")) for text in table["Patient_Age"]]
    assert set(table["sex"]) == {"F", "M"}


def test_nih_ages_with_units_and_impossible_ones(tmp_path: Path) -> None:
    texts = ["040Y", "57", "006M", "100D", "414", "", "old"]
    rows = [[f"{row}.png", "Mass", row, text] for row, text in enumerate(texts)]
    write_csv(tmp_path / "Data_Entry_2017.csv", ["Image Index", "Finding Labels", "Patient ID", "Patient Age"], rows)
    source = nih.read(tmp_path)
    assert columns(source)["age_years"] == [40.0, 57.0, 0.5, pytest.approx(100 / 365.25), None, None, None]
    assert noted(source, "1 ages are above 120 years")
    assert noted(source, "2 rows have no age that can be read")


def test_nih_boxes_say_infiltrate_and_have_blank_columns(tmp_path: Path) -> None:
    rows = write_nih(tmp_path)
    names = [row["Image Index"] for row in rows]
    lines = [
        "Image Index,Finding Label,Bbox [x,y,w,h],,,",
        f"{names[1]},Infiltrate,10.5,20,30,40",
        "x.png,Mass,1,2,3,4",
    ]
    (tmp_path / "BBox_List_2017.csv").write_text("\n".join(lines))
    source = nih.read(tmp_path)
    boxes = columns(source)["boxes"]
    assert [json.loads(str(text)) for text in boxes if text] == [
        [{"box": [10.5, 20.0, 40.5, 60.0], "label": "Infiltration"}]
    ]
    assert boxes[1] is not None
    assert noted(source, "1 images with boxes are not in the labels")
    (tmp_path / "BBox_List_2017.csv").write_text(f"{lines[0]}\n{names[1]},Mass,1,2,inf,4\n")
    with pytest.raises(ManifestError, match=r"BBox_List_2017\.csv row 1: a box must be four numbers"):
        nih.read(tmp_path)


@pytest.mark.parametrize("patients", [1, 2, 7, 40])
def test_nih_split_c_is_the_end_of_the_list_in_whole_patients(patients: int, tmp_path: Path) -> None:
    write_nih(tmp_path, num_patients=patients, size=8)
    listed = (tmp_path / "train_val_list.txt").read_text().split()
    table = columns(nih.read(tmp_path))
    part = dict(zip(table["id"], table["split_c"]))
    assert {part[name] for name in table["id"] if name not in listed} <= {"test"}
    flags = [part[name] == "val" for name in listed]
    assert flags == sorted(flags)
    assert sum(flags) <= round(len(listed) * 10_002 / 86_524)
    assert len(set(zip(table["group"], table["split_c"]))) == patients
    assert patients < 40 or sum(flags) > 0


def test_nih_resized_copies_are_not_the_images(tmp_path: Path) -> None:
    rows = write_nih(tmp_path)
    before = columns(nih.read(tmp_path))["path"]
    (tmp_path / "128px").mkdir()
    for row in rows:
        (tmp_path / "128px" / row["Image Index"]).write_bytes(b"small")
    source = nih.read(tmp_path)
    assert columns(source)["path"] == before
    assert noted(source, f"{len(rows)} images lie in other folders too; those of the documented layout are taken")
    (tmp_path / "images_001/images").rename(tmp_path / "images_001/full")
    again = nih.read(tmp_path)
    assert noted(again, "images lie in more than one folder; the first path is taken")
    assert noted(
        again, f"such as 128px/{rows[1]['Image Index']} is taken, not images_001/full/{rows[1]['Image Index']}"
    )


def test_nih_repeated_row(tmp_path: Path) -> None:
    write_nih(tmp_path)
    path = next(tmp_path.glob("Data_Entry_2017*"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(ManifestError, match=r"1 rows repeat an image of another row; every image has one row"):
        nih.read(tmp_path)


# ---- CheXpert


def test_chexpert_test_release_in_its_own_folder(tmp_path: Path) -> None:
    release = write_chexpert(tmp_path, num_patients=6, with_test=True, size=32)
    before = columns(read_chexpert(release))
    (release / "CheXpert").mkdir()
    for name in ("test", "test.csv"):
        (release / name).rename(release / "CheXpert" / name)
    source = read_chexpert(release)
    table = columns(source)
    assert table["id"] == before["id"]
    moved = [path for path, split in zip(table["path"], table["split"]) if split == "test"]
    assert moved
    assert all(str(path).startswith("CheXpert/test/") and (release / str(path)).is_file() for path in moved)
    assert noted(source, "test.csv and its images are those of the folder CheXpert/")


def test_chexpert_own_splits_keep_patients_whole(tmp_path: Path) -> None:
    release = write_chexpert(tmp_path, num_patients=60, with_test=True, size=32)
    table = columns(read_chexpert(release))
    official = list(zip(table["split"], table["split_mgca"], table["split_a"]))
    assert {mgca for split, mgca, _ in official if split == "val"} == {"test"}
    assert {(mgca, own) for split, mgca, own in official if split == "test"} == {("", "")}
    assert {mgca for split, mgca, _ in official if split == "train"} == {"train", "val"}
    for column in ("split_mgca", "split_a"):
        assert len(set(zip(table["group"], table[column]))) == len(set(table["group"]))


@pytest.mark.slow
def test_large_tables_register_in_seconds(tmp_path: Path) -> None:
    """MIMIC-CXR's 377,110 rows, and 100,000 of PadChest, without images."""
    rng = np.random.default_rng(0)
    count = 377_110
    ids: list[list[Any]] = [
        [f"{number:040x}", 50_000_000 + number // 2, 10_000_000 + number // 6] for number in range(count)
    ]
    parts = np.array(["train", "validate", "test"])[rng.choice(3, count // 6 + 1)]
    header = ["dicom_id", "study_id", "subject_id", "split"]
    write_csv(tmp_path / "mimic-cxr-2.0.0-split.csv", header, ([*row, parts[row[2] % len(parts)]] for row in ids))
    rows = ([row[0], row[2], row[1], "PA"] for row in ids)
    write_csv(tmp_path / "mimic-cxr-2.0.0-metadata.csv", ["dicom_id", "subject_id", "study_id", "ViewPosition"], rows)
    for name in ("chexpert", "negbio"):
        scores = ([row[2], row[1], *["1.0"] * 14] for row in ids[::2])
        write_csv(tmp_path / f"mimic-cxr-2.0.0-{name}.csv", ["subject_id", "study_id", *LABELS], scores)
    start = time.perf_counter()
    assert mimic.read(tmp_path).table.num_rows == count
    middle = time.perf_counter()
    names = [f"finding {number}" for number in range(174)]
    texts = [str(rng.choice(names, 3).tolist()) for _ in range(20_000)]
    rows = ([f"{n}.png", n % 54, f"S{n}", f"P{n // 2}", "PA", texts[n % len(texts)]] for n in range(100_000))
    header = ["ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Labels"]
    write_csv(tmp_path / PADCHEST_CSV, header, rows)
    begin = time.perf_counter()
    assert len(padchest.read(tmp_path).label_columns) == 174
    assert middle - start < 30, "MIMIC-CXR"
    assert time.perf_counter() - begin < 30, "PadChest"
