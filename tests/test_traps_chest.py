"""Traps of the chest radiograph releases; expectations are typed from the releases and papers, not from the code."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from miniatures import WRITERS
from miniatures.chest import PADCHEST_CSV, pixels, write_csv, write_mimic
from PIL import Image

from featstore.configs import RegisterConfig
from featstore.datasets import explain, read_source
from featstore.datasets.source import Source
from featstore.register import register
from featstore.store.importer import import_features
from probes.known import TASKS
from probes.labels import label_columns, read_targets
from probes.policies import POLICIES
from probes.tasks import Task, make_task
from probes.taskspec import TaskSpec
from probes.words import word_of

CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
FOURTEEN = CHEXPERT_HEADER.split(",")[5:]
VINDR_28 = [
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema",
    "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift",
    "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture",
    "Other lesion", "COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding",
]  # fmt: skip
PCXR_15 = [
    "No finding", "Bronchitis", "Brocho-pneumonia", "Other disease", "Bronchiolitis", "Situs inversus", "Pneumonia",
    "Pleuro-pneumonia", "Diagphramatic hernia", "Tuberculosis", "Congenital emphysema", "CPAM",
    "Hyaline membrane disease", "Mediastinal tumor", "Lung tumor",
]  # fmt: skip
CHEXPERT_TASKS = [name for name in TASKS if name.startswith("chexpert-")]
MIMIC_TASKS = [name for name in TASKS if name.startswith("mimic-")]
PADCHEST_TASKS = [name for name in TASKS if name.startswith("padchest-")]
Bind = Callable[[str, Path, str | TaskSpec], Task]


@pytest.fixture
def bind(tmp_path: Path, store_path: Path) -> Bind:
    """A task on a registered folder whose features are row numbers."""

    def make(adapter: str, root: Path, task: str | TaskSpec) -> Task:
        manifest, _ = register(store_path, adapter, root, RegisterConfig(adapter=adapter, allow_missing=True))
        ids = manifest.column("id")
        np.savez(tmp_path / "f.npz", features=np.arange(len(ids), dtype=np.float32)[:, None], id=np.array(ids))
        store, _, _ = import_features(store_path, tmp_path / "f.npz", dataset=adapter, model="m")
        return make_task(store[adapter, "m"], TASKS[task] if isinstance(task, str) else task)

    return make


def used(task: Task, column: str) -> dict[str, list[str]]:
    """Ids of the rows that train, select or test, by the value of a column."""
    manifest = task.features.manifest
    found: dict[str, list[str]] = {}
    for sample, value, role in zip(manifest.column("id"), manifest.column(column), task.role):
        found.setdefault(str(value or ""), []).extend([sample] if role else [])
    return found


def notes_of(adapter: str, root: Path) -> list[str]:
    root.mkdir()
    return [*read_source(adapter, WRITERS[adapter](root).root).notes]


# ---- lateral views


def write_chexpert(root: Path, *, patients: int = 40, sex: Sequence[str] = ("Male",)) -> Path:
    """Frontal and lateral files of every patient, and one of each whose name says the opposite of the column."""
    release = root / "lateral_x"
    views = (("view1_frontal", "Frontal"), ("view2_lateral", "Lateral"), ("view3_frontal", "Lateral"))
    views += (("view4_lateral", "Frontal"),)
    for table, part in (("train.csv", "train"), ("valid.csv", "valid")):
        rows = []
        for number in range(patients):
            ill = str(float(number % 2))
            for name, view in views:
                path = f"{part}/patient{number:05d}/study1/{name}.jpg"
                (release / path).parent.mkdir(parents=True, exist_ok=True)
                (release / path).write_bytes(b"x")
                age = 0 if number == 3 else 40 + number
                who = [sex[number % len(sex)], age, view, "AP" if view == "Frontal" else ""]
                rows.append([f"lateral_x/{path}", *who, *[ill] * 14])
            # Patients of the two tables are not the same ones.
        write_csv(release / table, CHEXPERT_HEADER.split(","), rows)
        if part == "valid":
            (release / "valid.csv").write_text((release / "valid.csv").read_text().replace("patient0", "patient6"))
            for folder in sorted((release / "valid").iterdir()):
                folder.rename(folder.with_name(folder.name.replace("patient0", "patient6")))
    return release


def test_there_are_tasks_of_every_data_set_with_lateral_views() -> None:
    assert {"chexpert-5", "chexpert-14", "chexpert-10-a", "chexpert-6-c", "chexpert-age"} <= set(CHEXPERT_TASKS)
    assert {"mimic-5", "mimic-14", "mimic-10-a", "mimic-7-a"} <= set(MIMIC_TASKS)
    assert {"padchest-17-a", "padchest-7-a"} <= set(PADCHEST_TASKS)


@pytest.mark.parametrize("name", CHEXPERT_TASKS)
def test_chexpert_lateral_views_are_told_by_the_column_not_by_file_or_folder(
    name: str, bind: Bind, tmp_path: Path
) -> None:
    task = bind("chexpert", write_chexpert(tmp_path, sex=("Male", "Female")), name)
    rows = used(task, "Frontal/Lateral")
    assert rows["Lateral"] == []
    assert {sample.rpartition("/")[2] for sample in rows["Frontal"]} == {"view1_frontal.jpg", "view4_lateral.jpg"}
    assert (task.role == "train").any()


@pytest.mark.parametrize("name", MIMIC_TASKS)
def test_mimic_lateral_and_ll_views_are_in_no_task(name: str, bind: Bind, tmp_path: Path) -> None:
    write_mimic(tmp_path)
    rows = used(bind("mimic-cxr", tmp_path, name), "ViewPosition")
    assert set(rows) == {"AP", "PA", "LATERAL", "LL"}
    assert rows["LATERAL"] == rows["LL"] == []
    assert rows["AP"]
    assert rows["PA"]


@pytest.mark.parametrize("name", PADCHEST_TASKS)
def test_padchest_views_are_told_by_projection_and_supine_ones_stay(name: str, bind: Bind, tmp_path: Path) -> None:
    findings = "cardiomegaly,pleural effusion,pneumonia,atelectasis,consolidation,pneumothorax,emphysema,hiatal hernia,"
    findings += "scoliosis,hilar congestion,aortic elongation,kyphosis,copd signs,pleural thickening,nodule,mass,"
    findings += "infiltrates"
    rows = []
    rng = np.random.default_rng(0)
    views = ("PA", "L", "AP", "COSTAL", "AP_horizontal", "EXCLUDE")
    for number in range(240):
        image, ill = f"{number:04d}.png", number // 6 % 2
        (tmp_path / "0").mkdir(exist_ok=True)
        Image.fromarray(pixels(bool(ill), rng, 65535, (4, 4))).save(tmp_path / "0" / image)
        text = str(findings.split(",")) if ill else "['normal']"
        # The other column says the opposite of every projection.
        other = "LATERAL" if views[number % 6] == "PA" else "POSTEROANTERIOR"
        rows.append([image, "0", f"S{number}", f"P{number // 6}", other, views[number % 6], text])
    header = ["ImageID", "ImageDir", "StudyID", "PatientID", "ViewPosition_DICOM", "Projection", "Labels"]
    write_csv(tmp_path / PADCHEST_CSV, header, rows)
    found = used(bind("padchest", tmp_path, name), "Projection")
    assert {view: len(ids) for view, ids in found.items()} == {
        "PA": 40, "AP": 40, "AP_horizontal": 40, "L": 0, "COSTAL": 0, "EXCLUDE": 0,
    }  # fmt: skip


# ---- labels that nobody gave


@pytest.mark.parametrize("name", MIMIC_TASKS)
def test_mimic_study_without_label_row_is_masked_in_every_task(name: str, bind: Bind, tmp_path: Path) -> None:
    write_mimic(tmp_path)
    task = bind("mimic-cxr", tmp_path, name)
    studies = np.array(task.features.manifest.column("study"))
    bare = studies == str(50_414_267 + 35)  # patient 35 of 40 has no row in the label tables
    views = np.array(task.features.manifest.column("ViewPosition"))
    frontal = np.isin(views, ("AP", "PA"))
    assert bare.sum() == 1
    assert (bare & frontal & (task.role != "")).any()
    assert not task.mask[bare].any()
    assert not task.mask_train[bare].any()
    assert not np.isin(np.flatnonzero(bare), np.concatenate([task.index(part) for part in ("train", "val", "test")]))
    # Studies with a row are labelled, though some of its cells are blank.
    assert task.mask_train[frontal & ~bare & (task.role == "train")].any(1).all()


# ---- column names


def test_label_columns_are_spelt_as_the_releases_spell_them(tmp_path: Path) -> None:
    expected = {"chexpert": FOURTEEN, "mimic-cxr": FOURTEEN, "vindr-cxr": VINDR_28, "vindr-pcxr": PCXR_15}
    for adapter, names in expected.items():
        (tmp_path / adapter).mkdir()
        source = read_source(adapter, WRITERS[adapter](tmp_path / adapter).root)
        assert sorted(source.label_columns) == sorted(names), adapter
        assert set(names) <= set(source.table.column_names), adapter


def test_tasks_name_the_labels_as_the_releases_spell_them() -> None:
    assert sorted(TASKS["chexpert-14"].labels) == sorted(TASKS["mimic-14"].labels) == sorted(FOURTEEN)
    assert sorted(TASKS["vindr-cxr-28"].labels) == sorted(VINDR_28)
    assert sorted(TASKS["vindr-cxr-22"].labels) == sorted(VINDR_28[:22])
    assert sorted(TASKS["vindr-cxr-6"].labels) == sorted(VINDR_28[22:])
    assert sorted(TASKS["vindr-pcxr-15"].labels) == sorted(PCXR_15)
    assert set(TASKS["chexpert-5"].labels) == {
        "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion",
    }  # fmt: skip
    assert set(TASKS["chexpert-10-a"].labels) == set(TASKS["mimic-10-a"].labels) == {
        "Cardiomegaly", "Pleural Effusion", "Pneumonia", "Atelectasis", "No Finding", "Consolidation", "Pneumothorax",
        "Lung Opacity", "Lung Lesion", "Fracture",
    }  # fmt: skip
    assert set(TASKS["vindr-cxr-11-a"].labels) == {
        "Cardiomegaly", "Pleural effusion", "Pneumonia", "Atelectasis", "No finding", "Consolidation", "Pneumothorax",
        "Pleural thickening", "Lung Opacity", "Pulmonary fibrosis", "Nodule/Mass",
    }  # fmt: skip


def test_padchest_17_reads_the_findings_of_the_release() -> None:
    spec = TASKS["padchest-17-a"]
    merged = dict(spec.merge)
    columns = {label: merged.get(label, (label,)) for label in spec.labels}
    assert sorted(column for parts in columns.values() for column in parts) == [
        "aortic elongation", "atelectasis", "cardiomegaly", "consolidation", "copd signs", "emphysema",
        "hiatal hernia", "hilar congestion", "infiltrates", "kyphosis", "mass", "nodule", "normal", "pleural effusion",
        "pleural thickening", "pneumonia", "pneumothorax", "scoliosis",
    ]  # fmt: skip
    assert len(columns) == 17


def write_vindr(root: Path, labels: Sequence[str], *, reader: str, boxes: Sequence[str] = ()) -> Source:
    for split in ("train", "test"):
        lines = [["a", "R1", *["1"] * len(labels)]] if split == "train" else [["b", *["0"] * len(labels)]]
        header = ["image_id", *([reader] if split == "train" else []), *labels]
        write_csv(root / f"image_labels_{split}.csv", header, lines)
        (root / split).mkdir()
    header = ["image_id", reader, "class_name", "x_min", "y_min", "x_max", "y_max"]
    write_csv(root / "annotations_train.csv", header, [["a", "R1", name, 1, 2, 3, 4] for name in boxes])
    return read_source("vindr-cxr" if reader == "rad_id" else "vindr-pcxr", root)


def test_vindr_cxr_header_with_a_small_letter_is_the_same_label(tmp_path: Path) -> None:
    small = [name.replace("Lung Opacity", "Lung opacity") for name in VINDR_28]
    assert "Lung opacity" in small
    source = write_vindr(tmp_path, small, reader="rad_id", boxes=["Lung opacity"])
    assert sorted(source.label_columns) == sorted(VINDR_28)
    row = source.table.to_pylist()[0]
    assert row["Lung Opacity"] == "1"
    assert '"Lung Opacity"' in row["boxes"]


def test_vindr_pcxr_finding_typos_stay_in_the_boxes(tmp_path: Path) -> None:
    typos = ["Diffuse aveolar opacity", "Bronchectasis", "Paraveterbral mass"]
    source = write_vindr(tmp_path, PCXR_15, reader="rad_ID", boxes=typos)
    text = source.table["boxes"].to_pylist()[0]
    assert [typo in text for typo in typos] == [True] * 3
    assert len(json.loads(text)) == 3


# ---- what encoders have seen


@pytest.mark.parametrize("adapter", ["nih", "chexpert", "mimic-cxr", "vindr-cxr", "vindr-pcxr", "padchest", "rsna"])
def test_pre_training_overlap_is_noted(adapter: str, tmp_path: Path) -> None:
    notes = notes_of(adapter, tmp_path / "root")
    told = [note for note in notes if "pre-training overlap" in note]
    assert len(told) == 1
    assert "RAD-DINO" in told[0]
    assert "TorchXRayVision" in told[0]
    assert "unverified" in told[0]
    assert "Pre-training overlap" in explain(adapter)


# ---- spellings


@pytest.mark.parametrize(
    "spellings",
    [
        ("Pleural_Thickening", "Pleural thickening", "Pleural Thickening", "pleural thickening"),
        ("Fibrosis", "Pulmonary fibrosis"),
        ("Infiltrate", "Infiltration"),
        ("Effusion", "Pleural Effusion", "Pleural effusion", "pleural effusion"),
        ("Lung Opacity", "Lung opacity"),
        ("No Finding", "No finding", "no_finding"),
    ],
    ids=lambda spellings: spellings[0],
)
def test_spellings_of_a_finding_have_one_word(spellings: Sequence[str]) -> None:
    assert len({word_of(spelling) for spelling in spellings}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Pericardial effusion", "Effusion"),
        ("Congenital emphysema", "Emphysema"),
        ("Pulmonary fibrotic sequela", "Fibrosis"),
        ("Hiatal hernia", "Pneumothorax"),
        ("Brocho-pneumonia", "Pneumonia"),
        ("Pleuro-pneumonia", "Pneumonia"),
        ("Pleural Other", "Pleural Effusion"),
        ("Enlarged Cardiomediastinum", "Cardiomegaly"),
        ("Lung Lesion", "Lung Opacity"),
    ],
)
def test_findings_of_their_own_keep_their_own_word(one: str, other: str) -> None:
    assert word_of(one) != word_of(other)


# ---- age and sex


def test_chexpert_age_0_is_no_age(bind: Bind, tmp_path: Path) -> None:
    task = bind("chexpert", write_chexpert(tmp_path), "chexpert-age")
    ages = np.array(task.features.manifest.column("Age"))
    assert (ages == "0").sum() == 8
    assert not task.mask[ages == "0"].any()
    assert not task.mask_train[ages == "0"].any()
    kept = (ages != "0") & (task.role != "")
    assert task.mask[kept].all()
    assert sorted(set(task.y[kept, 0].tolist())) == sorted({40.0 + n for n in range(40)} - {43.0})


def test_chexpert_sex_unknown_is_masked(bind: Bind, tmp_path: Path) -> None:
    task = bind("chexpert", write_chexpert(tmp_path, sex=("Male", "Female", "Unknown")), "chexpert-sex")
    sexes = np.array(task.features.manifest.column("Sex"))
    assert set(task.labels) == {"Female", "Male"}
    assert (sexes == "Unknown").any()
    assert not task.mask[sexes == "Unknown"].any()
    kept = task.role != ""
    assert task.mask[(sexes != "Unknown") & kept].all()
    assert {task.labels[number] for number in task.y[(sexes == "Male") & kept]} == {"Male"}


# ---- uncertain values


def test_u_ignore_of_torchxrayvision_reads_no_finding_as_no_pathology() -> None:
    columns = {
        "No Finding": ["1.0", "1.0", "1.0", "", "0.0", "-1.0"],
        "Edema": ["", "-1.0", "1.0", "", "-1.0", "1.0"],
        "Support Devices": ["1.0", "", "0.0", "", "1.0", "0.0"],
    }
    policy = POLICIES["ignore-xrv"]
    spec = TaskSpec(name="x", labels=("Edema", "Support Devices"), train_policy=policy, eval_policy=policy)
    targets = read_targets({name: columns[name] for name in label_columns(spec)}, spec)
    assert targets.labels == ("Edema", "Support Devices")
    assert targets.mask.tolist() == [
        [True, True], [True, False], [True, True], [False, False], [False, True], [True, True],
    ]  # fmt: skip
    assert targets.y[targets.mask].tolist() == [0, 1, 0, 0, 0, 1, 1, 0]
    np.testing.assert_array_equal(targets.y_train, targets.y)


def test_u_ignore_of_torchxrayvision_on_a_task_without_no_finding(bind: Bind, tmp_path: Path) -> None:
    policy = POLICIES["ignore-xrv"]
    (tmp_path / "mimic").mkdir()
    write_mimic(tmp_path / "mimic")
    task = bind("mimic-cxr", tmp_path / "mimic", replace(TASKS["mimic-5"], train_policy=policy, eval_policy=policy))
    columns = {name: task.features.manifest.column(name) for name in ("No Finding", *task.labels)}
    said = {"1.0": 1, "0.0": 0}
    for row in np.flatnonzero(task.role != ""):
        normal = columns["No Finding"][row] == "1.0"
        for at, label in enumerate(task.labels):
            expected = 0 if normal else said.get(columns[label][row])
            assert bool(task.mask[row, at]) == (expected is not None)
            assert expected is None or task.y[row, at] == expected
    assert (np.array(columns["No Finding"]) == "1.0").any()
