"""VinDr-CXR and VinDr-PCXR: radiographs in DICOM, read by several radiologists each, without patient ids."""

import os
from collections import Counter
from pathlib import Path

import pyarrow as pa

from featstore.datasets.boxes import collect_boxes
from featstore.datasets.locate import find_table, has_column, named_column
from featstore.datasets.source import Source, build_table, read_csv
from featstore.datasets.splits import split_by_group
from featstore.errors import ManifestError

# The train table says "Other diseases", the test table "Other disease": one column, under the name of the first. The
# case of "Lung Opacity" differs between copies.
SAME = {"Other disease": "Other diseases", "Lung opacity": "Lung Opacity"}
# Classes of the Kaggle release by their number; 14 is what a reader who drew nothing says.
KAGGLE = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD", "Infiltration",
    "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion", "Pleural thickening", "Pneumothorax",
    "Pulmonary fibrosis", "No finding",
)  # fmt: skip
SUFFIXES = (".dicom", ".dcm", ".png", ".jpg", ".jpeg")
_CXR_TASKS = ("vindr-cxr-28", "vindr-cxr-22", "vindr-cxr-6", "vindr-cxr-11-a")
_NO_PATIENTS = "groups: unknown; the release has no patient ids, so a split of its images may separate one patient's"
_OVERLAP = (
    "pre-training overlap: radiograph-pre-trained encoders such as RAD-DINO and TorchXRayVision saw public chest sets; "
    "exact lists unverified"
)
_CORNERS = ("x_min", "y_min", "x_max", "y_max")


def read_cxr(root: Path) -> Source:
    """VinDr-CXR: 18,000 adult chest radiographs (DICOM), 22 local and 6 global labels; PhysioNet or Kaggle layout.

    PhysioNet: train/<image_id>.dicom, test/<image_id>.dicom, annotations/image_labels_train.csv (image_id, rad_id,
    labels; three readers an image), image_labels_test.csv (a consensus, no rad_id) and annotations_train.csv,
    annotations_test.csv (image_id, rad_id, class_name, x_min, y_min, x_max, y_max; any order). One sample an image:
    a label column holds the readers' votes joined by a bar, in the order of their names in `rad_id` (`1|0|1` beside
    `R1|R2|R3`), or the one consensus value; the task's policy says any reader or majority. The test table calls
    "Other diseases" "Other disease"; the column is "Other diseases". Split: official train and test.

    Kaggle: train.csv (a row for each box and reader; class 14 is No finding), train/ and test/. A reader's vote for a
    class is 1 if he drew one. Its test images have no labels: they are kept without a split, and the training images
    are split 70/10/20, seeded, by image.

    Column `boxes`: JSON, corners in pixels, with class and reader. No patient ids: groups are unknown.
    Licence: PhysioNet credentialed (Kaggle: the competition's rules). Source: Nguyen et al. 2022.
    Pre-training overlap: radiograph encoders such as RAD-DINO and those of TorchXRayVision saw public chest sets (exact
    lists unverified).

    Raises:
        ManifestError: a table or column is missing, or a vote or box cannot be read.
    """
    if (_folder(root, "image_labels_train")) is None and (root / "train.csv").is_file():
        return _read_kaggle(root)
    return _read_physionet(root, "vindr-cxr", "vindr-cxr-28", _CXR_TASKS, SAME)


def read_pcxr(root: Path) -> Source:
    """VinDr-PCXR: 9,125 chest radiographs (DICOM) of children under ten, 15 diseases; official train and test.

    Layout: train/<image_id>.dicom, test/<image_id>.dicom; image_labels_train.csv, image_labels_test.csv (image_id,
    rad_ID, 15 diseases), annotations_train.csv and annotations_test.csv beside them. Names are kept as the release
    spells them: "Brocho-pneumonia", "Diagphramatic hernia". One sample an image; a label column holds the votes of its
    readers, joined by a bar in the order of `rad_ID`, or a single value where there is one reader.

    Column `boxes`: JSON, corners in pixels, with class and reader. No patient ids: groups are unknown.
    Licence: PhysioNet restricted. Source: Pham et al. 2022.
    Pre-training overlap: radiograph encoders such as RAD-DINO and those of TorchXRayVision saw public chest sets (exact
    lists unverified).

    Raises:
        ManifestError: a table or column is missing, or a vote or box cannot be read.
    """
    return _read_physionet(root, "vindr-pcxr", "vindr-pcxr-15", ("vindr-pcxr-15", "vindr-pcxr-3-a"), {})


