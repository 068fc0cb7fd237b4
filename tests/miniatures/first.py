"""ChestX-ray14, CheXpert, a folder and a table."""

from pathlib import Path

import numpy as np
from PIL import Image
from standins import write_chexpert, write_nih

from miniatures import Miniature

CHEXPERT_TASKS = (
    "chexpert-5", "chexpert-14", "chexpert-5-mgca", "chexpert-10-a", "chexpert-10-a-nothree", "chexpert-7-a",
    "chexpert-6-c", "chexpert-age", "chexpert-sex",
)  # fmt: skip


def nih(root: Path) -> Miniature:
    rows = write_nih(root, num_patients=30)
    names = [row["Image Index"] for row in rows[:3]]
    # The header ends with blank columns, the rows do not; Infiltration has another name there.
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,", f"{names[0]},Cardiomegaly,225.084745762712,547.25,86.5,79"]
    lines += [f"{names[2]},Infiltrate,10,20,30,40", f"{names[2]},Nodule,1,2,3,4"]
    (root / "BBox_List_2017.csv").write_text("\n".join(lines) + "\n")
    tasks = ("nih-14", "nih-15", "nih-14-a", "nih-7-a", "nih-14-c", "nih-15-c", "nih-age", "nih-sex")
    return Miniature(root=root, samples=len(rows), tasks=tasks)


def chexpert(root: Path) -> Miniature:
    release = write_chexpert(root, num_patients=30, with_test=True)
    # The later test release is a folder by itself.
    (release / "CheXpert").mkdir()
    for name in ("test", "test.csv"):
        (release / name).rename(release / "CheXpert" / name)
    tables = [release / "train.csv", release / "valid.csv", release / "CheXpert/test.csv"]
    samples = sum(len(path.read_text().splitlines()) - 1 for path in tables)
    return Miniature(root=release, samples=samples, tasks=CHEXPERT_TASKS)


def _picture(path: Path, level: int, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((level + rng.integers(0, 40, (32, 28))).astype(np.uint8)).save(path)


def folder(root: Path) -> Miniature:
    rng = np.random.default_rng(0)
    for number in range(40):
        _picture(root / ("dark" if number % 2 else "bright") / f"{number:02d}.png", 20 if number % 2 else 180, rng)
    return Miniature(root=root, samples=40, labels="label")


def table(root: Path) -> Miniature:
    rng = np.random.default_rng(0)
    lines = ["file,patient,bright"]
    for number in range(40):
        _picture(root / f"images/{number:02d}.png", 180 if number % 2 else 20, rng)
        lines.append(f"images/{number:02d}.png,p{number // 2},{number % 2}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    config = {"table": Path("labels.csv"), "path_column": "file", "group_column": "patient", "label_columns": "bright"}
    return Miniature(root=root, samples=40, config=config, labels="bright")


WRITERS = {"nih": nih, "chexpert": chexpert, "folder": folder, "table": table}
