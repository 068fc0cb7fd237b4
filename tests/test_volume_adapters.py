"""Volumes as data sets: slices, masks, splits and groups of AMOS, the Decathlon and CT-RATE, each trap by name."""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from miniatures import volumes as make
from volume_parts import by_volume, column, pixels, source_of, volume_root, volume_source

from featstore.datasets import explain
from featstore.datasets.manifest import build
from featstore.datasets.slices import Volume
from featstore.errors import ManifestError
from featstore.images.masks import read_mask
from featstore.images.opening import OpenFiles
from featstore.images.part import parse_part
from featstore.inputs import Inputs
from probes.known import TASKS

ADAPTERS = ("ac34", "acdc", "amos", "autopet", "camus", "cremi", "ct-rate", "hecktor", "msd")


# all adapters


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_parts_masks_and_groups_are_in_order(adapter: str) -> None:
    root = volume_root(adapter)
    options = {"task": "1"} if adapter == "msd" else {}
    source = source_of(adapter, root, **options)
    assert len(set(column(source, "id"))) == source.table.num_rows
    for row in source.table.to_pylist():
        assert (root / row["path"]).is_file()
        assert parse_part(row["part"]).index == row["z"]
        if row["mask_path"] is not None:
            assert (root / row["mask_path"]).is_file()
            assert parse_part(row["mask_part"]).index == row["z"]
        else:
            assert row["mask_part"] is None
    split = {(group, split) for group, split in zip(column(source, "group"), column(source, "split")) if group}
    assert len({group for group, _ in split}) == len(split), "a group stands in two splits"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_explanations_name_licence_split_and_groups(adapter: str) -> None:
    text = explain(adapter)
    assert len(text.splitlines()[0]) < 125
    for word in ("Layout:", "Split", "Groups:", "Source:"):
        assert word in text, word
    assert "Licence:" in text or "Access:" in text


@pytest.mark.parametrize("adapter", ["acdc", "autopet", "camus", "ct-rate"])
def test_tasks_name_columns_of_the_source(adapter: str) -> None:
    source = volume_source(adapter)
    assert source.default_task in source.tasks
    for name in source.tasks:
        task = TASKS[name]
        assert set(task.labels) <= set(source.label_columns) <= set(source.table.column_names)
        assert task.source
        if task.classes:
            assert set(column(source, task.labels[0])) <= set(task.classes)


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        ("ac34", "AC4_inputs.h5 is missing"),
        ("acdc", "has no training or testing: ACDC lies in"),
        ("amos", "has no imagesTr or imagesVa: an AMOS22 folder"),
        ("autopet", "has no PETCT_"),
        ("camus", "has no patient.*CAMUS lies in"),
        ("cremi", "has no file sample_"),
        ("ct-rate", "has no train_fixed or train or"),
        ("hecktor", "has no imagesTr: HECKTOR 2022 lies in"),
        ("msd", "has no imagesTr and no folder Task"),
    ],
)
def test_another_layout_is_refused_in_words(adapter: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=match):
        source_of(adapter, tmp_path)


# AMOS


def test_amos_modality_is_told_by_id() -> None:
    source = volume_source("amos")
    assert by_volume(source, "modality") == {
        "amos_0001": "CT", "amos_0002": "CT", "amos_0010": "CT", "amos_0507": "MRI", "amos_0008": "CT",
        "amos_0600": "MRI",
    }  # fmt: skip
    assert by_volume(source, "split")["amos_0008"] == "val"
    assert source.mask_classes[15] == "prostate/uterus"
    assert source.mask_classes.index("gall bladder") == 4


def test_amos_test_images_without_labels_are_left_out_unless_asked_for() -> None:
    assert any("1 volumes without labels are left out" in note for note in volume_source("amos").notes)
    source = volume_source("amos", unlabelled=True)
    assert by_volume(source, "split")["amos_0011"] == ""
    assert by_volume(source, "mask_path")["amos_0011"] is None


def test_amos_split_c_is_80_20_50_of_the_first_150_ct_volumes() -> None:
    from featstore.datasets.amos import _split_c

    volumes = [Volume(name=f"amos_{n:04d}", path="x", split="train") for n in (*range(1, 201), *range(500, 540))]
    parts = _split_c(volumes, ["CT"] * 200 + ["MRI"] * 40)
    assert [parts.count(part) for part in ("train", "val", "test", "")] == [80, 20, 50, 90]


