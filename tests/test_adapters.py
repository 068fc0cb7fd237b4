"""Adapters: what is read is what stands in the files, in the original layouts and with their traps."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from standins import read_rows, write_chexpert, write_chexpert_tables, write_nih, write_text

from featstore.datasets import chexpert, digits, nih
from featstore.datasets.source import RESERVED, build_table, check_inside
from featstore.errors import ManifestError

# ---- paths and tables


@pytest.mark.parametrize("path", ["a.png", "a/b/c.png", "a/..b/c..png", "xy:z/a.png", ".hidden/a.png", "ä ö/1.png"])
def test_paths_inside_pass(path: str) -> None:
    check_inside(Path("root"), path)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("", "must name a file below root"),
        ("a\x00b", "must name a file below root"),
        ("/etc/passwd", "is absolute; write it relative to root"),
        ("C:/data/a.png", "is absolute"),
        ("..", "climbs with '..'"),
        ("../a.png", "climbs with '..'"),
        ("a/../../b.png", "climbs with '..'"),
        ("a\\b.png", "holds a backslash; write it with forward slashes"),
    ],
)
def test_paths_outside_fail(path: str, match: str) -> None:
    with pytest.raises(ManifestError, match=match):
        check_inside(Path("root"), path)


def test_table_order_defaults_and_taken_names() -> None:
    original = pa.table({"split": ["x", "y"], "b": ["1", None], "a": ["", "2"]})
    ids = pa.array(["i", "j"])
    table = build_table(original, {"id": ids, "path": ids}, {"a": pa.array(["0", "1"])})
    assert table.column_names == [*RESERVED, "source_split", "b", "source_a", "a"]
    assert table.to_pylist()[1] == {
        **dict.fromkeys(RESERVED),
        **dict(zip(("id", "path", "split", "source_split", "b", "source_a", "a"), ("j", "j", "", "y", None, "2", "1"))),
    }


def test_table_with_one_name_twice() -> None:
    original = pa.table({"path": ["x"], "source_path": ["y"]})
    with pytest.raises(ManifestError, match=r"different names, but \['source_path'\] would appear twice"):
        build_table(original, {"id": pa.array(["i"]), "path": pa.array(["p"])})


# ---- CheXpert


@pytest.fixture(scope="module")
def chexpert_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chexpert(tmp_path_factory.mktemp("chexpert"), num_patients=12, with_test=True, size=32)


def test_chexpert_stand_in_has_the_original_layout(tmp_path: Path) -> None:
    release = write_chexpert(tmp_path, num_patients=30, seed=2, size=32, with_test=True)
    assert release == tmp_path / "CheXpert-v1.0-small"
    train, valid, test = (read_rows(release / f"{part}.csv") for part in ("train", "valid", "test"))
    assert list(train[0]) == ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *chexpert.LABELS]
    assert list(test[0]) == ["Path", *chexpert.LABELS]
    assert train[0]["Path"] == "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"
    assert test[0]["Path"].startswith("test/patient64741/study1/view1_")
    for label in ("Cardiomegaly", "Edema", "Atelectasis", "Pleural Effusion"):
        assert {row[label] for row in train} == {"1.0", "0.0", "-1.0", ""}
    assert {row["No Finding"] for row in train} == {"1.0", ""}
    assert {row[label] for row in valid + test for label in chexpert.LABELS} == {"1.0", "0.0"}
    for row in train + valid:
        lateral = row["Path"].endswith("_lateral.jpg")
        assert (row["Frontal/Lateral"], row["AP/PA"] == "") == ("Lateral" if lateral else "Frontal", lateral)
        with Image.open(tmp_path / row["Path"]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "L", (32, 32))
    assert "Unknown" in {row["Sex"] for row in train}
    assert "0" in {row["Age"] for row in train}
    groups = [{row["Path"].split("/")[-3] for row in rows} for rows in (train, valid, test)]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 30 + 12 + 12


def test_chexpert_rows_are_the_files_rows(chexpert_root: Path) -> None:
    source = chexpert.read(chexpert_root)
    rows = source.table.to_pylist()
    originals = [
        (split, row)
        for name, split in (("train.csv", "train"), ("valid.csv", "val"), ("test.csv", "test"))
        for row in read_rows(chexpert_root / name)
    ]
    assert len(rows) == len(originals)
    for row, (split, original) in zip(rows, originals):
        relative = original["Path"].removeprefix("CheXpert-v1.0-small/")
        patient, study = relative.split("/")[1:3]
        assert (row["id"], row["path"], row["split"]) == (relative, relative, split)
        assert (row["group"], row["study"], row["mask_path"]) == (patient, f"{patient}/{study}", None)
        assert {key: row[key] for key in original} == {key: value or None for key, value in original.items()}
        with Image.open(source.root / row["path"]) as image:
            assert image.size == (32, 32)
    own = ("split_mgca", "split_a", "age_years")
    assert source.table.column_names == [*RESERVED, *read_rows(chexpert_root / "train.csv")[0], *own]
    labels = [row[label] for row in rows if row["split"] == "train" for label in source.label_columns]
    assert set(labels) == {"1.0", "0.0", "-1.0", None}
    assert (source.adapter, source.default_task, source.tasks) == (
        "chexpert",
        "chexpert-5",
        chexpert.TASKS,
    )
    assert (source.split_origin, source.groups_known, len(source.label_columns)) == ("official", True, 14)


def test_chexpert_notes_count(chexpert_root: Path) -> None:
    source = chexpert.read(chexpert_root)
    rows = source.table.to_pylist()
    uncertain = sum(row[label] == "-1.0" for row in rows for label in chexpert.LABELS)
    lateral = sum("lateral" in row["path"] for row in rows)
    age_0 = sum(row["Age"] == "0" for row in rows)
    assert uncertain > 0
    assert lateral > 0
    assert age_0 > 0
    notes = "\n".join(source.notes)
    assert "research use agreement" in notes
    assert f"{uncertain} label values are -1.0" in notes
    assert f"{lateral} of {len(rows)} images are lateral" in notes
    assert f"{age_0} rows have Age 0" in notes
    assert "rows have Sex Unknown" in notes


def test_chexpert_test_release_has_no_view_column(chexpert_root: Path) -> None:
    source = chexpert.read(chexpert_root)
    rows = [row for row in source.table.to_pylist() if row["split"] == "test"]
    assert rows[0]["Path"].startswith("test/")
    assert all(row["Sex"] is None for row in rows)
    assert {row["Frontal/Lateral"] for row in rows} == {"Frontal", "Lateral"}
    assert all((row["Frontal/Lateral"] == "Lateral") == ("_lateral" in row["path"]) for row in rows)
    assert f"test.csv has no 'Frontal/Lateral' column; taken from the {len(rows)} file names" in source.notes


def test_chexpert_folder_may_be_renamed(chexpert_root: Path, tmp_path: Path) -> None:
    shutil.copytree(chexpert_root, tmp_path / "my copy")
    table = chexpert.read(tmp_path / "my copy").table
    assert table.equals(chexpert.read(chexpert_root).table)
    assert all((tmp_path / "my copy" / path).is_file() for path in table["path"].to_pylist())


def test_chexpert_row_without_labels_is_counted(tmp_path: Path) -> None:
    write_chexpert_tables(tmp_path, 1)
    with (tmp_path / "train.csv").open("a") as stream:
        stream.write("CheXpert-v1.0/train/patient00009/study1/view1_frontal.jpg,Male,61,Frontal,AP" + "," * 14 + "\n")
    empty = sum(
        all(row[label] is None for label in chexpert.LABELS) for row in chexpert.read(tmp_path).table.to_pylist()
    )
    assert f"{empty} rows have no label at all" in chexpert.read(tmp_path).notes


def test_chexpert_layout_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"train\.csv is missing: a CheXpert folder holds train\.csv, valid"):
        chexpert.read(tmp_path)
    inner = tmp_path / "CheXpert-v1.0"
    write_chexpert_tables(inner, 3)
    with pytest.raises(ManifestError, match=r"did you mean .*CheXpert-v1\.0\?"):
        chexpert.read(tmp_path)
    (inner / "valid.csv").unlink()
    with pytest.raises(ManifestError, match=r"valid\.csv is missing"):
        chexpert.read(inner)


def test_chexpert_column_and_path_errors(tmp_path: Path) -> None:
    write_chexpert_tables(tmp_path, 3)
    good = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(good.replace("Edema", "Oedema"))
    with pytest.raises(ManifestError, match=r"train\.csv lacks the columns \['Edema'\]"):
        chexpert.read(tmp_path)
    (tmp_path / "train.csv").write_text(good.replace("CheXpert-v1.0/train/patient00001/study2", "a/b/train/x"))
    with pytest.raises(ManifestError, match=r"train\.csv: 1 paths are not .*; the first is row 2: 'a/b/train/x"):
        chexpert.read(tmp_path)
    (tmp_path / "train.csv").write_text(good.replace("train/patient00001/study2", "train/../patient00001/study2"))
    with pytest.raises(ManifestError, match="1 paths are not"):
        chexpert.read(tmp_path)


def test_chexpert_reads_fast(tmp_path: Path) -> None:
    """A quarter of the original's 223,414 rows; the whole must take below 10 s."""
    write_chexpert_tables(tmp_path, 56_000)
    seconds = []
    for _ in range(2):  # the better one: another process may be at work
        start = time.perf_counter()
        source = chexpert.read(tmp_path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2.5
    assert source.table.num_rows == 56_234


# ---- ChestX-ray14

# In the order of nih.LABELS, counted in the original by others.
NIH_COUNTS = (11559, 2776, 13317, 19894, 5782, 6331, 1431, 5302, 4667, 2303, 2516, 1686, 3385, 227, 60361)


@pytest.mark.realdata
def test_nih_real_labels(shared_data: Path, tmp_path: Path) -> None:
    for name in ("Data_Entry_2017_v2020.csv.gz", "train_val_list.txt.gz"):
        (tmp_path / name).symlink_to(shared_data / "labels" / "nih" / name)
    source = nih.read(tmp_path)
    table = source.table.to_pydict()
    assert source.table.num_rows == 112_120
    assert len(set(table["group"])) == 30_805
    assert tuple(table[label].count("1") for label in nih.LABELS) == NIH_COUNTS
    assert all(set(table[label]) == {"0", "1"} for label in nih.LABELS)
    assert (table["View Position"].count("PA"), table["View Position"].count("AP")) == (67_310, 44_810)
    assert (table["split"].count("train"), table["split"].count("test")) == (86_524, 25_596)
    pairs = set(zip(table["group"], table["split"]))
    assert len(pairs) == 30_805  # each patient in one split
    assert source.table.column_names[6:17] == [
        *("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender"),
        *("View Position", "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]"),
    ]
    assert table["OriginalImagePixelSpacing[x"][0] == "0.14300000000000002"
    assert "112120 images are not below the folder; their path is images/<name>" in source.notes


@pytest.mark.realdata
def test_nih_real_variant_header(shared_data: Path, tmp_path: Path) -> None:
    """The variant keeps one finding a row, the 2020 file's but for four rows; ages have their unit letter."""
    for name, target in (("a", "Data_Entry_2017_v2020.csv.gz"), ("b", "sample_labels_variant.csv.gz")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "Data_Entry_2017.csv.gz").symlink_to(shared_data / "labels" / "nih" / target)
    whole, part = (nih.read(tmp_path / name).table for name in ("a", "b"))
    assert part.num_rows == 10_000
    assert part["Patient_Age"][0].as_py() == "040Y"
    columns = ["id", "group", *nih.LABELS]
    joined = part.select(columns).join(whole.select(columns), keys="id", right_suffix=" 2020").to_pylist()
    assert all(row["group"] == row["group 2020"] for row in joined)
    assert {sum(row[label] == "1" for label in nih.LABELS) for row in joined} == {1}
    assert sum(row[label] > row[f"{label} 2020"] for row in joined for label in nih.LABELS) == 4


def test_nih_stand_in(tmp_path: Path) -> None:
    rows = write_nih(tmp_path, archives=2)
    source = nih.read(tmp_path)
    read = source.table.to_pylist()
    assert [row["id"] for row in read] == [row["Image Index"] for row in rows]
    for got, row in zip(read, rows):
        assert {key: got[key] for key in row} == row
        assert got["group"] == row["Patient ID"]
        findings = set(row["Finding Labels"].split("|"))
        assert {label for label in nih.LABELS if got[label] == "1"} == findings
        assert {label for label in nih.LABELS if got[label] == "0"} == set(nih.LABELS) - findings
        assert got["split"] == ("test" if int(row["Patient ID"]) > 4 else "train")
        assert (tmp_path / got["path"]).is_file()
    assert {row["path"].split("/")[0] for row in read} == {"images_001", "images_002"}
    with Image.open(tmp_path / read[1]["path"]) as image:
        assert image.mode == "RGBA"
    assert (source.default_task, source.tasks, source.label_columns) == ("nih-14", nih.TASKS, nih.LABELS)
    assert source.split_origin == "official"
    assert len(source.notes) == 1  # the licence: nothing is odd


def test_nih_flat_compressed_variant(tmp_path: Path) -> None:
    rows = write_nih(tmp_path, archives=0, variant=True, compressed=True)
    source = nih.read(tmp_path)
    assert source.table["path"].to_pylist() == [f"images/{row['Image_Index']}" for row in rows]
    assert source.table["Patient_Age"][0].as_py().endswith("Y")
    assert set(source.table["split"].to_pylist()) == {"train", "test"}


@pytest.mark.parametrize("lists", [("train_val_list.txt",), ("test_list.txt",)])
def test_nih_one_list_implies_the_other(tmp_path: Path, lists: tuple[str, ...]) -> None:
    write_nih(tmp_path / "both", num_patients=4)
    write_nih(tmp_path / "one", num_patients=4, lists=lists)
    both, one = (nih.read(tmp_path / name) for name in ("both", "one"))
    assert one.table.equals(both.table)
    assert "one official list is absent; the images outside the other list are taken for it" in one.notes


def test_nih_without_lists(tmp_path: Path) -> None:
    write_nih(tmp_path, num_patients=2, lists=())
    source = nih.read(tmp_path)
    assert set(source.table["split"].to_pylist()) == {""}
    assert source.split_origin == "none"
    assert "no official list is beside the labels; splits are empty" in source.notes


def test_nih_lists_that_do_not_fit(tmp_path: Path) -> None:
    rows = write_nih(tmp_path, num_patients=3)
    names = [row["Image Index"] for row in rows]
    write_text(tmp_path / "train_val_list.txt", "\n".join([names[0], "99999999_000.png"]))
    write_text(tmp_path / "test_list.txt", names[-1])
    source = nih.read(tmp_path)
    assert source.table["split"].to_pylist() == ["train", *[""] * (len(names) - 2), "test"]
    assert "1 names of train_val_list.txt are not in the labels" in source.notes
    assert f"{len(names) - 2} images stand in neither list" in source.notes
    write_text(tmp_path / "test_list.txt", names[0])
    with pytest.raises(ManifestError, match=r"1 images stand in train_val_list\.txt and in test_list\.txt"):
        nih.read(tmp_path)
    (tmp_path / "test_list.txt").unlink()
    (tmp_path / "test_list.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(ManifestError, match=r"test_list\.txt\.gz is damaged"):
        nih.read(tmp_path)


def test_nih_images_absent_repeated_and_linked(tmp_path: Path) -> None:
    rows = write_nih(tmp_path, num_patients=3, archives=2)
    read = {row["id"]: row["path"] for row in nih.read(tmp_path).table.to_pylist()}
    first, second = rows[0]["Image Index"], rows[1]["Image Index"]
    (tmp_path / read[first]).unlink()
    (tmp_path / "a copy").mkdir()
    shutil.copy(tmp_path / read[second], tmp_path / "a copy" / second)
    os.symlink(tmp_path, tmp_path / "a copy" / "loop")
    source = nih.read(tmp_path)
    again = {row["id"]: row["path"] for row in source.table.to_pylist()}
    assert again == read | {first: f"images/{first}"}
    assert "1 images are not below the folder; their path is images/<name>" in source.notes
    assert "1 images lie in other folders too; those of the documented layout are taken" in source.notes


def test_nih_blank_finding_stays_blank(tmp_path: Path) -> None:
    write_text(
        tmp_path / "Data_Entry_2017.csv", "Image Index,Finding Labels,Patient ID\na.png,,1\nb.png,Mass|Hernia,2\n"
    )
    source = nih.read(tmp_path)
    blank, given = source.table.to_pylist()
    assert {blank[label] for label in nih.LABELS} == {None}
    assert {label for label in nih.LABELS if given[label] == "1"} == {"Mass", "Hernia"}
    assert "1 rows have no finding text; their labels are blank" in source.notes


def test_nih_newest_table_is_read(tmp_path: Path) -> None:
    write_nih(tmp_path, num_patients=2)
    old = "Image Index,Finding Labels,Patient ID\nold.png,Mass,1\n"
    for name in ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv.gz"):
        write_text(tmp_path / name, old)
    source = nih.read(tmp_path)
    assert "old.png" not in source.table["id"].to_pylist()
    assert "Data_Entry_2017_v2020.csv is read, Data_Entry_2017.csv, Data_Entry_2017_v2020.csv.gz is not" in source.notes


def test_nih_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no Data_Entry_2017\*\.csv: a ChestX-ray14 folder holds"):
        nih.read(tmp_path)
    write_text(tmp_path / "Data_Entry_2017.csv", "Image Index,Finding Labels\na.png,Mass\n")
    with pytest.raises(ManifestError, match=r"lacks the column 'Patient ID'; it names \['Image Index'"):
        nih.read(tmp_path)
    write_text(tmp_path / "Data_Entry_2017.csv", "Image Index,Finding Labels,Patient ID\na.png,Mass|Infiltrate,1\n")
    with pytest.raises(ManifestError, match=r"unknown findings \['Infiltrate'\]; known: Atelectasis, Cardiomegaly"):
        nih.read(tmp_path)


# ---- digits


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    source = digits.read(tmp_path / "digits")
    rows = source.table.to_pylist()
    bunch = load_digits()
    assert [row["digit"] for row in rows] == [str(digit) for digit in bunch.target]
    for i in (0, 1, 900, 1796):
        with Image.open(source.root / rows[i]["path"]) as image:
            pixels = np.asarray(image)
        assert pixels.dtype == np.uint8
        np.testing.assert_allclose(pixels * (16 / 255), bunch.images[i], atol=0.04)
    shares = [source.table["split"].to_pylist().count(split) / len(rows) for split in ("train", "val", "test")]
    assert shares == pytest.approx([0.60, 0.15, 0.25], abs=0.02)
    assert all(
        {row["digit"] for row in rows if row["split"] == split} == set("0123456789") for split in ("val", "test")
    )
    assert {row["group"] for row in rows} == {None}
    assert (source.groups_known, source.label_columns, source.default_task) == (False, ("digit",), None)
    first = (source.root / rows[5]["path"]).stat()
    assert digits.read(source.root).table.equals(source.table)
    assert (source.root / rows[5]["path"]).stat().st_mtime_ns == first.st_mtime_ns


def test_digits_spare_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ManifestError, match="holds other files; give an empty or a new folder"):
        digits.read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
