"""RSNA Pneumonia Detection 2018: 26,684 radiographs (DICOM) from ChestX-ray14, with boxes of lung opacities.

Layout: stage_2_train_images/<patientId>.dcm, stage_2_train_labels.csv (patientId, x, y, width, height, Target; one row
for each box, so several for an image) and stage_2_detailed_class_info.csv (patientId, class). Test images have no
labels and are left out.

One sample an image: `Target` is 1 with boxes; `class` is Normal, Lung Opacity, or "No Lung Opacity / Not Normal", which
is Target 0. Column `boxes`: JSON, corners in pixels.

A patientId is that of one image, not of a patient. The images come from ChestX-ray14, where they belong to far fewer
patients, so a split by image (the usual one) puts one patient's images into training and test. Give the map of
TorchXRayVision (rsnamatches) to group by patient: `--option nih_map=FILE`, a CSV or JSON with patientId, cxr_match (the
file in ChestX-ray14) and mse. A match with mse < 3 is sure, one with mse > 10 is none; between, it counts as one, since
grouping too much leaks nothing. An image without match is a patient by itself. The published file is a pickle, which
can run code when it is read: convert it where you trust it.

Split: with the map 70/10/20 by NIH patient, seeded; without it, `split_mgca`. Column `split_mgca`: 70/15/15 by image,
as MGCA draws it (seed 0). Licence: Kaggle competition rules; ChestX-ray14's for the images.
Pre-training overlap: radiograph encoders such as RAD-DINO and those of TorchXRayVision saw public chest sets, and with
ChestX-ray14 these images (exact lists unverified).
Source: Shih et al. 2019; Wang et al. 2022 (MGCA) for the split.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featstore.datasets.boxes import collect_boxes
from featstore.datasets.locate import locate, named_column, need_table
from featstore.datasets.source import Source, build_table, read_csv
from featstore.datasets.splits import split_by_group
from featstore.errors import ManifestError

CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")
SURE, NONE = 3.0, 10.0  # mean squared error of a match: below it is sure, above it is none
_LAYOUT = "an RSNA folder holds stage_2_train_images/ and stage_2_train_labels.csv"
_NIH = re.compile(r"(?:.*/)?([0-9]{8})_[0-9]{3}(?:\.png)?")
_LEAK = (
    "groups: unknown; patientId is per image, and the images come from ChestX-ray14, where one patient has several: "
    "a split by image leaks patients. Give --option nih_map to group by patient"
)


_OVERLAP = (
    "pre-training overlap: the images are ChestX-ray14's, and radiograph-pre-trained encoders such as RAD-DINO and "
    "TorchXRayVision saw public chest sets; exact lists unverified"
)


def read(root: Path, *, nih_map: str | None = None) -> Source:
    """One row for each image of the label table.

    Raises:
        ManifestError: a table, column or the map is missing, the map is a pickle or names no NIH file, a Target is not
            0 or 1, or differs between the rows of an image.
    """
    path, notes = need_table(root, "stage_2_train_labels", _LAYOUT)
    table = read_csv(path)
    images = named_column(table, path, "patientId")
    targets = _targets(images.to_pylist(), named_column(table, path, "Target").to_pylist(), path)
    ids = list(targets)
    x, y, width, height = (named_column(table, path, name) for name in ("x", "y", "width", "height"))
    boxes = collect_boxes(images, (x, y, width, height), path, sizes=True)
    classes, class_notes = _classes(root, targets)
    paths, path_notes = _paths(root, ids)
    mgca = mgca_split(ids)
    derived = {
        "boxes": pa.array([boxes.get(image) for image in ids], pa.string()),
        "split_mgca": pa.array(mgca, pa.string()),
    }
    groups: list[str | None] = [None] * len(ids)
    splits, origin, group_notes = mgca, "70/15/15 by image, as MGCA draws it (seed 0)", [_LEAK]
    if nih_map is not None:
        matches = _read_map(root, nih_map)
        known, group_notes = _patients(ids, matches)
        splits, origin = split_by_group(known), "seeded by NIH patient, 70/10/20, seed 0"
        groups = list(known)
        derived["nih_image"] = pa.array([matches.get(image, (None, 0.0))[0] for image in ids], pa.string())
        derived["nih_mse"] = pa.array([matches[image][1] if image in matches else None for image in ids], pa.float64())
    original = pa.table({"patientId": ids, "Target": list(targets.values()), "class": pa.array(classes, pa.string())})
    reserved = {
        "id": pa.array(ids, pa.string()),
        "path": pa.array(paths, pa.string()),
        "group": pa.array(groups, pa.string()),
        "split": pa.array(splits, pa.string()),
    }
    rows = f"{table.num_rows} rows (boxes) are {len(ids)} images"
    return Source(
        table=build_table(original, reserved, derived),
        root=root,
        adapter="rsna",
        default_task="rsna-pneumonia",
        tasks=("rsna-pneumonia", "rsna-pneumonia-b", "rsna-3class"),
        label_columns=("Target",),
        split_origin=origin,
        groups_known=nih_map is not None,
        notes=(
            "RSNA Pneumonia: Kaggle competition rules",
            _OVERLAP,
            rows,
            *group_notes,
            *notes,
            *class_notes,
            *path_notes,
        ),
    )


def mgca_split(images: list[str]) -> list[str]:
    """MGCA's 70/15/15: sorted ids, scikit-learn's `train_test_split` with seed 0, and again on the 30 %.

    The first half of the second draw is the test part there, the second validation. Source: Wang et al. 2022, code.
    """
    order = sorted(range(len(images)), key=images.__getitem__)
    rest = math.ceil(len(order) * 0.3)
    drawn = np.random.RandomState(0).permutation(len(order))[:rest]  # how scikit-learn picks its test part
    val = np.random.RandomState(0).permutation(rest)[: math.ceil(rest * 0.5)]
    result = ["train"] * len(images)
    for index in drawn:
        result[order[index]] = "test"
    for index in drawn[val]:
        result[order[index]] = "val"
    return result


def _targets(images: list[str], values: list[str | None], path: Path) -> dict[str, str]:
    targets: dict[str, str] = {}
    for row, (image, value) in enumerate(zip(images, values), 1):
        if value not in ("0", "1") or targets.get(image, value) != value:
            raise ManifestError(f"{path} row {row}: Target must be 0 or 1, and the same in all rows of an image")
        targets[image] = value
    return targets


def _classes(root: Path, targets: dict[str, str]) -> tuple[list[str | None], list[str]]:
    if not any((root / f"stage_2_detailed_class_info.csv{suffix}").is_file() for suffix in ("", ".gz")):
        return [None] * len(targets), ["stage_2_detailed_class_info.csv is absent; column class is blank"]
    path, _ = need_table(root, "stage_2_detailed_class_info", _LAYOUT)
    table = read_csv(path)
    pairs = zip(named_column(table, path, "patientId").to_pylist(), named_column(table, path, "class").to_pylist())
    given = dict(pairs)
    odd = sum((given.get(image) == "Lung Opacity") != (target == "1") for image, target in targets.items())
    notes = [f"{odd} images have a class that does not fit their Target (1 is Lung Opacity)"] if odd else []
    return [given.get(image) for image in targets], notes


def _paths(root: Path, ids: list[str]) -> tuple[list[str], list[str]]:
    names = [f"{image}.dcm" for image in ids]
    expected = [f"stage_2_train_images/{name}" for name in names]
    return locate(root, names, expected, "stage_2_train_images/<patientId>.dcm")


def _read_map(root: Path, text: str) -> dict[str, tuple[str, float]]:
    """patientId -> (file in ChestX-ray14, mean squared error)."""
    file = next((path for path in (Path(text), root / text) if path.is_file()), None)
    if file is None:
        raise ManifestError(f"--option nih_map: {text} is no file, neither here nor in {root}")
    if file.suffix.lower() in (".pkl", ".pickle"):
        raise ManifestError(
            f"--option nih_map: {file.name} is a pickle, which can run code when it is read; convert it where you "
            "trust it: python -c \"import json, pickle; json.dump(pickle.load(open('rsnamatches.pkl', 'rb')), "
            "open('rsnamatches.json', 'w'), default=str)\""
        )
    try:
        if file.suffix.lower() == ".json":
            rows = _json_rows(json.loads(file.read_text("utf-8")))
        else:
            table = read_csv(file)
            rows = [
                (image, match, mse) for image, match, mse in
                zip(*(named_column(table, file, name).to_pylist() for name in ("patientId", "cxr_match", "mse")))
            ]  # fmt: skip
        return {str(image): (str(match), float(mse)) for image, match, mse in rows if match and mse is not None}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(
            f"--option nih_map: {file.name} must give patientId, cxr_match and a number mse for each image, as CSV or "
            f"JSON ({type(error).__name__})"
        ) from None


def _json_rows(data: Any) -> list[tuple[Any, Any, Any]]:
    if isinstance(data, dict):
        return [(image, entry["cxr_match"], entry["mse"]) for image, entry in data.items()]
    return [(entry["patientId"], entry["cxr_match"], entry["mse"]) for entry in data]


def _patients(ids: list[str], matches: dict[str, tuple[str, float]]) -> tuple[list[str], list[str]]:
    """The patient of each image as ChestX-ray14 numbers them, or the image itself."""
    groups, counts = [], {"sure": 0, "unsure": 0, "none": 0}
    for image in ids:
        match, mse = matches.get(image, ("", math.inf))
        counts["sure" if mse < SURE else "none" if not mse <= NONE else "unsure"] += 1
        if not mse <= NONE:
            groups.append(image)
            continue
        name = _NIH.fullmatch(match)
        if name is None:
            raise ManifestError(
                "--option nih_map: a cxr_match must be a file of ChestX-ray14, such as 00000001_000.png"
            )
        groups.append(str(int(name[1])))
    patients = len({group for group, image in zip(groups, ids) if group != image})
    return groups, [
        f"groups are ChestX-ray14's patients: {counts['sure']} images matched with mse < 3, {counts['unsure']} with "
        f"mse up to 10 (taken as matched), {counts['none']} not; {patients} patients. "
        "split_mgca is by image and leaks them"
    ]
