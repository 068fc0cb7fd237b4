"""Montgomery, Shenzhen, SARS-CoV-2 CT and brain tumours: what their files say, with their traps."""

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from miniatures import slices
from PIL import Image

from featstore.datasets import brain_tumor, sars_cov_2, tuberculosis
from featstore.datasets.splits import systematic_split
from featstore.datasets.walk import find_files
from featstore.errors import ManifestError


def test_montgomery_left_and_right_masks_are_one(tmp_path: Path) -> None:
    slices.montgomery(tmp_path)
    source = tuberculosis.read_montgomery(tmp_path)
    row = source.table.to_pylist()[0]
    name = "MCUCXR_0001_1.png"
    base = "MontgomerySet/ManualMask"
    assert row["mask_path"] == f"{base}/leftMask/{name}|{base}/rightMask/{name}"
    assert row["mask_part"] == "values=1|values=2"
    assert source.mask_classes == ("background", "left lung", "right lung")
    assert (row["tuberculosis"], row["sex"], row["age_years"], row["reading"]) == ("1", "M", 21.0, "normal")


def test_montgomery_label_is_the_suffix_of_the_name(tmp_path: Path) -> None:
    slices.montgomery(tmp_path)
    table = tuberculosis.read_montgomery(tmp_path).table
    assert table["tuberculosis"].to_pylist() == [path[-5] for path in table["path"].to_pylist()]


def test_montgomery_with_one_mask_only(tmp_path: Path) -> None:
    slices.montgomery(tmp_path)
    (tmp_path / "MontgomerySet/ManualMask/leftMask/MCUCXR_0002_0.png").unlink()
    row = tuberculosis.read_montgomery(tmp_path).table.to_pylist()[1]
    assert row["mask_path"].endswith("rightMask/MCUCXR_0002_0.png")
    assert row["mask_part"] == "values=2"


def test_shenzhen_images_without_mask_stay(tmp_path: Path) -> None:
    slices.shenzhen(tmp_path)
    source = tuberculosis.read_shenzhen(tmp_path)
    masks = source.table["mask_path"].to_pylist()
    assert [number for number, mask in enumerate(masks, 1) if mask is None] == [7, 14, 21, 28, 35]
    assert "5 images have no mask" in source.notes
    assert masks[0] == "masks/CHNCXR_0001_1_mask.png"


def test_shenzhen_takes_jpeg_and_png(tmp_path: Path) -> None:
    slices.shenzhen(tmp_path)
    paths = tuberculosis.read_shenzhen(tmp_path).table["path"].to_pylist()
    assert len(paths) == 40
    assert sum(path.endswith(".jpg") for path in paths) == 8
    # Of both suffixes of one image the PNG counts.
    Image.new("L", (8, 8)).save(tmp_path / "CXR_png/CHNCXR_0005_1.png")
    again = tuberculosis.read_shenzhen(tmp_path).table["path"].to_pylist()
    assert "CXR_png/CHNCXR_0005_1.png" in again
    assert len(again) == 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("male 45yrs\nnormal", ("M", 45.0, "normal")),
        ("Female, 11 months\nPTB", ("F", pytest.approx(11 / 12), "PTB")),
        ("Patient's Sex: F\nPatient's Age: 027Y\nnormal chest", ("F", 27.0, "normal chest")),
        ("", (None, None, None)),
        ("no sex nor years stated", (None, None, "no sex nor years stated")),
    ],
)
def test_clinical_texts(tmp_path: Path, text: str, expected: tuple[object, ...]) -> None:
    (tmp_path / "r.txt").write_text(text)
    assert tuberculosis._reading(tmp_path, "r.txt") == expected


@pytest.mark.parametrize(("read", "name"), [("montgomery", "MCUCXR"), ("shenzhen", "CHNCXR")])
def test_a_folder_without_such_images(tmp_path: Path, read: str, name: str) -> None:
    with pytest.raises(ManifestError, match=f"has no image such as CXR_png/{name}_0001_0.png"):
        getattr(tuberculosis, f"read_{read}")(tmp_path)


def test_shenzhen_second_mask_of_a_name(tmp_path: Path) -> None:
    slices.shenzhen(tmp_path)
    name = "CHNCXR_0001_1_mask.png"
    (tmp_path / "zz_small").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "zz_small" / name)
    assert tuberculosis.read_shenzhen(tmp_path).table["mask_path"].to_pylist()[0] == f"masks/{name}"
    (tmp_path / "masks").rename(tmp_path / "drawn")
    with pytest.raises(ManifestError, match=rf"stand for more than one file, such as drawn/{name} and zz_small/{name}"):
        tuberculosis.read_shenzhen(tmp_path)


