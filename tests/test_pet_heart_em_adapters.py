"""AutoPET, HECKTOR, CAMUS, ACDC, CREMI and AC3/AC4: grids, frames, splits and labels, each trap by name."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from miniatures import volumes as make
from volume_parts import by_volume, column, pixels, source_of, volume_root, volume_source

from featstore.datasets import parse_options
from featstore.datasets.manifest import build
from featstore.errors import ManifestError
from featstore.images.masks import read_mask
from featstore.images.opening import OpenFiles, open_path
from featstore.images.part import parse_part
from featstore.inputs import Inputs
from probes.roles import assign_roles, crossing_groups, group_of, split_of
from probes.taskspec import TaskSpec

# PET/CT


def test_autopet_two_studies_of_one_patient_are_never_split() -> None:
    for fold in range(5):
        source = volume_source("autopet", fold=fold)
        splits: dict[str, set[str]] = {}
        for group, part in zip(column(source, "group"), column(source, "split")):
            splits.setdefault(group, set()).add(part)
        assert all(len(parts) == 1 for parts in splits.values())
    studies = sorted(set(column(source, "study")))
    assert (len(studies), len(splits)) == (21, 20)
    patients = sorted(splits)
    of = dict(zip(column(source, "group"), column(source, "fold")))
    assert [name for name in patients if of[name] == "2"] == patients[2::5]


def test_autopet_ctres_lies_on_the_grid_of_seg_and_ct_does_not() -> None:
    resampled, original = volume_source("autopet", image="CTres"), volume_source("autopet", image="CT")
    assert None not in column(resampled, "mask_path")
    assert set(column(original, "mask_path")) == {None}
    assert any("not on the grid of SEG" in note for note in original.notes)
    assert (max(column(resampled, "z")), max(column(original, "z"))) == (1, 4)
    assert all(path.endswith("/SUV.nii.gz") for path in column(volume_source("autopet"), "path"))


def test_autopet_diagnosis_is_given_only_where_the_table_says_one_thing(tmp_path: Path) -> None:
    make.autopet(tmp_path)
    table = next(tmp_path.glob("*/*.csv"))
    source = source_of("autopet", tmp_path)
    assert set(zip(column(source, "diagnosis"), column(source, "lesion"))) == {("NEGATIVE", "0"), ("MELANOMA", "1")}
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, re.sub("MELANOMA|NEGATIVE", "LYMPHOMA", lines[2])]) + "\n")
    source = source_of("autopet", tmp_path)
    assert column(source, "lesion").count(None) == 2 * 2  # two studies of two slices
    assert "1 patients have no diagnosis there, or several" in source.notes
    table.unlink()
    source = source_of("autopet", tmp_path / "FDG-PET-CT-Lesions")
    assert (source.default_task, source.label_columns) == (None, ())


def test_autopet_studies_without_the_file_are_counted(tmp_path: Path) -> None:
    make.autopet(tmp_path)
    suv = sorted(tmp_path.glob("*/*/*/SUV.nii.gz"))
    make.apple_double(suv[1])
    suv[0].unlink()
    notes = source_of("autopet", tmp_path).notes
    assert "1 studies have no SUV.nii.gz and are left out" in notes
    assert "1 AppleDouble files (._*) are passed over" in notes
    for path in suv[1:]:
        path.unlink()
    with pytest.raises(ManifestError, match=r"has 21 studies, none with SUV.nii.gz"):
        source_of("autopet", tmp_path)


def test_hecktor_stem_with_dash_or_low_line_is_one_case() -> None:
    source = volume_source("hecktor")
    assert by_volume(source, "case")["MDA_003__CT"] == by_volume(source, "group")["MDA_003__CT"] == "MDA-003"
    assert by_volume(source, "centre")["CHUM-010__CT"] == "CHUM"
    assert by_volume(source, "mask_path")["MDA_003__CT"].endswith("labelsTr/MDA_003.nii.gz")


def test_hecktor_mask_is_used_only_on_its_own_grid() -> None:
    ct, pet = volume_source("hecktor"), volume_source("hecktor", image="PT")
    assert [name for name, mask in by_volume(ct, "mask_path").items() if mask is None] == ["HGJ-005__CT"]
    assert [name for name, mask in by_volume(pet, "mask_path").items() if mask is not None] == ["HGJ-005__PT"]
    assert any("1 label volumes are not on the grid" in note for note in ct.notes)
    assert any("5 label volumes are not on the grid" in note for note in pet.notes)
    assert by_volume(ct, "split")["CHUM-001__CT"] == by_volume(pet, "split")["CHUM-001__PT"]


def test_hecktor_mask_of_equal_shape_on_the_grid_of_the_other_image_is_not_used(tmp_path: Path) -> None:
    home = tmp_path / "hecktor2022_training"
    for name, spacing in (("CT", (1.0, 1.0, 3.0)), ("PT", (4.0, 4.0, 3.0))):
        make.write_nifti(home / f"imagesTr/CHUM-001__{name}.nii.gz", np.zeros((8, 8, 4), np.int16), "LPS", spacing)
    make.write_nifti(home / "labelsTr/CHUM-001.nii.gz", np.zeros((8, 8, 4), np.uint8), "LPS", (1.0, 1.0, 3.0))
    assert column(source_of("hecktor", home), "mask_path") == ["labelsTr/CHUM-001.nii.gz"] * 4
    source = source_of("hecktor", home, image="PT")
    assert column(source, "mask_path") == [None] * 4
    assert any("another direction, spacing or place" in note for note in source.notes)


def test_hecktor_split_b_is_80_20_by_patient(tmp_path: Path) -> None:
    for number in range(100):
        make.write_nifti(tmp_path / f"imagesTr/MDA-{number:03d}__CT.nii.gz", np.zeros((1, 1, 2), np.uint8))
    parts = by_volume(source_of("hecktor", tmp_path), "split_b")
    assert set(parts.values()) == {"train", "test"}
    assert 0.1 < list(parts.values()).count("test") / 100 < 0.3
    own = by_volume(source_of("hecktor", tmp_path), "split")
    assert [name for name in own if own[name] == "test"] == [name for name in own if parts[name] == "test"]


def test_hecktor_refuses_other_names(tmp_path: Path) -> None:
    make.hecktor(tmp_path)
    home = tmp_path / "hecktor2022_training"
    (home / "labelsTr/CHUM-001.nii.gz").unlink()
    make.apple_double(home / "imagesTr/CHUM-001__CT.nii.gz")
    notes = source_of("hecktor", home).notes
    assert "1 cases have no label volume" in notes
    assert "1 AppleDouble files (._*) are passed over" in notes
    make.write_nifti(home / "imagesTr/patient7__CT.nii.gz", np.zeros((2, 2, 2), np.int16))
    with pytest.raises(ManifestError, match="files of HECKTOR are called CENTRE-NUMBER__CT"):
        source_of("hecktor", home)
    for path in (home / "imagesTr").glob("*__CT.nii.gz"):
        path.unlink()
    with pytest.raises(ManifestError, match=r"has 6 images, none is called ...__CT"):
        source_of("hecktor", home)


# heart


def test_camus_reads_ed_and_es_and_no_sequence() -> None:
    source = volume_source("camus")
    assert all(re.fullmatch(r"patient\d{4}_[24]CH_E[DS]", name) for name in column(source, "volume"))
    assert set(column(source, "part")) == {"axis=axial&index=0"}
    row = source.table.to_pylist()[0]
    assert (row["view"], row["phase"], row["ef"], row["EF"], row["ImageQuality"]) == (
        "2CH", "ED", "50.5", "50.5", "Medium",
    )  # fmt: skip
    assert row["study"] == "patient0001_2CH"
    splits = dict(zip(column(source, "group"), column(source, "split")))
    assert [list(splits.values()).count(part) for part in ("train", "val", "test")] == [12, 6, 6]


def test_camus_older_release_in_mhd_with_lvef(tmp_path: Path) -> None:
    folder = tmp_path / "training/patient0001"
    folder.mkdir(parents=True)
    for name in ("patient0001_4CH_ED", "patient0001_4CH_ED_gt"):
        (folder / f"{name}.mhd").write_text(
            "ObjectType = Image\nNDims = 2\nDimSize = 6 4\nElementType = MET_UCHAR\n"
            f"ElementSpacing = 0.3 0.3\nElementDataFile = {name}.raw\n"
        )
        (folder / f"{name}.raw").write_bytes(bytes(range(24)))
    (folder / "Info_4CH.cfg").write_text("LVef: 61\nImageQuality: Poor\n")
    source = source_of("camus", tmp_path)
    (row,) = source.table.to_pylist()
    assert (row["ef"], row["LVef"], row["ImageQuality"]) == ("61", "61", "Poor")
    assert row["mask_path"] == "training/patient0001/patient0001_4CH_ED_gt.mhd"
    assert any("no subgroup list" in note for note in source.notes)
    assert pixels(tmp_path, row["path"], row["part"]).size == 24


def test_hearts_without_cfg_have_masks_and_no_task(tmp_path: Path) -> None:
    for name in ("patient0001_2CH_ED", "patient0001_2CH_ED_gt"):
        make.write_nifti(tmp_path / f"camus/patient0001/{name}.nii.gz", np.zeros((3, 3, 1), np.uint8))
    make.write_nifti(tmp_path / "acdc/testing/patient101/patient101_frame01.nii.gz", np.zeros((3, 3, 1), np.uint8))
    for adapter, mask in (("camus", "patient0001/patient0001_2CH_ED_gt.nii.gz"), ("acdc", None)):
        source = source_of(adapter, tmp_path / adapter)
        assert (source.tasks, source.label_columns, source.default_task) == ((), (), None)
        assert column(source, "mask_path") == [mask]


def test_camus_lists_are_checked(tmp_path: Path) -> None:
    make.camus(tmp_path)
    lists = tmp_path / "database_split"
    make.apple_double(tmp_path / "database_nifti/patient0001/patient0001_2CH_ED.nii.gz")
    (lists / "subgroup_validation.txt").write_text("patient0013\n")
    notes = source_of("camus", tmp_path / "database_nifti").notes  # the lists lie beside
    assert "5 patients stand in no subgroup list; their split is empty" in notes
    assert "1 AppleDouble files (._*) are passed over" in notes
    (lists / "subgroup_testing.txt").write_text("patient0013\n")
    with pytest.raises(ManifestError, match="a patient stands in two subgroup lists"):
        source_of("camus", tmp_path)
    (lists / "subgroup_testing.txt").unlink()
    with pytest.raises(ManifestError, match=r"lacks subgroup_testing.txt: the official split needs all three"):
        source_of("camus", tmp_path)
    for path in lists.iterdir():
        path.write_text("")
    (lists / "subgroup_testing.txt").touch()
    assert source_of("camus", tmp_path).split_origin.startswith("seeded by patient")
    assert "the subgroup lists are empty; patients are split by seed" in source_of("camus", tmp_path).notes
    (tmp_path / "empty/patient0001").mkdir(parents=True)
    with pytest.raises(ManifestError, match="has no image called patientNNNN_2CH_ED"):
        source_of("camus", tmp_path / "empty")


def test_acdc_frames_are_ed_and_es_by_info_cfg(tmp_path: Path) -> None:
    source = volume_source("acdc")
    phases = by_volume(source, "phase")
    assert (phases["patient001_frame01"], phases["patient001_frame10"]) == ("ED", "ES")
    assert not any("4d" in path for path in column(source, "path"))
    splits = dict(zip(column(source, "group"), column(source, "split_b")))
    assert [list(splits.values()).count(part) for part in ("train", "val", "test")] == [16, 4, 5]
    assert set(by_volume(source, "split").values()) == {"train", "test"}
    folder = tmp_path / "training/patient001"
    make.write_nifti(folder / "patient001_frame07.nii.gz", np.zeros((2, 2, 2), np.int16))
    make.apple_double(folder / "patient001_frame07.nii.gz")
    (folder / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: RV\n")
    source = source_of("acdc", tmp_path)
    assert column(source, "phase") == [None, None]
    assert any("1 frames are neither ED nor ES" in note for note in source.notes)
    assert any("1 AppleDouble" in note for note in source.notes)
    (folder / "patient001_frame07.nii.gz").unlink()
    with pytest.raises(ManifestError, match=r"has no file called patientNNN_frameNN.nii.gz"):
        source_of("acdc", tmp_path)


# electron microscopy


def test_cremi_padded_and_test_stacks_are_left_out() -> None:
    source = volume_source("cremi")
    assert list(dict.fromkeys(column(source, "volume"))) == ["sample_A", "sample_B", "sample_C"]
    assert "1 padded files are passed over" in source.notes
    assert "1 stacks have no neuron_ids and are left out" in source.notes
    padded = volume_source("cremi", padded=True)
    assert set(column(padded, "volume")) == {"sample_A_padded"}
    assert set(column(padded, "mask_path")) == {None}
    assert any("1 stacks have raw data and labels of different size" in note for note in padded.notes)
    assert by_volume(volume_source("cremi", unlabelled=True), "split")["sample_A+"] == ""


def test_cremi_resolution_attribute_is_z_y_x() -> None:
    row = volume_source("cremi").table.to_pylist()[3]
    assert (row["resolution_z"], row["resolution_y"], row["resolution_x"]) == ("40", "4", "4")
    assert row["part"] == "index=3&key=volumes/raw"
    assert row["mask_part"] == "index=3&key=volumes/labels/neuron_ids"
    assert volume_source("cremi", mask="clefts").table["mask_part"][0].as_py() == "index=0&key=volumes/labels/clefts"


def test_cremi_split_is_100_and_25_of_125(tmp_path: Path) -> None:
    make.write_cremi(tmp_path / "sample_B_20160501.hdf", 125)
    parts = column(source_of("cremi", tmp_path), "split")
    assert parts == ["train"] * 100 + ["test"] * 25
    kept = source_of("cremi", tmp_path, every=50)
    assert list(zip(column(kept, "z"), column(kept, "split"))) == [(0, "train"), (50, "train"), (100, "test")]


def test_uint64_labels_are_exact(tmp_path: Path) -> None:
    make.write_cremi(tmp_path / "sample_A_20160501.hdf", 3)
    ids = make.neurons(3)
    ids[2, 4:6, 4:6], ids[2, 8:9, 4:6] = 2**53 + 1, 2**63 + 5  # a float would round them
    with h5py.File(tmp_path / "sample_A_20160501.hdf", "r+") as file:
        file["volumes/labels/neuron_ids"][...] = ids
    row = source_of("cremi", tmp_path).table.to_pylist()[2]
    parsed = parse_part(row["mask_part"])
    _, opened = open_path(Inputs(tmp_path), row["mask_path"], parsed)
    found = opened.labels(parsed)  # type: ignore[union-attr]
    assert found.dtype == np.uint64
    assert np.array_equal(found, ids[2])
    assert set(np.unique(found).tolist()) == {7, 2**31 - 1, 2**53 + 1, 2**63 + 5, make.BACKGROUND}


def test_cremi_background_is_class_0() -> None:
    row = volume_source("cremi").table.to_pylist()[2]
    found = read_mask(Inputs(volume_root("cremi")), OpenFiles(), row["mask_path"], row["mask_part"])
    assert set(np.unique(found).tolist()) == {0, 7, 2**31 - 1}


def test_cremi_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sample_A_20160501.hdf").write_bytes(b"cut off")
    with pytest.raises(ManifestError, match="has no data set volumes/raw, or is damaged"):
        source_of("cremi", tmp_path)


def test_ac34_first_80_and_first_100_sections(tmp_path: Path) -> None:
    make.write_ac34(tmp_path, AC4=85, AC3=103)
    source = source_of("ac34", tmp_path)
    pairs = list(zip(column(source, "volume"), column(source, "split")))
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    assert counts == {("AC4", "train"): 80, ("AC4", ""): 5, ("AC3", "test"): 100, ("AC3", ""): 3}
    assert column(source, "part")[84] == "index=84&key=main"


def test_ac34_voxel_size_is_a_choice() -> None:
    assert set(column(volume_source("ac34"), "voxel_size")) == {"3x3x29"}
    assert set(column(volume_source("ac34", voxel_size="6x6x30"), "voxel_size")) == {"6x6x30"}
    assert any("3x3x29 or 6x6x30" in note for note in volume_source("ac34").notes)
    for wrong in ("3x3", "axbxc", ""):
        with pytest.raises(ManifestError, match="option voxel_size is x, y, z in nanometres"):
            volume_source("ac34", voxel_size=wrong)


def test_ac34_labels_must_be_of_the_same_stack(tmp_path: Path) -> None:
    make.write_ac34(tmp_path, AC4=5, AC3=5)
    with h5py.File(tmp_path / "AC4_labels.h5", "w") as file:
        file["main"] = make.neurons(4)
    with pytest.raises(ManifestError, match=r"AC4: images are \(5, 24, 24\) and labels \(4, 24, 24\)"):
        source_of("ac34", tmp_path)
    with h5py.File(tmp_path / "AC4_labels.h5", "w") as file:
        file["other"] = make.neurons(5)
    with pytest.raises(ManifestError, match="has no data set main of three axes"):
        source_of("ac34", tmp_path)


def test_hdf5_without_h5py_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make.write_ac34(tmp_path, AC4=2, AC3=2)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ManifestError, match=r"pip install 'featstore\[medical\]'"):
        source_of("ac34", tmp_path)


@pytest.mark.parametrize(("adapter", "cut"), [("cremi", 3), ("ac34", 2)])
def test_stacks_that_their_split_cuts_are_no_groups(adapter: str, cut: int, tmp_path: Path) -> None:
    if adapter == "ac34":
        make.write_ac34(tmp_path, AC4=90, AC3=110)
    source = source_of(adapter, tmp_path) if adapter == "ac34" else volume_source(adapter)
    manifest, spec = build("em", source), TaskSpec(name="t", labels=("x",))
    groups = group_of(manifest)
    assert len(set(manifest.place("volume"))) == cut
    assert len(set(groups)) == len(manifest)
    split, notes = split_of(manifest, spec)
    assert notes == ("groups: the data set's own split cuts volumes, so slices of one are not held together",)
    role, _ = assign_roles(split, groups, spec, np.ones(len(manifest), bool))
    assert {"train", "val", "test"} <= set(role)
    assert crossing_groups(role, groups) == []


def test_options_are_read_from_the_command_line() -> None:
    assert parse_options("msd", ["task=02", "channel=0,1,2", "fold=3"]) == {"task": "02", "channel": "0,1,2", "fold": 3}
    assert parse_options("cremi", ["mask=clefts", "padded=yes"]) == {"mask": "clefts", "padded": True}
    assert parse_options("ct-rate", ["files=fixed", "every=10"]) == {"files": "fixed", "every": 10}
