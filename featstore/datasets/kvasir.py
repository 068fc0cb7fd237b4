"""Kvasir-Capsule: labelled frames of capsule endoscopy, 47,238 images in 14 class folders, official two-fold split.

Layout: one folder a class with its images (labelled_images/<class>/*.jpg; below any folder of `root`), split_0.csv and
split_1.csv (`filename,label`; official_splits/), metadata.csv with boxes (optional). The extension in the split files
is not always that of the image, so images are found by the name without it; the class names of the split files
(Angiectasia, Reduced Mucosal View, ...) are not those of the folders, and both are kept: `label` and `folder`.

The split files cover the 11 classes with at least 50 images: split_0 is "train", split_1 "test", and validation images
are a seeded share of the training videos. Images outside of them stay with an empty split and no label. Groups are the
videos, from the part of a file name before the last underscore (the release names no patients); where such a group
stands in both official files, groups are unknown. Tasks: kvasir-capsule-11.
Licence: CC BY 4.0 by the authors' page; cite Smedsrud et al. 2021.
"""

import json
import re
from pathlib import Path

import pyarrow as pa

from featstore.datasets.source import Source, build_table, read_csv
from featstore.datasets.walk import by_stem, find_files
from featstore.errors import ManifestError

_SPLITS = (("split_0.csv", "train"), ("split_1.csv", "test"))
_BOX = ("x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4")


def read(root: Path) -> Source:
    """Every image below `root` whose name one of the split files has, and the others with an empty split.

    Raises:
        ManifestError: no images, no split file, a file without its columns, an image in both splits or with two labels,
            or two images of one name of which not just one lies in labelled_images/.
    """
    found = find_files(root)
    pictures = (path for path in found if path.lower().endswith((".jpg", ".jpeg", ".png")))
    images = by_stem(pictures, prefer=(r"/labelled_images/",))
    if not images:
        raise ManifestError(f"{root} has no images in class folders such as labelled_images/Ulcer/")
    listed: dict[str, tuple[str, str]] = {}
    absent = 0
    for name, split in _SPLITS:
        labels = _read_split(root, found, name)
        both = listed.keys() & labels.keys()
        if both:
            raise ManifestError(f"{len(both)} images stand in split_0.csv and in split_1.csv; download both again")
        absent += len(labels.keys() - images.keys())
        listed |= {stem: (split, label) for stem, label in labels.items() if stem in images}
    stems = sorted(images)
    splits = [listed.get(stem, ("", ""))[0] for stem in stems]
    groups: list[str | None] = [_video(stem) for stem in stems]
    sides: dict[str | None, set[str]] = {}
    for group, split in zip(groups, splits):
        sides.setdefault(group, set()).add(split)
    crossing = sum({"train", "test"} <= parts for group, parts in sides.items() if group is not None)
    known = not crossing and None not in sides
    boxes = _boxes(root, found)
    original = pa.table(
        {
            "label": pa.array([listed.get(stem, ("", None))[1] for stem in stems], pa.string()),
            "folder": pa.array([Path(images[stem]).parent.name for stem in stems], pa.string()),
            "boxes": pa.array([boxes.get(stem) for stem in stems], pa.string()),
        }
    )
    reserved = {
        "id": pa.array(stems),
        "path": pa.array([images[stem] for stem in stems]),
        "group": pa.array(groups if known else [None] * len(stems), pa.string()),
        "split": pa.array(splits),
    }
    notes = ["Kvasir-Capsule: CC BY 4.0 by the authors' page, cite Smedsrud et al. 2021"]
    notes += [f"{absent} images of the split files are not below the folder"] if absent else []
    notes += [f"{splits.count('')} images stand in neither split file"] if "" in splits else []
    notes += [f"{crossing} videos stand in both official splits; groups are taken as unknown"] if crossing else []
    notes += ["groups are videos, from the file names; the release names no patients"] if known else []
    return Source(
        table=build_table(original, reserved),
        root=root,
        adapter="kvasir-capsule",
        default_task="kvasir-capsule-11",
        tasks=("kvasir-capsule-11",),
        label_columns=("label",),
        split_origin="official (split_0 train, split_1 test)",
        groups_known=known,
        notes=tuple(notes),
    )


def _find(found: list[str], name: str) -> str | None:
    return next((path for path in found if path.rsplit("/", 1)[-1] == name), None)


def _read_split(root: Path, found: list[str], name: str) -> dict[str, str]:
    """Label by the name of an image without its extension."""
    path = _find(found, name)
    if path is None:
        raise ManifestError(f"{root} has no {name}; it is in official_splits of the authors' repository")
    table = read_csv(root / path)
    if not {"filename", "label"} <= set(table.column_names):
        raise ManifestError(f"{root / path} must have the columns filename and label, got {table.column_names}")
    names = (Path(file or "").stem for file in table["filename"].to_pylist())
    rows = {(stem, str(label)) for stem, label in zip(names, table["label"].to_pylist()) if stem}
    labels = dict(rows)
    if len(labels) < len(rows):
        raise ManifestError(
            f"{root / path}: {len(rows) - len(labels)} rows give an image another label than a row before; an image "
            "has one"
        )
    return labels


def _video(stem: str) -> str | None:
    match = re.fullmatch(r"(.+)_[0-9]+", stem)
    return match[1] if match else None


def _boxes(root: Path, found: list[str]) -> dict[str, str]:
    """The corners of the box of each image that has one, as JSON; by the columns filename, x1, y1 ... y4."""
    path = _find(found, "metadata.csv")
    if path is None:
        return {}
    table = read_csv(root / path, delimiter=";" if b";" in (root / path).read_bytes()[:200] else ",")
    if not {"filename", *_BOX} <= set(table.column_names):
        return {}
    corners: dict[str, list[list[float]]] = {}
    for name, *values in zip(*(table[column].to_pylist() for column in ("filename", *_BOX))):
        if name and all(values):
            corners.setdefault(Path(name).stem, []).append([float(value) for value in values])
    return {stem: json.dumps(boxes) for stem, boxes in corners.items()}