def _folder(root: Path, name: str) -> Path | None:
    """Where a table lies: beside the images (VinDr-PCXR) or in annotations/ (VinDr-CXR)."""
    return next((folder for folder in (root, root / "annotations") if find_table(folder, name)[0] is not None), None)


def _read_physionet(root: Path, adapter: str, default: str, tasks: tuple[str, ...], same: dict[str, str]) -> Source:
    notes = [
        "VinDr-CXR: PhysioNet credentialed health data licence" if adapter == "vindr-cxr" else
        "VinDr-PCXR: PhysioNet restricted health data licence",
        _NO_PATIENTS,
        _OVERLAP,
    ]  # fmt: skip
    tables, paths, boxes, labels = [], list[str](), dict[str, str](), list[str]()
    for split in ("train", "test"):
        folder = _folder(root, f"image_labels_{split}")
        if folder is None:
            raise ManifestError(
                f"{root} has no image_labels_{split}.csv, neither beside train/ and test/ nor in annotations/; "
                "ROOT is the folder that holds train/ and test/"
            )
        path = find_table(folder, f"image_labels_{split}")[0] or folder
        table, part_notes = _vote(_renamed(read_csv(path), same, notes, path), path)
        tables.append(table.append_column("split", pa.array([split] * table.num_rows, pa.string())))
        found, path_notes = _paths(root, split, table["image_id"].to_pylist())
        paths += found
        notes += [*part_notes, *path_notes]
        boxes |= _read_boxes(root, split, notes)
        labels += [name for name in table.column_names if name not in (*labels, "image_id", "rad_id", "rad_ID")]
    for split, table in zip(("train", "test"), tables):
        absent = [name for name in labels if name not in table.column_names]
        notes += [f"the {split} table has no column for {', '.join(absent)}; blank there"] if absent else []
    if "No finding" not in labels:
        raise ManifestError(f"{root}: the label tables have no column 'No finding'; they name {labels}")
    original = pa.concat_tables(tables, promote_options="default").combine_chunks()
    return _source(
        original.drop_columns("split"),
        root,
        adapter,
        default=default,
        tasks=tasks,
        paths=paths,
        splits=original["split"],
        boxes=boxes,
        labels=tuple(labels),
        origin="official",
        notes=notes,
    )


def _source(
    original: pa.Table,
    root: Path,
    adapter: str,
    *,
    default: str,
    tasks: tuple[str, ...],
    paths: list[str],
    splits: pa.ChunkedArray,
    boxes: dict[str, str],
    labels: tuple[str, ...],
    origin: str,
    notes: list[str],
) -> Source:
    images = original["image_id"].to_pylist()
    strangers = len(set(boxes) - set(images))
    notes += [f"{strangers} images with boxes are not in the labels"] if strangers else []
    return Source(
        table=build_table(
            original,
            {"id": original["image_id"], "path": pa.array(paths, pa.string()), "split": splits},
            {"boxes": pa.array([boxes.get(image) for image in images], pa.string())},
        ),
        root=root,
        adapter=adapter,
        default_task=default,
        tasks=tasks,
        label_columns=labels,
        split_origin=origin,
        groups_known=False,
        notes=tuple(notes),
    )


def _renamed(table: pa.Table, same: dict[str, str], notes: list[str], path: Path) -> pa.Table:
    names = [same.get(name.strip(), name.strip()) for name in table.column_names]
    changed = [f"{old!r} of {path.name} is {new!r}" for old, new in zip(table.column_names, names) if old != new]
    notes += [f"column {text}" for text in changed]
    return table.rename_columns(names)


def _vote(table: pa.Table, path: Path) -> tuple[pa.Table, list[str]]:
    """One row an image, in order of first appearance; each label the votes of its rows in the readers' order."""
    images = named_column(table, path, "image_id").to_pylist()
    reader_column = next((name for name in table.column_names if name.casefold() == "rad_id"), None)
    readers = table[reader_column].to_pylist() if reader_column else [None] * len(images)
    rows: dict[str, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image, []).append(row)
    for members in rows.values():
        members.sort(key=lambda row: readers[row] or "")
    columns: dict[str, list[str | None]] = {"image_id": list(rows)}
    if reader_column:
        columns[reader_column] = ["|".join(readers[row] or "" for row in members) for members in rows.values()]
    for name in table.column_names:
        if name != reader_column and name.casefold() != "image_id":
            votes = table[name].to_pylist()
            columns[name] = ["|".join(votes[row] or "" for row in members) or None for members in rows.values()]
    counts = Counter(map(len, rows.values()))
    twice = sum(len({readers[row] for row in members}) < len(members) for members in rows.values())
    notes = [f"{path.name}: {count} images have {number} rows (readers)" for number, count in sorted(counts.items())]
    notes += [f"{path.name}: {twice} images have a reader twice; both votes stand"] if twice else []
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), notes


