"""Traps of volumes and masks; every expectation is typed from the releases and papers, not from the code."""

import json
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from miniatures import WRITERS
from miniatures import volumes as make
from miniatures.chest import write_csv
from miniatures.slices import write_mat
from volume_parts import by_volume, pixels, source_of, volume_root, volume_source

from featstore.datasets import brain_tumor, read_source
from featstore.datasets.source import Source
from featstore.images.masks import read_mask
from featstore.images.opening import OpenFiles
from featstore.inputs import Inputs
from probes.known import TASKS

AMOS_16 = [
    "background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta",
    "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus",
]  # fmt: skip
CT_RATE_18 = [
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule",
    "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening",
]  # fmt: skip


# ---- classes of masks


@pytest.mark.parametrize(
    ("adapter", "classes"),
    [
        ("amos", AMOS_16),
        ("camus", ["background", "left ventricle", "myocardium", "left atrium"]),
        ("acdc", ["background", "right ventricle", "myocardium", "left ventricle"]),
        ("hecktor", ["background", "GTVp", "GTVn"]),
        ("autopet", ["background", "lesion"]),
        ("montgomery", ["background", "left lung", "right lung"]),
        ("shenzhen", ["background", "lung"]),
        ("brain-tumor", ["background", "tumour"]),
        ("camelyon16", ["background", "tumour"]),
        ("camelyon17", ["background", "tumour"]),
        ("bcnb", ["background", "tumour"]),
        ("edd2020", ["background", "BE", "suspicious", "HGD", "cancer", "polyp"]),
        # Neurons are instances, not classes.
        ("cremi", []),
        ("ac34", []),
    ],
)
def test_mask_values_are_the_classes_of_the_release(adapter: str, classes: list[str], tmp_path: Path) -> None:
    made = WRITERS[adapter](tmp_path)
    options = {"tile": 40, "max_tiles": 1} if adapter in ("camelyon16", "camelyon17", "bcnb") else {}
    assert list(read_source(adapter, made.root, **options).mask_classes) == classes


def test_montgomery_left_mask_is_1_and_right_mask_2(tmp_path: Path) -> None:
    WRITERS["montgomery"](tmp_path)
    for row in read_source("montgomery", tmp_path).table.to_pylist():
        left, right = row["mask_path"].split("|")
        assert ("/leftMask/" in left, "/rightMask/" in right) == (True, True)
        assert row["mask_part"] == "values=1|values=2"


@pytest.mark.parametrize(
    ("folder", "labels"),
    [
        ("Task01_BrainTumour", ["edema", "non-enhancing tumour", "enhancing tumour"]),
        ("Task02_Heart", ["left atrium"]),
        ("Task03_Liver", ["liver", "cancer"]),
        ("Task04_Hippocampus", ["Anterior", "Posterior"]),
        ("Task08_HepaticVessel", ["Vessel", "Tumour"]),
        ("Task10_Colon", ["colon cancer primaries"]),
    ],
)
def test_msd_classes_are_those_of_dataset_json_in_order(folder: str, labels: list[str], tmp_path: Path) -> None:
    make.write_task(tmp_path / folder, cases=2, labels=labels)
    about = tmp_path / folder / "dataset.json"
    text = json.loads(about.read_text())
    # The order of the keys is not that of the values.
    text["labels"] = dict(reversed(text["labels"].items()))
    about.write_text(json.dumps(text))
    assert list(source_of("msd", tmp_path).mask_classes) == ["background", *labels]


def test_cremi_background_is_nothing_and_ids_beyond_doubles_stay_apart(tmp_path: Path) -> None:
    ids = np.full((5, 16, 16), 0xFFFFFFFFFFFFFFFF, np.uint64)
    ids[:, 4:8, 4:8] = 2**53
    ids[:, 8:12, 8:12] = 2**53 + 1  # the first integer that a double cannot hold
    with h5py.File(tmp_path / "sample_A_20160501.hdf", "w") as file:
        file["volumes/raw"] = np.zeros((5, 16, 16), np.uint8)
        file["volumes/labels/neuron_ids"] = ids
        file["volumes/labels/clefts"] = np.where(ids == 2**53, np.uint64(3), np.uint64(0xFFFFFFFFFFFFFFFF))
    for name, last in (("neuron_ids", 2**53 + 1), ("clefts", None)):
        row = source_of("cremi", tmp_path, mask=name).table.to_pylist()[0]
        assert f"volumes/labels/{name}" in row["mask_part"]
        found = read_mask(Inputs(tmp_path), OpenFiles(), row["mask_path"], row["mask_part"])
        assert found[0, 0] == found[-1, -1] == 0
        assert found[5, 5] == (2**53 if last else 3)
        assert last is None or found[9, 9] == last
        assert len({found[0, 0], found[5, 5], found[9, 9]}) == (3 if last else 2)


# ---- AMOS


