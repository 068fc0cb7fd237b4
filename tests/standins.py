"""Miniature data sets with the exact layout, spelling and traps of the originals, filled with phantom images."""

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from featstore.datasets import chexpert, nih, phantom
from featstore.datasets.phantom_render import render_frontal

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
NIH_VARIANT_HEADER = "Image_Index,Finding_Labels,Follow_Up_#,Patient_ID,Patient_Age,Patient_Gender,View_Position"
# What the phantom shows, in ChestX-ray14's words.
NIH_NAMES = {"Pleural Effusion": "Effusion", "Lung Lesion": "Nodule"}


def write_chexpert(
    root: Path, *, num_patients: int = 8, with_test: bool = False, small: bool = True, seed: int = 0, size: int = 64
) -> Path:
    """A CheXpert release below `root`, lateral views and label noise included; returns its folder."""
    return phantom.generate_chexpert(
        root, num_patients=num_patients, with_test=with_test, small=small, seed=seed, size=size
    )


def write_chexpert_tables(root: Path, num_rows: int, *, seed: int = 0) -> None:
    """train.csv with `num_rows` rows and a valid.csv of 234, as large and as sparse as the original; no images."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    header = ",".join(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *chexpert.LABELS])
    for name, part, count in (("train.csv", "train", num_rows), ("valid.csv", "valid", 234)):
        labels = np.array(["1.0", "0.0", "-1.0", ""])[rng.choice(4, (count, 14), p=[0.17, 0.07, 0.04, 0.72])]
        lines = [
            f"CheXpert-v1.0/{part}/patient{row // 3 + 1:05d}/study{row % 3 + 1}/view1_frontal.jpg,Male,61,Frontal,AP,"
            + ",".join(values)
            for row, values in enumerate(labels)
        ]
        (root / name).write_text("\n".join([header, *lines]) + "\n")


def write_nih(
    root: Path,
    *,
    num_patients: int = 6,
    archives: int = 2,
    lists: Sequence[str] = ("train_val_list.txt", "test_list.txt"),
    variant: bool = False,
    compressed: bool = False,
    seed: int = 0,
    size: int = 48,
) -> list[dict[str, str]]:
    """ChestX-ray14 in `root`; returns the rows of its table.

    Images lie in images_001/images/ ... (`archives` of them) or, with 0, in images/. The second image is RGBA, as
    some originals are. The last third of the patients is the test list. `variant` writes the header with
    underscores and ages such as 040Y.
    """
    suffix = ".gz" if compressed else ""
    header = NIH_VARIANT_HEADER if variant else NIH_HEADER
    keys = header.split(",")
    rows, listed = [], {"train_val_list.txt": list[str](), "test_list.txt": list[str]()}
    for number in range(1, num_patients + 1):
        patient = phantom.draw_patient(seed, number)
        for follow_up, study in enumerate(patient.studies):
            name = f"{number:08d}_{follow_up:03d}.png"
            findings = [NIH_NAMES.get(label, label) for label in phantom.LABELS if label in study.present()]
            text = "|".join(finding for finding in findings if finding in nih.LABELS)
            age = f"{patient.age:03d}Y" if variant else str(patient.age)
            view = "AP" if study.frontal.portable else "PA"
            fields = [name, text, str(follow_up), str(number), age, patient.sex, view, "2682", "2749", "0.143", "0.143"]
            rows.append(dict(zip(keys, fields)))
            folder = root / (f"images_{len(rows) % archives + 1:03d}/images" if archives else "images")
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(render_frontal(patient.anatomy, study.findings, study.frontal, size).image)
            image.convert("RGBA" if len(rows) == 2 else "L").save(folder / name)
            listed["test_list.txt" if number > num_patients * 2 / 3 else "train_val_list.txt"].append(name)
    lines = [header, *(",".join(row.values()) for row in rows)]
    write_text(root / f"Data_Entry_2017_v2020.csv{suffix}", "\n".join(lines) + "\n")
    for name in lists:
        write_text(root / f"{name}{suffix}", "\n".join(listed[name]))
    return rows


def write_text(path: Path, text: str) -> None:
    """Text as it is, compressed when the name ends in .gz."""
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def read_rows(path: Path) -> list[dict[str, str]]:
    """A CSV by the standard library: the independent reading that adapters are compared with."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))