def _paths(root: Path, split: str, images: list[str]) -> tuple[list[str], list[str]]:
    """`<split>/<image_id>.dicom`, or with another suffix where that is what the folder has."""
    names = set(os.listdir(root / split)) if (root / split).is_dir() else set()
    paths, absent = [], 0
    for image in images:
        suffix = next((suffix for suffix in SUFFIXES if image + suffix in names), None)
        absent += suffix is None
        paths.append(f"{split}/{image}{suffix or SUFFIXES[0]}")
    return paths, [f"{absent} images are not in {split}/; their path is {split}/<image_id>.dicom"] if absent else []


def _read_boxes(root: Path, split: str, notes: list[str]) -> dict[str, str]:
    folder = _folder(root, f"annotations_{split}")
    if folder is None:
        notes.append(f"annotations_{split}.csv is absent; no boxes for the {split} images")
        return {}
    path = find_table(folder, f"annotations_{split}")[0] or folder
    return _boxes_of(read_csv(path), path)


def _boxes_of(table: pa.Table, path: Path) -> dict[str, str]:
    x0, y0, x1, y1 = (named_column(table, path, name) for name in _CORNERS)
    return collect_boxes(
        named_column(table, path, "image_id"),
        (x0, y0, x1, y1),
        path,
        sizes=False,
        labels=named_column(table, path, "class_name"),
        readers=named_column(table, path, "rad_id") if has_column(table, "rad_id") else None,
        names=SAME,
    )


def _read_kaggle(root: Path) -> Source:
    path = root / "train.csv"
    table = read_csv(path)
    images = named_column(table, path, "image_id").to_pylist()
    drawn = named_column(table, path, "class_name").to_pylist()
    readers = named_column(table, path, "rad_id").to_pylist()
    unknown = sorted({name or "" for name in drawn} - set(KAGGLE))
    if unknown:
        raise ManifestError(f"{path} has the unknown classes {unknown}; known: {', '.join(KAGGLE)}")
    said: dict[str, dict[str, set[str]]] = {}
    for image, reader, name in zip(images, readers, drawn):
        said.setdefault(image, {}).setdefault(reader or "", set()).add(name or "")
    columns: dict[str, list[str | None]] = {"image_id": list(said)}
    columns["rad_id"] = ["|".join(sorted(by)) for by in said.values()]
    for label in KAGGLE:
        columns[label] = ["|".join("1" if label in by[name] else "0" for name in sorted(by)) for by in said.values()]
    original = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    paths, notes = _paths(root, "train", list(said))
    counts = Counter(map(len, said.values()))
    notes += [f"{count} images have {number} readers" for number, count in sorted(counts.items())]
    splits = split_by_group([f"id:{image}" for image in said])
    test = root / "test"
    names = sorted(name for name in os.listdir(test) if name.lower().endswith(SUFFIXES)) if test.is_dir() else []
    unlabelled = [name.rpartition(".")[0] for name in names]
    if names:
        extra = pa.table({"image_id": pa.array(unlabelled, pa.string())})
        original = pa.concat_tables([original, extra], promote_options="default").combine_chunks()
        paths += [f"test/{name}" for name in names]
        splits += [""] * len(names)
        notes.append(f"{len(names)} test images have no labels; they are kept without a split")
    notes = ["VinDr-CXR on Kaggle: the competition's rules", _NO_PATIENTS, _OVERLAP, *notes]
    return _source(
        original,
        root,
        "vindr-cxr",
        default="vindr-cxr-15-kaggle",
        tasks=("vindr-cxr-15-kaggle", "vindr-cxr-14-kaggle"),
        paths=paths,
        splits=pa.chunked_array([pa.array(splits, pa.string())]),
        boxes=_boxes_of(table, path),
        labels=KAGGLE,
        origin="seeded by image, 70/10/20, seed 0 (the release's test images have no labels)",
        notes=notes,
    )