def test_shenzhen_thumbnail_is_not_the_image(tmp_path: Path) -> None:
    slices.shenzhen(tmp_path)
    (tmp_path / "AA_thumbs").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "AA_thumbs/CHNCXR_0005_1.png")
    paths = tuberculosis.read_shenzhen(tmp_path).table["path"].to_pylist()
    assert all(path.startswith("CXR_png/") for path in paths)


@pytest.mark.parametrize(
    ("adapter", "images", "drawn", "counts"),
    [("montgomery", 138, 138, (69, 23, 46, 0)), ("shenzhen", 662, 566, (361, 91, 114, 96))],
)
def test_split_c_has_the_counts_of_the_paper(
    adapter: str, images: int, drawn: int, counts: tuple[int, ...], tmp_path: Path
) -> None:
    prefix = {"montgomery": "MCUCXR", "shenzhen": "CHNCXR"}[adapter]
    (tmp_path / "CXR_png").mkdir()
    (tmp_path / "masks/leftMask").mkdir(parents=True)
    for number in range(images):  # names only: the adapter opens no image
        stem = f"{prefix}_{number:04d}_{number % 2}"
        (tmp_path / f"CXR_png/{stem}.png").touch()
        if number < drawn:
            mask = f"leftMask/{stem}.png" if adapter == "montgomery" else f"{stem}_mask.png"
            (tmp_path / "masks" / mask).touch()
    table = getattr(tuberculosis, f"read_{adapter}")(tmp_path).table
    parts = table["split_c"].to_pylist()
    assert tuple(parts.count(part) for part in ("train", "val", "test", "")) == counts
    assert {part == "" for part, mask in zip(parts, table["mask_path"].to_pylist()) if mask is None} <= {True}


@pytest.mark.parametrize("adapter", ["montgomery", "shenzhen"])
def test_tuberculosis_patients_are_not_known(adapter: str, tmp_path: Path) -> None:
    getattr(slices, adapter)(tmp_path)
    source = getattr(tuberculosis, f"read_{adapter}")(tmp_path)
    assert not source.groups_known
    assert len(set(source.table["group"].to_pylist())) == 40
    assert "one image is taken for one patient: the release names no patients" in source.notes


def test_sars_slices_come_in_numeric_order(tmp_path: Path) -> None:
    slices.sars_cov_2(tmp_path)
    table = sars_cov_2.read(tmp_path).table
    assert table["path"].to_pylist()[:3] == ["Covid/0/2.png", "Covid/0/10.png", "Covid/1/2.png"]
    assert table["z"].to_pylist()[:3] == [0, 1, 0]


def test_sars_patients_of_two_classes_with_one_number_are_two(tmp_path: Path) -> None:
    slices.sars_cov_2(tmp_path)
    table = sars_cov_2.read(tmp_path).table
    assert len(set(table["group"].to_pylist())) == 42
    assert set(zip(table["class"].to_pylist(), table["covid"].to_pylist())) == {
        ("covid", "1"),
        ("healthy", "0"),
        ("others", "0"),
    }
    split = dict(zip(table["group"].to_pylist(), table["split_c"].to_pylist()))
    assert sorted(split.values()).count("test") == 14
    assert sorted(split.values()).count("val") == round(50 / 140 * 28)


def test_sars_popular_release_has_no_patients(tmp_path: Path) -> None:
    for folder in ("COVID", "non-COVID"):
        (tmp_path / folder).mkdir()
        for number in range(5):
            Image.new("L", (8, 8)).save(tmp_path / folder / f"{folder} ({number}).png")
    source = sars_cov_2.read(tmp_path)
    assert not source.groups_known
    assert source.table["group"].null_count == 10
    assert source.tasks == ("sars-cov-2-covid",)
    assert "this release names no patients: slices of one may cross splits" in source.notes


def test_sars_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"expected the folders Covid, Healthy and Others .* found no PNG"):
        sars_cov_2.read(tmp_path)
    slices.sars_cov_2(tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "Covid/loose.png")
    with pytest.raises(ManifestError, match="1 slices lie outside of patient folders and 84 inside"):
        sars_cov_2.read(tmp_path)


def test_brain_labels_are_floats_and_pid_are_character_codes(tmp_path: Path) -> None:
    slices.brain_tumor(tmp_path)
    source = brain_tumor.read(tmp_path)
    rows = source.table.to_pylist()
    assert [row["id"] for row in rows] == [str(number) for number in range(1, 46)]
    with h5py.File(tmp_path / rows[9]["path"]) as file:
        assert rows[9]["label"] == str(int(file["cjdata/label"][0, 0]))
        assert rows[9]["group"] == bytes(file["cjdata/PID"][:, 0].astype(np.uint8)).decode()
    assert {(row["label"], row["tumour"]) for row in rows} == set(brain_tumor.NAMES.items())
    assert rows[0]["part"] == "key=cjdata/image"
    assert rows[0]["mask_part"] == "key=cjdata/tumorMask"


