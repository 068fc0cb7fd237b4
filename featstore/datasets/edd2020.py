"""EDD2020: endoscopy frames with disease masks and boxes, 5 classes that may overlap.

Layout: EDD2020_release-I_2020-01-15/ with originalImages/EDD2020_ACB0001.jpg, masks/EDD2020_ACB0001_BE.tif (one file
for each image and class; 502 masks for about 380 frames), bbox/EDD2020_ACB0001.txt ("x1 y1 x2 y2 class" a line) and
class_list.txt. `root` is that folder or one that holds it.

Classes: BE, suspicious, HGD, cancer, polyp. A column for each is 1 where the image has its mask, 0 where not. The masks
of an image are laid over each other in this order (1 to 5, later ones on top), which loses overlaps; each stays in
`mask_path` on its own. `boxes` holds the boxes as JSON. No patients and no official split: seeded 70/10/20 by image,
groups unknown. Tasks: edd2020-5. Licence: CC BY-NC 4.0; cite Ali et al. 2020.
"""

import json
from pathlib import Path

import pyarrow as pa

from featstore.datasets.source import Source, build_table
from featstore.datasets.splits import split_by_group
from featstore.datasets.walk import by_stem, find_files
from featstore.errors import ManifestError

_IMAGES = (".jpg", ".jpeg", ".png")
_MASKS = (".tif", ".tiff", ".png")
_RELEASE = (r"/EDD2020_release-I_2020-01-15/",)
CLASSES = ("BE", "suspicious", "HGD", "cancer", "polyp")


def read(root: Path) -> Source:
    """One row an image of originalImages.

    Raises:
        ManifestError: no such image, a mask of an unknown class, two files of one name, or a line of a box file that is
            no box.
    """
    found = find_files(root)
    images = _inside(found, "originalImages", _IMAGES)
    if not images:
        raise ManifestError(f"{root} has no originalImages/EDD2020_*.jpg in it or below; check the root")
    masks: dict[str, dict[str, str]] = {}
    strangers = 0
    for whole, path in _inside(found, "masks", _MASKS).items():
        stem, _, kind = whole.rpartition("_")
        name = next((item for item in CLASSES if item.lower() == kind.lower()), None)
        if name is None:
            raise ManifestError(f"{root / path}: a mask ends in _CLASS, one of {', '.join(CLASSES)}; got {kind!r}")
        strangers += stem not in images
        masks.setdefault(stem, {})[name] = path
    stems = sorted(images)
    drawn = [[(name, masks.get(stem, {}).get(name)) for name in CLASSES] for stem in stems]
    given = [[(CLASSES.index(name) + 1, path) for name, path in row if path is not None] for row in drawn]
    boxes = _inside(found, "bbox", (".txt",))
    original = pa.table(
        {name: pa.array(["0" if row[at][1] is None else "1" for row in drawn]) for at, name in enumerate(CLASSES)}
        | {"boxes": pa.array([_read_boxes(root, boxes.get(stem)) for stem in stems], pa.string())}
    )
    reserved = {
        "id": pa.array(stems),
        "path": pa.array([images[stem] for stem in stems]),
        "split": pa.array(split_by_group([f"id:{stem}" for stem in stems])),
        "mask_path": pa.array(["|".join(path for _, path in row) or None for row in given], pa.string()),
        "mask_part": pa.array(["|".join(f"values={value}" for value, _ in row) or None for row in given], pa.string()),
    }
    notes = ["EDD2020: CC BY-NC 4.0, cite Ali et al. 2020", "the release names no patients"]
    notes += [f"{strangers} masks are of no image here"] if strangers else []
    unmasked = sum(not row for row in given)
    notes += [f"{unmasked} images have no mask"] if unmasked else []
    return Source(
        table=build_table(original, reserved),
        root=root,
        adapter="edd2020",
        default_task="edd2020-5",
        tasks=("edd2020-5",),
        label_columns=CLASSES,
        split_origin="seeded by image, 70/10/20, seed 0",
        groups_known=False,
        notes=tuple(notes),
        mask_classes=("background", *CLASSES),
    )


def _inside(found: list[str], folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Files of these suffixes somewhere in folders of this name, by stem; others (Thumbs.db) are passed over."""
    inside = (path for path in found if f"/{folder.lower()}/" in f"/{path.lower()}" and path.lower().endswith(suffixes))
    return by_stem(inside, prefer=_RELEASE)


def _read_boxes(root: Path, path: str | None) -> str | None:
    """Boxes of one image as JSON: [[x1, y1, x2, y2, class], ...] in pixels."""
    if path is None:
        return None
    boxes: list[list[float | str]] = []
    for number, line in enumerate((root / path).read_text("utf-8", "replace").splitlines(), 1):
        fields = line.replace(",", " ").split()
        if not fields:
            continue
        try:
            boxes.append([*map(float, fields[:4]), " ".join(fields[4:])])
        except ValueError:
            fields = []
        if len(fields) < 5:
            raise ManifestError(f"{root / path} line {number}: a box is x1 y1 x2 y2 class")
    return json.dumps(boxes)