def test_amos_refuses_names_without_a_number_and_counts_what_the_list_says(tmp_path: Path) -> None:
    make.amos(tmp_path)
    home = tmp_path / "amos22"
    (home / "labelsTr/amos_0010.nii.gz").unlink()
    make.apple_double(home / "imagesTr/amos_0001.nii.gz")
    about = json.loads((home / "dataset.json").read_text())
    about["training"] = about["training"][:2]
    (home / "dataset.json").write_text(json.dumps(about))
    notes = source_of("amos", home).notes
    assert any("dataset.json lists 2 training cases, imagesTr holds 4" in note for note in notes)
    assert any("2 volumes without labels" in note for note in notes)
    assert any("1 AppleDouble" in note for note in notes)
    for folder in ("imagesTr", "labelsTr"):
        (home / folder / "amos_0001.nii.gz").rename(home / folder / "case1.nii.gz")
    with pytest.raises(ManifestError, match=r"volumes of AMOS22 are called amos_NNNN.nii.gz"):
        source_of("amos", home)


# Decathlon


def test_msd_appledouble_files_are_no_volumes() -> None:
    source = volume_source("msd", task="Heart")
    assert not any("._" in path for path in column(source, "path"))
    assert any(note.startswith("12 AppleDouble") for note in source.notes)
    assert source.mask_classes == ("background", "left atrium")


def test_msd_four_dimensional_tasks_read_one_channel_or_three_as_rgb() -> None:
    source = volume_source("msd", task="01")
    assert column(source, "part")[1] == "axis=axial&index=1&channel=0"
    assert column(source, "mask_part")[1] == "axis=axial&index=1"
    assert set(column(source, "modality")) == {"FLAIR"}
    source = volume_source("msd", task="brainTumour", channel="0,1,2")
    assert set(column(source, "modality")) == {"FLAIR,T1w,T1gd"}
    row = source.table.to_pylist()[7]
    assert row["part"] == f"axis=axial&index={row['z']}&channel=0,1,2"
    found = pixels(volume_root("msd"), row["path"], row["part"])
    assert found.shape == (20, 24, 3)
    assert (np.diff(found.astype(int), axis=2) == 500).all()
    with pytest.raises(ManifestError, match=r"option channel '4': .* has 4 channels"):
        volume_source("msd", task="01", channel="4")
    with pytest.raises(ManifestError, match="channel is one number, or three"):
        volume_source("msd", task="01", channel="0,1")
    assert column(volume_source("msd", task="02"), "part")[1] == "axis=axial&index=1"


def test_msd_task_must_be_named_where_there_are_several() -> None:
    root = volume_root("msd")
    with pytest.raises(ManifestError, match=r"must hold one task.*Task01_BrainTumour, Task02_Heart$"):
        source_of("msd", root)
    with pytest.raises(ManifestError, match="'03' is none of them"):
        source_of("msd", root, task="03")
    alone = source_of("msd", root / "Task02_Heart")
    assert column(alone, "path")[0].startswith("imagesTr/")
    assert source_of("msd", root / "Task02_Heart", task="2").table.num_rows == alone.table.num_rows
    with pytest.raises(ManifestError, match="'Liver' is none of them"):
        source_of("msd", root / "Task02_Heart", task="Liver")


def test_msd_folds_split_by_case_and_test_images_have_no_labels() -> None:
    first, second = volume_source("msd", task="2"), volume_source("msd", task="2", fold=1)
    assert by_volume(first, "fold") == by_volume(second, "fold")
    for fold, source in (("0", first), ("1", second)):
        for name, part in by_volume(source, "split").items():
            assert part == ("test" if by_volume(source, "fold")[name] == fold else "train")
    assert any("1 volumes of imagesTs have no labels" in note for note in first.notes)
    assert by_volume(volume_source("msd", task="2", unlabelled=True), "split")["he_020"] == ""
    with pytest.raises(ManifestError, match="option fold counts from 0 to 4, got 5"):
        volume_source("msd", task="2", fold=5)


def test_msd_counts_of_dataset_json_are_compared(tmp_path: Path) -> None:
    home = tmp_path / "Task09_Spleen"
    make.write_task(home)
    (home / "labelsTr/sp_010.nii.gz").unlink()
    (home / "imagesTs/sp_020.nii.gz").unlink()
    notes = source_of("msd", home).notes
    assert "dataset.json says numTest 1, the folder holds 0" in notes
    assert "1 volumes of imagesTr have no labels and are left out" in notes
    assert "split_c" not in source_of("msd", home).table.column_names


