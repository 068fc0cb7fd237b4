"""Generic families: COCO's JSON, and folders of images beside folders of masks."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from miniatures import Miniature

CATEGORIES = ({"id": 7, "name": "opacity"}, {"id": 3, "name": "tube"})


def coco(root: Path) -> Miniature:
    """Polygons and uncompressed run lengths; train, val and test in files of their own; one image of each is empty."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir()
    number = 0
    for split, count in (("train", 24), ("val", 10), ("test", 10)):
        folder = root / f"{split}2017"
        folder.mkdir()
        images, items = [], []
        for index in range(count):
            number += 1
            picture = rng.integers(0, 40, (40, 50)).astype(np.uint8)
            name = f"{number:012d}.jpg"
            images.append({"id": number, "file_name": name, "width": 50, "height": 40})
            if index % 2:
                picture[5:25, 10:30] = 220
                outline = [10, 5, 30, 5, 30, 25, 10, 25]
                items.append({"image_id": number, "category_id": 7, "segmentation": [outline], "bbox": [10, 5, 20, 20]})
            if index % 3 == 1:
                picture[:, 40:45] = 140
                counts = [40 * 40, 40 * 5, 40 * 5]  # column by column
                items.append(
                    {
                        "image_id": number,
                        "category_id": 3,
                        "segmentation": {"size": [40, 50], "counts": counts},
                        "iscrowd": 1,
                    }
                )
            Image.fromarray(picture).save(folder / name, quality=95)
        document = {"images": images, "annotations": items, "categories": CATEGORIES}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(document))
    return Miniature(root=root, samples=44, labels="opacity,tube", masks=True)


def image_masks(root: Path) -> Miniature:
    rng = np.random.default_rng(1)
    for folder in ("images/a", "masks/a"):
        (root / folder).mkdir(parents=True)
    for number in range(12):
        picture = rng.integers(0, 60, (32, 36)).astype(np.uint8)
        mask = np.zeros((32, 36), np.uint8)
        mask[8:20, 4 : 10 + number] = 255
        picture[mask > 0] += 150
        Image.fromarray(picture).save(root / "images/a" / f"{number}.jpg")
        if number != 5:
            Image.fromarray(mask).save(root / "masks/a" / f"{number}_mask.png")
    return Miniature(root=root, samples=12, config={"option": ["values=255:1"]}, masks=True)


WRITERS = {"coco": coco, "image-masks": image_masks}
