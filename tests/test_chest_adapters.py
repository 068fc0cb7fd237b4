"""Adapters of chest radiographs: every trap of their releases, and the real ChestX-ray14 label files."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from miniatures import WRITERS
from miniatures.chest import (
    PADCHEST_CSV,
    padchest_rows,
    write_csv,
    write_mimic,
    write_padchest,
    write_rsna,
    write_vindr_kaggle,
)
from standins import read_rows

from featstore.datasets import DATASETS, explain, mimic, padchest, parse_options, read_source, rsna, vindr
from featstore.datasets.source import Source
from featstore.errors import ConfigError, ManifestError

CHEST = ("chexpert", "mimic-cxr", "nih", "padchest", "rsna", "vindr-cxr", "vindr-pcxr")


def columns(source: Source) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = source.table.to_pydict()
    return table


def noted(source: Source, text: str) -> bool:
    return any(text in note for note in source.notes)


@pytest.mark.parametrize("adapter", CHEST)
def test_adapters_explain_layout_and_licence(adapter: str) -> None:
    text = explain(adapter)
    assert DATASETS[adapter]
    assert text.splitlines()[0].endswith((".", ";")) or ":" in text.splitlines()[0]
    for word in ("icence" if adapter != "nih" else "Source", "Source", "roup"):
        assert word in text


# ---- MIMIC-CXR-JPG


def test_mimic_joins_study_labels_to_images_in_any_order(tmp_path: Path) -> None:
    write_mimic(tmp_path, images=False, compressed=False)
    source = mimic.read(tmp_path)
    splits = read_rows(tmp_path / "mimic-cxr-2.0.0-split.csv")
    views = {row["dicom_id"]: row for row in read_rows(tmp_path / "mimic-cxr-2.0.0-metadata.csv")}
    scores = {(row["subject_id"], row["study_id"]): row for row in read_rows(tmp_path / "mimic-cxr-2.0.0-chexpert.csv")}
    rows = source.table.to_pylist()
    assert [row["id"] for row in rows] == [row["dicom_id"] for row in splits]
    for got, row in zip(rows, splits):
        subject, study = row["subject_id"], row["study_id"]
        assert got["path"] == f"files/p{subject[:2]}/p{subject}/s{study}/{row['dicom_id']}.jpg"
        assert (got["group"], got["study"]) == (subject, study)
        assert got["split"] == {"validate": "val"}.get(row["split"], row["split"])
        assert got["source_split"] == row["split"]
        assert got["ViewPosition"] == views[row["dicom_id"]]["ViewPosition"]
        said = scores.get((subject, study))
        assert [got[label] for label in source.label_columns] == [
            (said[label] or None) if said else None for label in source.label_columns
        ]


def test_mimic_validate_is_val(tmp_path: Path) -> None:
    write_mimic(tmp_path, images=False)
    assert set(columns(mimic.read(tmp_path))["split"]) == {"train", "val", "test"}


def test_mimic_study_without_label_row_is_kept_and_counted(tmp_path: Path) -> None:
    total = write_mimic(tmp_path, images=False)
    source = mimic.read(tmp_path)
    unlabelled = [row for row in source.table.to_pylist() if row["study"] == str(50_414_267 + 35)]
    assert source.table.num_rows == total
    assert len(unlabelled) == 1
    assert all(unlabelled[0][label] is None for label in source.label_columns)
    assert noted(source, f"1 of {total} images belong to studies without a label row")


def test_rsna_and_vindr_tell_what_encoders_may_have_seen(tmp_path: Path) -> None:
    for adapter, text in (("rsna", "the images are ChestX-ray14's"), ("vindr-cxr", ""), ("vindr-pcxr", "")):
        (tmp_path / adapter).mkdir()
        made = WRITERS[adapter](tmp_path / adapter)
        source = read_source(adapter, made.root)
        assert any("pre-training overlap" in note and "unverified" in note and text in note for note in source.notes)


def test_mimic_negbio_is_not_chexpert(tmp_path: Path) -> None:
    write_mimic(tmp_path, images=False)
    one, other = (columns(mimic.read(tmp_path, labels=name))["Edema"] for name in ("chexpert", "negbio"))
    assert {a for a, b in zip(one, other) if a != b} == {"-1.0"}
    assert "-1.0" not in other
    assert parse_options("mimic-cxr", ["labels=negbio"]) == {"labels": "negbio"}
    with pytest.raises(ConfigError, match="knows chexpert, negbio"):
        parse_options("mimic-cxr", ["labels=both"])


def test_mimic_lateral_is_lateral_or_ll(tmp_path: Path) -> None:
    total = write_mimic(tmp_path, images=False)
    source = mimic.read(tmp_path)
    count = sum(view in ("LATERAL", "LL") for view in columns(source)["ViewPosition"])
    assert {"LATERAL", "LL"} <= set(columns(source)["ViewPosition"])
    assert noted(source, f"{count} of {total} images are lateral")


def test_mimic_dicom_names_and_inner_folder(tmp_path: Path) -> None:
    write_mimic(tmp_path)
    shutil.move(tmp_path / "files/p10", tmp_path / "p10")
    shutil.rmtree(tmp_path / "files")
    paths = columns(mimic.read(tmp_path))["path"]
    assert all((tmp_path / str(path)).is_file() for path in paths if str(path).startswith("p10/"))
    assert all(str(path).endswith(".dcm") for path in columns(mimic.read(tmp_path, images="dicom"))["path"])


def test_mimic_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no mimic-cxr-\*-split\.csv or .*: a MIMIC-CXR-JPG folder holds"):
        mimic.read(tmp_path)
    write_mimic(tmp_path, images=False, compressed=False)
    path = tmp_path / "mimic-cxr-2.0.0-chexpert.csv"
    good = path.read_text()
    path.write_text(good.replace("Edema", "Oedema"))
    with pytest.raises(ManifestError, match=r"lacks the columns \['Edema'\]"):
        mimic.read(tmp_path)
    path.write_text(good + good.splitlines()[1] + "\n")
    with pytest.raises(ManifestError, match="a study stands in the chexpert labels twice"):
        mimic.read(tmp_path)
    path.write_text(good)
    path = tmp_path / "mimic-cxr-2.0.0-metadata.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(ManifestError, match="an image stands in the metadata twice"):
        mimic.read(tmp_path)


# ---- VinDr


def test_vindr_cxr_votes_stand_in_reader_order(tmp_path: Path) -> None:
    WRITERS["vindr-cxr"](tmp_path)
    source = vindr.read_cxr(tmp_path)
    said: dict[str, dict[str, str]] = {}
    for row in read_rows(tmp_path / "annotations/image_labels_train.csv"):
        said.setdefault(row["image_id"], {})[row["rad_id"]] = row["Cardiomegaly"]
    rows = {row["id"]: row for row in source.table.to_pylist()}
    for image, votes in said.items():
        assert rows[image]["rad_id"] == "|".join(sorted(votes))
        assert rows[image]["Cardiomegaly"] == "|".join(votes[name] for name in sorted(votes))
    assert any(row["Cardiomegaly"] in ("1|1|0", "1|0|1", "0|1|1") for row in rows.values())
    assert len(rows) == 48


def test_vindr_cxr_test_is_a_consensus_without_readers(tmp_path: Path) -> None:
    WRITERS["vindr-cxr"](tmp_path)
    rows = [row for row in vindr.read_cxr(tmp_path).table.to_pylist() if row["split"] == "test"]
    assert {row["Edema"] for row in rows} == {"0", "1"}
    assert {row["rad_id"] for row in rows} == {None}


def test_vindr_cxr_other_disease_is_other_diseases(tmp_path: Path) -> None:
    WRITERS["vindr-cxr"](tmp_path)
    source = vindr.read_cxr(tmp_path)
    assert "Other disease" in read_rows(tmp_path / "annotations/image_labels_test.csv")[0]
    assert "Other disease" not in source.table.column_names
    assert all(value is not None for value in columns(source)["Other diseases"])
    assert noted(source, "column 'Other disease' of image_labels_test.csv is 'Other diseases'")
    assert len(source.label_columns) == 28


def test_vindr_cxr_boxes_are_read_by_column_name(tmp_path: Path) -> None:
    WRITERS["vindr-cxr"](tmp_path)
    drawn = Counter(
        row["image_id"] for row in read_rows(tmp_path / "annotations/annotations_train.csv") if row["x_min"]
    )
    for row in vindr.read_cxr(tmp_path).table.to_pylist():
        if row["split"] == "train":
            boxes = json.loads(row["boxes"] or "[]")
            assert len(boxes) == drawn[row["id"]]
            assert all(box["box"] == [120.5, 80.0, 480.0, 333.25] and box["reader"][0] == "R" for box in boxes)


@pytest.mark.parametrize("adapter", ["vindr-cxr", "vindr-pcxr"])
def test_vindr_has_no_patient_ids(adapter: str, tmp_path: Path) -> None:
    WRITERS[adapter](tmp_path)
    source = vindr.read_cxr(tmp_path) if adapter == "vindr-cxr" else vindr.read_pcxr(tmp_path)
    assert not source.groups_known
    assert set(columns(source)["group"]) == {None}
    assert noted(source, "groups: unknown")
    assert all((tmp_path / str(path)).is_file() for path in columns(source)["path"])


def test_vindr_kaggle_counts_readers_who_drew_nothing(tmp_path: Path) -> None:
    total = write_vindr_kaggle(tmp_path)
    source = vindr.read_cxr(tmp_path)
    assert source.table.num_rows == total
    rows = [row for row in source.table.to_pylist() if row["rad_id"] is not None]
    drawn = {(row["image_id"], row["rad_id"], row["class_name"]) for row in read_rows(tmp_path / "train.csv")}
    for row in rows:
        readers = row["rad_id"].split("|")
        assert len(readers) == 3
        for label in vindr.KAGGLE:
            assert row[label] == "|".join("01"[(row["id"], reader, label) in drawn] for reader in readers)
    assert {row["Cardiomegaly"].count("1") for row in rows} == {0, 2}
    assert {row["No finding"].count("1") for row in rows} == {1, 3}
    assert noted(source, "30 images have 3 readers")


def test_vindr_kaggle_test_images_have_no_labels_and_no_split(tmp_path: Path) -> None:
    write_vindr_kaggle(tmp_path)
    source = vindr.read_cxr(tmp_path)
    rows = [row for row in source.table.to_pylist() if row["path"].startswith("test/")]
    assert len(rows) == 4
    assert {row["split"] for row in rows} == {""}
    assert {row[label] for row in rows for label in vindr.KAGGLE} == {None}
    assert noted(source, "4 test images have no labels")
    assert source.split_origin.startswith("seeded by image")


def test_vindr_pcxr_names_are_kept_with_their_typos(tmp_path: Path) -> None:
    WRITERS["vindr-pcxr"](tmp_path)
    source = vindr.read_pcxr(tmp_path)
    assert {"Brocho-pneumonia", "Diagphramatic hernia", "Other disease"} <= set(source.label_columns)
    assert len(source.label_columns) == 15
    assert "rad_ID" in source.table.column_names  # capital, unlike VinDr-CXR
    assert set(columns(source)["Pneumonia"]) == {"0", "1"}


def test_vindr_images_and_columns_that_are_absent_or_odd(tmp_path: Path) -> None:
    WRITERS["vindr-pcxr"](tmp_path)
    first = next(iter(sorted((tmp_path / "train").iterdir())))
    first.unlink()
    (tmp_path / "annotations_test.csv").unlink()
    test = tmp_path / "image_labels_test.csv"
    test.write_text(test.read_text().replace("CPAM", "Cpam?"))
    labels = tmp_path / "image_labels_train.csv"
    labels.write_text(labels.read_text() + labels.read_text().splitlines()[1] + "\n")
    source = vindr.read_pcxr(tmp_path)
    assert noted(source, "1 images are not in train/")
    assert noted(source, "no boxes for the test images")
    assert noted(source, "the test table has no column for CPAM; blank there")
    assert noted(source, "1 images have a reader twice")
    assert noted(source, "image_labels_train.csv: 1 images have 2 rows")


def test_vindr_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no image_labels_train\.csv, neither beside train/ and test/"):
        vindr.read_cxr(tmp_path)
    for split in ("train", "test"):
        write_csv(tmp_path / f"image_labels_{split}.csv", ["image_id", "Edema"], [[split, 1]])
    with pytest.raises(ManifestError, match="have no column 'No finding'"):
        vindr.read_pcxr(tmp_path)
    write_csv(tmp_path / "image_labels_test.csv", ["image", "No finding"], [["a", 1]])
    with pytest.raises(ManifestError, match="lacks the column 'image_id'"):
        vindr.read_pcxr(tmp_path)
    kaggle = tmp_path / "kaggle"
    write_csv(kaggle / "train.csv", ["image_id", "class_name", "rad_id"], [["a", "Elephant", "R1"]])
    with pytest.raises(ManifestError, match=r"unknown classes \['Elephant'\]"):
        vindr.read_cxr(kaggle)
    header = ["image_id", "class_name", "rad_id", "x_min", "y_min", "x_max", "y_max"]
    write_csv(kaggle / "train.csv", header, [["a", "ILD", "R1", 1, 2, "", 4]])
    with pytest.raises(ManifestError, match=r"train\.csv row 1: a box must be four numbers, or four blank"):
        vindr.read_cxr(kaggle)


# ---- PadChest


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("['normal']", ["normal"]),
        ("['Pleural Effusion ', 'pleural effusion', ' COPD signs']", ["pleural effusion", "copd signs"]),
        ("[\"stent'\", 'normal']", ["stent", "normal"]),
        ("['nsg tube'', 'normal']", ["nsg tube", "normal"]),
        ("['double J stent', \"Chilaiditi's sign\"]", ["double j stent", "chilaiditi's sign"]),
        ("['a, b', 'c']", ["a, b", "c"]),
        ("[nan, 'normal', '', None]", ["normal"]),
        ("[]", []),
        ("exclude", None),
        ("__import__('os').system('true')", None),
    ],
)
def test_padchest_label_lists_are_parsed_not_evaluated(text: str, expected: list[str] | None) -> None:
    assert padchest.parse_labels(text) == expected


def test_padchest_blank_labels_are_masked_and_no_row_is_dropped(tmp_path: Path) -> None:
    total = write_padchest(tmp_path, images=False, compressed=True)
    source = padchest.read(tmp_path)
    assert source.table.num_rows == total == 60
    rows = source.table.to_pylist()
    for row in (1, 5, 7):
        assert {rows[row][label] for label in source.label_columns} == {None}
    assert {rows[3]["stent"], rows[3]["nsg tube"], rows[3]["normal"]} == {"1"}
    assert {rows[0]["mass"], rows[0]["hiatal hernia"], rows[0]["normal"]} == {"1", "0"}
    assert rows[0]["Labels"] == padchest_rows()[0][7]
    for text in ("1 rows have no label text", "1 rows have an empty list", "1 rows have a label text that is no list"):
        assert noted(source, text)


def test_padchest_projection_differs_from_view_position(tmp_path: Path) -> None:
    write_padchest(tmp_path, images=False)
    source = padchest.read(tmp_path)
    assert noted(source, "60 images have another ViewPosition_DICOM than Projection; Projection counts")
    assert noted(source, "15 of 60 images are lateral (Projection L)")
    assert noted(source, "labelled by (MethodLabel): Physician 15, RNN_model 45")


@pytest.mark.parametrize("flat", [False, True])
def test_padchest_images_lie_in_folders_or_flat(flat: bool, tmp_path: Path) -> None:
    write_padchest(tmp_path, flat=flat)
    table = columns(padchest.read(tmp_path))
    assert all((tmp_path / str(path)).is_file() for path in table["path"])
    shutil.rmtree(tmp_path / ("images" if flat else "27"))
    source = padchest.read(tmp_path)
    assert noted(source, f"{60 if flat else 20} images are not below the folder; their path is <ImageDir>/<ImageID>")
    assert columns(source)["path"][1].startswith("27/")


def test_padchest_splits_by_patient_and_skips_named_files(tmp_path: Path) -> None:
    write_padchest(tmp_path, images=False)
    whole = columns(padchest.read(tmp_path))
    assert len(set(zip(whole["group"], whole["split"]))) == 30
    (tmp_path / "skip.txt").write_text(f"{whole['id'][0]}\nabsent.png\n")
    source = padchest.read(tmp_path)
    assert columns(source)["id"] == whole["id"][1:]
    assert noted(source, "1 images named in skip.txt are left out")
    (tmp_path / "bad.txt").write_text("\n".join(map(str, whole["id"][:3])))
    assert padchest.read(tmp_path, skip="bad.txt").table.num_rows == 57


def test_padchest_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no PADCHEST_chest"):
        padchest.read(tmp_path)
    write_padchest(tmp_path, images=False)
    with pytest.raises(ManifestError, match=r"--option skip: none\.txt is no file"):
        padchest.read(tmp_path, skip="none.txt")
    path = tmp_path / PADCHEST_CSV
    good = path.read_text()
    path.write_text(good.replace("exclude", f'"{[f"finding {number}" for number in range(1001)]}"'))
    with pytest.raises(ManifestError, match=r"names 10[0-9][0-9] different findings; PadChest has 174"):
        padchest.read(tmp_path)
    path.write_text(good.replace("Projection", "Position"))
    with pytest.raises(ManifestError, match=r"lacks the columns \['Projection'\]"):
        padchest.read(tmp_path)


# ---- RSNA Pneumonia


def test_rsna_many_rows_are_one_image(tmp_path: Path) -> None:
    ids = write_rsna(tmp_path, images=False)
    table = columns(rsna.read(tmp_path))
    rows = read_rows(tmp_path / "stage_2_train_labels.csv")
    assert len(rows) > len(ids) == len(table["id"])
    assert table["id"] == ids
    targets = {row["patientId"]: row["Target"] for row in rows}
    assert table["Target"] == [targets[image] for image in ids]
    counts = Counter(row["patientId"] for row in rows if row["x"])
    assert [len(json.loads(str(boxes or "[]"))) for boxes in table["boxes"]] == [counts[image] for image in ids]
    assert json.loads(str(table["boxes"][0]))[0]["box"] == [264.0, 152.0, 477.0, 531.0]


def test_rsna_not_normal_is_target_0(tmp_path: Path) -> None:
    write_rsna(tmp_path, images=False)
    table = columns(rsna.read(tmp_path))
    assert set(zip(table["class"], table["Target"])) == {
        ("Lung Opacity", "1"),
        ("Normal", "0"),
        ("No Lung Opacity / Not Normal", "0"),
    }


@pytest.mark.parametrize("count", [11, 40, 1000, 26_684])
def test_rsna_mgca_split_is_scikit_learns(count: int) -> None:
    from sklearn.model_selection import train_test_split

    ids = [f"{number * 7919 % 100_003:06d}" for number in range(count)]
    train, rest = train_test_split(sorted(ids), test_size=0.30, random_state=0)
    test, val = train_test_split(rest, test_size=0.5, random_state=0)
    expected = {**dict.fromkeys(train, "train"), **dict.fromkeys(val, "val"), **dict.fromkeys(test, "test")}
    assert rsna.mgca_split(ids) == [expected[image] for image in ids]
    if count == 26_684:
        assert (len(train), len(val), len(test)) == (18_678, 4_003, 4_003)


def test_rsna_without_map_groups_are_unknown(tmp_path: Path) -> None:
    write_rsna(tmp_path, images=False)
    source = rsna.read(tmp_path)
    table = columns(source)
    assert not source.groups_known
    assert set(table["group"]) == {None}
    assert table["split"] == table["split_mgca"]
    assert noted(source, "a split by image leaks patients")


@pytest.mark.parametrize("form", ["csv", "json", "records"])
def test_rsna_map_groups_by_nih_patient(form: str, tmp_path: Path) -> None:
    ids = write_rsna(tmp_path, images=False)
    rows = read_rows(tmp_path / "rsnamatches.csv")
    if form != "csv":
        records = {row["patientId"]: {"cxr_match": row["cxr_match"], "mse": float(row["mse"])} for row in rows}
        text = json.dumps(records if form == "json" else rows)
        (tmp_path / "rsnamatches.json").write_text(text)
    source = rsna.read(tmp_path, nih_map=f"rsnamatches.{'csv' if form == 'csv' else 'json'}")
    table = columns(source)
    assert source.groups_known
    # Sure matches and the one in between are grouped as ChestX-ray14 numbers patients; the last two are alone.
    assert table["group"] == [*(str(index // 3 + 1) for index in range(38)), *ids[38:]]
    assert len(set(zip(table["group"], table["split"]))) == len(set(table["group"]))
    assert noted(source, "37 images matched with mse < 3, 1 with mse up to 10 (taken as matched), 2 not; 13 patients")
    assert table["nih_image"][4] == "00000002_001.png"
    assert (table["nih_mse"][0], table["nih_mse"][38], table["nih_mse"][39]) == (0.5, 55.0, None)


def test_rsna_map_as_pickle_is_refused(tmp_path: Path) -> None:
    write_rsna(tmp_path, images=False)
    (tmp_path / "rsnamatches.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(
        ManifestError, match=r"is a pickle, which can run code when it is read; convert it .* json\.dump"
    ):
        rsna.read(tmp_path, nih_map="rsnamatches.pkl")


def test_rsna_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has no stage_2_train_labels"):
        rsna.read(tmp_path)
    write_rsna(tmp_path, images=False)
    with pytest.raises(ManifestError, match=r"--option nih_map: map\.csv is no file"):
        rsna.read(tmp_path, nih_map="map.csv")
    for name, text in (
        ("a.json", "{}}"),
        ("b.json", '{"x": {"mse": 1}}'),
        ("c.csv", "patientId,cxr_match,mse\na,b,c\n"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ManifestError, match="must give patientId, cxr_match and a number mse"):
            rsna.read(tmp_path, nih_map=name)
    (tmp_path / "d.csv").write_text("patientId,mse\na,1\n")
    with pytest.raises(ManifestError, match="lacks the column 'cxr_match'"):
        rsna.read(tmp_path, nih_map="d.csv")
    first = read_rows(tmp_path / "stage_2_train_labels.csv")[0]["patientId"]
    (tmp_path / "e.csv").write_text(f"patientId,cxr_match,mse\n{first},../passwd,1\n")
    with pytest.raises(ManifestError, match="must be a file of ChestX-ray14"):
        rsna.read(tmp_path, nih_map="e.csv")
    labels = tmp_path / "stage_2_train_labels.csv"
    good = labels.read_text()
    labels.write_text(f"{good}{first},,,,,0\n")
    with pytest.raises(ManifestError, match="Target must be 0 or 1, and the same in all rows of an image"):
        rsna.read(tmp_path)
    labels.write_text(good)
    (tmp_path / "stage_2_detailed_class_info.csv").unlink()
    assert noted(rsna.read(tmp_path), "column class is blank")


def test_rsna_class_that_does_not_fit_is_counted(tmp_path: Path) -> None:
    write_rsna(tmp_path, images=False)
    path = tmp_path / "stage_2_detailed_class_info.csv"
    path.write_text(path.read_text().replace(",Normal", ",Lung Opacity", 1))
    assert noted(rsna.read(tmp_path), "1 images have a class that does not fit their Target")