def test_brain_folds_are_the_split(tmp_path: Path) -> None:
    slices.brain_tumor(tmp_path)
    table = brain_tumor.read(tmp_path).table
    pairs = set(zip(table["fold"].to_pylist(), table["split"].to_pylist()))
    assert pairs == {("1", "test"), ("2", "val"), ("3", "train"), ("4", "train"), ("5", "train")}
    (tmp_path / "cvind.mat").unlink()
    source = brain_tumor.read(tmp_path)
    assert source.split_origin.startswith("seeded by patient")
    by_patient = dict(zip(source.table["group"].to_pylist(), source.table["split"].to_pylist()))
    assert [by_patient[group] for group in source.table["group"].to_pylist()] == source.table["split"].to_pylist()


def test_brain_folds_that_part_patients_are_not_taken(tmp_path: Path) -> None:
    slices.brain_tumor(tmp_path)
    slices.write_mat(tmp_path / "cvind.mat", {"cvind": np.arange(45, dtype=float)[None] % 5 + 1})
    assert "folds share patients" in brain_tumor.read(tmp_path).split_origin


def test_brain_folds_in_a_matlab_5_file_are_not_read(tmp_path: Path) -> None:
    slices.brain_tumor(tmp_path)
    (tmp_path / "cvind.mat").write_bytes(
        b"MATLAB 5.0 MAT-file, Platform: PCWIN64".ljust(124) + b"\x00\x01IM" + b"\0" * 64
    )
    source = brain_tumor.read(tmp_path)
    assert source.split_origin == "seeded by patient, 70/10/20, seed 0"
    assert source.table["fold"].null_count == 45
    assert (
        "cvind.mat is a MATLAB 5 file, so its folds are not read; save it again with -v7.3 to use them" in source.notes
    )


def test_brain_two_files_of_one_number(tmp_path: Path) -> None:
    slices.brain_tumor(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/3.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    assert brain_tumor.read(tmp_path).table["path"].to_pylist()[2] == "brainTumorDataPublic_0/3.mat"


def test_brain_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no 1\.mat, 2\.mat"):
        brain_tumor.read(tmp_path)
    (tmp_path / "1.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(ManifestError, match=r"1\.mat is no MATLAB 7\.3 file"):
        brain_tumor.read(tmp_path)
    slices.write_mat(tmp_path / "1.mat", {"other": np.ones((1, 1))})
    with pytest.raises(ManifestError, match="has no cjdata/label and cjdata/PID"):
        brain_tumor.read(tmp_path)
    pid = np.array([[49]], np.uint16)
    slices.write_mat(tmp_path / "1.mat", {"cjdata/label": np.array([[4.0]]), "cjdata/PID": pid})
    with pytest.raises(ManifestError, match="the label must be 1, 2 or 3, got 4"):
        brain_tumor.read(tmp_path)
    slices.write_mat(tmp_path / "1.mat", {"cjdata/label": np.array([[2.0]]), "cjdata/PID": pid})
    slices.write_mat(tmp_path / "cvind.mat", {"other": np.ones((1, 1))})
    with pytest.raises(ManifestError, match="must hold cvind with a fold for each of 1 files, got 0"):
        brain_tumor.read(tmp_path)


def test_brain_files_need_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices.brain_tumor(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ManifestError, match=r"need h5py: pip install 'featstore\[medical\]'"):
        brain_tumor.read(tmp_path)


def test_systematic_split_is_even_and_keeps_its_shares() -> None:
    names = [f"{number:03d}" for number in range(210)]
    split = systematic_split(names, test=70 / 210, val=50 / 140)
    counts = [list(split.values()).count(part) for part in ("train", "val", "test")]
    assert counts == [90, 50, 70]
    assert [names.index(name) for name in names if split[name] == "test"] == list(range(0, 210, 3))
    assert systematic_split([], test=0.5, val=0.5) == {}
    assert systematic_split(["a"], test=0.2, val=0.1) == {"a": "train"}


def test_walk_leaves_hidden_files_out(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.nii.gz", "._a.nii.gz", "b/C.NII.GZ", "b/d.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert find_files(tmp_path) == ["a.nii.gz", "b/C.NII.GZ", "b/d.txt"]
    assert find_files(tmp_path, (".nii.gz",)) == ["a.nii.gz", "b/C.NII.GZ"]
