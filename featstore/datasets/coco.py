"""Images with outlines in COCO's JSON: polygons and run lengths become masks, categories become 0/1 labels.

Layout: one or several JSON files with `images` (id, file_name, width, height), `annotations` (image_id, category_id,
segmentation, bbox) and `categories` (id, name) anywhere below `root`; `--option annotations=a.json` names one. Images
are found by their file_name below `root` or a folder of it, else by its last part; where several files are called so,
by the one in a folder whose name begins with the split or with the JSON's own name (val2017/ of instances_val.json). A
JSON whose name holds train, val or test gives that split; without such names images are split 70/10/20, seeded. Several
files must have the same categories. An image that is absent keeps its row, and registering says so.

Every category is a column: 1 where the image has an annotation of it, else 0. Masks number the categories in the order
of their ids from 1 on, later annotations lie on top; `iscrowd` ones are drawn too. `boxes` holds [x, y, width, height,
category] in pixels as JSON. No patients are known. Licence: your data's own.
"""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from featstore.datasets.source import Source, build_table
from featstore.datasets.splits import SPLIT_NAMES, split_by_group
from featstore.datasets.walk import find_files
from featstore.errors import ManifestError

_SPLIT = re.compile(r"(?:^|[^a-z])(train|training|val|valid|validation|test|testing)(?:[^a-z]|$)")


def read(root: Path, *, annotations: str = "") -> Source:
    """One row for each image of the JSON files.

    Raises:
        ManifestError: no JSON in this form or a damaged one, categories that differ, an image that two files name, or a
            file_name that fits several images.
    """
    found = find_files(root)
    documents = _documents(root, found, annotations)
    categories = _categories(documents)
    by_name: dict[str, list[str]] = {}
    for path in found:
        by_name.setdefault(path.rsplit("/", 1)[-1], []).append(path)
    known = set(found)
    rows: list[dict[str, Any]] = []
    for place, document in documents.items():
        told = _SPLIT.search(Path(place).stem.lower())
        rows += _rows(place, document, categories, SPLIT_NAMES[told[1]] if told else "")
    for row in rows:
        if row["path"] not in known:
            row["path"] = _find(row, by_name)
    paths = [row["path"] for row in rows]
    twice = len(paths) - len(set(paths))
    if twice:
        raise ManifestError(
            f"{twice} images stand more than once in the JSON files; name one file by --option annotations"
        )
    if not any(row["split"] for row in rows):
        for row, split in zip(rows, split_by_group([f"id:{path}" for path in paths])):
            row["split"] = split
        origin = "seeded by image, 70/10/20, seed 0"
    else:
        origin = "names of the JSON files"
    names = tuple(categories.values())
    columns = {name: pa.array([row["labels"].get(number, "0") for row in rows]) for number, name in categories.items()}
    reserved = {
        "id": pa.array(paths),
        "path": pa.array(paths),
        "split": pa.array([row["split"] for row in rows]),
        "mask_path": pa.array([row["place"] for row in rows]),
        "mask_part": pa.array([f"draw=coco:{row['id']}" for row in rows]),
    }
    boxes = pa.array([json.dumps(row["boxes"]) for row in rows])
    return Source(
        table=build_table(pa.table(columns), reserved, {"boxes": boxes}),
        root=root,
        adapter="coco",
        default_task=None,
        tasks=(),
        label_columns=names,
        split_origin=origin,
        groups_known=False,
        notes=("no patients are known",),
        mask_classes=("background", *names),
    )


def _find(row: dict[str, Any], by_name: dict[str, list[str]]) -> str:
    """The path of an image by the last part of its file_name; that name itself where there is none."""
    name, place = row["path"], row["place"]
    several = by_name.get(name.rsplit("/", 1)[-1], [name])
    several = [path for path in several if path.endswith(f"/{name}")] or several
    if len(several) > 1:
        begins = tuple(text for text in (row["split"], Path(place).stem.lower()) if text)
        several = [path for path in several if _is_below(path, begins)] or several
    if len(several) > 1:
        raise ManifestError(
            f"{place}: an image's file_name fits {several[0]} and {several[1]}; write it with its folder, relative to "
            "the root"
        )
    return str(several[0])


def _is_below(path: str, begins: tuple[str, ...]) -> bool:
    return any(folder.lower().startswith(begins) for folder in path.split("/")[:-1])


def _documents(root: Path, found: list[str], annotations: str) -> dict[str, dict[str, Any]]:
    """JSON files in COCO's form by path."""
    if annotations and annotations not in found:
        raise ManifestError(f"--option annotations: {root / annotations} does not exist below the root")
    documents = {}
    for path in [annotations] if annotations else [path for path in found if path.lower().endswith(".json")]:
        try:
            document = json.loads((root / path).read_text("utf-8"))
        except (ValueError, UnicodeDecodeError):
            raise ManifestError(
                f"{root / path} is no JSON (cut off?); mend or remove it, or name another file by --option annotations"
            ) from None
        if isinstance(document, dict) and all(
            isinstance(document.get(key), list) for key in ("images", "annotations", "categories")
        ):
            documents[path] = document
    if not documents:
        raise ManifestError(f"{root} has no JSON with images, annotations and categories, as COCO writes it")
    return documents


def _categories(documents: dict[str, dict[str, Any]]) -> dict[int, str]:
    """Names by id, in the order of ids."""
    held: dict[int, str] | None = None
    for place, document in documents.items():
        try:
            names = {int(item["id"]): str(item["name"]) for item in document["categories"]}
        except (KeyError, TypeError, ValueError):
            raise ManifestError(f"{place}: a category must have an id and a name") from None
        if held is not None and names != held:
            raise ManifestError(f"{place} has other categories than {next(iter(documents))}; register them one by one")
        held = names
    assert held is not None
    return dict(sorted(held.items()))


def _rows(place: str, document: dict[str, Any], categories: dict[int, str], split: str) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    try:
        for image in document["images"]:
            place_of = {"id": int(image["id"]), "path": str(image["file_name"]), "place": place, "split": split}
            rows[int(image["id"])] = {**place_of, "labels": {}, "boxes": []}
        for item in document["annotations"]:
            row = rows[int(item["image_id"])]
            row["labels"][int(item["category_id"])] = "1"
            if item.get("bbox"):
                row["boxes"].append([*map(float, item["bbox"][:4]), categories[int(item["category_id"])]])
    except (KeyError, TypeError, ValueError):
        raise ManifestError(
            f"{place}: images need id and file_name, annotations the image_id and category_id of ones that are there"
        ) from None
    return list(rows.values())