def test_amos_numbers_to_499_are_ct_and_from_500_mri(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in (410, 499, 500, 506):
        values, mask = make.phantom(rng, labels=1, sides=(8, 8, 2))
        for folder, data in (("imagesTr", values), ("labelsTr", mask)):
            make.write_nifti(tmp_path / folder / f"amos_{number:04d}.nii.gz", data)
    assert by_volume(source_of("amos", tmp_path), "modality") == {
        "amos_0410": "CT", "amos_0499": "CT", "amos_0500": "MRI", "amos_0506": "MRI",
    }  # fmt: skip


# ---- CT-RATE


def write_ct_rate(root: Path, folder: str, values: np.ndarray, *, intercept: str, slope: str = "1") -> Source:
    """One validation volume; the metadata say `validation`, the labels `valid`."""
    home = root / "dataset"
    path = home / folder / "valid_1/valid_1_a/valid_1_a_1.nii.gz"
    path.parent.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    labels = home / "multi_abnormality_labels/valid_predicted_labels.csv"
    write_csv(labels, ["VolumeName", *CT_RATE_18], [["valid_1_a_1.nii.gz", "1", *["0"] * 17]])
    header = ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"]
    row = ["valid_1_a_1.nii.gz", slope, intercept, "[0.7, 0.7]", "1.5"]
    write_csv(home / "metadata/validation_metadata.csv", header, [row])
    return source_of("ct-rate", root)


def test_ct_rate_metadata_say_validation_where_labels_say_valid(tmp_path: Path) -> None:
    values = np.array([0, 24, 1024, 2048] * 2, np.int16).reshape(2, 2, 2)
    source = write_ct_rate(tmp_path, "valid", values, intercept="-8192", slope="2")
    row = source.table.to_pylist()[0]
    assert row["volume"] == "valid_1_a_1"
    assert (row["RescaleSlope"], row["RescaleIntercept"]) == ("2", "-8192")
    assert (row["XYSpacing"], row["ZSpacing"]) == ("[0.7, 0.7]", "1.5")
    assert (row["split"], row["group"], row["study"]) == ("val", "valid_1", "valid_1_a")
    assert (row["Medical material"], row["Cardiomegaly"]) == ("1", "0")
    assert sorted(source.label_columns) == sorted(CT_RATE_18)
    assert sorted(TASKS["ct-rate-18"].labels) == sorted(TASKS["ct-rate-18-b"].labels) == sorted(CT_RATE_18)


@pytest.mark.parametrize("intercept", ["-1024", "0", ""])
def test_ct_rate_fixed_volume_of_hounsfield_units_is_never_rescaled_by_the_table(
    intercept: str, tmp_path: Path
) -> None:
    values = np.array([-1000, -900, 40, 1000] * 2, np.int16).reshape(2, 2, 2)
    source = write_ct_rate(tmp_path, "valid_fixed", values, intercept=intercept)
    rows = source.table.to_pylist()
    found = np.stack([pixels(tmp_path, row["path"], row["part"]) for row in rows])
    assert (found.min(), found.max()) == (-1000, 1000)


def test_ct_rate_classes_of_the_task_are_columns_of_the_source() -> None:
    assert set(CT_RATE_18) <= set(volume_source("ct-rate").table.column_names)


# ---- tasks on volumes


@pytest.mark.parametrize("adapter", ["acdc", "camus", "sars-cov-2", "brain-tumor", "rsna", "chexpert", "nih"])
def test_classes_of_a_task_are_what_its_adapter_gives(adapter: str, tmp_path: Path) -> None:
    source = read_source(adapter, WRITERS[adapter](tmp_path).root)
    table = source.table.to_pydict()
    expected = {
        "acdc-group": {"NOR", "MINF", "DCM", "HCM", "RV"},
        "camus-quality": {"Poor", "Medium", "Good"},
        "sars-cov-2-3class": {"covid", "healthy", "others"},
        "brain-tumor-3": {"meningioma", "glioma", "pituitary"},
        "brain-tumor-3-c": {"meningioma", "glioma", "pituitary"},
        "rsna-3class": {"Normal", "No Lung Opacity / Not Normal", "Lung Opacity"},
        "chexpert-sex": {"Female", "Male"},
        "nih-sex": {"F", "M"},
    }
    named = [name for name in TASKS if TASKS[name].classes and TASKS[name].labels[0] in table]
    own = [name for name in named if name.startswith(adapter.removesuffix("-cov-2"))]
    assert own
    for name in own:
        assert set(TASKS[name].classes) == expected[name]
        assert set(TASKS[name].classes) == set(table[TASKS[name].labels[0]]) - {None, "Unknown"}, name
    assert TASKS["camus-quality"].classes == ("Poor", "Medium", "Good"), "from worst to best"


# ---- Brain Tumor


def test_brain_cvind_counts_by_file_number_also_with_a_file_missing(tmp_path: Path) -> None:
    # Folds of files 1 to 7; file 3 was not downloaded.
    folds = [1, 2, 3, 4, 5, 1, 2]
    for number in (1, 2, 4, 5, 6, 7):
        fields = {
            "cjdata/label": np.array([[float(number % 3 + 1)]]),
            "cjdata/PID": np.frombuffer(f"10{number}".encode(), np.uint8).astype(np.uint16)[None],
            "cjdata/image": np.zeros((8, 8), np.int16),
            "cjdata/tumorMask": np.zeros((8, 8), np.uint8),
        }
        write_mat(tmp_path / f"{number}.mat", fields)
    write_mat(tmp_path / "cvind.mat", {"cvind": np.array([folds], np.float64)})
    table = brain_tumor.read(tmp_path).table
    assert table["id"].to_pylist() == ["1", "2", "4", "5", "6", "7"]
    assert table["fold"].to_pylist() == ["1", "2", "4", "5", "1", "2"]
    assert table["split"].to_pylist() == ["test", "val", "train", "train", "test", "val"]
    # Labels 1, 2, 3 are meningioma, glioma, pituitary: files 1, 4, 7 have 2, files 2, 5 have 3, file 6 has 1.
    assert table["tumour"].to_pylist() == ["glioma", "pituitary", "glioma", "pituitary", "meningioma", "glioma"]


def test_hecktor_values_1_and_2_are_read_as_they_are() -> None:
    source = volume_source("hecktor")
    row = next(row for row in source.table.to_pylist() if row["mask_path"])
    stored = np.asanyarray(nibabel.load(volume_root("hecktor") / row["mask_path"]).dataobj)
    assert set(np.unique(stored).tolist()) == {0, 1, 2}
    assert source.mask_classes[1] == "GTVp"
    assert source.mask_classes[2] == "GTVn"