def test_msd_heart_of_20_cases_has_12_4_4(tmp_path: Path) -> None:
    home = tmp_path / "Task02_Heart"
    for number in range(20):
        for folder in ("imagesTr", "labelsTr"):
            make.write_nifti(home / folder / f"la_{number:03d}.nii.gz", np.zeros((2, 2, 1), np.uint8))
    parts = column(source_of("msd", home), "split_c")
    assert [parts.count(part) for part in ("train", "val", "test")] == [12, 4, 4]


def test_msd_one_dangling_link_stops_no_registration(tmp_path: Path) -> None:
    home = tmp_path / "Task09_Spleen"
    make.write_task(home)
    (home / "imagesTr/sp_003.nii.gz").unlink()
    (home / "imagesTr/sp_003.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    (home / "imagesTr/sp_004.nii.gz").rename(home / "imagesTr/sp_004.NII.GZ")
    source = source_of("msd", home)
    assert column(source, "volume").count("sp_003") == 1
    assert by_volume(source, "mask_path")["sp_004"] == "labelsTr/sp_004.nii.gz"
    with pytest.raises(ManifestError, match=r"1 of 26 files are missing under .*such as imagesTr/sp_003.nii.gz"):
        build("spleen", source)


def test_msd_masks_that_point_elsewhere_are_not_used(tmp_path: Path) -> None:
    values, mask = np.zeros((8, 8, 4), np.int16), np.zeros((8, 8, 4), np.uint8)
    for number, affine in ((3, np.eye(4)), (4, np.diag([2.0, 2, 5, 1])), (5, np.diag([1.0, 1, -1, 1]))):
        for folder, data, where in (("imagesTr", values, affine), ("labelsTr", mask, np.eye(4))):
            path = tmp_path / "Task02_Heart" / folder / f"la_{number:03d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(data, where), path)
    source = source_of("msd", tmp_path)
    assert by_volume(source, "mask_path") == {
        "la_003": "Task02_Heart/labelsTr/la_003.nii.gz", "la_004": None, "la_005": None,
    }  # fmt: skip
    assert any(note.startswith("2 label volumes have the shape of their image, but") for note in source.notes)


# CT-RATE


def test_ct_rate_groups_by_patient_not_by_file() -> None:
    source = volume_source("ct-rate")
    groups, studies = by_volume(source, "group"), by_volume(source, "study")
    assert {name: groups[name] for name in ("train_2_a_1", "train_2_b_1")} == {
        "train_2_a_1": "train_2",
        "train_2_b_1": "train_2",
    }
    assert (studies["train_10_a_1"], studies["train_10_a_2"]) == ("train_10_a", "train_10_a")
    assert (studies["train_2_a_1"], studies["train_2_b_1"]) == ("train_2_a", "train_2_b")
    assert groups["train_1_a_1"] == "train_1"  # and not a prefix of train_10
    order = list(dict.fromkeys(column(source, "group")))
    assert order.index("train_9") < order.index("train_10")


def test_ct_rate_no_chest_volumes_are_excluded() -> None:
    source = volume_source("ct-rate")
    assert "train_3_a_1" not in by_volume(source, "split")
    assert any("1 volumes of no_chest" in note for note in source.notes)
    assert "train_3_a_1" in by_volume(volume_source("ct-rate", no_chest=True), "split")


def test_ct_rate_slope_and_intercept_are_columns_and_never_applied() -> None:
    source = volume_source("ct-rate")
    row = source.table.to_pylist()[0]
    assert (row["RescaleSlope"], row["RescaleIntercept"], row["XYSpacing"]) == ("1", "-1024", "[0.7, 0.7]")
    assert pixels(volume_root("ct-rate"), row["path"], row["part"]).min() >= 0  # stored values
    assert any("are columns and are not applied" in note for note in source.notes)


def test_ct_rate_fixed_files_hold_hounsfield_units_by_their_header_once(tmp_path: Path) -> None:
    values = np.array([0, 24, 1024, 2048] * 2, np.int16).reshape(2, 2, 2)
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(1.0, -1024.0)
    path = tmp_path / "valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz"
    path.parent.mkdir(parents=True)
    nibabel.save(image, path)
    source = source_of("ct-rate", tmp_path)
    row = source.table.to_pylist()[0]
    assert pixels(tmp_path, row["path"], row["part"]).min() == -1024
    assert any("valid_fixed; check one volume" in note for note in source.notes)
    assert any("1 volumes have no labels" in note for note in source.notes)
    with pytest.raises(ManifestError, match="has no train or valid: CT-RATE"):
        source_of("ct-rate", tmp_path, files="original")


def test_ct_rate_labels_are_machine_read_and_verbatim() -> None:
    source = volume_source("ct-rate")
    assert len(source.label_columns) == 18
    table = volume_root("ct-rate") / "dataset/multi_abnormality_labels/train_predicted_labels.csv"
    written = {row["VolumeName"]: row for row in csv.DictReader(table.read_text().splitlines())}
    for name, label in by_volume(source, "Hiatal hernia").items():
        if name.startswith("train"):
            assert label == written[f"{name}.nii.gz"]["Hiatal hernia"]
    assert "labels are machine-read from reports (predicted_labels)" in source.notes
    assert "Manufacturer" in source.table.column_names
    rows = volume_source("ct-rate", every=2).table
    assert set(rows["z"].to_pylist()) == {0}


def test_ct_rate_all_metadata_and_faulty_tables(tmp_path: Path) -> None:
    make.ct_rate(tmp_path)
    home = tmp_path / "dataset"
    table = home / "metadata/train_metadata.csv"
    table.write_text("VolumeName,KVP\ntrain_1_a_1.nii.gz,120\n")
    assert by_volume(source_of("ct-rate", home, all_metadata=True), "KVP")["train_1_a_1"] == "120"
    labels = home / "multi_abnormality_labels/valid_predicted_labels.csv"
    labels.write_text("VolumeName,Emphysema\nvalid_1_a_1.nii.gz,1\n")
    with pytest.raises(ManifestError, match=r"lacks the columns .*Medical material"):
        source_of("ct-rate", home)
    labels.unlink()
    labels = labels.with_name("train_predicted_labels.csv")
    lines = labels.read_text().splitlines()
    flipped = [line.replace(",0", ",2").replace(",1", ",0") for line in lines[1:4]]
    labels.write_text("\n".join([*lines, *lines[4:8], "train_99_a_1.nii.gz," + ",".join("1" * 18)]) + "\n")
    source_of("ct-rate", home)  # said twice alike, or of a volume that is not on disk
    labels.write_text("\n".join([*lines, *flipped]) + "\n")
    with pytest.raises(ManifestError, match="3 volumes stand in several rows with different labels"):
        source_of("ct-rate", home)
    labels.write_text("\n".join(lines) + "\n")
    assert any("valid_predicted_labels.csv is not there" in note for note in source_of("ct-rate", home).notes)
    (home / "train/train_1/train_1_a/train_1_a_1.nii.gz").rename(home / "train/scan.nii.gz")
    with pytest.raises(ManifestError, match="called SPLIT_PATIENT_SCAN_RECONSTRUCTION"):
        source_of("ct-rate", home)


@pytest.mark.realdata
def test_real_hippocampus_masks_have_the_counted_voxels(tmp_path: Path, shared_data: Path) -> None:
    """40 volumes of Task04: every slice registers, and masks add up to voxels counted by other means."""
    home, truth = tmp_path / "Task04_Hippocampus", {}
    for folder in ("imagesTr", "labelsTr"):
        (home / folder).mkdir(parents=True)
    with (shared_data / "mri/volumes_hippocampus.csv").open() as file:
        for row in csv.DictReader(file):
            name = Path(row["path"]).name
            truth[name.removesuffix(".nii.gz")] = row
            (home / "imagesTr" / name).symlink_to((shared_data / "mri" / row["path"]).resolve())
            (home / "labelsTr" / name).symlink_to((shared_data / "mri" / row["mask_path"]).resolve())
    source = source_of("msd", home)
    assert source.table.num_rows == sum(int(row["shape"].split("x")[2]) for row in truth.values())
    counts = {name: np.zeros(3, int) for name in truth}
    inputs, opened = Inputs(home), OpenFiles()
    for name, path, part in zip(column(source, "volume"), column(source, "mask_path"), column(source, "mask_part")):
        counts[name] += np.bincount(read_mask(inputs, opened, path, part).ravel(), minlength=3)
    opened.close()
    for name, row in truth.items():
        assert counts[name][1:].tolist() == [int(row["anterior_voxels"]), int(row["posterior_voxels"])]
